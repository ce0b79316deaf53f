"""InputIBA: first a bottleneck on features, then the input mask that induces it, then a bottleneck on the input.

    1  lambda*   IBA at a layer; Z* = lambda* R + (1 - lambda*) eps                                           (Eqs. 1-4)
    2  lambda_G  min D[P(f(Z_G)) || P(Z*)],  Z_G = lambda_G I + (1 - lambda_G) eps_G                             (Eq. 3)
    3  Lambda    min L_CE + beta L_I,  Z_I = Lambda I + (1 - Lambda) eps, the information against P(Z_I) of   (Prop. 3)

Reference: Zhang, Khakzar, Li, Farshad, Kim, Navab, "Fine-Grained Neural Network Explanation by Identifying Input
Features with Predictive Information" (InputIBA), NeurIPS 2021.

What this code does differently, and why: step 2 has two estimators (`input_mask.py`). The paper's "wgan" trains a
critic a picture. "direct" needs none: f(Z_G) and Z* are compared neuron by neuron as Gaussians, by the same Wasserstein
distance in closed form. The noise is that of the reference pictures, and the map is the smoothed Lambda, the mask that
the network saw (the paper's InputIBA*), not the raw sigmoid.

On texts the input is the embedding, and a token's value the mean of Lambda over its D numbers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ibxai.backbones import Backbone, Features, Split
from ibxai.methods.bottleneck import Bottleneck, Mask, Search, over_tokens
from ibxai.methods.feature_statistics import INPUT, FeatureGrid
from ibxai.methods.iba import IBA, diagnostics_of
from ibxai.methods.input_mask import DirectEstimator, WganEstimator
from ibxai.methods.settings import check_choice, check_not_negative, check_positive
from ibxai.types import Attribution, Attributor, Batch


@dataclass(frozen=True, kw_only=True)
class InputIBA:
    """feature: the bottleneck of step 1. estimator: of step 2, with its settings in `direct` or `wgan`; "none" leaves
    lambda_G where both start, at the feature mask, and "constant" at 0.5 everywhere: what an estimator has to beat.

    beta, learning_rate, steps, draws, initial_alpha, smoothing: the input bottleneck of step 3 (`smoothing` in pixels);
    beta weighs the mean over input elements. output: "mask" is Lambda; "prior" is lambda_G itself, without step 3.
    """

    feature: IBA = field(default_factory=lambda: IBA(smoothing=0.0))
    estimator: Literal["direct", "wgan", "none", "constant"] = "direct"
    direct: DirectEstimator = field(default_factory=DirectEstimator)
    wgan: WganEstimator = field(default_factory=WganEstimator)
    beta: float = 20.0
    learning_rate: float = 0.3
    steps: int = 50
    draws: int = 8
    initial_alpha: float = 5.0
    smoothing: float = 1.5
    output: Literal["mask", "prior"] = "mask"

    version: ClassVar[int] = 1
    modalities: ClassVar[tuple[str, ...]] = ("picture", "text")

    def __post_init__(self) -> None:
        check_positive(self, "steps", "draws", "learning_rate")
        check_not_negative(self, "beta", "smoothing")
        check_choice(self, "estimator", "direct", "wgan", "none", "constant")
        check_choice(self, "output", "mask", "prior")

    def fit(
        self, backbone: Backbone, reference: Iterable[Batch], seed: int, state: Mapping[str, Tensor] | None = None
    ) -> Attributor:
        """Estimate statistics of the layer and of the input. Raises UserError as IBA does."""
        statistics = self.feature.statistics(backbone, [self.feature.layer, INPUT], reference)
        (feature,) = self.feature.bottlenecks(backbone, [self.feature.layer], statistics, seed)
        at_input = Bottleneck(
            split=_whole(backbone),
            purpose=INPUT,
            grid=FeatureGrid.at(backbone, INPUT),
            statistics=statistics[INPUT],
            search=Search(self.learning_rate, self.steps, self.draws, self.initial_alpha, self.smoothing),
            price=IBA(beta=self.beta).price(backbone, INPUT),
            seed=seed,
            inverse=False,
            loss=lambda target, out: target.loss(out),
            most_rows=lambda: backbone.max_passes,
        )

        def attribute(batch: Batch) -> Attribution:
            latent = feature.find(batch)
            prior, distance = self._prior(feature, at_input, batch, latent)
            diagnostics = {"feature_capacity": diagnostics_of(latent)["capacity"]}
            if distance.shape[1]:  # an estimator has taken steps
                diagnostics["distance_curve"] = distance
            if self.output == "prior":
                return Attribution(_map_of(prior, batch), "mask", diagnostics)
            mask = at_input.find(batch, prior)
            kept = at_input.smoothed(torch.sigmoid(mask.alpha))
            return Attribution(_map_of(kept, batch), "mask", diagnostics | diagnostics_of(mask))

        return attribute

    def _prior(self, feature: Bottleneck, at_input: Bottleneck, batch: Batch, latent: Mask) -> tuple[Tensor, Tensor]:
        """(lambda_G [B, C, H, W], distance curve [B, steps]) of step 2."""
        if self.estimator == "constant":
            return torch.full_like(batch.inputs, 0.5), batch.inputs.new_zeros(len(batch), 0)
        estimator = self.wgan if self.estimator == "wgan" else self.direct
        steps = 0 if self.estimator == "none" else estimator.steps
        return estimator.estimate(feature, at_input, batch, latent, steps)


def _whole(backbone: Backbone) -> Split:
    """The network cut before its first layer."""

    def head(inputs: Tensor, valid: Tensor | None = None) -> Features:
        return Features(inputs, () if valid is None else (valid,))

    def tail(features: Features | Tensor) -> Tensor:
        features = features if isinstance(features, Features) else Features(features)
        return backbone(features.values, *features.bypass)

    return Split(head, tail)


def _map_of(mask: Tensor, batch: Batch) -> Tensor:
    """[B, H, W] or [B, T]: the mean of a mask [B, ...] over what a pixel or a token consists of."""
    return over_tokens(mask, batch.valid).mean(batch.channels)
