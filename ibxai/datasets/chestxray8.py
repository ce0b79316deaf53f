"""ChestX-ray8 and ChestX-ray14 (NIH): 112,120 chest X-rays of 30,805 patients with up to 14 findings, and 984 boxes.

Wang et al., "ChestX-ray8: Hospital-scale Chest X-ray Database and Benchmarks", CVPR 2017. CheXplain (sec. 3) trains a
network with 8 outputs on it and judges heatmaps by the boxes. The official files, in `root`:

    Data_Entry_2017_v2020.csv (or Data_Entry_2017.csv)   train_val_list.txt   test_list.txt   BBox_List_2017.csv
    images/*.png, or images_001/images/*.png ... images_012/images/*.png, as the archives unpack

A box belongs to a finding: it is the region "target" of the rows that explain that finding, and of no others. The boxes
file writes "Infiltrate" where the table writes "Infiltration"; a reader that takes it by the word loses 123 boxes.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ibxai.datasets.pictures import read_picture
from ibxai.datasets.splits import Found, SplitDataset, by_id, files_in, size_of
from ibxai.datasets.tables import read_lines, read_rows, read_table
from ibxai.errors import BadSample, UserError
from ibxai.types import Picture, Sample

TABLES = ("Data_Entry_2017_v2020.csv", "Data_Entry_2017.csv")
BOXES = "BBox_List_2017.csv"
NO_FINDING = "No Finding"
FINDINGS = (
    *("Atelectasis", "Cardiomegaly", "Effusion", "Infiltration", "Mass", "Nodule", "Pneumonia", "Pneumothorax"),
    *("Consolidation", "Edema", "Emphysema", "Fibrosis", "Pleural_Thickening", "Hernia"),
)
_ALSO_WRITTEN = {"Infiltrate": "Infiltration"}
_SIDE = 1024  # of all official pictures, and of the boxes' coordinates
_FARTHEST = 1_000_000  # no coordinate of a picture lies beyond


@dataclass(frozen=True)
class Box:
    """x, y, width, height in pixels of the 1024 x 1024 picture, from its upper left corner."""

    finding: str
    corner_and_size: tuple[float, float, float, float]


@dataclass(frozen=True)
class ChestXRay8(SplitDataset):
    """The X-rays under `root`. classes: the 8 findings of ChestX-ray8, or the 14 of ChestX-ray14.

    A sample's values say of each finding whether it is there, 1 or 0. Its label, for targets that explain one class, is
    the finding that it has; of several, the one that has a box; and none where that does not decide.
    """

    classes: Literal[8, 14] = 8

    title: ClassVar[str] = "ChestX-ray8"
    how_to_get: ClassVar[str] = (
        "Get images_001 ... images_012, Data_Entry_2017_v2020.csv, train_val_list.txt, test_list.txt and "
        "BBox_List_2017.csv from https://nihcc.app.box.com/v/ChestXray-NIHCC (NIH Clinical Center, free with "
        "citation), unpack them into one folder and set dataset.root to it."
    )

    @property
    def class_names(self) -> Sequence[str]:
        return FINDINGS[: self.classes]

    def read(self, sample: Sample) -> Picture:
        """The X-ray, with "target@<finding's number>" [R, H, W], one plane a box, for each finding that has boxes."""
        image = read_picture(sample.source)
        regions: dict[str, list[Tensor]] = {}
        for box in self._boxes.get(sample.source.name, ()):
            if box.finding in self.class_names:
                plane = box_plane(box, image.width, image.height)
                regions.setdefault(f"target@{FINDINGS.index(box.finding)}", []).append(plane)
        return Picture(image, {name: torch.stack(planes) for name, planes in regions.items()})

    def annotations(self) -> str:
        """A digest of the boxes of the explained pictures, 64 hex digits. Raises UserError without the boxes file."""
        if not (self.folder / BOXES).is_file():
            raise self.missing(f"metrics that read boxes are asked for, and there is no {BOXES} in {self.root}")
        hasher = hashlib.sha256()
        for sample in self.samples():
            hasher.update(repr((sample.sample_id, self._boxes.get(sample.source.name, ()))).encode())
        return hasher.hexdigest()

    def _look(self, root: Path) -> Found:
        table = next((root / name for name in TABLES if (root / name).is_file()), None)
        if table is None:
            raise self.missing(f"there is no {TABLES[0]} in {root}")
        parts = [root / "images", *sorted(root.glob("images_*/images")), *sorted(root.glob("images_*"))]
        files = files_in([part for part in parts if part.is_dir()], (".png",))
        rows = read_table(table, ("Image Index", "Finding Labels", "Patient ID"))
        samples = [self._sample(row, files[row["Image Index"]]) for row in rows if row["Image Index"] in files]
        if not samples:
            raise self.missing(f"no picture of {table.name} is in {root}/images or {root}/images_001/images ...")
        lists = [self._list(root / name) for name in ("train_val_list.txt", "test_list.txt")]
        train, test = (by_id(s for s in samples if s.source.name in names) for names in lists)
        boxes = [self._boxes.get(sample.source.name, ()) for sample in samples]
        facts = (
            ("table", f"{len(rows):,} X-rays in {table.name}"),
            ("pictures", f"{len(samples):,} of them are here, {len(rows) - len(samples):,} are not"),
            ("lists", f"{len(samples) - len(train) - len(test):,} of the pictures are in neither list and left out"),
            ("boxes", f"{sum(map(len, boxes)):,} on {sum(map(bool, boxes)):,} of the pictures"),
        )
        return Found(train, test, facts)

    def _list(self, path: Path) -> set[str]:
        if not path.is_file():
            raise self.missing(f"there is no {path.name} in {path.parent}")
        return {line.strip() for line in read_lines(path)}

    def _sample(self, row: Mapping[str, str], file: os.DirEntry[str]) -> Sample:
        findings = row["Finding Labels"].split("|")
        unknown = [finding for finding in findings if finding not in (*FINDINGS, NO_FINDING)]
        if unknown:
            raise UserError(f"{self.title}: {file.name} has the finding {unknown[0]!r}, which is none of the 14.")
        present = [finding for finding in self.class_names if finding in findings]
        boxed = {box.finding for box in self._boxes.get(file.name, ())}
        deciding = present if len(present) == 1 else [finding for finding in present if finding in boxed]
        label = FINDINGS.index(deciding[0]) if len(deciding) == 1 else None
        values = tuple(float(finding in present) for finding in self.class_names)
        source = Path(file.path)
        return Sample(source.stem, f"patient-{row['Patient ID']}", source, size_of(file), label, values)

    @cached_property
    def _boxes(self) -> Mapping[str, tuple[Box, ...]]:
        """File name -> its boxes; none at all without the file, which only localisation needs."""
        path = self.folder / BOXES
        return read_boxes(path) if path.is_file() else {}


def read_boxes(path: Path) -> Mapping[str, tuple[Box, ...]]:
    """File name -> its boxes. By place, as the header's commas make 9 columns of it, and the rows have 6.

    Raises UserError for a line that is not a name, a finding and four numbers.
    """
    found: dict[str, tuple[Box, ...]] = {}
    for number, cells in enumerate(read_rows(path)[1:], start=2):
        try:
            name, finding, *numbers = cells[:6]
            x, y, width, height = (float(text) for text in numbers)
            if not all(abs(value) < _FARTHEST for value in (x, y, width, height)) or min(width, height) <= 0:
                raise ValueError("a box of no size")  # true of NaN too
        except ValueError as error:
            raise UserError(f"{path}, line {number}: {','.join(cells)[:100]!r} is no box ({error}).") from error
        finding = _ALSO_WRITTEN.get(finding, finding)
        found[name] = (*found.get(name, ()), Box(finding, (x, y, width, height)))
    return found


def box_plane(box: Box, width: int, height: int) -> Tensor:
    """bool [height, width]: the pixels whose centre lies in the box, scaled to a picture of this size.

    Raises BadSample when none does: the box lies outside, or is thinner than a pixel.
    """
    x, y, across, down = box.corner_and_size
    left, right = (math.ceil(edge * width / _SIDE - 0.5) for edge in (x, x + across))
    top, bottom = (math.ceil(edge * height / _SIDE - 0.5) for edge in (y, y + down))
    plane = torch.zeros(height, width, dtype=torch.bool)
    plane[max(top, 0) : max(bottom, 0), max(left, 0) : max(right, 0)] = True
    if not plane.any():
        raise BadSample(f"its box of {box.finding} {box.corner_and_size} covers no pixel of {width} x {height}")
    return plane
