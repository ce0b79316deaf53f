"""The networks of a Boolean masker, and what a batch costs them under one of three objectives.

    bottleneck    beta [-log g(i.m) - H(M|I)] + CE(c | i.m')                                                    (Eq. 4)
    ceb           the same with -log g(i.m | c): the autoencoder knows the class                               (Eq. 13)
    conditional   beta [-log g(i.m | m)] - log g(m) - log g(i | m, c) - H(M|I) + CE(c | i.m')                  (Eq. 11)

Reference: Zhmoginov, Fischer, Sandler, "Information-Bottleneck Approach to Salient Region Discovery", 2019.

The paper does not say how an autoencoder knows what it is conditioned on. Here a second encoder of the same layers
makes a code without noise of it (the mask; the class as constant planes), which the decoder gets beside z. The weight
beta acts on the masking network alone: an autoencoder has no other loss, and Adam does not feel a factor.

Our addition: the classifier may be a given, frozen network. It sees the mean colour where the mask is 0, and no mask.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ibxai.backbones.masker_networks import classifier, decoder, encoder, masking_network
from ibxai.errors import UserError
from ibxai.methods.masker_objective import (
    held,
    latent_nats,
    mask_nats,
    pixel_nats,
    relaxed_mask,
    straight_through,
    weighted_gradient,
    with_rectangles,
)
from ibxai.methods.settings import check_not_negative, check_positive
from ibxai.preprocessing import Preprocessing

ObjectiveName = Literal["bottleneck", "ceb", "conditional"]
OBJECTIVES: tuple[str, ...] = get_args(ObjectiveName)
_LOUDEST = 8.0  # rho is from .0003 to .9997: a quarter of a pixel in a picture of MNIST, and not beyond all gradient


@dataclass(frozen=True)
class Networks:
    """Architectures in the notation of `backbones/masker_networks.py`.

    channels: 1 (the mean of the colours) or 3. latent: numbers of z.
    """

    masker: str
    classifier: str
    encoder: str
    decoder: str
    channels: int
    latent: int

    def __post_init__(self) -> None:
        if self.channels not in (1, 3):
            raise UserError(f"method.networks.channels is {self.channels}: 1 or 3 is expected.")
        check_positive(self, "latent", part="method.networks")


@dataclass(frozen=True)
class Objective:
    """name: see above. sigma: deviation of a pixel, in pictures from 0 to 1. temperature: of the relaxed mask.
    rectangles: transparent ones that m' has more than m, none without mask randomisation. sides: shortest and longest
    side of a rectangle, as shares of the picture's. initial_rho: of every pixel at first. entropy: weight of the mask's
    entropy beside the autoencoder's loss, in Eq. 4 it is 1; with less, rho that is neither 0 nor 1 has a price.
    """

    name: ObjectiveName
    sigma: float
    temperature: float
    rectangles: int
    sides: tuple[float, float]
    initial_rho: float
    entropy: float

    def __post_init__(self) -> None:
        part = "method.objective"
        if self.name not in OBJECTIVES:
            raise UserError(f"{part}.name is '{self.name}': {', '.join(OBJECTIVES[:-1])} or {OBJECTIVES[-1]}.")
        check_positive(self, "sigma", "temperature", part=part)
        check_not_negative(self, "rectangles", "entropy", part=part)
        if not 0 < self.sides[0] <= self.sides[1] <= 1:
            raise UserError(f"{part}.sides is {list(self.sides)}: two shares above 0, the larger one last.")
        if not 0 < self.initial_rho < 1:
            raise UserError(f"{part}.initial_rho is {self.initial_rho}: a chance above 0 and below 1 is expected.")


@dataclass(frozen=True)
class Terms:
    """Of a batch, [B] each, in nats: cross-entropy, autoencoder's loss (what the target is for), the conditional
    objective's other two autoencoders (0 else), the mask's entropy (Eq. 8) times its weight. correct: bool. rho: its
    mean."""

    cross_entropy: Tensor
    autoencoder: Tensor
    others: Tensor
    entropy: Tensor
    correct: Tensor
    rho: Tensor

    def loss(self, beta: float) -> Tensor:
        """What is minimised, one number. beta: of H(M|I); the autoencoders' gradients on the mask have it already."""
        return (self.cross_entropy + self.autoencoder + self.others - beta * self.entropy).mean()


