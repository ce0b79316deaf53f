"""Localisation: how well a map lies on what a person annotated (boxes, lesions, regions of a lung).

`ehr` effective heat ratio (InputIBA, sec. 4.5); `bbox` share of the top pixels in the box (Schulz et al., ICLR 2020);
`iou` intersection over union of the thresholded map; `pointing_game` whether the maximum lies there (Zhang et al.,
IJCV 2018). They judge agreement with a person, not with the network: a network that looks elsewhere makes an honest
map score badly.

Annotations are planes bool [B, R, H, W] in `batch.regions`. A row whose planes are all empty is not annotated, or its
region was cut away by the crop: NaN. Zero is no evidence: where `sign` makes maps positive, a pixel of value 0 is never
highlighted, however low the threshold.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from ibxai.backbones import Backbone
from ibxai.errors import UserError, nearest
from ibxai.metrics.insertion import pixel_ranks
from ibxai.metrics.normalisation import Sign, check_sign, undefined, with_sign
from ibxai.thresholds import RULES as CUTS
from ibxai.thresholds import cut, quantile
from ibxai.types import Attribution, Batch

Ratio = Literal["heat_per_pixel", "heat_share", "pixel_share"]
RATIOS: tuple[str, ...] = get_args(Ratio)
Rule = Literal["fixed", "quantile", "mean_std", "otsu", "absolute", "best"]
RULES = (*CUTS, "best")
_SWEEP = 50  # levels of the rule "best": 0, 0.02 ... 0.98 of the maximum; CheXplain's code goes as far


@dataclass(frozen=True)
class EffectiveHeatRatio:
    """Effective heat ratio: heat inside the box over the number of highlighted pixels, as an area over thresholds.

        EHR = area under  sum_{i in box, m_i >= t(q)} m_i / #{i : m_i >= t(q)},   t(q) = max(quantile q of m, floor)

    InputIBA, sec. 4.5, is read so that its Fig. 11 comes out: 1.0, 0.4375 (printed 0.4) and 0.25 (printed 0.2). Of the
    readings tried only this one does it: thresholds `>= quantile` and `>= 0.1`, heat over pixels, on a map that is not
    scaled. It depends on the map's unit: a map below 0.1 has no effective heat, and 0 is its ratio. For maps in
    different units use scale=max, or a ratio that has no unit.

    quantiles: how many thresholds, evenly over the quantiles 0..1. floor: the least threshold, null for none.
    scale: "none" or "max" (the map is divided by its maximum). ratio: "heat_per_pixel"; "heat_share" (over the
    highlighted heat); "pixel_share" (highlighted pixels inside over all highlighted). largest: rows whose region covers
    more than this share of the picture are left out (NaN). region, sign: see the module and `normalisation.py`.
    """

    quantiles: int = 11
    floor: float | None = 0.1
    scale: Literal["none", "max"] = "none"
    ratio: Ratio = "heat_per_pixel"
    largest: float = 0.33
    region: str = "target"
    sign: Sign = "positive"

    version: ClassVar[int] = 1
    higher_is_better: ClassVar[bool] = True
    uses_regions: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_sign(self.sign)
        _check_share("largest", self.largest)
        if self.quantiles < 2:
            raise UserError(f"EHR needs 2 quantiles or more, not {self.quantiles}: the area has both ends.")
        if self.scale not in ("none", "max"):
            raise UserError(f"There is no scale '{self.scale}': none or max is expected.")
        if self.ratio not in RATIOS:
            raise UserError(f"There is no ratio '{self.ratio}'. {nearest(self.ratio, RATIOS)}")

    def __call__(self, backbone: Backbone, batch: Batch, attribution: Attribution) -> Mapping[str, Tensor]:
        """value [B]: in the map's unit for "heat_per_pixel" (0..1 for scale=max), else a share 0..1."""
        values = with_sign(attribution.heatmap, self.sign).double().flatten(1)
        if self.scale == "max":
            values = _over_maximum(values)
        inside = region_of(batch, self.region).any(1).flatten(1)
        levels = torch.linspace(0, 1, self.quantiles, dtype=torch.float64, device=values.device)
        thresholds = quantile(values, levels)
        if self.floor is not None:
            thresholds = thresholds.clamp_min(self.floor)
        highlighted = Highlighted.of(values, _without_zero(thresholds, self.sign))
        over = highlighted.total(values) if self.ratio == "heat_share" else highlighted.count()
        part = highlighted.total(inside if self.ratio == "pixel_share" else values * inside)
        area = torch.trapezoid(torch.where(over != 0, part / over, 0), levels, dim=1)
        return {"value": _judged(area, attribution, inside, self.largest)}


