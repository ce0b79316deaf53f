"""Scores of metrics that read regions are named by the annotations too: through the pipeline, and ImageNet's boxes."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from test_pipeline import (  # noqa: F401  # pytest finds fixtures by name
    EXPLAINED,
    NAMES,
    Mean,
    TinyData,
    _nothing_seen_yet,
    _one_thread,
    lines_of,
    pictures,
    plan,
    scores_of,
)

from ibxai.datasets.imagenet import ImageNet
from ibxai.identity import metric_key
from ibxai.metrics import BoxShare, Insertion
from ibxai.pipeline import Plan, run
from ibxai.types import Picture, Sample

BOXES = {name: (2, 2, 9, 11) for name in NAMES if name != "d"}  # 'd' is not annotated


@dataclass(frozen=True)
class BoxedData(TinyData):
    """TinyData with one box a picture: top, left, bottom, right; a picture that is not listed has none."""

    boxes: Mapping[str, tuple[int, int, int, int]] | None = None

    def annotations(self) -> str:
        return hashlib.sha256(json.dumps(self.boxes, sort_keys=True).encode()).hexdigest()

    def read(self, sample: Sample) -> Picture:
        picture = super().read(sample)
        if not self.boxes or sample.sample_id not in self.boxes:
            return picture
        top, left, bottom, right = self.boxes[sample.sample_id]
        plane = torch.zeros(1, picture.image.height, picture.image.width, dtype=torch.bool)
        plane[0, top:bottom, left:right] = True
        return Picture(picture.image, {"target": plane})


@pytest.fixture
def boxed(plan: Plan) -> Plan:  # noqa: F811
    return replace(plan, dataset=with_boxes(plan, BOXES), metrics={"bbox": BoxShare(), "mean": Mean()})


def with_boxes(plan: Plan, boxes: Mapping[str, tuple[int, int, int, int]] | None) -> BoxedData:  # noqa: F811
    return BoxedData(plan.dataset.root, boxes=boxes)  # type: ignore[attr-defined]


def bbox_values(folder: Path, label: str) -> dict[str, float]:
    return {
        line["sample"]: float(line["value"]) for line in lines_of(folder / "metrics.csv") if line["metric"] == label
    }


def test_changed_boxes_are_judged_again_beside_the_old_ones(boxed: Plan) -> None:
    first = run(boxed)
    [old] = [name for name in scores_of(first.folder) if name.startswith("bbox-")]
    values = bbox_values(first.folder, "bbox")
    assert [name for name, value in values.items() if value != value] == ["d"]  # NaN: not annotated
    EXPLAINED.clear()
    again = run(boxed)
    assert (again.new_heatmaps, again.new_scores) == (0, 0)
    changed = run(replace(boxed, dataset=with_boxes(boxed, BOXES | {"b": (0, 0, 4, 4), "d": (1, 1, 5, 5)})))
    assert changed.folder == first.folder, "the heatmaps are the same"
    assert EXPLAINED == []
    assert (changed.new_heatmaps, changed.new_scores) == (0, 7), "bbox again, the other metric not"
    [new] = [name for name in scores_of(first.folder) if name.startswith("bbox-") and name != old]
    assert len(scores_of(first.folder)) == 3
    kept, fresh = bbox_values(first.folder, old), bbox_values(first.folder, new)
    assert {name for name in NAMES if fresh[name] != kept[name]} == {"b", "d"}
    assert fresh["d"] >= 0
    for name, boxes in ((old, boxed.dataset), (new, None)):
        settings = json.loads((first.folder / "scores" / name / "settings.json").read_text())["settings"]
        assert len(settings["annotations"]) == 64
        assert (boxes is None) or settings["annotations"] == boxes.annotations()  # type: ignore[attr-defined]


def test_limit_and_the_order_of_metrics_change_no_name(boxed: Plan) -> None:
    few = run(replace(boxed, limit=2))
    names = scores_of(few.folder)
    more = run(replace(boxed, metrics=dict(reversed(boxed.metrics.items()))))
    assert more.folder == few.folder
    assert scores_of(more.folder) == names


def test_metrics_that_read_no_region_do_not_ask(boxed: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading 50,000 annotations takes seconds."""
    monkeypatch.setattr(BoxedData, "annotations", lambda self: 1 / 0)
    outcome = run(replace(boxed, metrics={"mean": Mean(), "insertion": Insertion(step=0.5)}))
    assert outcome.new_scores == 14
    with pytest.raises(ZeroDivisionError):
        run(boxed)


