"""Lesions: planted pieces with known pairs, a flood fill and a search over all pairings as the slow oracle."""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from networks import batch_of, small_backbone
from PIL import Image
from test_severity import Red, Scans
from test_training import TINY
from torch import Tensor

from ibxai.errors import UserError
from ibxai.metrics.lesions import Lesions
from ibxai.pipeline import Plan, run
from ibxai.store import RunStore
from ibxai.targets import Classes
from ibxai.thresholds import RULES, cut
from ibxai.types import Attribution, Batch, Picture, Sample

METRIC = Lesions(rule="absolute", level=0.5, smallest=0.0, overlap=0.25, within=None)
Rectangle = tuple[int, int, int, int]  # top, left, bottom, right, the last two outside


def plane(*rectangles: Rectangle, size: int = 32) -> Tensor:
    pixels = torch.zeros(size, size)
    for top, left, bottom, right in rectangles:
        pixels[top:bottom, left:right] = 1
    return pixels


def judged(metric: Lesions, heatmap: Tensor, regions: dict[str, Tensor]) -> dict[str, Tensor]:
    batch = batch_of(torch.zeros(len(heatmap), 3, *heatmap.shape[1:]), [0] * len(heatmap))
    named = {name: planes.bool() for name, planes in regions.items()}
    return dict(metric(small_backbone(), dataclasses.replace(batch, regions=named), Attribution(heatmap, "score")))


def one(metric: Lesions, heatmap: Tensor, *planes: Tensor, **regions: Tensor) -> dict[str, float]:
    found = judged(metric, heatmap[None], {"target": torch.stack(planes)[None], **regions})
    return {name: float(value) for name, value in found.items()}


def test_counts_and_shares() -> None:
    """Two of three lesions are met, one of them by a piece that is too large; one detection is false."""
    truth = plane((2, 2, 6, 6), (10, 10, 14, 14), (20, 20, 24, 24))
    heat = plane((2, 2, 6, 6), (9, 9, 17, 17), (28, 2, 31, 5))
    found = one(METRIC, heat, truth)
    assert (found["detections"], found["lesions"], found["pairs"]) == (3, 3, 2)  # 16 of 64 pixels is 0.25: a pair
    assert found["precision"] == pytest.approx(2 / 3)
    assert found["recall"] == pytest.approx(2 / 3)
    assert found["value"] == pytest.approx(4 / 6)
    assert found["iou"] == pytest.approx(32 / (48 + 9 + 48))
    assert one(dataclasses.replace(METRIC, overlap=0.26), heat, truth)["pairs"] == 1
    assert one(dataclasses.replace(METRIC, smallest=10 / 1024), heat, truth)["detections"] == 2


def test_boxes_and_masks() -> None:
    """An L around a square: its box is the square's, its pixels are not."""
    corner = plane((4, 4, 12, 5), (11, 4, 12, 12))
    square = plane((4, 4, 12, 12))
    assert one(METRIC, corner, square)["pairs"] == 1
    masks = dataclasses.replace(METRIC, compare="masks")
    assert one(masks, corner, square)["pairs"] == 0
    assert one(dataclasses.replace(masks, overlap=15 / 64), corner, square)["pairs"] == 1


def test_boxes_on_planes_of_their_own_stay_apart() -> None:
    first, second = plane((4, 4, 12, 12)), plane((8, 8, 16, 16))
    assert one(METRIC, first, first, second)["lesions"] == 2
    assert one(METRIC, first, (first + second).clamp_max(1))["lesions"] == 1
    assert one(METRIC, first, first, torch.zeros_like(first), second)["lesions"] == 2


def test_pieces_that_touch_at_a_corner_are_one() -> None:
    touching = plane((4, 4, 8, 8), (8, 8, 12, 12))
    assert one(METRIC, touching, touching)["detections"] == 1
    apart = plane((4, 4, 8, 8), (9, 9, 13, 13))
    assert one(METRIC, apart, apart)["detections"] == 2


def test_the_pairing_is_the_largest() -> None:
    """One detection makes one pair; and where the best lesion of one is the only one of the other, both get theirs."""
    lesions = [plane((0, 2, 10, 12)), plane((0, 0, 10, 6))]
    first, second = (0, 0, 10, 10), (0, 11, 10, 20)
    metric = dataclasses.replace(METRIC, overlap=0.05)
    assert one(metric, plane(first), *lesions)["pairs"] == 1
    assert one(metric, plane(second), lesions[1])["pairs"] == 0
    assert one(metric, plane(first, second), *lesions)["pairs"] == 2  # by overlap, first would take lesions[0]


