"""Insertion and deletion: how fast the target's score rises, or falls, when pixels come or go in the map's order.

    AUC = area under score(fraction of pixels changed), fraction from 0 to 1       (Petsiuk et al., RISE, BMVC 2018)

By the trapezoid rule with both ends, not divided by the original score. Equal values are ordered by a permutation
drawn for the sample, so a constant map is judged as a random order, not as a scan from the top left. A map that
holds NaN has no order: its values are NaN. The papers' own settings are YAML variants with names: `_igospp` (cells of
a coarse grid), `_input_iba`, `_chexplain`, `_regression`. Of texts tokens come and go, and one that is gone is `<unk>`
(InputIBA, D.3: 10 a step), so a text has the fractions that its length allows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from ibxai.backbones import Backbone, TextBackbone
from ibxai.draws import sample_keys, tie_breakers
from ibxai.errors import UserError, nearest
from ibxai.methods.perturbation import BASELINES, baseline_picture
from ibxai.types import SCORE_KINDS, Attribution, Batch, ScoreKind


@dataclass(frozen=True)
class _PixelOrder:
    """step: below 1 a share of the picture's cells, from 1 on a number of cells. resolution: cells a side, null for
    the pixels themselves; the map is averaged over a cell, and the cells' mask spread bilinearly over the picture.
    baseline: "blur" (of deviation `sigma` pixels, `kernel` wide, null for three deviations to each side) or "constant"
    (`value`, in normalised units: 0 is the mean colour; or "black"); of texts always `<unk>`. score: "probability",
    "logit" or "value" of the target. change: the curve is the absolute change of the score from its start (CheXplain's
    regression version).
    """

    step: float
    baseline: str
    sigma: float = 10.0
    kernel: int | None = None
    value: float | Literal["black"] = 0.0
    score: ScoreKind = "probability"
    resolution: int | None = None
    change: bool = False

    version: ClassVar[int] = 1
    modalities: ClassVar[tuple[str, ...]] = ("picture", "text")

    def __post_init__(self) -> None:
        if self.score not in SCORE_KINDS:
            raise UserError(f"There is no score '{self.score}'. {nearest(self.score, SCORE_KINDS)}")
        if self.step <= 0:
            raise UserError(f"The step of {type(self).__name__} is {self.step}: it must be above 0.")
        if self.baseline not in BASELINES:
            raise UserError(f"There is no baseline '{self.baseline}'. {nearest(self.baseline, BASELINES)}")
        if self.baseline == "blur" and self.sigma <= 0:
            raise UserError(f"The blur's sigma is {self.sigma}: it must be above 0.")
        if self.kernel is not None and (self.kernel < 1 or self.kernel % 2 == 0):
            raise UserError(f"The blur's kernel is {self.kernel}: it must be odd, or null.")
        if self.resolution is not None and self.resolution < 1:
            raise UserError(f"The resolution of {type(self).__name__} is {self.resolution}: 1 or more, or null.")

    def _curve(self, backbone: Backbone, batch: Batch, attribution: Attribution, inserting: bool) -> dict[str, Tensor]:
        """auc [B], curve [B, S] and fraction [B, S], over all pictures and steps in as few passes as fit."""
        inputs, baseline = batch.inputs, self._baseline(backbone, batch.inputs)
        start, end = (baseline, inputs) if inserting else (inputs, baseline)
        heatmap = attribution.heatmap
        if self.resolution is not None:
            heatmap = F.adaptive_avg_pool2d(heatmap[:, None], self.resolution)[:, 0]
        if batch.valid is not None:
            heatmap = heatmap.masked_fill(~batch.valid, -torch.inf)
        rank = pixel_ranks(heatmap, batch.sample_ids)
        cells, changed = self._changed(backbone, batch, heatmap)
        another = changed.diff(dim=1, prepend=changed[:, :1] - 1).flatten() > 0  # a short text reaches its end early
        scores = []
        with torch.no_grad():
            for rows in another.nonzero()[:, 0].split(backbone.max_passes):
                sample, count = rows // changed.shape[1], changed.flatten()[rows]
                reached = (rank[sample] < count[:, None]).view(-1, *heatmap.shape[1:]).unsqueeze(batch.channels)
                mixed = self._mixed(start[sample], end[sample], reached)
                scores.append(batch.scores(backbone, mixed, sample, self.score))
        curve = torch.cat(scores)[another.cumsum(0) - 1].view_as(changed)
        if self.change:
            curve = (curve - curve[:, :1]).abs()
        undefined = attribution.heatmap.isnan().flatten(1).any(1)
        curve = curve.masked_fill(undefined[:, None], torch.nan)
        fraction = (changed.double() / cells[:, None]).float()
        return {"auc": torch.trapezoid(curve, fraction, dim=1), "curve": curve, "fraction": fraction}

    def _changed(self, backbone: Backbone, batch: Batch, heatmap: Tensor) -> tuple[Tensor, Tensor]:
        """(cells of each map [B], how many are changed at each point of its curve [B, S]), int64."""
        if batch.valid is None:
            changed = changed_counts(heatmap[0].numel(), self.step).to(heatmap.device)
            return changed[-1].expand(len(batch)), changed.expand(len(batch), -1)
        lengths = batch.valid.sum(1)
        return lengths, changed_tokens(lengths, self.step, backbone.input_shape[0])

    def _baseline(self, backbone: Backbone, inputs: Tensor) -> Tensor:
        if isinstance(backbone, TextBackbone):
            if self.resolution is not None:
                raise UserError(f"resolution={self.resolution} is for pictures: of texts choose resolution=null.")
            return backbone.unknown.expand_as(inputs)
        value = backbone.preprocessing.black.to(inputs.device) if self.value == "black" else self.value
        return baseline_picture(inputs, self.baseline, self.sigma, value, self.kernel)

    def _mixed(self, start: Tensor, end: Tensor, reached: Tensor) -> Tensor:
        """start [N, C, H, W] with `end` where `reached` [N, 1, h, w]; between cells a blend of the two."""
        if self.resolution is None:
            return torch.where(reached, end, start)
        share = F.interpolate(reached.to(start.dtype), size=start.shape[-2:], mode="bilinear", align_corners=False)
        return torch.lerp(start, end, share)


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
    """From the picture to the baseline, the most important pixels first. Lower is better; of a `change`, higher."""

    step: float = 0.02
    baseline: str = "blur"

    @property
    def higher_is_better(self) -> bool:
        return self.change

    def __call__(self, backbone: Backbone, batch: Batch, attribution: Attribution) -> Mapping[str, Tensor]:
        return self._curve(backbone, batch, attribution, inserting=False)


def pixel_ranks(heatmap: Tensor, sample_ids: tuple[str, ...]) -> Tensor:
    """int64 [B, P]: 0 for the highest value of each map [B, ...]; equal values in an order drawn for the sample."""
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


def changed_tokens(lengths: Tensor, step: float, longest: int) -> Tensor:
    """int64 [B, S]: `changed_counts` of texts of these lengths [B]; S depends on the step and the longest text there
    can be, so a text that is shorter stays at its end.
    """
    points = math.ceil(1 / step - 1e-9) if step < 1 else math.ceil(longest / step)
    size = lengths.double() * step if step < 1 else torch.full_like(lengths, step, dtype=torch.float64)
    counts = (torch.arange(points + 1, device=lengths.device) * size[:, None]).round().long()
    counts[:, -1] = lengths
    return counts.minimum(lengths[:, None])
