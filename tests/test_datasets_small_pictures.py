"""CIFAR-10, MNIST and Fashion-MNIST: made files in the official layouts, hostile ones, and the real ones."""

from __future__ import annotations

import gzip
import pickle
import struct
from collections import Counter
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torchvision
from omegaconf import OmegaConf

from ibxai.catalogue import entries
from ibxai.datasets.cifar10 import CIFAR10
from ibxai.datasets.mnist_family import MNIST, FashionMNIST
from ibxai.datasets.small_pictures import SmallPictures
from ibxai.errors import BadSample, UserError

REAL_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
BATCHES = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
BY_NAME: dict[str, type[SmallPictures]] = {"cifar10": CIFAR10, "mnist": MNIST, "fashion_mnist": FashionMNIST}


def numbers(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def as_python2(data: np.ndarray, labels: list[int]) -> bytes:
    """The official files' form: protocol 2 of Python 2, whose texts are bytes and whose arrays hold a text."""

    def text(content: bytes) -> bytes:
        return b"T" + struct.pack("<i", len(content)) + content

    def array() -> bytes:
        empty = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85" + text(b"b") + b"\x87R"
        shape = b"".join(b"M" + struct.pack("<H", side) for side in data.shape) + b"\x86"
        kind = b"cnumpy\ndtype\n" + text(b"u1") + b"K\x00K\x01\x87R(K\x03" + text(b"|") + b"NNNJ" + 4 * b"\xff"
        kind += b"J" + 4 * b"\xff" + b"K\x00tb"
        return empty + b"(K\x01" + shape + kind + b"\x89" + text(data.tobytes()) + b"tb"

    listed = b"](" + b"".join(b"K" + bytes([label]) for label in labels) + b"e"
    entries = [text(b"batch_label"), text(b"training"), text(b"labels"), listed, text(b"data"), array()]
    return b"\x80\x02}(" + b"".join(entries) + b"u."


def write_cifar(folder: Path, count: int = 3) -> dict[str, tuple[np.ndarray, list[int]]]:
    folder.mkdir(parents=True)
    made = {}
    for place, name in enumerate(BATCHES):
        data, labels = numbers(place, count, 3072), [(place + i) % 10 for i in range(count)]
        (folder / name).write_bytes(as_python2(data, labels))
        made[name] = data, labels
    return made


def test_the_made_form_is_what_numpy_and_torchvision_read(tmp_path: Path) -> None:
    made = write_cifar(tmp_path / "x")
    with (tmp_path / "x" / "test_batch").open("rb") as file:
        read = pickle.load(file, encoding="latin1")  # as torchvision does
    assert np.array_equal(read["data"], made["test_batch"][0])
    assert read["labels"] == made["test_batch"][1]


@pytest.mark.parametrize("inside", ["cifar-10-batches-py", "."])
def test_cifar10_in_the_official_files(tmp_path: Path, inside: str) -> None:
    made = write_cifar(tmp_path / "root" / inside)
    dataset = CIFAR10(str(tmp_path / "root"))
    assert [s.label for s in dataset.samples()] == made["test_batch"][1]
    train = dataset.in_split("train")
    assert len(train) == 15
    assert [s.label for s in train] == [label for name in BATCHES[:5] for label in made[name][1]]
    assert train[3].source.name == "data_batch_2"
    assert train[3].size == train[3].source.stat().st_size
    pixels = np.asarray(dataset.read(train[4]).image)  # the second picture of the second file
    flat = made["data_batch_2"][0][1]
    for channel, row, column in [(0, 0, 0), (0, 0, 31), (0, 31, 0), (1, 5, 7), (2, 31, 31)]:
        assert pixels[row, column, channel] == flat[1024 * channel + 32 * row + column]


@pytest.mark.parametrize("protocol", range(6))
def test_cifar10_written_by_python_3(tmp_path: Path, protocol: int) -> None:
    data, labels = numbers(1, 2, 3072), [3, 9]
    (tmp_path / "test_batch").write_bytes(pickle.dumps({"data": data, "labels": labels}, protocol))
    dataset = CIFAR10(str(tmp_path))
    assert [s.label for s in dataset.samples()] == labels
    expected = data[1].reshape(3, 32, 32).transpose(1, 2, 0)
    assert np.array_equal(np.asarray(dataset.read(dataset.samples()[1]).image), expected)


def test_cifar10_in_one_npz_a_split(tmp_path: Path) -> None:
    images = numbers(2, 4, 32, 32, 3)
    for split in ("train", "test"):
        np.savez(tmp_path / f"some_{split}_4.npz", images=images, labels=np.array([0, 1, 2, 9]))
    dataset = CIFAR10(str(tmp_path))
    assert [s.sample_id for s in dataset.samples()] == [f"test-0000{i}" for i in range(4)]
    assert np.array_equal(np.asarray(dataset.read(dataset.in_split("train")[3]).image), images[3])
    np.savez(tmp_path / "other_test_4.npz", images=images, labels=np.array([0, 1, 2, 9]))
    with pytest.raises(UserError, match="several test files"):
        CIFAR10(str(tmp_path)).samples()


EXECUTED: list[str] = []


class Runs:
    """A pickle that would run code."""

    def __init__(self, call: Any, *arguments: object) -> None:
        self.call = call, arguments

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("protocol", [0, 2, 5])
@pytest.mark.parametrize(
    "hostile",
    [
        Runs(EXECUTED.append, "x"),
        Runs(eval, "EXECUTED.append('x')"),
        {"data": Runs(print, "x"), "labels": []},
        np.array([Runs(print, "x")], dtype=object),
        {"data": np.zeros((1, 3072), dtype=object), "labels": [0]},
    ],
)
def test_a_pickle_that_would_run_code_is_refused(
    tmp_path: Path, hostile: object, protocol: int, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "test_batch").write_bytes(pickle.dumps(hostile, protocol))
    with pytest.raises(UserError) as error:
        CIFAR10(str(tmp_path)).samples()
    assert len(str(error.value).splitlines()) <= 2
    assert EXECUTED == []
    assert capsys.readouterr().out == ""


def batch(data: object = None, labels: object = None) -> bytes:
    return pickle.dumps({"data": numbers(0, 1, 3072) if data is None else data, "labels": labels or [0]})


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "cannot be read as a batch"),
        (b"\x80\x04garbage", "cannot be read as a batch"),
        (batch()[:-500], "cannot be read as a batch"),
        (pickle.dumps([1]), "a dict is expected, a list was found"),
        (pickle.dumps({"data": 1}), "a dict with `data` and `labels`"),
        (batch(numbers(0, 1, 3071)), "no array of bytes"),
        (batch(np.zeros((1, 3072))), "no array of bytes"),
        (batch(np.asfortranarray(numbers(0, 2, 3072)), [0, 1]), "no array of bytes"),
        (batch(labels=[0, 1]), "1 pictures and 2 labels"),
        (batch(labels=[10]), "labels outside 0 to 9"),
        (batch(labels=["0"]), "a dict with `data` and `labels`"),
    ],
)
def test_damaged_cifar10_files(tmp_path: Path, content: bytes, says: str) -> None:
    (tmp_path / "test_batch").write_bytes(content)
    with pytest.raises(UserError, match=says) as error:
        CIFAR10(str(tmp_path)).samples()
    assert len(str(error.value).splitlines()) <= 2


