"""IBA: the whole optimisation again in float64 from the equations, its limits, and patches at known places."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from networks import (
    batch_of,
    bilinear,
    noise_pictures,
    patch_pictures,
    patch_reference,
    patches_backbone,
    relative,
    small_backbone,
    small_net,
)
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from ibxai.backbones import Backbone
from ibxai.draws import normal, sample_keys
from ibxai.errors import UserError
from ibxai.methods import IBA
from ibxai.types import Attribution, Batch


def reference(count: int = 20) -> list[Batch]:
    return [batch_of(part, [0] * len(part)) for part in noise_pictures(count, seed=5).split(7)]


# --- the oracle: explicit loops over samples, steps and draws, everything in float64


def smoothing_matrix(size: int, sigma: float) -> Tensor:
    """[size, size]: what Gaussian smoothing reflected at the border does to a row, cell by cell."""
    radius = min(round(2 * sigma), size - 1)
    weights = [math.exp(-(k**2) / (2 * sigma**2)) if sigma else 1.0 for k in range(-radius, radius + 1)]
    matrix = torch.zeros(size, size, dtype=torch.float64)
    for i in range(size):
        for k, weight in zip(range(-radius, radius + 1), weights, strict=True):
            j = abs(i + k)
            j = 2 * (size - 1) - j if j > size - 1 else j
            matrix[i, j] += weight / sum(weights)
    return matrix


def plain_tail(network, values: Tensor) -> Tensor:
    """What SmallNet does behind stage2."""
    return network.fc(network.stage3(values).mean((2, 3)))


def plain_iba(
    settings: IBA, batch: Batch, reference: Sequence[Batch], seed: int, purpose: str
) -> tuple[np.ndarray, list[list[float]], list[list[float]]]:
    """(maps [B, H, W] in bits, target losses [B][steps], nats [B][steps])"""
    network = small_net().eval().double()
    with torch.no_grad():
        seen = torch.cat([network.stage2(network.stage1(b.inputs.double())) for b in reference])
        features = network.stage2(network.stage1(batch.inputs.double()))
    dims = (0,) if len(seen) >= settings.min_reference else (0, 2, 3)
    mu = seen.mean(dims, keepdim=True)[0].expand(features.shape[1:])
    sigma = seen.std(dims, unbiased=False, keepdim=True)[0].clamp_min(settings.min_std).expand(features.shape[1:])
    active = ((seen != 0).double().mean(dims, keepdim=True)[0] > settings.active_share).double()
    channels, height, width = features.shape[1:]
    rows, columns = smoothing_matrix(height, settings.smoothing), smoothing_matrix(width, settings.smoothing)
    maps, all_losses, all_nats = [], [], []
    for i in range(len(batch)):
        r, y = features[i], batch.target.describe()[i]
        alpha = torch.full_like(r, settings.initial_alpha)
        first, second = torch.zeros_like(r), torch.zeros_like(r)
        losses, nats = [], []

        def information(alpha: Tensor, r: Tensor = r) -> tuple[Tensor, Tensor, Tensor]:
            lam = rows @ torch.sigmoid(alpha) @ columns.T
            nu = rows @ torch.sigmoid(-alpha) @ columns.T
            return lam, nu, kl_divergence(Normal(lam * r + nu * mu, nu * sigma), Normal(mu, sigma))

        for step in range(settings.steps):
            alpha.requires_grad_()
            lam, nu, kl = information(alpha)
            cross_entropy = torch.zeros((), dtype=torch.float64)
            for draw in range(settings.draws):
                key = sample_keys(seed, [batch.sample_ids[i]], purpose)
                noise = normal(key, step * settings.draws + draw, (height, width, channels))[0].permute(2, 0, 1)
                z = (lam * r + nu * (mu + sigma * noise.double())) * active
                logits = plain_tail(network, z[None])[0]
                cross_entropy = cross_entropy - (logits[y] - torch.logsumexp(logits, 0)) / settings.draws
            loss = cross_entropy + settings.beta * kl.mean()
            (gradient,) = torch.autograd.grad(loss, alpha)
            losses.append(cross_entropy.item())
            nats.append(kl.sum().item())
            first = 0.9 * first + 0.1 * gradient
            second = 0.999 * second + 0.001 * gradient**2
            unbiased = first / (1 - 0.9 ** (step + 1)), second / (1 - 0.999 ** (step + 1))
            alpha = (alpha.detach() - settings.learning_rate * unbiased[0] / (unbiased[1].sqrt() + 1e-8)).detach()
        bits = (information(alpha)[2].sum(0) / math.log(2)).numpy()
        spread = bilinear(bits, *batch.inputs.shape[-2:])
        maps.append(spread * bits.sum() / spread.sum())
        all_losses.append(losses)
        all_nats.append(nats)
    return np.stack(maps), all_losses, all_nats


@pytest.mark.parametrize(
    "settings",
    [
        IBA(layer="stage2", steps=4, draws=3, beta=1.0, learning_rate=1.0),
        IBA(layer="stage2", steps=4, draws=2, min_reference=20, beta=3.0, active_share=0.3, learning_rate=1.0),
        IBA(layer="stage2", steps=5, draws=2, smoothing=0.0, beta=0.5, initial_alpha=1.0, learning_rate=0.3),
        IBA(
            layer="stage2", steps=3, draws=1, smoothing=2.0, beta=30.0, min_std=0.5, min_reference=20, learning_rate=1.0
        ),
    ],
)
def test_against_the_equations(settings: IBA, monkeypatch: pytest.MonkeyPatch) -> None:
    batch, purposes = batch_of(noise_pictures(3), [0, 3, 1]), set()

    def noting(seed: int, sample_ids: Sequence[str], purpose: str, device: torch.device) -> Tensor:
        purposes.add(purpose)
        return sample_keys(seed, sample_ids, purpose, device)

    monkeypatch.setattr("ibxai.methods.bottleneck.sample_keys", noting)
    found = settings.fit(small_backbone(), reference(), 7)(batch)
    (purpose,) = purposes
    maps, losses, nats = plain_iba(settings, batch, reference(), 7, purpose)
    assert found.unit == "bits"
    assert relative(found.diagnostics["target_loss_curve"], torch.tensor(losses)) < 1e-4
    assert relative(found.diagnostics["capacity_curve"], torch.tensor(nats) / math.log(2)) < 1e-4
    worst = np.abs(found.heatmap.numpy() - maps).max((1, 2)) / maps.max((1, 2))
    assert worst.max() < 2e-3
    # the capacity is the map's sum, and the map has something to say: it is neither flat nor where it started
    np.testing.assert_allclose(found.diagnostics["capacity"].numpy(), maps.sum((1, 2)), rtol=1e-4)
    assert (maps.max((1, 2)) > 1.05 * maps.mean((1, 2))).all()
    assert all(curve[-1] != pytest.approx(curve[0], rel=0.02) for curve in nats)
    # and the oracle is one: with other noise the numbers are others
    _, others, _ = plain_iba(settings, batch, reference(), 8, purpose)
    assert relative(torch.tensor(others), torch.tensor(losses)) > 1e-3


# --- limits


def start_of(backbone: Backbone, batch: Batch) -> Attribution:
    """The map before anything is learnt."""
    return IBA(steps=1, learning_rate=1e-9, draws=1).fit(backbone, reference(), 0)(batch)


def test_a_huge_beta_leaves_nothing() -> None:
    backbone, batch = small_backbone(), batch_of(noise_pictures(3), [0, 1, 2])
    start = start_of(backbone, batch).diagnostics["capacity"]
    found = IBA(beta=1e6, steps=25, draws=1).fit(backbone, reference(), 0)(batch)
    assert (found.diagnostics["capacity"] < 1e-3 * start).all()
    assert found.heatmap.isfinite().all()


@pytest.mark.parametrize("rate", [1.4, 1.7, 2.0, 3.0, 10.0])
def test_a_closed_mask_is_an_empty_map(rate: float) -> None:
    """Masks closed so far that the information is nothing but rounding."""
    backbone, batch = small_backbone(), batch_of(noise_pictures(3), [0, 1, 2])
    found = IBA(beta=1e6, steps=12, draws=1, learning_rate=rate).fit(backbone, reference(), 0)(batch)
    assert found.heatmap.isfinite().all()
    assert found.heatmap.abs().max() < 0.1


def test_without_a_price_nothing_is_forgotten() -> None:
    """Evidence gets clearer, and what says nothing stays as it was: no gradient reaches it."""
    backbone, known = patches_backbone(), [patch_reference(192)]
    batch = batch_of(patch_pictures([[(0, 2, 3)], [(1, 7, 7)]]), [0, 1])
    start = IBA(steps=1, learning_rate=1e-9, draws=1, smoothing=0.0).fit(backbone, known, 0)(batch)
    free = IBA(beta=0.0, smoothing=0.0, steps=20).fit(backbone, known, 0)(batch)
    assert (free.heatmap >= start.heatmap * (1 - 1e-5)).all()
    for i, (row, column) in enumerate([(2, 3), (7, 7)]):
        centre = i, 4 * row + 2, 4 * column + 2
        assert free.heatmap[centre] > 1.05 * start.heatmap[centre]
    priced = IBA(beta=3.0, smoothing=0.0, steps=20).fit(backbone, known, 0)(batch)
    assert (priced.diagnostics["capacity"] < 0.5 * start.diagnostics["capacity"]).all()


def test_an_evidence_free_price_of_zero_keeps_the_mask() -> None:
    """beta 0 and a target that the layer has no say in: the gradient is zero, so the map is the start's."""
    backbone, batch = patches_backbone(), batch_of(torch.zeros(2, 3, 32, 32), [0, 1])
    known = [patch_reference(100)]
    at_rest = IBA(beta=0.0, steps=1, draws=1, learning_rate=1e-9).fit(backbone, known, 0)(batch)
    found = IBA(beta=0.0, steps=6).fit(backbone, known, 0)(batch)
    share = found.diagnostics["capacity"] / at_rest.diagnostics["capacity"]
    assert (share > 0.7).all()
    # lambda = sigmoid(5) everywhere: KL = (nu^2 + (1 - nu)^2 mu^2 / sigma^2 - 1) / 2 - ln nu a neuron
    values = torch.cat([b.inputs for b in known]).unflatten(3, (8, 4)).unflatten(2, (8, 4)).mean((3, 5)).double()
    mu, sigma = values.mean(0), values.std(0, unbiased=False).clamp_min(0.01)
    nu = 1 / (1 + math.exp(5))
    nats = (0.5 * (nu**2 + ((1 - nu) * mu / sigma) ** 2 - 1) - math.log(nu)).sum()
    torch.testing.assert_close(
        at_rest.diagnostics["capacity"].double(), (nats / math.log(2)).expand(2), rtol=1e-4, atol=0
    )


