"""Scenes put together from real digits and pictures, in which the region that defines the class is known.

    mnist_anomaly, cifar10_anomaly      a rectangle of one colour in every second picture; is it there?    (sec. 4.1)
    mnist_distractor2, _distractor4     two or four digits, and the class is the smallest one's            (sec. 4.2)
    mnist_anchors                       a digit from 0 to 4 among four solid squares                       (sec. 4.3)

Reference: Zhmoginov, Fischer, Sandler, "Information-Bottleneck Approach to Salient Region Discovery", 2019, appendix C
too. A scene is a function of (seed, its id, the source's pictures) and is made when it is read. Scenes of the train
split are made of train pictures alone, so no digit is in both splits.

What the paper leaves open is settled here: rectangles lie wholly inside the picture; anchors are squares of 4 pixels in
the corners, where no digit of MNIST has ink; a small digit is put in the middle of its quadrant before it is shifted.
"""

from __future__ import annotations

import dataclasses
import hashlib
import heapq
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from PIL import Image

from ibxai.datasets.cifar10 import CIFAR10
from ibxai.datasets.mnist_family import MNIST
from ibxai.datasets.small_pictures import SmallPictures, SplitName
from ibxai.draws import sample_keys, uniform
from ibxai.errors import BadSample, UserError
from ibxai.types import Picture, Sample

_DIGIT = 28
_DRAWS = 16  # numbers that settle a scene
_SPLITS: tuple[SplitName, ...] = ("train", "test")


@dataclass(frozen=True)
class DigitScenes(ABC):
    """root: where the files of the source (MNIST or CIFAR-10) are. split: the scenes that are explained. seed: of the
    scenes. train_size, test_size: scenes of each split. reference_size: scenes of the train split for statistics.
    """

    root: str
    name: str
    split: SplitName
    seed: int
    train_size: int
    test_size: int
    reference_size: int

    def __post_init__(self) -> None:
        for setting in ("train_size", "test_size", "reference_size"):
            if getattr(self, setting) < 1:
                raise UserError(f"dataset.{setting} is {getattr(self, setting)}: 1 or more is expected.")

    @property
    @abstractmethod
    def class_names(self) -> Sequence[str]: ...

    @abstractmethod
    def _label(self, own: Sample, drawn: np.ndarray) -> int:
        """The class of the scene that is made round this picture of the source, known before a pixel is read."""

    @abstractmethod
    def _scene(self, split: SplitName, own: Sample, drawn: np.ndarray) -> tuple[np.ndarray, Mapping[str, np.ndarray]]:
        """uint8 [H, W] or [H, W, 3], and regions bool [H, W]. drawn: numbers in (0, 1) that settle the scene."""

    @property
    def reference_note(self) -> str:
        return (
            f"The reference split is {len(self.reference())} scenes of the train split, chosen by a hash of their ids."
        )

    def samples(self) -> Sequence[Sample]:
        """The scenes of `split`. Raises UserError when the source is not there."""
        return self.in_split(self.split)

    def in_split(self, split: SplitName) -> Sequence[Sample]:
        """All the scenes of a split, "train-00000" and on. Raises UserError when the source is not there."""
        return self._train if split == "train" else self._test

    def reference(self) -> Sequence[Sample]:
        """`reference_size` scenes of the train split, or all when there are fewer, sorted by id."""
        return self._reference

    def read(self, sample: Sample) -> Picture:
        """The scene in RGB (grey: three equal channels) with its regions. Raises BadSample for an unknown id."""
        split, _, place = sample.sample_id.partition("-")
        if split not in ("train", "test") or not place.isdecimal() or int(place) >= self._size(split):
            raise BadSample(f"{self.name} has no scene {sample.sample_id}")
        image, regions = self._scene(split, self._own(split, int(place)), self._drawn[split][int(place)])  # type: ignore[arg-type]
        planes = {name: torch.from_numpy(plane)[None] for name, plane in regions.items()}
        return Picture(Image.fromarray(image).convert("RGB"), planes)

    def annotations(self) -> str:
        """A digest of what the regions are made from: the scenes themselves."""
        return hashlib.sha256(f"{self._decoding} {len(self.samples())}".encode()).hexdigest()

    @cached_property
    def _source(self) -> SmallPictures:
        return MNIST(self.root)

    def _usable(self, split: SplitName) -> Sequence[Sample]:
        """The source's pictures that scenes are made round, one after the other."""
        return self._source.in_split(split)

    @cached_property
    def _candidates(self) -> Mapping[str, Sequence[Sample]]:
        return {split: self._usable(split) for split in _SPLITS}

    def _own(self, split: str, place: int) -> Sample:
        return self._candidates[split][place % len(self._candidates[split])]

    def _pixels(self, own: Sample) -> np.ndarray:
        """uint8 [28, 28] of a digit."""
        return np.asarray(self._source.read(own).image)[..., 0]

    @cached_property
    def _drawn(self) -> Mapping[str, np.ndarray]:
        """Split -> float [N, _DRAWS]."""
        ids = {split: [f"{split}-{place:05d}" for place in range(self._size(split))] for split in _SPLITS}
        return {s: uniform(sample_keys(self.seed, ids[s], "scene"), 0, (_DRAWS,)).double().numpy() for s in _SPLITS}

    @cached_property
    def _train(self) -> Sequence[Sample]:
        return self._table("train")

    @cached_property
    def _test(self) -> Sequence[Sample]:
        return self._table("test")

    @cached_property
    def _reference(self) -> Sequence[Sample]:
        chosen = heapq.nsmallest(
            self.reference_size, self._train, key=lambda sample: hashlib.sha256(sample.sample_id.encode()).digest()
        )
        return tuple(sorted(chosen, key=lambda sample: sample.sample_id))

    @property
    def _decoding(self) -> str:
        settings = dataclasses.asdict(self)
        size = ("root", "split", "train_size", "test_size", "reference_size")  # they change no scene
        return str({name: value for name, value in settings.items() if name not in size})

    def _size(self, split: str) -> int:
        return self.train_size if split == "train" else self.test_size

    def _table(self, split: SplitName) -> Sequence[Sample]:
        found = []
        for place, drawn in enumerate(self._drawn[split]):
            own, sample_id = self._own(split, place), f"{split}-{place:05d}"
            label = self._label(own, drawn)
            found.append(Sample(sample_id, sample_id, own.source, own.size, label, decoding=self._decoding))
        return tuple(found)


