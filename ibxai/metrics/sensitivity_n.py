"""Sensitivity-N: whether the map's values in a random set of pixels tell what taking those pixels away changes.

    r(n) = corr over S of ( sum_{i in S} map_i,  f(x) - f(x without S) ),   S random with |S| = n

Reference: Ancona et al., "Towards better understanding of gradient-based attribution methods", ICLR 2018; with 200
sets an n in InputIBA (sec. 4.4.1) and with a regression's output in CheXplain (sec. 3.1). The papers plot r over n;
here the mean over n is the value, and r(n) the curve. An n at which the map's sums, or the output, are the same for all
sets has no correlation: it is NaN in the curve and left out of the mean, which is NaN when no n is left. So a constant
map has no value, rather than a bad one.

The sets are drawn for the sample and without looking at the map, so all methods are judged by the same ones, and a run
keeps what the network says of them for the next method (`responses.py`). Sets of one draw lie one after another in one
random order of the pixels, each without replacement: one permutation serves every n, and sets of different n do not
overlap before the pixels are used up.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ibxai.backbones import Backbone
from ibxai.draws import sample_keys, tie_breakers
from ibxai.errors import UserError, nearest
from ibxai.methods.perturbation import BASELINES, baseline_picture
from ibxai.metrics.normalisation import Sign, check_sign, undefined, with_sign
from ibxai.metrics.pearson import correlation
from ibxai.types import SCORE_KINDS, Attribution, Batch, ScoreKind


@dataclass(frozen=True)
class SensitivityN:
    """points: how many n, spaced evenly on a log scale from `smallest` pixels to `largest`, a share of the picture.
    sets: random sets of pixels an n. score: "probability", "logit" or "value" of the target.
    baseline: what pixels are set to, "constant" (`value`, in normalised units: 0 is the mean colour) or "blur" (of
    deviation `sigma` pixels). sign: of the map, see `normalisation.py`.
    """

    points: int = 10
    smallest: int = 1
    largest: float = 0.63
    sets: int = 200
    score: ScoreKind = "logit"
    baseline: str = "constant"
    sigma: float = 10.0
    value: float = 0.0
    sign: Sign = "none"

    version: ClassVar[int] = 1
    higher_is_better: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.score not in SCORE_KINDS:
            raise UserError(f"There is no score '{self.score}'. {nearest(self.score, SCORE_KINDS)}")
        if self.baseline not in BASELINES:
            raise UserError(f"There is no baseline '{self.baseline}'. {nearest(self.baseline, BASELINES)}")
        if self.baseline == "blur" and self.sigma <= 0:
            raise UserError(f"The blur's sigma is {self.sigma}: it must be above 0.")
        if self.points < 1 or self.smallest < 1 or not 0 < self.largest <= 1:
            raise UserError(
                f"Sensitivity-N asks for {self.points} set sizes from {self.smallest} pixels to a share of "
                f"{self.largest}: at least 1, at least 1 and a share in 0..1 are expected."
            )
        if self.sets < 3:
            raise UserError(f"Sensitivity-N draws {self.sets} sets an n: a correlation needs 3 or more.")
        check_sign(self.sign)

    def __call__(
        self, backbone: Backbone, batch: Batch, attribution: Attribution, responses: Tensor | None = None
    ) -> Mapping[str, Tensor]:
        """value [B], the mean of r over n; curve [B, S], r at each n; fraction [B, S], n as a share of the pixels.

        responses: what `responses` has returned for these rows, None to ask the network now.
        """
        if responses is None:
            responses = self.responses(backbone, batch)
        heatmap = with_sign(attribution.heatmap, self.sign).flatten(1)
        sums = [
            torch.where(members, heatmap[sample], 0).sum(1, dtype=torch.float64)
            for sample, members in self._sets(batch, backbone.max_passes)
        ]
        drops = -responses.double()  # f(x), the same for all sets, makes no difference to a correlation
        curve = correlation(torch.cat(sums).view_as(drops).mT, drops.mT)
        curve = curve.masked_fill(undefined(attribution.heatmap)[:, None], torch.nan).float()
        fraction = (self._sizes(batch).double() / heatmap.shape[1]).float().expand_as(curve)
        return {"value": curve.nanmean(1), "curve": curve, "fraction": fraction}

    def responses(self, backbone: Backbone, batch: Batch) -> Tensor:
        """[B, sets, S]: the target's score without each set. No map has a part in it: all methods can share it."""
        baseline = baseline_picture(batch.inputs, self.baseline, self.sigma, self.value)
        scores = []
        with torch.no_grad():
            for sample, members in self._sets(batch, backbone.max_passes):
                members = members.view(-1, 1, *batch.inputs.shape[-2:])
                pictures = torch.where(members, baseline[sample], batch.inputs[sample])
                scores.append(batch.target.take(sample).score(backbone(pictures), self.score))
        return torch.cat(scores).view(len(batch), self.sets, -1)

    def _sizes(self, batch: Batch) -> Tensor:
        pixels = batch.inputs[0, 0].numel()
        return set_sizes(pixels, self.points, self.smallest, self.largest).to(batch.inputs.device)

    def _sets(self, batch: Batch, most: int) -> Iterator[tuple[Tensor, Tensor]]:
        """(sample [N], members bool [N, P]), at most `most` sets at once; (sample, draw, n) in order, n fastest."""
        sizes, pixels = self._sizes(batch), batch.inputs[0, 0].numel()
        starts = sizes.cumsum(0) - sizes
        for rows in torch.arange(len(batch) * self.sets * len(sizes), device=sizes.device).split(most):
            draws, place = (rows // len(sizes)).unique_consecutive(return_inverse=True)
            names = [f"{batch.sample_ids[draw // self.sets]} {draw % self.sets}" for draw in draws.tolist()]
            order = tie_breakers(sample_keys(0, names, "sensitivity_n", sizes.device), pixels).int()
            size, start = sizes[rows % len(sizes)].int(), starts[rows % len(sizes)].int()
            yield rows // (self.sets * len(sizes)), (order[place] - start[:, None]) % pixels < size[:, None]


def set_sizes(pixels: int, points: int, smallest: int, largest: float) -> Tensor:
    """int64 [S], S <= points: sizes from `smallest` to `largest` x `pixels`, evenly spaced on a log scale.

    Sizes that round to the same number are taken once. Raises UserError when `smallest` is beyond the largest.
    """
    most = round(largest * pixels)
    if smallest > most:
        raise UserError(f"Sensitivity-N: sets of {smallest} pixels and more, but {largest} of {pixels} are {most}.")
    exponents = torch.linspace(0, 1, points, dtype=torch.float64)
    return (smallest * (most / smallest) ** exponents).round().long().unique()
