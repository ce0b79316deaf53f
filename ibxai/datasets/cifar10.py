"""CIFAR-10: 32 x 32 photographs of ten classes, in the official Python files or as one .npz a split.

Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", technical report, 2009. The official files are
pickles, which could run code when they are loaded as usual. Here no name in them reaches a module: numpy's arrays
are taken apart by stand-ins that keep the bytes, and any other name is refused.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ibxai.datasets.small_pictures import Records, SmallPictures, SplitName, existing_root
from ibxai.errors import UserError

_FOLDER = "cifar-10-batches-py"
_FILES: dict[SplitName, tuple[str, ...]] = {
    "train": tuple(f"data_batch_{i}" for i in range(1, 6)),
    "test": ("test_batch",),
}
_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_PIXELS = 3 * 32 * 32


@dataclass(frozen=True)
class CIFAR10(SmallPictures):
    """The ten classes. `root` holds cifar-10-batches-py/ (or is it), or one *train*.npz and one *test*.npz with
    `images` uint8 [N, 32, 32, 3] and `labels` [N].
    """

    name: str = "cifar10"

    @property
    def class_names(self) -> Sequence[str]:
        return _CLASSES

    def _records(self, split: SplitName) -> Sequence[Records]:
        root = existing_root(self.root, "CIFAR-10")
        for folder in (root / _FOLDER, root):
            if (folder / _FILES["test"][0]).exists() or (folder / _FILES["train"][0]).exists():
                return [_read_batch(folder / name) for name in _FILES[split]]
        archives = sorted(root.glob(f"*{split}*.npz"))
        if len(archives) == 1:
            return [_read_npz(archives[0])]
        found = f"several {split} files ({archives[0].name}, {archives[1].name})" if archives else f"no {_FOLDER}/"
        raise UserError(
            f"CIFAR-10: there is {found} under {root}.\n"
            "Get cifar-10-python.tar.gz from https://www.cs.toronto.edu/~kriz/cifar.html and unpack it there."
        )


def _read_batch(path: Path) -> Records:
    """An official file: a dict with "data" uint8 [N, 3072], channel by channel, and "labels", a list."""
    content = _unpickled(path)
    named = {k.decode("latin1") if isinstance(k, bytes) else k: v for k, v in content.items()}
    data, labels = named.get("data"), named.get("labels")
    if not isinstance(data, _Array) or not isinstance(labels, list) or not all(type(label) is int for label in labels):
        raise UserError(f"{path} is no batch of CIFAR-10: a dict with `data` and `labels` is expected.")
    pixels = data.decoded()
    if pixels is None or pixels.ndim != 2 or pixels.shape[1] != _PIXELS:
        raise UserError(f"{path}: `data` is no array of bytes [N, {_PIXELS}].")
    return Records(pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), np.array(labels, np.int64), path)


def _read_npz(path: Path) -> Records:
    try:
        with np.load(path, allow_pickle=False) as archive:
            images, labels = archive["images"], archive["labels"]
    except Exception as error:  # damage surfaces as whatever its decoder stumbles on: BadZipFile, zlib.error, KeyError
        raise UserError(f"{path} cannot be read: {error or type(error).__name__}.") from error
    if images.dtype != np.uint8 or images.shape[1:] != (32, 32, 3) or labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise UserError(f"{path}: `images` uint8 [N, 32, 32, 3] and whole `labels` [N] are expected.")
    return Records(images, labels.astype(np.int64), path)


def _unpickled(path: Path) -> dict[Any, Any]:
    try:
        # the files were written by Python 2, whose texts are bytes
        content = _Reader(io.BytesIO(path.read_bytes()), encoding="bytes").load()
    except OSError as error:
        raise UserError(f"CIFAR-10: {path} cannot be read: {error.strerror or error}.") from error
    except Exception as error:  # a damaged pickle fails in many ways: EOFError, ValueError, KeyError, MemoryError
        raise UserError(f"{path} cannot be read as a batch of CIFAR-10: {error or type(error).__name__}.") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is no batch of CIFAR-10: a dict is expected, a {type(content).__name__} was found.")
    return content


class _Reader(pickle.Unpickler):
    """Builds dicts, lists, numbers and texts, and arrays through the stand-ins below; nothing is imported."""

    def find_class(self, module: str, name: str) -> Any:
        stand_in = _STAND_INS.get((module.replace("numpy._core", "numpy.core"), name))
        if stand_in is None:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is not loaded because it could run code")
        return stand_in


class _Type:
    """In the place of numpy.dtype."""

    def __init__(self, code: object, *_: object) -> None:
        self.code = code.decode("latin1") if isinstance(code, bytes) else code

    def __setstate__(self, state: object) -> None:
        pass  # the byte order, and bytes have none


class _Array:
    """In the place of numpy.ndarray: what numpy would be made from."""

    shape: object = None
    kind: object = None
    by_columns: object = False
    content: object = None

    def __init__(self, *_: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        if isinstance(state, tuple) and len(state) == 5:
            _, self.shape, self.kind, self.by_columns, self.content = state

    def decoded(self) -> np.ndarray | None:
        """uint8 in the stored shape; None when it holds anything but bytes, or not as many as the shape says."""
        bytes_in_rows = isinstance(self.content, bytes | bytearray) and not self.by_columns
        if not bytes_in_rows or not isinstance(self.kind, _Type) or self.kind.code not in ("u1", "|u1"):
            return None
        flat = np.frombuffer(self.content, np.uint8)  # type: ignore[call-overload]  # bytes, as just seen
        try:
            return flat.reshape(self.shape)
        except (TypeError, ValueError):
            return None


def _from_buffer(content: object, kind: object, shape: object, order: object) -> _Array:
    array = _Array()
    array.content, array.kind, array.shape, array.by_columns = content, kind, shape, order in ("F", b"F")
    return array


def _as_latin1(text: object, encoding: object) -> bytes:
    """In the place of codecs.encode, by which Python 3 writes bytes in the old protocols."""
    if not isinstance(text, str):
        raise pickle.UnpicklingError("bytes that are no text")
    return text.encode("latin1")


_STAND_INS = {
    ("numpy.core.multiarray", "_reconstruct"): _Array,
    ("numpy.core.numeric", "_frombuffer"): _from_buffer,
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Type,
    ("_codecs", "encode"): _as_latin1,
}
