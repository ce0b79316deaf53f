"""RISE: pixels that tend to be visible where the score is high, seen through thousands of random masks.

    S(i) = 1 / (E[M] N) sum_n  f(I M_n + I~ (1 - M_n)) M_n(i)            (Petsiuk et al., Eq. 6; E[M] = keep)
    M_n: a grid of independent cells, 1 with probability `keep`, enlarged bilinearly and shifted at random   (sec. 3.2)

Reference: Petsiuk, Das, Saenko, "RISE: Randomized Input Sampling for Explanation of Black-box Models", BMVC 2018.

Differently from the official code masks are drawn where they are used and never kept, so memory does not grow with
their number; every picture sees the same ones, as there. The early stop is ours. Masks of even and of odd numbers make
two maps, A and B, whose difference tells the error of their mean:

    error = rms(A - B) / (2 std(mean of A and B))                        over the pixels
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from ibxai.backbones import Backbone
from ibxai.draws import sample_keys, uniform
from ibxai.errors import UserError
from ibxai.methods.perturbation import PerturbationSettings
from ibxai.methods.settings import check_positive
from ibxai.types import Attribution, Attributor, Batch

_TINY = 1e-30


@dataclass(frozen=True, kw_only=True)
class RISE(PerturbationSettings):
    """masks: N, network passes a picture. grid: cells a side. keep: the chance of a cell to be visible.

    tolerance: a picture stops when its error (see above) is at or below, asked every `check_every` masks; None: never.
    baseline, of "constant": 0 is RISE's grey.
    """

    masks: int = 8000
    grid: int = 7
    keep: float = 0.5
    tolerance: float | None = None
    check_every: int = 500
    baseline: str = "constant"

    version: ClassVar[int] = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "masks", "check_every", "grid")
        if not 0 < self.keep < 1:
            raise UserError(f"method.keep is {self.keep}: a chance above 0 and below 1 is expected.")
        if self.tolerance is not None:
            check_positive(self, "tolerance")
        if self.masks % 2 or self.check_every % 2:
            raise UserError(
                f"method.masks is {self.masks} and method.check_every {self.check_every}: both must be even, since the "
                "error compares two halves."
            )

    def fit(
        self, backbone: Backbone, reference: Iterable[Batch], seed: int, state: Mapping[str, Tensor] | None = None
    ) -> Attributor:
        """Nothing is estimated, but the mean picture where it is the baseline. Diagnostics, [B] each: `masks`, how many
        each picture took; `error`, of its map, as above."""
        baselines = self.baselines(reference, seed)

        def attribute(batch: Batch) -> Attribution:
            with torch.no_grad():
                halves, taken = self._run(backbone, batch, baselines(batch), seed)
                heatmap = halves.sum(1) / (self.keep * taken.double().view(-1, 1, 1))
            return Attribution(
                heatmap.float(), "score", {"masks": taken.float(), "error": halves_error(halves).float()}
            )

        return attribute

    def _run(self, backbone: Backbone, batch: Batch, baselines: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        """(sums of score times mask over even and over odd masks, float64 [B, 2, H, W]; masks taken, long [B])."""
        device, size = batch.inputs.device, (batch.inputs.shape[-2], batch.inputs.shape[-1])
        halves = torch.zeros(len(batch), 2, *size, dtype=torch.float64, device=device)
        taken = torch.zeros(len(batch), dtype=torch.long, device=device)
        active = torch.arange(len(batch), device=device)
        for numbers in torch.arange(self.masks, device=device).split(self.check_every):
            most = max(1, backbone.max_passes // len(active))
            for some in numbers.split(most):
                shown = random_masks(seed, some, self.grid, self.keep, size)
                scores = self._scores(backbone, batch, baselines, active, shown)
                for half in (0, 1):
                    own = some % 2 == half
                    halves[active, half] += torch.einsum("bn,nhw->bhw", scores[:, own].double(), shown[own].double())
            taken[active] += len(numbers)
            if self.tolerance is not None:
                active = active[halves_error(halves[active]) > self.tolerance]
                if len(active) == 0:
                    break
        return halves, taken

    def _scores(self, backbone: Backbone, batch: Batch, baselines: Tensor, rows: Tensor, masks: Tensor) -> Tensor:
        """[R, N]: the scores of pictures `rows` [R] under masks [N, H, W]."""
        scores = []
        pairs = torch.cartesian_prod(rows, torch.arange(len(masks), device=rows.device))
        for picture, mask in (piece.unbind(1) for piece in pairs.split(backbone.max_passes)):
            shown = torch.lerp(baselines[picture], batch.inputs[picture], masks[mask][:, None])
            scores.append(batch.target.take(picture).score(backbone(shown), self.score))
        return torch.cat(scores).view(len(rows), len(masks))


def random_masks(seed: int, numbers: Tensor, grid: int, keep: float, size: tuple[int, int]) -> Tensor:
    """float32 [N, H, W] in 0..1: masks of these numbers, the same for every sample.

    The grid is enlarged by one cell in height and width, and a window of the picture's size is cut out, shifted by up
    to one cell.
    """
    key = sample_keys(seed, [""], "rise masks", numbers.device).expand(len(numbers))
    drawn = uniform(key, numbers, (grid * grid + 2,))
    cells = (drawn[:, :-2] < keep).float().view(-1, 1, grid, grid)
    tall, wide = math.ceil(size[0] / grid), math.ceil(size[1] / grid)
    large = F.interpolate(cells, ((grid + 1) * tall, (grid + 1) * wide), mode="bilinear", align_corners=False)
    top = (drawn[:, -2] * tall).long()[:, None] + torch.arange(size[0], device=numbers.device)
    left = (drawn[:, -1] * wide).long()[:, None] + torch.arange(size[1], device=numbers.device)
    every = torch.arange(len(numbers), device=numbers.device)
    return large[every[:, None, None], 0, top[:, :, None], left[:, None, :]]


def halves_error(halves: Tensor) -> Tensor:
    """float64 [B]: the error of the mean of two maps [B, 2, H, W], relative to its own deviation over the picture.

    Infinite where the map is even, as of a network that does not react.
    """
    even, odd = halves.flatten(2).unbind(1)
    difference = (even - odd).pow(2).mean(1).sqrt() / 2
    spread = ((even + odd) / 2).std(1, correction=0)
    return torch.where(spread > _TINY, difference / spread.clamp_min(_TINY), torch.inf)
