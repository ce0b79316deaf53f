"""MosMedData: 1,110 chest CTs of Moscow hospitals, from healthy (CT-0) to critical (CT-4), with 50 lesion masks.

Morozov et al., "MosMedData: Chest CT Scans with COVID-19 Related Findings Dataset", arXiv:2005.06465. The official
files, in `root` or in its folder COVID19_1110:

    studies/CT-0/study_0001.nii.gz ... studies/CT-4/...      masks/study_0255_mask.nii.gz ... (50 of CT-1)

A sample is an axial slice, and its group is the study. As in IBA-CT (Demir et al., sec. 4) CT-0 is healthy and the rest
unhealthy, and 70 % of the studies of each category train: no study has slices in both splits. The label is that of
the study, so a slice without a lesion of an unhealthy study counts as unhealthy; the paper does not say which slices it
took, and `slices` and `every` are ours. The category is that of the folder: dataset_registry is not needed.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ibxai.datasets.lungs import closed_slice, lung_pieces
from ibxai.datasets.nifti import ENDINGS, axial_slices, read_volume, require_nifti
from ibxai.datasets.splits import Found, SplitDataset, by_id, content_digest, files_in, size_of, train_groups
from ibxai.errors import BadSample, UserError
from ibxai.types import Picture, Sample

CATEGORIES = tuple(f"CT-{grade}" for grade in range(5))
INSIDE_ROOT = ("studies", "COVID19_1110/studies", "")
_STUDY = re.compile(r"(study_\d+)\.nii(\.gz)?", re.IGNORECASE)
_SLICE = re.compile(r"(.+)_slice_(\d+)")


@dataclass(frozen=True)
class MosMed(SplitDataset):
    """The axial slices of the studies under `root`; label 0 is healthy, 1 unhealthy.

    train_share, split_seed: of the studies of each category, the share that trains, and what names the draw.
    slices: the part of a study that is taken, as shares of its height from the feet's end. every: of those, each N-th.
    level, width: the window in Hounsfield units that is shown from black to white.
    lungs: "threshold", the rule of `lungs.py` as the region "lungs"; or "none".
    """

    train_share: float = 0.7
    split_seed: int = 0
    slices: tuple[float, float] = (0.2, 0.8)
    every: int = 1
    level: float = -600.0
    width: float = 1500.0
    lungs: Literal["threshold", "none"] = "threshold"

    title: ClassVar[str] = "MosMed"
    how_to_get: ClassVar[str] = (
        "Get COVID19_1110 (studies/CT-0 ... CT-4 and masks) from https://mosmed.ai/datasets/covid19_1110 (CC BY-NC-ND "
        "3.0), unpack it and set dataset.root to that folder."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        low, high = self.slices
        if not 0 <= low < high <= 1:
            raise UserError(
                f"dataset.slices={list(self.slices)}: two shares, 0 to 1, the lower one first, are expected."
            )
        if self.every < 1 or self.width <= 0:
            raise UserError(f"dataset.every={self.every}, dataset.width={self.width}: positive numbers are expected.")

    @property
    def class_names(self) -> Sequence[str]:
        return ("healthy", "unhealthy")

    def read(self, sample: Sample) -> Picture:
        """The slice in grey, with "target", its lesions as one plane, where the study has a mask and the slice a
        lesion, and "lungs", one plane, where the slice has lung.
        """
        volume, number = read_volume(sample.source), self._number(sample)
        if number >= len(volume):
            raise BadSample(f"it has {len(volume)} slices, and number {number} is asked for")
        shown = np.clip((volume[number] - self.level) / self.width + 0.5, 0, 1)
        regions = {}
        mask = self._masks.get(sample.group_id)
        if mask is not None:
            lesions = read_volume(mask)
            if lesions.shape != volume.shape:
                raise BadSample(f"its mask {mask.name} has the shape {lesions.shape}, the study {volume.shape}")
            regions["target"] = _plane(lesions[number] > 0.5)
        if self.lungs == "threshold":
            regions["lungs"] = _plane(closed_slice(lung_pieces(sample.source)[number]))
        image = Image.fromarray(np.rint(shown * 255).astype(np.uint8)).convert("RGB")
        return Picture(image, {name: plane for name, plane in regions.items() if plane.any()})

    def grades(self) -> Mapping[str, int]:
        """Study -> its category, 0 (healthy) to 4 (critical), of both splits."""
        found = (*self.in_split("train"), *self.in_split("test"))
        return {sample.group_id: CATEGORIES.index(sample.source.parent.name) for sample in found}

    def annotations(self) -> str:
        """A digest of the lesion masks, and of how the lungs are found; 64 hex digits."""
        hasher = hashlib.sha256(self.lungs.encode())
        for study in sorted({sample.group_id for sample in self.samples()} & self._masks.keys()):
            hasher.update(f"{study} {content_digest(self._masks[study])}\n".encode())
        return hasher.hexdigest()

    def _look(self, root: Path) -> Found:
        require_nifti()
        studies = self._studies(root)
        strata = {study: category for study, (category, _) in studies.items()}
        trains = train_groups(strata, self.train_share, self.split_seed)
        samples = {study: self._samples(study, *where) for study, where in studies.items()}
        train, test = (
            by_id(sample for study, own in samples.items() if (study in trains) == wanted for sample in own)
            for wanted in (True, False)
        )
        count, (low, high) = Counter(strata.values()), self.slices
        facts = (
            ("studies", f"{len(studies):,} of 1,110: " + ", ".join(f"{c} {count[c]}" for c in CATEGORIES)),
            ("masks", f"{len(self._masks.keys() & studies.keys())} of 50 lesion masks"),
            ("slices", f"{len(train) + len(test):,} from {low:g} to {high:g} of a study's height, one in {self.every}"),
        )
        return Found(train, test, facts)

    def _studies(self, root: Path) -> dict[str, tuple[str, os.DirEntry[str]]]:
        """study -> (category, file)"""
        folder = next((root / inside for inside in INSIDE_ROOT if self._categories(root / inside)), None)
        if folder is None:
            raise self.missing(f"there are no folders CT-0 ... CT-4 in {root} or {root}/studies")
        studies = {
            match[1].lower(): (category, entry)
            for category in self._categories(folder)
            for name, entry in files_in([folder / category], ENDINGS).items()
            if (match := _STUDY.fullmatch(name))
        }
        if not studies:
            raise self.missing(f"no study_*.nii.gz is in {folder}/CT-0 ... CT-4")
        return studies

    @staticmethod
    def _categories(folder: Path) -> list[str]:
        return [category for category in CATEGORIES if (folder / category).is_dir()]

    def _samples(self, study: str, category: str, entry: os.DirEntry[str]) -> list[Sample]:
        """The slices that are taken. A bad header leaves one sample, which tells what is wrong when it is read."""
        path = Path(entry.path)
        try:
            count = axial_slices(path)
        except BadSample:
            count = 1
        first, last = (round(share * count) for share in self.slices)
        numbers = range(first, max(last, first + 1), self.every)
        label = int(category != "CT-0")
        window = f"window {self.level:g} {self.width:g}"
        return [
            Sample(f"{study}_slice_{number:03d}", study, path, size_of(entry), label, decoding=window)
            for number in numbers
        ]

    def _number(self, sample: Sample) -> int:
        match = _SLICE.fullmatch(sample.sample_id)
        if match is None:
            raise BadSample(f"MosMed has no slice {sample.sample_id}")
        return int(match[2])

    @cached_property
    def _masks(self) -> Mapping[str, Path]:
        """study -> its lesion mask."""
        beside = (self.folder, self.folder / "COVID19_1110", self.folder.parent)
        folders = [place / "masks" for place in beside if (place / "masks").is_dir()]
        files = files_in(folders, ENDINGS)
        return {name.lower().partition("_mask")[0]: Path(entry.path) for name, entry in files.items()}


def _plane(pixels: np.ndarray) -> Tensor:
    """bool [1, H, W]"""
    return torch.from_numpy(np.ascontiguousarray(pixels))[None]
