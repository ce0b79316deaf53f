"""Targets for bottlenecks: the regression losses and what an inverse bottleneck minimises, from the formulas."""

from __future__ import annotations

import math

import pytest
import torch
from networks import batch_of, noise_pictures, patch_reference
from torch import Tensor, nn

from ibxai.backbones import Backbone, freeze
from ibxai.errors import UserError
from ibxai.methods import IBA
from ibxai.targets import REGRESSION_LOSSES, ClassTarget, RegressionTarget
from ibxai.types import Batch

UNKNOWN = torch.full((3,), math.nan)
BEFORE = torch.tensor([[2.0, 7.0], [-1.0, 7.0], [4.0, 7.0]])  # of the unmasked pictures
AFTER = torch.tensor([[1.0, 9.0], [-3.0, 9.0], [0.5, 9.0]])


def test_the_losses() -> None:
    labels = torch.tensor([3.0, 0.0, 1.0])
    mse = RegressionTarget("mse", labels).bind(BEFORE)
    assert mse.loss(AFTER).tolist() == [4.0, 9.0, 0.25]
    deviation = RegressionTarget("deviation", UNKNOWN).bind(BEFORE)
    assert deviation.loss(AFTER).tolist() == [1.0, 4.0, 12.25]
    rm = RegressionTarget("rm", UNKNOWN).bind(BEFORE)
    wanted = [math.log(1 + 4 / 1), math.log(1 + 1 / 9), math.log(1 + 16 / 0.25)]
    assert rm.loss(AFTER).tolist() == pytest.approx(wanted, rel=1e-6)
    for target in (mse, deviation, rm):
        assert torch.equal(target.score(AFTER, "value"), AFTER[:, 0])
        assert target.loss(AFTER).shape == (3,)


def test_another_output() -> None:
    target = RegressionTarget("deviation", UNKNOWN, output=1).bind(BEFORE)
    assert target.loss(AFTER).tolist() == [4.0, 4.0, 4.0]
    assert target.score(AFTER, "value").tolist() == [9.0, 9.0, 9.0]
    assert list(target.describe()) == [1, 1, 1]


def test_rm_is_bounded_and_falls_with_the_square() -> None:
    values = torch.tensor([1e-3, 0.1, 1.0, 10.0, 1e3, 1e6])[:, None]
    target = RegressionTarget("rm", torch.full((6,), math.nan)).bind(torch.full((6, 1), 2.0))
    for sign in (1, -1):
        loss = target.loss(sign * values)
        assert (loss.diff() < 0).all()
        assert (loss > 0).all()
        assert loss[-1] < 1e-10
    # the gradient has the sign of the published -Phi^2's, everywhere
    leaf = torch.tensor([[0.5], [-0.5], [3.0], [-3.0]]).requires_grad_()
    four = RegressionTarget("rm", torch.full((4,), math.nan)).bind(torch.full((4, 1), 2.0))
    (gradient,) = torch.autograd.grad(four.loss(leaf).sum(), leaf)
    assert torch.equal(gradient.sign(), (-2 * leaf).sign())
    nothing = target.loss(torch.zeros(6, 1))
    assert nothing.isfinite().all()  # an output of exactly zero is no infinity


def test_mse_needs_labels() -> None:
    with pytest.raises(UserError, match="'mse' needs a label"):
        RegressionTarget("mse", torch.tensor([1.0, math.nan]))
    RegressionTarget("deviation", UNKNOWN)
    RegressionTarget("rm", UNKNOWN)


def test_mistakes() -> None:
    with pytest.raises(UserError, match=r"no regression loss 'mae'"):
        RegressionTarget("mae", UNKNOWN)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="score=value"):
        RegressionTarget("rm", UNKNOWN).score(AFTER, "probability")
    for kind in ("deviation", "rm"):
        with pytest.raises(RuntimeError, match="bound"):
            RegressionTarget(kind, UNKNOWN).loss(AFTER)
    with pytest.raises(RuntimeError, match="bound"):
        ClassTarget(torch.tensor([-1, 0, 0])).removal_loss(AFTER, "complement")


