"""Occlusion: windows covered one after the other in a plain loop, closed forms, and patches at known places."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from networks import batch_of, noise_pictures, patch_pictures, patches_backbone, relative, small_backbone, small_net
from test_gradients import linear_backbone
from torch import Tensor

from ibxai.errors import UserError
from ibxai.methods import Occlusion
from ibxai.methods.perturbation import gaussian_blur
from ibxai.targets import ClassTarget


def starts(side: int, window: int, stride: int) -> list[int]:
    """Where windows begin; the last may reach over the border."""
    return [i * stride for i in range(math.ceil((side - window) / stride) + 1)]


def plain_occlusion(picture: Tensor, cover: Tensor, target: int, window: int, stride: int, score: str) -> np.ndarray:
    network = small_net().eval().double()
    picture, cover = picture.double(), cover.double()

    def explained(one: Tensor) -> float:
        with torch.no_grad():
            out = network(one[None])[0]
        return float((out.softmax(0) if score == "probability" else out)[target])

    height, width = picture.shape[1:]
    total, times = np.zeros((height, width)), np.zeros((height, width))
    for row in starts(height, window, stride):
        for column in starts(width, window, stride):
            covered = picture.clone()
            covered[:, row : row + window, column : column + window] = cover[
                :, row : row + window, column : column + window
            ]
            total[row : row + window, column : column + window] += explained(picture) - explained(covered)
            times[row : row + window, column : column + window] += 1
    assert times.min() >= 1
    return total / times


@pytest.mark.parametrize(
    ("window", "stride", "baseline", "score", "shape"),
    [
        (9, 5, "constant", "logit", (20, 20)),  # the last windows are cut
        (0.25, 0.25, "constant", "probability", (20, 20)),  # side by side
        (8, 4, "blur", "logit", (12, 20)),
    ],
)
def test_window_by_window(window: float, stride: float, baseline: str, score: str, shape: tuple[int, int]) -> None:
    pictures, classes = noise_pictures(3, (3, *shape)), [1, 4, 2]
    method = Occlusion(window=window, stride=stride, baseline=baseline, sigma=2.0, value=0.3, score=score)
    found = method.fit(small_backbone(max_passes=7), [], 0)(batch_of(pictures, classes))
    covers = gaussian_blur(pictures, 2.0) if baseline == "blur" else torch.full_like(pictures, 0.3)
    pixels = [round(size * min(shape)) if size < 1 else int(size) for size in (window, stride)]
    for i, target in enumerate(classes):
        wanted = plain_occlusion(pictures[i], covers[i], target, *pixels, score)
        assert relative(found.heatmap[i], torch.from_numpy(wanted)) < 1e-3
    assert found.unit == "score"


def test_pixel_by_pixel_of_a_linear_network() -> None:
    """w (x - x'), summed over the colours, which are covered together; the sign is kept."""
    backbone, weights = linear_backbone()
    pictures, classes = noise_pictures(3, (3, 6, 6)), [3, 0, 1]
    found = Occlusion(window=1, stride=1, value=0.25).fit(backbone, [], 0)(batch_of(pictures, classes)).heatmap
    wanted = (torch.from_numpy(weights[classes]) * (pictures - 0.25).double()).sum(1)
    assert wanted.min() < 0 < wanted.max()
    assert relative(found, wanted) < 1e-4


def test_patches_at_known_places_and_the_class_matters() -> None:
    """Windows of the size of a patch, on it: its whole worth of 6, and nothing elsewhere."""
    places = [((0, 1, 2), (1, 6, 5)), ((0, 7, 0), (1, 3, 3))]
    attribute = Occlusion(window=4, stride=4).fit(patches_backbone(), [], 0)
    for colour in (0, 1):
        found = attribute(batch_of(patch_pictures(places), [colour] * 2)).heatmap
        wanted = torch.zeros(2, 32, 32)
        for one, patches in zip(wanted, places, strict=True):
            _, row, column = patches[colour]
            one[4 * row : 4 * row + 4, 4 * column : 4 * column + 4] = 6
        torch.testing.assert_close(found, wanted)


def test_passes_and_the_most_rows_at_once() -> None:
    backbone, seen = small_backbone(max_passes=5), []

    class Watched(ClassTarget):
        def take(self, rows: Tensor) -> ClassTarget:
            seen.append(len(rows))
            return super().take(rows)

    batch = dataclasses.replace(batch_of(noise_pictures(7), [0] * 7), target=Watched(torch.arange(7) % 5))
    with backbone.counting() as passes:
        Occlusion(window=16, stride=8).fit(backbone, [], 0)(batch)
    assert dict(passes) == {"forward": 7 * (1 + 9)}
    assert max(seen) == 5


def test_settings_that_cannot_be() -> None:
    with pytest.raises(UserError, match=r"method.window is 0"):
        Occlusion(window=0)
    with pytest.raises(UserError, match=r"method.stride=9 is above method.window=8: pixels would be left out"):
        Occlusion(window=8, stride=9)
    batch = batch_of(noise_pictures(1), [0])
    with pytest.raises(UserError, match=r"method.window is 40 and method.stride 2 pixels of pictures \[32, 32\]"):
        Occlusion(window=40).fit(small_backbone(), [], 0)(batch)
    with pytest.raises(UserError, match=r"method.window is 8 and method.stride 9 pixels"):
        Occlusion(window=0.25, stride=9).fit(small_backbone(), [], 0)(batch)
