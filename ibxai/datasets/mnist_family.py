"""MNIST and Fashion-MNIST: 28 x 28 grey pictures of ten classes, in the official idx files.

LeCun, Bottou, Bengio and Haffner, "Gradient-based learning applied to document recognition", Proc. IEEE 1998; Xiao,
Rasul and Vollgraf, "Fashion-MNIST", arXiv:1708.07747. An idx file is a header (a magic number, then the size of every
dimension, 32 bit and big-endian) and the bytes. The counts are taken from the header, so a part of the dataset in the
same form is read too.
"""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from ibxai.datasets.small_pictures import Records, SmallPictures, SplitName, existing_root
from ibxai.errors import UserError

_PREFIX: dict[SplitName, str] = {"train": "train", "test": "t10k"}
_MOST_BYTES = 1 << 28  # five times the official files
_IMAGES, _LABELS = 0x0803, 0x0801  # unsigned bytes in three dimensions, and in one


@dataclass(frozen=True)
class MNIST(SmallPictures):
    """The handwritten digits. The four files are looked for in `root`, `root`/raw and `root`/MNIST/raw, as torchvision
    lays them out, unpacked or as .gz.
    """

    name: str = "mnist"

    title: ClassVar[str] = "MNIST"
    folder: ClassVar[str] = "MNIST"
    source: ClassVar[str] = "https://ossci-datasets.s3.amazonaws.com/mnist/"
    classes: ClassVar[tuple[str, ...]] = tuple("0123456789")

    @property
    def class_names(self) -> Sequence[str]:
        return self.classes

    def _records(self, split: SplitName) -> Sequence[Records]:
        root = existing_root(self.root, self.title)
        images = self._find(root, f"{_PREFIX[split]}-images-idx3-ubyte")
        labels = self._find(root, f"{_PREFIX[split]}-labels-idx1-ubyte")
        return [Records(_read_idx(images, _IMAGES), _read_idx(labels, _LABELS), images)]

    def _find(self, root: Path, name: str) -> Path:
        for folder in (root, root / "raw", root / self.folder / "raw"):
            for path in (folder / name, folder / f"{name}.gz"):
                if path.is_file():
                    return path
        raise UserError(
            f"{self.title}: there is no {name}[.gz] under {root} (nor in raw/ or {self.folder}/raw/).\n"
            f"Get the four idx files from {self.source} and put them there."
        )


@dataclass(frozen=True)
class FashionMNIST(MNIST):
    """Zalando's articles, in the same files as MNIST, under `root`/FashionMNIST/raw."""

    name: str = "fashion_mnist"

    title: ClassVar[str] = "Fashion-MNIST"
    folder: ClassVar[str] = "FashionMNIST"
    source: ClassVar[str] = "https://github.com/zalandoresearch/fashion-mnist"
    classes: ClassVar[tuple[str, ...]] = (
        *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
        *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
    )


def _read_idx(path: Path, magic: int) -> np.ndarray:
    """uint8 in the shape that the header says. The header is judged before anything of its size is read."""
    dimensions = magic & 0xFF
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            header = file.read(4 * (1 + dimensions))
            if len(header) < 4 * (1 + dimensions):
                raise UserError(f"{path} ends in its header.")
            found, *shape = struct.unpack(f">{1 + dimensions}I", header)
            count = math.prod(shape)
            if found != magic or shape[1:] not in ([], [28, 28]) or count > _MOST_BYTES:
                raise UserError(f"{path} is no idx file of this dataset: magic number {found}, size {shape}.")
            content = file.read(count + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} cannot be read: {error}.") from error
    if len(content) != count:
        more = "more than" if len(content) > count else f"{len(content):,} of"
        raise UserError(f"{path} holds {more} the {count:,} bytes that its header says: get it again.")
    return np.frombuffer(content, np.uint8).reshape(shape)