@dataclass(frozen=True)
class BoxShare:
    """bbox: the share of the n pixels of the highest values that lie in the region, n being the region's area.

    Schulz et al. (IBA), ICLR 2020; the same as relevance rank accuracy (Arras et al., 2022). Equal values
    are ordered as by insertion and deletion, by a permutation drawn for the sample. largest, region, sign: as EHR's.
    """

    largest: float = 0.33
    region: str = "target"
    sign: Sign = "none"

    version: ClassVar[int] = 1
    higher_is_better: ClassVar[bool] = True
    uses_regions: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_sign(self.sign)
        _check_share("largest", self.largest)

    def __call__(self, backbone: Backbone, batch: Batch, attribution: Attribution) -> Mapping[str, Tensor]:
        """value [B] in 0..1."""
        inside = region_of(batch, self.region).any(1).flatten(1)
        rank = pixel_ranks(with_sign(attribution.heatmap, self.sign), batch.sample_ids)
        area = inside.sum(1)
        share = ((rank < area[:, None]) & inside).sum(1) / area
        return {"value": _judged(share, attribution, inside, self.largest)}


@dataclass(frozen=True)
class IoU:
    """Intersection over union of the region and the pixels that a threshold highlights.

    rule: "fixed" (`level` times the map's maximum), "quantile" (of `level`), "mean_std" (the mean plus `level`
    deviations), "otsu" (no level), "absolute" (`level` in the map's unit), "best" (the level 0, 0.02 ... 0.98 of the
    maximum that suits this picture best: an upper bound, since the annotation chooses it; its curve over all levels
    says which one level suits a whole dataset).
    CheXplain (sec. 3.2) thresholds without saying how; its code tries levels up to 0.98. A pixel at the threshold
    is highlighted. per: "union" of the planes, or "plane": each plane by itself, and their mean (a box, a lesion, one
    of BrixIA's six regions a plane). region, sign: see the module and `normalisation.py`.
    """

    rule: Rule = "otsu"
    level: float = 0.5
    per: Literal["union", "plane"] = "union"
    region: str = "target"
    sign: Sign = "positive"

    version: ClassVar[int] = 1
    higher_is_better: ClassVar[bool] = True
    uses_regions: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_sign(self.sign)
        if self.rule not in RULES:
            raise UserError(f"There is no threshold rule '{self.rule}'. {nearest(self.rule, RULES)}")
        if self.per not in ("union", "plane"):
            raise UserError(f"IoU is of the union or of each plane, not of '{self.per}'.")
        if self.rule in ("fixed", "quantile"):
            _check_share("level", self.level)

    def __call__(self, backbone: Backbone, batch: Batch, attribution: Attribution) -> Mapping[str, Tensor]:
        """value [B] in 0..1; of the rule "best" also curve [B, S] over fraction [B, S], the levels."""
        heatmap = with_sign(attribution.heatmap, self.sign)
        values, regions = heatmap.double().flatten(1), region_of(batch, self.region)
        thresholds = _without_zero(self._thresholds(heatmap), self.sign)
        union = regions.any(1, keepdim=True)
        planes = (union if self.per == "union" else regions).flatten(2)
        curve = _plane_mean(values, planes, thresholds)
        best = {"value": _judged(curve.amax(1), attribution, union.flatten(1))}
        if self.rule != "best":
            return best
        judged = _judged(curve, attribution, union.flatten(1))
        return {**best, "curve": judged, "fraction": _sweep(values).float().expand_as(judged)}

    def _thresholds(self, heatmap: Tensor) -> Tensor:
        """float64 [B, T]: T is 1, or the levels of "best". Under a map without a positive value: infinity."""
        if self.rule != "best":
            return cut(heatmap, self.rule, self.level)[:, None]
        highest = heatmap.double().flatten(1).amax(1, keepdim=True)
        return torch.where(highest > 0, _sweep(highest) * highest, torch.inf)


