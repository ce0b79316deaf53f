"""The masks' objective against a plain float64 re-derivation, pixel by pixel, and closed forms of its parts."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from networks import batch_of, bilinear, noise_pictures, relative, small_backbone, small_net
from test_gradients import linear_backbone
from torch import Tensor

from ibxai.backbones import Backbone
from ibxai.draws import normal, sample_keys
from ibxai.methods.igospp import OBJECTIVES
from ibxai.methods.mask_objective import Problem, Regulariser, Term, total_variation
from ibxai.methods.perturbation import gaussian_blur
from ibxai.targets import ClassTarget, RegressionTarget
from ibxai.types import Batch

BTV = Regulariser(lambda1=0.7, lambda2=3.0, smoothness="btv", beta=2.0, sigma=0.5)
NO_WEIGHT = Regulariser(0.0, 0.0, "tv", 2.0, 1.0)
PLANES = {"x": 0, "y": 1}


class Plain:
    """iGOS++'s objective of one picture, a pass at a time, in float64; masks are numpy [h, w].

    terms: (which mask, whether evidence is inserted, whether noise is added).
    """

    def __init__(self, batch: Batch, row: int, baseline: Tensor, ig_steps: int, noise: float, step: int) -> None:
        self.network = small_net().eval().double()
        self.picture, self.baseline = batch.inputs[row].double().numpy(), baseline[row].double().numpy()
        self.target, self.ig_steps = int(batch.target.describe()[row]), ig_steps
        keys = sample_keys(0, [batch.sample_ids[row]], "mask noise")
        height, width = self.picture.shape[1:]
        self.noise = {
            s: noise
            * normal(keys, step * (ig_steps + 1) + s, (height, width, 3))[0].double().numpy().transpose(2, 0, 1)
            for s in range(1, ig_steps + 1)
        }

    def probability(self, picture: np.ndarray) -> float:
        with torch.no_grad():
            return float(self.network(torch.from_numpy(picture)[None]).softmax(1)[0, self.target])

    def term(self, mask: np.ndarray, inserts: bool, noisy: bool, intervals: Sequence[int]) -> float:
        """Eqs. 3 and 5: the mean over the intervals, minus it where evidence is inserted."""
        total = 0.0
        for s in intervals:
            m = bilinear(mask * s / self.ig_steps, *self.picture.shape[1:])
            of, to = (self.baseline, self.picture) if inserts else (self.picture, self.baseline)
            masked = of * m + to * (1 - m)
            total += self.probability(masked + self.noise[s] if noisy else masked) / len(intervals)
        return -total if inserts else total

    def regularisation(self, mask: np.ndarray, weights: Regulariser) -> float:
        """g of Eq. 4 as the module states it, cell by cell."""
        unlike = [[], []]
        spread = bilinear(mask, *self.picture.shape[1:])
        for axis, found in enumerate(unlike):
            for here in np.ndindex(*spread.shape):
                there = tuple(place + (i == axis) for i, place in enumerate(here))
                if there[axis] < spread.shape[axis]:
                    colours = self.picture[:, there[0], there[1]] - self.picture[:, here[0], here[1]]
                    likeness = math.exp(-np.mean(colours**2) / weights.sigma**2)
                    found.append(likeness * abs(spread[there] - spread[here]) ** weights.beta)
        btv = sum(np.mean(found) for found in unlike)
        tv = sum(np.mean(np.abs(np.diff(mask, axis=axis)) ** weights.beta) for axis in (0, 1))
        uneven = (tv + btv) / 2 if weights.smoothness == "btv" else tv
        return weights.lambda1 * float(np.mean(np.abs(1 - mask))) + weights.lambda2 * float(uneven)

    def value(self, masks: np.ndarray, terms: Sequence[Term], weights: Regulariser, intervals: Sequence[int]) -> float:
        """F of Eq. 4 over the intervals; masks [planes, h, w]."""
        product = np.prod(masks, axis=0)
        shown = [product if term.plane is None else masks[term.plane] for term in terms]
        scores = [self.term(m, t.inserts, t.noisy, intervals) for m, t in zip(shown, terms, strict=True)]
        return sum(scores) + self.regularisation(product, weights)

    def slope(
        self, masks: np.ndarray, terms: Sequence[Term], weights: Regulariser, intervals: Sequence[int]
    ) -> np.ndarray:
        """Eq. 6 by central differences, a cell at a time."""
        found, reach = np.zeros_like(masks), 1e-5
        for cell in np.ndindex(*masks.shape):
            ends = []
            for sign in (1, -1):
                moved = masks.copy()
                moved[cell] += sign * reach
                ends.append(self.value(moved, terms, weights, intervals))
            found[cell] = (ends[0] - ends[1]) / (2 * reach)
        return found


def small_batch(rows: int = 2) -> tuple[Batch, Tensor]:
    """Pictures of 12 x 12 pixels, of which a blur leaves little, with the predicted classes, and that blur."""
    pictures = noise_pictures(5, (3, 12, 12))[:rows]
    batch = batch_of(pictures, [0] * rows)
    batch = dataclasses.replace(batch, target=ClassTarget.predicted(rows)).bound(small_backbone())
    return batch, gaussian_blur(batch.inputs, 2.0)


def problem_of(
    batch: Batch,
    baselines: Tensor,
    terms: tuple[Term, ...],
    regulariser: Regulariser = NO_WEIGHT,
    ig_steps: int = 3,
    noise: float = 0.0,
    backbone: Backbone | None = None,
    score: str = "probability",
) -> Problem:
    backbone = small_backbone(max_passes=7) if backbone is None else backbone
    return Problem.of(backbone, batch, baselines, terms, regulariser, score, ig_steps, noise, 0)  # type: ignore[arg-type]


@pytest.mark.parametrize("objective", ["bilateral", "deletion", "insertion", "naive"])
def test_value_and_gradient_are_the_papers(objective: str) -> None:
    batch, baseline = small_batch()
    terms = OBJECTIVES[objective]
    planes = 2 if objective == "bilateral" else 1
    masks = torch.rand(2, planes, 3, 4, generator=torch.Generator().manual_seed(1)) * 0.8 + 0.1
    intervals = [1, 3] if objective == "naive" else [1, 2, 3]
    problem = problem_of(batch, baseline, terms, BTV, noise=0.3)
    value, slope = problem.gradient(masks, torch.tensor(intervals), step=4)
    assert relative(problem.value(masks, torch.tensor(intervals), step=4), value) < 1e-6
    for row in range(2):
        plain = Plain(batch, row, baseline, 3, 0.3, step=4)
        own = masks[row].double().numpy()
        assert float(value[row]) == pytest.approx(plain.value(own, terms, BTV, intervals), rel=1e-4)
        wanted = torch.from_numpy(plain.slope(own, terms, BTV, intervals))
        assert relative(slope[row], wanted) < 2e-3


def test_noise_is_in_the_single_masks_terms_only() -> None:
    batch, baseline = small_batch()
    masks, every = torch.full((2, 2, 4, 4), 0.6), torch.arange(1, 4)
    for term in OBJECTIVES["bilateral"]:
        quiet, loud = (problem_of(batch, baseline, (term,), noise=noise).value(masks, every, 0) for noise in (0.0, 1.0))
        assert torch.equal(quiet, loud) == (term.plane is None)


def test_compared_masks_meet_the_same_noise_and_steps_do_not() -> None:
    batch, baseline = small_batch()
    problem = problem_of(batch, baseline, OBJECTIVES["deletion"], noise=1.0).of_rows(torch.tensor([1, 0, 1]))
    masks, every = torch.full((3, 1, 4, 4), 0.6), torch.arange(1, 4)
    value = problem.value(masks, every, 0)
    assert float(value[0]) == pytest.approx(float(value[2]), rel=1e-5)
    assert relative(problem.value(masks, every, 1), value) > 1e-3


def test_gradient_of_a_linear_network() -> None:
    """Deletion: the picture's change at each pixel times its weight, and the mean of s / S, (S + 1) / 2S."""
    backbone, weights = linear_backbone()
    batch = batch_of(noise_pictures(2, (3, 6, 6)), [3, 0])
    baseline = torch.full_like(batch.inputs, 0.2)
    masks = torch.full((2, 1, 6, 6), 0.4)
    there = (torch.from_numpy(weights[[3, 0]]).double() * (batch.inputs - 0.2).double()).sum(1, keepdim=True)
    for steps in (1, 5):
        for objective in ("deletion", "insertion"):
            problem = problem_of(
                batch, baseline, OBJECTIVES[objective], ig_steps=steps, backbone=backbone, score="logit"
            )
            _, slope = problem.gradient(masks, torch.arange(1, steps + 1), 0)
            assert relative(slope, there * (steps + 1) / (2 * steps)) < 1e-5


