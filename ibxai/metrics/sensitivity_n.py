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

Texts have different lengths, so n is a share of a text's tokens (InputIBA, 4.4.1), and a token that is taken away is
`<unk>`. Sizes may then round to the same number: all are kept, with other sets.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ibxai.backbones import Backbone, TextBackbone
from ibxai.draws import sample_keys, tie_breakers
from ibxai.errors import UserError, nearest
from ibxai.methods.perturbation import BASELINES, baseline_picture
from ibxai.metrics.normalisation import Sign, check_sign, undefined, with_sign
from ibxai.metrics.pearson import correlation
from ibxai.types import SCORE_KINDS, Attribution, Batch, ScoreKind


@dataclass(frozen=True)
class SensitivityN:
    """points: how many n, spaced evenly on a log scale from `smallest` (below 1 a share, from 1 on a number of pixels
    or tokens) to `largest`, a share of the picture or text. sets: random sets an n. score: "probability", "logit" or
    "value" of the target. baseline: what pixels are set to, "constant" (`value`, in normalised units: 0 is the mean
    colour) or "blur" (of deviation `sigma` pixels); tokens always to `<unk>`. sign: of the map, see `normalisation.py`.
    """

    points: int = 10
    smallest: int | float = 1
    largest: float = 0.63
    sets: int = 200
    score: ScoreKind = "logit"
    baseline: str = "constant"
    sigma: float = 10.0
    value: float = 0.0
    sign: Sign = "none"

    version: ClassVar[int] = 1
    modalities: ClassVar[tuple[str, ...]] = ("picture", "text")
    higher_is_better: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.score not in SCORE_KINDS:
            raise UserError(f"There is no score '{self.score}'. {nearest(self.score, SCORE_KINDS)}")
        if self.baseline not in BASELINES:
            raise UserError(f"There is no baseline '{self.baseline}'. {nearest(self.baseline, BASELINES)}")
        if self.baseline == "blur" and self.sigma <= 0:
            raise UserError(f"The blur's sigma is {self.sigma}: it must be above 0.")
        if self.points < 1 or self.smallest <= 0 or not 0 < self.largest <= 1:
            raise UserError(
                f"Sensitivity-N asks for {self.points} set sizes from {self.smallest} pixels to a share of "
                f"{self.largest}: at least 1, above 0 and a share in 0..1 are expected."
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
        sizes, counts = self._sizes(batch)
        fraction = (sizes.double() / counts[:, None]).float()
        return {"value": curve.nanmean(1), "curve": curve, "fraction": fraction}

    def responses(self, backbone: Backbone, batch: Batch) -> Tensor:
        """[B, sets, S]: the target's score without each set. No map has a part in it: all methods can share it."""
        if isinstance(backbone, TextBackbone):
            baseline = backbone.unknown.expand_as(batch.inputs)
        else:
            baseline = baseline_picture(batch.inputs, self.baseline, self.sigma, self.value)
        scores = []
        with torch.no_grad():
            for sample, members in self._sets(batch, backbone.max_passes):
                inputs = torch.where(batch.over_inputs(members), baseline[sample], batch.inputs[sample])
                scores.append(batch.scores(backbone, inputs, sample, self.score))
        return torch.cat(scores).view(len(batch), self.sets, -1)

    def _sizes(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """(n [B, S], pixels or tokens of each sample [B]), int64."""
        if batch.valid is not None:
            lengths = batch.valid.sum(1)
            return token_set_sizes(lengths, self.points, self.smallest, self.largest), lengths
        pixels = batch.places.numel()
        sizes = set_sizes(pixels, self.points, self.smallest, self.largest).to(batch.inputs.device)
        return sizes.expand(len(batch), -1), torch.full_like(sizes[:1], pixels).expand(len(batch))

    def _sets(self, batch: Batch, most: int) -> Iterator[tuple[Tensor, Tensor]]:
        """(sample [N], members bool [N, P]), at most `most` sets at once; (sample, draw, n) in order, n fastest."""
        sizes, counts = self._sizes(batch)
        points, places = sizes.shape[1], batch.places.numel()
        starts = sizes.cumsum(1) - sizes
        for rows in torch.arange(len(batch) * self.sets * points, device=sizes.device).split(most):
            draws, place = (rows // points).unique_consecutive(return_inverse=True)
            names = [f"{batch.sample_ids[draw // self.sets]} {draw % self.sets}" for draw in draws.tolist()]
            order = tie_breakers(sample_keys(0, names, "sensitivity_n", sizes.device), places)
            if batch.valid is not None:
                order = _among(batch.valid[draws // self.sets], order)
            sample, point = rows // (self.sets * points), rows % points
            size, start, count = (
                of[:, None].int() for of in (sizes[sample, point], starts[sample, point], counts[sample])
            )
            members = (order.int()[place] - start) % count < size
            yield sample, members if batch.valid is None else members & batch.valid[sample]


def _among(valid: Tensor, order: Tensor) -> Tensor:
    """int64 [N, T]: each token's place among the tokens in a random order [N, T] of all places, padding left out."""
    ranks = valid.gather(1, order).cumsum(1) - 1
    return torch.empty_like(order).scatter_(1, order, ranks)


def token_set_sizes(lengths: Tensor, points: int, smallest: float, largest: float) -> Tensor:
    """int64 [B, S]: sizes for texts of these lengths [B], 1 or more, evenly spaced on a log scale."""
    least = torch.full_like(lengths, smallest, dtype=torch.float64) if smallest < 1 else smallest / lengths.double()
    exponents = torch.linspace(0, 1, points, dtype=torch.float64, device=lengths.device)
    shares = least[:, None] * (largest / least[:, None]) ** exponents
    return (shares * lengths[:, None]).round().long().clamp_min(1).minimum(lengths[:, None])


def set_sizes(pixels: int, points: int, smallest: float, largest: float) -> Tensor:
    """int64 [S], S <= points: sizes from `smallest`, of which a share is of all pixels, to `largest` x `pixels`, evenly
    spaced on a log scale.

    Sizes that round to the same number are taken once. Raises UserError when `smallest` is beyond the largest.
    """
    most = round(largest * pixels)
    smallest = max(1, round(smallest * pixels)) if smallest < 1 else smallest
    if smallest > most:
        raise UserError(f"Sensitivity-N: sets of {smallest} pixels and more, but {largest} of {pixels} are {most}.")
    exponents = torch.linspace(0, 1, points, dtype=torch.float64)
    return (smallest * (most / smallest) ** exponents).round().long().unique()
