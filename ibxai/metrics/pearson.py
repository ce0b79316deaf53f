"""Pearson: how well a map follows a map of severity, as the correlation of their pixels.

    r = cov(map, severity) / (std(map) std(severity)), over the pixels of one picture        (CheXplain, sec. 3.2)

Reference: Khakzar et al. (CheXplain), MICCAI 2021: each pixel of a chest X-ray has the severity of its region, 0 to 3,
and 0 outside the lungs. r has no unit and does not change with the map's scale or offset. Of a map or a severity that
is constant it is undefined: NaN, not 0. `within` restricts the pixels to a region; the paper takes all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ibxai.backbones import Backbone
from ibxai.metrics.normalisation import Sign, check_sign, undefined, with_sign
from ibxai.types import Attribution, Batch


@dataclass(frozen=True)
class SeverityCorrelation:
    """region: the severity, float [B, R, H, W] in batch.regions (its planes are added). sign: of the map, see
    `normalisation.py`. within: name of a region outside which pixels do not count; null for all pixels.
    """

    region: str = "severity"
    sign: Sign = "none"
    within: str | None = None

    version: ClassVar[int] = 1
    higher_is_better: ClassVar[bool] = True
    uses_regions: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_sign(self.sign)

    def __call__(self, backbone: Backbone, batch: Batch, attribution: Attribution) -> Mapping[str, Tensor]:
        """value [B] in -1..1. NaN: no severity in the row, a constant one, a constant map, or a map with NaN."""
        heatmap = with_sign(attribution.heatmap, self.sign).flatten(1)
        if self.region not in batch.regions or (self.within is not None and self.within not in batch.regions):
            return {"value": torch.full_like(heatmap[:, 0], torch.nan)}
        severity = batch.regions[self.region].double().sum(1).flatten(1)
        counted = torch.ones_like(severity, dtype=torch.bool)
        if self.within is not None:
            counted = batch.regions[self.within].any(1).flatten(1)
        value = correlation(heatmap.double(), severity, counted)
        return {"value": value.masked_fill(undefined(attribution.heatmap), torch.nan).float()}


def correlation(first: Tensor, second: Tensor, counted: Tensor | None = None) -> Tensor:
    """float64 [...]: Pearson's r over the last dimension of two tensors [..., N], of the entries `counted` [..., N].

    NaN, as 0 / 0, where either is constant; and where either is not finite.
    """
    weight = torch.ones_like(first) if counted is None else counted.to(first.dtype)
    one, two = _centred(first, weight), _centred(second, weight)
    return ((one * two).sum(-1) / (one.square().sum(-1) * two.square().sum(-1)).sqrt()).clamp(-1, 1)


def _centred(values: Tensor, weight: Tensor) -> Tensor:
    """Deviations from the mean, 0 where the weight is. Of a constant they are 0 exactly: it is scaled to ones first."""
    values = torch.where(weight > 0, values, 0)
    largest = values.abs().amax(-1, keepdim=True)
    scaled = values / torch.where(largest > 0, largest, 1)
    return torch.where(weight > 0, scaled - scaled.sum(-1, keepdim=True) / weight.sum(-1, keepdim=True), 0)
