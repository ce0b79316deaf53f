"""What a picture becomes where it is taken away: the baselines of insertion, deletion and the mask methods."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from ibxai.errors import UserError, nearest

BASELINES = ("blur", "constant")


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
