"""Step 2 of InputIBA: the mask on the input whose latent features are distributed as the feature bottleneck's.

Both estimators start from the feature mask, spread over the picture, and look for lambda_G in
Z_G = lambda_G I + (1 - lambda_G) eps_G such that f(Z_G) is distributed as Z* (InputIBA, Eq. 3).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from ibxai.draws import normal, sample_keys, uniform
from ibxai.errors import UserError
from ibxai.methods.bottleneck import Bottleneck, Mask, Smoothing, feature_noise, over_tokens
from ibxai.methods.settings import check_not_negative, check_positive
from ibxai.types import Batch

_START_RANGE = (0.05, 0.95)  # a mask that starts at 0 or 1 has no gradient to leave it


@dataclass(frozen=True, kw_only=True)
class DirectEstimator:
    """Without a critic: each neuron of f(Z_G) and of Z* is taken as a Gaussian, and their squared Wasserstein distance

        W^2 = (mean_f - mean*)^2 + (std_f - std*)^2

    in units of the neuron's deviation sigma_R, averaged over neurons, is minimised by Adam; mean_f and std_f come from
    `draws` passes through the network's head.
    """

    learning_rate: float = 0.1
    steps: int = 20
    draws: int = 8
    smoothing: float = 2.0

    def __post_init__(self) -> None:
        check_positive(self, "learning_rate", "steps", part="method.direct")
        check_not_negative(self, "smoothing", part="method.direct")
        if self.draws < 2:
            raise UserError(f"method.direct.draws is {self.draws}: a deviation needs 2 or more.")

    def estimate(
        self, feature: Bottleneck, at_input: Bottleneck, batch: Batch, latent: Mask, steps: int
    ) -> tuple[Tensor, Tensor]:
        """(lambda_G [B, C, H, W], distance before each step [B, steps])."""
        wanted_mean, wanted_std = target_distribution(feature, latent)
        logits = starting_logits(feature, batch, latent).requires_grad_()
        smooth = Smoothing(self.smoothing if batch.valid is None else 0.0, logits.device)
        keys = sample_keys(feature.seed, batch.sample_ids, "input mask noise", logits.device)
        optimiser = torch.optim.Adam([logits], lr=self.learning_rate)
        most = max(1, feature.most_rows() // self.draws)
        curve = []
        for step in range(steps):
            optimiser.zero_grad()
            total = torch.zeros(len(batch), device=logits.device)
            for rows in torch.arange(len(batch), device=logits.device).split(most):
                mask, some = smooth(torch.sigmoid(logits[rows])), batch.take(rows)
                noise = input_noise(keys[rows], step, self.draws, some)
                latents = masked_latents(feature, at_input, some, mask, noise)
                scale = feature.statistics.std
                mean = (latents.mean(1) - wanted_mean[rows]) / scale
                spread = (latents.std(1) - wanted_std[rows]) / scale
                distance = mean_of_places(mean**2 + spread**2, some.valid)
                distance.sum().backward()
                total[rows] = distance.detach()
            optimiser.step()
            curve.append(total)
        with torch.no_grad():
            found = smooth(torch.sigmoid(logits))
        return found, torch.stack(curve, 1) if curve else found.new_zeros(len(batch), 0)


def mean_of_places(values: Tensor, valid: Tensor | None) -> Tensor:
    """[B]: the mean of values [B, ...], of texts [B, T, D] over their tokens."""
    if valid is None:
        return values.flatten(1).mean(1)
    return over_tokens(values.mean(2, keepdim=True), valid).flatten(1).sum(1) / valid.sum(1)


def input_noise(keys: Tensor, step: int, draws: int, batch: Batch) -> Tensor:
    """Standard normal [B, draws, C, H, W] for pictures [B, C, H, W], [B, draws, T, D] for texts."""
    places = torch.arange(draws, device=keys.device).repeat(len(batch))
    keys, steps = keys.repeat_interleave(draws), step * draws + places
    return feature_noise(keys, steps, batch.inputs.shape[1:], batch.valid is not None).unflatten(0, (-1, draws))


def masked_latents(feature: Bottleneck, at_input: Bottleneck, batch: Batch, mask: Tensor, noise: Tensor) -> Tensor:
    """f(Z_G) [B, draws, ...] under masks in the inputs' shape, with noise [B, draws, ...] in the reference's units."""
    eps = at_input.statistics.mean + at_input.statistics.std * noise
    masked = mask[:, None] * batch.inputs[:, None] + (1 - mask[:, None]) * eps
    valid = None if batch.valid is None else batch.valid.repeat_interleave(noise.shape[1], 0)
    return feature.split.head(masked.flatten(0, 1), valid).values.unflatten(0, noise.shape[:2])


def target_distribution(feature: Bottleneck, latent: Mask) -> tuple[Tensor, Tensor]:
    """Mean and deviation of Z*, [B, ...] each, in the layer's shape."""
    with torch.no_grad():
        return feature.parts(latent.features, feature.smoothed(torch.sigmoid(-latent.alpha)))


