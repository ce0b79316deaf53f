"""Extremal perturbation: the parts against plain re-derivations, areas that are met, and patches at known places."""

from __future__ import annotations

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
    patches_backbone,
    relative,
    small_backbone,
    small_net,
)
from test_gradients import linear_backbone

from ibxai.errors import UserError
from ibxai.methods import ExtremalPerturbation
from ibxai.methods.extremal_perturbation import MaxConvolution, area_distance
from ibxai.methods.perturbation import gaussian_blur

PLACES = [((0, 1, 2), (1, 6, 5)), ((0, 7, 0), (1, 3, 3))]


def plain_smooth(
    cells: np.ndarray, size: Sequence[int], cell: int, radius: float, spread: float, temperature: float
) -> np.ndarray:
    """m of m' as the module states it, a cell at a time."""
    reach = max(1, math.ceil((radius + 2 * spread) / cell))
    found = np.zeros_like(cells)
    for i, j in np.ndindex(*cells.shape):
        values = []
        for di in range(-reach, reach + 1):
            for dj in range(-reach, reach + 1):
                row = min(max(i + di, 0), cells.shape[0] - 1)
                column = min(max(j + dj, 0), cells.shape[1] - 1)
                beyond = max(0.0, math.hypot(di, dj) * cell - radius)
                values.append(cells[row, column] * math.exp(-(beyond**2) / (2 * spread**2)))
        weights = [math.exp(value / temperature) for value in values]
        found[i, j] = sum(v * w for v, w in zip(values, weights, strict=True)) / sum(weights)
    return bilinear(found, *size)


def plain_distance(mask: np.ndarray, area: float) -> float:
    """R_a: the sorted pixels against zeros and then ones, their mean for pixels that are alike to a 64th."""
    ordered = np.sort(mask.flatten())
    wanted = np.zeros_like(ordered)
    wanted[len(ordered) - round(area * len(ordered)) :] = 1
    levels = np.round(ordered * 64)
    for level in set(levels):
        wanted[levels == level] = wanted[levels == level].mean()
    return float(np.mean((ordered - wanted) ** 2))


@pytest.mark.parametrize(("size", "cell"), [((12, 12), 3), ((10, 17), 4)])
def test_the_smooth_maximum(size: tuple[int, int], cell: int) -> None:
    smooth = MaxConvolution(size, cell, 3.0, 2.0, 0.05)
    cells = torch.rand(2, 1, *smooth.cells, generator=torch.Generator().manual_seed(0))
    found = smooth(cells)
    for one, wanted in zip(found[:, 0], cells[:, 0].double().numpy(), strict=True):
        assert relative(one, torch.from_numpy(plain_smooth(wanted, size, cell, 3.0, 2.0, 0.05))) < 1e-4


def test_a_single_cell_becomes_a_disc_and_a_cold_maximum_is_exact() -> None:
    smooth = MaxConvolution((22, 22), 2, 5.0, 1.0, 1e-3)
    cells = torch.zeros(1, 1, 11, 11)
    cells[0, 0, 5, 5] = 1
    found = smooth(cells)[0, 0, ::2, ::2]
    for i, j in np.ndindex(11, 11):
        distance = math.hypot(i - 5, j - 5) * 2
        if distance < 3:
            assert found[i, j] > 0.98  # the cells whose k is just below 1 still count a little
        if distance > 10:
            assert found[i, j] < 2e-3
    assert (smooth(torch.ones(1, 1, 11, 11)) - 1).abs().max() < 1e-4
    assert smooth(torch.zeros(1, 1, 11, 11)).abs().max() == 0


def test_the_distance_to_an_area() -> None:
    masks = torch.rand(3, 1, 5, 8, generator=torch.Generator().manual_seed(1))
    areas = (0.1, 0.5, 0.9)
    found = area_distance(masks, torch.tensor(areas))
    for one, area, mask in zip(found, areas, masks, strict=True):
        assert float(one) == pytest.approx(plain_distance(mask.double().numpy(), area), rel=1e-5)
    alike = torch.full((1, 1, 4, 4), 0.7)
    assert area_distance(alike, torch.tensor([0.25])).item() == pytest.approx((0.7 - 0.25) ** 2)
    half = torch.tensor([0.0, 1.0, 1.0, 0.0]).view(1, 1, 2, 2)
    assert area_distance(half, torch.tensor([0.5])).item() == 0
    assert area_distance(half, torch.tensor([1.0])).item() == 0.5


