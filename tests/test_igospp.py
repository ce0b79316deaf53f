"""iGOS++, I-GOS and Mask: one iteration against a plain re-derivation, limits, planted patches, stopping and passes."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
from networks import batch_of, bilinear, noise_pictures, patch_pictures, patches_backbone, relative, small_backbone
from test_mask_objective import BTV, Plain, small_batch
from torch import Tensor

from ibxai.errors import UserError
from ibxai.methods import IGOS, IGOSpp, Mask
from ibxai.methods.igospp import OBJECTIVES
from ibxai.methods.mask_search import Descent, Moments
from ibxai.targets import ClassTarget, RegressionTarget
from ibxai.types import Batch

# small pictures keep evidence behind a weaker blur; masks of 3 x 3 cells can be moved one cell at a time
SMALL: dict[str, Any] = {
    "resolution": 3, "ig_steps": 4, "intervals": 2, "sigma": 2.0, "kernel": None, "noise": 0.3,
    "lambda1": 0.02, "lambda2": 0.5, "btv_sigma": 0.5,
}  # fmt: skip
PLACES = [((0, 1, 2), (1, 6, 5)), ((0, 7, 0), (1, 3, 3))]


def plain_armijo(
    plain: Plain, method: IGOSpp | IGOS, objective: str, planes: int, at_the_mask: bool
) -> tuple[np.ndarray, int]:
    """(masks after one iteration from open masks, passes of its line search), one picture, one pass at a time."""
    masks = np.ones((planes, 3, 3))
    terms, every = OBJECTIVES[objective], [1, 2, 3, 4]
    weights = dataclasses.replace(BTV, lambda1=method.lambda1, lambda2=0.5, smoothness=method.smoothness)
    slope = plain.slope(masks, terms, weights, every)
    tested = [4] if at_the_mask else every
    before = plain.value(masks, terms, weights, tested)
    alpha, passes = method.armijo_start, len(terms) if at_the_mask else 0
    while alpha >= method.armijo_smallest:
        tried = np.clip(masks - alpha * slope, 0, 1)
        passes += len(terms) * len(tested)
        if plain.value(tried, terms, weights, tested) - before <= -alpha * method.armijo_control * np.sum(slope**2):
            return tried, passes
        alpha *= method.armijo_shrink
    return masks, passes


@pytest.mark.parametrize("which", ["igospp", "igos"])
def test_one_iteration_with_the_papers_line_search(which: str) -> None:
    """I-GOS compares values at the mask itself, where only a heavier lambda1 resists any of its steps."""
    kind, objective, planes, lambda1 = (
        (IGOSpp, "bilateral", 2, 0.02) if which == "igospp" else (IGOS, "deletion", 1, 0.2)
    )
    method = kind(step="armijo", iterations=1, armijo_start=300.0, armijo_control=0.1, **SMALL | {"lambda1": lambda1})
    batch, baseline = small_batch(5)
    found = method.fit(small_backbone(max_passes=9), [], 0)(batch)
    searched = []
    for row in range(5):
        plain = Plain(batch, row, baseline, 4, 0.3, step=0)
        masks, passes = plain_armijo(plain, method, objective, planes, at_the_mask=which == "igos")
        searched.append(passes)
        wanted = 1 - bilinear(np.prod(masks, axis=0), 12, 12)
        assert np.abs(found.heatmap[row].numpy() - wanted).max() < 2e-3
        assert int(found.diagnostics["passes"][row]) == passes + 4 * len(OBJECTIVES[objective])
    assert len(set(searched)) > 1  # each picture found a step size of its own
    assert found.heatmap.max() > 0.05


def test_a_fixed_step_is_the_gradient_times_alpha() -> None:
    batch, baseline = small_batch()
    method = IGOSpp(step="fixed", fixed_step=1.5, iterations=1, **SMALL)
    found = method.fit(small_backbone(), [], 0)(batch).heatmap
    weights = dataclasses.replace(BTV, lambda1=0.02, lambda2=0.5)
    for row in range(2):
        slope = Plain(batch, row, baseline, 4, 0.3, step=0).slope(
            np.ones((2, 3, 3)), OBJECTIVES["bilateral"], weights, [1, 2, 3, 4]
        )
        masks = np.clip(1 - 1.5 * slope, 0, 1)
        assert np.abs(found[row].numpy() - (1 - bilinear(masks.prod(axis=0), 12, 12))).max() < 1e-3


def test_adam_is_torchs() -> None:
    generator = torch.Generator().manual_seed(3)
    slopes = torch.randn(6, 2, 1, 3, 3, generator=generator)
    start = torch.full((2, 1, 3, 3), 0.5)
    wanted = start.clone().requires_grad_()
    optimiser = torch.optim.Adam([wanted], lr=0.02)
    found, own = start.clone(), Moments(start, together=False)
    for slope in slopes:
        wanted.grad = slope.clone()
        optimiser.step()
        found = own.move(found, slope, torch.arange(2), 0.02)
    assert relative(found, wanted) < 1e-5


def test_scaled_steps_by_a_plain_loop() -> None:
    """One second moment a picture, over both masks; the second picture sits out the third step."""
    slopes = np.random.default_rng(4).normal(size=(5, 2, 2, 3, 3)) * np.array([1.0, 1e-3])[:, None, None, None]
    wanted, mean, square = np.full((2, 2, 3, 3), 0.5), np.zeros((2, 2, 3, 3)), np.zeros(2)
    found = torch.full((2, 2, 3, 3), 0.5)
    own = Moments(found, together=True)
    for step, slope in enumerate(slopes, start=1):
        rows = [0] if step == 3 else [0, 1]
        for row in rows:
            mean[row] = 0.9 * mean[row] + 0.1 * slope[row]
            square[row] = 0.999 * square[row] + 0.001 * np.mean(slope[row] ** 2)
            moved = (mean[row] / (1 - 0.9**step)) / math.sqrt(square[row] / (1 - 0.999**step))
            wanted[row] = np.clip(wanted[row] - 0.05 * moved, 0, 1)
        found[rows] = own.move(found[rows], torch.from_numpy(slope[rows]).float(), torch.tensor(rows), 0.05)
    assert relative(found, torch.from_numpy(wanted)) < 1e-4


def test_a_scaled_step_keeps_the_proportions_of_cells_and_forgets_the_slopes_size() -> None:
    slope = torch.tensor([[3.0, -1.0], [0.0, 1e-3]]).expand(2, 1, 2, 2) * torch.tensor([1.0, 1e-4]).view(2, 1, 1, 1)
    start = torch.full((2, 1, 2, 2), 0.5)
    moved = start - Moments(start, together=True).move(start, slope, torch.arange(2), 0.1)
    wanted = 0.1 * slope[0] / slope[0].square().mean().sqrt()
    for one in moved:
        assert relative(one, wanted) < 1e-3
    apart = start - Moments(start, together=False).move(start, slope, torch.arange(2), 0.1)
    assert apart[0].flatten().tolist() == pytest.approx([0.1, -0.1, 0, 0.1], abs=1e-4)


def test_intervals_come_in_turn() -> None:
    descent = Descent(8, 20, 5, 0.0, 1.0)
    assert descent.intervals_at(0).tolist() == [4, 8, 12, 16, 20]
    seen = torch.cat([descent.intervals_at(step) for step in range(3, 7)])
    assert sorted(seen.tolist()) == list(range(1, 21))
    assert Descent(8, 20, 20, 0.0, 1.0).intervals_at(7).tolist() == list(range(1, 21))


@pytest.mark.parametrize("step", ["scaled", "adam", "armijo", "fixed"])
def test_a_large_lambda1_pulls_the_map_back(step: str) -> None:
    """A first step leaves 1 freely; the next ones end at 1 again, and a line search never leaves."""
    method = IGOSpp(**SMALL | {"lambda1": 1e4, "iterations": 10}, step=step, fixed_step=1.0)
    found = method.fit(small_backbone(), [], 0)(small_batch()[0])
    assert found.diagnostics["value_curve"].amax(1).max() > 100 or step == "armijo"
    assert found.heatmap.max() < 0.05  # what a last step may leave


def test_lambda1_depends_on_the_resolution() -> None:
    for cells, wanted in ((7, 1.0), (28, 1.0), (223, 1.0), (224, 10.0)):
        assert IGOSpp()._regulariser((cells, cells)).lambda1 == wanted
    assert IGOSpp(lambda1=3.0)._regulariser((224, 224)).lambda1 == 3.0


METHODS = {
    "igospp": IGOSpp(resolution=8),
    "igospp, armijo": IGOSpp(resolution=8, step="armijo", ig_steps=5, intervals=5, iterations=6),
    "igospp, pixels": IGOSpp(resolution=None),
    "igospp, insertion": IGOSpp(resolution=8, objective="insertion"),
    "igospp, naive": IGOSpp(resolution=8, objective="naive"),
    "igospp, logit": IGOSpp(resolution=8, score="logit"),
    "igos": IGOS(resolution=8),
    "igos, armijo": IGOS(resolution=8, step="armijo", ig_steps=5, intervals=5),
    "mask": Mask(resolution=8, iterations=40),
}


@pytest.mark.parametrize("name", METHODS)
def test_patches_at_known_places(name: str) -> None:
    """All the evidence is in one 4 x 4 patch: it is the highest place, whichever of the two classes is asked for."""
    attribute = METHODS[name].fit(patches_backbone(), [], 0)
    for colour in (0, 1):
        found = attribute(batch_of(patch_pictures(PLACES), [colour] * 2)).heatmap
        for one, patches in zip(found, PLACES, strict=True):
            _, row, column = patches[colour]
            inside = torch.zeros(32, 32, dtype=torch.bool)
            inside[4 * row : 4 * row + 4, 4 * column : 4 * column + 4] = True
            assert one.max() > 0.1
            assert one[inside].max() >= one.max() - 1e-6  # a line search may fill a neighbour to 1 as well
            assert one[inside].mean() > 2 * one[~inside].mean()


def test_the_two_masks_and_their_product() -> None:
    batch, _ = small_batch(5)
    maps = {
        output: IGOSpp(output=output, **SMALL | {"resolution": None}).fit(small_backbone(), [], 0)(batch).heatmap
        for output in ("product", "deletion", "insertion")
    }
    wanted = 1 - (1 - maps["deletion"]) * (1 - maps["insertion"])
    assert wanted.max() > 0.1
    assert relative(maps["product"], wanted) < 1e-4
    assert relative(maps["deletion"], maps["insertion"]) > 0.1


def test_combined_loss_is_deletion_minus_insertion_score() -> None:
    """Table 7: of the map itself, at the picture's resolution, without noise."""
    batch, baseline = small_batch(5)
    backbone = small_backbone()
    found = IGOSpp(**SMALL | {"resolution": None}).fit(backbone, [], 0)(batch)
    hidden = found.heatmap[:, None]
    with torch.no_grad():
        deleted = batch.target.score(backbone(torch.lerp(batch.inputs, baseline, hidden)), "probability")
        inserted = batch.target.score(backbone(torch.lerp(baseline, batch.inputs, hidden)), "probability")
    assert (found.diagnostics["combined_loss"] - (deleted - inserted)).abs().max() < 1e-4


