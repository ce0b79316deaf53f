"""Rules of layer-wise relevance propagation: how the relevance of a layer's outputs is shared among its inputs.

Each rule is one proportion. What an output z_j = sum_i z_ij + b_j is worth, R_j, goes to the inputs as

    R_i = sum_j z_ij / (z_j + eps sign z_j) R_j                 (Bach et al., PLoS ONE 2015, Eqs. 56 and 58)

    epsilon      z_ij = x_i w_ij, the bias included in z_j
    plus         the positive z_ij and b_j alone               (z+: Montavon et al., Pattern Recognition 2017)
    alpha_beta   alpha times the positive, minus beta times the negative ones, alpha - beta = 1   (Bach, Eq. 60)
    flat         z_ij = 1: whatever an output sees shares alike        (Kohlbrenner et al., IJCNN 2020)
    box          z_ij = x_i w_ij - low_i w_ij+ - high_i w_ij-, pixels between low and high    (Montavon 2017, zB)

The share of b_j and of eps reaches no input. It is not dropped, as usual, but returned as `absorbed`, each from its
own term of z_j and not as a remainder, so that inputs and absorbed together must give the outputs' relevance again.
Where z_j is exactly 0 nothing says whose it is: all of R_j is absorbed. Inputs of either sign are meant throughout:
a positive z_ij may be the product of two negative numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ibxai.errors import UserError, nearest


class Shared(NamedTuple):
    """inputs: the relevance of each input, in its shape. absorbed: float64 [B], what reached none of them."""

    inputs: Sequence[Tensor]
    absorbed: Tensor


def share(
    forward: Callable[[Sequence[Tensor]], Tensor],
    inputs: Sequence[Tensor],
    offset: Tensor | float,
    relevance: Tensor,
    epsilon: float,
) -> Shared:
    """The relevance [B, ...] of forward(inputs) in proportion to what each input adds to it.

    forward: linear in the inputs together, apart from the constant `offset` that it adds to each output.
    """
    with torch.enable_grad():
        leaves = [x.detach().requires_grad_() for x in inputs]
        out = forward(leaves)
    z = out.detach()
    stabiliser = epsilon * z.sign()
    quotient = torch.where(z == 0, 0, relevance / (z + stabiliser))
    gradients = torch.autograd.grad(out, leaves, quotient)
    absorbed = torch.where(z == 0, relevance, quotient * (stabiliser + offset))
    return Shared([x * g for x, g in zip(inputs, gradients, strict=True)], total(absorbed))


def total(relevance: Tensor) -> Tensor:
    """float64 [B]: the sum of each row."""
    return relevance.flatten(1).sum(1, dtype=torch.float64)


@dataclass(frozen=True)
class AffineLayer:
    """A convolution or linear module as x -> linear(x, weight) + bias. bias: [1, K, 1, 1], or [K] of a linear layer."""

    module: nn.Conv2d | nn.Linear
    weight: Tensor
    bias: Tensor

    @classmethod
    def of(cls, module: nn.Conv2d | nn.Linear) -> AffineLayer:
        bias = module.weight.new_zeros(len(module.weight)) if module.bias is None else module.bias
        return cls(module, module.weight, bias.view(1, -1, 1, 1) if isinstance(module, nn.Conv2d) else bias)

    def linear(self, x: Tensor, weight: Tensor) -> Tensor:
        """The layer with other weights and without its bias."""
        bias = {} if self.module.bias is None else {"bias": torch.zeros_like(self.module.bias)}
        return functional_call(self.module, {"weight": weight, **bias}, (x,))


@dataclass(frozen=True)
class RuleSettings:
    """epsilon: above 0, in units of the layer's output. alpha: of alpha_beta, beta is alpha - 1.

    low, high: the smallest and largest pixel, [1, C, 1, 1] in normalised units, for box.
    """

    epsilon: float
    alpha: float
    low: Tensor
    high: Tensor


class Part(NamedTuple):
    """One proportion of a rule: z = sum over `terms` (x, weight) of linear(x, weight), plus offset."""

    factor: float
    terms: Sequence[tuple[Tensor, Tensor]]
    offset: Tensor | float


Rule = Callable[[AffineLayer, Tensor, RuleSettings], Sequence[Part]]


def _epsilon(layer: AffineLayer, x: Tensor, settings: RuleSettings) -> Sequence[Part]:
    return [Part(1, [(x, layer.weight)], layer.bias)]


def _plus(layer: AffineLayer, x: Tensor, settings: RuleSettings) -> Sequence[Part]:
    weight = layer.weight
    terms = [(x.clamp(min=0), weight.clamp(min=0)), (x.clamp(max=0), weight.clamp(max=0))]
    return [Part(1, terms, layer.bias.clamp(min=0))]


def _alpha_beta(layer: AffineLayer, x: Tensor, settings: RuleSettings) -> Sequence[Part]:
    weight = layer.weight
    (positive,) = _plus(layer, x, settings)
    terms = [(x.clamp(min=0), weight.clamp(max=0)), (x.clamp(max=0), weight.clamp(min=0))]
    negative = Part(1 - settings.alpha, terms, layer.bias.clamp(max=0))
    return [positive._replace(factor=settings.alpha), negative]


def _flat(layer: AffineLayer, x: Tensor, settings: RuleSettings) -> Sequence[Part]:
    return [Part(1, [(torch.ones_like(x), torch.ones_like(layer.weight))], 0)]


def _box(layer: AffineLayer, x: Tensor, settings: RuleSettings) -> Sequence[Part]:
    low, high = (bound.expand_as(x) for bound in (settings.low, settings.high))
    return [Part(1, [(x, layer.weight), (-low, layer.weight.clamp(min=0)), (-high, layer.weight.clamp(max=0))], 0)]


RULES: Mapping[str, Rule] = {
    "epsilon": _epsilon,
    "plus": _plus,
    "alpha_beta": _alpha_beta,
    "flat": _flat,
    "box": _box,
}


class Composite(NamedTuple):
    """Which rule a layer follows: `first` the convolution or linear layer that sees the picture, then by kind."""

    first: str
    convolution: str
    linear: str


COMPOSITES: Mapping[str, Composite] = {
    "epsilon": Composite("epsilon", "epsilon", "epsilon"),
    "epsilon_plus": Composite("plus", "plus", "epsilon"),
    "epsilon_plus_flat": Composite("flat", "plus", "epsilon"),
    "epsilon_plus_box": Composite("box", "plus", "epsilon"),
    "epsilon_alpha_beta": Composite("alpha_beta", "alpha_beta", "epsilon"),
    "epsilon_alpha_beta_flat": Composite("flat", "alpha_beta", "epsilon"),
}


def composite_named(name: str) -> Composite:
    """Raises UserError for an unknown name."""
    if name not in COMPOSITES:
        raise UserError(f"There is no composite '{name}'. {nearest(name, COMPOSITES)}")
    return COMPOSITES[name]


def propagate(rule: str, layer: AffineLayer, x: Tensor, relevance: Tensor, settings: RuleSettings) -> Shared:
    """Relevance of a layer's outputs [B, ...] to its input x, under a rule of the table."""
    found, absorbed = torch.zeros_like(x), relevance.new_zeros(len(x), dtype=torch.float64)
    for part in RULES[rule](layer, x, settings):
        if part.factor:
            inputs, lost = _share_part(layer, part, relevance, settings.epsilon)
            found, absorbed = found + part.factor * inputs, absorbed + part.factor * lost
    return Shared([found], absorbed)


def _share_part(layer: AffineLayer, part: Part, relevance: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    # behind a ReLU no input is negative, and half of the convolutions would be of zeros
    first, *rest = part.terms
    terms = [first, *(term for term in rest if term[0].any())]

    def forward(leaves: Sequence[Tensor]) -> Tensor:
        parts = [layer.linear(leaf, weight) for leaf, (_, weight) in zip(leaves, terms, strict=True)]
        return sum(parts, torch.as_tensor(part.offset))

    inputs, absorbed = share(forward, [x for x, _ in terms], part.offset, relevance, epsilon)
    return sum(inputs[1:], inputs[0]), absorbed
