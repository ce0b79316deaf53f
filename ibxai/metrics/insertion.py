"""Insertion and deletion: how fast the target's score rises, or falls, when pixels come or go in the map's order.

    AUC = area under score(fraction of pixels changed), fraction from 0 to 1       (Petsiuk et al., RISE, BMVC 2018)

By the trapezoid rule with both ends, not divided by the original score. Equal values are ordered by a permutation
drawn for the sample, so a constant map is judged as a random order, not as a scan from the top left. A map that
holds NaN has no order: its values are NaN.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ibxai.backbones import Backbone
from ibxai.draws import sample_keys, tie_breakers
from ibxai.errors import UserError, nearest
from ibxai.methods.perturbation import BASELINES, baseline_picture
from ibxai.types import SCORE_KINDS, Attribution, Batch, ScoreKind


@dataclass(frozen=True)
class _PixelOrder:
    """step: below 1 a share of the picture's pixels, from 1 on a number of pixels.
    baseline: "blur" (of deviation `sigma` pixels) or "constant" (`value`, in normalised units: 0 is the mean colour).
    score: "probability" or "logit" of the target.
    """

    step: float
    baseline: str
    sigma: float = 10.0
    value: float = 0.0
    score: ScoreKind = "probability"

    version: ClassVar[int] = 1

    def __post_init__(self) -> None:
        if self.score not in SCORE_KINDS:
            raise UserError(f"There is no score '{self.score}'. {nearest(self.score, SCORE_KINDS)}")
        if self.step <= 0:
            raise UserError(f"The step of {type(self).__name__} is {self.step}: it must be above 0.")
        if self.baseline not in BASELINES:
            raise UserError(f"There is no baseline '{self.baseline}'. {nearest(self.baseline, BASELINES)}")
        if self.baseline == "blur" and self.sigma <= 0:
            raise UserError(f"The blur's sigma is {self.sigma}: it must be above 0.")

    def _curve(self, backbone: Backbone, batch: Batch, attribution: Attribution, inserting: bool) -> dict[str, Tensor]:
        """auc [B], curve [B, S] and fraction [B, S], over all pictures and steps in as few passes as fit."""
        inputs, height, width = batch.inputs, *batch.inputs.shape[-2:]
        rank = pixel_ranks(attribution.heatmap, batch.sample_ids).view(len(batch), 1, height, width)
        baseline = baseline_picture(inputs, self.baseline, self.sigma, self.value)
        start, end = (baseline, inputs) if inserting else (inputs, baseline)
        changed = changed_counts(height * width, self.step).to(inputs.device)
        scores = []
        with torch.no_grad():
            for rows in torch.arange(len(batch) * len(changed), device=inputs.device).split(backbone.max_passes):
                sample, count = rows // len(changed), changed[rows % len(changed)]
                pictures = torch.where(rank[sample] < count.view(-1, 1, 1, 1), end[sample], start[sample])
                scores.append(batch.target.take(sample).score(backbone(pictures), self.score))
        curve = torch.cat(scores).view(len(batch), -1)
        undefined = attribution.heatmap.isnan().flatten(1).any(1)
        curve = curve.masked_fill(undefined[:, None], torch.nan)
        fraction = (changed.double() / (height * width)).float().expand_as(curve)
        return {"auc": torch.trapezoid(curve, fraction, dim=1), "curve": curve, "fraction": fraction}


@dataclass(frozen=True)
class Insertion(_PixelOrder):
    """From the baseline to the picture, the most important pixels first. Higher is better."""

    step: float = 0.02
    baseline: str = "blur"

    higher_is_better: ClassVar[bool] = True

    def __call__(self, backbone: Backbone, batch: Batch, attribution: Attribution) -> Mapping[str, Tensor]:
        return self._curve(backbone, batch, attribution, inserting=True)


@dataclass(frozen=True)
class Deletion(_PixelOrder):
    """From the picture to the baseline, the most important pixels first. Lower is better."""

    step: float = 0.02
    baseline: str = "blur"

    higher_is_better: ClassVar[bool] = False

    def __call__(self, backbone: Backbone, batch: Batch, attribution: Attribution) -> Mapping[str, Tensor]:
        return self._curve(backbone, batch, attribution, inserting=False)


def pixel_ranks(heatmap: Tensor, sample_ids: tuple[str, ...]) -> Tensor:
    """int64 [B, P]: 0 for the highest value of each map [B, H, W]; equal values in an order drawn for the sample."""
    flat = heatmap.flatten(1)
    shuffle = tie_breakers(sample_keys(0, sample_ids, "ties", heatmap.device), flat.shape[1])
    order = flat.gather(1, shuffle).argsort(dim=1, descending=True, stable=True)
    places = torch.arange(flat.shape[1], device=heatmap.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, shuffle.gather(1, order), places)


def changed_counts(pixels: int, step: float) -> Tensor:
    """int64 [S]: pixels changed at each point of the curve, from 0 to all, whatever the last step leaves over."""
    size = step * pixels if step < 1 else step
    points = torch.arange(0, pixels, size, dtype=torch.float64).round().long().unique()
    return torch.cat([points[points < pixels], torch.tensor([pixels])])
