"""Gradient and gradient x input: how fast the score changes with a pixel, and that times how much of it there is.

    G = d S / d x        (Simonyan, Vedaldi, Zisserman, "Deep Inside Convolutional Networks", ICLR workshop 2014, Eq. 5)
    G * x                (Shrikumar et al., "Not Just a Black Box", 2016, sec. 2: the first-order share of a pixel)

S is the target's score. A map has one value a pixel and a gradient one a colour: `over_channels` says how they become
one. Simonyan et al. take the largest magnitude over the colours, which loses the sign; the sum keeps it, and with
gradient x input it is the pixel's share of the score. x is in normalised units, so 0 is the mean colour. Of texts x is
the embedding, and its numbers are what the colours are to a pixel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from ibxai.backbones import Backbone
from ibxai.methods.settings import check_choice
from ibxai.types import SCORE_KINDS, Attribution, Attributor, Batch, ScoreKind

Channels = Literal["sum", "sum_abs", "max_abs"]
CHANNELS: tuple[str, ...] = get_args(Channels)


@dataclass(frozen=True, kw_only=True)
class Gradient:
    """channels: see `over_channels`. score: what is differentiated, "logit", "probability" or "value"."""

    channels: Channels = "max_abs"
    score: ScoreKind = "logit"

    version: ClassVar[int] = 1
    uses_reference: ClassVar[bool] = False
    modalities: ClassVar[tuple[str, ...]] = ("picture", "text")
    times_input: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_choice(self, "channels", *CHANNELS)
        check_choice(self, "score", *SCORE_KINDS)

    def fit(
        self, backbone: Backbone, reference: Iterable[Batch], seed: int, state: Mapping[str, Tensor] | None = None
    ) -> Attributor:
        """Nothing is estimated."""

        def attribute(batch: Batch) -> Attribution:
            gradient, score = input_gradient(backbone, batch, self.score, backbone.max_passes)
            values = gradient * batch.inputs if self.times_input else gradient
            return Attribution(over_channels(values, self.channels, batch.channels), "score", {"score": score})

        return attribute


@dataclass(frozen=True, kw_only=True)
class GradientXInput(Gradient):
    """The settings of `Gradient`; the sum over the colours is the default, as it keeps the sign."""

    channels: Channels = "sum"

    times_input: ClassVar[bool] = True


def input_gradient(network: Callable[..., Tensor], batch: Batch, score: ScoreKind, most: int) -> tuple[Tensor, Tensor]:
    """(d score / d inputs, in their shape, score [B]), at most `most` rows at once, in any grad mode of the caller."""
    gradients, scores = [], []
    for rows in torch.arange(len(batch), device=batch.inputs.device).split(most):
        with torch.enable_grad():
            values = batch.inputs[rows].detach().requires_grad_()
            of_rows = batch.scores(network, values, rows, score)
            (gradient,) = torch.autograd.grad(of_rows.sum(), values)
        gradients.append(gradient)
        scores.append(of_rows.detach())
    return torch.cat(gradients), torch.cat(scores)


def over_channels(values: Tensor, channels: Channels, dim: int = 1) -> Tensor:
    """[B, H, W] from [B, C, H, W]: the sum, with its sign; the sum of magnitudes; or the largest magnitude.

    dim: of the channels, 2 of texts [B, T, D].
    """
    if channels == "sum":
        return values.sum(dim)
    return values.abs().sum(dim) if channels == "sum_abs" else values.abs().amax(dim)