def test_a_dataset_without_annotations(boxed: Plan, plan: Plan) -> None:  # noqa: F811
    outcome = run(replace(boxed, dataset=plan.dataset))
    [name] = [name for name in scores_of(outcome.folder) if name.startswith("bbox-")]
    assert name == metric_key("bbox", BoxShare(), "").folder
    assert name != metric_key("bbox", BoxShare(), "other").folder
    assert metric_key("mean", Mean(), "") == metric_key("mean", Mean(), "other")
    [line] = [line for line in lines_of(outcome.folder / "summary.csv") if line["metric"] == "bbox"]
    assert (line["n"], line["undefined"]) == ("0", "7")


# --- ImageNet

TABBY = "n02123045"
STEMS = ("ILSVRC2012_val_00000001", "ILSVRC2012_val_00000002")


def xml(right: int) -> str:
    return (
        f"<annotation><object><name>{TABBY}</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>{right}</xmax>"
        "<ymax>9</ymax></bndbox></object></annotation>"
    )


def write_imagenet(root: Path, boxes: str) -> Path:
    folder = root / "val" / TABBY
    folder.mkdir(parents=True)
    for stem in STEMS:
        Image.new("RGB", (20, 15)).save(folder / f"{stem}.JPEG")
    if boxes == "xml":
        (root / "boxes").mkdir()
        for stem in STEMS:
            (root / "boxes" / f"{stem}.xml").write_text(xml(12))
    elif boxes == "csv":
        lines = [f"{stem},{TABBY} 1 1 12 9" for stem in STEMS]
        (root / "LOC_val_solution.csv").write_text("\n".join(["ImageId,PredictionString", *lines]) + "\n")
    return root


def digest(root: Path, boxes: str) -> str:
    where = {"xml": "boxes", "csv": "LOC_val_solution.csv"}.get(boxes)
    return ImageNet(str(root / "val"), boxes=str(root / where) if where else None).annotations()


@pytest.mark.parametrize("boxes", ["xml", "csv"])
def test_the_digest_of_imagenets_boxes(boxes: str, tmp_path: Path) -> None:
    root = write_imagenet(tmp_path / "one", boxes)
    found = digest(root, boxes)
    assert len(found) == 64
    shutil.copytree(root, tmp_path / "moved")
    assert digest(tmp_path / "moved", boxes) == found, "where it lies does not count"
    first = {"xml": root / "boxes" / f"{STEMS[0]}.xml", "csv": root / "LOC_val_solution.csv"}[boxes]
    old, new = {"xml": (">12<", ">13<"), "csv": (" 12 ", " 13 ")}[boxes]
    first.write_text(first.read_text().replace(old, new, 1))
    assert digest(root, boxes) != found, "a box of the same length"
    stranger = tmp_path / "moved" / ("boxes/other.xml" if boxes == "xml" else "LOC_val_solution.csv")
    with stranger.open("a") as file:
        file.write(xml(5) if boxes == "xml" else f"ILSVRC2012_val_00000099,{TABBY} 1 1 2 2\n")
    assert digest(tmp_path / "moved", boxes) == found, "the box of a picture that is not there"


def test_missing_and_exchanged_annotations_count(tmp_path: Path) -> None:
    root = write_imagenet(tmp_path / "one", "xml")
    first, second = (root / "boxes" / f"{stem}.xml" for stem in STEMS)
    first.write_text(xml(11))
    found = {digest(root, "xml")}
    kept = first.read_text()
    first.write_text(second.read_text())
    second.write_text(kept)
    found.add(digest(root, "xml"))
    second.unlink()
    found.add(digest(root, "xml"))
    first.rename(second)
    found.add(digest(root, "xml"))
    assert len(found) == 4


def test_no_boxes_at_all(tmp_path: Path) -> None:
    assert digest(write_imagenet(tmp_path, "none"), "none") == ""