@dataclass(frozen=True)
class PointingGame:
    """Whether the map's maximum lies in the region, or within `tolerance` pixels of it.

    Zhang et al., "Top-Down Neural Attention by Excitation Backprop", IJCV 2018, with 15 pixels at the picture's own
    size; here they are pixels of the network's input. Several maxima count by their share, which is the expected value
    of picking one of them at random: a constant map scores what chance does. region, sign: as EHR's.
    """

    tolerance: int = 15
    region: str = "target"
    sign: Sign = "none"

    version: ClassVar[int] = 1
    higher_is_better: ClassVar[bool] = True
    uses_regions: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_sign(self.sign)
        if self.tolerance < 0:
            raise UserError(f"The pointing game's tolerance is {self.tolerance}: 0 pixels or more.")

    def __call__(self, backbone: Backbone, batch: Batch, attribution: Attribution) -> Mapping[str, Tensor]:
        """value [B] in 0..1; 0 or 1 where the maximum is one pixel."""
        values = with_sign(attribution.heatmap, self.sign).flatten(1)
        region = region_of(batch, self.region).any(1)
        near = grown(region, self.tolerance).flatten(1)
        highest = values == values.amax(1, keepdim=True)
        share = (highest & near).sum(1) / highest.sum(1).clamp_min(1)
        return {"value": _judged(share, attribution, region.flatten(1))}


@dataclass(frozen=True)
class Highlighted:
    """What lies at or above each threshold, from one sort: it begins at start [B, T] of the rising order [B, P]."""

    order: Tensor
    start: Tensor

    @classmethod
    def of(cls, values: Tensor, thresholds: Tensor) -> Highlighted:
        """values: [B, P]; thresholds: [B, T]."""
        rising, order = values.sort(1)
        return cls(order, torch.searchsorted(rising, thresholds.contiguous()))

    def count(self) -> Tensor:
        """float64 [B, T]: the number of pixels."""
        return (self.order.shape[1] - self.start).double()

    def total(self, values: Tensor) -> Tensor:
        """float64 [B, T]: the sum of these values [B, P] over the highlighted pixels."""
        behind = F.pad(values.double().gather(1, self.order).flip(1).cumsum(1).flip(1), (0, 1))
        return behind.gather(1, self.start)


def grown(region: Tensor, radius: int) -> Tensor:
    """bool [B, H, W]: pixels whose centre is at most `radius` pixels from the centre of one of the region's."""
    places = torch.arange(-radius, radius + 1, device=region.device)
    disc = (places[:, None] ** 2 + places**2 <= radius**2).float()
    touched = F.conv2d(region[:, None].float(), disc[None, None], padding=radius)
    return touched[:, 0] > 0.5


def region_of(batch: Batch, name: str) -> Tensor:
    """bool [B, R, H, W]: the planes of a region; one empty plane where no row of the batch has it."""
    if name in batch.regions:
        return batch.regions[name].bool()
    return torch.zeros(len(batch), 1, *batch.inputs.shape[-2:], dtype=torch.bool, device=batch.inputs.device)


def _plane_mean(values: Tensor, planes: Tensor, thresholds: Tensor) -> Tensor:
    """float64 [B, T]: IoU of values [B, P] at thresholds [B, T] with planes [B, R, P], mean over those not empty."""
    highlighted = Highlighted.of(values, thresholds)
    count, total = highlighted.count(), torch.zeros_like(thresholds)
    for plane in planes.unbind(1):
        inside = highlighted.total(plane)
        area = plane.sum(1, keepdim=True)
        total += torch.where(area > 0, inside / (count + area - inside), 0)
    return total / planes.any(2).sum(1, keepdim=True)


def _sweep(values: Tensor) -> Tensor:
    """float64 [S]: the levels of the rule "best", shares of the maximum."""
    return torch.arange(_SWEEP, dtype=torch.float64, device=values.device) / _SWEEP


def _over_maximum(values: Tensor) -> Tensor:
    """[B, P]: divided by the row's maximum; a map without a positive value stays."""
    highest = values.amax(1, keepdim=True)
    return values / torch.where(highest > 0, highest, 1)


def _without_zero(thresholds: Tensor, sign: Sign) -> Tensor:
    """Thresholds that a pixel of value 0 does not reach, where maps are positive."""
    return thresholds if sign == "none" else thresholds.clamp_min(torch.finfo(torch.float32).smallest_normal)


def _judged(value: Tensor, attribution: Attribution, inside: Tensor, largest: float = 1.0) -> Tensor:
    """float32 [B, ...]: NaN where a map holds NaN, nothing is annotated, or the region [B, P] is too large."""
    share = inside.sum(1) / inside.shape[1]
    left_out = undefined(attribution.heatmap) | (share == 0) | (share > largest)
    return value.float().masked_fill(left_out.view(-1, *(1,) * (value.dim() - 1)), torch.nan)


def _check_share(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise UserError(f"{name} is {value}: a share in 0..1 is expected.")
