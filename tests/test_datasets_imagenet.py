"""ImageNet in each of its layouts, its boxes against a slow re-derivation, its errors, and the real files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

from ibxai.datasets.imagenet import ImageNet
from ibxai.datasets.imagenet_boxes import (
    Annotation,
    Box,
    XmlAnnotations,
    box_planes,
    parse_prediction_string,
    parse_xml,
)
from ibxai.datasets.imagenet_classes import class_index
from ibxai.datasets.loading import load_batches
from ibxai.errors import BadSample, UserError
from ibxai.preprocessing import Preprocessing
from ibxai.targets import Label

REAL = Path(__file__).parents[2] / "shared" / "data" / "imagenet"
needs_real_files = pytest.mark.skipif(not REAL.is_dir(), reason=f"the real ImageNet pictures are not in {REAL}")

TENCH, TABBY = "n01440764", "n02123045"
FIRST, SECOND = "ILSVRC2012_val_00000001", "ILSVRC2012_val_00000002"
TREE = "ILSVRC/Data/CLS-LOC/val"


def picture(path: Path, size: tuple[int, int] = (40, 30)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (90, 60, 30)).save(path, format="JPEG")


def xml(*boxes: tuple[str, int, int, int, int], size: tuple[int, int] = (40, 30)) -> str:
    things = "".join(
        f"<object><name>{name}</name><bndbox><xmin>{a}</xmin><ymin>{b}</ymin><xmax>{c}</xmax><ymax>{d}</ymax></bndbox>"
        "</object>"
        for name, a, b, c, d in boxes
    )
    return f"<annotation><size><width>{size[0]}</width><height>{size[1]}</height></size>{things}</annotation>"


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def table(dataset: ImageNet) -> dict[str, int | None]:
    return {sample.sample_id: sample.label for sample in dataset.samples()}


def solution(*lines: str) -> str:
    return "\n".join(["ImageId,PredictionString", *lines]) + "\n"


# ---- layouts


@pytest.mark.parametrize("inside", ["", "val"])
def test_class_folders(tmp_path: Path, inside: str) -> None:
    picture(tmp_path / inside / TABBY / f"{SECOND}.JPEG")
    picture(tmp_path / inside / TENCH / f"{FIRST}.jpg")
    (tmp_path / inside / TENCH / "._hidden.JPEG").write_bytes(b"x")
    (tmp_path / inside / "notes").mkdir()
    dataset = ImageNet(str(tmp_path))
    assert table(dataset) == {FIRST: 0, SECOND: 281}
    first = dataset.samples()[0]
    assert first.size == first.source.stat().st_size
    assert first.group_id == FIRST
    assert "2 class folders" in dataset._layout.description


@pytest.mark.parametrize("root", ["", "ILSVRC", "ILSVRC/Data/CLS-LOC", TREE])
@pytest.mark.parametrize("labels", ["csv", "xml", "both"])
def test_kaggle_tree_from_any_of_its_levels(tmp_path: Path, root: str, labels: str) -> None:
    for stem in (FIRST, SECOND):
        picture(tmp_path / TREE / f"{stem}.JPEG")
    if labels != "csv":
        write(tmp_path / f"ILSVRC/Annotations/CLS-LOC/val/{FIRST}.xml", xml((TENCH, 3, 4, 10, 12)))
        write(tmp_path / f"ILSVRC/Annotations/CLS-LOC/val/{SECOND}.xml", xml((TABBY, 0, 0, 39, 29)))
    if labels != "xml":
        write(
            tmp_path / "LOC_val_solution.csv", solution(f"{FIRST},{TENCH} 3 4 10 12 ", f"{SECOND},{TABBY} 0 0 39 29 ")
        )
    dataset = ImageNet(str(tmp_path / root))
    assert table(dataset) == {FIRST: 0, SECOND: 281}
    planes = dataset.read(dataset.samples()[0]).regions["target"]
    assert planes.shape == (1, 30, 40)
    assert int(planes.sum()) == 8 * 9


def test_official_tar_files_with_the_development_kit(tmp_path: Path) -> None:
    savemat = pytest.importorskip("scipy.io").savemat
    for number in (1, 3):  # a part of the pictures: line i still belongs to picture i
        picture(tmp_path / f"ILSVRC2012_val_{number:08d}.JPEG")
    write(tmp_path / f"val/{FIRST}.xml", xml((TABBY, 0, 0, 9, 9)))  # the tar of boxes unpacked at the same place
    kind = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O")]
    synsets = np.array([(1, TABBY, "tabby"), (2, TENCH, "tench"), (1001, "n00001740", "entity")], dtype=kind)
    kit = tmp_path / "ILSVRC2012_devkit_t12" / "data"
    write(kit / "ILSVRC2012_validation_ground_truth.txt", "1\n1\n2\n")
    savemat(kit / "meta.mat", {"synsets": synsets.reshape(-1, 1)})
    dataset = ImageNet(str(tmp_path))
    assert table(dataset) == {FIRST: 281, "ILSVRC2012_val_00000003": 0}
    assert set(dataset.read(dataset.samples()[0]).regions) == {"target"}
    assert set(dataset.read(dataset.samples()[1]).regions) == set()
    (kit / "meta.mat").write_bytes(b"nonsense")
    with pytest.raises(UserError, match=r"meta\.mat"):
        ImageNet(str(tmp_path)).samples()


def test_boxes_from_a_folder_that_is_named(tmp_path: Path) -> None:
    picture(tmp_path / "pictures" / TENCH / f"{FIRST}.JPEG")
    write(tmp_path / f"boxes/{FIRST}.xml", xml((TENCH, 0, 0, 0, 0)))
    write(tmp_path / "s.csv", solution(f"{FIRST},{TENCH} 0 0 1 0"))
    for boxes, area in (("boxes", 1), ("s.csv", 2)):
        dataset = ImageNet(str(tmp_path / "pictures"), boxes=str(tmp_path / boxes))
        assert int(dataset.read(dataset.samples()[0]).regions["target"].sum()) == area
    without = ImageNet(str(tmp_path / "pictures"))
    assert not without.read(without.samples()[0]).regions
    for wrong in ("pictures", "absent"):
        with pytest.raises(UserError, match=r"dataset\.boxes"):
            ImageNet(str(tmp_path / "pictures"), boxes=str(tmp_path / wrong)).samples()


def test_ids_are_stems_unless_stems_repeat(tmp_path: Path) -> None:
    for name in (f"{TENCH}/1.jpg", f"{TABBY}/1.jpg", f"{TABBY}/1.png", f"{TENCH}/only.jpg"):
        picture(tmp_path / name)
    assert table(ImageNet(str(tmp_path))) == {
        f"{TENCH}/1": 0,
        f"{TABBY}/1.jpg": 281,
        f"{TABBY}/1.png": 281,
        "only": 0,
    }
    assert list(table(ImageNet(str(tmp_path)))) == sorted(table(ImageNet(str(tmp_path))))


def test_a_class_that_is_not_of_the_thousand_has_no_label(tmp_path: Path) -> None:
    picture(tmp_path / TENCH / "a.jpg")
    picture(tmp_path / "n99999999" / "b.jpg")
    assert table(ImageNet(str(tmp_path))) == {"a": 0, "b": None}


# ---- boxes


def slow_planes(annotation: Annotation, wnid: str, width: int, height: int) -> list[list[list[bool]]]:
    """Pixel by pixel: it is of a box when its centre, at the annotated size, lies between the box's outer edges."""
    across, down = annotation.size or (width, height)
    planes = []
    for box in annotation.boxes:
        xmin, ymin, xmax, ymax = box.corners
        plane = [
            [
                xmin <= (x + 0.5) * across / width <= xmax + 1 and ymin <= (y + 0.5) * down / height <= ymax + 1
                for x in range(width)
            ]
            for y in range(height)
        ]
        if box.wnid == wnid and any(map(any, plane)):
            planes.append(plane)
    return planes


