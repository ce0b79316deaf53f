"""IBA: a layer's features are drowned in noise where they are not needed; what must stay clean is the explanation.

    min over alpha of  L = L_CE(Phi(Z), y) + beta L_I          Z = lambda R + (1 - lambda) eps
    lambda = smooth(sigmoid(alpha))                            L_I = mean over neurons of KL[P(Z|R) || Q(Z)]
    Q(Z) = N(mu_R, sigma_R^2)                                                               (CheXplain, Eqs. 1-4)

Reference: Schulz, Sixt, Tombari, Landgraf, "Restricting the Flow: Information Bottlenecks for Attribution", ICLR
2020, the per-sample bottleneck; the method of IBA for COVID-19 CT (sec. 2) and the base of CheXplain and InputIBA.
With a RegressionTarget it is CheXplain's Regression IBA (sec. 2.2).

What this code does differently, and why: the network's head runs once and only its tail is optimised through, for a
whole batch of pictures with their own masks; the map is taken after the last update, not before it; noise belongs to
the sample, so a picture's map does not depend on its neighbours. By default 20 steps of 3 draws at half the rate
replace the published 10 steps, which overshoot on pictures that the network is sure of (docs/bottlenecks.md).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from ibxai.backbones import Backbone
from ibxai.methods.bottleneck import Bottleneck, Mask, Search
from ibxai.methods.feature_statistics import FeatureGrid, FeatureStatistics, estimate_statistics, shape_of
from ibxai.methods.settings import check_choice, check_not_negative, check_positive
from ibxai.types import Attribution, Attributor, Batch, Target

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class BottleneckSettings:
    """What the methods with a bottleneck on features share.

    beta: weight of the information. beta_per: "neuron", of its mean over the layer's neurons as in the papers (a nat
    costs beta / neurons: another price at every layer), or "pixel", of nats per pixel (or token) of the input, the same
    at every layer and input size. learning_rate, steps: of Adam. draws: noise samples a step.
    initial_alpha: the mask starts at sigmoid(initial_alpha), almost open. smoothing: deviation of the Gaussian over
    lambda, in cells of the layer, 0 for none. min_reference, min_std, active_share: see `estimate_statistics`.
    """

    beta: float = 10.0
    beta_per: Literal["neuron", "pixel"] = "neuron"
    learning_rate: float = 0.5
    steps: int = 20
    draws: int = 3
    initial_alpha: float = 5.0
    smoothing: float = 1.0
    min_reference: int = 100
    min_std: float = 0.01
    active_share: float = 0.01

    version: ClassVar[int] = 1
    inverse: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_positive(self, "steps", "draws", "min_reference", "learning_rate", "min_std")
        check_not_negative(self, "beta", "smoothing", "active_share")
        check_choice(self, "beta_per", "neuron", "pixel")

    def statistics(
        self, backbone: Backbone, layers: Sequence[str], reference: Iterable[Batch]
    ) -> dict[str, FeatureStatistics]:
        """Of these layers, with these settings, in one pass over the reference; warns when they had to be pooled.

        Raises UserError when a layer does not exist or does not lie on the picture.
        """
        found = estimate_statistics(backbone, layers, reference, self.min_reference, self.min_std, self.active_share)
        _tell_if_pooled(found[layers[0]], self.min_reference)
        return found

    def bottlenecks(
        self, backbone: Backbone, layers: Sequence[str], statistics: Mapping[str, FeatureStatistics], seed: int
    ) -> list[Bottleneck]:
        """One bottleneck a layer, with these settings."""
        return [
            Bottleneck(
                split=backbone.split(layer),
                purpose=backbone.layer(layer),
                grid=FeatureGrid.at(backbone, layer),
                statistics=statistics[layer],
                search=Search(self.learning_rate, self.steps, self.draws, self.initial_alpha, self.smoothing),
                price=self.price(backbone, layer),
                seed=seed,
                inverse=self.inverse,
                loss=self.target_loss(),
                most_rows=lambda: backbone.max_passes,
            )
            for layer in layers
        ]

    def price(self, backbone: Backbone, layer: str) -> float:
        """What a nat of information costs, in the unit of the target's loss; of texts, see `Bottleneck`."""
        if backbone.modality == "text":
            return self.beta / (shape_of(backbone, layer)[-1] if self.beta_per == "neuron" else 1)
        if self.beta_per == "neuron":
            return self.beta / math.prod(shape_of(backbone, layer))
        return self.beta / math.prod(backbone.input_shape[1:])

    def target_loss(self) -> Callable[[Target, Tensor], Tensor]:
        return lambda target, out: target.loss(out)


@dataclass(frozen=True, kw_only=True)
class IBA(BottleneckSettings):
    """Per-sample information bottleneck at one layer.

    layer: a layer's name or role; maps [C, h, w], channels-last maps and square tokens [N, D] are understood, and of
    texts any layer with features a token [T, D].
    """

    layer: str = "bottleneck"

    modalities: ClassVar[tuple[str, ...]] = ("picture", "text")

    def fit(
        self, backbone: Backbone, reference: Iterable[Batch], seed: int, state: Mapping[str, Tensor] | None = None
    ) -> Attributor:
        """Estimate feature statistics on the reference batches; the result explains batches of the same backbone.

        Raises UserError when the layer does not exist or does not lie on the picture.
        """
        statistics = self.statistics(backbone, [self.layer], reference)
        (bottleneck,) = self.bottlenecks(backbone, [self.layer], statistics, seed)

        def attribute(batch: Batch) -> Attribution:
            mask = bottleneck.find(batch)
            return Attribution(bottleneck.map_of(mask, batch.places), "bits", diagnostics_of(mask))

        return attribute


def diagnostics_of(mask: Mask) -> dict[str, Tensor]:
    """capacity: bits that pass at the end; curves before each update: the target's loss, and the bits."""
    bits = 1 / math.log(2)
    return {
        "capacity": mask.information.flatten(1).sum(1) * bits,
        "target_loss_curve": mask.target_loss,
        "capacity_curve": mask.nats * bits,
    }


def _tell_if_pooled(statistics: FeatureStatistics, min_reference: int) -> None:
    if statistics.pooled:
        log.warning(
            "Feature statistics come from %d pictures, fewer than %d: pooled over each channel's positions.",
            statistics.count,
            min_reference,
        )
