"""svhn_count: house numbers cut out of SVHN's photographs at random, at one size; the class is the number of digits.

Zhmoginov, Fischer, Sandler, "Information-Bottleneck Approach to Salient Region Discovery", 2019, section 4.4 and
appendix C.5: crops that hold at least 95 % of the box round the whole number and 40 % of the photograph, resampled to
128 x 128. Their shapes are those of Inception's augmentation, from 3:4 to 4:3 (Szegedy et al., CVPR 2015).

Differently from the paper a photograph has one crop, drawn from (seed, its id), and not another one in every epoch: a
picture that is explained has to be the same in every run. Where none of 50 draws will do, the whole photograph is
taken.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from ibxai.datasets.splits import SplitName
from ibxai.datasets.svhn import SVHN
from ibxai.draws import sample_keys, uniform
from ibxai.errors import UserError
from ibxai.types import Picture, Sample

_TRIES = 50
_NARROWEST, _WIDEST = 3 / 4, 4 / 3

Frame = tuple[int, int, int, int]
"""top, left, height, width in pixels."""


@dataclass(frozen=True)
class SVHNCount:
    """root, split, reference_size: as of `SVHN`. seed: of the crops. side: of a crop once it is resampled, in pixels.
    number: share of the box round the whole number that a crop holds at least. photograph: share of the photograph.
    """

    root: str
    name: str
    split: SplitName
    seed: int
    side: int
    number: float
    photograph: float
    reference_size: int

    def __post_init__(self) -> None:
        if self.side < 1 or not 0 < self.number <= 1 or not 0 < self.photograph <= 1:
            raise UserError(
                f"dataset.side is {self.side}, dataset.number {self.number}, dataset.photograph {self.photograph}: a "
                "side of 1 pixel or more and shares above 0, at most 1, are expected."
            )

    @property
    def class_names(self) -> Sequence[str]:
        return self._source.class_names

    @property
    def reference_note(self) -> str:
        return self._source.reference_note

    def samples(self) -> Sequence[Sample]:
        """A crop a photograph. Raises UserError when the layout is not there."""
        return self.in_split(self.split)

    def in_split(self, split: SplitName) -> Sequence[Sample]:
        return [self._crop_of(sample) for sample in self._source.in_split(split)]

    def reference(self) -> Sequence[Sample]:
        return [self._crop_of(sample) for sample in self._source.reference()]

    def read(self, sample: Sample) -> Picture:
        """The crop, with "target" [R, side, side], one plane a digit; a digit that was cut off is an empty one."""
        whole = self._source.read(sample)
        digits = whole.regions["target"]
        top, left, height, width = self._frame(sample, digits)
        size = (self.side, self.side)
        image = whole.image.crop((left, top, left + width, top + height)).resize(size, Image.Resampling.BILINEAR)
        cut = digits[:, top : top + height, left : left + width]
        planes = F.interpolate(cut[None].float(), size=size, mode="nearest-exact")[0] > 0
        return Picture(image, {"target": planes})

    def annotations(self) -> str:
        """A digest of what the regions are made from, 64 hex digits."""
        return hashlib.sha256(f"{self._source.annotations()} {self._decoding}".encode()).hexdigest()

    @cached_property
    def _source(self) -> SVHN:
        return SVHN(self.root, self.name, self.split, self.reference_size)

    @property
    def _decoding(self) -> str:
        return f"seed {self.seed}, {self.side} pixels, {self.number} of the number, {self.photograph} of the photograph"

    def _crop_of(self, sample: Sample) -> Sample:
        return dataclasses.replace(sample, decoding=self._decoding)

    def _frame(self, sample: Sample, digits: Tensor) -> Frame:
        """The first drawn frame that holds enough of the number."""
        height, width = digits.shape[1:]
        rows, columns = (digits.any(0).any(axis).nonzero().flatten() for axis in (1, 0))
        box = int(rows[0]), int(columns[0]), int(rows[-1] - rows[0]) + 1, int(columns[-1] - columns[0]) + 1
        for drawn in uniform(sample_keys(self.seed, [sample.sample_id], "crop"), 0, (_TRIES, 4))[0].tolist():
            area = (self.photograph + (1 - self.photograph) * drawn[0]) * height * width
            shape = _NARROWEST + (_WIDEST - _NARROWEST) * drawn[1]
            tall, wide = round((area / shape) ** 0.5), round((area * shape) ** 0.5)
            if not 1 <= tall <= height or not 1 <= wide <= width:
                continue
            frame = round(drawn[2] * (height - tall)), round(drawn[3] * (width - wide)), tall, wide
            if _shared(frame, box) >= self.number * box[2] * box[3]:
                return frame
        return 0, 0, height, width


def _shared(frame: Frame, box: Frame) -> int:
    """Pixels that lie in both."""
    sides = (min(frame[i] + frame[i + 2], box[i] + box[i + 2]) - max(frame[i], box[i]) for i in (0, 1))
    tall, wide = (max(side, 0) for side in sides)
    return tall * wide
