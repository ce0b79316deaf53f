"""Gradient and gradient x input: closed forms, finite differences in float64, and patches at known places."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from networks import batch_of, fixed_seed, noise_pictures, patch_pictures, patches_backbone, relative, small_backbone
from torch import Tensor, nn

from ibxai.backbones import Backbone, freeze
from ibxai.errors import UserError
from ibxai.methods import Gradient, GradientXInput
from ibxai.targets import ClassTarget, RegressionTarget


class Linear(nn.Module):
    """Logits that are a linear function of the pixels, so that everything is known."""

    def __init__(self, classes: int = 4, size: int = 6) -> None:
        super().__init__()
        self.flatten = nn.Flatten()
        self.fc = nn.Linear(3 * size * size, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.flatten(x))


def linear_backbone() -> tuple[Backbone, np.ndarray]:
    """(the backbone, its weights [classes, 3, 6, 6] in float64)"""
    with fixed_seed(2):
        network = Linear()
    return freeze(network, (3, 6, 6)), network.fc.weight.detach().double().numpy().reshape(4, 3, 6, 6)


def plain_channels(values: np.ndarray, channels: str) -> np.ndarray:
    """[B, H, W] pixel by pixel."""
    count, _, height, width = values.shape
    out = np.zeros((count, height, width))
    for b in range(count):
        for i in range(height):
            for j in range(width):
                one = [float(v) for v in values[b, :, i, j]]
                sizes = [abs(v) for v in one]
                out[b, i, j] = {"sum": sum(one), "sum_abs": sum(sizes), "max_abs": max(sizes)}[channels]
    return out


@pytest.mark.parametrize("channels", ["sum", "sum_abs", "max_abs"])
def test_a_linear_network(channels: str) -> None:
    backbone, weights = linear_backbone()
    pictures, classes = noise_pictures(3, (3, 6, 6)), [3, 0, 1]
    batch = batch_of(pictures, classes)
    found = Gradient(channels=channels).fit(backbone, [], 0)(batch)
    assert relative(found.heatmap, torch.from_numpy(plain_channels(weights[classes], channels))) < 1e-6
    times = GradientXInput(channels=channels).fit(backbone, [], 0)(batch)
    wanted = plain_channels(weights[classes] * pictures.double().numpy(), channels)
    assert relative(times.heatmap, torch.from_numpy(wanted)) < 1e-6
    assert (wanted.min() < 0) == (channels == "sum")
    with torch.no_grad():
        torch.testing.assert_close(found.diagnostics["score"], backbone(pictures)[range(3), classes])


def test_the_probability_of_a_linear_network() -> None:
    """d p_c = p_c (w_c - sum of p_k w_k)"""
    backbone, weights = linear_backbone()
    pictures, classes = noise_pictures(3, (3, 6, 6)), [3, 0, 1]
    with torch.no_grad():
        p = backbone(pictures).double().softmax(1).numpy()
    wanted = np.stack([p[b, c] * (weights[c] - np.tensordot(p[b], weights, 1)) for b, c in enumerate(classes)])
    found = Gradient(channels="sum", score="probability").fit(backbone, [], 0)(batch_of(pictures, classes))
    assert relative(found.heatmap, torch.from_numpy(wanted.sum(1))) < 1e-5
    torch.testing.assert_close(found.diagnostics["score"].double(), torch.from_numpy(p[range(3), classes]))


class Rectified(nn.Module):
    """Without a bias, so that the logits are homogeneous: S(a x) = a S(x)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 3, 1, 1, bias=False)
        self.conv2 = nn.Conv2d(6, 5, 3, 2, 1, bias=False)
        self.relu = nn.ReLU()
        self.fc = nn.Linear(5, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.relu(self.conv2(self.relu(self.conv1(x)))).mean((2, 3)))


def rectified() -> Rectified:
    with fixed_seed(4):
        return Rectified()


def test_against_finite_differences() -> None:
    network, pictures, classes = rectified(), noise_pictures(2, (3, 6, 6)), [2, 1]
    found = Gradient(channels="sum").fit(freeze(network, (3, 6, 6)), [], 0)(batch_of(pictures, classes))
    step, slow = 1e-7, network.double()
    wanted = torch.zeros(2, 3, 6, 6, dtype=torch.float64)
    with torch.no_grad():
        for b, c in enumerate(classes):
            for place in np.ndindex(3, 6, 6):
                up, down = pictures[b].double(), pictures[b].double()
                up[place] += step
                down[place] -= step
                wanted[b][place] = (slow(up[None])[0, c] - slow(down[None])[0, c]) / (2 * step)
    assert relative(found.heatmap, wanted.sum(1)) < 1e-5


def test_gradient_x_input_is_the_whole_score_of_a_homogeneous_network() -> None:
    backbone = freeze(rectified(), (3, 6, 6))
    found = GradientXInput().fit(backbone, [], 0)(batch_of(noise_pictures(4, (3, 6, 6)), [0, 1, 2, 3]))
    torch.testing.assert_close(found.heatmap.sum((1, 2)), found.diagnostics["score"], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("method", [Gradient(), GradientXInput()])
def test_patches_at_known_places_and_the_class_matters(method: Gradient) -> None:
    """12 / 16 at every pixel of the patch of the class's colour, and nothing anywhere else."""
    places = [((0, 1, 2), (1, 6, 5)), ((0, 7, 0), (1, 3, 3))]
    pictures = patch_pictures(places)
    attribute = method.fit(patches_backbone(), [], 0)
    for colour in (0, 1):
        found = attribute(batch_of(pictures, [colour] * 2)).heatmap
        wanted = torch.zeros(2, 32, 32)
        for one, patches in zip(wanted, places, strict=True):
            _, row, column = patches[colour]
            one[4 * row : 4 * row + 4, 4 * column : 4 * column + 4] = 0.75
        torch.testing.assert_close(found, wanted)


def test_a_regression_is_explained_by_its_value() -> None:
    backbone, weights = linear_backbone()
    batch = batch_of(noise_pictures(2, (3, 6, 6)), [0, 0])
    batch = dataclasses.replace(batch, target=RegressionTarget("deviation", torch.zeros(2), output=2))
    for score in ("logit", "value"):
        found = Gradient(channels="sum", score=score).fit(backbone, [], 0)(batch).heatmap
        assert relative(found, torch.from_numpy(weights[[2, 2]].sum(1))) < 1e-6
    with pytest.raises(UserError, match="no probability"):
        Gradient(score="probability").fit(backbone, [], 0)(batch)


def test_passes() -> None:
    backbone = small_backbone(max_passes=3)
    with backbone.counting() as passes:
        Gradient().fit(backbone, [], 0)(batch_of(noise_pictures(5), [0, 1, 2, 3, 4]))
    assert dict(passes) == {"forward": 5, "backward": 5}


def test_the_most_rows_at_once() -> None:
    backbone = small_backbone(max_passes=2)
    seen: list[int] = []

    class Watched(ClassTarget):
        def take(self, rows: Tensor) -> ClassTarget:
            seen.append(len(rows))
            return super().take(rows)

    batch = dataclasses.replace(batch_of(noise_pictures(5), [0] * 5), target=Watched(torch.arange(5)))
    Gradient().fit(backbone, [], 0)(batch)
    assert seen == [2, 2, 1]


def test_settings_that_cannot_be() -> None:
    with pytest.raises(UserError, match=r"method.channels is 'mean': sum, sum_abs or max_abs is expected"):
        Gradient(channels="mean")  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"method.score is 'logits'"):
        GradientXInput(score="logits")  # type: ignore[arg-type]
