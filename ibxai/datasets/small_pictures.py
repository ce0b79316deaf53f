"""Datasets whose pictures are small and lie many to a file: kept in memory, with a train and a test split.

Studies that train a network (`ibxai/metrics/`) need the train split; `samples` are the pictures to explain.
"""

from __future__ import annotations

import hashlib
import heapq
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from ibxai.errors import BadSample, UserError
from ibxai.types import Picture, Sample

SplitName = Literal["train", "test"]


@dataclass(frozen=True)
class Records:
    """What one file holds. images: uint8 [N, H, W] grey or [N, H, W, 3] RGB; labels: int [N]."""

    images: np.ndarray
    labels: np.ndarray
    source: Path


@dataclass(frozen=True)
class SmallPictures(ABC):
    """root: where the official files are. split: the pictures that are explained.
    reference_size: pictures of the train split that feature statistics are estimated on, chosen by a hash of their ids.
    """

    root: str
    name: str
    split: SplitName = "test"
    reference_size: int = 1000

    def __post_init__(self) -> None:
        if self.reference_size < 1:
            raise UserError(f"dataset.reference_size is {self.reference_size}: give 1 or more pictures.")

    @property
    @abstractmethod
    def class_names(self) -> Sequence[str]: ...

    @abstractmethod
    def _records(self, split: SplitName) -> Sequence[Records]:
        """The files of a split, in their order. Raises UserError when they are not there or not what they should be."""

    @property
    def reference_note(self) -> str:
        among = ": the pictures that are explained may be among them" if self.split == "train" else ""
        count = len(self.reference())
        return f"The reference split is {count} pictures of the train split, chosen by a hash of their ids{among}."

    def samples(self) -> Sequence[Sample]:
        """The pictures of `split` in the order of their files. Raises UserError when the layout is not there."""
        return self.in_split(self.split)

    def in_split(self, split: SplitName) -> Sequence[Sample]:
        """All the pictures of a split, "train-00000" and on. Raises UserError when the layout is not there."""
        return self._train[0] if split == "train" else self._test[0]

    def reference(self) -> Sequence[Sample]:
        """`reference_size` pictures of the train split, or all when there are fewer, sorted by id."""
        return self._reference

    def read(self, sample: Sample) -> Picture:
        """The picture in RGB at its own size (grey: three equal channels). Raises BadSample for an unknown id."""
        split, _, place = sample.sample_id.partition("-")
        images: Sequence[np.ndarray] | np.ndarray = ()
        if split in ("train", "test"):
            images = (self._train if split == "train" else self._test)[1]
        if not place.isdecimal() or int(place) >= len(images):
            raise BadSample(f"{self.name} has no picture {sample.sample_id}")
        return Picture(Image.fromarray(images[int(place)]).convert("RGB"))

    @cached_property
    def _train(self) -> tuple[Sequence[Sample], np.ndarray]:
        return self._decoded("train")

    @cached_property
    def _test(self) -> tuple[Sequence[Sample], np.ndarray]:
        return self._decoded("test")

    @cached_property
    def _reference(self) -> Sequence[Sample]:
        chosen = heapq.nsmallest(self.reference_size, self.in_split("train"), key=_draw)
        return tuple(sorted(chosen, key=lambda sample: sample.sample_id))

    def _decoded(self, split: SplitName) -> tuple[Sequence[Sample], np.ndarray]:
        parts = self._records(split)
        for part in parts:
            _check(part, len(self.class_names))
        found: list[Sample] = []
        for part in parts:
            size = part.source.stat().st_size
            for label in part.labels.tolist():
                sample_id = f"{split}-{len(found):05d}"
                found.append(Sample(sample_id, sample_id, part.source, size, label))
        return tuple(found), np.concatenate([part.images for part in parts])


def _check(part: Records, classes: int) -> None:
    if len(part.images) != len(part.labels):
        raise UserError(f"{part.source} has {len(part.images)} pictures and {len(part.labels)} labels.")
    if len(part.labels) and not 0 <= part.labels.min() <= part.labels.max() < classes:
        raise UserError(f"{part.source} has labels outside 0 to {classes - 1}.")


def _draw(sample: Sample) -> bytes:
    return hashlib.sha256(sample.sample_id.encode()).digest()


def existing_root(root: str, name: str) -> Path:
    """The folder. Raises UserError when it is not there."""
    path = Path(root).expanduser()
    if not path.is_dir():
        reason = "is a file, not a folder" if path.exists() else "does not exist"
        raise UserError(f"{name}: dataset.root={root} {reason}.")
    return path