@pytest.mark.parametrize("kind", REGRESSION_LOSSES)
def test_take_brings_labels_and_references_along(kind: str) -> None:
    labels = torch.tensor([3.0, 0.0, 1.0])
    rows = torch.tensor([2, 0, 2, 1])
    target = RegressionTarget(kind, labels)  # type: ignore[arg-type]
    bound = target.bind(BEFORE)
    assert target.reference is None  # binding makes a new target
    assert torch.equal(bound.take(rows).loss(AFTER[rows]), bound.loss(AFTER)[rows])
    assert torch.equal(target.take(rows).bind(BEFORE[rows]).loss(AFTER[rows]), bound.loss(AFTER)[rows])
    for bound_form in ("complement", "probability", "none"):
        found = bound.take(rows).removal_loss(AFTER[rows], bound_form)
        assert torch.equal(found, bound.removal_loss(AFTER, bound_form)[rows])
    assert len(bound.take(rows).describe()) == 4
    assert bound.to(torch.device("cpu")).loss(AFTER).tolist() == bound.loss(AFTER).tolist()


# --- removal losses


def test_removal_of_a_class() -> None:
    out = torch.tensor([[3.0, 1.0, -2.0], [0.0, 0.0, 0.0], [-5.0, 2.0, 8.0]])
    target = ClassTarget(torch.tensor([0, 1, 0]))
    p = out.double().softmax(1)[torch.arange(3), target.classes]
    for bound, wanted in [("complement", -(1 - p).log()), ("probability", p), ("none", p.log())]:
        torch.testing.assert_close(target.removal_loss(out, bound).double(), wanted, rtol=1e-5, atol=2e-6)


def test_removal_of_a_regression() -> None:
    """With p = 1 / (1 + d): d = (Phi(Z) - Phi(X))^2 / Phi(X)^2, of "rm" its loss, which has no unit."""
    labels = torch.tensor([3.0, 0.0, 1.0])
    before, after = BEFORE[:, 0].double(), AFTER[:, 0].double()
    distances = {
        "mse": (after - labels) ** 2 / before**2,
        "deviation": (after - before) ** 2 / before**2,
        "rm": (1 + before**2 / after**2).log(),
    }
    for kind, d in distances.items():
        target = RegressionTarget(kind, labels).bind(BEFORE)  # type: ignore[arg-type]
        p = 1 / (1 + d)
        for bound, wanted in [("complement", -(1 - p).log()), ("probability", p)]:
            found = target.removal_loss(AFTER, bound).double()  # type: ignore[arg-type]
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-9)
        assert torch.equal(target.removal_loss(AFTER, "none"), -target.loss(AFTER))


@pytest.mark.parametrize("bound", ["complement", "probability"])
def test_bounded_below_where_the_published_form_is_not(bound: str) -> None:
    logits = torch.stack([-torch.logspace(-2, 3, 30), torch.zeros(30)], 1)
    of_class = ClassTarget(torch.zeros(30, dtype=torch.long))
    far = torch.logspace(-2, 6, 30)[:, None]
    regression = RegressionTarget("deviation", torch.full((30,), math.nan)).bind(torch.ones(30, 1))
    for target, out in ((of_class, logits), (regression, 1 + far)):
        loss = target.removal_loss(out, bound)  # type: ignore[arg-type]
        assert (loss >= 0).all()
        assert (loss.diff() <= 0).all()  # the less of the target is left, the lower
        assert loss[-1] < 1e-6
        assert target.removal_loss(out, "none")[-1] < -900


def test_complement_keeps_its_gradient_at_a_sure_prediction() -> None:
    """p = 1 - 4e-18 is 1 in float32, so that -ln(1 - p) computed from p would be infinite."""
    out = torch.tensor([[40.0, 0.0]]).requires_grad_()
    loss = ClassTarget(torch.tensor([0])).removal_loss(out, "complement")
    assert loss.item() == pytest.approx(40, rel=1e-6)
    (gradient,) = torch.autograd.grad(loss.sum(), out)
    torch.testing.assert_close(gradient, torch.tensor([[1.0, -1.0]]))


