"""The objective of iGOS++, I-GOS and Mask: scores of masked pictures as a function of masks, and a regulariser.

    Phi(I, I~, M) = I M + I~ (1 - M)                                     (iGOS++, Eq. 1; I~ the baseline)
    f_IG(M) = 1/S sum_s  f(Phi(I, I~, s/S M))                            deletion  (Eqs. 2 and 3)
    h_IG(M) = -1/S sum_s f(Phi(I~, I, s/S M))                            insertion (Eq. 5)
    g(M)    = lambda1 mean|1 - M| + lambda2 BTV(M)                       (Eq. 4)
    BTV(M)  = sum_u exp(-(dI(u) / sigma)^2) |dM(u)|^beta                 (Eq. 7)

Reference: Khorram, Lawson, Li, "iGOS++: Integrated Gradient Optimized Saliency by Bilateral Perturbations", CHIL 2021.
Integrated gradients are the plain gradients of f_IG and h_IG (Eq. 3), and so they are computed.

Read otherwise than the letter, as in the official code: sums over cells are means, so that lambda1 and lambda2 mean the
same at every resolution, BTV is averaged with the TV of the mask's own cells, and |1 - M| has no slope at 1: a cell of
little evidence leaves 1 and is pulled back, so that it has a rank among its kind. With a slope there most cells would
never move, since a cell's share of the score is on average smaller than its share of lambda1. dI is taken in each
direction by itself, its square a mean over the colours in both of them (the official code squares the mean in one).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from ibxai.backbones import Backbone
from ibxai.draws import sample_keys
from ibxai.methods.bottleneck import feature_noise
from ibxai.types import Batch, ScoreKind

Smoothness = Literal["btv", "tv"]


@dataclass(frozen=True)
class Term:
    """One score of the objective. plane: the mask that it is a score of, None for the product of all masks.

    inserts: the evidence comes into the baseline (Eq. 5, its score is maximised) instead of leaving the picture.
    noisy: the masked picture gets noise.
    """

    plane: int | None
    inserts: bool
    noisy: bool


@dataclass(frozen=True)
class Regulariser:
    """g of a mask, with weights lambda1 of its size and lambda2 of its unevenness; "tv": TV alone instead of BTV."""

    lambda1: float
    lambda2: float
    smoothness: Smoothness
    beta: float
    sigma: float

    def likeness(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """exp(-(dI / sigma)^2) of pictures [B, C, H, W]: down [B, 1, H-1, W] and across [B, 1, H, W-1]."""
        down, across = (
            (difference**2).mean(1, keepdim=True) for difference in (inputs.diff(dim=2), inputs.diff(dim=3))
        )
        return (-down / self.sigma**2).exp(), (-across / self.sigma**2).exp()

    def __call__(self, mask: Tensor, likeness: tuple[Tensor, Tensor]) -> Tensor:
        """[N] of masks [N, 1, h, w] and their pictures' likeness."""
        uneven = total_variation(mask, self.beta)
        if self.smoothness == "btv":
            spread = upsampled(mask, (likeness[1].shape[2], likeness[0].shape[3]))
            uneven = (uneven + total_variation(spread, self.beta, likeness)) / 2
        return self.lambda1 * (1 - mask).abs().flatten(1).mean(1) + self.lambda2 * uneven


