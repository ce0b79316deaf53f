"""Work that does not fit in memory is done in smaller pieces; the result is the same."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeVar

import torch

from ibxai.backbones import Backbone
from ibxai.errors import UserError

log = logging.getLogger(__name__)
Result = TypeVar("Result")

_MESSAGES = (
    *("can't allocate memory", "not enough memory", "std::bad_alloc", "could not create a memory"),
    *("CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED"),
)


def out_of_memory(error: BaseException) -> bool:
    """Whether an exception means that memory ran out, on a CPU or a GPU."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(message in str(error) for message in _MESSAGES)


def with_backoff(work: Callable[[], Result], backbone: Backbone) -> Result:
    """work(), with half as many network rows at once each time memory runs out; the smaller number stays.

    Raises UserError when a single row does not fit.
    """
    while True:
        try:
            return work()
        except Exception as error:
            if not out_of_memory(error):
                raise
            if backbone.max_passes == 1:
                raise UserError(
                    "Memory runs out even with one network row at once.\nTry a smaller batch_size or another device."
                ) from error
        # outside the handler, where the failed pass's tensors are no longer held by the traceback
        backbone.max_passes //= 2
        log.warning("memory ran out: going on with max_passes=%d", backbone.max_passes)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