@pytest.mark.parametrize(
    ("arrays", "says"),
    [
        ({"images": numbers(0, 2, 32, 32)}, "cannot be read"),
        ({"images": numbers(0, 2, 32, 32), "labels": np.zeros(2, int)}, "uint8"),
        ({"images": np.zeros((2, 32, 32, 3)), "labels": np.zeros(2, int)}, "uint8"),
        ({"images": numbers(0, 2, 32, 32, 3), "labels": np.zeros(2)}, "whole `labels`"),
        ({"images": numbers(0, 2, 32, 32, 3), "labels": np.array([None, 1])}, "cannot be read"),
    ],
)
def test_damaged_npz_files(tmp_path: Path, arrays: dict[str, np.ndarray], says: str) -> None:
    np.savez(tmp_path / "test.npz", **arrays)
    with pytest.raises(UserError, match=says):
        CIFAR10(str(tmp_path)).samples()


# idx files


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">{1 + array.ndim}I", 0x0800 + array.ndim, *array.shape) + array.tobytes()


def write_mnist(raw: Path, packed: bool) -> dict[str, np.ndarray]:
    raw.mkdir(parents=True, exist_ok=True)
    made = {}
    for place, (prefix, count) in enumerate({"train": 7, "t10k": 4}.items()):
        made[f"{prefix}-images-idx3-ubyte"] = numbers(place, count, 28, 28)
        made[f"{prefix}-labels-idx1-ubyte"] = np.arange(count, dtype=np.uint8)
    for name, array in made.items():
        content = idx(array)
        (raw / (f"{name}.gz" if packed else name)).write_bytes(gzip.compress(content) if packed else content)
    return made


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("cls", [MNIST, FashionMNIST])
def test_mnist_in_torchvisions_layout(tmp_path: Path, cls: type[MNIST], packed: bool) -> None:
    made = write_mnist(tmp_path / cls.folder / "raw", packed)
    dataset = cls(str(tmp_path))
    for split, prefix in (("train", "train"), ("test", "t10k")):
        samples = dataset.in_split(split)  # type: ignore[arg-type]
        images = made[f"{prefix}-images-idx3-ubyte"]
        assert [s.label for s in samples] == list(range(len(images)))
        for sample, image in zip(samples, images, strict=True):
            assert np.array_equal(np.asarray(dataset.read(sample).image), np.stack([image] * 3, axis=2))
    if not packed:  # torchvision reads the unpacked files alone
        theirs = getattr(torchvision.datasets, cls.__name__)(tmp_path, train=False)
        assert np.array_equal(theirs.data.numpy(), made["t10k-images-idx3-ubyte"])
        assert theirs.targets.tolist() == [s.label for s in dataset.samples()]


@pytest.mark.parametrize("place", [".", "raw"])
def test_mnist_files_by_themselves(tmp_path: Path, place: str) -> None:
    write_mnist(tmp_path / "root" / place, packed=True)
    assert len(MNIST(str(tmp_path / "root")).samples()) == 4


