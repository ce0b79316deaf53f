"""The score of the best pixels alone and without them: closed forms on a network whose probability is a sum."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from networks import batch_of, noise_pictures, small_backbone, small_net
from torch import Tensor, nn

from ibxai.backbones import Backbone, freeze
from ibxai.errors import UserError
from ibxai.methods.perturbation import gaussian_blur
from ibxai.metrics import ConfidenceDrop, PixelRatio
from ibxai.targets import RegressionTarget
from ibxai.types import Attribution

SIDE = 10
PIXELS = SIDE * SIDE


class Sum(nn.Module):
    """p(class 0) = 0.05 + sum of weight_i x_i; the weights sum to 0.9, a fifth of them are negative."""

    def __init__(self) -> None:
        super().__init__()
        weights = torch.randperm(PIXELS, generator=torch.Generator().manual_seed(0)).float() - 20
        self.weight = nn.Parameter((0.9 * weights / weights.sum()).view(1, 1, SIDE, SIDE))

    def forward(self, x: Tensor) -> Tensor:
        p = (0.05 + (x * self.weight).sum((1, 2, 3))).clamp(1e-6, 1 - 1e-6)
        return torch.stack([p.log(), (-p).log1p()], 1)


WEIGHTS = Sum().weight.detach()[0, 0]
ONES = torch.ones(1, 1, SIDE, SIDE)


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return freeze(Sum(), (1, SIDE, SIDE), name="sum")


def judge(metric, backbone: Backbone, *heatmaps: Tensor):
    batch = batch_of(ONES.repeat(len(heatmaps), 1, 1, 1), [0] * len(heatmaps))
    return metric(backbone, batch, Attribution(torch.stack(heatmaps), "score"))


def clamped(p: float) -> float:
    return min(max(p, 1e-6), 1 - 1e-6)


def top(heatmap: Tensor, count: int) -> float:
    """The weights of the pixels with the highest values, added up."""
    order = sorted(range(PIXELS), key=lambda i: -float(heatmap.flatten()[i]))
    return sum(float(WEIGHTS.flatten()[i]) for i in order[:count])


def test_pixel_ratio_in_closed_form(backbone: Backbone) -> None:
    other = noise_pictures(1, (1, SIDE, SIDE))[0, 0]
    shown = (WEIGHTS, -WEIGHTS, other)
    found = judge(PixelRatio(percent=(6, 12.5), baseline="constant"), backbone, *shown)
    assert set(found) == {"value", "shown_6", "shown_12.5", "removed_6", "removed_12.5"}
    difference = torch.zeros(3)
    for name, count in (("6", 6), ("12.5", 12)):
        for row, heatmap in enumerate(shown):
            part = top(heatmap, count)
            assert float(found[f"shown_{name}"][row]) == pytest.approx(clamped(0.05 + part), abs=1e-6)
            assert float(found[f"removed_{name}"][row]) == pytest.approx(clamped(0.95 - part), abs=1e-6)
        difference += found[f"shown_{name}"] - found[f"removed_{name}"]
    torch.testing.assert_close(found["value"], difference / 2)
    assert found["value"].argmax() == 0
    assert found["value"].argmin() == 1


def test_everything_and_next_to_nothing(backbone: Backbone) -> None:
    found = judge(PixelRatio(percent=(100, 0.001), baseline="constant"), backbone, WEIGHTS)
    assert float(found["shown_100"]) == pytest.approx(0.95, abs=1e-5)
    assert float(found["removed_100"]) == pytest.approx(0.05, abs=1e-5)
    assert float(found["shown_0.001"]) == pytest.approx(0.05 + float(WEIGHTS.max()), abs=1e-5)  # never no pixel


def test_ties_are_broken_by_the_sample(backbone: Backbone) -> None:
    batch = batch_of(ONES.repeat(3, 1, 1, 1), [0] * 3, ["a", "b", "a"])
    found = PixelRatio(baseline="constant")(backbone, batch, Attribution(torch.zeros(3, SIDE, SIDE), "score"))["value"]
    assert found[0] == found[2] != found[1]


def test_drop_in_closed_form(backbone: Backbone) -> None:
    """O = 0.05 + sum of w_i max(m_i, 0) / max(m): what is highlighted twice as strongly is shown twice as much."""
    other = noise_pictures(1, (1, SIDE, SIDE))[0, 0]
    shown = (WEIGHTS, 1000 * WEIGHTS, other, -WEIGHTS)
    found = judge(ConfidenceDrop(), backbone, *shown)
    for row, heatmap in enumerate(shown):
        share = heatmap.clamp_min(0).double() / float(heatmap.max())
        part = clamped(0.05 + float((WEIGHTS * share).sum()))
        assert float(found["shown"][row]) == pytest.approx(part, abs=1e-6)
        assert float(found["value"][row]) == pytest.approx(max(0.95 - part, 0) / 0.95, abs=1e-5)
        assert float(found["gain"][row]) == float(part > 0.95)
    assert found["value"].argmax() == 3


def test_gain(backbone: Backbone) -> None:
    """Without the pixels that speak against it, the class is more likely than in the whole picture."""
    helpful = (WEIGHTS > 0).float()
    picture = 0.9 * ONES
    batch = batch_of(picture, [0])
    found = ConfidenceDrop()(backbone, batch, Attribution(helpful[None], "score"))
    whole, part = 0.05 + 0.81, 0.05 + 0.9 * float((WEIGHTS * helpful).sum())
    assert part > whole
    assert float(found["shown"]) == pytest.approx(clamped(part), abs=1e-5)
    assert (float(found["value"]), float(found["gain"])) == (0.0, 1.0)


def test_a_constant_map_drops_nothing_and_an_empty_one_everything(backbone: Backbone) -> None:
    """The first is a flaw of the definition, which the module tells of."""
    found = judge(
        ConfidenceDrop(), backbone, torch.full((SIDE, SIDE), 0.3), torch.zeros(SIDE, SIDE), -torch.ones(SIDE, SIDE)
    )
    assert found["value"].tolist() == pytest.approx([0, 0.9 / 0.95, 0.9 / 0.95], abs=1e-5)
    assert found["gain"].tolist() == [0, 0, 0]


def test_the_top_half(backbone: Backbone) -> None:
    other = noise_pictures(1, (1, SIDE, SIDE))[0, 0]
    found = judge(ConfidenceDrop(percent=50, sign="none"), backbone, WEIGHTS, other, -WEIGHTS)
    wanted = [clamped(0.05 + top(h, 50)) for h in (WEIGHTS, other, -WEIGHTS)]
    assert found["shown"].tolist() == pytest.approx(wanted, abs=1e-5)


def test_a_negative_output_falls_too(backbone: Backbone) -> None:
    """A regression's value has a sign; its drop is relative to its size."""
    batch = batch_of(ONES, [0])
    batch = dataclasses.replace(batch, target=RegressionTarget("deviation", torch.zeros(1)))
    found = ConfidenceDrop(score="value")(backbone, batch, Attribution(torch.zeros(1, SIDE, SIDE), "score"))
    assert float(found["value"]) == pytest.approx((np.log(0.95) - np.log(0.05)) / -np.log(0.95), rel=1e-3)


