"""RISE: mask after mask in a plain loop, what its masks are, patches at known places, and the early stop."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
from networks import (
    batch_of,
    bilinear,
    noise_pictures,
    patch_pictures,
    patches_backbone,
    relative,
    small_backbone,
    small_net,
)
from test_gradients import linear_backbone
from torch import Tensor

from ibxai.draws import sample_keys, uniform
from ibxai.errors import UserError
from ibxai.methods import RISE
from ibxai.methods.perturbation import gaussian_blur
from ibxai.methods.rise import halves_error, random_masks
from ibxai.targets import ClassTarget


def plain_mask(seed: int, number: int, grid: int, keep: float, height: int, width: int) -> np.ndarray:
    """Cells above the chance are dark; enlarged pixel by pixel, and cut out behind a shift of up to one cell."""
    numbers = uniform(sample_keys(seed, [""], "rise masks"), number, (grid * grid + 2,))[0].double().numpy()
    cells = (numbers[:-2].reshape(grid, grid) < keep).astype(float)
    tall, wide = math.ceil(height / grid), math.ceil(width / grid)
    large = bilinear(cells, (grid + 1) * tall, (grid + 1) * wide)
    top, left = int(numbers[-2] * tall), int(numbers[-1] * wide)
    return large[top : top + height, left : left + width]


@pytest.mark.parametrize(("baseline", "keep", "score"), [("constant", 0.5, "probability"), ("blur", 0.3, "logit")])
def test_mask_by_mask(baseline: str, keep: float, score: str) -> None:
    pictures, classes = noise_pictures(2, (3, 10, 14)), [1, 4]
    method = RISE(masks=12, grid=3, keep=keep, baseline=baseline, sigma=2.0, kernel=None, value=0.3, score=score)
    found = method.fit(small_backbone(max_passes=5), [], 3)(batch_of(pictures, classes))
    network = small_net().eval().double()
    covers = gaussian_blur(pictures, 2.0) if baseline == "blur" else torch.full_like(pictures, 0.3)
    for i, target in enumerate(classes):
        total = np.zeros((10, 14))
        for number in range(12):
            mask = plain_mask(3, number, 3, keep, 10, 14)
            shown = pictures[i].double().numpy() * mask + covers[i].double().numpy() * (1 - mask)
            with torch.no_grad():
                out = network(torch.from_numpy(shown)[None])[0]
            total += float((out.softmax(0) if score == "probability" else out)[target]) * mask
        assert relative(found.heatmap[i], torch.from_numpy(total / (12 * keep))) < 1e-4


def test_the_masks() -> None:
    """Their mean is `keep` everywhere, cells are independent, and two masks are not alike."""
    masks = random_masks(0, torch.arange(4000), 5, 0.3, (20, 30))
    assert masks.shape == (4000, 20, 30)
    assert masks.min() >= 0
    assert masks.max() < 1 + 1e-6
    assert (masks.mean(0) - 0.3).abs().max() < 5 * 0.5 / 4000**0.5
    far = masks[:, 2, 2] - 0.3, masks[:, 17, 25] - 0.3
    assert (far[0] * far[1]).mean().abs() < 0.01
    assert (masks[:, 2, 2] - 0.3).pow(2).mean() > 0.05
    assert torch.equal(random_masks(0, torch.tensor([17, 5]), 5, 0.3, (20, 30)), masks[[17, 5]])
    assert relative(random_masks(1, torch.tensor([17]), 5, 0.3, (20, 30)), masks[[17]]) > 0.1


def test_a_network_that_does_not_react_has_an_even_map() -> None:
    """The score times the masks' mean: even up to chance, and the error says that this is chance."""
    pictures = patch_pictures([()])
    found = RISE(masks=2000, check_every=1000).fit(patches_backbone(), [], 0)(batch_of(pictures, [0]))
    assert (found.heatmap - 1 / 3).abs().max() < 0.03
    assert found.diagnostics["error"].item() > 0.5


