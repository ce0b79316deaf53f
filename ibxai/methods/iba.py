"""IBA: a layer's features are drowned in noise where they are not needed; what must stay clean is the explanation.

    min over alpha of  L = L_CE(Phi(Z), y) + beta L_I          Z = lambda R + (1 - lambda) eps
    lambda = smooth(sigmoid(alpha))                            L_I = mean over neurons of KL[P(Z|R) || Q(Z)]
    Q(Z) = N(mu_R, sigma_R^2)                                                               (CheXplain, Eqs. 1-4)

Reference: Schulz, Sixt, Tombari, Landgraf, "Restricting the Flow: Information Bottlenecks for Attribution", ICLR
2020, the per-sample bottleneck; the method of IBA for COVID-19 CT (sec. 2) and the base of CheXplain and InputIBA.

What this code does differently, and why: the network's head runs once and only its tail is optimised through, for a
whole batch of pictures with their own masks; the map is taken after the last update, not before it; noise belongs to
the sample, so a picture's map does not depend on its neighbours.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ibxai.backbones import Backbone, Features
from ibxai.draws import normal, sample_keys
from ibxai.errors import UserError
from ibxai.methods.bottleneck import FeatureStatistics, Smoothing, bits_per_pixel, estimate_statistics, gaussian_kl
from ibxai.types import Attribution, Attributor, Batch

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class IBA:
    """Per-sample information bottleneck at one layer.

    layer: a layer's name or role; its output must be [C, h, w]. beta: weight of the information against
    cross-entropy, of the mean over neurons. learning_rate, steps: of Adam. draws: noise samples a step.
    initial_alpha: the mask starts at sigmoid(initial_alpha), almost open. smoothing: deviation of the Gaussian over
    lambda, in cells of the layer, 0 for none. min_reference, min_std, active_share: see `estimate_statistics`.
    """

    layer: str = "bottleneck"
    beta: float = 10.0
    learning_rate: float = 1.0
    steps: int = 10
    draws: int = 10
    initial_alpha: float = 5.0
    smoothing: float = 1.0
    min_reference: int = 100
    min_std: float = 0.01
    active_share: float = 0.01

    version: ClassVar[int] = 1

    def __post_init__(self) -> None:
        for name in ("steps", "draws", "min_reference"):
            if getattr(self, name) < 1:
                raise UserError(f"method.{name} is {getattr(self, name)}: it must be 1 or more.")
        for name in ("learning_rate", "min_std"):
            if getattr(self, name) <= 0:
                raise UserError(f"method.{name} is {getattr(self, name)}: it must be above 0.")
        for name in ("beta", "smoothing"):
            if getattr(self, name) < 0:
                raise UserError(f"method.{name} is {getattr(self, name)}: it must not be negative.")

    def fit(
        self, backbone: Backbone, reference: Iterable[Batch], seed: int, state: Mapping[str, Tensor] | None = None
    ) -> Attributor:
        """Estimate feature statistics on the reference batches; the result explains batches of the same backbone.

        Raises UserError when the layer does not exist or has no spatial map.
        """
        shape = backbone.layers[backbone.layer(self.layer)]
        if len(shape) != 3:
            raise UserError(
                f"IBA needs a layer with a map [C, h, w]; '{self.layer}' of {backbone.name} gives {list(shape)}."
            )
        statistics = estimate_statistics(
            backbone, self.layer, reference, self.min_reference, self.min_std, self.active_share
        )
        if statistics.pooled:
            log.warning(
                "Feature statistics come from %d pictures, fewer than %d: pooled over each channel's positions.",
                statistics.count,
                self.min_reference,
            )
        return _Bottleneck(self, backbone, statistics, seed)


@dataclass(frozen=True)
class _Bottleneck:
    settings: IBA
    backbone: Backbone
    statistics: FeatureStatistics
    seed: int

    def __call__(self, batch: Batch) -> Attribution:
        settings = self.settings
        head, _ = self.backbone.split(settings.layer)
        with torch.no_grad():
            features = head(batch.inputs)
        keys = sample_keys(self.seed, batch.sample_ids, "iba noise", batch.inputs.device)
        smooth = Smoothing(settings.smoothing, batch.inputs.device)
        alpha = torch.full_like(features.values, settings.initial_alpha).requires_grad_()
        optimiser = torch.optim.Adam([alpha], lr=settings.learning_rate)
        losses, capacities = [], []
        for step in range(settings.steps):
            noise_share = smooth(torch.sigmoid(-alpha))
            information = gaussian_kl(features.values, noise_share, self.statistics)
            optimiser.zero_grad()
            losses.append(self._backward(batch, features, noise_share, information, keys, step))
            capacities.append(information.detach().sum((1, 2, 3)))
            optimiser.step()
        with torch.no_grad():
            information = gaussian_kl(features.values, smooth(torch.sigmoid(-alpha)), self.statistics)
            heatmap = bits_per_pixel(information, (batch.inputs.shape[-2], batch.inputs.shape[-1]))
        return Attribution(
            heatmap=heatmap,
            unit="bits",
            diagnostics={
                "capacity": heatmap.sum((1, 2)),
                "target_loss": torch.stack(losses, 1),
                "information_loss": torch.stack(capacities, 1) / information[0].numel(),
            },
        )

    def _backward(
        self, batch: Batch, features: Features, noise_share: Tensor, information: Tensor, keys: Tensor, step: int
    ) -> Tensor:
        """Adds the gradient of the loss to alpha; returns the target loss [B], the mean over the noise draws.

        Z is a clean part plus noise times a scale, so the passes, as many at once as the backbone allows, collect
        their gradients at these two; alpha gets them in one go. Losses are summed over samples: none feels another.
        """
        clean, scale = self._parts(features.values, noise_share)
        leaves = [clean.detach().requires_grad_(), scale.detach().requires_grad_()]
        draws, most = self.settings.draws, self.backbone.max_passes
        loss = torch.zeros(len(batch), device=clean.device)
        for rows in torch.arange(len(batch), device=clean.device).split(max(1, most // draws)):
            for some in torch.arange(draws, device=clean.device).split(most):
                losses = self._losses(batch, features, leaves, keys, rows, step * draws + some) / draws
                losses.sum().backward()
                loss[rows] += losses.detach().sum(1)
        weighted = self.settings.beta * information.flatten(1).mean(1).sum()
        torch.autograd.backward([clean, scale, weighted], [leaves[0].grad, leaves[1].grad, None])
        return loss

    def _losses(
        self, batch: Batch, features: Features, parts: list[Tensor], keys: Tensor, rows: Tensor, draws: Tensor
    ) -> Tensor:
        """[len(rows), len(draws)]: the target's loss with each of these noise draws in these pictures."""
        clean, scale = (part[rows[0] : rows[-1] + 1, None] for part in parts)
        sample = rows.repeat_interleave(len(draws))
        noise = _noise(keys[sample], draws.repeat(len(rows)), parts[0].shape[1:])
        noised = torch.addcmul(clean, scale, noise.unflatten(0, (len(rows), len(draws)))).flatten(0, 1)
        _, tail = self.backbone.split(self.settings.layer)
        return batch.target.take(sample).loss(tail(features.replaced(noised, sample))).view(len(rows), len(draws))

    def _parts(self, values: Tensor, noise_share: Tensor) -> tuple[Tensor, Tensor]:
        """(clean part, scale of the noise) of Z; neurons that are never active stay silent."""
        active = self.statistics.active
        clean = torch.lerp(values, self.statistics.mean.expand_as(values), noise_share)
        return clean * active, noise_share * (self.statistics.std * active)


def _noise(keys: Tensor, steps: Tensor, shape: torch.Size) -> Tensor:
    """Standard normal [len(keys), C, h, w], channels innermost in memory as the convolutions want them."""
    channels, height, width = shape
    return normal(keys, steps, (height, width, channels)).permute(0, 3, 1, 2)