@pytest.mark.parametrize("score", ["probability", "logit"])
def test_against_a_plain_loop(score: str) -> None:
    network, pictures, classes = small_net().eval().double(), noise_pictures(3), [0, 4, 2]
    heatmap = noise_pictures(3, (1, 32, 32), 4)[:, 0]
    metric = PixelRatio(percent=(10.0,), sigma=2.0, score=score)  # type: ignore[arg-type]
    found = metric(small_backbone(), batch_of(pictures, classes), Attribution(heatmap, "score"))
    blurred = gaussian_blur(pictures.double(), 2.0)
    for i in range(3):
        cut = sorted(heatmap[i].flatten().tolist())[-102]  # 10 % of 1024
        chosen = (heatmap[i] >= cut)[None]
        assert int(chosen.sum()) == 102
        for name, picture in (
            ("shown_10", torch.where(chosen, pictures[i].double(), blurred[i])),
            ("removed_10", torch.where(chosen, blurred[i], pictures[i].double())),
        ):
            with torch.no_grad():
                out = network(picture[None])[0]
            wanted = float((out.softmax(0) if score == "probability" else out)[classes[i]])
            assert float(found[name][i]) == pytest.approx(wanted, rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("percent", [(), (0.0,), (-1.0,), (101.0,), (6.0, 6.0)])
def test_percents_that_cannot_be(percent: tuple[float, ...]) -> None:
    with pytest.raises(UserError, match="percent is"):
        PixelRatio(percent=percent)


def test_drops_that_cannot_be() -> None:
    with pytest.raises(UserError, match="percent is 0"):
        ConfidenceDrop(percent=0)
    with pytest.raises(UserError, match="signed map is no mask"):
        ConfidenceDrop(sign="none")
    ConfidenceDrop(sign="none", percent=50)
