"""COVIDx: its label files of every form, made folders in the official layout, and the real lists and pictures."""

from __future__ import annotations

import csv
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ibxai.datasets.covidx import CLASSES, COVIDx, read_list
from ibxai.errors import BadSample, UserError

REAL = Path(__file__).parents[2] / "shared" / "data" / "covidx"
needs_real_files = pytest.mark.skipif(not REAL.is_dir(), reason=f"the real COVIDx files are not in {REAL}")

TRAIN = [
    "3 a.one.two.JPG pneumonia cohen",
    "3 b.jpeg COVID-19 cohen",
    "COVID-00001 c.png COVID-19 fig1",
    "5 absent.png normal rsna",
    "3 b.jpeg COVID-19 cohen",  # train_COVIDx4.txt lists one picture twice
]
TEST = ["9 d.png normal", "10 e.png COVID-19 actmed"]  # without a source, as the lines of RSNA are


def dataset(root: Path, **settings) -> COVIDx:
    return COVIDx(**({"root": str(root), "name": "covidx", "split": "test", "reference_size": 10} | settings))


def archive(root: Path, labels: str = "labels", pictures: str = "data", release: str = "COVIDx4") -> Path:
    for split, lines in (("train", TRAIN), ("test", TEST)):
        (root / labels).mkdir(parents=True, exist_ok=True)
        (root / labels / f"{split}_{release}.txt").write_text("\n".join(lines) + "\n")
        folder = root / pictures / split
        folder.mkdir(parents=True, exist_ok=True)
        for name in {line.split()[1] for line in lines} - {"absent.png"}:
            mode, kind = ("RGBA", "png") if name == "c.png" else ("RGB", "png" if name.endswith("png") else "jpeg")
            pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
            Image.fromarray(pixels).convert(mode).save(folder / name, kind)
    return root


@pytest.mark.parametrize(("labels", "pictures"), [("labels", "data"), (".", "."), ("data", "data")])
def test_the_layout(tmp_path: Path, labels: str, pictures: str) -> None:
    found = dataset(archive(tmp_path, labels, pictures))
    assert {s.sample_id: s.label for s in found.in_split("train")} == {"a.one.two.JPG": 1, "b.jpeg": 2, "c.png": 2}
    assert {s.sample_id: s.label for s in found.samples()} == {"d.png": 0, "e.png": 2}
    assert [s.group_id for s in found.in_split("train")] == ["patient-3", "patient-3", "patient-COVID-00001"]
    assert found.class_names == ("normal", "pneumonia", "COVID-19")
    assert ("train list", "4 X-rays, of which 3 are here") in found.facts()
    for sample in (*found.in_split("train"), *found.samples()):
        image = np.asarray(found.read(sample).image)
        assert image.shape == (20, 30, 3)
        assert (image == image[..., :1]).all()


def test_a_release_is_chosen_by_name(tmp_path: Path) -> None:
    archive(tmp_path, release="COVIDx2")
    assert len(dataset(tmp_path, release="COVIDx2").samples()) == 2
    with pytest.raises(UserError, match=r"train_COVIDx4\.txt.*COVIDx2: set dataset\.release"):
        dataset(tmp_path).samples()


@pytest.mark.parametrize(
    "line", ["7 x.png", "7 x.png flu cohen", "7 my x.png normal rsna", "7 x.png normal rsna more", "normal"]
)
def test_a_line_that_is_none(tmp_path: Path, line: str) -> None:
    path = tmp_path / "train_COVIDx4.txt"
    path.write_text(f"{TRAIN[0]}\n\n{line}\n")
    with pytest.raises(UserError, match=r"line 2.*(\n.*)?patient, file"):
        read_list(path)


def test_a_picture_with_two_classes(tmp_path: Path) -> None:
    path = tmp_path / "train_COVIDx4.txt"
    path.write_text("1 x.png normal rsna\n1 x.png pneumonia rsna\n")
    with pytest.raises(UserError, match=r"x\.png is pneumonia here and normal"):
        read_list(path)


def test_a_patient_in_both_splits_is_refused(tmp_path: Path) -> None:
    archive(tmp_path)
    (tmp_path / "labels/test_COVIDx4.txt").write_text("3 d.png normal\n10 e.png COVID-19 actmed\n")
    with pytest.raises(UserError, match="patient-3"):
        dataset(tmp_path).samples()


def test_what_is_missing_and_what_is_broken(tmp_path: Path) -> None:
    for folder, says in ((tmp_path / "nowhere", "does not exist"), (tmp_path, "train_COVIDx4.txt")):
        with pytest.raises(UserError) as found:
            dataset(folder).samples()
        first, second = str(found.value).splitlines()
        assert says in first
        assert "github.com/lindawangg/COVID-Net" in second
    archive(tmp_path)
    (tmp_path / "data/test/d.png").write_bytes(b"")
    broken = dataset(tmp_path)
    with pytest.raises(BadSample, match="empty"):
        broken.read(broken.samples()[0])
    for path in tmp_path.glob("data/*/*"):
        path.unlink()
    with pytest.raises(UserError, match="no picture"):
        dataset(tmp_path).samples()