@pytest.mark.parametrize("variant", ["preserve", "delete"])
def test_two_steps_by_central_differences(variant: str) -> None:
    """Score and area, lambda at two of its values; the gradient cell by cell, in float64."""
    method = ExtremalPerturbation(
        areas=(0.3,), variant=variant, cell=3, radius=2.0, spread=2.0, steps=2, learning_rate=0.2, momentum=0.5,
        area_weight=2.0, growth=4.0, sigma=2.0, kernel=None,
    )  # fmt: skip
    batch = batch_of(noise_pictures(1, (3, 9, 9)), [2])
    found = method.fit(small_backbone(), [], 0)(batch)
    network = small_net().eval().double()
    picture = batch.inputs[0].double().numpy()
    cover = gaussian_blur(batch.inputs, 2.0)[0].double().numpy()

    def loss(cells: np.ndarray, weight: float) -> float:
        mask = plain_smooth(cells, (9, 9), 3, 2.0, 2.0, 0.05)
        shown = mask if variant == "preserve" else 1 - mask
        with torch.no_grad():
            logit = float(network(torch.from_numpy(picture * shown + cover * (1 - shown))[None])[0, 2])
        return weight * plain_distance(mask, 0.3) + (-logit if variant == "preserve" else logit)

    cells, velocity = np.ones((3, 3)), np.zeros((3, 3))
    for weight, rate in ((2.0, 0.2), (2.0 * 4.0**0.5, 0.1)):
        slope, reach = np.zeros((3, 3)), 1e-6
        for cell in np.ndindex(3, 3):
            moved = np.zeros((3, 3))
            moved[cell] = reach
            slope[cell] = (loss(cells + moved, weight) - loss(cells - moved, weight)) / (2 * reach)
        velocity = 0.5 * velocity + slope / np.abs(slope).max()
        cells = np.clip(cells - rate * velocity, 0, 1)
    wanted = plain_smooth(cells, (9, 9), 3, 2.0, 2.0, 0.05)
    assert wanted.std() > 0.01
    assert np.abs(found.heatmap[0].numpy() - wanted).max() < 1e-3


def test_areas_are_met() -> None:
    areas = (0.1, 0.2, 0.5)
    method = ExtremalPerturbation(areas=areas, steps=60, cell=4, radius=3.0, spread=2.0)
    found = method.fit(small_backbone(), [], 0)(batch_of(noise_pictures(4), [0, 1, 2, 3]))
    assert found.diagnostics["area"].shape == (4, 3)
    assert (found.diagnostics["area"] - torch.tensor(areas)).abs().max() < 0.04  # a cell is a disc of 0.03
    # the mean of three masks
    assert (found.heatmap.mean((1, 2)) - found.diagnostics["area"].mean(1)).abs().max() < 1e-5


@pytest.mark.parametrize("variant", ["preserve", "delete"])
def test_patches_at_known_places(variant: str) -> None:
    """A mask of a tenth lies on the class's patch. Hiding half of its brightness is all that deleting takes."""
    method = ExtremalPerturbation(areas=(0.1,), variant=variant, steps=60, cell=4, radius=3.0, spread=2.0)
    attribute = method.fit(patches_backbone(), [], 0)
    for colour in (0, 1):
        found = attribute(batch_of(patch_pictures(PLACES), [colour] * 2)).heatmap
        for one, patches in zip(found, PLACES, strict=True):
            _, row, column = patches[colour]
            inside = one[4 * row : 4 * row + 4, 4 * column : 4 * column + 4]
            assert inside.mean() > (0.9 if variant == "preserve" else 0.55)
            assert inside.mean() > 4 * one.mean()


def test_a_linear_network_shows_its_most_worthy_pixels() -> None:
    """Without smoothing the best mask of an area is known: the pixels of the highest contributions, as many as fit."""
    backbone, weights = linear_backbone()
    batch = batch_of(noise_pictures(3, (3, 6, 6)), [3, 0, 1])
    method = ExtremalPerturbation(
        areas=(0.25,), steps=150, cell=1, radius=0.0, spread=0.3, baseline="constant", area_weight=0.1, growth=1000.0
    )
    found = method.fit(backbone, [], 0)(batch)
    worth = (torch.from_numpy(weights[[3, 0, 1]]).double() * batch.inputs.double()).sum(1).flatten(1)
    best = worth.sort(1, descending=True).values[:, :9].sum(1)
    reached = (found.heatmap.double().flatten(1) * worth).sum(1)
    assert (reached > 0.85 * best).all()
    assert (found.diagnostics["area"] - 0.25).abs().max() < 0.05


def test_settings_that_cannot_be() -> None:
    with pytest.raises(UserError, match=r"method.areas is \[0.1, 1.0\]: shares above 0 and below 1"):
        ExtremalPerturbation(areas=(0.1, 1.0))
    with pytest.raises(UserError, match=r"method.variant is 'dual': preserve or delete is expected"):
        ExtremalPerturbation(variant="dual")  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"method.spread is 0: it must be above 0"):
        ExtremalPerturbation(spread=0)
