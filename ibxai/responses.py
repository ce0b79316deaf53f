"""What the network says of pictures that a metric shows it whatever the map, kept for the next method.

Sensitivity-N takes random sets of pixels away: 2,000 network passes a picture, the same for every map of it. They are
run once a (network, dataset, metric's settings, sample, explained output) and kept beside the runs on that network.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from ibxai.backbones import Backbone
from ibxai.store import safe_name, write_atomically
from ibxai.types import Attribution, Batch

_NAME = "responses"


@runtime_checkable
class SharesResponses(Protocol):
    """A metric whose network passes do not depend on the map: `responses` runs them [B, ...], its call takes them."""

    def responses(self, backbone: Backbone, batch: Batch) -> Tensor: ...
    def __call__(
        self, backbone: Backbone, batch: Batch, attribution: Attribution, responses: Tensor | None = None
    ) -> Mapping[str, Tensor]: ...


@dataclass(frozen=True)
class KeptResponses:
    """folder: of one metric with one setting on one network, one file a (sample, explained output)."""

    folder: Path

    def of(self, metric: SharesResponses, backbone: Backbone, batch: Batch) -> Tensor:
        """The responses [B, ...] of these rows: read, or made and kept. The targets have to be bound."""
        rows = zip(batch.sample_ids, batch.target.describe(), strict=True)
        paths = [self.folder / f"{safe_name(f'{sample_id}@{output}')}.safetensors" for sample_id, output in rows]
        found = {place: kept for place, path in enumerate(paths) if (kept := _read(path)) is not None}
        missing = [place for place in range(len(paths)) if place not in found]
        if missing:
            made = metric.responses(backbone, batch.take(missing)).cpu()
            for place, responses in zip(missing, made, strict=True):
                found[place] = responses
                write_atomically(paths[place], safetensors.torch.save({_NAME: responses.contiguous()}))
        return torch.stack([found[place] for place in range(len(paths))]).to(batch.inputs.device)


def _read(path: Path) -> Tensor | None:
    """None for a file that is absent, cut short or not ours: it is made again."""
    try:
        return safetensors.torch.load_file(path)[_NAME]
    except (OSError, KeyError, safetensors.SafetensorError):
        return None
