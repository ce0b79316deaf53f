"""Sensitivity-N: linear networks, where it is 1; a plain float64 re-derivation from the pictures that are shown."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from networks import batch_of, noise_pictures, relative, small_backbone, small_net
from torch import Tensor, nn

from ibxai.backbones import Backbone, freeze
from ibxai.errors import UserError
from ibxai.methods.perturbation import baseline_picture
from ibxai.metrics import SensitivityN
from ibxai.metrics.sensitivity_n import set_sizes
from ibxai.targets import RegressionTarget
from ibxai.types import Attribution

SIDE = 12
PIXELS = SIDE * SIDE


class Linear(nn.Module):
    """Output 0 is the sum of weight_i x_i, over two channels; output 1 is always 3."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(1, 2, SIDE, SIDE, generator=torch.Generator().manual_seed(0)))

    def forward(self, x: Tensor) -> Tensor:
        value = (x * self.weight).sum((1, 2, 3))
        return torch.stack([value, 0 * value + 3], 1)


@pytest.fixture(scope="module")
def linear() -> Backbone:
    return freeze(Linear(), (2, SIDE, SIDE), name="linear")


PICTURES = noise_pictures(3, (2, SIDE, SIDE))


def judge(backbone: Backbone, heatmap: Tensor, ids: Sequence[str] | None = None, target: int = 0, **settings):
    settings = {"points": 5, "sets": 40, **settings}
    pictures = PICTURES[torch.arange(len(heatmap)) % 3]
    batch = batch_of(pictures, [target] * len(heatmap), ids)
    return SensitivityN(**settings)(backbone, batch, Attribution(heatmap, "score"))


@contextmanager
def shown_to(backbone: Backbone) -> Iterator[list[Tensor]]:
    """The rows that the network was run on, in order, one tensor a pass."""
    seen: list[Tensor] = []
    handle = backbone._network.register_forward_hook(lambda module, args, out: seen.append(args[0].clone()))
    try:
        yield seen
    finally:
        handle.remove()


@pytest.mark.parametrize(("baseline", "value"), [("constant", 0.0), ("constant", -1.5), ("blur", 0.0)])
def test_exact_for_a_linear_network(linear: Backbone, baseline: str, value: float) -> None:
    """What a set's removal changes is the sum of its shares (x - baseline) w: r is 1, -1 for the opposite."""
    settings = {"baseline": baseline, "value": value, "sigma": 2.0}
    shares = (PICTURES - baseline_picture(PICTURES, baseline, 2.0, value)) * Linear().weight.detach()
    for sign in (1, -1):
        found = judge(linear, sign * shares.sum(1), **settings)
        assert relative(found["curve"], torch.full((3, 5), float(sign))) < 1e-5
        assert relative(found["value"], torch.full((3,), float(sign))) < 1e-5
    if baseline == "constant" and value:  # gradient x input is then not the share
        assert (judge(linear, (PICTURES * Linear().weight.detach()).sum(1), **settings)["value"] < 0.99).all()


def test_neither_scale_nor_offset_of_the_map_matters(linear: Backbone) -> None:
    heatmap = (PICTURES * Linear().weight.detach()).sum(1) + 2 * noise_pictures(3, (1, SIDE, SIDE), 5)[:, 0]
    plain = judge(linear, heatmap)
    assert (plain["value"].abs() < 0.95).all()
    for other in (1e-6 * heatmap, 1e4 * heatmap, heatmap + 3):
        assert relative(judge(linear, other)["curve"], plain["curve"]) < 1e-3


def test_chance_is_none(linear: Backbone) -> None:
    """Of a map that has nothing to do with the picture, r is 0 on average, and spreads as 1 / sqrt(sets)."""
    heatmap = torch.randn(60, SIDE, SIDE, generator=torch.Generator().manual_seed(3))
    found = judge(linear, heatmap, [f"id{i}" for i in range(60)], sets=50, points=3)["curve"]
    assert found.mean(0).abs().max() < 4 / math.sqrt(50 * 60)
    # a set of most pixels is nearly all the others' opposite, but no less random
    assert 0.7 / math.sqrt(50) < found.std(0).min() <= found.std(0).max() < 1.4 / math.sqrt(50)


def test_the_sets(linear: Backbone) -> None:
    """Exactly n pixels each, all channels of them; others for each draw and sample; the same for another map."""
    shown = []
    for heatmap in (PICTURES[:, 0], -3 * PICTURES[:, 1]):
        with shown_to(linear) as seen:
            judge(linear, heatmap, ["a", "b", "a"], sets=200, value=77.0)
        shown.append((torch.cat(seen)[: 3 * 200 * 5] == 77.0).view(3, 200, 5, 2, PIXELS))
    assert torch.equal(shown[0], shown[1])
    taken = shown[0]
    assert torch.equal(taken[:, :, :, 0], taken[:, :, :, 1])
    taken = taken[:, :, :, 0]
    counts = set_sizes(PIXELS, 5, 1, 0.63)
    assert torch.equal(taken.sum(-1), counts.expand(3, 200, 5))
    assert torch.equal(taken[0], taken[2])  # one sample, twice in the batch
    assert not torch.equal(taken[0], taken[1])
    assert len({row.numpy().tobytes() for row in taken[:2, :, -1].flatten(0, 1)}) == 400
    often = taken[0].double().mean(0)  # how often each pixel is in a set: n / pixels, give or take
    share = counts / PIXELS
    spread = (share * (1 - share) / 200).sqrt()[:, None]
    assert ((often - share[:, None]).abs() < 5 * spread).all()
    assert 0.8 < float(((often - share[:, None]) / spread).std()) < 1.2
    # sets of one draw follow one another in one order of the pixels: as long as there are enough, none comes twice
    assert int(counts[:-1].sum()) < PIXELS
    assert int(taken[0, :, :-1].sum(1).max()) == 1