def starting_logits(feature: Bottleneck, batch: Batch, latent: Mask) -> Tensor:
    """[B, C, H, W]: the feature mask's mean over channels, spread over the picture, the same for every input channel;
    of texts [B, T, D], token by token.

    Stretched to the sample's own range first: a mean over hundreds of channels leaves little contrast.
    """
    with torch.no_grad():
        kept = torch.sigmoid(latent.alpha)
        if batch.valid is not None:
            cells = _stretched(kept.mean(2), ~batch.valid)
            return torch.logit(cells.clamp(*_START_RANGE)).unsqueeze(2).expand_as(batch.inputs).clone()
        cells = feature.grid.to_map(kept).mean(1, keepdim=True)
        cells = _stretched(cells.flatten(1)).view_as(cells)
        spread = F.interpolate(cells, size=batch.inputs.shape[-2:], mode="bilinear", align_corners=False)
        return torch.logit(spread.clamp(*_START_RANGE)).expand_as(batch.inputs).clone()


def _stretched(cells: Tensor, padding: Tensor | None = None) -> Tensor:
    """Cells [B, P] from 0 to 1; what is padding, bool [B, P], is left out of account."""
    least, most = (cells, cells) if padding is None else (cells.masked_fill(padding, s * torch.inf) for s in (1, -1))
    low, high = least.amin(1, keepdim=True), most.amax(1, keepdim=True)
    return (cells - low) / (high - low).clamp_min(1e-6)


@dataclass(frozen=True, kw_only=True)
class WganEstimator:
    """The paper's: a generator (mask, noise mean and noise deviation) against a critic, one critic a picture.

    Wasserstein GAN with clipped weights. Each round updates the generator `generator_updates` times and the critic
    `critic_updates` times (paper, D.1: 5 and 1; the official code: 1 and 5), `steps` rounds in all, on `batch` latents
    out of `samples` drawn from P(Z*). The critics of a batch of pictures are stacked and run together under vmap;
    their batch norm sees one picture's latents. Three convolutions and two linear layers as in D.1, of texts one
    recurrent layer; the paper leaves out their widths. What the recurrent critic says is averaged over the tokens:
    with clipped weights its last state knows the last words alone.
    """

    steps: int = 28
    generator_updates: int = 5
    critic_updates: int = 1
    samples: int = 200
    batch: int = 32
    mask_rate: float = 0.003
    mean_rate: float = 0.1
    std_rate: float = 0.05
    critic_rate: float = 5e-5
    clip: float = 0.01
    width: int = 64

    def __post_init__(self) -> None:
        rates = ("mask_rate", "mean_rate", "std_rate", "critic_rate")
        check_not_negative(self, *rates, part="method.wgan")
        check_positive(self, *(f.name for f in fields(self) if f.name not in rates), part="method.wgan")

    def estimate(
        self, feature: Bottleneck, at_input: Bottleneck, batch: Batch, latent: Mask, steps: int
    ) -> tuple[Tensor, Tensor]:
        """(lambda_G [B, C, H, W], the critic's estimate of the Wasserstein distance, a round each, [B, steps])."""
        device = batch.inputs.device
        logits = starting_logits(feature, batch, latent).requires_grad_()
        mean = torch.zeros_like(logits).requires_grad_()
        log_std = torch.zeros_like(logits).requires_grad_()
        critics = _start_critics(feature, batch, latent, self.width, self.clip)
        judge = _criticise if batch.valid is None else partial(_read, batch.valid)
        generator_optimiser = torch.optim.RMSprop(
            [
                {"params": [logits], "lr": self.mask_rate},
                {"params": [mean], "lr": self.mean_rate},
                {"params": [log_std], "lr": self.std_rate},
            ]
        )
        critic_optimiser = torch.optim.RMSprop(critics, lr=self.critic_rate)
        real = _TargetLatents(feature, batch, latent, self.samples, self.batch)
        keys = sample_keys(feature.seed, batch.sample_ids, "generator noise", device)

        def fake(draw: int) -> Tensor:
            """f(Z_G) as maps, [B, batch, C, h, w], or [B, batch, T, H]; eps_G's mean and deviation are learned."""
            noise = input_noise(keys, draw, self.batch, batch) * log_std.exp()[:, None] + mean[:, None]
            return as_maps(feature, masked_latents(feature, at_input, batch, torch.sigmoid(logits), noise))

        curve, draw = [], 0
        for _ in range(steps):
            for _ in range(self.generator_updates):
                generator_optimiser.zero_grad()
                (-judge(critics, fake(draw)).mean(1).sum()).backward()
                generator_optimiser.step()
                draw += 1
            for _ in range(self.critic_updates):
                critic_optimiser.zero_grad()
                with torch.no_grad():
                    generated, wanted = fake(draw), real.draw(draw)
                distance = judge(critics, wanted).mean(1) - judge(critics, generated).mean(1)
                (-distance.sum()).backward()
                critic_optimiser.step()
                with torch.no_grad():
                    for weights in critics:
                        weights.clamp_(-self.clip, self.clip)
                draw += 1
            curve.append(distance.detach())
        found = torch.sigmoid(logits.detach())
        return found, torch.stack(curve, 1) if curve else found.new_zeros(len(batch), 0)