def test_heat_outside_the_lungs_does_not_count() -> None:
    lungs = plane((0, 0, 32, 16))[None, None]
    lesion, marker = plane((4, 4, 12, 12)), 100 * plane((4, 20, 12, 30))
    metric = dataclasses.replace(METRIC, within="lungs", rule="fixed")
    found = one(metric, lesion + marker, lesion, lungs=lungs)
    assert (found["value"], found["detections"], found["iou"]) == (1, 1, 1)
    assert one(dataclasses.replace(metric, within=None), lesion + marker, lesion)["value"] == 0


def test_rows_that_cannot_be_judged() -> None:
    lesion, nothing = plane((4, 4, 12, 12)), plane()
    heat = torch.stack([lesion, lesion, lesion, nothing, lesion])
    heat[4, 0, 0] = torch.nan
    regions = {"target": torch.stack([lesion, nothing, lesion, lesion, lesion])[:, None]}
    regions["lungs"] = torch.stack([lesion, lesion, nothing, lesion, lesion])[:, None]
    found = judged(dataclasses.replace(METRIC, within="lungs"), heat, regions)
    for name, values in found.items():
        assert values.isnan().tolist() == [False, True, True, False, True], name
    for name in ("value", "precision", "recall", "iou", "detections"):
        assert found[name][3] == 0, name  # nothing is detected, and there was something


@pytest.mark.parametrize("compare", ["boxes", "masks"])
def test_against_a_slow_derivation(compare: str) -> None:
    generator = torch.Generator().manual_seed(5)
    coarse = torch.rand(6, 6, 6, generator=generator).repeat_interleave(3, 1).repeat_interleave(3, 2)
    truth = torch.rand(6, 2, 6, 6, generator=generator).repeat_interleave(3, 2).repeat_interleave(3, 3) > 0.8
    metric = Lesions("absolute", 0.7, 10 / 18**2, 0.2, compare, None)  # type: ignore[arg-type]
    found = judged(metric, coarse, {"target": truth})
    pairs = []
    for row in range(6):
        detections = [piece for piece in pieces(coarse[row] >= 0.7) if len(piece) >= 10]
        lesions = [piece for p in truth[row] for piece in pieces(p)]
        assert found["detections"][row] == len(detections)
        assert found["lesions"][row] == len(lesions)
        pairs.append(most_pairs(detections, lesions, compare == "boxes"))
        assert found["pairs"][row] == pairs[-1]
    assert sum(pairs) > 3


def pieces(pixels: Tensor) -> list[set[tuple[int, int]]]:
    """A flood fill."""
    left, found = {(int(y), int(x)) for y, x in pixels.nonzero()}, []
    while left:
        edge, piece = [left.pop()], set()
        while edge:
            y, x = edge.pop()
            piece.add((y, x))
            near = {(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)} & left
            left -= near
            edge += near
        found.append(piece)
    return found


def most_pairs(detections: list[set[tuple[int, int]]], lesions: list[set[tuple[int, int]]], boxed: bool) -> int:
    """Over all ways to give each of the fewer one of the others."""
    fewer, more = sorted((detections, lesions), key=len)
    return max(
        sum(overlap(one, other, boxed) >= 0.2 for one, other in zip(fewer, order, strict=True))
        for order in itertools.permutations(more, len(fewer))
    )


def overlap(one: set[tuple[int, int]], other: set[tuple[int, int]], boxed: bool) -> float:
    if boxed:
        one, other = (
            set(itertools.product(*(range(min(p[i] for p in piece), max(p[i] for p in piece) + 1) for i in (0, 1))))
            for piece in (one, other)
        )
    return len(one & other) / len(one | other)