@needs_real_files
def test_the_real_lists() -> None:
    train, test = (read_list(REAL / f"labels/{split}_COVIDx4.txt") for split in ("train", "test"))
    assert (len(train), len(test)) == (13897, 300)  # 13,898 lines, one of them twice
    assert Counter(kind for _, kind in test.values()) == dict.fromkeys(CLASSES, 100)
    assert not {patient for patient, _ in train.values()} & {patient for patient, _ in test.values()}


@needs_real_files
def test_the_real_pictures() -> None:
    found = dataset(REAL)
    names = found.class_names
    counts = [Counter(names[s.label] for s in split) for split in (found.in_split("train"), found.samples())]  # type: ignore[index]
    assert counts == [{"COVID-19": 19, "pneumonia": 18, "normal": 10}, {"COVID-19": 19, "pneumonia": 1}]
    for sample in (*found.samples(), *found.in_split("train")[::9]):
        image = np.asarray(found.read(sample).image)
        assert (image == image[..., :1]).all()  # also 16672_1_1.jpg, on which an author drew in red
        assert image.std() > 10


SIDES = ("xmin", "ymin", "xmax", "ymax")


# where letters were: the table of `ibxai data clean`


def letters_table(path: Path, rows: str) -> Path:
    path.write_text(f"file,bytes,boxes,scores,done\n{rows}")
    return path


@pytest.mark.parametrize("beside", [True, False], ids=["in the root", "by dataset.letters"])
def test_boxes_of_letters_are_a_region(tmp_path: Path, beside: bool) -> None:
    root = archive(tmp_path / "covidx")
    rows = "data/test/e.png,9,2 3 7 9; 20 0 30 4,0.9 0.5,painted over\ndata/test/d.png,9,,,no letters found\n"
    table = letters_table(root / "cleaned.csv" if beside else tmp_path / "cleaned.csv", rows)
    found = dataset(root) if beside else dataset(root, letters=str(table))
    one, other = (found.read(sample).regions for sample in found.samples())
    assert one == {}
    assert list(other) == ["letters"]
    wanted = np.zeros((2, 20, 30), dtype=bool)  # 30 across, 20 down
    wanted[0, 3:9, 2:7] = wanted[1, :4, 20:] = True
    assert (other["letters"].numpy() == wanted).all()
    assert ("letters", "boxes of them on 1 of the X-rays") in found.facts()
    moved = letters_table(table, rows.replace("2 3 7 9", "2 3 8 9"))
    again = dataset(root) if beside else dataset(root, letters=str(moved))
    assert again.annotations() != found.annotations()  # scores of the old boxes are not taken for new ones
    assert dataset(root, letters=str(letters_table(table, rows))).annotations() == found.annotations()


def test_without_a_table_there_are_no_letters(tmp_path: Path) -> None:
    found = dataset(archive(tmp_path))
    assert all(not found.read(sample).regions for sample in found.samples())
    assert ("letters", "boxes of them on 0 of the X-rays") in found.facts()


@pytest.mark.parametrize(
    ("boxes", "error", "says"),
    [
        ("1 2 3", UserError, r"row 2: '1 2 3' is no list of left top right bottom"),
        ("1 2 x 9", UserError, "row 2"),
        ("7 3 2 9", UserError, "row 2"),
        ("-1 3 2 9", UserError, "row 2"),
        ("0 0 31 4", BadSample, "leaves its 30 x 20 pixels"),
        ("0 0 30 21", BadSample, "leaves its 30 x 20 pixels"),
    ],
)
def test_boxes_that_cannot_be(tmp_path: Path, boxes: str, error: type[Exception], says: str) -> None:
    found = dataset(archive(tmp_path))
    letters_table(tmp_path / "cleaned.csv", f"data/test/d.png,9,{boxes},1,painted over\n")
    with pytest.raises(error, match=says):
        found.read(found.samples()[0])


def test_a_table_of_other_pictures_is_refused(tmp_path: Path) -> None:
    root = archive(tmp_path / "covidx")
    table = letters_table(tmp_path / "cleaned.csv", "images/x.png,9,2 3 7 9,0.9,painted over\n")
    with pytest.raises(UserError, match="on none of the X-rays"):
        dataset(root, letters=str(table)).samples()
    with pytest.raises(UserError, match="cannot be read"):
        dataset(root, letters=str(tmp_path / "nowhere.csv")).samples()


@needs_real_files
def test_letters_of_the_real_pictures(tmp_path: Path) -> None:
    """The boxes that were drawn by hand, as a table: bright letters lie in them."""
    with (REAL / "burned_in_letters.csv").open() as file:
        drawn = list(csv.DictReader(file))
    rows = "".join(
        f"data/{row['split']}/{row['filename']},1,{' '.join(row[side] for side in SIDES)},1,painted over\n"
        for row in drawn
    )
    table = letters_table(tmp_path / "cleaned.csv", rows)
    found = dataset(REAL, letters=str(table))
    marked = 0
    for sample in (*found.samples(), *found.in_split("train")):
        picture = found.read(sample)
        if "letters" in picture.regions:
            grey, (inside,) = np.asarray(picture.image)[..., 0], picture.regions["letters"].numpy()
            assert inside.shape == grey.shape
            assert grey[inside].max() > 200
            marked += 1
    assert marked == len(drawn) == 10
