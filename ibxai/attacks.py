"""Adversarial inputs: pictures with a change too small to see, which fools the network, are explained and judged.

MI-FGSM walks up the gradient of the network's loss, with a momentum that keeps it from poor local optima:

    g' = mu g + J / |J|_1,   J = the gradient of the loss at x,   x' = clip(x + alpha sign(g'))      (Eq. 6 and 7)

Dong et al., "Boosting Adversarial Attacks with Momentum", CVPR 2018; alpha = eps / steps keeps x in its ball, and the
defaults are theirs: eps 16 of 255, 10 steps, mu 1. iGOS++ (Khorram et al., CHIL 2021, Fig. 4) makes "persian cat" of
VGG-19's pictures with it, and says no more; a heatmap of such a picture means little, and its insertion curve, which
rises when nearly all pixels are back, tells so.

Without a target the attack leads away from what the network predicts, which needs no label; the paper takes the label.
It works on colours of 0 to 1, so normalisation changes neither the ball nor the step. The pictures stay float: rounded
to 8 bit they would be off by half of 1 / 255 at most.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from ibxai.backbones import Backbone
from ibxai.errors import UserError
from ibxai.types import Batch


class Attack(Protocol):
    """Adversarial inputs in the place of a dataset's. A frozen dataclass with a `version`.

    It comes between the backbone and the method: heatmaps and scores are of what it returns; what a method estimates on
    the reference split, it estimates on clean pictures.
    """

    def perturb(self, backbone: Backbone, batch: Batch) -> Batch:
        """The same rows with other inputs; their target is not bound yet. A row does not feel its neighbours."""
        ...


@dataclass(frozen=True)
class MIFGSM:
    """eps: the largest change of a colour, in 255ths. steps, momentum: as in the module. target: the class that the
    network is to predict, null for any but the one that it predicts.
    """

    eps: float = 16.0
    steps: int = 10
    momentum: float = 1.0
    target: int | None = None

    version: ClassVar[int] = 1

    def __post_init__(self) -> None:
        if not 0 < self.eps <= 255 or self.steps < 1 or self.momentum < 0:
            raise UserError(
                f"attack.eps={self.eps:g}, attack.steps={self.steps}, attack.momentum={self.momentum:g}: above 0 and "
                "up to 255, 1 or more, and 0 or more are expected."
            )

    def perturb(self, backbone: Backbone, batch: Batch) -> Batch:
        """Inputs [B, C, H, W] whose colours differ by at most eps / 255. Raises UserError for a class that is none."""
        if self.target is not None and not 0 <= self.target < backbone.outputs:
            raise UserError(
                f"attack.target={self.target}: the network's classes are 0 to {backbone.outputs - 1}, or null for any."
            )
        pieces = batch.inputs.split(backbone.max_passes)
        return replace(batch, inputs=torch.cat([self._attacked(backbone, inputs) for inputs in pieces]))

    def _attacked(self, backbone: Backbone, inputs: Tensor) -> Tensor:
        preprocessing, eps = backbone.preprocessing, self.eps / 255
        mean, std = (inputs.new_tensor(values)[:, None, None] for values in (preprocessing.mean, preprocessing.std))
        colours = inputs * std + mean
        low, high = (colours - eps).clamp_min(0), (colours + eps).clamp_max(1)
        with torch.no_grad():
            predicted = backbone(inputs).argmax(1)
        classes = predicted if self.target is None else torch.full_like(predicted, self.target)
        away = 1 if self.target is None else -1

        def loss(colours: Tensor) -> Tensor:
            return F.cross_entropy(backbone((colours - mean) / std), classes, reduction="sum")

        velocity, moved = torch.zeros_like(colours), colours
        for _ in range(self.steps):
            gradient = _gradient(loss, moved)
            size = gradient.abs().flatten(1).sum(1).view(-1, 1, 1, 1)
            velocity = self.momentum * velocity + gradient / torch.where(size > 0, size, 1)
            moved = (moved + away * eps / self.steps * velocity.sign()).clamp(low, high)
        return (moved - mean) / std


def _gradient(loss: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    """The gradient of a sum over the samples, at inputs [B, ...]."""
    with torch.enable_grad():
        at = at.detach().requires_grad_()
        return torch.autograd.grad(loss(at), at)[0]
