"""Extremal perturbation: of all smooth masks that show a given share of the picture, the one with the highest score.

    m_a = argmax over m  S(m x + (1 - m) x~) - lambda R_a(m)             (Fong, Patrick, Vedaldi, Eqs. 2 and 4)
    R_a(m) = mean (vecsort(m) - r_a)^2, r_a = zeros and then ones, of them the share a              (Eq. 3)
    m(u) = smax_v k(u - v) m'(v),   smax f = sum f exp(f / T) / sum exp(f / T)                      (sec. 3.2)

Reference: Fong, Patrick, Vedaldi, "Understanding Deep Networks via Extremal Perturbations and Smooth Masks", ICCV
2019, and its authors' code, TorchRay. k is 1 up to `radius` and falls as a Gaussian behind it, so the mask is wide
where m' is 1 at a single place. lambda grows exponentially over the search, to `growth` times its start.

Differently from the paper the picture is blended with one baseline (the paper blurs each pixel by an amount of its
own), a step's length does not depend on the gradient's, pixels that are alike have no order in vecsort, the map is the
mean over `areas`, and all areas of all pictures are searched together. With one area the map is that area's mask: 0.1
is meant for effective heat ratios.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from ibxai.backbones import Backbone
from ibxai.errors import UserError
from ibxai.methods.mask_objective import upsampled
from ibxai.methods.perturbation import PerturbationSettings
from ibxai.methods.settings import check_choice, check_not_negative, check_positive
from ibxai.types import Attribution, Attributor, Batch, ScoreKind

_TINY, _LEVELS = 1e-30, 64


@dataclass(frozen=True, kw_only=True)
class ExtremalPerturbation(PerturbationSettings):
    """areas: the shares of the picture that the masks show. variant: "preserve" shows the area, "delete" hides it.

    cell: side of a cell of m', in pixels. radius, spread: k is 1 up to `radius` pixels and then a Gaussian of deviation
    `spread` pixels. temperature: T. steps, momentum: of the descent. learning_rate: how far the steepest cell moves
    in a step, falling to 0 in a line. area_weight: lambda at the start; growth: its last value over its first.
    """

    areas: tuple[float, ...] = (0.05, 0.1, 0.2, 0.4)
    variant: Literal["preserve", "delete"] = "preserve"
    cell: int = 7
    radius: float = 10.5
    spread: float = 5.0
    temperature: float = 0.05
    steps: int = 150
    learning_rate: float = 0.1
    momentum: float = 0.5
    area_weight: float = 300.0
    growth: float = 16.0
    score: ScoreKind = "logit"

    version: ClassVar[int] = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "cell", "spread", "temperature", "steps", "learning_rate", "area_weight", "growth")
        check_not_negative(self, "radius", "momentum")
        check_choice(self, "variant", "preserve", "delete")
        if not self.areas or not all(0 < area < 1 for area in self.areas):
            raise UserError(f"method.areas is {list(self.areas)}: shares above 0 and below 1 are expected.")

    def fit(
        self, backbone: Backbone, reference: Iterable[Batch], seed: int, state: Mapping[str, Tensor] | None = None
    ) -> Attributor:
        """Nothing is estimated, but the mean picture where it is the baseline. Diagnostics, [B, areas]: `area`, the
        share that each mask shows in the end; `score`, of the picture under it, before the last step."""
        baselines = self.baselines(reference, seed)

        def attribute(batch: Batch) -> Attribution:
            size = (batch.inputs.shape[-2], batch.inputs.shape[-1])
            smooth = MaxConvolution(size, self.cell, self.radius, self.spread, self.temperature)
            cells, score = self._search(backbone, batch, baselines(batch), smooth)
            with torch.no_grad():
                masks = smooth(cells).view(len(batch), len(self.areas), *size)
            diagnostics = {"area": masks.mean((2, 3)), "score": score.view(len(batch), -1)}
            return Attribution(masks.mean(1), "mask", diagnostics)

        return attribute

    def _search(
        self, backbone: Backbone, batch: Batch, baselines: Tensor, smooth: MaxConvolution
    ) -> tuple[Tensor, Tensor]:
        """(m' [B * areas, 1, h, w], scores before the last step [B * areas]), by projected descent with momentum.

        A gradient counts by its direction: its steepest cell moves by the rate, whatever the logits' and lambda's size.
        """
        device, count = batch.inputs.device, len(batch) * len(self.areas)
        cells = torch.ones(count, 1, *smooth.cells, device=device)
        velocity, score = torch.zeros_like(cells), cells.new_zeros(count)
        areas = torch.tensor(self.areas, device=device).repeat(len(batch))
        for step in range(self.steps):
            weight = self.area_weight * self.growth ** (step / self.steps)
            slope = torch.empty_like(cells)
            for rows in torch.arange(count, device=device).split(backbone.max_passes):
                picture = rows // len(self.areas)
                with torch.enable_grad():
                    own = cells[rows].requires_grad_()
                    masks = smooth(own)
                    shown = masks if self.variant == "preserve" else 1 - masks
                    pictures = torch.lerp(baselines[picture], batch.inputs[picture], shown)
                    scores = batch.target.take(picture).score(backbone(pictures), self.score)
                    gain = scores if self.variant == "preserve" else -scores
                    loss = weight * area_distance(masks, areas[rows]) - gain
                    (slope[rows],) = torch.autograd.grad(loss.sum(), own)
                score[rows] = scores.detach()
            steepest = slope.flatten(1).abs().amax(1).clamp_min(_TINY).view(-1, 1, 1, 1)
            velocity = self.momentum * velocity + slope / steepest
            cells = (cells - self.learning_rate * (1 - step / self.steps) * velocity).clamp(0, 1)
        return cells, score


def area_distance(masks: Tensor, areas: Tensor) -> Tensor:
    """[N]: R_a of masks [N, 1, H, W] and areas [N], a mean over the pixels.

    Pixels that are alike, to a 64th, share the zeros and ones of their places: as published their order, and so which
    of them have to go, would be the scan from the top left.
    """
    ordered = masks.flatten(1).sort(dim=1, stable=True).values
    pixels = ordered.shape[1]
    shown = torch.arange(pixels, device=masks.device) >= pixels - (areas[:, None] * pixels).round()
    alike = (ordered.detach() * _LEVELS).round().long()
    means = ordered.new_zeros(len(ordered), _LEVELS + 1).scatter_reduce(
        1, alike, shown.to(ordered), "mean", include_self=False
    )
    return ((ordered - means.gather(1, alike)) ** 2).mean(1)


class MaxConvolution:
    """m' [N, 1, h, w], a value a cell, to smooth masks [N, 1, H, W]: at the cells, then enlarged bilinearly.

    Outside the picture m' is continued with its border, so that a mask can end there.
    """

    def __init__(self, size: Sequence[int], cell: int, radius: float, spread: float, temperature: float) -> None:
        self.size, self.temperature = tuple(size), temperature
        self.cells = tuple(max(1, math.ceil(side / cell)) for side in size)
        self.reach = max(1, math.ceil((radius + 2 * spread) / cell))
        places = torch.arange(-self.reach, self.reach + 1) * float(cell)
        beyond = (torch.hypot(places[:, None], places[None, :]) - radius).clamp_min(0)
        self.kernel = torch.exp(-(beyond**2) / (2 * spread**2)).flatten()

    def __call__(self, cells: Tensor) -> Tensor:
        padded = F.pad(cells, (self.reach,) * 4, mode="replicate")
        near = F.unfold(padded, 2 * self.reach + 1) * self.kernel.to(cells)[:, None]
        smooth = ((near / self.temperature).softmax(1) * near).sum(1)
        return upsampled(smooth.view(cells.shape), self.size)
