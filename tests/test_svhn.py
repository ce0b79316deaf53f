"""SVHN in format 1: digitStruct as MATLAB writes it and as JSON, boxes counted out by pixel, the real pictures."""

from __future__ import annotations

import json
from pathlib import Path

import h5py
import numpy as np
import pytest
from PIL import Image

from ibxai.datasets.loading import load_batches
from ibxai.datasets.svhn import SVHN, box_plane, read_boxes
from ibxai.errors import BadSample, UserError
from ibxai.preprocessing import Preprocessing
from ibxai.targets import Predicted

REAL = Path(__file__).parents[2] / "shared" / "data" / "svhn"
needs_real_files = pytest.mark.skipif(not REAL.is_dir(), reason=f"the real SVHN pictures are not in {REAL}")

TRAIN = {"1.png": [(3, 2, 4, 6)], "2.png": [(-2, -1, 5, 6), (4, 1, 3, 6)], "10.png": [(0, 0, 2, 3)] * 3}
TEST = {"1.png": [(1, 1, 5, 5), (7, 1, 5, 5)], "absent.png": [(0, 0, 1, 1)]}


def dataset(root: Path, **settings) -> SVHN:
    return SVHN(**({"root": str(root), "name": "svhn", "split": "test", "reference_size": 10} | settings))