def test_a_higher_price_buys_less() -> None:
    backbone, batch = small_backbone(), batch_of(noise_pictures(3), [0, 1, 2])
    capacity = torch.stack(
        [
            IBA(beta=b, steps=15, draws=4, learning_rate=1.0)
            .fit(backbone, reference(), 0)(batch)
            .diagnostics["capacity"]
            for b in (1, 10, 100)
        ]
    )
    assert (capacity[0] > capacity[1]).all()
    assert (capacity[1] > capacity[2]).all()


# --- planted truth


def share_inside(heatmap: Tensor, row: int, column: int) -> float:
    return float(heatmap[4 * row : 4 * row + 4, 4 * column : 4 * column + 4].sum() / heatmap.sum())


PLACES = [(0, 0), (1, 6), (7, 7), (4, 3), (6, 0), (2, 2)]
PLANTED = IBA(smoothing=0.0, steps=40, beta=3.0)


def test_the_patch_holds_the_bits() -> None:
    pictures = patch_pictures([[(i % 3, *place)] for i, place in enumerate(PLACES)])
    batch = batch_of(pictures, [i % 3 for i in range(len(PLACES))])
    found = PLANTED.fit(patches_backbone(), [patch_reference(192)], 0)(batch)
    for heatmap, (row, column) in zip(found.heatmap, PLACES, strict=True):
        assert int(heatmap.argmax()) // 32 // 4 == row
        assert int(heatmap.argmax()) % 32 // 4 == column
        # 1 of 64 cells; of a cell's own bits bilinear upscaling leaves 9/16 to 49/64 inside, the rest right around
        assert share_inside(heatmap, row, column) > 0.5
        around = heatmap[max(4 * row - 4, 0) : 4 * row + 8, max(4 * column - 4, 0) : 4 * column + 8].sum()
        assert around / heatmap.sum() > 0.95
    assert (found.diagnostics["capacity"] > 10).all()


