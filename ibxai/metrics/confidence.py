"""What the network says of the map's best pixels alone, and of the picture without them.

`pixel_ratio`: the score when only the top k % of the pixels are shown, the rest being the baseline, and when they are
taken away (iGOS++, Fig. 11, its "pixel ratio": 6 % shown, 12 % removed). `confidence_drop`: by what share the score
falls when only what the map highlights is shown, and whether it rises:

    drop = max(0, Y - O) / Y,   gain = 1 if O > Y else 0        (Chattopadhay et al., Grad-CAM++, WACV 2018)

with Y the score of the picture and O of the highlighted part. Their means over pictures, in percent there and as shares
here, are Average Drop and Increase in Confidence. Mind that a constant map shows the whole picture: its drop of 0 is
perfect. So a drop means nothing beside a map that highlights more.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ibxai.backbones import Backbone
from ibxai.errors import UserError, nearest
from ibxai.methods.perturbation import BASELINES, baseline_picture
from ibxai.metrics.insertion import pixel_ranks
from ibxai.metrics.normalisation import Sign, check_sign, undefined, with_sign
from ibxai.types import SCORE_KINDS, Attribution, Batch, ScoreKind


@dataclass(frozen=True, kw_only=True)
class _Shown:
    """baseline: what is shown elsewhere, "blur" (of deviation `sigma` pixels) or "constant" (`value`, in normalised
    units: 0 is the mean colour). score: "probability", "logit" or "value" of the target. sign: of the map, see
    `normalisation.py`.
    """

    baseline: str = "blur"
    sigma: float = 10.0
    value: float = 0.0
    score: ScoreKind = "probability"
    sign: Sign = "none"

    version: ClassVar[int] = 1

    def __post_init__(self) -> None:
        check_sign(self.sign)
        if self.score not in SCORE_KINDS:
            raise UserError(f"There is no score '{self.score}'. {nearest(self.score, SCORE_KINDS)}")
        if self.baseline not in BASELINES:
            raise UserError(f"There is no baseline '{self.baseline}'. {nearest(self.baseline, BASELINES)}")
        if self.baseline == "blur" and self.sigma <= 0:
            raise UserError(f"The blur's sigma is {self.sigma}: it must be above 0.")

    def _scores(self, backbone: Backbone, batch: Batch, shares: Tensor) -> Tensor:
        """[B, S]: the score of the picture where shares [B, S, H, W] are 1, of the baseline where they are 0."""
        baseline = baseline_picture(batch.inputs, self.baseline, self.sigma, self.value)
        variants, scores = shares.shape[1], []
        with torch.no_grad():
            for rows in torch.arange(len(batch) * variants, device=shares.device).split(backbone.max_passes):
                sample = rows // variants
                share = shares[sample, rows % variants][:, None].to(baseline.dtype)
                pictures = torch.lerp(baseline[sample], batch.inputs[sample], share)
                scores.append(batch.target.take(sample).score(backbone(pictures), self.score))
        return torch.cat(scores).view(len(batch), variants)


@dataclass(frozen=True, kw_only=True)
class PixelRatio(_Shown):
    """percent: the sizes k of the part that is shown and taken away, in percent of the pixels. The rest: `_Shown`."""

    percent: tuple[float, ...] = (6.0, 12.0)

    higher_is_better: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.percent or not all(0 < k <= 100 for k in self.percent):
            raise UserError(f"percent is {list(self.percent)}: numbers above 0 and up to 100 are expected.")
        if len(set(self.percent)) < len(self.percent):
            raise UserError(f"percent is {list(self.percent)}: each may come once.")

    def __call__(self, backbone: Backbone, batch: Batch, attribution: Attribution) -> Mapping[str, Tensor]:
        """shown_<k>, removed_<k> [B], the scores; value [B], the mean over k of shown minus removed (ours)."""
        rank = pixel_ranks(with_sign(attribution.heatmap, self.sign), batch.sample_ids)
        pixels = rank.shape[1]
        top = [(rank < max(1, round(k / 100 * pixels))).view_as(attribution.heatmap) for k in self.percent]
        shares = torch.stack([*top, *(~chosen for chosen in top)], 1)
        scores = self._scores(backbone, batch, shares)
        scores = scores.masked_fill(undefined(attribution.heatmap)[:, None], torch.nan)
        shown, removed = scores[:, : len(top)], scores[:, len(top) :]
        named = {f"shown_{k:g}": shown[:, i] for i, k in enumerate(self.percent)}
        named |= {f"removed_{k:g}": removed[:, i] for i, k in enumerate(self.percent)}
        return {"value": (shown - removed).mean(1), **named}


@dataclass(frozen=True, kw_only=True)
class ConfidenceDrop(_Shown):
    """percent: null shows the picture times the map over its maximum, as Grad-CAM++ does; a number shows the top
    percent of the pixels (50 in Score-CAM). The rest: `_Shown`. Grad-CAM++ multiplies raw pixels, so that black is
    what is shown elsewhere; here it is the baseline.
    """

    percent: float | None = None
    baseline: str = "constant"
    sign: Sign = "positive"

    higher_is_better: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.percent is not None and not 0 < self.percent <= 100:
            raise UserError(f"percent is {self.percent}: a number above 0 and up to 100, or null, is expected.")
        if self.percent is None and self.sign == "none":
            raise UserError("A signed map is no mask: with percent=null, sign has to be positive or abs.")

    def __call__(self, backbone: Backbone, batch: Batch, attribution: Attribution) -> Mapping[str, Tensor]:
        """value [B], the drop as a share 0..1 (over |Y| where a value is negative); gain [B], 0 or 1; shown [B], O."""
        shown = self._mask(attribution.heatmap, batch.sample_ids)
        scores = self._scores(backbone, batch, torch.stack([torch.ones_like(shown), shown], 1))
        scores = scores.masked_fill(undefined(attribution.heatmap)[:, None], torch.nan)
        whole, part = scores.unbind(1)
        gain = (part > whole).to(part.dtype).masked_fill(part.isnan(), torch.nan)
        return {"value": (whole - part).clamp_min(0) / whole.abs(), "gain": gain, "shown": part}

    def _mask(self, heatmap: Tensor, sample_ids: tuple[str, ...]) -> Tensor:
        """[B, H, W] in 0..1: how much of the picture is shown."""
        signed = with_sign(heatmap, self.sign)
        if self.percent is None:
            highest = signed.flatten(1).amax(1)[:, None, None]
            return signed / torch.where(highest > 0, highest, 1)
        rank = pixel_ranks(signed, sample_ids)
        return (rank < max(1, round(self.percent / 100 * rank.shape[1]))).view_as(heatmap).to(heatmap.dtype)
