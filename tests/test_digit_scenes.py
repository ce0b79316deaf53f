"""Scenes from real digits: what is in them lies where the region says, and the class is what was put in."""

from __future__ import annotations

import gzip
import json
import struct
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from omegaconf import OmegaConf
from PIL import Image

from ibxai.catalogue import entries
from ibxai.config import build
from ibxai.datasets.digit_scenes import AnchorScenes, DigitScenes
from ibxai.datasets.loading import sample_table_digest
from ibxai.datasets.svhn_count import SVHNCount
from ibxai.errors import BadSample, UserError

NAMES = ["mnist_anomaly", "mnist_distractor2", "mnist_distractor4", "mnist_anchors"]
REAL_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


def write_idx(path: Path, values: np.ndarray) -> None:
    header = struct.pack(f">{1 + values.ndim}I", 0x0800 + values.ndim, *values.shape)
    path.write_bytes(gzip.compress(header + values.tobytes()))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """30 and 20 digits of made ink: a block of 20 x 20 pixels in the middle, of a grey that tells split and place."""
    folder = tmp_path_factory.mktemp("digits")
    for prefix, count, first in (("train", 30, 1), ("t10k", 20, 51)):
        images = np.zeros((count, 28, 28), np.uint8)
        images[:, 4:24, 4:24] = first + np.arange(count, dtype=np.uint8)[:, None, None]
        write_idx(folder / f"{prefix}-images-idx3-ubyte.gz", images)
        write_idx(folder / f"{prefix}-labels-idx1-ubyte.gz", np.arange(count, dtype=np.uint8) % 10)
    return folder


def scenes(name: str, root: Path, **changed: Any) -> DigitScenes:
    node = OmegaConf.to_container(OmegaConf.create(entries()["dataset"][name].text), resolve=True)
    assert isinstance(node, dict)
    node.pop("defaults")
    made = build({**node, "root": str(root), "train_size": 60, "test_size": 40, **changed}, "dataset")
    assert isinstance(made, DigitScenes)
    return made


def read(dataset: DigitScenes, place: int) -> tuple[np.ndarray, Mapping[str, np.ndarray], int]:
    """(grey [H, W], regions [H, W], label)."""
    sample = dataset.samples()[place]
    picture = dataset.read(sample)
    pixels = np.asarray(picture.image)
    assert (pixels == pixels[..., :1]).all()
    assert sample.label is not None
    return pixels[..., 0], {name: plane[0].numpy() for name, plane in picture.regions.items()}, sample.label


def test_an_anomaly_is_a_rectangle_where_the_region_is(root: Path) -> None:
    dataset = scenes("mnist_anomaly", root, test_size=400)
    sides, colours, labels = set(), set(), []
    for place in range(400):
        pixels, regions, label = read(dataset, place)
        own = np.zeros((28, 28))
        own[4:24, 4:24] = 51 + place % 20
        labels.append(label)
        if label == 0:
            assert regions == {}
            assert (pixels == own).all()
            continue
        inside = regions["target"]
        rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
        assert inside.sum() == len(rows) * len(columns)  # a rectangle
        assert (pixels[~inside] == own[~inside]).all()
        assert len(np.unique(pixels[inside])) == 1
        sides |= {len(rows), len(columns)}
        colours.add(int(pixels[inside][0]))
    assert sides == set(range(3, 11))
    assert min(colours) >= 100
    assert max(colours) > 240
    assert 160 < sum(labels) < 240  # five deviations of a fair coin


def test_photographs_get_a_colour(tmp_path: Path) -> None:
    labels = np.zeros(4, np.int64)
    for split in ("train", "test"):
        np.savez(tmp_path / f"{split}.npz", images=np.full((4, 32, 32, 3), 7, np.uint8), labels=labels)
    dataset = scenes("cifar10_anomaly", tmp_path, chance=1.0)
    picture = dataset.read(dataset.samples()[0])
    pixels, inside = np.asarray(picture.image), picture.regions["target"][0].numpy()
    assert (pixels[~inside] == 7).all()
    assert len(np.unique(pixels[inside], axis=0)) == 1
    assert len({tuple(np.asarray(dataset.read(s).image)[d.regions["target"][0].numpy()][0])
                for s in dataset.samples() for d in [dataset.read(s)]}) > 4  # fmt: skip


