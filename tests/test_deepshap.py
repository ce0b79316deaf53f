"""DeepSHAP: every multiplier worked out neuron by neuron, exact Shapley values of two players, captum, completeness."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence

import numpy as np
import pytest
import timm
import torch
import torchvision
from networks import (
    batch_of,
    fixed_seed,
    noise_pictures,
    patch_pictures,
    patch_reference,
    patches_backbone,
    relative,
    shake_norms,
    small_backbone,
)
from test_gradients import linear_backbone
from torch import Tensor, nn

from ibxai.backbones import freeze
from ibxai.errors import UserError
from ibxai.methods import DeepSHAP
from ibxai.methods.deepshap import draw_baselines
from ibxai.targets import ClassTarget
from ibxai.types import Batch


def reference(count: int, shape: Sequence[int], seed: int = 5) -> list[Batch]:
    pictures = noise_pictures(count, shape, seed)
    ids = [f"reference{i}" for i in range(count)]
    return [batch_of(pictures, [0] * count, ids).take(rows) for rows in torch.arange(count).split(3)]


class Pooled(nn.Module):
    """Overlapping pooling directly behind a ReLU, and a ReLU6, on 6 x 6 pictures."""

    def __init__(self, pool: nn.MaxPool2d) -> None:
        super().__init__()
        self.conv1, self.relu, self.pool = nn.Conv2d(3, 4, 3, 1, 1), nn.ReLU(inplace=True), pool
        self.conv2, self.clip = nn.Conv2d(4, 5, 3, 1, 1), nn.ReLU6()
        self.fc = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.clip(self.conv2(self.pool(self.relu(self.conv1(x))))).mean((2, 3)))


def pooled(pool: nn.MaxPool2d) -> Pooled:
    with fixed_seed(8):
        network = Pooled(pool)
    with torch.no_grad():
        network.conv1.weight.mul_(5)
        network.conv2.weight.mul_(5)
    return network


def matrix(conv: nn.Conv2d, shape: Sequence[int]) -> np.ndarray:
    """[inputs, outputs]: what a convolution does to each pixel of [C, H, W], one unit picture after the other."""
    count = int(np.prod(shape))
    units = torch.eye(count, dtype=torch.float64).view(count, *shape)
    with torch.no_grad():
        bias = conv(torch.zeros(1, *shape, dtype=torch.float64))
        return (conv(units) - bias).flatten(1).numpy()


def slope(after: float, before: float, high: float, low: float, ceiling: float) -> float:
    return (after - before) / (high - low) if high != low else float(0 < high < ceiling)


def pool_slopes(a: np.ndarray, b: np.ndarray, pool: nn.MaxPool2d) -> np.ndarray:
    """[inputs, outputs] for pictures [C, H, W]: each window's difference goes to the place of its larger maximum."""
    channels, height, width = a.shape
    kernel, stride, padding = int(pool.kernel_size), int(pool.stride), int(pool.padding)
    rows, columns = ((side + 2 * padding - kernel) // stride + 1 for side in (height, width))
    index = np.arange(a.size).reshape(a.shape)
    out = np.zeros((a.size, channels, rows, columns))
    for c, i, j in np.ndindex(channels, rows, columns):
        places = [
            (c, y, x)
            for y in range(max(0, i * stride - padding), min(height, i * stride - padding + kernel))
            for x in range(max(0, j * stride - padding), min(width, j * stride - padding + kernel))
        ]
        top, below = max(a[p] for p in places), max(b[p] for p in places)
        winner = max(places, key=lambda p: a[p] if top >= below else b[p])
        out[index[winner], c, i, j] = slope(top, below, a[winner], b[winner], np.inf) if a[winner] != b[winner] else 1.0
    return out.reshape(a.size, -1)


def plain_shares(network: Pooled, picture: Tensor, baseline: Tensor, target: int) -> np.ndarray:
    """[3, 6, 6] in float64: the product of all matrices and multipliers, from the first layer to the last."""
    pair = torch.stack([picture, baseline]).double()
    with torch.no_grad():
        z1 = network.conv1(pair)
        a1 = z1.clamp_min(0)
        p1 = network.pool(a1)
        z2 = network.conv2(p1)
        a2 = z2.clamp(0, 6)
    first = np.array([slope(*v, np.inf) for v in zip(*a1.flatten(1).tolist(), *z1.flatten(1).tolist(), strict=True)])
    last = np.array([slope(*v, 6.0) for v in zip(*a2.flatten(1).tolist(), *z2.flatten(1).tolist(), strict=True)])
    cells = a2[0, 0].numel()
    top = np.repeat(network.fc.weight[target].detach().numpy(), cells) / cells
    at_pool = matrix(network.conv2, p1.shape[1:]) @ (last * top)
    at_relu = pool_slopes(*a1.numpy(), network.pool) @ at_pool
    multiplier = matrix(network.conv1, pair.shape[1:]) @ (first * at_relu)
    return multiplier.reshape(pair.shape[1:]) * (pair[0] - pair[1]).numpy()


@pytest.mark.parametrize("pool", [nn.MaxPool2d(3, 2, 1), nn.MaxPool2d(2, 2)], ids=["overlapping", "side by side"])
def test_neuron_by_neuron_in_float64(pool: nn.MaxPool2d) -> None:
    shape, classes = (3, 6, 6), [2, 0, 3]
    pictures, batches = noise_pictures(3, shape), reference(4, (3, 6, 6))
    backbone = freeze(pooled(pool), shape, max_passes=5)
    found = DeepSHAP(baselines=4).fit(backbone, batches, 0)(batch_of(pictures, classes))
    slow = pooled(pool).double()
    baselines = torch.cat([b.inputs for b in batches])
    with torch.no_grad():
        clipped = slow.conv2(slow.pool(slow.relu(slow.conv1(pictures.double()))))
        assert 0.05 < float((clipped > 6).double().mean()) < 0.95
        scores = slow(pictures.double())[range(3), classes] - slow(baselines.double())[:, classes].mean(0)
    wanted = [[plain_shares(slow, p, b, c) for b in baselines] for p, c in zip(pictures, classes, strict=True)]
    assert relative(found.heatmap, torch.from_numpy(np.array(wanted)).mean(1).sum(1)) < 1e-4
    torch.testing.assert_close(found.heatmap.double().sum((1, 2)), scores, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.diagnostics["score_difference"].double(), scores, rtol=1e-4, atol=1e-4)
    assert found.diagnostics["completeness_error"].max() < 1e-4


@pytest.mark.parametrize("channels", ["sum", "sum_abs"])
def test_a_linear_network(channels: str) -> None:
    """w (x - mean of the baselines)"""
    backbone, weights = linear_backbone()
    pictures, classes, batches = noise_pictures(3, (3, 6, 6)), [3, 0, 1], reference(6, (3, 6, 6))
    found = DeepSHAP(baselines=6, channels=channels).fit(backbone, batches, 0)(batch_of(pictures, classes))
    mean = torch.cat([b.inputs for b in batches]).double().mean(0)
    wanted = torch.from_numpy(weights[classes]) * (pictures.double() - mean)
    assert relative(found.heatmap, wanted.sum(1) if channels == "sum" else wanted.abs().sum(1)) < 1e-5


@pytest.mark.parametrize("ceiling", [torch.inf, 6.0])
def test_where_two_changes_cancel_the_gradient_counts(ceiling: float) -> None:
    """relu(x_1 - x_2 + b), both colours 1 above the baseline: 1 and -1 where the activation is open, else 0."""
    network = nn.Sequential(
        nn.Conv2d(2, 3, 1), nn.ReLU6() if ceiling == 6 else nn.ReLU(), nn.Flatten(), nn.Linear(3, 3)
    )
    with torch.no_grad():
        network[0].weight.copy_(torch.tensor([1.0, -1.0]).view(1, 2, 1, 1).expand(3, 2, 1, 1))
        network[0].bias.copy_(torch.tensor([-3.0, 2.0, 9.0]))
        network[3].weight.copy_(torch.eye(3))
    baseline, picture = torch.tensor([0.5, 0.25]).view(1, 2, 1, 1), torch.tensor([1.5, 1.25]).view(1, 2, 1, 1)
    method = DeepSHAP(baselines=1, channels="max_abs")
    attribute = method.fit(freeze(network, (2, 1, 1)), [batch_of(baseline, [0])], 0)
    found = attribute(batch_of(picture.expand(3, 2, 1, 1), [0, 1, 2])).heatmap.flatten()
    assert found.tolist() == [0.0, 1.0, 1.0 if ceiling == torch.inf else 0.0]


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_against_captum_where_no_relu_meets_a_pooling() -> None:
    captum = pytest.importorskip("captum.attr")
    backbone, pictures, classes, batches = small_backbone(), noise_pictures(3), [1, 4, 2], reference(5, (3, 32, 32))
    found = DeepSHAP(baselines=5).fit(backbone, batches, 0)(batch_of(pictures, classes))
    every = torch.cat([b.inputs for b in batches])
    wanted = captum.DeepLiftShap(backbone.module()).attribute(pictures, every, target=torch.tensor(classes))
    assert relative(found.heatmap, wanted.detach().sum(1)) < 1e-3


@pytest.mark.parametrize("name", ["resnet18", "densenet121", "squeezenet1_1", "tf_efficientnet_lite0"])
def test_it_is_complete_on_the_networks_of_the_field(name: str) -> None:
    with fixed_seed(1):
        timms = name.startswith("tf_")
        network = timm.create_model(name) if timms else torchvision.models.get_model(name, num_classes=7)
        backbone = freeze(shake_norms(network), (3, 64, 64))
    pictures, batches = noise_pictures(1, (3, 64, 64)), reference(2, (3, 64, 64))
    found = DeepSHAP(baselines=2, floor=0).fit(backbone, batches, 0)(batch_of(pictures, [3]))
    with torch.no_grad():
        slow = network.double().eval()
        every = torch.cat([b.inputs for b in batches]).double()
        wanted = float(slow(pictures.double())[0, 3] - slow(every)[:, 3].mean())
    assert abs(wanted) > 1e-3
    assert float(found.heatmap.double().sum()) == pytest.approx(wanted, rel=2e-3)
    assert found.diagnostics["completeness_error"][0] < 2e-3


def test_patches_share_what_they_are_worth() -> None:
    """Each patch gets its 6, spread over its pixels, less the mean share of what the references show elsewhere."""
    places = [((0, 1, 2), (1, 6, 5)), ((0, 7, 0), (1, 3, 3))]
    dark = batch_of(torch.zeros(2, 3, 32, 32), [0, 0])
    for colour in (0, 1):
        batch = batch_of(patch_pictures(places), [colour] * 2)
        found = DeepSHAP(baselines=2).fit(patches_backbone(), [dark], 0)(batch).heatmap
        wanted = torch.zeros(2, 32, 32)
        for one, patches in zip(wanted, places, strict=True):
            _, row, column = patches[colour]
            one[4 * row : 4 * row + 4, 4 * column : 4 * column + 4] = 6 / 16
        torch.testing.assert_close(found, wanted)
        shown = DeepSHAP(baselines=8).fit(patches_backbone(), [patch_reference(24)], 0)(batch).heatmap
        for heatmap, patches in zip(shown, places, strict=True):
            peak = int(heatmap.argmax())
            assert (peak // 32 // 4, peak % 32 // 4) == patches[colour][1:]


class Again(nn.Module):
    """One pooling, called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2, self.fc = nn.Conv2d(3, 4, 3, 1, 1), nn.Conv2d(4, 5, 3, 1, 1), nn.Linear(5, 3)
        self.pool = nn.MaxPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.pool(self.conv2(self.pool(self.conv1(x)).relu()).relu()).mean((2, 3)))


def test_a_pooling_that_is_called_twice() -> None:
    with fixed_seed(2):
        network = Again()
    pictures, batches = noise_pictures(2, (3, 8, 8)), reference(3, (3, 8, 8))
    found = DeepSHAP(baselines=3).fit(freeze(network, (3, 8, 8)), batches, 0)(batch_of(pictures, [2, 0]))
    with torch.no_grad():
        every = torch.cat([b.inputs for b in batches])
        wanted = network(pictures)[[0, 1], [2, 0]] - network(every)[:, [2, 0]].mean(0)
    torch.testing.assert_close(found.heatmap.sum((1, 2)), wanted, rtol=1e-3, atol=1e-5)


class Gated(nn.Module):
    """A product of two things that both depend on the picture: no multiplier is defined for it."""

    def __init__(self, activation: nn.Module) -> None:
        super().__init__()
        self.conv, self.gate, self.activation = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3), activation
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc((self.conv(x) * self.activation(self.gate(x))).mean((2, 3)))


@pytest.mark.parametrize(("activation", "named"), [(nn.SiLU(), "SiLU"), (nn.ReLU(), "what is no module")])
def test_a_network_that_has_no_rule_is_refused_before_any_picture(activation: nn.Module, named: str) -> None:
    with fixed_seed(2):
        backbone = freeze(Gated(activation), (3, 8, 8), name="gated")
    with pytest.raises(UserError, match=rf"^DeepSHAP of reference\d: .*\n.*gated also has {named}\."):
        DeepSHAP(baselines=3).fit(backbone, reference(4, (3, 8, 8)), 0)


def test_baselines_are_drawn_by_the_seed_and_not_by_the_files() -> None:
    batches = reference(20, (3, 4, 4))
    whole = torch.cat([b.inputs for b in batches])
    found, _ = draw_baselines(batches, 6, 0)
    shuffled = torch.randperm(20, generator=torch.Generator().manual_seed(1))
    ids = [f"reference{i}" for i in shuffled]
    one = batch_of(whole[shuffled], [0] * 20, ids)
    assert torch.equal(draw_baselines([one], 6, 0)[0], found)
    places = [int((whole == picture).flatten(1).all(1).nonzero()) for picture in found]
    assert len(set(places)) == 6
    drawn = [
        frozenset(
            int((whole == picture).flatten(1).all(1).nonzero()) for picture in draw_baselines(batches, 6, seed)[0]
        )
        for seed in range(40)
    ]
    assert len(set(drawn)) > 30
    often = np.bincount([place for places in drawn for place in places], minlength=20)
    assert often.min() >= 3  # each of the 20 is expected 12 times
    assert often.max() <= 24


def test_a_reference_split_that_is_small_or_empty(caplog: pytest.LogCaptureFixture) -> None:
    backbone, batch = small_backbone(), batch_of(noise_pictures(2), [1, 4])
    with caplog.at_level(logging.WARNING):
        few = DeepSHAP(baselines=10).fit(backbone, reference(4, (3, 32, 32)), 0)(batch)
    assert "method.baselines=10, and there are only 4 reference pictures" in caplog.text
    four = DeepSHAP(baselines=4).fit(backbone, reference(4, (3, 32, 32)), 0)(batch)
    assert torch.equal(few.heatmap, four.heatmap)
    with pytest.raises(UserError, match="reference split, which is empty"):
        DeepSHAP().fit(backbone, [], 0)


@pytest.mark.parametrize(("most", "references"), [(256, 4), (7, 5), (1, 12)])
def test_passes_and_the_most_rows_at_once(most: int, references: int) -> None:
    """A row a picture and baseline, with a gradient; a baseline once for all rows of a pass, without."""
    backbone = small_backbone(max_passes=most)
    attribute = DeepSHAP(baselines=4).fit(backbone, reference(4, (3, 32, 32)), 0)
    seen: list[int] = []

    class Watched(ClassTarget):
        def take(self, rows: Tensor) -> ClassTarget:
            seen.append(len(rows))
            return super().take(rows)

    batch = dataclasses.replace(batch_of(noise_pictures(3), [0] * 3), target=Watched(torch.arange(3)))
    with backbone.counting() as passes:
        attribute(batch)
    assert dict(passes) == {"forward": 12 + references, "backward": 12}
    assert max(seen) == min(most, 12)


def test_settings_that_cannot_be() -> None:
    with pytest.raises(UserError, match=r"method.baselines is 0"):
        DeepSHAP(baselines=0)
    with pytest.raises(UserError, match=r"method.tolerance is 0"):
        DeepSHAP(tolerance=0)
