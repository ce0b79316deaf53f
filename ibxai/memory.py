"""Memory: work that does not fit is done in smaller pieces, with the same result; freed memory is kept for the next."""

from __future__ import annotations

import ctypes
import logging
import math
import re
import sys
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from ibxai.backbones import Backbone
from ibxai.errors import UserError

log = logging.getLogger(__name__)
Result = TypeVar("Result")

_MESSAGES = re.compile(
    r"can't allocate memory|not enough memory|std::bad_alloc|could not create a memory"
    # oneDNN's words when the code of a kernel finds no room; a primitive *descriptor* is a shape it does not know
    r"|could not (create|execute) a primitive(?! descriptor)"
    r"|CUDA error: out of memory|CUBLAS_STATUS_ALLOC_FAILED|CUDNN_STATUS_ALLOC_FAILED"
)

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h
_NEVER, _ONE_GIB = 2**31 - 1, 2**30


def keep_freed_memory() -> bool:
    """Let this process keep what it frees, for the next tensor. Returns whether its allocator can be told so (glibc).

    By default glibc hands every large tensor back to the system at once, and each pass of a network faults all its
    activations in again: on a CPU that is half the time of a pass.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None:
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, _ONE_GIB)) and bool(mallopt(_M_TRIM_THRESHOLD, _NEVER))


def out_of_memory(error: BaseException) -> bool:
    """Whether an exception means that memory ran out, on a CPU or a GPU."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and _MESSAGES.search(str(error)) is not None


def with_backoff(work: Callable[[], Result], backbone: Backbone, name: str, shape: Sequence[int] = ()) -> Result:
    """work(), with half as many network rows at once each time memory runs out.

    name: who works. shape: of one input. The number of rows that was found to fit is kept for this worker, and it
    begins with it on inputs of this size and on larger ones; nobody else is slowed down.
    Raises UserError when a single row does not fit.
    """
    most, size, kept = backbone.max_passes, math.prod(shape), backbone.rows_that_fit
    backbone.max_passes = min([most, *(rows for (who, least), rows in kept.items() if who == name and least <= size)])
    try:
        while True:
            try:
                return work()
            except Exception as error:
                if not out_of_memory(error):
                    raise
                if backbone.max_passes == 1:
                    told = "Memory runs out even with one network row at once."
                    raise UserError(f"{told}\nTry a smaller batch_size or another device.") from error
            # outside the handler, where the failed pass's tensors are no longer held by the traceback
            backbone.max_passes //= 2
            kept[name, size] = backbone.max_passes
            log.warning("memory ran out: %s goes on with max_passes=%d", name, backbone.max_passes)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
    finally:
        backbone.max_passes = most
