"""Lesions: what a map highlights as a list of places, each found or not, as a reader of scans counts them.

The map is cut to the lungs and at a threshold, and each connected piece of what remains is a detection; so IBA-CT draws
lesions from heatmaps (Demir et al., "Information Bottleneck Attribution for Visual Explanations of Diagnosis and
Prognosis", MLMI 2021, sec. 5, Fig. 6). It names no threshold and judges by eye: the threshold (`rule`, as IoU's), the
least size of a piece and the judgement against annotated lesions are ours. A detection and a lesion are a pair when
their IoU reaches `overlap`, and the largest number of pairs counts, each detection and each lesion in one pair at most:

    precision = pairs / detections     recall = pairs / lesions     F1 = 2 pairs / (detections + lesions)

A lesion is a connected piece of a plane of the annotation, whatever its size, so a box is one lesion. Pieces hang
together by sides or corners. Detections are judged within one picture: a lesion that shows in ten slices counts ten
times.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch
from scipy import ndimage
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import maximum_bipartite_matching
from torch import Tensor
from torch.nn import functional as F

from ibxai.backbones import Backbone
from ibxai.errors import UserError, nearest
from ibxai.metrics.localisation import region_of
from ibxai.metrics.normalisation import undefined, with_sign
from ibxai.thresholds import RULES, Rule, cut
from ibxai.types import Attribution, Batch

_SIDES_AND_CORNERS = np.zeros((3, 3, 3), dtype=bool)
_SIDES_AND_CORNERS[1] = True  # within a plane, and never from one plane to the next


@dataclass(frozen=True)
class Lesions:
    """rule, level: of the threshold, see `thresholds.py`; of the map outside `within` set to 0, and of what speaks for
    the target: a pixel of 0 or less is never highlighted. smallest: of a detection, as a share of the picture.
    overlap: the least IoU of a pair. compare: "boxes" around the pieces, or "masks", the pieces themselves. within: the
    region outside which heat does not count, null for none. region: the annotation.
    """

    rule: Rule = "otsu"
    level: float = 0.5
    smallest: float = 0.0005
    overlap: float = 0.25
    compare: Literal["boxes", "masks"] = "boxes"
    within: str | None = "lungs"
    region: str = "target"

    version: ClassVar[int] = 1
    higher_is_better: ClassVar[bool] = True
    uses_regions: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.rule not in RULES:
            raise UserError(f"There is no threshold rule '{self.rule}'. {nearest(self.rule, RULES)}")
        if self.compare not in ("boxes", "masks"):
            raise UserError(f"Lesions are compared by boxes or masks, not by '{self.compare}'.")
        if not (0 < self.overlap <= 1 and 0 <= self.smallest <= 1):
            raise UserError(
                f"overlap is {self.overlap:g} and smallest {self.smallest:g}: shares of at most 1 are expected."
            )

    def __call__(self, backbone: Backbone, batch: Batch, attribution: Attribution) -> Mapping[str, Tensor]:
        """value [B], the F1; precision (0 where nothing is detected), recall, iou [B], of all that is detected with all
        lesions, in 0..1; detections, lesions, pairs [B], their numbers. NaN of rows without a lesion or without the
        region `within`, and of maps with NaN.
        """
        inside, truth = self._inside(batch), region_of(batch, self.region)
        detected = self.detected(attribution.heatmap, inside)
        found, lesions = Pieces.of(detected[:, None]), Pieces.of(truth.cpu().numpy())
        overlaps = (found.box_iou if self.compare == "boxes" else found.mask_iou)(lesions)
        paired = maximum_bipartite_matching(csr_matrix(overlaps >= self.overlap), "column") >= 0
        counts = [np.bincount(rows, minlength=len(batch)) for rows in (found.row, lesions.row, found.row[paired])]
        detections, annotated, pairs = (torch.from_numpy(count).to(truth.device) for count in counts)
        hot, ill = torch.from_numpy(detected).to(truth.device), truth.any(1)
        found_values = {
            "value": 2 * pairs / (detections + annotated),
            "precision": pairs / detections.clamp_min(1),
            "recall": pairs / annotated,
            "iou": (hot & ill).sum((1, 2)) / (hot | ill).sum((1, 2)),
            "detections": detections,
            "lesions": annotated,
            "pairs": pairs,
        }
        left_out = undefined(attribution.heatmap) | (annotated == 0) | ~inside.flatten(1).any(1)
        return {name: value.float().masked_fill(left_out, torch.nan) for name, value in found_values.items()}

    def outlines(self, batch: Batch, attribution: Attribution) -> Tensor:
        """uint8 [B, H, W]: 1 at the border of the detections, 2 at that of the lesions, where they meet 2."""
        detected = torch.from_numpy(self.detected(attribution.heatmap, self._inside(batch))).to(batch.inputs.device)
        lesions = region_of(batch, self.region).any(1)
        return torch.where(_border(lesions), 2, _border(detected).long()).to(torch.uint8)

    def _inside(self, batch: Batch) -> Tensor:
        """bool [B, H, W]: where heat counts."""
        if self.within is None:
            return torch.ones(len(batch), *batch.places, dtype=torch.bool, device=batch.inputs.device)
        return region_of(batch, self.within).any(1)

    def detected(self, heatmap: Tensor, inside: Tensor) -> np.ndarray:
        """bool [B, H, W]: the pixels of all detections. inside: bool [B, H, W], where heat counts."""
        heat = with_sign(heatmap.nan_to_num(), "positive") * inside
        hot = (heat.double() >= cut(heat, self.rule, self.level)[:, None, None]) & (heat > 0)
        pieces = Pieces.of(hot.cpu().numpy()[:, None])
        large = np.concatenate([[False], pieces.area >= self.smallest * hot[0].numel()])
        return large[pieces.numbers][:, 0]


def _border(places: Tensor) -> Tensor:
    """bool [B, H, W]: the pixels beside these places, so that a border hides nothing of what it is around."""
    return (F.max_pool2d(places[:, None].float(), 3, stride=1, padding=1)[:, 0] > 0) & ~places


@dataclass(frozen=True)
class Pieces:
    """The connected pieces of planes. numbers: int [B, R, H, W], 1 to N, and 0 where there is none. row: [N], of the
    batch. box: [N, 5], plane in the batch, top, left, bottom, right, the last two outside. area: [N], pixels.
    """

    numbers: np.ndarray
    row: np.ndarray
    box: np.ndarray
    area: np.ndarray

    @classmethod
    def of(cls, planes: np.ndarray) -> Pieces:
        """planes: bool [B, R, H, W]"""
        numbers, _ = ndimage.label(planes.reshape(-1, *planes.shape[2:]), _SIDES_AND_CORNERS)
        corners = [(p.start, y.start, x.start, y.stop, x.stop) for p, y, x in ndimage.find_objects(numbers)]
        box = np.array(corners, dtype=np.int64).reshape(-1, 5)
        area = np.bincount(numbers.ravel(), minlength=len(box) + 1)[1:]
        return cls(numbers.reshape(planes.shape), box[:, 0] // planes.shape[1], box, area)

    def box_iou(self, others: Pieces) -> np.ndarray:
        """[N, M]: of the boxes around the pieces, 0 where they are of different rows."""
        one, other = self.box[:, None, 1:], others.box[None, :, 1:]
        sides = np.minimum(one[..., 2:], other[..., 2:]) - np.maximum(one[..., :2], other[..., :2])
        shared = np.clip(sides, 0, None).prod(-1) * (self.row[:, None] == others.row)
        return shared / ((one[..., 2:] - one[..., :2]).prod(-1) + (other[..., 2:] - other[..., :2]).prod(-1) - shared)

    def mask_iou(self, others: Pieces) -> np.ndarray:
        """[N, M]: of the pieces. Both have the same planes, or one of them has one plane a row."""
        shape = len(self.area) + 1, len(others.area) + 1
        pairs = np.ravel_multi_index(np.broadcast_arrays(self.numbers, others.numbers), shape)
        shared = np.bincount(pairs.ravel(), minlength=shape[0] * shape[1]).reshape(shape)[1:, 1:]
        return shared / (self.area[:, None] + others.area - shared)