@pytest.mark.parametrize("smoothing", [0.0, 1.0])
def test_the_targets_class_matters(smoothing: float) -> None:
    """A red and a green patch in one picture: the bits are where the explained colour is."""
    places = [((0, 1, 1), (1, 6, 5)), ((0, 6, 6), (1, 2, 1)), ((0, 0, 5), (1, 5, 0))]
    pictures = patch_pictures(places)
    settings = dataclasses.replace(PLANTED, smoothing=smoothing)
    attribute = settings.fit(patches_backbone(), [patch_reference(192)], 0)
    for colour in (0, 1):
        found = attribute(batch_of(pictures, [colour] * 3)).heatmap
        for heatmap, patches in zip(found, places, strict=True):
            own, other = patches[colour], patches[1 - colour]
            assert share_inside(heatmap, *own[1:]) > 4 * share_inside(heatmap, *other[1:])
            assert share_inside(heatmap, *own[1:]) > 4 / 64


# --- a result belongs to the sample


SETTINGS = IBA(steps=6, draws=3, beta=1.0, learning_rate=1.0)


@pytest.fixture(scope="module")
def sixteen() -> tuple[Batch, Attribution]:
    batch = batch_of(noise_pictures(16), [i % 5 for i in range(16)])
    return batch, SETTINGS.fit(small_backbone(), reference(), 3)(batch)