GOOD = idx(numbers(0, 4, 28, 28))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (GOOD[:-1], "3,135 of the 3,136 bytes"),
        (GOOD + b"x", "more than the 3,136 bytes"),
        (GOOD[:10], "ends in its header"),
        (idx(np.arange(4, dtype=np.uint8)).ljust(20, b"0"), "magic number 2049"),
        (struct.pack(">4I", 0x0803, 2**31, 28, 28), "no idx file of this dataset"),
        (struct.pack(">4I", 0x0803, 4, 2**31, 28), "no idx file of this dataset"),
        (idx(numbers(0, 3, 28, 28)), "3 pictures and 4 labels"),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_damaged_idx_files(tmp_path: Path, content: bytes, says: str, packed: bool) -> None:
    write_mnist(tmp_path, packed)
    name = "t10k-images-idx3-ubyte" + (".gz" if packed else "")
    (tmp_path / name).write_bytes(gzip.compress(content) if packed else content)
    with pytest.raises(UserError, match=says):
        MNIST(str(tmp_path)).samples()


def test_a_gzip_file_that_is_cut_short_or_none(tmp_path: Path) -> None:
    write_mnist(tmp_path, packed=True)
    path = tmp_path / "t10k-images-idx3-ubyte.gz"
    for content in (path.read_bytes()[:-20], b"no gzip", path.read_bytes()[:-4] + b"\0\0\0\0"):
        path.write_bytes(content)
        with pytest.raises(UserError, match="cannot be read"):
            MNIST(str(tmp_path)).samples()


# all of them


@pytest.mark.parametrize("name", list(BY_NAME))
def test_what_is_missing_is_said_in_two_lines(tmp_path: Path, name: str) -> None:
    for root, says in [
        (tmp_path, "there is no"),
        (tmp_path / "none", "does not exist"),
        (Path(__file__), "not a folder"),
    ]:
        with pytest.raises(UserError, match=says) as error:
            BY_NAME[name](str(root)).samples()
        lines = str(error.value).splitlines()
        assert len(lines) == (2 if root == tmp_path else 1)
        assert root != tmp_path or "https://" in lines[1]


def test_the_reference_split_is_training_pictures(tmp_path: Path) -> None:
    write_mnist(tmp_path, packed=False)
    few, more, all_of_them = (MNIST(str(tmp_path), reference_size=size).reference() for size in (3, 5, 100))
    assert [len(part) for part in (few, more, all_of_them)] == [3, 5, 7]
    assert set(few) < set(more) < set(all_of_them) == set(MNIST(str(tmp_path)).in_split("train"))
    assert MNIST(str(tmp_path), split="train").samples() == MNIST(str(tmp_path)).in_split("train")
    assert "explained may be among them" in MNIST(str(tmp_path), split="train").reference_note
    assert "among" not in MNIST(str(tmp_path)).reference_note
    with pytest.raises(UserError, match="reference_size is 0"):
        MNIST(str(tmp_path), reference_size=0)


def test_an_unknown_id_is_a_bad_sample(tmp_path: Path) -> None:
    from dataclasses import replace

    write_mnist(tmp_path, packed=False)
    dataset = MNIST(str(tmp_path))
    sample = dataset.samples()[0]
    for sample_id in ("test-00004", "test--1", "test-", "other-00000", ""):
        with pytest.raises(BadSample):
            dataset.read(replace(sample, sample_id=sample_id))


@pytest.mark.parametrize("name", list(BY_NAME))
def test_the_yaml_has_every_field_with_its_default(name: str) -> None:
    cls = BY_NAME[name]
    values = OmegaConf.to_container(OmegaConf.create(entries()["dataset"][name].text))
    assert isinstance(values, dict)
    assert values.pop("_target_") == f"{cls.__module__}.{cls.__name__}"
    assert values.pop("defaults"), "the network that is explained where none is chosen"
    assert values == {f.name: "???" if f.default is MISSING else f.default for f in fields(cls)}


OFFICIAL_TEST = {"mnist": [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]}
OFFICIAL_TRAIN = {"mnist": [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]}


@pytest.mark.parametrize("name", list(BY_NAME))
def test_the_real_files(name: str) -> None:
    root = REAL_DATA / name
    if not root.is_dir():
        pytest.skip(f"{root} is not here")
    dataset = BY_NAME[name](str(root))
    test, train = dataset.samples(), dataset.in_split("train")
    even = {"cifar10": (100, 500), "fashion_mnist": (200, 1200)}.get(name, (0, 0))
    counted = [Counter(s.label for s in part) for part in (test, train)]
    assert [counted[0][i] for i in range(10)] == OFFICIAL_TEST.get(name, [even[0]] * 10)
    assert [counted[1][i] for i in range(10)] == OFFICIAL_TRAIN.get(name, [even[1]] * 10)
    image = dataset.read(test[0]).image
    assert image.mode == "RGB"
    assert image.size == ((32, 32) if name == "cifar10" else (28, 28))
    first = np.asarray(dataset.read(train[0]).image)
    assert first.std() > 20
