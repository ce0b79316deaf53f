"""What every information bottleneck is made of: feature statistics, the Gaussian KL, smoothing, bits a pixel.

A bottleneck replaces features R by Z = lambda R + (1 - lambda) eps with eps ~ N(mu_R, sigma_R^2), and pays for the
information that passes, KL[P(Z|R) || Q(Z)] with Q(Z) = N(mu_R, sigma_R^2) (Schulz et al., "Restricting the Flow",
ICLR 2020; CheXplain Eqs. 1-4). The share of noise nu = 1 - lambda is computed from sigmoid(-alpha), never as a
difference, so that log(nu) stays exact when a mask is almost open.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ibxai.backbones import Backbone
from ibxai.errors import UserError
from ibxai.types import Batch

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class FeatureStatistics:
    """Of a layer's output, over a reference split; broadcastable to [C, h, w].

    mean, std: a neuron each, or a channel each ([C, 1, 1]) when `pooled`. active: False for neurons that are
    (almost) never different from zero. count: reference pictures they come from.
    """

    mean: Tensor
    std: Tensor
    active: Tensor
    count: int
    pooled: bool

    def to(self, device: torch.device) -> FeatureStatistics:
        return FeatureStatistics(
            self.mean.to(device), self.std.to(device), self.active.to(device), self.count, self.pooled
        )


def estimate_statistics(
    backbone: Backbone,
    layer: str,
    reference: Iterable[Batch],
    min_reference: int,
    min_std: float,
    active_share: float,
) -> FeatureStatistics:
    """Mean, deviation and activity of a layer in one pass over the reference batches, by Welford's rule in float64.

    With fewer than `min_reference` pictures a deviation a neuron would be noise, so they are pooled over a channel's
    positions. Deviations are floored at `min_std`; a neuron counts as active when it differs from zero in more than
    `active_share` of the pictures (of the pictures and positions, when pooled). Raises UserError without reference.
    """
    head, _ = backbone.split(layer)
    count, mean, squares, nonzero = 0, torch.zeros(()), torch.zeros(()), torch.zeros(())
    for batch in reference:
        with torch.no_grad():
            values = head(batch.inputs.to(backbone.device)).values.double().cpu()
        new_mean = values.mean(0)
        shift = new_mean - mean if count else new_mean
        total = count + len(values)
        squares = squares + ((values - new_mean) ** 2).sum(0) + shift**2 * (count * len(values) / total)
        mean = mean + shift * (len(values) / total)
        nonzero = nonzero + (values != 0).double().sum(0)
        count = total
    if count == 0:
        raise UserError("The reference split is empty: a bottleneck needs pictures to estimate feature statistics on.")
    variance, share = squares / count, nonzero / count
    pooled = count < min_reference and mean.dim() == 3
    if pooled:
        centre = mean.mean((1, 2), keepdim=True)
        variance = (variance + (mean - centre) ** 2).mean((1, 2), keepdim=True)
        mean, share = centre, share.mean((1, 2), keepdim=True)
    std = variance.sqrt().clamp_min(min_std)
    return FeatureStatistics(mean.float(), std.float(), share > active_share, count, pooled).to(backbone.device)


def gaussian_kl(features: Tensor, noise_share: Tensor, statistics: FeatureStatistics) -> Tensor:
    """KL[P(Z|R) || N(mu, sigma^2)] in nats, element by element.

    P(Z|R) = N((1 - nu) R + nu mu, nu^2 sigma^2), so with t = (1 - nu)(R - mu)/sigma it is
    (nu^2 + t^2 - 1 - ln nu^2) / 2. features, noise_share (nu in (0, 1]): [B, C, h, w].
    """
    kept = (1 - noise_share) * (features - statistics.mean) / statistics.std
    return 0.5 * (noise_share**2 + kept**2 - 1) - noise_share.log()


class Smoothing:
    """Gaussian smoothing of each channel by itself, reflected at the border; sigma 0 leaves it as it is.

    The kernel reaches two deviations and sums to one, so smoothing a share of noise and of signal stay complements.
    """

    def __init__(self, sigma: float, device: torch.device) -> None:
        self.radius = round(2 * sigma)
        places = torch.arange(-self.radius, self.radius + 1, dtype=torch.float32, device=device)
        weights = torch.exp(-(places**2) / (2 * sigma**2)) if sigma > 0 else torch.ones(1, device=device)
        self.kernel = weights / weights.sum()

    def __call__(self, values: Tensor) -> Tensor:
        """[B, C, h, w] -> [B, C, h, w]."""
        if self.radius == 0:
            return values
        batch, channels, height, width = values.shape
        radius_y, radius_x = min(self.radius, height - 1), min(self.radius, width - 1)
        flat = values.reshape(batch * channels, 1, height, width)
        flat = F.conv2d(
            F.pad(flat, (0, 0, radius_y, radius_y), mode="reflect"), self._centre(radius_y).view(1, 1, -1, 1)
        )
        flat = F.conv2d(
            F.pad(flat, (radius_x, radius_x, 0, 0), mode="reflect"), self._centre(radius_x).view(1, 1, 1, -1)
        )
        return flat.view(batch, channels, height, width)

    def _centre(self, radius: int) -> Tensor:
        cut = self.kernel[self.radius - radius : self.radius + radius + 1]
        return cut / cut.sum()


def bits_per_pixel(nats: Tensor, size: tuple[int, int]) -> Tensor:
    """[B, H, W] bits a pixel from nats [B, C, h, w]: summed over channels, spread over the picture's pixels.

    Bilinear, then scaled so that the sum over the picture is the capacity of the bottleneck, exactly.
    """
    cells = nats.sum(1, keepdim=True) / math.log(2)
    spread = F.interpolate(cells, size=size, mode="bilinear", align_corners=False)
    capacity, found = cells.sum((1, 2, 3), keepdim=True), spread.sum((1, 2, 3), keepdim=True)
    return (spread * (capacity / found.clamp_min(torch.finfo(torch.float32).tiny)))[:, 0]