@pytest.mark.parametrize("annotated", [(37, 23), (97, 51), (500, 375), None])
def test_planes_agree_with_a_slow_derivation(annotated: tuple[int, int] | None) -> None:
    width, height = 37, 23
    across, down = annotated or (width, height)
    draw = np.random.default_rng(1)
    boxes = []
    for place in range(20):
        x, y = sorted(draw.integers(0, across, 2)), sorted(draw.integers(0, down, 2))
        edge = across // 8 + 1  # wide enough to hold a pixel's centre
        corners = (float(x[0]), float(y[0]), float(min(x[1] + edge, across - 1)), float(min(y[1] + edge, down - 1)))
        boxes.append(Box(TENCH if place % 3 else TABBY, corners))
    annotation = Annotation(tuple(boxes), annotated)
    found = box_planes(annotation, TENCH, width, height)
    assert found is not None
    assert found.dtype == torch.bool
    assert found.tolist() == slow_planes(annotation, TENCH, width, height)


def test_corners_count_from_0_and_belong_to_the_box() -> None:
    planes = box_planes(parse_xml(xml((TENCH, 0, 1, 2, 1))), TENCH, 40, 30)
    assert planes is not None
    assert planes.nonzero().tolist() == [[0, 1, 0], [0, 1, 1], [0, 1, 2]]