def test_one_interval_is_the_plain_gradient_at_the_mask() -> None:
    batch, baseline = small_batch()
    masks = torch.rand(2, 1, 12, 12, generator=torch.Generator().manual_seed(2))
    _, slope = problem_of(batch, baseline, OBJECTIVES["deletion"], ig_steps=1).gradient(masks, torch.tensor([1]), 0)
    leaf = masks.double().requires_grad_()
    shown = batch.inputs.double() * leaf + baseline.double() * (1 - leaf)
    scores = small_net().eval().double()(shown).softmax(1)[range(2), batch.target.describe()]
    (wanted,) = torch.autograd.grad(scores.sum(), leaf)
    assert relative(slope, wanted) < 1e-4


def test_a_regression_is_masked_by_its_value() -> None:
    backbone, _ = linear_backbone()
    batch = batch_of(noise_pictures(2, (3, 6, 6)), [0, 0])
    batch = Batch(batch.inputs, RegressionTarget("deviation", torch.zeros(2), 1), batch.sample_ids)
    problem = problem_of(
        batch, torch.zeros_like(batch.inputs), OBJECTIVES["deletion"], ig_steps=1, backbone=backbone, score="value"
    )
    value = problem.value(torch.full((2, 1, 6, 6), 0.5), torch.tensor([1]), 0)
    with torch.no_grad():
        assert relative(value, backbone(batch.inputs / 2)[:, 1]) < 1e-5