def write_mat(folder: Path, boxes: dict) -> None:
    """As MATLAB 7.3: a struct of references to names in 16 bit letters and to groups, whose five datasets hold the
    number itself where there is one digit and references where there are more.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with h5py.File(folder / "digitStruct.mat", "w", userblock_size=512) as file:
        hidden = file.create_group("#refs#")

        def refer(content: np.ndarray) -> h5py.Reference:
            return hidden.create_dataset(str(len(hidden)), data=content).ref

        names, groups = [], []
        for name, own in boxes.items():
            names.append(refer(np.array([[ord(letter)] for letter in name], np.uint16)))
            group = hidden.create_group(str(len(hidden)))
            columns = dict(zip(("left", "top", "width", "height"), zip(*own, strict=True), strict=True))
            for side, numbers in {**columns, "label": [1.0] * len(own)}.items():
                if len(numbers) == 1:
                    group[side] = np.array([numbers], np.float64)
                else:
                    references = [[refer(np.array([[number]], np.float64))] for number in numbers]
                    group.create_dataset(side, data=np.array(references, h5py.ref_dtype), dtype=h5py.ref_dtype)
            groups.append(group.ref)
        struct = file.create_group("digitStruct")
        for what, references in (("name", names), ("bbox", groups)):
            struct.create_dataset(what, data=np.array([[r] for r in references], h5py.ref_dtype), dtype=h5py.ref_dtype)


def write_json(folder: Path, boxes: dict) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    sides = ("left", "top", "width", "height")
    records = [
        {"filename": name, "boxes": [dict(zip(sides, box, strict=True)) | {"label": 10.0} for box in own]}
        for name, own in boxes.items()
    ]
    (folder / "digitStruct.json").write_text(json.dumps(records))


@pytest.fixture(params=[write_mat, write_json])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    for split, boxes in (("train", TRAIN), ("test", TEST)):
        request.param(tmp_path / split, boxes)
        for name in boxes.keys() - {"absent.png"}:
            pixels = np.random.default_rng(0).integers(0, 256, (10, 14, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / split / name)
    return tmp_path


def test_the_layout(root: Path) -> None:
    found = dataset(root)
    assert [(s.sample_id, s.label) for s in found.in_split("train")] == [
        ("train-00001", 0),
        ("train-00002", 1),
        ("train-00010", 2),
    ]
    assert [(s.sample_id, s.label, s.group_id) for s in found.samples()] == [("test-00001", 1, "test-00001")]
    assert found.class_names[0] == "1 digit"
    assert found.class_names[5] == "6 digits"
    assert ("test list", "2 pictures, of which 1 are here") in found.facts()
    for split, boxes in (("train", TRAIN), ("test", TEST)):
        for sample in found.in_split(split):
            picture = found.read(sample)
            assert picture.image.size == (14, 10)
            expected = np.zeros((len(boxes[sample.source.name]), 10, 14), bool)
            for plane, (left, top, width, height) in zip(expected, boxes[sample.source.name], strict=True):
                for y in range(10):
                    for x in range(14):
                        plane[y, x] = left <= x < left + width and top <= y < top + height
            np.testing.assert_array_equal(picture.regions["target"], expected)


def test_its_batches_and_its_digest(root: Path) -> None:
    found = dataset(root, split="train")
    work = [(sample, (0,)) for sample in found.samples()]
    (loaded,) = load_batches(found, work, Predicted(), Preprocessing(8, 8, (0.5,) * 3, (0.5,) * 3), 8, 0)
    assert loaded.batch is not None
    assert loaded.batch.regions["target"].shape == (3, 3, 8, 8)
    before = found.annotations()
    assert before == dataset(root, split="train").annotations()
    for path in (root / "train").glob("digitStruct.*"):
        path.unlink()
    write_json(root / "train", TRAIN | {"1.png": [(3, 2, 4, 5)]})
    assert dataset(root, split="train").annotations() != before


def test_a_box_beside_the_picture() -> None:
    with pytest.raises(BadSample, match="covers no pixel"):
        box_plane((20.0, 0.0, 5.0, 5.0), 14, 10)
    with pytest.raises(BadSample, match="covers no pixel"):
        box_plane((-9.0, 0.0, 5.0, 5.0), 14, 10)


def test_what_is_missing_or_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"train/digitStruct\.mat(.|\n)*housenumbers"):
        dataset(tmp_path).samples()
    write_mat(tmp_path / "train", TRAIN)
    with pytest.raises(UserError, match="none of the pictures"):
        dataset(tmp_path).samples()
    mat = tmp_path / "train/digitStruct.mat"
    mat.write_bytes(mat.read_bytes()[:3000])
    with pytest.raises(UserError, match=r"cannot be read(.|\n)*Unpack"):
        read_boxes(tmp_path / "train")
    monkeypatch.setitem(__import__("sys").modules, "h5py", None)
    with pytest.raises(UserError, match=r"ibxai\[svhn\]"):
        read_boxes(tmp_path / "train")


@pytest.mark.parametrize(
    "text",
    [
        "[{}]",
        "{}{}",
        "[1]",
        '[{"filename": "1.png", "boxes": [{"left": "x", "top": 1, "width": 1, "height": 1}]}]',
        '[{"filename": "1.png", "boxes": []}]',
        '[{"filename": "1.png", "boxes": [{"left": NaN, "top": 1, "width": 1, "height": 1}]}]',
        '[{"filename": "1.png", "boxes": [{"left": 1e99, "top": 1, "width": 1, "height": 1}]}]',
    ],
)
def test_json_that_is_none_of_svhn(tmp_path: Path, text: str) -> None:
    (tmp_path / "digitStruct.json").write_text(text)
    with pytest.raises(UserError, match="digitStruct") as found:
        read_boxes(tmp_path)
    assert len(str(found.value).splitlines()) <= 2


@needs_real_files
def test_the_real_pictures() -> None:
    """19, 23, 25 and 93, and the two boxes of the 19 as its file has them."""
    found = dataset(REAL, split="train")
    assert [s.label for s in found.samples()] == [1, 1, 1, 1]
    sizes = [found.read(s).image.size for s in found.samples()]
    assert sizes == [(741, 350), (199, 83), (52, 23), (161, 79)]
    planes = found.read(found.samples()[0]).regions["target"]
    assert planes.flatten(1).sum(1).tolist() == [81 * 219, 96 * 219]
    assert planes[0].nonzero().min(0).values.tolist() == [77, 246]