@dataclass(frozen=True)
class AnomalyScenes(DigitScenes):
    """chance: of a rectangle. sides: its shortest and longest side in pixels. colours: the darkest and the brightest of
    its values, drawn once for grey pictures and for each channel of others. Label 1 has a rectangle, region "target".
    """

    chance: float
    sides: tuple[int, int]
    colours: tuple[int, int]

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.sides[0] <= self.sides[1] <= _DIGIT:
            raise UserError(f"dataset.sides is {list(self.sides)}: two sides of 1 to {_DIGIT} pixels are expected.")
        if not 0 <= self.colours[0] <= self.colours[1] <= 255:
            raise UserError(f"dataset.colours is {list(self.colours)}: two values of 0 to 255 are expected.")

    @property
    def class_names(self) -> Sequence[str]:
        return "normal", "anomaly"

    def _label(self, own: Sample, drawn: np.ndarray) -> int:
        return int(drawn[0] < self.chance)

    def _scene(self, split: SplitName, own: Sample, drawn: np.ndarray) -> tuple[np.ndarray, Mapping[str, np.ndarray]]:
        image = self._pixels(own).copy()
        if not self._label(own, drawn):
            return image, {}
        height, width = _between(drawn[1:3], *self.sides)
        top, left = _between(drawn[3:5], 0, np.array(image.shape[:2]) - (height, width))
        place = np.s_[top : top + height, left : left + width]
        channels = 1 if image.ndim == 2 else 3
        image[place] = _between(drawn[5 : 5 + channels], *self.colours)
        region = np.zeros(image.shape[:2], dtype=bool)
        region[place] = True
        return image, {"target": region}


@dataclass(frozen=True)
class PhotographAnomalies(AnomalyScenes):
    """The same in CIFAR-10's photographs."""

    @cached_property
    def _source(self) -> SmallPictures:
        return CIFAR10(self.root)

    def _pixels(self, own: Sample) -> np.ndarray:
        return np.asarray(self._source.read(own).image)