def test_the_objective_falls() -> None:
    """With all intervals and without noise the values of the steps can be compared."""
    batch, _ = small_batch(5)
    settings = SMALL | {"noise": 0.0, "intervals": 4}
    for step in ("armijo", "adam", "scaled"):
        curve = IGOSpp(step=step, **settings).fit(small_backbone(), [], 0)(batch).diagnostics["value_curve"]
        assert (curve[:, -1] <= curve[:, 0] + 1e-6).all()
        assert (curve[:, -1] < curve[:, 0] - 0.05).sum() >= 2
        if step == "armijo":
            assert (curve.diff(dim=1) < 1e-6).all()


def test_a_picture_without_evidence_leaves_the_batch() -> None:
    pictures = patch_pictures([PLACES[0], ()])  # nothing in the second picture, which its blur cannot change
    backbone = patches_backbone()
    method = IGOSpp(resolution=8, iterations=5, intervals=5, tolerance=0.0)
    attribute, batch = method.fit(backbone, [], 0), batch_of(pictures, [0, 0])
    with backbone.counting() as passes:
        found = attribute(batch)
    assert found.diagnostics["steps"].tolist() == [5, 1]
    assert found.diagnostics["passes"].tolist() == [100, 20]
    assert passes["forward"] == 120 + 2 * 2  # and the combined loss
    assert passes["backward"] == 120
    assert found.heatmap[1].abs().max() == 0
    assert relative(found.heatmap[:1], attribute(batch.take([0])).heatmap) < 1e-6
    never = dataclasses.replace(method, tolerance=-1.0).fit(backbone, [], 0)(batch)
    assert never.diagnostics["steps"].tolist() == [5, 5]
    assert relative(never.heatmap, found.heatmap) < 1e-6


