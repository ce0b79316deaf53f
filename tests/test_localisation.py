"""EHR, bbox, IoU and the pointing game: the papers' own examples, plain loops, extremes, ties."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np
import pytest
import scipy.ndimage
import torch
from networks import batch_of, noise_pictures
from torch import Tensor

from ibxai.errors import UserError
from ibxai.metrics import BoxShare, EffectiveHeatRatio, IoU, PointingGame
from ibxai.metrics.localisation import grown
from ibxai.thresholds import quantile
from ibxai.types import Attribution, Batch

SIDE = 20


def batch_with(planes: Tensor, ids: Sequence[str] | None = None) -> Batch:
    """planes: bool [B, R, H, W]."""
    rows = batch_of(torch.zeros(len(planes), 1, *planes.shape[-2:]), [0] * len(planes), ids)
    return dataclasses.replace(rows, regions={"target": planes})


def judge(metric, heatmap: Tensor, planes: Tensor, ids: Sequence[str] | None = None) -> list[float]:
    found = metric(None, batch_with(planes, ids), Attribution(heatmap, "score"))
    assert found["value"].dtype == torch.float32
    return found["value"].tolist()


def box(top: int, left: int, bottom: int, right: int, side: int = SIDE) -> Tensor:
    plane = torch.zeros(side, side, dtype=torch.bool)
    plane[top:bottom, left:right] = True
    return plane


def planes_of(*rows: Sequence[Tensor]) -> Tensor:
    most = max(len(row) for row in rows)
    empty = torch.zeros(SIDE, SIDE, dtype=torch.bool)
    return torch.stack([torch.stack([*row, *[empty] * (most - len(row))]) for row in rows])


MAPS = noise_pictures(3, (1, SIDE, SIDE))[:, 0].mul(4).round() / 4  # signed, with many ties
PLANES = planes_of([box(2, 3, 9, 12)], [box(0, 0, 4, 4), box(10, 10, 16, 15), box(11, 12, 19, 18)], [box(5, 5, 6, 6)])


# --- effective heat ratio

OBJECT = box(5, 5, 15, 15)  # a quarter of the picture, as in Fig. 11
FIG_11 = torch.stack(
    [torch.where(OBJECT, inside, outside) for inside, outside in ((1.0, 0.0), (1.0, 0.25), (0.25, 0.0))]
)


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({}, [1.0, 0.4375, 0.25]),  # printed as 1.0, 0.4, 0.2
        ({"scale": "max"}, [1.0, 0.4375, 1.0]),
        ({"floor": None}, [1.0, 0.4375, 0.25]),  # pixels of value 0 are never highlighted
        ({"floor": None, "sign": "none"}, [0.4375, 0.4375, 0.109375]),  # unless maps may be signed
        ({"floor": 0.3}, [1.0, 1.0, 0.0]),
        ({"ratio": "pixel_share"}, [1.0, 0.4375, 1.0]),
        ({"ratio": "heat_share"}, [1.0, (4 / 7) * 0.75 + 0.25, 1.0]),
    ],
)
def test_the_papers_figure_11(settings: dict, wanted: list[float]) -> None:
    """Of eleven quantiles eight are the value outside: 0 ... 0.7. Then come three of 1."""
    assert judge(EffectiveHeatRatio(**settings), FIG_11, OBJECT.expand(3, 1, -1, -1)) == pytest.approx(wanted, abs=1e-6)


def test_the_figure_as_it_is_printed() -> None:
    found = judge(EffectiveHeatRatio(), FIG_11, OBJECT.expand(3, 1, -1, -1))
    assert [f"{value:.1f}" for value in found] == ["1.0", "0.4", "0.2"]
    assert judge(BoxShare(), FIG_11, OBJECT.expand(3, 1, -1, -1)) == [1.0, 1.0, 1.0]  # which its box metric cannot tell


def plain_ratio(heatmap: np.ndarray, region: np.ndarray, metric: EffectiveHeatRatio) -> float:
    """One threshold, one pixel at a time, in float64."""
    values = heatmap.astype(np.float64).ravel()
    values = {"none": values, "abs": abs(values), "positive": np.maximum(values, 0)}[metric.sign]
    if metric.scale == "max":
        values = values / values.max()
    ratios = []
    for level in np.linspace(0, 1, metric.quantiles):
        least = np.quantile(values, level)
        least = least if metric.floor is None else max(least, metric.floor)
        chosen = [i for i, v in enumerate(values) if v >= least and not (metric.sign != "none" and v == 0)]
        inside = [i for i in chosen if region.ravel()[i]]
        if metric.ratio == "pixel_share":
            part, over = len(inside), len(chosen)
        else:
            part = sum(values[i] for i in inside)
            over = len(chosen) if metric.ratio == "heat_per_pixel" else sum(values[i] for i in chosen)
        ratios.append(part / over if over else 0.0)
    step = 1 / (metric.quantiles - 1)
    return sum((a + b) / 2 * step for a, b in itertools.pairwise(ratios))


@pytest.mark.parametrize(
    "metric",
    [
        EffectiveHeatRatio(),
        EffectiveHeatRatio(floor=None, quantiles=7),
        EffectiveHeatRatio(floor=None, sign="none", quantiles=30),
        EffectiveHeatRatio(scale="max", sign="abs"),
        EffectiveHeatRatio(ratio="heat_share", floor=0.4),
        EffectiveHeatRatio(ratio="pixel_share", scale="max", quantiles=2),
    ],
)
def test_ehr_against_a_loop(metric: EffectiveHeatRatio) -> None:
    wanted = [plain_ratio(m.numpy(), p.any(0).numpy(), metric) for m, p in zip(MAPS, PLANES, strict=True)]
    assert np.std(wanted) > 0.01
    np.testing.assert_allclose(judge(metric, MAPS, PLANES), wanted, rtol=1e-5)


def test_ehr_of_maps_without_effective_heat() -> None:
    """Below 0.1 everywhere there is none; scaled by the maximum there is."""
    shown = torch.stack([torch.where(OBJECT, 0.09, 0.0), torch.zeros(SIDE, SIDE), -torch.ones(SIDE, SIDE)])
    planes = OBJECT.expand(3, 1, -1, -1)
    assert judge(EffectiveHeatRatio(), shown, planes) == [0, 0, 0]
    assert judge(EffectiveHeatRatio(scale="max"), shown, planes) == pytest.approx([1, 0, 0], abs=1e-6)
    assert judge(EffectiveHeatRatio(scale="max", sign="none"), shown, planes) == pytest.approx([1, 0, 0], abs=1e-6)
    assert judge(EffectiveHeatRatio(scale="max", sign="abs"), shown, planes) == pytest.approx([1, 0, 0.25], abs=1e-6)


@pytest.mark.parametrize("metric", [EffectiveHeatRatio(), BoxShare()])
def test_large_regions_are_left_out(metric) -> None:
    """The union counts: 132 of 400 pixels are a share of 0.33, 133 are more."""
    planes = planes_of([box(0, 0, 6, 20), box(0, 0, 7, 12)], [box(0, 0, 6, 20), box(0, 0, 7, 13)])
    assert planes.any(1).sum((1, 2)).tolist() == [132, 133]
    shown = torch.rand(2, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    found = np.isnan(judge(metric, shown, planes))
    assert found.tolist() == [False, True]
    assert not np.isnan(judge(dataclasses.replace(metric, largest=1.0), shown, planes)).any()


# --- bbox


def test_bbox_in_closed_form() -> None:
    region = planes_of([box(4, 4, 8, 9)], [box(4, 4, 8, 9)], [box(4, 4, 8, 9)], [box(4, 4, 8, 9), box(0, 0, 5, 4)])
    inside = region.any(1).float()
    noise = 0.5 * torch.rand(4, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    shown = inside + noise
    shown[1] = -shown[1]
    shown[2].view(-1)[(inside[2].flatten() == 0).nonzero()[:5, 0]] += 9  # five of twenty go elsewhere
    assert judge(BoxShare(), shown, region) == pytest.approx([1, 0, 0.75, 1])
    assert judge(BoxShare(sign="abs"), shown, region)[1] == 1.0


def test_bbox_of_a_constant_map_is_chance() -> None:
    """Not what a scan from the top left would give, which is all or nothing for these boxes."""
    rows = 400
    region = box(0, 0, 5, 20).expand(rows, 1, -1, -1)
    found = np.array(judge(BoxShare(), torch.full((rows, SIDE, SIDE), 0.7), region, [f"id{i}" for i in range(rows)]))
    deviation = np.sqrt(0.25 * 0.75 / 100 * 300 / 399)  # hypergeometric
    assert abs(found.mean() - 0.25) < 4 * deviation / np.sqrt(rows)
    assert 0.8 * deviation < found.std() < 1.2 * deviation


# --- IoU


def plain_iou(chosen: np.ndarray, region: np.ndarray) -> float:
    return (chosen & region).sum() / (chosen | region).sum()


def plain_otsu(values: np.ndarray) -> float:
    """The least value of the upper class, by trying every split between two different values."""
    splits = [(values < least, least) for least in np.unique(values)[1:]]
    return max(splits, key=lambda s: s[0].mean() * (~s[0]).mean() * (values[s[0]].mean() - values[~s[0]].mean()) ** 2)[
        1
    ]


def plain_masks(heatmap: np.ndarray, metric: IoU) -> list[np.ndarray]:
    values = {"none": heatmap, "abs": abs(heatmap), "positive": np.maximum(heatmap, 0)}[metric.sign].astype(np.float64)
    least: Sequence[float] = {
        "fixed": lambda: [metric.level * values.max()],
        "quantile": lambda: [np.quantile(values, metric.level)],
        "mean_std": lambda: [values.mean() + metric.level * values.std()],
        "otsu": lambda: [plain_otsu(values)],
        "best": lambda: [0.02 * i * values.max() for i in range(50)],
    }[metric.rule]()
    return [(values >= limit - 1e-12) & ((values != 0) | (metric.sign == "none")) for limit in least]


@pytest.mark.parametrize("per", ["union", "plane"])
@pytest.mark.parametrize("sign", ["positive", "abs", "none"])
@pytest.mark.parametrize(
    ("rule", "level"),
    [("fixed", 0.5), ("fixed", 0.0), ("quantile", 0.8), ("mean_std", 0.7), ("otsu", 0.5), ("best", 0.5)],
)
def test_iou_against_a_loop(rule: str, level: float, sign: str, per: str) -> None:
    metric = IoU(rule=rule, level=level, sign=sign, per=per)  # type: ignore[arg-type]
    found = metric(None, batch_with(PLANES), Attribution(MAPS, "score"))  # type: ignore[arg-type]
    for i, (heatmap, planes) in enumerate(zip(MAPS.numpy(), PLANES.numpy(), strict=True)):
        regions = [planes.any(0)] if per == "union" else [plane for plane in planes if plane.any()]
        masks = plain_masks(heatmap, metric)
        curve = [np.mean([plain_iou(mask, region) for region in regions]) for mask in masks]
        assert float(found["value"][i]) == pytest.approx(max(curve), rel=1e-5)
        if rule == "best":
            np.testing.assert_allclose(found["curve"][i].numpy(), curve, rtol=1e-5)
            np.testing.assert_allclose(found["fraction"][i].numpy(), np.arange(50) / 50, rtol=1e-6)
    assert ("curve" in found) == (rule == "best")


@pytest.mark.parametrize("rule", ["fixed", "quantile", "mean_std", "otsu", "best"])
def test_iou_of_known_maps(rule: str) -> None:
    """The region itself, all but the region, everything alike, nothing, and evidence against everywhere."""
    region = box(4, 4, 12, 14)
    shown = torch.stack([region.float(), (~region).float(), torch.full_like(region, 0.3, dtype=torch.float32)])
    shown = torch.cat([shown, torch.zeros(1, SIDE, SIDE), -torch.ones(1, SIDE, SIDE)])
    found = judge(IoU(rule=rule, level=0.9), shown, region.expand(5, 1, -1, -1))  # type: ignore[arg-type]
    assert found == pytest.approx([1, 0, 80 / 400, 0, 0])


@pytest.mark.parametrize("rule", ["fixed", "best"])
def test_iou_of_a_map_without_a_positive_value(rule: str) -> None:
    """Half of a negative maximum is less than the maximum: everything would be highlighted."""
    region = box(4, 4, 12, 14).expand(2, 1, -1, -1)
    shown = torch.stack([-1 - torch.rand(SIDE, SIDE, generator=torch.Generator().manual_seed(0)), torch.zeros(20, 20)])
    assert judge(IoU(rule=rule, sign="none"), shown, region) == [0, 0]  # type: ignore[arg-type]


def test_the_deviation_is_that_of_the_picture() -> None:
    """Not one estimated for a population: a single pixel of 400 lies 19.97 deviations above the mean, or 19.95."""
    shown = torch.zeros(1, SIDE, SIDE)
    shown[0, 5, 5] = 1
    level = 0.9995 * (1 - 1 / 400) / float(shown.double().flatten().numpy().std())
    assert judge(IoU(rule="mean_std", level=level), shown, box(5, 5, 6, 6).expand(1, 1, -1, -1)) == [1]


def test_iou_of_six_regions() -> None:
    """Marking two of six regions perfectly is a mean of 1/6 + 1/6, and 1/3 of their union."""
    six = [box(6 * (i // 2), 10 * (i % 2), 6 * (i // 2) + 6, 10 * (i % 2) + 10) for i in range(6)]
    shown = (six[1] | six[4]).float()[None]
    assert judge(IoU(per="plane"), shown, planes_of(six)) == pytest.approx([2 * (1 / 2) / 6])
    assert judge(IoU(), shown, planes_of(six)) == pytest.approx([1 / 3])
    assert judge(IoU(per="plane"), six[1].float()[None], planes_of(six)) == pytest.approx([1 / 6])


# --- pointing game


def test_pointing_game() -> None:
    """3-4-5: a point five pixels away hits with a tolerance of 5, and not with 4."""
    shown = torch.zeros(5, SIDE, SIDE)
    for row, place in enumerate([(4, 4), (11, 13), (11, 14), (0, 0), (19, 19)]):
        shown[row][place] = 1
    region = box(2, 2, 9, 10).expand(5, 1, -1, -1)  # its corner is (8, 9)
    assert judge(PointingGame(tolerance=0), shown, region) == [1, 0, 0, 0, 0]
    assert judge(PointingGame(tolerance=4), shown, region) == [1, 0, 0, 1, 0]
    assert judge(PointingGame(tolerance=5), shown, region) == [1, 1, 0, 1, 0]
    assert judge(PointingGame(tolerance=6), shown, region) == [1, 1, 1, 1, 0]
    assert judge(PointingGame(tolerance=60), shown, region) == [1, 1, 1, 1, 1]
    assert judge(PointingGame(tolerance=0, sign="abs"), -shown, region) == [1, 0, 0, 0, 0]


def test_several_maxima_count_by_their_share() -> None:
    shown = torch.zeros(3, SIDE, SIDE)
    shown[0, 3, [3, 4, 5, 17]] = 2
    region = box(2, 2, 9, 10).expand(3, 1, -1, -1)
    shown[1] = -4
    assert judge(PointingGame(tolerance=0), shown, region) == pytest.approx([0.75, 56 / 400, 56 / 400])


@pytest.mark.parametrize("radius", [0, 1, 2, 7, 30])
def test_growing_is_a_matter_of_distance(radius: int) -> None:
    region = PLANES.any(1)
    wanted = [scipy.ndimage.distance_transform_edt(~plane.numpy()) <= radius for plane in region]
    assert np.array_equal(grown(region, radius).numpy(), np.stack(wanted))


# --- what they share


def test_quantiles_are_numpys() -> None:
    levels = [0.0, 0.1, 1 / 3, 0.5, 0.97, 1.0]
    values = torch.randn(3, 41, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = quantile(values, torch.tensor(levels, dtype=torch.float64))
    np.testing.assert_allclose(found.numpy(), np.quantile(values.numpy(), levels, axis=1).T, rtol=1e-12)


@pytest.mark.parametrize("metric", [EffectiveHeatRatio(), BoxShare(), IoU(), IoU(rule="best"), PointingGame()])
def test_another_region_by_name(metric) -> None:
    batch = batch_with(PLANES[:, :1])
    batch = dataclasses.replace(batch, regions={"target": ~PLANES[:, :1], "lungs": PLANES[:, :1]})
    found = dataclasses.replace(metric, region="lungs")(None, batch, Attribution(MAPS, "score"))["value"]
    wanted = judge(metric, MAPS, PLANES[:, :1])
    assert found.tolist() == pytest.approx(wanted, nan_ok=True)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: EffectiveHeatRatio(quantiles=1), "2 quantiles or more"),
        (lambda: EffectiveHeatRatio(scale="min"), "no scale 'min'"),  # type: ignore[arg-type]
        (lambda: EffectiveHeatRatio(ratio="heat"), "no ratio 'heat'.*heat_share"),  # type: ignore[arg-type]
        (lambda: EffectiveHeatRatio(largest=33), "largest is 33"),
        (lambda: BoxShare(largest=-0.1), "largest is -0.1"),
        (lambda: IoU(rule="otsus"), "no threshold rule 'otsus'.*otsu"),  # type: ignore[arg-type]
        (lambda: IoU(per="box"), "not of 'box'"),  # type: ignore[arg-type]
        (lambda: IoU(rule="fixed", level=50), "level is 50"),
        (lambda: PointingGame(tolerance=-1), "tolerance is -1"),
    ],
)
def test_settings_that_cannot_be(make, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make()