class _TargetLatents:
    """The critic's data: `count` latents of P(Z*) a picture, handed out a random part at a time."""

    def __init__(self, feature: Bottleneck, batch: Batch, latent: Mask, count: int, size: int) -> None:
        self.feature, self.size, self.count = feature, size, count
        self.mean, self.std = target_distribution(feature, latent)
        self.keys = sample_keys(feature.seed, batch.sample_ids, "target latents", latent.alpha.device)
        self.order = sample_keys(feature.seed, batch.sample_ids, "order of target latents", latent.alpha.device)

    def draw(self, step: int) -> Tensor:
        """[B, size, C, h, w] or [B, size, T, H]. A latent is a function of its number, so the 200 need not be kept."""
        number = (uniform(self.order, step, (self.size,)) * self.count).long().clamp_max(self.count - 1)
        keys, of_text = self.keys.repeat_interleave(self.size), self.feature.grid.kind == "text"
        noise = feature_noise(keys, number.flatten(), self.mean.shape[1:], of_text)
        return as_maps(self.feature, self.mean[:, None] + self.std[:, None] * noise.unflatten(0, (-1, self.size)))


def as_maps(feature: Bottleneck, latents: Tensor) -> Tensor:
    """Latents [B, n, ...] as maps, [B, n, C, h, w]; of texts they stay [B, n, T, H]."""
    if feature.grid.kind == "text":
        return latents
    return feature.grid.to_map(latents.flatten(0, 1)).unflatten(0, latents.shape[:2])


_CONVOLUTIONS = ((4, 2, 1), (4, 2, 1), (3, 1, 1))  # kernel, stride, padding
_HIDDEN = 256


def _start_critics(feature: Bottleneck, batch: Batch, latent: Mask, width: int, clip: float) -> list[Tensor]:
    """Stacked weights, [B, ...] each, clipped: three convolutions (batch norm between), two linear layers; of texts a
    recurrent layer and a linear one.
    """
    keys = sample_keys(feature.seed, batch.sample_ids, "critic weights", batch.inputs.device)
    if feature.grid.kind == "text":
        hidden = latent.features.shape[2]
        return _drawn(keys, [((hidden, width), hidden), ((width, width), width), ((width,), width)], clip)
    channels, height, side = feature.grid.to_map(latent.features).shape[1:]
    widths = (channels, width, 2 * width, width)
    shapes: list[tuple[tuple[int, ...], int]] = []
    for (kernel, stride, padding), before, after in zip(_CONVOLUTIONS, widths[:-1], widths[1:], strict=True):
        shapes.append(((after, before, kernel, kernel), before * kernel**2))
        height = (height + 2 * padding - kernel) // stride + 1
        side = (side + 2 * padding - kernel) // stride + 1
    if min(height, side) < 1:
        raise UserError("The critic of method.estimator=wgan needs a layer of at least 4 x 4 cells.")
    shapes += [((_HIDDEN, width * height * side), width * height * side), ((1, _HIDDEN), _HIDDEN)]
    return _drawn(keys, shapes, clip)


def _drawn(keys: Tensor, shapes: Sequence[tuple[tuple[int, ...], int]], clip: float) -> list[Tensor]:
    """Weights of these (shape, inputs of a unit), [B, ...] each, clipped."""
    starts = [normal(keys, number, shape) * fan_in**-0.5 for number, (shape, fan_in) in enumerate(shapes)]
    return [weights.clamp_(-clip, clip).requires_grad_() for weights in starts]


def _criticise(critics: list[Tensor], latents: Tensor) -> Tensor:
    """[B, n]: each picture's critic on its latents [B, n, C, h, w]."""
    run: Callable[..., Tensor] = torch.func.vmap(_critic)
    return run(tuple(critics), latents)


def _read(valid: Tensor, critics: list[Tensor], latents: Tensor) -> Tensor:
    """[B, n]: each text's recurrent critic on its latents [B, n, T, H], the mean over the tokens of what it says."""
    inward, recurrent, last = critics
    arriving = (latents @ inward[:, None]).unbind(2)
    state, said = torch.zeros_like(arriving[0]), []
    for values in arriving:
        state = torch.tanh(values + state @ recurrent)
        said.append((state * last[:, None]).sum(2))
    return (torch.stack(said, 2) * valid[:, None]).sum(2) / valid.sum(1)[:, None]


def _critic(weights: tuple[Tensor, ...], latents: Tensor) -> Tensor:
    """[n] from [n, C, h, w], with one picture's weights."""
    *convolutions, hidden, last = weights
    values = latents
    for kernel, (_, stride, padding) in zip(convolutions, _CONVOLUTIONS, strict=True):
        values = F.conv2d(values, kernel, stride=stride, padding=padding)
        centred = values - values.mean((0, 2, 3), keepdim=True)
        values = F.leaky_relu(centred / (centred.square().mean((0, 2, 3), keepdim=True) + 1e-5).sqrt(), 0.2)
    return (F.leaky_relu(values.flatten(1) @ hidden.T, 0.2) @ last.T)[:, 0]