@pytest.mark.parametrize("step", ["armijo", "fixed"])
def test_the_papers_steps_alone_in_a_batch_and_in_passes_of_any_size(step: str) -> None:
    batch, _ = small_batch(5)
    method = IGOSpp(step=step, iterations=3, **SMALL)
    whole = method.fit(small_backbone(), [], 0)(batch)
    assert len(set(whole.diagnostics["passes"].tolist())) > 1 or step == "fixed"
    cut = method.fit(small_backbone(max_passes=7), [], 0)(batch.take([3, 1]))
    assert relative(cut.heatmap, whole.take([3, 1]).heatmap) < 1e-4
    assert torch.equal(cut.diagnostics["passes"], whole.diagnostics["passes"][[3, 1]])


def test_no_more_rows_at_once_than_allowed() -> None:
    seen: list[int] = []

    class Watched(ClassTarget):
        def take(self, rows: Tensor) -> ClassTarget:
            seen.append(len(rows))
            return super().take(rows)

    batch = dataclasses.replace(small_batch(5)[0], target=Watched(torch.arange(5)))
    for method in (IGOSpp(step="armijo", iterations=1, **SMALL), Mask(resolution=3, iterations=2)):
        seen.clear()
        method.fit(small_backbone(max_passes=3), [], 0)(batch)
        assert max(seen) == 3


