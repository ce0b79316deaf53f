"""Inverse IBA: from the equations in float64, and two redundant patches of which IBA needs one and this finds both."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from networks import (
    batch_of,
    noise_pictures,
    patch_pictures,
    patch_reference,
    relative,
    small_backbone,
    small_net,
)
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence

from ibxai.backbones import Backbone, freeze
from ibxai.draws import normal, sample_keys
from ibxai.errors import UserError
from ibxai.methods import IBA, InverseIBA
from ibxai.types import Batch


class Either(nn.Module):
    """Class 0 is shown by one bright cell of channel 0, anywhere: its logit is strength * max over the cells of what
    exceeds one half. A second patch adds nothing. The logit of class 1 is `other`, whatever the picture.
    """

    def __init__(self, strength: float = 60.0, other: float = 10.0) -> None:
        super().__init__()
        self.cells = nn.Conv2d(3, 3, 4, 4, groups=3)
        self.relu = nn.ReLU()
        self.logits = nn.Linear(1, 2)
        with torch.no_grad():
            self.cells.weight.fill_(1 / 16)
            self.cells.bias.zero_()
            self.logits.weight.copy_(torch.tensor([[strength], [0.0]]))
            self.logits.bias.copy_(torch.tensor([0.0, other]))

    def forward(self, x: Tensor) -> Tensor:
        best = self.relu(self.cells(x)[:, 0] - 0.5).flatten(1).amax(1, keepdim=True)
        return self.logits(best)


def either(strength: float = 60.0) -> Backbone:
    return freeze(Either(strength), (3, 32, 32), {"bottleneck": "cells"}, name="either")


PAIRS = [((1, 1), (6, 5)), ((0, 7), (7, 0)), ((2, 5), (5, 2)), ((3, 3), (3, 7)), ((7, 7), (4, 1)), ((0, 0), (2, 6))]
GREEN = (7, 3)
KNOWN = [patch_reference(192)]
SHARED = {"smoothing": 0.0, "steps": 30, "draws": 4}


def redundant() -> Batch:
    """Two patches a picture, the first a little brighter; and a green one that means nothing."""
    pictures = patch_pictures([[(0, *first), (0, *second), (1, *GREEN)] for first, second in PAIRS])
    for picture, (_, (row, column)) in zip(pictures, PAIRS, strict=True):
        picture[0, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] = 0.95
    return batch_of(pictures, [0] * len(PAIRS))


def inside(heatmap: Tensor, place: tuple[int, int]) -> float:
    row, column = place
    return float(heatmap[4 * row : 4 * row + 4, 4 * column : 4 * column + 4].sum())


def test_the_patches_are_redundant() -> None:
    """What the tests below stand on: either patch alone is enough, without both the class is gone."""
    backbone, batch = either(), redundant()
    for gone in ([], [0], [1], [0, 1]):
        pictures = batch.inputs.clone()
        for picture, pair in zip(pictures, PAIRS, strict=True):
            for i in gone:
                row, column = pair[i]
                picture[:, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] = 0
        probability = backbone(pictures).softmax(1)[:, 0]
        assert (probability < 1e-3).all() if len(gone) == 2 else (probability > 0.999).all()


@pytest.mark.parametrize(
    ("bound", "strength", "beta"),
    [("complement", 60.0, 30.0), ("complement", 60.0, 10.0), ("complement", 30.0, 3.0), ("probability", 30.0, 1.0)],
)
def test_inverse_finds_both_where_iba_needs_one(bound: str, strength: float, beta: float) -> None:
    backbone, batch = either(strength), redundant()
    needed = IBA(beta=10.0, **SHARED).fit(backbone, KNOWN, 0)(batch).heatmap
    found = InverseIBA(beta=beta, bound=bound, **SHARED).fit(backbone, KNOWN, 0)(batch).heatmap
    for enough, whole, (first, second) in zip(needed, found, PAIRS, strict=True):
        weak, strong = sorted((inside(enough, first), inside(enough, second)))
        assert weak < 0.02 * strong
        assert strong > 0.4 * float(enough.sum())  # of a cell's bits upscaling leaves about half inside
        weak, strong = sorted((inside(whole, first), inside(whole, second)))
        assert weak > 0.1 * strong
        assert weak + strong > 0.4 * float(whole.sum())  # 2 of 64 cells
        assert weak > 50 * inside(whole, GREEN)


@pytest.mark.parametrize("beta", [1.0, 3.0, 10.0, 30.0, 100.0])
def test_the_map_stays_informative(beta: float) -> None:
    """Of two decades of prices none gives an empty, an even or a runaway map."""
    found = InverseIBA(beta=beta, **SHARED).fit(either(), KNOWN, 0)(redundant())
    most = IBA(steps=1, draws=1, learning_rate=1e-9, smoothing=0.0).fit(either(), KNOWN, 0)(redundant())
    assert (found.diagnostics["capacity"] > 0.2).all()
    assert (found.diagnostics["capacity"] < 0.25 * most.diagnostics["capacity"]).all()
    for heatmap, (first, second) in zip(found.heatmap, PAIRS, strict=True):
        assert inside(heatmap, first) + inside(heatmap, second) > 0.4 * float(heatmap.sum())


def test_the_target_matters() -> None:
    """Of class 1 nothing in the picture is evidence: there is next to nothing to block."""
    batch = redundant()
    attribute = InverseIBA(beta=10.0, **SHARED).fit(either(), KNOWN, 0)
    own = attribute(batch).diagnostics["capacity"]
    other = attribute(batch_of(batch.inputs, [1] * len(batch))).diagnostics["capacity"]
    assert (other < 0.2 * own).all()


# --- the equations


@pytest.mark.parametrize("bound", ["complement", "probability", "none"])
def test_against_the_equations(bound: str) -> None:
    """Eqs. 5 and 6 by loops over samples, steps and draws in float64; lambda is the share of noise that passes."""
    settings = InverseIBA(layer="stage2", steps=4, draws=2, beta=3.0, smoothing=0.0, bound=bound, min_reference=20)
    batch, classes = batch_of(noise_pictures(3), [0, 3, 1]), [0, 3, 1]
    reference = batch_of(noise_pictures(20, seed=5), [0] * 20)
    found = settings.fit(small_backbone(), [reference], 7)(batch)
    network = small_net().eval().double()
    with torch.no_grad():
        seen = network.stage2(network.stage1(reference.inputs.double()))
        features = network.stage2(network.stage1(batch.inputs.double()))
    mu, sigma = seen.mean(0), seen.std(0, unbiased=False).clamp_min(settings.min_std)
    active = ((seen != 0).double().mean(0) > settings.active_share).double()
    channels, height, width = mu.shape
    for i, r in enumerate(features):
        alpha = torch.full_like(r, settings.initial_alpha)
        first, second, losses, nats = torch.zeros_like(r), torch.zeros_like(r), [], []

        def information(alpha: Tensor, r: Tensor = r) -> tuple[Tensor, Tensor]:
            lam = 1 / (1 + torch.exp(-alpha))
            nu = 1 / (1 + torch.exp(alpha))
            return lam, kl_divergence(Normal(lam * r + nu * mu, nu * sigma), Normal(mu, sigma))

        for step in range(settings.steps):
            alpha.requires_grad_()
            lam, kl = information(alpha)
            removal = torch.zeros((), dtype=torch.float64)
            for draw in range(settings.draws):
                key = sample_keys(7, [batch.sample_ids[i]], "bottleneck stage2")
                noise = normal(key, step * settings.draws + draw, (height, width, channels))[0].permute(2, 0, 1)
                z = (lam * (mu + sigma * noise.double()) + (1 - lam) * r) * active
                p = network.fc(network.stage3(z[None]).mean((2, 3))).softmax(1)[0, classes[i]]
                form = {"complement": -torch.log(1 - p), "probability": p, "none": torch.log(p)}[bound]
                removal = removal + form / settings.draws
            (gradient,) = torch.autograd.grad(removal + settings.beta * kl.mean(), alpha)
            losses.append(removal.item())
            nats.append(kl.sum().item())
            first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient**2
            move = first / (1 - 0.9 ** (step + 1)) / ((second / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8)
            alpha = (alpha.detach() - settings.learning_rate * move).detach()
        assert relative(found.diagnostics["target_loss_curve"][i], torch.tensor(losses)) < 1e-4
        assert relative(found.diagnostics["capacity_curve"][i], torch.tensor(nats) / math.log(2)) < 1e-4
        capacity = float(information(alpha)[1].sum()) / math.log(2)
        assert float(found.diagnostics["capacity"][i]) == pytest.approx(capacity, rel=1e-3)
        assert float(found.heatmap[i].double().sum()) == pytest.approx(capacity, rel=1e-3)
        assert nats[-1] != pytest.approx(nats[0], rel=0.02)


def test_what_is_blocked_is_counted_as_if_it_were_signal() -> None:
    """Before any step the mask blocks (almost) all, at the capacity that IBA's (almost) open mask has."""
    start = {"steps": 1, "draws": 1, "learning_rate": 1e-9}
    backbone, batch = either(), redundant()
    opened = IBA(**start).fit(backbone, KNOWN, 0)(batch)
    blocked = InverseIBA(bound="none", **start).fit(backbone, KNOWN, 0)(batch)
    assert relative(blocked.heatmap, opened.heatmap) < 1e-4
    assert blocked.unit == "bits"
    assert (opened.diagnostics["target_loss_curve"] < 1e-3).all()  # the class is there
    assert (blocked.diagnostics["target_loss_curve"] < -5).all()  # the class is gone