@pytest.mark.parametrize(("name", "digits", "small"), [("mnist_distractor2", 2, 18), ("mnist_distractor4", 4, 14)])
def test_the_smallest_digit_is_the_class_and_lies_in_the_region(root: Path, name: str, digits: int, small: int) -> None:
    dataset = scenes(name, root)
    corners = set()
    for place in range(40):
        pixels, regions, label = read(dataset, place)
        own = 51 + place % 20
        assert pixels.shape == (56, 56)
        assert label == place % 20 % 10
        disc = regions["target"]
        rows, columns = np.nonzero(disc)
        assert abs(disc.sum() / np.pi - dataset.radius**2) < 6  # type: ignore[attr-defined]
        corner = int(rows.mean() >= 28), int(columns.mean() >= 28)
        corners.add(corner)
        ink = np.zeros((56, 56), bool)
        ink[corner[0] * 28 : corner[0] * 28 + 28, corner[1] * 28 : corner[1] * 28 + 28] = True
        side = 20 * small / 28  # of the made ink, once it is small
        seen = (pixels == own) & disc
        assert abs(np.sqrt(seen.sum()) - side) < 3
        assert abs(np.nonzero(seen)[0].mean() - rows.mean()) < 1.5  # in the middle of the disc
        assert abs(rows.mean() - (13.5 + 28 * corner[0])) <= 4.5
        assert (pixels > 0).sum() < digits * 400 - (400 - (side + 3) ** 2)
        assert (pixels > 0).sum() > digits * 400 - (400 - (side - 3) ** 2) - digits * 160  # shifted ones may overlap
    assert len(corners) == 4


def test_anchors_stand_in_the_corners(root: Path) -> None:
    dataset = scenes("mnist_anchors", root)
    assert list(dataset.class_names) == list("01234")
    for place in range(20):
        pixels, regions, label = read(dataset, place)
        usable = [i for i in range(20) if i % 10 < 5]
        assert label == usable[place % 10] % 10
        for rows in (slice(0, 4), slice(24, 28)):
            for columns in (slice(0, 4), slice(24, 28)):
                assert (pixels[rows, columns] == 255).all()
                assert regions["anchors"][rows, columns].all()
        assert regions["anchors"].sum() == 64
        assert (pixels[regions["target"]] == 51 + usable[place % 10]).all()
        assert regions["target"].sum() == 400


def test_noise_lies_behind_digits_and_anchors(root: Path) -> None:
    clean, noisy, other = (
        scenes("mnist_anchors", root, noise=noise, seed=s) for noise, s in ((0, 0), (40, 0), (40, 1))
    )
    background = []
    for place in range(20):
        pixels, regions, label = read(noisy, place)
        wanted, of_clean, same = read(clean, place)
        assert label == same
        ink = regions["target"] | regions["anchors"]
        assert (pixels[ink] == wanted[ink]).all()
        assert all((regions[name] == of_clean[name]).all() for name in regions)
        assert (read(noisy, place)[0] == pixels).all()
        assert (read(other, place)[0][~ink] != pixels[~ink]).mean() > 0.9
        background.append(pixels[~ink])
    values = np.concatenate(background)
    assert (values.min(), values.max()) == (0, 40)
    assert values.mean() == pytest.approx(20, abs=1)


@pytest.mark.parametrize("name", NAMES)
def test_a_scene_belongs_to_its_seed_and_id(root: Path, name: str) -> None:
    dataset, again = scenes(name, root), scenes(name, root, train_size=7, test_size=41, reference_size=3)
    for place in (3, 17, 39):
        for one, other in ((dataset, again), (dataset, dataset)):
            assert (read(one, place)[0] == read(other, place)[0]).all()
    other = replace(dataset, seed=1)
    assert any((read(dataset, place)[0] != read(other, place)[0]).any() for place in range(10)) == (
        name != "mnist_anchors"
    )
    assert sample_table_digest(dataset.samples()) != sample_table_digest(other.samples())
    assert dataset.annotations() != other.annotations()


def test_splits_share_no_digit(root: Path) -> None:
    """The greys of the train pictures end at 30, those of the test pictures begin at 51."""
    for split, greys in (("train", range(1, 31)), ("test", range(51, 71))):
        dataset = scenes("mnist_distractor4", root, split=split)
        for place in range(20):
            assert set(np.unique(read(dataset, place)[0])) - {0} <= set(greys) | set(range(greys[-1]))
            assert np.unique(read(dataset, place)[0]).max() in greys
    dataset = scenes("mnist_anomaly", root, reference_size=5)
    assert len(dataset.reference()) == 5
    assert {s.sample_id for s in dataset.reference()} <= {s.sample_id for s in dataset.in_split("train")}
    assert not {s.sample_id for s in dataset.in_split("test")} & {s.sample_id for s in dataset.in_split("train")}


