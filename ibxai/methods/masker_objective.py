"""The terms of a Boolean masker's objective: as few nats as possible through the mask that still name the class.

rho(i) is the chance of each pixel to be visible, m ~ Bernoulli(rho) the mask, i.m the masked picture with m beside it.

    m       = 1[a + logit u > 0], a = logit rho, u uniform; learnt as sigmoid((a + logit u) / temperature)  (sec. 3.3)
    -log g  = sum -(1 - m) log(1 - r) - m [log r - (i - i^)^2 / 2 sigma^2] + KL(q(z | i.m) || N(0, 1))           (Eq. 7)
    H(M|I)  = -sum m log rho + (1 - m) log(1 - rho)                                                              (Eq. 8)
    m'      = max(m, transparent rectangles)                                                              (secs. 3, 4.3)

r and i^ are what the decoder makes of z. All are nats summed over the pixels, one number a picture; as in the paper the
constant of the Gaussian is left out, so that its targets of -log g (12, 25, 50, 2000) mean the same here.

Reference: Zhmoginov, Fischer, Sandler, "Information-Bottleneck Approach to Salient Region Discovery", 2019.

Differently from the paper, which says no more than Gumbel-softmax: only the autoencoders see the relaxed mask, the
classifier the Boolean one. On relaxed masks it learns to read the grey: 96 % became 43 % on MNIST anchors once masks
were Boolean. With Boolean masks for both, rho stays between 0 and 1 everywhere. And what flows back to a mask goes on
to the log-odds as it is (`straight_through`; Bengio et al., arXiv:1308.3432). The relaxed mask's own slope is near 0
where rho is: with it, what had been shut never opened again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from ibxai.errors import UserError
from ibxai.methods.settings import check_choice, check_not_negative, check_positive

ControlName = Literal["stop", "adapt"]
CONTROLS: tuple[str, ...] = get_args(ControlName)
_SMALLEST_BETA = 1e-6  # so that it can rise again


def relaxed_mask(logits: Tensor, chances: Tensor, temperature: float) -> Tensor:
    """Between 0 and 1, shaped as the logits [B, 1, H, W] of rho, which it has a gradient to. chances: of (0, 1)."""
    return ((logits + chances.logit()) / temperature).sigmoid()


def boolean_mask(logits: Tensor, chances: Tensor) -> Tensor:
    """0 or 1, the same draw: what the relaxed mask comes to with a temperature of 0."""
    return (logits + chances.logit() > 0).to(logits.dtype)


class _Held(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, bound: float) -> Tensor:
        ctx.save_for_backward(logits)
        ctx.bound = bound
        return logits.clamp(-bound, bound)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (logits,), (slope,) = ctx.saved_tensors, gradients
        further_out = ((logits < -ctx.bound) & (slope > 0)) | ((logits > ctx.bound) & (slope < 0))
        return slope.masked_fill(further_out, 0.0), None


def held(logits: Tensor, bound: float) -> Tensor:
    """The logits between -bound and bound. Outside, descent can bring one back and never takes it further out: a
    clamp has no gradient there, and what has once been shut for good could not open again.
    """
    return _Held.apply(logits, bound)


def straight_through(mask: Tensor, logits: Tensor) -> Tensor:
    """The mask itself, which was drawn with these logits; what flows back through it reaches them with the slope that
    rho has at one half, 1 / 4, however shut or open they are.
    """
    return mask.detach() + (logits - logits.detach()) / 4


def weighted_gradient(mask: Tensor, weight: Tensor | float) -> Tensor:
    """The mask itself; what flows back through it is multiplied by the weight."""
    return mask.detach() + weight * (mask - mask.detach())


def with_rectangles(mask: Tensor, chances: Tensor, sides: tuple[float, float]) -> Tensor:
    """The mask [B, 1, H, W] with transparent rectangles, each side within `sides` of the picture's.

    chances: [B, R, 4] of (0, 1): height, width, top, left of R rectangles a picture.
    """
    height, width = mask.shape[2:]
    extent = sides[0] + (sides[1] - sides[0]) * chances[..., :2]
    start = chances[..., 2:] * (1 - extent)
    inside = []
    for axis, length in enumerate((height, width)):
        centres = (torch.arange(length, device=mask.device) + 0.5) / length
        first, last = start[..., axis, None], (start + extent)[..., axis, None]
        inside.append((centres >= first) & (centres < last))
    covered = (inside[0][..., :, None] & inside[1][..., None, :]).any(1, keepdim=True)
    return torch.where(covered, torch.ones_like(mask), mask)


def mask_nats(mask: Tensor, logits: Tensor) -> Tensor:
    """[B]: what the mask costs as Bernoullis of these logits, [B, 1, H, W] each. Of rho's own logits it is Eq. 8."""
    return -(mask * F.logsigmoid(logits) + (1 - mask) * F.logsigmoid(-logits)).flatten(1).sum(1)


def pixel_nats(pixels: Tensor, means: Tensor, mask: Tensor | float, sigma: float) -> Tensor:
    """[B]: what the visible pixels [B, C, H, W] cost as Gaussians round these means, without their constant."""
    return (mask * (pixels - means) ** 2 / (2 * sigma**2)).flatten(1).sum(1)


def latent_nats(mean: Tensor, log_variance: Tensor) -> Tensor:
    """[B]: KL(N(mean, exp log_variance) || N(0, 1)), summed over the latent [B, D]."""
    return (0.5 * (mean**2 + log_variance.exp() - 1 - log_variance)).sum(1)


@dataclass(frozen=True)
class Control:
    """How beta keeps the autoencoder's loss, the mean of a batch, where it is wanted (sec. 4).

    kind: "stop", beta while the loss is above the target and 0 below; "adapt", beta rises by `rate` a step while the
    loss is above the target by more than `tolerance` of it, and falls below it alike. target: nats. beta: the weight,
    or the first one. What it is in a step is decided by the loss of the step before, which saves a second pass.

    A training has three parts. For a share `warmup` of it the classifier learns alone, from masks that do not look at
    the picture. Then the masking network and the autoencoder learn, and the classifier at a share `along` of their
    learning rate; the paper knows this part alone, with 1. With 0 it stays as it is, and a mask cannot agree with it on
    a code for the class (REAL-X: Jethani et al., AISTATS 2021), but it does not learn either that nothing to be seen
    can be the sign of a class. In the last share, `tuning`, it learns from masks that stay as they are. ramp: the share
    behind the warmup in which beta rises from 0 to its value.
    """

    kind: ControlName
    target: float
    beta: float
    rate: float
    tolerance: float
    along: float
    warmup: float
    tuning: float
    ramp: float

    def __post_init__(self) -> None:
        part = "method.control"
        check_choice(self, "kind", *CONTROLS)
        check_positive(self, "target", "beta", "rate", part=part)
        check_not_negative(self, "tolerance", "along", "warmup", "tuning", "ramp", part=part)
        if self.warmup + self.tuning >= 1:
            raise UserError(f"{part}.warmup and tuning are {self.warmup} and {self.tuning}: shares below 1 together.")

    def risen(self, progress: float) -> float:
        """The share of beta that counts, at this share of the training."""
        return min((progress - self.warmup) / self.ramp, 1.0) if self.ramp else 1.0

    def next_beta(self, beta: float, loss: float) -> float:
        """beta for the next step, after a step with this loss. beta: the one before."""
        if self.kind == "stop":
            return self.beta if loss > self.target else 0.0
        if abs(loss - self.target) <= self.tolerance * self.target:
            return beta
        return beta * (1 + self.rate) if loss > self.target else max(beta / (1 + self.rate), _SMALLEST_BETA)