def test_boxes_are_cut_to_the_picture_and_empty_ones_are_dropped() -> None:
    outside = [(TENCH, -5, -5, 3, 3), (TENCH, 50, 2, 60, 9), (TENCH, 9, 9, 5, 5), (TENCH, 30, 20, 400, 300)]
    planes = box_planes(parse_xml(xml(*outside)), TENCH, 40, 30)
    assert planes is not None
    assert planes.sum(dim=(1, 2)).tolist() == [4 * 4, 10 * 10]
    assert box_planes(parse_xml(xml(outside[1])), TENCH, 40, 30) is None


def test_each_side_is_scaled_by_its_own_factor() -> None:
    planes = box_planes(parse_xml(xml((TENCH, 100, 0, 199, 99), size=(400, 100))), TENCH, 40, 50)
    assert planes is not None
    inside = planes[0].nonzero()
    assert inside.min(0).values.tolist() == [0, 10]
    assert inside.max(0).values.tolist() == [49, 19]
    tiny = box_planes(parse_xml(xml((TENCH, 101, 50, 101, 50), size=(400, 100))), TENCH, 40, 30)
    assert tiny is not None
    assert int(tiny.sum()) == 1


def test_without_a_size_a_box_beyond_the_picture_is_refused() -> None:
    one_more = Annotation(parse_prediction_string(f"{TENCH} 1 1 40 30"), None)  # the habit of counting from 1
    assert box_planes(one_more, TENCH, 40, 30) is not None
    resized = Annotation(parse_prediction_string(f"{TENCH} 150 8 365 498"), None)
    with pytest.raises(BadSample, match="resized"):
        box_planes(resized, TENCH, 227, 227)
    assert parse_xml(xml((TENCH, 1, 1, 2, 2), size=(0, 0))).size is None


BOMB = '<!DOCTYPE a [<!ENTITY b "bbbbbbbb"><!ENTITY c "&b;&b;&b;&b;">]><annotation>&c;</annotation>'


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"<annotation>",
        b"<html></html>",
        b"\xff\xfe\x00broken",
        BOMB.encode(),
        BOMB.encode("utf-16"),
        b'<!DOCTYPE a SYSTEM "file:///etc/passwd"><annotation/>',
        b"<annotation>" + b" " * 1_000_001 + b"</annotation>",
        xml((TENCH, 1, 2, 3, 4)).replace("<xmin>1</xmin>", "").encode(),
        xml((TENCH, 1, 2, 3, 4)).replace("<xmin>1<", "<xmin>nan<").encode(),
        xml((TENCH, 1, 2, 3, 4)).replace("<xmin>1<", "<xmin>1e308<").encode(),
        xml((TENCH, 1, 2, 3, 4)).replace("<xmin>1<", "<xmin>one<").encode(),
        xml(("", 1, 2, 3, 4)).encode(),
    ],
)
def test_an_unreadable_annotation_makes_a_bad_sample(tmp_path: Path, content: bytes) -> None:
    picture(tmp_path / TENCH / f"{FIRST}.JPEG")
    picture(tmp_path / TENCH / f"{SECOND}.JPEG")
    write(tmp_path / f"Annotations/val/{SECOND}.xml", xml((TENCH, 0, 0, 1, 1)))
    (tmp_path / f"Annotations/val/{FIRST}.xml").write_bytes(content)
    dataset = ImageNet(str(tmp_path))
    first, second = dataset.samples()
    with pytest.raises(BadSample, match=f"{FIRST}.xml") as found:
        dataset.read(first)
    assert "\n" not in str(found.value)
    assert "target" in dataset.read(second).regions