def test_mistakes(root: Path) -> None:
    dataset = scenes("mnist_anomaly", root)
    with pytest.raises(BadSample, match="no scene test-00040"):
        dataset.read(replace(dataset.samples()[0], sample_id="test-00040"))
    for changed in ({"test_size": 0}, {"sides": [5, 3]}, {"sides": [1, 29]}, {"colours": [0, 256]}):
        with pytest.raises(UserError, match=next(iter(changed))):
            scenes("mnist_anomaly", root, **changed)
    with pytest.raises(UserError, match="digits is 5"):
        scenes("mnist_distractor4", root, digits=5)
    with pytest.raises(UserError, match="anchor"):
        scenes("mnist_anchors", root, anchor=15)
    with pytest.raises(UserError, match="noise is 256"):
        scenes("mnist_anchors", root, noise=256)
    with pytest.raises(UserError, match="does not exist"):
        scenes("mnist_anomaly", Path("/nowhere")).samples()


@pytest.mark.skipif(not (REAL_DATA / "mnist").is_dir(), reason="the real digits are not here")
def test_real_digits_have_no_ink_under_the_anchors() -> None:
    """Else an anchor would tell more than that it is there."""
    dataset = scenes("mnist_anchors", REAL_DATA / "mnist", test_size=200, anchor=1)
    assert isinstance(dataset, AnchorScenes)
    for place in range(0, 200, 5):
        pixels, _, _ = read(dataset, place)
        for rows in (slice(1, 4), slice(24, 27)):
            assert not pixels[rows, 1:4].any()
            assert not pixels[rows, 24:27].any()


@pytest.fixture
def numbers(tmp_path: Path) -> SVHNCount:
    """Photographs of 60 x 100 pixels with a number of 2 digits, bright pixels in both boxes."""
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
        records = []
        for place in range(12):
            image = np.full((60, 100, 3), 10, np.uint8)
            boxes = [{"left": 30 + 12 * k + place, "top": 20, "width": 10, "height": 16, "label": 1} for k in range(2)]
            for k, box in enumerate(boxes):
                image[20:36, box["left"] : box["left"] + 10] = 100 + 100 * k
            Image.fromarray(image).save(tmp_path / split / f"{place + 1}.png")
            records.append({"filename": f"{place + 1}.png", "boxes": boxes})
        (tmp_path / split / "digitStruct.json").write_text(json.dumps(records))
    node = OmegaConf.to_container(OmegaConf.create(entries()["dataset"]["svhn_count"].text), resolve=True)
    assert isinstance(node, dict)
    node.pop("defaults")
    made = build({**node, "root": str(tmp_path)}, "dataset")
    assert isinstance(made, SVHNCount)
    return made


def test_crops_hold_the_number_and_enough_of_the_photograph(numbers: SVHNCount) -> None:
    shares = []
    for sample in numbers.samples():
        assert sample.label == 1  # two digits
        picture = numbers.read(sample)
        pixels, planes = np.asarray(picture.image)[..., 0].astype(int), picture.regions["target"].numpy()
        assert pixels.shape == (128, 128)
        for plane, grey in zip(planes, (100, 200), strict=True):
            assert abs(pixels[plane].mean() - grey) < 25  # the planes lie on the digits; their edges are blurred
        assert pixels[~planes.any(0)].mean() < 20
        top, left, height, width = numbers._frame(sample, numbers._source.read(sample).regions["target"])
        assert 0 <= top <= 60 - height
        assert 0 <= left <= 100 - width
        shares.append(height * width / 6000)
        place = int(sample.sample_id[-2:]) - 1
        first, last = 30 + place, 52 + place
        inside = (min(top + height, 36) - max(top, 20)) * (min(left + width, last) - max(left, first))
        assert inside >= 0.95 * 16 * 22
    assert min(shares) > 0.39
    assert len({round(share, 2) for share in shares}) > 4


def test_a_crop_belongs_to_its_seed_and_id(numbers: SVHNCount) -> None:
    def same_as(other: SVHNCount) -> list[bool]:
        pairs = [(numbers.read(sample).image, other.read(sample).image) for sample in numbers.samples()]
        return [np.array_equal(np.asarray(own), np.asarray(its)) for own, its in pairs]

    other = replace(numbers, seed=1)
    assert all(same_as(replace(numbers)))
    assert not all(same_as(other))
    assert sample_table_digest(numbers.samples()) != sample_table_digest(other.samples())
    assert numbers.annotations() != other.annotations()
    with pytest.raises(UserError, match="photograph"):
        replace(numbers, photograph=0.0)