def test_patches_at_known_places() -> None:
    places = [((0, 1, 2), (1, 6, 5)), ((0, 7, 0), (1, 3, 3))]
    attribute = RISE(masks=1500, grid=8).fit(patches_backbone(), [], 0)
    for colour in (0, 1):
        found = attribute(batch_of(patch_pictures(places), [colour] * 2)).heatmap
        for one, patches in zip(found, places, strict=True):
            _, row, column = patches[colour]
            highest = int(one.argmax())
            assert (highest // 32 // 4, highest % 32 // 4) == (row, column)


def test_the_map_of_a_linear_network_is_its_contributions_seen_through_the_masks() -> None:
    """S = sum_j c_j E[M_i M_j] / keep in the limit; with the masks' own moments it holds for any number of them."""
    backbone, weights = linear_backbone()
    picture = noise_pictures(1, (3, 6, 6))
    found = RISE(masks=64, grid=2, score="logit").fit(backbone, [], 0)(batch_of(picture, [3])).heatmap[0]
    with torch.no_grad():
        bias = float(backbone(torch.zeros_like(picture))[0, 3])
    masks = random_masks(0, torch.arange(64), 2, 0.5, (6, 6)).double().flatten(1)
    shares = (torch.from_numpy(weights[3]).double() * picture[0].double()).sum(0).flatten()
    wanted = masks.T @ (masks @ shares + bias) / (64 * 0.5)
    assert relative(found.flatten(), wanted) < 1e-5


def test_a_picture_stops_when_its_map_has_converged() -> None:
    """The second picture shows nothing and goes on to the end; neither feels the other, nor the size of passes."""
    batch = batch_of(patch_pictures([((0, 1, 2),), ()]), [0, 0])
    method = RISE(masks=2000, grid=8, check_every=200, tolerance=0.8)
    backbone = patches_backbone()
    with backbone.counting() as passes:
        found = method.fit(backbone, [], 0)(batch)
    first, second = found.diagnostics["masks"].tolist()
    assert 200 <= first < 1600
    assert first % 200 == 0
    assert second == 2000
    assert passes == {"forward": first + second}
    assert found.diagnostics["error"][0] <= 0.8
    fixed = dataclasses.replace(method, tolerance=None, masks=int(first)).fit(backbone, [], 0)(batch.take([0]))
    assert relative(found.heatmap[:1], fixed.heatmap) < 1e-6
    assert relative(method.fit(patches_backbone(max_passes=33), [], 0)(batch).heatmap, found.heatmap) < 1e-6


def test_the_error_is_that_of_the_map() -> None:
    """Over many seeds the distance to the map of very many masks is what the halves say."""
    batch = batch_of(patch_pictures([((0, 3, 4),)]), [0])
    truth = RISE(masks=20000).fit(patches_backbone(), [], 99)(batch).heatmap
    off, said = [], []
    for seed in range(12):
        found = RISE(masks=400).fit(patches_backbone(), [], seed)(batch)
        off.append(float((found.heatmap - truth).pow(2).mean().sqrt() / found.heatmap.std(correction=0)))
        said.append(float(found.diagnostics["error"]))
    assert np.mean(said) == pytest.approx(np.mean(off), rel=0.25)


def test_equal_halves_have_no_error_and_even_maps_an_infinite_one() -> None:
    ramp = torch.linspace(0, 1, 12, dtype=torch.float64).view(3, 4)
    assert halves_error(torch.stack([ramp, ramp])[None]).item() == 0
    assert halves_error(torch.zeros(1, 2, 3, 4, dtype=torch.float64)).item() == torch.inf
    # A = r + d, B = r - d: the mean is r, and each half is off by d
    shifted = torch.stack([ramp + 0.1, ramp - 0.1])[None]
    assert halves_error(shifted).item() == pytest.approx(0.1 / float(ramp.std(correction=0)))


def test_memory_does_not_grow_with_the_number_of_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    """No more masks are made, and no more rows run, at once than the backbone allows."""
    rows: list[int] = []
    made: list[int] = []

    class Watched(ClassTarget):
        def take(self, rows_: Tensor) -> ClassTarget:
            rows.append(len(rows_))
            return super().take(rows_)

    def watched(seed: int, numbers: Tensor, *rest: Any) -> Tensor:
        made.append(len(numbers))
        return random_masks(seed, numbers, *rest)

    monkeypatch.setattr("ibxai.methods.rise.random_masks", watched)
    batch = dataclasses.replace(batch_of(noise_pictures(3), [0] * 3), target=Watched(torch.arange(3)))
    RISE(masks=100, check_every=100).fit(small_backbone(max_passes=10), [], 0)(batch)
    assert max(rows) == 9  # three masks for each of three pictures
    assert max(made) == 3
    assert sum(made) == 100


def test_settings_that_cannot_be() -> None:
    with pytest.raises(UserError, match=r"method.keep is 1.0: a chance above 0 and below 1"):
        RISE(keep=1.0)
    with pytest.raises(UserError, match=r"method.masks is 7 and method.check_every 500: both must be even"):
        RISE(masks=7)
    with pytest.raises(UserError, match=r"method.tolerance is 0.0: it must be above 0"):
        RISE(tolerance=0.0)