def test_alone_or_in_a_batch_or_shuffled(sixteen: tuple[Batch, Attribution]) -> None:
    batch, whole = sixteen
    attribute = SETTINGS.fit(small_backbone(), reference(), 3)
    for i in (0, 7, 15):
        assert relative(attribute(batch.take([i])).heatmap[0], whole.heatmap[i]) < 1e-4
    order = torch.randperm(16, generator=torch.Generator().manual_seed(1))
    assert relative(attribute(batch.take(order)).heatmap, whole.heatmap[order]) < 1e-4


@pytest.mark.parametrize("most", [1, 2, 7, 64])
def test_max_passes_changes_nothing(most: int, sixteen: tuple[Batch, Attribution]) -> None:
    batch, whole = sixteen
    found = SETTINGS.fit(small_backbone(max_passes=most), reference(), 3)(batch.take([2, 3, 4, 5, 6]))
    assert relative(found.heatmap, whole.heatmap[2:7]) < 1e-4
    for name, values in found.diagnostics.items():
        assert relative(values, whole.diagnostics[name][2:7]) < 1e-4, name


@pytest.mark.parametrize("most", [2, 8])
def test_no_more_rows_at_once_than_allowed(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = small_backbone(max_passes=most)
    split, seen = backbone.split("stage2"), []
    monkeypatch.setattr(
        backbone, "split", lambda layer: split._replace(tail=lambda f: seen.append(len(f.values)) or split.tail(f))
    )
    SETTINGS.fit(backbone, reference(), 0)(batch_of(noise_pictures(5), [0] * 5))
    assert sum(seen) == 5 * SETTINGS.steps * SETTINGS.draws
    assert max(seen) <= most


def test_the_seed_matters_and_the_sample_id(sixteen: tuple[Batch, Attribution]) -> None:
    batch, whole = sixteen
    part = batch.take([0, 1])
    other = SETTINGS.fit(small_backbone(), reference(), 4)(part).heatmap
    assert relative(other, whole.heatmap[:2]) > 1e-2
    renamed = dataclasses.replace(part, sample_ids=("sample0", "someone else"))
    found = SETTINGS.fit(small_backbone(), reference(), 3)(renamed).heatmap
    assert relative(found[0], whole.heatmap[0]) < 1e-4
    assert relative(found[1], whole.heatmap[1]) > 1e-2


def test_one_head_pass_a_picture_and_the_tail_for_the_rest() -> None:
    backbone = small_backbone()
    attribute = SETTINGS.fit(backbone, reference(), 3)
    with backbone.counting() as passes:
        attribute(batch_of(noise_pictures(4), [0, 1, 2, 3]))
    assert dict(passes) == {"head forward": 4, "tail forward": 72, "tail backward": 72}


def test_constant_pictures_give_finite_maps() -> None:
    pictures = torch.stack([torch.full((3, 32, 32), value) for value in (0.0, 1.0, -1e3, 1e3)])
    found = SETTINGS.fit(small_backbone(), reference(), 0)(batch_of(pictures, [0, 1, 2, 3]))
    assert found.heatmap.isfinite().all()


def test_constant_reference_gives_finite_maps() -> None:
    constant = [batch_of(torch.zeros(120, 3, 32, 32), [0] * 120)]
    found = SETTINGS.fit(small_backbone(), constant, 0)(batch_of(noise_pictures(2), [0, 1]))
    assert found.heatmap.isfinite().all()


# --- reference, layers, settings


@pytest.mark.parametrize(("count", "pooled"), [(99, True), (100, False)])
def test_less_than_a_hundred_pictures_are_pooled_and_told(
    count: int, pooled: bool, caplog: pytest.LogCaptureFixture
) -> None:
    backbone, batch = patches_backbone(), batch_of(patch_pictures([[(0, 1, 1)]]), [0])
    with caplog.at_level(logging.WARNING):
        found = IBA(steps=2, draws=1).fit(backbone, [patch_reference(count)], 0)(batch)
    assert ("pooled" in caplog.text) == pooled
    assert (f"{count} pictures, fewer than 100" in caplog.text) == pooled
    other = IBA(steps=2, draws=1, min_reference=count + 1 - 2 * pooled).fit(backbone, [patch_reference(count)], 0)
    assert relative(other(batch).heatmap, found.heatmap) > 1e-2  # the other way it would have been another map


def test_layers_that_cannot_be() -> None:
    with pytest.raises(UserError, match=r"'fc' gives \[5\]"):
        IBA(layer="fc").fit(small_backbone(), reference(), 0)
    with pytest.raises(UserError, match="no layer 'stage7'"):
        IBA(layer="stage7").fit(small_backbone(), reference(), 0)
    with pytest.raises(UserError, match="reference split is empty"):
        IBA().fit(small_backbone(), [], 0)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("steps", 0),
        ("draws", 0),
        ("min_reference", 0),
        ("learning_rate", 0.0),
        ("learning_rate", -1.0),
        ("min_std", 0.0),
        ("beta", -0.1),
        ("smoothing", -1.0),
    ],
)
def test_settings_that_cannot_be(name: str, value: float) -> None:
    with pytest.raises(UserError, match=rf"{name} is {value}"):
        IBA(**{name: value})


def test_settings_at_their_bounds() -> None:
    IBA(steps=1, draws=1, min_reference=1, beta=0.0, smoothing=0.0)