def test_a_broken_line_costs_one_picture(tmp_path: Path) -> None:
    for stem in (FIRST, SECOND):
        picture(tmp_path / f"{stem}.JPEG")
    write(
        tmp_path / "LOC_val_solution.csv",
        solution(f"{FIRST},{TENCH} 1 2 3", "", "nonsense", f"{SECOND},{TABBY} 0 0 1 1"),
    )
    dataset = ImageNet(str(tmp_path))
    assert table(dataset) == {FIRST: 0, SECOND: 281}
    with pytest.raises(BadSample, match="groups of five"):
        dataset.read(dataset.samples()[0])
    assert "target" in dataset.read(dataset.samples()[1]).regions


def test_unreadable_xml_as_the_only_source_of_labels(tmp_path: Path) -> None:
    for stem in (FIRST, SECOND):
        picture(tmp_path / f"{stem}.JPEG")
    write(tmp_path / f"{FIRST}.xml", "<broken")
    write(tmp_path / f"{SECOND}.xml", xml((TABBY, 0, 0, 1, 1)))
    dataset = ImageNet(str(tmp_path))
    assert table(dataset) == {FIRST: None, SECOND: 281}
    with pytest.raises(BadSample):
        dataset.read(dataset.samples()[0])


@pytest.mark.parametrize("size", [(400, 300), (300, 520), (224, 224), (3000, 300)])
def test_regions_follow_the_preprocessing(tmp_path: Path, size: tuple[int, int]) -> None:
    width, height = size
    box = (width * 45 // 100, height // 4, width * 55 // 100, height * 3 // 4)
    painted = Image.new("RGB", size)
    painted.paste((255, 255, 255), (box[0], box[1], box[2] + 1, box[3] + 1))
    (tmp_path / TENCH).mkdir()
    painted.save(tmp_path / TENCH / f"{FIRST}.png")
    write(tmp_path / f"Annotations/val/{FIRST}.xml", xml((TENCH, *box), size=size))
    dataset = ImageNet(str(tmp_path))
    preprocessing = Preprocessing()
    inputs, regions = preprocessing(dataset.read(dataset.samples()[0]))
    white = torch.from_numpy(preprocessing.picture_of(inputs)[..., 0] > 127)
    region = regions["target"][0]
    assert int(region.sum()) > 1000
    overlap = (white & region).sum() / (white | region).sum()
    assert float(overlap) > 0.96  # the edge may differ by the pixel that interpolation blends


# ---- the reference split


def test_the_reference_split_is_chosen_by_id_alone(tmp_path: Path) -> None:
    for number in range(60):
        picture(tmp_path / "a" / TENCH / f"p{number}.jpg", (4, 4))
        picture(tmp_path / "b" / TABBY / f"p{59 - number}.jpg", (5, 5))
    ids = [s.sample_id for s in ImageNet(str(tmp_path / "a"), reference_size=20).reference()]
    assert len(set(ids)) == 20
    assert ids != [s.sample_id for s in ImageNet(str(tmp_path / "a")).samples()][:20]
    assert ids == [s.sample_id for s in ImageNet(str(tmp_path / "b"), reference_size=20).reference()]
    (tmp_path / "a" / TENCH / f"{ids[0]}.jpg").unlink()
    after = {s.sample_id for s in ImageNet(str(tmp_path / "a"), reference_size=20).reference()}
    assert len(after & set(ids)) == 19
    whole = ImageNet(str(tmp_path / "b"), reference_size=1000)
    assert whole.reference() == whole.samples()


def test_the_reference_split_from_another_folder(tmp_path: Path) -> None:
    picture(tmp_path / "val" / TENCH / "v.jpg")
    for number in range(5):
        picture(tmp_path / "train" / TABBY / f"t{number}.jpg")
    dataset = ImageNet(str(tmp_path), reference_size=3, reference_root=str(tmp_path / "train"))
    assert all(s.sample_id.startswith("t") and s.label == 281 for s in dataset.reference())
    assert "3 pictures" in dataset.reference_note
    assert "train" in dataset.reference_note
    assert dataset.read(dataset.reference()[0]).image.size == (40, 30)
    same = ImageNet(str(tmp_path))
    assert "explained are among them" in same.reference_note
    with pytest.raises(UserError, match="reference_size"):
        ImageNet(str(tmp_path), reference_size=0).reference()
    with pytest.raises(UserError, match="absent"):
        ImageNet(str(tmp_path), reference_root=str(tmp_path / "absent")).reference()


# ---- errors


def empty_class_folder(root: Path) -> None:
    (root / TENCH).mkdir(parents=True)


def mixed(root: Path) -> None:
    picture(root / TENCH / "a.jpg")
    picture(root / "b.jpg")


def useless_solution(root: Path) -> None:
    picture(root / "a.jpg")
    write(root / "LOC_val_solution.csv", solution("", "junk"))


@pytest.mark.parametrize(
    ("build", "match"),
    [
        (lambda root: None, "does not exist"),
        (lambda root: root.write_text("x"), "a file"),
        (lambda root: root.mkdir(), "no pictures"),
        (lambda root: picture(root / "a.jpg"), "no labels"),
        (lambda root: picture(root / "n99999999" / "a.jpg"), "none of the class folders"),
        (useless_solution, "no labels"),
        (empty_class_folder, "hold no pictures"),
        (mixed, "as well as class folders"),
    ],
)
def test_errors_say_what_to_do_in_two_lines(tmp_path: Path, build: object, match: str) -> None:
    root = tmp_path / "root"
    build(root)  # type: ignore[operator]
    with pytest.raises(UserError, match=match) as found:
        ImageNet(str(root)).samples()
    assert len(str(found.value).splitlines()) <= 2
    assert str(root) in str(found.value)


def test_fields_suit_a_structured_config() -> None:
    config = OmegaConf.structured(ImageNet)
    assert OmegaConf.is_missing(config, "root")
    with pytest.raises(Exception, match="reference_size"):
        OmegaConf.merge(config, {"reference_size": "many"})


# ---- the real files


@needs_real_files
def test_real_class_folders() -> None:
    dataset = ImageNet(str(REAL))
    rows = [line.split(",") for line in (REAL / "val_index.csv").read_text().splitlines()[1:]]
    expected = {Path(row[0]).stem: int(row[2]) for row in rows}
    assert table(dataset) == expected
    assert len(expected) == 100


@needs_real_files
def test_real_boxes_agree_with_the_table_of_originals() -> None:
    dataset = ImageNet(str(REAL / "val_boxes"))
    rows = [line.split(",") for line in (REAL / "val_boxes/boxes_original.csv").read_text().splitlines()[1:]]
    assert len(dataset.samples()) == 100
    for sample in dataset.samples()[::5]:
        own = [row for row in rows if row[0] == f"{sample.sample_id}.JPEG"]
        assert {class_index()[row[1]] for row in own} == {sample.label}
        original = Annotation(
            tuple(Box(r[1], (float(r[5]), float(r[6]), float(r[7]), float(r[8]))) for r in own),
            (int(own[0][3]), int(own[0][4])),
        )
        scaled_by_us = box_planes(original, own[0][1], 227, 227)
        read = dataset.read(sample).regions["target"]
        assert scaled_by_us is not None
        assert read.shape == scaled_by_us.shape
        for one, other in zip(read, scaled_by_us, strict=True):  # the files' corners were rounded on the way
            rows_and_columns = (one.any(1) ^ other.any(1)).sum() + (one.any(0) ^ other.any(0)).sum()
            assert int(rows_and_columns) <= 4


@needs_real_files
def test_real_pictures_load_whole() -> None:
    for root in (REAL, REAL / "val_boxes"):
        dataset = ImageNet(str(root))
        work = [(sample, (0,)) for sample in dataset.samples()[::4]]
        loaded = list(load_batches(dataset, work, Label(), Preprocessing(), 16, 0))
        assert [len(one.row_ids) for one in loaded] == [16, 9]
        assert not any(one.skipped for one in loaded)
        for one in loaded:
            assert one.batch is not None
            assert torch.isfinite(one.batch.inputs).all()


def test_a_missing_annotation_is_none(tmp_path: Path) -> None:
    assert XmlAnnotations(tmp_path).of("absent") is None
