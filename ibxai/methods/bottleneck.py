"""What every information bottleneck is made of: the Gaussian KL, smoothing, bits a pixel, and the optimised mask.

A bottleneck replaces features R by Z = lambda R + (1 - lambda) eps with eps ~ N(mu_R, sigma_R^2), and pays for the
information that passes, KL[P(Z|R) || Q(Z)] with Q(Z) = N(mu_R, sigma_R^2) (Schulz et al., "Restricting the Flow",
ICLR 2020; CheXplain Eqs. 1-4). Both shares are computed from a sigmoid of their own, lambda from sigmoid(alpha) and
1 - lambda from sigmoid(-alpha), never as a difference, so that the logarithm stays exact when a mask is almost open.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ibxai.backbones import Features, Split
from ibxai.draws import normal, sample_keys
from ibxai.methods.feature_statistics import FeatureGrid, FeatureStatistics
from ibxai.types import Batch, Target

_MOST_TOKENS = 1 << 20  # of a text: numbers apart the noise of its tokens from that of the next step


def gaussian_kl(
    features: Tensor, noise_share: Tensor, statistics: FeatureStatistics, prior: Tensor | None = None
) -> Tensor:
    """KL[P(Z|R) || Q(Z)] in nats, element by element.

    P(Z|R) = N((1 - nu) R + nu mu, nu^2 sigma^2). Without a prior Q(Z) = N(mu, sigma^2), so with
    t = (1 - nu)(R - mu)/sigma it is (nu^2 + t^2 - 1 - ln nu^2) / 2. With a prior mask lambda_G of the same shape it is
    InputIBA's Proposition 3, Q's share of noise being q = 1 - lambda_G (1 - nu); lambda_G = 0 gives the former.
    features, noise_share (nu in (0, 1]): [B, ...].
    """
    kept = (1 - noise_share) * (features - statistics.mean) / statistics.std
    if prior is None:
        return 0.5 * (noise_share**2 + kept**2 - 1) - noise_share.log()
    blocked_by_prior = 1 - prior
    prior_share = noise_share + (1 - noise_share) * blocked_by_prior
    ratio, shift = noise_share / prior_share, kept * blocked_by_prior / prior_share
    return 0.5 * (ratio**2 + shift**2 - 1) - ratio.log()


class Smoothing:
    """Gaussian smoothing of each channel by itself, reflected at the border; sigma 0 leaves it as it is.

    The kernel reaches two deviations and sums to one, so smoothing a share of noise and of signal stay complements.
    """

    def __init__(self, sigma: float, device: torch.device) -> None:
        self.radius = max(1, round(2 * sigma)) if sigma > 0 else 0
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
        padded = F.pad(flat, (0, 0, radius_y, radius_y), mode="reflect")
        flat = F.conv2d(padded, self._centre(radius_y).view(1, 1, -1, 1))
        padded = F.pad(flat, (radius_x, radius_x, 0, 0), mode="reflect")
        flat = F.conv2d(padded, self._centre(radius_x).view(1, 1, 1, -1))
        return flat.view(batch, channels, height, width)

    def _centre(self, radius: int) -> Tensor:
        cut = self.kernel[self.radius - radius : self.radius + radius + 1]
        return cut / cut.sum()


def over_tokens(values: Tensor, valid: Tensor | None) -> Tensor:
    """Values [B, ...] with 0 in the padding of texts [B, T, D]; those of pictures as they are."""
    return values if valid is None else values * valid.unsqueeze(2)


def bits_per_pixel(nats: Tensor, size: tuple[int, int]) -> Tensor:
    """[B, H, W] bits a pixel from nats [B, C, h, w]: summed over channels, spread over the picture's pixels.

    Bilinear, then scaled so that the sum over the picture is the capacity of the bottleneck, exactly.
    """
    cells = nats.sum(1, keepdim=True) / math.log(2)
    spread = F.interpolate(cells, size=size, mode="bilinear", align_corners=False)
    capacity, found = cells.sum((1, 2, 3), keepdim=True), spread.sum((1, 2, 3), keepdim=True)
    return (spread * (capacity / found.clamp_min(torch.finfo(torch.float32).tiny)))[:, 0]


@dataclass(frozen=True)
class Search:
    """How a mask is searched: Adam's rate and steps, noise draws a step, the start, the smoothing in cells."""

    learning_rate: float
    steps: int
    draws: int
    initial_alpha: float
    smoothing: float


@dataclass(frozen=True)
class Mask:
    """A batch's optimised mask, in the layer's shape [B, ...], at the end of the search.

    alpha: its logits; information: nats, element by element. target_loss, nats: [B, steps], before each update.
    """

    features: Tensor
    alpha: Tensor
    information: Tensor
    target_loss: Tensor
    nats: Tensor


