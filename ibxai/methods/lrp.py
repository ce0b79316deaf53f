"""LRP: the score is handed back from layer to layer, each output sharing what it is worth among its inputs.

    R_i = sum_j z_ij / (sum_i z_ij) R_j,   the explained output's R is its score      (Bach et al., PLoS ONE 2015, (56))

Which z_ij count is the rule, and which layer follows which rule the composite (Kohlbrenner et al., IJCNN 2020, who
recommend "epsilon_plus_flat" and its alpha-beta variant; Montavon et al., in Explainable AI, LNCS 11700, 2019). The
rules are in relevance_rules.py, and how they are applied to everything that is no layer in relevance_graph.py.

Differently from common implementations what biases and epsilon take is counted rather than lost, so that

    sum of the map + absorbed = score

holds for every picture up to rounding, and can be checked: a network on which the rules blow up is an error here, and
not a map. A batch norm that follows no convolution (DenseNet) is a layer of its own with the epsilon rule.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx

from ibxai.backbones import Backbone
from ibxai.errors import UserError
from ibxai.methods.relevance_graph import RelevanceGraph
from ibxai.methods.relevance_rules import RuleSettings, composite_named, total
from ibxai.methods.settings import check_positive
from ibxai.types import Attribution, Attributor, Batch, Target

_SMALL_SCORE = 0.01  # of the largest output: errors of a smaller score are taken relative to this


@dataclass(frozen=True)
class LRP:
    """composite: which layer follows which rule. epsilon: in units of each layer's output. alpha: of the alpha-beta
    rule; beta is alpha - 1. tolerance: the largest completeness error that is accepted.
    """

    composite: str = "epsilon_plus_flat"
    epsilon: float = 1e-6
    alpha: float = 2.0
    tolerance: float = 1e-3

    version: ClassVar[int] = 1
    uses_reference: ClassVar[bool] = False

    def __post_init__(self) -> None:
        composite_named(self.composite)
        check_positive(self, "epsilon", "tolerance")
        if not self.alpha >= 1:
            raise UserError(f"method.alpha is {self.alpha}: at least 1 is expected, since beta = alpha - 1.")

    def fit(
        self, backbone: Backbone, reference: Iterable[Batch], seed: int, state: Mapping[str, Tensor] | None = None
    ) -> Attributor:
        """Nothing is estimated. Raises UserError when the network has an operation that no rule covers.

        The map's diagnostics, [B] each: `score`; `absorbed`, the part of the score that went to biases and epsilon;
        `completeness_error` |sum of the map + absorbed - score| / |score|. Scores below a hundredth of the largest
        output count as that hundredth. Raises UserError where the error is above the tolerance.
        """
        network = backbone.module()
        assert isinstance(network, fx.GraphModule)
        settings = RuleSettings(self.epsilon, self.alpha, *_pixel_range(backbone))
        graph = RelevanceGraph(network, backbone.name, composite_named(self.composite), settings)

        def attribute(batch: Batch) -> Attribution:
            rows = torch.arange(len(batch), device=batch.inputs.device).split(backbone.max_passes)
            parts = [_explain(graph, batch.inputs[some], batch.target.take(some)) for some in rows]
            heatmap, score, absorbed, error = (torch.cat(of_all) for of_all in zip(*parts, strict=True))
            self._check(error, backbone.name, batch.sample_ids)
            diagnostics = {"score": score, "absorbed": absorbed.float(), "completeness_error": error.float()}
            return Attribution(heatmap, "relevance", diagnostics)

        return attribute

    def _check(self, error: Tensor, name: str, sample_ids: tuple[str, ...]) -> None:
        bad = (~(error <= self.tolerance)).nonzero().flatten().tolist()
        if bad:
            raise UserError(
                f"LRP with {self.composite} does not conserve relevance on {name}: the completeness error of "
                f"{sample_ids[bad[0]]} is {float(error[bad[0]]):.2g}, above method.tolerance={self.tolerance:g}.\n"
                "Choose another method.composite or a larger method.epsilon."
            )


def _explain(graph: RelevanceGraph, inputs: Tensor, target: Target) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(map [B, H, W], score [B], absorbed [B] as a part of the score, completeness error [B])."""
    out, values = graph.forward(inputs)
    score, start = _start(out, target)
    relevance, absorbed = graph.backward(values, start)
    scale = torch.maximum(score.abs(), _SMALL_SCORE * out.abs().amax(1)).double().clamp_min(1e-30)
    missing = total(relevance) + absorbed - score
    share = absorbed * score.sign() / scale
    return relevance.sum(1), score, share, missing.abs() / scale


def _start(out: Tensor, target: Target) -> tuple[Tensor, Tensor]:
    """(score [B], its relevance at the outputs [B, K]): each output's part of the score, which is linear in them."""
    with torch.enable_grad():
        leaf = out.detach().requires_grad_()
        score = target.score(leaf, "logit")
        (gradient,) = torch.autograd.grad(score.sum(), leaf)
    return score.detach(), gradient * out


def _pixel_range(backbone: Backbone) -> tuple[Tensor, Tensor]:
    """What the darkest and the brightest pixel are in normalised units, [1, C, 1, 1] each."""
    mean, std = (
        torch.tensor(values, device=backbone.device).view(1, -1, 1, 1)
        for values in (backbone.preprocessing.mean, backbone.preprocessing.std)
    )
    return (0 - mean) / std, (1 - mean) / std