def total_variation(mask: Tensor, beta: float, weights: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """[N]: |difference|^beta of masks [N, 1, h, w], the mean down plus the mean across; a lone row has none."""
    total = mask.new_zeros(len(mask))
    for dim in (2, 3):
        if mask.shape[dim] > 1:
            change = mask.diff(dim=dim).abs() ** beta
            change = change if weights is None else change * weights[dim - 2]
            total = total + change.flatten(1).mean(1)
    return total


def upsampled(mask: Tensor, size: Sequence[int]) -> Tensor:
    """[N, 1, h, w] -> [N, 1, *size], bilinear."""
    if mask.shape[-2:] == torch.Size(size):
        return mask
    return F.interpolate(mask, size=tuple(size), mode="bilinear", align_corners=False)


@dataclass(frozen=True)
class Problem:
    """The objective of some pictures, each with masks of its own: [N, planes, h, w].

    picture: long [N], the row of `batch` that each set of masks belongs to; the same one may come many times.
    ig_steps: S. noise: its deviation in normalised units; drawn for the sample, the step and the interval, so that
    all terms, and all masks that are compared, meet the same.
    """

    backbone: Backbone
    batch: Batch
    baselines: Tensor
    terms: tuple[Term, ...]
    regulariser: Regulariser
    likeness: tuple[Tensor, Tensor]
    score: ScoreKind
    ig_steps: int
    noise: float
    keys: Tensor
    picture: Tensor

    @staticmethod
    def of(
        backbone: Backbone,
        batch: Batch,
        baselines: Tensor,
        terms: tuple[Term, ...],
        regulariser: Regulariser,
        score: ScoreKind,
        ig_steps: int,
        noise: float,
        seed: int,
    ) -> Problem:
        """The problem of a whole batch."""
        inputs = batch.inputs
        keys = sample_keys(seed, batch.sample_ids, "mask noise", inputs.device)
        every = torch.arange(len(batch), device=inputs.device)
        likeness = regulariser.likeness(inputs)
        fixed = (backbone, batch, baselines, terms, regulariser, likeness)
        return Problem(*fixed, score, ig_steps, noise, keys, every)

    def of_rows(self, rows: Tensor) -> Problem:
        """The problem of some of the rows; a row may come more than once."""
        return replace(self, picture=self.picture[rows])

    def value(self, masks: Tensor, intervals: Tensor, step: int) -> Tensor:
        """[N]: Eq. 3 with the terms of Eq. 4. intervals: which s of 1 ... S are averaged. step: names the noise."""
        with torch.no_grad():
            shown = self._shown(masks)
            total = self._regularisation(masks)
            for places in self._pieces(intervals):
                total.index_add_(0, places[:, 0], self._scores(shown, places, step) / len(intervals))
        return total

    def gradient(self, masks: Tensor, intervals: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """(value [N], its gradient [N, planes, h, w], the total gradient of Eq. 6)."""
        with torch.enable_grad():
            leaf = masks.detach().requires_grad_()
            shown = self._shown(leaf)
            own = shown.detach().requires_grad_()
            regularisation = self._regularisation(leaf)
            total, slope = regularisation.detach().clone(), torch.zeros_like(own)
            for places in self._pieces(intervals):
                scores = self._scores(own, places, step) / len(intervals)
                slope += torch.autograd.grad(scores.sum(), own)[0]
                total.index_add_(0, places[:, 0], scores.detach())
            (found,) = torch.autograd.grad([shown, regularisation.sum()], leaf, [slope, None])
        return total, found

    def _shown(self, masks: Tensor) -> Tensor:
        """[N, terms, h, w]: the mask of each term."""
        product = masks.prod(1)
        return torch.stack([product if t.plane is None else masks[:, t.plane] for t in self.terms], 1)

    def _regularisation(self, masks: Tensor) -> Tensor:
        down, across = self.likeness
        return self.regulariser(masks.prod(1, keepdim=True), (down[self.picture], across[self.picture]))

    def _pieces(self, intervals: Tensor) -> Sequence[Tensor]:
        """Network rows [R, 3] of (set of masks, term, interval), no more at once than the backbone allows."""
        device = self.picture.device
        sets, terms = torch.arange(len(self.picture), device=device), torch.arange(len(self.terms), device=device)
        return torch.cartesian_prod(sets, terms, intervals.to(device)).split(self.backbone.max_passes)

    def _scores(self, shown: Tensor, places: Tensor, step: int) -> Tensor:
        """[R]: the signed scores of these network rows."""
        own, term, interval = places.unbind(1)
        picture, size = self.picture[own], self.batch.inputs.shape[-2:]
        flags = torch.tensor([[t.inserts, t.noisy] for t in self.terms], device=own.device)[term]
        inserts, noisy = flags.unbind(1)
        inputs, baselines = self.batch.inputs[picture], self.baselines[picture]
        there = inserts.view(-1, 1, 1, 1)
        mask = upsampled((shown[own, term] * (interval / self.ig_steps).view(-1, 1, 1))[:, None], size)
        start, change = (
            torch.where(there, inputs, baselines),
            torch.where(there, baselines - inputs, inputs - baselines),
        )
        pictures = torch.addcmul(start, mask, change)
        if self.noise > 0 and bool(noisy.any()):
            keys, draw = self.keys[picture[noisy]], step * (self.ig_steps + 1) + interval[noisy]
            added = self.noise * feature_noise(keys, draw, inputs.shape[1:])
            pictures = pictures.index_add(0, noisy.nonzero()[:, 0], added)
        scores = self.batch.target.take(picture).score(self.backbone(pictures), self.score)
        return torch.where(inserts, -scores, scores)