@pytest.mark.parametrize("score", ["logit", "probability"])
def test_against_a_plain_derivation(score: str) -> None:
    """From nothing but the pictures that the network was shown: sets, sums, outputs and r, one at a time."""
    backbone, pictures, classes, sets = small_backbone(), noise_pictures(2), [1, 3], 15
    heatmap = noise_pictures(2, (1, 32, 32), 8)[:, 0]
    metric = SensitivityN(points=4, sets=sets, smallest=5, value=50.0, score=score)  # type: ignore[arg-type]
    with shown_to(backbone) as seen:
        found = metric(backbone, batch_of(pictures, classes), Attribution(heatmap, "score"))
    rows = torch.cat(seen).double()
    assert len(rows) == 2 * sets * 4  # not one pass more
    network = small_net().eval().double()
    wanted = np.zeros((2, 4))
    for i in range(2):
        for j in range(4):
            sums, changes = [], []
            for draw in range(sets):
                row = rows[(i * sets + draw) * 4 + j]
                chosen = (row == 50.0).all(0)
                assert int(chosen.sum()) == [5, 25, 128, 645][j]
                assert torch.equal(row[:, ~chosen], pictures[i].double()[:, ~chosen])
                sums.append(float(heatmap[i].double()[chosen].sum()))
                with torch.no_grad():
                    pair = network(torch.stack([pictures[i].double(), row]))
                value = (pair.softmax(1) if score == "probability" else pair)[:, classes[i]]
                changes.append(float(value[0] - value[1]))
            wanted[i, j] = np.corrcoef(sums, changes)[0, 1]
    np.testing.assert_allclose(found["curve"].numpy(), wanted, atol=2e-4)
    np.testing.assert_allclose(found["value"].numpy(), wanted.mean(1), atol=2e-4)
    np.testing.assert_allclose(
        found["fraction"].numpy(), [[5 / 1024, 25 / 1024, 128 / 1024, 645 / 1024]] * 2, rtol=1e-6
    )


def test_of_a_regression(linear: Backbone) -> None:
    batch = batch_of(PICTURES, [0] * 3)
    target = RegressionTarget("deviation", torch.zeros(3))
    shares = (PICTURES * Linear().weight.detach()).sum(1)
    metric = SensitivityN(points=5, sets=40, score="value")
    found = metric(linear, dataclasses.replace(batch, target=target), Attribution(shares, "score"))
    assert (found["value"] > 0.9999).all()


@pytest.mark.parametrize("value", [0.0, 0.1, -7.3])
def test_a_constant_map_has_no_correlation(linear: Backbone, value: float) -> None:
    """0.1 is no exact number, and its sums round: that must not make a correlation."""
    heatmap = (PICTURES * Linear().weight.detach()).sum(1)
    heatmap[1] = value
    found = judge(linear, heatmap)
    assert found["curve"][1].isnan().all()
    assert found["value"][1].isnan()
    assert found["value"][[0, 2]].isfinite().all()


def test_an_output_that_never_changes_has_no_correlation(linear: Backbone) -> None:
    found = judge(linear, PICTURES[:, 0], target=1)
    assert found["curve"].isnan().all()
    assert found["value"].isnan().all()


def test_sizes_without_a_correlation_are_left_out_of_the_mean(linear: Backbone) -> None:
    """A map of a single pixel, which the few single-pixel sets do not meet."""
    heatmap = torch.zeros(3, SIDE, SIDE)
    heatmap[:, 4, 7] = 1
    found = judge(linear, heatmap)
    missing = found["curve"].isnan()
    assert missing[:, 0].any()
    assert not missing[:, -1].any()
    for row in range(3):
        kept = found["curve"][row][~missing[row]]
        assert float(found["value"][row]) == pytest.approx(float(kept.mean()), rel=1e-5)


def test_signs(linear: Backbone) -> None:
    heatmap = (PICTURES * Linear().weight.detach()).sum(1)
    for sign, expected in (("positive", heatmap.clamp_min(0)), ("abs", heatmap.abs())):
        found = judge(linear, heatmap, sign=sign)
        assert torch.equal(found["curve"], judge(linear, expected)["curve"])
        assert (found["value"] < 0.95).all()


@pytest.mark.parametrize(
    ("pixels", "points", "smallest", "largest", "wanted"),
    [
        (50176, 10, 1, 10**4.5 / 50176, [1, 3, 10, 32, 100, 316, 1000, 3162, 10000, 31623]),
        (50176, 2, 100, 1.0, [100, 50176]),
        (16, 6, 1, 0.5, [1, 2, 3, 5, 8]),  # 1, 1.5, 2.3, 3.5, 5.3, 8: two round to 2
        (16, 1, 4, 1.0, [4]),
        (16, 3, 8, 0.5, [8]),
    ],
)
def test_set_sizes(pixels: int, points: int, smallest: int, largest: float, wanted: list[int]) -> None:
    assert set_sizes(pixels, points, smallest, largest).tolist() == wanted


def test_sets_larger_than_the_largest() -> None:
    with pytest.raises(UserError, match=r"sets of 10 pixels and more, but 0\.5 of 16 are 8"):
        set_sizes(16, 3, 10, 0.5)


@pytest.mark.parametrize("settings", [{"points": 0}, {"smallest": 0}, {"largest": 0.0}, {"largest": 1.2}, {"sets": 2}])
def test_settings_that_cannot_be(settings: dict) -> None:
    with pytest.raises(UserError, match="Sensitivity-N"):
        SensitivityN(**settings)
