"""SVHN, format 1: photographs of house numbers, each digit with a box; the class is the number of digits.

Netzer et al., "Reading Digits in Natural Images with Unsupervised Feature Learning", NIPS workshop 2011. Zhmoginov et
al. ("Information-Bottleneck Approach to Salient Region Discovery", sec. 4.4) let a network count the digits of the full
numbers and look whether it attends to them. torchvision reads format 2 alone, digits cut out at 32 x 32. In `root`:

    train/*.png  train/digitStruct.mat        test/*.png  test/digitStruct.mat

digitStruct.mat is a file of MATLAB 7.3, which is HDF5: the boxes of all 46,470 pictures take a minute and a half to
read. digitStruct.json, into which many have turned it, takes half a second and is read where it is there. `extra`, the
third set, is not used.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from ibxai.datasets.pictures import read_picture
from ibxai.datasets.splits import Found, SplitDataset, SplitName, by_id, files_in, size_of
from ibxai.datasets.tables import read_lines
from ibxai.errors import BadSample, UserError
from ibxai.types import Picture, Sample

MOST_DIGITS = 6  # of an official number: 135458 is the only one of six
_SIDES = ("left", "top", "width", "height")
_FARTHEST = 1_000_000  # no coordinate of a picture lies beyond

Box = tuple[float, float, float, float]
"""left, top, width, height in pixels, counted from 0. A few of the official ones begin left of or above the picture."""


@dataclass(frozen=True)
class SVHN(SplitDataset):
    """The photographs under `root`. Label 0 is a number of one digit, 5 one of six."""

    title: ClassVar[str] = "SVHN"
    how_to_get: ClassVar[str] = (
        "Get train.tar.gz and test.tar.gz (format 1) from http://ufldl.stanford.edu/housenumbers (non-commercial use), "
        "unpack them into one folder and set dataset.root to it."
    )

    @property
    def class_names(self) -> Sequence[str]:
        return tuple(f"{count} digit{'s' * (count > 1)}" for count in range(1, MOST_DIGITS + 1))

    def read(self, sample: Sample) -> Picture:
        """The photograph, with "target" [R, H, W], one plane a digit."""
        image = read_picture(sample.source)
        boxes = self._boxes[sample.source.parent.name][sample.source.name]
        return Picture(image, {"target": torch.stack([box_plane(box, image.width, image.height) for box in boxes])})

    def annotations(self) -> str:
        """A digest of the boxes of the explained pictures, 64 hex digits."""
        hasher = hashlib.sha256()
        for sample in self.samples():
            hasher.update(repr((sample.sample_id, self._boxes[self.split][sample.source.name])).encode())
        return hasher.hexdigest()

    def _look(self, root: Path) -> Found:
        if not any(self._boxes.values()):
            raise self.missing(f"there is no train/digitStruct.mat and no test/digitStruct.mat in {root}")
        train, test = (self._samples(root / split, split) for split in ("train", "test"))
        if not train and not test:
            raise self.missing(f"none of the pictures that digitStruct names is in {root}/train or {root}/test")
        facts = tuple(
            (f"{split} list", f"{len(self._boxes[split]):,} pictures, of which {len(samples):,} are here")
            for split, samples in (("train", train), ("test", test))
        )
        return Found(train, test, facts)

    def _samples(self, folder: Path, split: SplitName) -> tuple[Sample, ...]:
        files = files_in([folder], (".png",)) if folder.is_dir() else {}
        boxes = self._boxes[split]
        return by_id(self._sample(split, entry, boxes[name]) for name, entry in files.items() if name in boxes)

    @staticmethod
    def _sample(split: SplitName, file: os.DirEntry[str], boxes: Sequence[Box]) -> Sample:
        sample_id = f"{split}-{Path(file.name).stem:0>5}"
        return Sample(sample_id, sample_id, Path(file.path), size_of(file), len(boxes) - 1)

    @cached_property
    def _boxes(self) -> Mapping[str, Mapping[str, tuple[Box, ...]]]:
        """Split -> file name -> the boxes of its digits; empty for a split that is not there."""
        return {split: read_boxes(self.folder / split) for split in ("train", "test")}


def read_boxes(folder: Path) -> Mapping[str, tuple[Box, ...]]:
    """File name -> the boxes of its digits, from digitStruct.json or .mat; empty when neither is in the folder.

    Raises UserError for a file that is damaged or holds something else.
    """
    for path, records in ((folder / "digitStruct.json", _json_records), (folder / "digitStruct.mat", _mat_records)):
        if path.is_file():
            return {name: _checked(path, name, boxes) for name, boxes in records(path)}
    return {}


def box_plane(box: Box, width: int, height: int) -> Tensor:
    """bool [height, width]: rows `top` to `top + height` without the last, and columns alike, as far as the picture
    goes: the pixels that SVHN's own script see_bboxes.m shows. Raises BadSample when none is left.
    """
    left, top, across, down = (round(number) for number in box)
    plane = torch.zeros(height, width, dtype=torch.bool)
    plane[max(top, 0) : max(top + down, 0), max(left, 0) : max(left + across, 0)] = True
    if not plane.any():
        raise BadSample(f"the box of a digit {box} covers no pixel of {width} x {height}")
    return plane


def _checked(path: Path, name: str, boxes: Sequence[Box]) -> tuple[Box, ...]:
    numbers = [number for box in boxes for number in box]
    if not 1 <= len(boxes) <= MOST_DIGITS or not all(abs(number) < _FARTHEST for number in numbers):  # not so: NaN
        raise UserError(f"{path}: {name} has the boxes {boxes!r:.150}: 1 to {MOST_DIGITS} are expected, in pixels.")
    return tuple(boxes)


def _json_records(path: Path) -> Iterable[tuple[str, list[Box]]]:
    try:
        records = json.loads("\n".join(read_lines(path)))
        return [(str(record["filename"]), [_box(box) for box in record["boxes"]]) for record in records]
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"{path} is no list of filename and boxes ({type(error).__name__}: {error!s:.100}).\n"
            "Delete it when digitStruct.mat is beside it: that one is read then."
        ) from error


def _box(box: Mapping[str, Any]) -> Box:
    left, top, width, height = (float(box[side]) for side in _SIDES)
    return left, top, width, height


def _mat_records(path: Path) -> list[tuple[str, list[Box]]]:
    """A struct array as MATLAB writes it: `name` and `bbox` hold a reference a picture."""
    try:
        import h5py
    except ImportError as error:
        raise UserError(
            "Reading digitStruct.mat needs h5py, which is not installed: pip install 'ibxai[svhn]'"
        ) from error
    try:
        with h5py.File(path, "r") as file:
            structs = file["digitStruct"]
            names, groups = structs["name"][:, 0], structs["bbox"][:, 0]
            return [(_text(file[name]), _group(file, file[group])) for name, group in zip(names, groups, strict=True)]
    except Exception as error:  # a damaged file surfaces as whatever its reader stumbles on
        raise UserError(
            f"{path} cannot be read as SVHN's digitStruct ({type(error).__name__}: {error!s:.100}).\n"
            "Unpack train.tar.gz and test.tar.gz (format 1) again."
        ) from error


def _text(letters: Any) -> str:
    return "".join(map(chr, letters[:, 0]))


def _group(file: Any, group: Any) -> list[Box]:
    """Each side holds the number itself where there is one digit, and a reference a digit where there are more."""
    sides = []
    for side in _SIDES:
        values = group[side][:, 0]
        sides.append([float(file[value][0, 0] if values.dtype.hasobject else value) for value in values])
    return [(left, top, width, height) for left, top, width, height in zip(*sides, strict=True)]