def test_the_published_form_pays_on_when_the_class_is_gone_and_the_bounded_do_not() -> None:
    batch, backbone, ends, capacity = redundant(), either(30.0), {}, {}
    for bound in ("complement", "probability", "none"):
        found = InverseIBA(beta=1.0, bound=bound, **SHARED).fit(backbone, KNOWN, 0)(batch)
        ends[bound], capacity[bound] = found.diagnostics["target_loss_curve"][:, -1], found.diagnostics["capacity"]
        assert (ends[bound] > -10.001).all()  # of this network, whose other logit is 10
    assert (ends["complement"] >= 0).all()
    assert (ends["complement"] < 0.2).all()  # gone
    assert (ends["probability"] >= 0).all()
    assert (ends["probability"] < 0.2).all()
    assert (ends["none"] < -9).all()  # on to 1e-4 and below
    assert (capacity["none"] > 1.5 * capacity["complement"]).all()
    assert (capacity["none"] > 1.5 * capacity["probability"]).all()


# --- settings


def test_settings_that_cannot_be() -> None:
    with pytest.raises(UserError, match=r"no bound 'complment'.*complement"):
        InverseIBA(bound="complment")  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"beta is -1"):
        InverseIBA(beta=-1.0)
    with pytest.raises(UserError, match=r"beta_per is 'layer'"):
        InverseIBA(beta_per="layer")  # type: ignore[arg-type]


def test_it_has_iba_settings() -> None:
    assert {f.name for f in dataclasses.fields(InverseIBA)} == {f.name for f in dataclasses.fields(IBA)} | {"bound"}