@dataclass(frozen=True)
class DistractorScenes(DigitScenes):
    """digits: 2 to 4, each in a quadrant of its own of 56 x 56 pixels. small: the side that the digit which defines the
    class is reduced to. shift: most pixels that a digit is shifted by, each way. radius: of the region "target", a disc
    round the small digit (figure 12).
    """

    digits: int
    small: int
    shift: int
    radius: float

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 2 <= self.digits <= 4:
            raise UserError(f"dataset.digits is {self.digits}: 2 to 4 are expected, one a quadrant.")
        if not 1 <= self.small <= _DIGIT:
            raise UserError(f"dataset.small is {self.small}: 1 to {_DIGIT} pixels are expected.")

    @property
    def class_names(self) -> Sequence[str]:
        return MNIST.classes

    def _label(self, own: Sample, drawn: np.ndarray) -> int:
        assert own.label is not None
        return own.label

    def _scene(self, split: SplitName, own: Sample, drawn: np.ndarray) -> tuple[np.ndarray, Mapping[str, np.ndarray]]:
        side, quadrants = 2 * _DIGIT, np.argsort(drawn[:4])
        others = self._candidates[split]
        canvas = np.zeros((side, side), dtype=np.uint8)
        for number in range(self.digits):
            digit = self._pixels(own if number == 0 else others[int(drawn[4 + number] * len(others))])
            if number == 0:
                digit = np.asarray(Image.fromarray(digit).resize((self.small, self.small), Image.Resampling.BILINEAR))
            shift = _between(drawn[8 + 2 * number : 10 + 2 * number], -self.shift, self.shift)
            corner = _DIGIT * np.array(divmod(quadrants[number], 2)) + (_DIGIT - len(digit)) // 2 + shift
            if number == 0:
                centre = corner + (len(digit) - 1) / 2
            _paste(canvas, digit, corner)
        rows, columns = np.mgrid[:side, :side]
        disc = (rows - centre[0]) ** 2 + (columns - centre[1]) ** 2 <= self.radius**2
        return canvas, {"target": disc}


@dataclass(frozen=True)
class AnchorScenes(DigitScenes):
    """digits: those from 0 on that are classes. anchor: side of the four solid squares. noise: brightest value of the
    background where neither has ink, each pixel from 0 to it. Regions: "target", the pixels with ink, and "anchors".
    """

    digits: int
    anchor: int
    noise: int

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 2 <= self.digits <= 10 or not 1 <= self.anchor <= _DIGIT // 2:
            raise UserError(
                f"dataset.digits is {self.digits} and dataset.anchor {self.anchor}: 2 to 10 digits, and 1 to "
                f"{_DIGIT // 2} pixels are expected."
            )
        if not 0 <= self.noise <= 255:
            raise UserError(f"dataset.noise is {self.noise}: a value of 0 to 255 is expected.")

    @property
    def class_names(self) -> Sequence[str]:
        return MNIST.classes[: self.digits]

    def _usable(self, split: SplitName) -> Sequence[Sample]:
        return [own for own in self._source.in_split(split) if own.label is not None and own.label < self.digits]

    def _label(self, own: Sample, drawn: np.ndarray) -> int:
        assert own.label is not None
        return own.label

    def _scene(self, split: SplitName, own: Sample, drawn: np.ndarray) -> tuple[np.ndarray, Mapping[str, np.ndarray]]:
        digit = self._pixels(own)
        anchors = np.zeros(digit.shape, dtype=bool)
        for rows in (np.s_[: self.anchor], np.s_[-self.anchor :]):
            anchors[rows, : self.anchor] = anchors[rows, -self.anchor :] = True
        noise = np.random.default_rng(int(drawn[0] * 2**53)).integers(
            0, self.noise, digit.shape, np.uint8, endpoint=True
        )
        image = np.where(anchors, np.uint8(255), np.maximum(digit, noise))
        return image, {"target": (digit > 0) & ~anchors, "anchors": anchors}


def _between(drawn: np.ndarray, first: int | np.ndarray, last: int | np.ndarray) -> np.ndarray:
    """Whole numbers from `first` to `last`, both included, from numbers in (0, 1)."""
    return np.floor(first + drawn * (np.asarray(last) - first + 1)).astype(int)


def _paste(canvas: np.ndarray, digit: np.ndarray, corner: np.ndarray) -> None:
    """Put a digit on the canvas, in place; the brighter pixel wins, and what lies beyond the canvas is cut off."""
    (top, left), (height, width) = corner, digit.shape
    rows, columns = (slice(max(start, 0), start + n) for start, n in ((top, height), (left, width)))
    part = digit[rows.start - top :, columns.start - left :]
    place = canvas[rows, columns]
    np.maximum(place, part[: place.shape[0], : place.shape[1]], out=place)