class Autoencoder(nn.Module):
    """A VAE of planes [B, P, H, W] given others (known [B, K, H, W]; K = 0: nothing)."""

    def __init__(self, networks: Networks, size: Sequence[int], planes: int, known: int, out: int) -> None:
        super().__init__()
        latent = networks.latent
        self.encoder = encoder(networks.encoder, (planes + known, *size), 2 * latent)
        self.condition = encoder(networks.encoder, (known, *size), latent) if known else None
        self.decoder = decoder(networks.decoder, latent + (latent if known else 0), (out, *size))

    def forward(self, planes: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
        """(decoded [B, out, H, W], KL of the latent [B] in nats), z drawn from torch's generator."""
        mean, log_variance = self.encoder(torch.cat([planes, known], 1)).chunk(2, 1)
        z = mean + (0.5 * log_variance).exp() * torch.randn_like(mean)
        code = z if self.condition is None else torch.cat([z, self.condition(known)], 1)
        return self.decoder(code), latent_nats(mean, log_variance)


class MaskerModel(nn.Module):
    """Masking network, classifier and autoencoders for pictures as `preprocessing` gives them.

    given: a frozen network in the classifier's place, from inputs [B, C, H, W] to logits [B, classes].
    """

    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(
        self,
        networks: Networks,
        objective: Objective,
        preprocessing: Preprocessing,
        classes: int,
        given: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.objective, self.classes, self.given = objective, classes, given
        colours, *size = preprocessing.input_shape
        channels = min(networks.channels, colours)
        self.grey = channels < colours
        for name, values in (("pixel_mean", preprocessing.mean), ("pixel_std", preprocessing.std)):
            self.register_buffer(name, torch.tensor(values)[:, None, None], persistent=False)
        self.masker = masking_network(networks.masker, (channels, *size))
        self.classifier = None if given else classifier(networks.classifier, (channels + 1, *size), classes)
        known = {"bottleneck": 0, "ceb": classes, "conditional": 1}[objective.name]
        self.autoencoder = Autoencoder(networks, size, channels + 1, known, channels + 1)
        if objective.name == "conditional":
            self.of_mask = Autoencoder(networks, size, 1, 0, 1)
            self.of_picture = Autoencoder(networks, size, channels, 1 + classes, channels)
        self.apply(_initialised)
        self._open(objective.initial_rho)

    def pixels(self, inputs: Tensor) -> Tensor:
        """[B, channels, H, W] from 0 to 1, of inputs after normalisation."""
        pixels = inputs * self.pixel_std + self.pixel_mean
        return pixels.mean(1, keepdim=True) if self.grey else pixels

    def logits(self, inputs: Tensor) -> Tensor:
        """[B, 1, H, W]: log-odds of rho."""
        return held(self.masker(self.pixels(inputs)), _LOUDEST)

    def says(self, inputs: Tensor, mask: Tensor) -> Tensor:
        """[B, classes]: the classifier's logits of the picture that this mask [B, 1, H, W] leaves."""
        if self.classifier is None:
            assert self.given is not None
            return self.given(inputs * mask)
        return self.classifier(torch.cat([self.pixels(inputs) * mask, mask], 1))

    def unmasked(self, inputs: Tensor) -> Tensor:
        """[B, classes]: the classifier's logits of pictures as they are."""
        return self.says(inputs, torch.ones_like(inputs[:, :1]))

    def behind_any(self, inputs: Tensor) -> Tensor:
        """[B, classes]: the classifier's logits behind masks that do not look at the picture. Every second picture is
        seen whole, of the others a share of the pixels, large ones more often than small ones.
        """
        share = _chances((len(inputs), 1, 1, 1), inputs).sqrt()
        share[::2] = 1.0
        mask = _chances((len(inputs), 1, *inputs.shape[2:]), inputs) < share
        return self.says(inputs, mask.to(inputs.dtype))

    def answers(self, inputs: Tensor, labels: Tensor) -> Tensor:
        """long [B]: the classes that masked pictures are to tell: the labels, or what a given network says."""
        if self.given is None:
            return labels
        with torch.no_grad():
            return self.given(inputs).argmax(1)

    def forward(self, inputs: Tensor, labels: Tensor, beta: float) -> Terms:
        """The terms of a batch. beta: weight of the compression in the masking network's gradient."""
        chosen, labels = self.objective, self.answers(inputs, labels)
        logits, pixels = self.logits(inputs), self.pixels(inputs)
        relaxed = relaxed_mask(logits, _chances(logits.shape, inputs), chosen.temperature)
        mask, seen = straight_through(relaxed, logits), straight_through(relaxed.round(), logits)
        if chosen.rectangles:
            seen = with_rectangles(seen, _chances((len(inputs), chosen.rectangles, 4), inputs), chosen.sides)
        said = self.says(inputs, seen)
        autoencoder, others = self.compressed(pixels, mask, labels, beta)
        return Terms(
            cross_entropy=F.cross_entropy(said, labels, reduction="none"),
            autoencoder=autoencoder,
            others=others,
            entropy=chosen.entropy * mask_nats(relaxed, logits),
            correct=said.argmax(1) == labels,
            rho=logits.detach().sigmoid().mean((1, 2, 3)),
        )

    def compressed(self, pixels: Tensor, mask: Tensor, labels: Tensor, beta: float) -> tuple[Tensor, Tensor]:
        """(the autoencoder's loss whose target is controlled, those of the others), [B] each in nats."""
        chosen, weighted = self.objective, weighted_gradient(mask, beta)
        known = pixels[:, :0]
        if chosen.name == "ceb":
            known = _class_planes(labels, self.classes, pixels)
        elif chosen.name == "conditional":
            known = weighted
        decoded, latent = self.autoencoder(torch.cat([pixels * weighted, weighted], 1), known)
        means, of_mask = decoded[:, :-1], decoded[:, -1:]
        nats = pixel_nats(pixels, means, weighted, chosen.sigma) + latent
        if chosen.name != "conditional":
            return nats + mask_nats(weighted, of_mask), torch.zeros_like(nats)
        mask_logits, of_its = self.of_mask(mask, mask[:, :0])
        known = torch.cat([mask, _class_planes(labels, self.classes, pixels)], 1)
        whole, of_picture = self.of_picture(pixels, known)
        others = mask_nats(mask, mask_logits) + of_its + pixel_nats(pixels, whole, 1.0, chosen.sigma) + of_picture
        return nats, others

    def _open(self, rho: float) -> None:
        """The masking network starts at rho everywhere, and feels the picture a little."""
        last = [part for part in self.masker.modules() if isinstance(part, nn.Conv2d)][-1]
        with torch.no_grad():
            last.weight.mul_(0.1)
            assert last.bias is not None
            last.bias.fill_(float(torch.tensor(rho).logit()))


def _initialised(part: nn.Module) -> None:
    """He et al., ICCV 2015: torch's own first weights are so small that six thin layers let nothing through."""
    if isinstance(part, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
        nn.init.kaiming_uniform_(part.weight, nonlinearity="relu")


def _chances(shape: Sequence[int], like: Tensor) -> Tensor:
    """Uniform in the open interval (0, 1)."""
    return torch.rand(tuple(shape), device=like.device).clamp(1e-6, 1 - 1e-6)


def _class_planes(labels: Tensor, classes: int, like: Tensor) -> Tensor:
    """[B, classes, H, W]: ones in the plane of the class."""
    return F.one_hot(labels, classes).to(like.dtype)[:, :, None, None].expand(-1, -1, *like.shape[2:])