@pytest.mark.parametrize("beta", [1.0, 2.0, 3.0])
def test_tv_of_a_ramp_a_step_and_a_constant(beta: float) -> None:
    ramp = torch.linspace(0, 1, 5).view(1, 1, 1, 5).expand(1, 1, 3, 5)
    step = torch.tensor([0.0, 0.0, 1.0, 1.0]).view(1, 1, 4, 1).expand(1, 1, 4, 6)
    assert float(total_variation(ramp, beta)) == pytest.approx(0.25**beta)
    assert float(total_variation(step, beta)) == pytest.approx(1 / 3)
    assert float(total_variation(torch.full((1, 1, 4, 4), 0.3), beta)) == 0
    assert float(total_variation(torch.full((1, 1, 1, 1), 0.3), beta)) == 0


def test_btv_forgives_a_step_where_the_picture_has_one() -> None:
    """A picture of two colours, and a mask that changes with them, or one pixel beside them."""
    picture = torch.zeros(1, 3, 4, 6)
    picture[..., 3:] = 1
    sigma = 0.5
    weights = Regulariser(0.0, 1.0, "btv", 2.0, sigma)
    edge = math.exp(-1 / sigma**2)
    for column, wanted in ((3, edge), (2, 1.0)):
        mask = torch.zeros(1, 1, 4, 6)
        mask[..., column:] = 1
        found = weights(mask, weights.likeness(picture))
        assert float(found) == pytest.approx((1 + wanted) / 2 / 5, rel=1e-5)  # 1 of the 5 differences across


def test_the_size_of_a_mask() -> None:
    weights = Regulariser(7.0, 0.0, "tv", 2.0, 1.0)
    mask = torch.tensor([[1.0, 0.5], [0.0, 1.0]])[None, None]
    likeness = weights.likeness(torch.zeros(1, 3, 4, 4))
    assert float(weights(mask, likeness)) == pytest.approx(7 * 1.5 / 4)
    leaf = mask.clone().requires_grad_()
    (slope,) = torch.autograd.grad(weights(leaf, likeness).sum(), leaf)
    assert slope.flatten().tolist() == [0, -7 / 4, -7 / 4, 0]  # a cell at 1 may leave it
