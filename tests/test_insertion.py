"""Insertion and deletion: curves known in closed form, extremes, ties, and a slow loop over pixels in float64."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import scipy.ndimage
import torch
from networks import batch_of, noise_pictures, relative, small_backbone, small_net
from omegaconf import OmegaConf
from torch import Tensor, nn

from ibxai.backbones import Backbone, freeze
from ibxai.catalogue import entries
from ibxai.config import build
from ibxai.errors import UserError
from ibxai.metrics import Deletion, Insertion
from ibxai.metrics.insertion import changed_counts, pixel_ranks
from ibxai.preprocessing import Preprocessing
from ibxai.targets import RegressionTarget
from ibxai.types import Attribution

SIDE = 6
PIXELS = SIDE * SIDE


class Kept(nn.Module):
    """p(class 0) = 0.05 + sum of weight_i x_i, exactly: a picture of ones has 0.95, the weights sum to 0.9."""

    def __init__(self) -> None:
        super().__init__()
        weights = torch.randperm(PIXELS, generator=torch.Generator().manual_seed(0)).float() + 1
        self.weight = nn.Parameter((0.9 * weights / weights.sum()).view(1, 1, SIDE, SIDE))

    def forward(self, x: Tensor) -> Tensor:
        p = (0.05 + (x * self.weight).sum((1, 2, 3))).clamp(1e-6, 1 - 1e-6)
        return torch.stack([p.log(), (-p).log1p()], 1)


@pytest.fixture(scope="module")
def kept() -> Backbone:
    return freeze(Kept(), (1, SIDE, SIDE), name="kept")


WEIGHTS = Kept().weight.detach()[0, 0]
ONES = torch.ones(1, 1, SIDE, SIDE)


def judge(metric, backbone: Backbone, heatmaps: Tensor, ids: Sequence[str] | None = None, pictures: Tensor = ONES):
    pictures = pictures.expand(len(heatmaps), -1, -1, -1) if len(pictures) == 1 else pictures
    batch = batch_of(pictures, [0] * len(heatmaps), ids)
    return metric(backbone, batch, Attribution(heatmaps, "score"))


def expected_curve(order: np.ndarray, counts: Sequence[int], inserting: bool) -> np.ndarray:
    """order: pixels, most important first."""
    sums = np.concatenate([[0], np.cumsum(WEIGHTS.double().numpy().flatten()[order])])[list(counts)]
    return 0.05 + sums if inserting else 0.95 - sums


def plain_area(curve: np.ndarray, counts: Sequence[int], pixels: int = PIXELS) -> float:
    return sum((curve[i] + curve[i + 1]) / 2 * (counts[i + 1] - counts[i]) / pixels for i in range(len(counts) - 1))


@pytest.mark.parametrize("metric", [Insertion, Deletion])
@pytest.mark.parametrize(
    ("step", "counts"),
    [
        (1, list(range(37))),
        (7, [0, 7, 14, 21, 28, 35, 36]),  # whatever the last step leaves over
        (9, [0, 9, 18, 27, 36]),
        (0.25, [0, 9, 18, 27, 36]),
        (0.3, [0, 11, 22, 32, 36]),  # 10.8 pixels a step, rounded
        (36, [0, 36]),
        (1000, [0, 36]),
        (0.999, [0, 36]),
        (0.001, list(range(37))),
    ],
)
def test_curve_and_area_in_closed_form(metric, step: float, counts: list[int], kept: Backbone) -> None:
    heatmap = torch.rand(SIDE, SIDE, generator=torch.Generator().manual_seed(3))
    order = heatmap.flatten().argsort(descending=True).numpy()
    inserting = metric is Insertion
    found = judge(metric(step=step, baseline="constant"), kept, heatmap[None])
    wanted = expected_curve(order, counts, inserting)
    np.testing.assert_allclose(found["fraction"][0].numpy(), np.array(counts) / PIXELS, rtol=1e-6)
    np.testing.assert_allclose(found["curve"][0].numpy(), wanted, rtol=1e-5)
    assert found["auc"].shape == (1,)
    assert float(found["auc"][0]) == pytest.approx(plain_area(wanted, counts), rel=1e-5)
    ends = [0.05, 0.95] if inserting else [0.95, 0.05]
    np.testing.assert_allclose(found["curve"][0, [0, -1]].numpy(), ends, rtol=1e-5)


def test_known_extremes(kept: Backbone) -> None:
    """The weights themselves are the best order and their negative the worst; random ones are in between."""
    generator = torch.Generator().manual_seed(4)
    others = [torch.rand(SIDE, SIDE, generator=generator) for _ in range(30)]
    almost = WEIGHTS + 0.3 * WEIGHTS.mean() * torch.randn(SIDE, SIDE, generator=generator)
    heatmaps = torch.stack([WEIGHTS, -WEIGHTS, almost, *others])
    for metric, sign in [(Insertion(step=1, baseline="constant"), 1), (Deletion(step=1, baseline="constant"), -1)]:
        areas = sign * judge(metric, kept, heatmaps)["auc"]
        assert metric.higher_is_better == (sign == 1)
        assert (areas[0] > areas[2:]).all()
        assert (areas[1] < areas[2:]).all()
        assert (areas[2] > areas[3:]).all()
    # any rising function of the map is the same map
    for same in (WEIGHTS.exp() * 1e6, WEIGHTS - 5):
        assert torch.equal(
            judge(Deletion(step=1, baseline="constant"), kept, same[None])["auc"],
            judge(Deletion(step=1, baseline="constant"), kept, heatmaps[:1])["auc"],
        )


@pytest.mark.parametrize("value", [0.0, 3.0, -1.0])
def test_a_constant_map_is_a_random_order(value: float, kept: Backbone) -> None:
    """On average over samples p rises as the straight line from 0.05 to 0.95: an area of one half."""
    samples = 600
    heatmaps = torch.full((samples, SIDE, SIDE), value)
    found = judge(Insertion(step=1, baseline="constant"), kept, heatmaps, [f"id{i}" for i in range(samples)])
    areas = found["auc"].double()
    assert areas.isfinite().all()
    assert areas.std() > 0.01
    assert abs(areas.mean() - 0.5) < 5 * areas.std() / math.sqrt(samples)
    line = 0.05 + 0.9 * torch.arange(37) / 36
    assert (found["curve"].mean(0) - line).abs().max() < 5 * found["curve"].std(0).max() / math.sqrt(samples)


def test_ties_are_broken_by_the_sample_not_by_the_position(kept: Backbone) -> None:
    heatmaps = torch.zeros(3, SIDE, SIDE)
    metric = Insertion(step=1, baseline="constant")
    found = judge(metric, kept, heatmaps, ["a", "b", "a"])["curve"]
    assert torch.equal(found[0], found[2])
    assert not torch.allclose(found[0], found[1])
    scan = torch.from_numpy(expected_curve(np.arange(PIXELS), range(37), True))
    for row in found:
        assert not torch.allclose(row.double(), scan)
        assert not torch.allclose(
            row.double(), torch.from_numpy(expected_curve(np.arange(PIXELS)[::-1], range(37), True))
        )
    # where the map does say something, ties play no part: the left half first, in whatever order
    half = torch.zeros(2, SIDE, SIDE)
    half[:, :, :3] = 1
    curves = judge(metric, kept, half, ["a", "b"])["curve"]
    assert not torch.allclose(curves[0], curves[1])
    assert curves[:, 18].tolist() == pytest.approx([0.05 + float(WEIGHTS[:, :3].sum())] * 2, rel=1e-5)


def test_minus_zero_ties_with_zero() -> None:
    zeros = torch.zeros(1, 4, 4)
    signed = zeros.clone()
    signed[0, :2] = -0.0
    assert torch.equal(pixel_ranks(signed, ("a",)), pixel_ranks(zeros, ("a",)))


def test_ranks_are_a_permutation_from_the_highest_value_on() -> None:
    heatmaps = torch.rand(5, 7, 9, generator=torch.Generator().manual_seed(0)).mul(4).round()  # five values, many ties
    ranks = pixel_ranks(heatmaps, tuple("abcde"))
    assert torch.equal(ranks.sort(1).values, torch.arange(63).expand(5, 63))
    for row, rank in zip(heatmaps.flatten(1), ranks, strict=True):
        by_rank = torch.empty(63)
        by_rank[rank] = row
        assert (by_rank.diff() <= 0).all()


def test_nan_stays_with_its_sample_and_infinity_is_an_order(kept: Backbone) -> None:
    heatmaps = WEIGHTS.repeat(4, 1, 1).clone()
    heatmaps[1, 2, 2] = torch.nan
    best, worst = int(WEIGHTS.argmax()), int(WEIGHTS.argmin())
    heatmaps[2].view(-1)[best] = torch.inf
    heatmaps[2].view(-1)[worst] = -torch.inf
    heatmaps[3] = torch.nan
    ids = ["a", "b", "c", "d"]
    for metric in (Insertion(step=5, baseline="constant"), Deletion(step=5, baseline="constant")):
        found = judge(metric, kept, heatmaps, ids)
        for row in (1, 3):
            assert found["auc"][row].isnan()
            assert found["curve"][row].isnan().all()
        alone = judge(metric, kept, WEIGHTS[None], ["a"])
        for row in (0, 2):
            torch.testing.assert_close(found["curve"][row], alone["curve"][0], rtol=1e-6, atol=1e-7)
            torch.testing.assert_close(found["auc"][row], alone["auc"][0], rtol=1e-6, atol=1e-7)
        assert found["fraction"].isfinite().all()


# --- a small convolutional network, pixel by pixel


def plain_curve(
    metric, pictures: Tensor, classes: Sequence[int], heatmaps: Tensor, counts: Sequence[int]
) -> np.ndarray:
    """[B, S] in float64: one picture, one step, one pixel at a time."""
    network = small_net().eval().double()
    inserting = isinstance(metric, Insertion)
    curves = []
    for picture, target, heatmap in zip(pictures.double().numpy(), classes, heatmaps.numpy(), strict=True):
        if metric.baseline == "blur":
            radius = math.ceil(3 * metric.sigma)
            baseline = scipy.ndimage.gaussian_filter(picture, metric.sigma, mode="mirror", radius=radius, axes=(1, 2))
        else:
            baseline = np.full_like(picture, metric.value)
        order = sorted(np.ndindex(*heatmap.shape), key=lambda place: -heatmap[place])
        curve = []
        for count in counts:
            now = (baseline if inserting else picture).copy()
            for row, column in order[:count]:
                now[:, row, column] = (picture if inserting else baseline)[:, row, column]
            with torch.no_grad():
                logits = network(torch.from_numpy(now)[None])[0].numpy()
            shifted = np.exp(logits - logits.max())
            curve.append(logits[target] if metric.score == "logit" else (shifted / shifted.sum())[target])
        curves.append(curve)
    return np.array(curves)


CASES = [
    Insertion(step=100, sigma=3.0),
    Deletion(step=0.13, baseline="constant"),
    Deletion(step=200, baseline="blur", sigma=2.0),
    Insertion(step=0.2, baseline="constant", value=-0.8, score="logit"),
]


@pytest.mark.parametrize("metric", CASES)
def test_against_a_loop_over_pixels(metric) -> None:
    pictures, classes = noise_pictures(3), [0, 4, 2]
    heatmaps = noise_pictures(3, (1, 32, 32), seed=9)[:, 0] + torch.linspace(0, 1, 1024).view(32, 32)
    counts = changed_counts(1024, metric.step).tolist()
    found = metric(small_backbone(), batch_of(pictures, classes), Attribution(heatmaps, "score"))
    wanted = plain_curve(metric, pictures, classes, heatmaps, counts)
    scale = np.ptp(wanted)
    assert scale > 0.05
    np.testing.assert_allclose(found["curve"].numpy(), wanted, rtol=0, atol=1e-4 * scale)
    areas = [plain_area(curve, counts, 1024) for curve in wanted]
    np.testing.assert_allclose(found["auc"].numpy(), areas, rtol=0, atol=1e-4 * scale)


@pytest.mark.parametrize("metric", CASES)
def test_the_curve_starts_and_ends_with_the_plain_scores(metric) -> None:
    pictures, backbone = noise_pictures(3), small_backbone()
    batch = batch_of(pictures, [0, 4, 2])
    found = metric(backbone, batch, Attribution(pictures[:, 0], "score"))["curve"]
    whole = batch.target.score(backbone(pictures), metric.score)
    place = -1 if isinstance(metric, Insertion) else 0
    torch.testing.assert_close(found[:, place], whole, rtol=1e-4, atol=1e-5)


def test_batches_order_and_max_passes_change_nothing() -> None:
    pictures, classes = noise_pictures(5), [0, 4, 2, 1, 3]
    heatmaps = pictures.mean(1).mul(2).round()  # with ties
    batch, attribution = batch_of(pictures, classes), Attribution(heatmaps, "score")
    metric = Insertion(step=0.1, sigma=3.0)
    whole = metric(small_backbone(), batch, attribution)
    order = [3, 0, 4, 1, 2]
    other = metric(small_backbone(), batch.take(order), attribution.take(order))
    for name in whole:
        assert relative(other[name], whole[name][order]) < 1e-5
    for i in (0, 4):
        alone = metric(small_backbone(), batch.take([i]), attribution.take([i]))
        assert relative(alone["curve"][0], whole["curve"][i]) < 1e-5
        assert relative(alone["auc"], whole["auc"][i : i + 1]) < 1e-5
    for most in (1, 7, 12, 1000):
        found = metric(small_backbone(max_passes=most), batch, attribution)
        assert relative(found["curve"], whole["curve"]) < 1e-5
        assert relative(found["auc"], whole["auc"]) < 1e-5


@pytest.mark.parametrize("most", [4, 8])
def test_no_more_rows_at_once_than_allowed(most: int) -> None:
    """And each picture once a point of its curve."""
    backbone = small_backbone(max_passes=most)
    seen: list[int] = []
    handle = backbone._network.register_forward_hook(lambda module, args, out: seen.append(len(args[0])))
    with torch.no_grad():
        Deletion(step=0.1, baseline="constant")(
            backbone, batch_of(noise_pictures(4), [0] * 4), Attribution(torch.rand(4, 32, 32), "score")
        )
    handle.remove()
    assert max(seen) <= most
    assert sum(seen) == 4 * 11


def test_nothing_is_left_behind() -> None:
    backbone, pictures = small_backbone(), noise_pictures(2)
    heatmaps, state = pictures[:, 0].clone(), torch.get_rng_state()
    batch = batch_of(pictures.clone(), [0, 1])
    found = Insertion(step=0.2)(backbone, batch, Attribution(heatmaps, "score"))
    assert not found["curve"].requires_grad
    assert torch.equal(batch.inputs, pictures)
    assert torch.equal(heatmaps, pictures[:, 0])
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("metric", [Insertion, Deletion])
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"step": 0}, "step of .* is 0: it must be above 0"),
        ({"step": -0.1}, "step of .* is -0.1"),
        ({"baseline": "blurr"}, r"no baseline 'blurr'.*blur"),
        ({"score": "propability"}, r"no score 'propability'.*probability"),
        ({"baseline": "blur", "sigma": 0.0}, r"sigma is 0\.0"),
        ({"baseline": "blur", "sigma": -1.0}, r"sigma is -1\.0"),
    ],
)
def test_settings_that_cannot_be(metric, settings: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        metric(**settings)


def test_sigma_does_not_matter_without_a_blur() -> None:
    Deletion(sigma=0.0, baseline="constant")


# --- the YAMLs


@pytest.mark.parametrize("name", [n for n in entries()["metric"] if n.startswith(("insertion", "deletion"))])
def test_every_metrics_yaml_builds_and_judges(name: str, tmp_path: Path) -> None:
    text = entries()["metric"][name].text
    nodes = OmegaConf.to_container(OmegaConf.create(text), resolve=True)
    assert list(nodes) == [name]
    metric = build(nodes[name], f"metric.{name}")
    pictures = noise_pictures(3)
    batch = batch_of(pictures, [0, 1, 2])
    if name.endswith("regression"):
        batch = dataclasses.replace(batch, target=RegressionTarget("deviation", torch.zeros(3)))
    found = metric(small_backbone(), batch, Attribution(pictures.mean(1), "score"))
    assert found
    for value in found.values():
        assert len(value) == 3
        assert value.dim() in (1, 2)
        assert value.isfinite().all()
    assert any(value.dim() == 1 for value in found.values())
    assert isinstance(metric.version, int)


def test_black_is_the_value_of_a_black_pixel() -> None:
    """A network that sums its normalised inputs: deletion ends at the sum of a black picture."""
    sums = freeze(Sums(), name="sums", preprocessing=Preprocessing(SIDE, SIDE, (0.5, 0.25), (0.5, 0.125)))
    picture = torch.rand(1, 2, SIDE, SIDE)
    found = judge(Deletion(1, "constant", value="black", score="logit"), sums, torch.rand(1, SIDE, SIDE), None, picture)
    assert found["curve"][0, -1].item() == pytest.approx(PIXELS * (-0.5 / 0.5 - 0.25 / 0.125), rel=1e-5)
    assert found["curve"][0, 0].item() == pytest.approx(picture.sum().item(), rel=1e-5)


def test_change_is_the_way_from_the_start_in_either_direction() -> None:
    sums = freeze(Sums(), (2, SIDE, SIDE), name="sums")
    picture = torch.rand(1, 2, SIDE, SIDE) * torch.tensor([1.0, -1.0]).view(1, 2, 1, 1)
    heatmap = torch.rand(1, SIDE, SIDE)
    for metric in (Deletion, Insertion):
        plain = judge(metric(1, "constant", score="logit"), sums, heatmap, None, picture)["curve"]
        found = judge(metric(1, "constant", score="logit", change=True), sums, heatmap, None, picture)
        torch.testing.assert_close(found["curve"], (plain - plain[:, :1]).abs())
        assert metric(change=True).higher_is_better
    assert not Deletion().higher_is_better


@pytest.mark.parametrize("inserting", [True, False])
def test_cells_of_a_grid_against_a_loop(inserting: bool) -> None:
    """A 4 x 4 grid over 32 x 32 pixels: cells are ranked by their mean, and their mask is spread bilinearly."""
    backbone, pictures, heatmaps = small_backbone(), noise_pictures(2), torch.rand(2, 32, 32)
    metric = (Insertion if inserting else Deletion)(1, "constant", value=0.2, resolution=4)
    found = judge(metric, backbone, heatmaps, None, pictures)["curve"]
    assert found.shape == (2, 17)
    means = heatmaps.view(2, 4, 8, 4, 8).mean((2, 4)).flatten(1)
    for row in range(2):
        order = means[row].argsort(descending=True).tolist()
        for count in (0, 1, 5, 16):
            cells = torch.zeros(16)
            cells[order[:count]] = 1
            share = plain_bilinear(cells.view(4, 4), 32)
            share = share if inserting else 1 - share
            mixed = share * pictures[row] + (1 - share) * 0.2
            wanted = backbone(mixed[None]).softmax(1)[0, 0]
            assert found[row, count].item() == pytest.approx(wanted.item(), abs=1e-5)


def plain_bilinear(cells: Tensor, side: int) -> Tensor:
    """Each pixel's centre between the four nearest centres of cells, clamped at the border."""
    scale, last = side / len(cells), len(cells) - 1
    out = torch.zeros(side, side)
    for y, x in itertools.product(range(side), repeat=2):
        v, u = (max((place + 0.5) / scale - 0.5, 0) for place in (y, x))
        top, left = min(int(v), last), min(int(u), last)
        bottom, right = min(top + 1, last), min(left + 1, last)
        a, b = v - top, u - left
        upper = (1 - b) * cells[top, left] + b * cells[top, right]
        out[y, x] = (1 - a) * upper + a * ((1 - b) * cells[bottom, left] + b * cells[bottom, right])
    return out


class Sums(nn.Module):
    """One output: the sum of all inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return (self.weight * x.sum((1, 2, 3)))[:, None]