def test_a_regression_and_the_datasets_mean() -> None:
    """A mean picture that is the picture itself takes nothing away; another one does."""
    batch, _ = small_batch(1)
    batch = Batch(batch.inputs, RegressionTarget("deviation", torch.zeros(1), 2), batch.sample_ids)
    method = IGOSpp(**SMALL | {"noise": 0.0}, score="value", baseline="dataset_mean")
    assert method.uses_reference
    assert not IGOSpp().uses_reference
    other = batch_of(noise_pictures(4, (3, 12, 12), seed=3), [0] * 4)
    assert method.fit(small_backbone(), [batch], 0)(batch).heatmap.abs().max() == 0
    assert method.fit(small_backbone(), [other], 0)(batch).heatmap.max() > 0.01
    with pytest.raises(UserError, match=r"method.baseline=dataset_mean is the mean of the reference split"):
        method.fit(small_backbone(), [], 0)


def test_settings_that_cannot_be() -> None:
    with pytest.raises(UserError, match=r"method.intervals is 6: it must divide method.ig_steps=20"):
        IGOSpp(intervals=6)
    with pytest.raises(UserError, match=r"method.step is 'line': scaled, adam, armijo or fixed is expected"):
        IGOS(step="line")  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"method.output is 'insertion'"):
        IGOSpp(objective="naive", output="insertion")
    with pytest.raises(UserError, match=r"method.armijo_shrink is 1.0"):
        IGOSpp(armijo_shrink=1.0)
    with pytest.raises(UserError, match=r"method.resolution is 0: it must be above 0"):
        Mask(resolution=0)
    with pytest.raises(UserError, match=r"method.baseline is 'mean'"):
        Mask(baseline="mean")