@pytest.mark.parametrize("rule", RULES)
def test_thresholds(rule: str) -> None:
    generator = torch.Generator().manual_seed(1)
    maps = torch.rand(3, 8, 8, generator=generator) * torch.tensor([1.0, 5.0, 0.0])[:, None, None]
    found = cut(maps, rule, 0.4)  # type: ignore[arg-type]
    if rule == "absolute":
        assert found.tolist() == pytest.approx([0.4] * 3)
    if rule == "fixed":
        wanted = [0.4 * float(maps[i].double().max()) for i in (0, 1)]
        assert found.tolist() == pytest.approx([*wanted, float("inf")])
    if rule == "mean_std":
        wanted = [float(m.mean() + 0.4 * ((m - m.mean()) ** 2).mean().sqrt()) for m in maps.double()]
        assert found.tolist() == pytest.approx(wanted)
    if rule == "quantile":
        assert found.tolist() == pytest.approx([float(m.double().flatten().quantile(0.4)) for m in maps])
    above = [(maps[i].double() >= found[i]).double().mean().item() for i in (0, 1)]
    assert all(0 < share < 1 for share in above), rule  # of every rule: a part of the map


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"rule": "otzu"}, "otzu"),
        ({"compare": "circles"}, "circles"),
        ({"overlap": 0.0}, "overlap is 0"),
        ({"smallest": 2.0}, "smallest 2"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, object], word: str) -> None:
    with pytest.raises(UserError, match=word):
        Lesions(**settings)  # type: ignore[arg-type]


def test_a_batch_has_rows_of_its_own() -> None:
    """Pieces at the same place in neighbouring rows are no piece of both."""
    lesion = plane((4, 4, 12, 12))
    batch: Batch = batch_of(torch.zeros(2, 3, 32, 32), [0, 0])
    regions = {"target": torch.stack([lesion, plane((20, 20, 24, 24))])[:, None].bool()}
    heat = Attribution(torch.stack([lesion, lesion]), "score")
    found = METRIC(small_backbone(), dataclasses.replace(batch, regions=regions), heat)
    assert found["pairs"].tolist() == [1, 0]
    assert found["detections"].tolist() == [1, 1]


def test_outlines_lie_around_what_they_are_of() -> None:
    lesion, heat = plane((4, 4, 12, 12)), plane((20, 20, 24, 24))
    batch = dataclasses.replace(batch_of(torch.zeros(1, 3, 32, 32), [0]), regions={"target": lesion[None, None].bool()})
    drawn = METRIC.outlines(batch, Attribution(heat[None], "score"))[0]
    assert drawn.dtype == torch.uint8
    wanted = 2 * (plane((3, 3, 13, 13)) - lesion) + plane((19, 19, 25, 25)) - heat
    assert torch.equal(drawn.float(), wanted)


def test_a_run_draws_them(tmp_path: Path) -> None:
    store = run_of(tmp_path, METRIC)
    [drawn] = (tmp_path / "outputs").glob("*/*/*/*/outlines")
    rows = store.rows()
    assert len(list(drawn.iterdir())) == 2  # of the rows that have a picture
    outline, overlay = store.read_outline(rows[0].row_id), drawn.parent / "overlays" / f"{rows[0].row_id}.png"
    assert outline is not None
    pixels = np.asarray(Image.open(overlay))
    for kind, colour in ((1, (0, 229, 255)), (2, (124, 252, 0))):
        assert (outline == kind).any()
        assert (pixels[outline == kind] == colour).all()
    assert "cyan: detected, green: annotated" in (drawn.parent / "report.html").read_text()


def run_of(folder: Path, metric: Lesions) -> RunStore:
    """Of the planted scans of test_severity.py, with lungs and a lesion that is another than what is hot."""
    plan = Plan(
        dataset=Annotated(),
        backbone=replace(TINY, weights="none", allow_random=True),
        method=Red(),
        method_name="red",
        metrics={"lesions": metric},
        target=Classes((1,)),
        settings={"seed": 0},
        seed=0,
        device="cpu",
        batch_size=3,
        max_passes=None,
        workers=0,
        limit=4,
        pictures=2,
        outputs=folder / "outputs",
        command="ibxai run",
    )
    return RunStore(run(plan).folder)


@dataclasses.dataclass(frozen=True)
class Annotated(Scans):
    def read(self, sample: Sample) -> Picture:
        picture = super().read(sample)
        lesion = torch.zeros(1, 32, 32, dtype=torch.bool)
        lesion[:, 24:28, 4:8] = True
        return Picture(picture.image, {**picture.regions, "target": lesion})