# --- Regression IBA on a network that adds up what lies at two places


class TwoPlaces(nn.Module):
    """4 times the mean brightness of channel 0 in cell (1, 1), plus 4 `share` times that in cell (6, 5)."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self.cells = nn.Conv2d(3, 3, 4, 4, groups=3)
        self.value = nn.Linear(3 * 64, 1)
        with torch.no_grad():
            self.cells.weight.fill_(1 / 16)
            self.cells.bias.zero_()
            self.value.weight.zero_()
            self.value.bias.zero_()
            self.value.weight[0, 8 + 1] = 4.0
            self.value.weight[0, 6 * 8 + 5] = 4.0 * share

    def forward(self, x: Tensor) -> Tensor:
        return self.value(self.cells(x).flatten(1))


def two_places(share: float) -> Backbone:
    return freeze(TwoPlaces(share), (3, 32, 32), {"bottleneck": "cells"}, name="two places")


def bright(kind: str, backbone: Backbone, labels: Tensor) -> Batch:
    """Three pictures, bright at both places and at two that do not count, on faint noise."""
    pictures = 0.02 * noise_pictures(3)
    for row, column in ((1, 1), (6, 5), (1, 6), (6, 1)):
        pictures[:, 0, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] = 1
    batch = batch_of(pictures, [0, 0, 0])
    target = RegressionTarget(kind, labels).bind(backbone(pictures))  # type: ignore[arg-type]
    return Batch(pictures, target, batch.sample_ids)


def bits_at(heatmap: Tensor, row: int, column: int) -> Tensor:
    """[B]"""
    return heatmap[:, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4].sum((1, 2))


SETTINGS = IBA(smoothing=0.0, steps=40, draws=4, beta=3.0, min_reference=1)


def shares(share: float, kind: str, labels: Tensor = UNKNOWN) -> tuple[Tensor, Tensor, Tensor]:
    """Bits at the first place, at the second, and at the brightest of those that do not count."""
    backbone = two_places(share)
    found = SETTINGS.fit(backbone, [patch_reference(192)], 0)(bright(kind, backbone, labels))
    assert found.heatmap.isfinite().all()
    idle = torch.maximum(bits_at(found.heatmap, 1, 6), bits_at(found.heatmap, 6, 1))
    return bits_at(found.heatmap, 1, 1), bits_at(found.heatmap, 6, 5), idle


@pytest.mark.parametrize("kind", ["deviation", "mse"])
def test_keeping_the_output_recovers_the_places_shares(kind: str) -> None:
    """Equal shares get equal bits, a small share fewer, none at all what a place that does not count gets."""
    labels = torch.full((3,), 8.0)
    first, second, idle = shares(1.0, kind, labels)
    assert ((first - second).abs() < 0.1 * first).all()
    assert (second > 10 * idle).all()
    labels = torch.full((3,), 5.6)
    first, second, idle = shares(0.4, kind, labels)
    assert (first > 1.15 * second).all()
    assert (second > 5 * idle).all()
    labels = torch.full((3,), 4.0)
    first, second, idle = shares(0.0, kind, labels)
    assert (first > 10 * second).all()


def test_rm_prefers_the_high_values() -> None:
    """The second place lowers the output: what keeps the output large is the first alone."""
    first, second, idle = shares(-0.5, "rm")
    assert (first > 10 * second).all()
    assert (first > 10 * idle).all()
    kept = shares(-0.5, "deviation")[0]  # what keeps it as it was
    assert (first > 1.2 * kept).all()
    # of two places that raise it, the one that raises it more: "rm" is more selective than "deviation"
    first, second, idle = shares(0.4, "rm")
    assert (first > 2.5 * second).all()
    assert (second > 10 * idle).all()
    kept = shares(0.4, "deviation")
    assert (first / second > 1.3 * kept[0] / kept[1]).all()