@dataclass(frozen=True)
class Bottleneck:
    """A mask over one layer's features, a picture each, found through the network's tail.

    split: the network cut behind the layer. purpose: names the noise draws. price: weight of a nat against the
    target's loss; of texts it is divided by the number of tokens, which each has of its own. inverse: lambda blocks
    instead of letting pass (CheXplain Eq. 5); the information counts lambda as the share of signal in either case.
    loss: of the target's outputs, one a row. most_rows: network rows at once.
    """

    split: Split
    purpose: str
    grid: FeatureGrid
    statistics: FeatureStatistics
    search: Search
    price: float
    seed: int
    inverse: bool
    loss: Callable[[Target, Tensor], Tensor]
    most_rows: Callable[[], int]

    def find(self, batch: Batch, prior: Tensor | None = None) -> Mask:
        """Optimise the masks of all pictures of a batch together; none feels another. prior: see `gaussian_kl`."""
        search = self.search
        with torch.no_grad():
            features = self.split.head(batch.inputs, batch.valid)
        keys = sample_keys(self.seed, batch.sample_ids, f"bottleneck {self.purpose}", batch.inputs.device)
        alpha = torch.full_like(features.values, search.initial_alpha).requires_grad_()
        optimiser = torch.optim.Adam([alpha], lr=search.learning_rate)
        losses, nats = [], []
        for step in range(search.steps):
            optimiser.zero_grad()
            loss, spent = self._backward(batch, features, prior, alpha, keys, step)
            optimiser.step()
            losses.append(loss)
            nats.append(spent)
        with torch.no_grad():
            information = self._information(batch, features, self.smoothed(torch.sigmoid(-alpha)), prior)
        return Mask(features.values, alpha.detach(), information, torch.stack(losses, 1), torch.stack(nats, 1))

    def smoothed(self, share: Tensor) -> Tensor:
        """A share in the layer's shape [B, ...], smoothed over the plane; neighbours in a text are no neighbours."""
        smooth = Smoothing(self.search.smoothing, share.device)
        if smooth.radius == 0 or self.grid.kind == "text":
            return share
        return self.grid.from_map(smooth(self.grid.to_map(share)), share)

    def parts(self, features: Tensor, noise_share: Tensor) -> tuple[Tensor, Tensor]:
        """(clean part, scale of the noise) of Z; neurons that are never active stay silent."""
        active = self.statistics.active
        clean = torch.lerp(features, self.statistics.mean.expand_as(features), noise_share)
        return clean * active, noise_share * (self.statistics.std * active)

    def map_of(self, mask: Mask, size: Sequence[int]) -> Tensor:
        """[B, *size], bits a pixel or a token."""
        if self.grid.kind == "text":
            return mask.information.sum(2) / math.log(2)
        return bits_per_pixel(self.grid.to_map(mask.information), (size[0], size[1]))

    def _information(self, batch: Batch, features: Features, blocked: Tensor, prior: Tensor | None) -> Tensor:
        """Nats, in the layer's shape [B, ...]."""
        return over_tokens(gaussian_kl(features.values, blocked, self.statistics, prior), batch.valid)

    def _backward(
        self, batch: Batch, features: Features, prior: Tensor | None, alpha: Tensor, keys: Tensor, step: int
    ) -> tuple[Tensor, Tensor]:
        """Gives alpha its gradient; returns the target's loss, a mean over the draws, and the nats, [B] each.

        Z is a clean part plus noise times a scale, so the passes, as many at once as the backbone allows, collect
        their gradients at these two; alpha gets them in one go. Losses are summed over samples.
        """
        blocked = self.smoothed(torch.sigmoid(-alpha))
        information = self._information(batch, features, blocked, prior)
        noise_share = self.smoothed(torch.sigmoid(alpha)) if self.inverse else blocked
        clean, scale = self.parts(features.values, noise_share)
        leaves = [clean.detach().requires_grad_(), scale.detach().requires_grad_()]
        draws, most = self.search.draws, self.most_rows()
        loss = torch.zeros(len(batch), device=clean.device)
        for rows in torch.arange(len(batch), device=clean.device).split(max(1, most // draws)):
            for some in torch.arange(draws, device=clean.device).split(most):
                sample = rows.repeat_interleave(len(some))
                number = step * draws + some.repeat(len(rows))
                noise = feature_noise(keys[sample], number, clean.shape[1:], batch.valid is not None)
                mean, spread = (leaf[rows[0] : rows[-1] + 1, None] for leaf in leaves)
                noised = torch.addcmul(mean, spread, noise.unflatten(0, (len(rows), len(some)))).flatten(0, 1)
                losses = (
                    self.loss(batch.target.take(sample), self.split.tail(features.replaced(noised, sample))) / draws
                )
                losses.sum().backward()
                loss[rows] += losses.detach().view(len(rows), len(some)).sum(1)
        tokens = 1 if batch.valid is None else batch.valid.sum(1)
        spent = (self.price * information.flatten(1).sum(1) / tokens).sum()
        torch.autograd.backward([clean, scale, spent], [leaves[0].grad, leaves[1].grad, None])
        return loss, information.detach().flatten(1).sum(1)


def feature_noise(keys: Tensor, steps: Tensor, shape: torch.Size, of_text: bool = False) -> Tensor:
    """Standard normal [len(keys), *shape]; of maps the channels are innermost in memory, as convolutions want them.

    Of texts [T, D] it is drawn token by token, so that a text's noise does not depend on its padding.
    """
    if of_text:
        places = steps[:, None] * _MOST_TOKENS + torch.arange(shape[0], device=steps.device)
        return normal(keys.repeat_interleave(shape[0]), places.flatten(), shape[1:]).view(len(keys), *shape)
    if len(shape) != 3:
        return normal(keys, steps, shape)
    channels, height, width = shape
    return normal(keys, steps, (height, width, channels)).permute(0, 3, 1, 2)
