"""What a picture becomes where it is taken away: the baselines of insertion, deletion and the mask methods.

A blur and a constant need the picture alone, so metrics know them too. Noise belongs to a seed and a sample, and the
dataset's mean to the reference split: only methods are given these, and `Baseline` holds them. `PerturbationSettings`
are what all methods that hide parts of a picture have in their YAMLs.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ibxai.draws import normal, sample_keys
from ibxai.errors import UserError, nearest
from ibxai.methods.settings import check_choice, check_positive
from ibxai.types import SCORE_KINDS, Batch, ScoreKind

BASELINES = ("blur", "constant")
DATASET_MEAN = "dataset_mean"
METHOD_BASELINES = (*BASELINES, "noise", DATASET_MEAN)


def baseline_picture(
    inputs: Tensor, kind: str, sigma: float, value: float | Tensor, kernel: int | None = None
) -> Tensor:
    """[B, C, H, W]: the inputs blurred with a deviation of `sigma` pixels, or the constant `value`.

    `value` is in normalised units, so 0 is the mean colour of what the network was trained on; a number, or one a
    channel as [C, 1, 1]. kernel: see `gaussian_blur`. Raises UserError for an unknown kind.
    """
    if kind == "constant":
        return torch.zeros_like(inputs) + value
    if kind == "blur":
        return gaussian_blur(inputs, sigma, kernel)
    raise UserError(f"There is no baseline '{kind}'. {nearest(kind, BASELINES)}")


@dataclass(frozen=True)
class Baseline:
    """The reference inputs of a method's batches.

    kind: "blur", "constant" (see `baseline_picture`), "noise" (normal around `value`, of deviation 1 in normalised
    units, drawn for the sample and the seed) or "dataset_mean" (`mean` [C, H, W], of the reference split).
    """

    kind: str
    sigma: float
    kernel: int | None
    value: float
    seed: int
    mean: Tensor | None = None

    def __call__(self, batch: Batch) -> Tensor:
        """[B, C, H, W], without a gradient."""
        inputs = batch.inputs.detach()
        if self.kind == "noise":
            keys = sample_keys(self.seed, batch.sample_ids, "baseline noise", inputs.device)
            return normal(keys, 0, inputs.shape[1:]) + self.value
        if self.kind == DATASET_MEAN and self.mean is not None:
            return self.mean.to(inputs).expand_as(inputs)
        return baseline_picture(inputs, self.kind, self.sigma, self.value, self.kernel)


@dataclass(frozen=True, kw_only=True)
class PerturbationSettings:
    """What is seen where a picture is hidden, and what is explained.

    baseline, sigma, kernel (odd, None reaches three deviations), value: see `Baseline`. score: of the target.
    """

    baseline: str = "blur"
    sigma: float = 50.0
    kernel: int | None = 51
    value: float = 0.0
    score: ScoreKind = "probability"

    def __post_init__(self) -> None:
        check_choice(self, "baseline", *METHOD_BASELINES)
        check_positive(self, "sigma")
        check_choice(self, "score", *SCORE_KINDS)
        if self.kernel is not None and (self.kernel < 1 or self.kernel % 2 == 0):
            raise UserError(f"method.kernel is {self.kernel}: it must be odd, or null.")

    @property
    def uses_reference(self) -> bool:
        return self.baseline == DATASET_MEAN

    def baselines(self, reference: Iterable[Batch], seed: int) -> Baseline:
        """The reference split is read where its mean is the baseline; UserError when it is empty."""
        mean = mean_picture(reference) if self.uses_reference else None
        return Baseline(self.baseline, self.sigma, self.kernel, self.value, seed, mean)


def mean_picture(reference: Iterable[Batch]) -> Tensor:
    """float32 [C, H, W]: the mean of the reference split. Raises UserError when there is no picture."""
    total, count = None, 0
    for batch in reference:
        own = batch.inputs.double().sum(0)
        total, count = own if total is None else total + own, count + len(batch)
    if total is None:
        raise UserError("method.baseline=dataset_mean is the mean of the reference split, which is empty.")
    return (total / count).float()


def gaussian_blur(inputs: Tensor, sigma: float, kernel: int | None = None) -> Tensor:
    """[B, C, H, W], reflected at the border. kernel: its width in pixels, odd; None reaches three deviations.

    A kernel that a small picture cannot reflect is cut to what it can.
    """
    for dim in (2, 3):
        radius = min(math.ceil(3 * sigma) if kernel is None else kernel // 2, inputs.shape[dim] - 1)
        places = torch.arange(-radius, radius + 1, dtype=inputs.dtype, device=inputs.device)
        weights = torch.exp(-(places**2) / (2 * sigma**2))
        channels = inputs.shape[1]
        shape = (channels, 1, -1, 1) if dim == 2 else (channels, 1, 1, -1)
        weights = (weights / weights.sum()).expand(channels, -1).reshape(shape)
        padding = (0, 0, radius, radius) if dim == 2 else (radius, radius, 0, 0)
        inputs = F.conv2d(F.pad(inputs, padding, mode="reflect"), weights, groups=channels)
    return inputs
