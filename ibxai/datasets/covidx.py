"""COVIDx: chest X-rays gathered from open collections, labelled normal, pneumonia or COVID-19.

Wang, Lin and Wong, "COVID-Net", Scientific Reports 2020. Its generator script puts the pictures into two flat folders;
a text file a split and a release says what they are. In `root`:

    data/train/*  data/test/*  (or train/, test/)        labels/train_COVIDx4.txt  labels/test_COVIDx4.txt  (or beside)

A line is "patient file class source"; the source is left out in old releases and in 197 test lines of COVIDx4.

Where letters are burned in is not published. The table of `ibxai data clean` has it: the boxes that it painted over are
the region "letters" of the pictures as they were, and of the cleaned ones.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar

from ibxai.datasets.letters import TABLE as CLEANED
from ibxai.datasets.letters import Corners, planes_of, read_boxes
from ibxai.datasets.pictures import read_picture
from ibxai.datasets.splits import Found, SplitDataset, by_id, files_in, size_of
from ibxai.datasets.tables import read_lines
from ibxai.errors import UserError
from ibxai.types import Picture, Sample

CLASSES = ("normal", "pneumonia", "COVID-19")
PICTURES = (".png", ".jpg", ".jpeg")


@dataclass(frozen=True)
class COVIDx(SplitDataset):
    """The X-rays under `root`. release: the label files train_<release>.txt and test_<release>.txt are read. letters:
    the cleaned.csv that has the boxes of these X-rays' letters; None for the one in `root`, where there is one.
    """

    release: str = "COVIDx4"
    letters: str | None = None

    title: ClassVar[str] = "COVIDx"
    how_to_get: ClassVar[str] = (
        "Get the label files from github.com/lindawangg/COVID-Net (AGPL-3.0), make the pictures with its "
        "create_COVIDx.ipynb (terms: each source's own, for research), and set dataset.root to the folder of both."
    )

    @property
    def class_names(self) -> Sequence[str]:
        return CLASSES

    def read(self, sample: Sample) -> Picture:
        """The X-ray in grey: some authors' arrows and boxes are red, and a colour is no finding. Where it has letters,
        their region is bool [R, H, W], one plane a box. Raises BadSample for a box outside the picture.
        """
        image = read_picture(sample.source).convert("L").convert("RGB")
        boxes = self._letters.get(self._name(sample), ())
        return Picture(image, {"letters": planes_of(boxes, *image.size)} if boxes else {})

    def annotations(self) -> str:
        """A digest of the letters' boxes of the explained X-rays; 64 hex digits."""
        boxes = [(sample.sample_id, self._letters.get(self._name(sample), ())) for sample in self.samples()]
        return hashlib.sha256(repr(boxes).encode()).hexdigest()

    def _look(self, root: Path) -> Found:
        lines = {split: self._lines(root, split) for split in ("train", "test")}
        samples = {split: self._samples(root, split, lines[split]) for split in lines}
        if not any(samples.values()):
            raise self.missing(f"no picture of the {self.release} lists is in {root}/data/train or {root}/data/test")
        facts = tuple(
            (f"{split} list", f"{len(lines[split]):,} X-rays, of which {len(samples[split]):,} are here")
            for split in lines
        )
        marked = sum(self._name(sample) in self._letters for own in samples.values() for sample in own)
        if self._letters and not marked:
            raise UserError(f"dataset.letters={self.letters}: its boxes are on none of the X-rays in {self.root}.")
        letters = ("letters", f"boxes of them on {marked:,} of the X-rays")
        return Found(by_id(samples["train"]), by_id(samples["test"]), (*facts, letters))

    @cached_property
    def _letters(self) -> Mapping[str, tuple[Corners, ...]]:
        """Path under the root -> the boxes of its letters; none at all without a table."""
        table = self.folder / CLEANED if self.letters is None else Path(self.letters).expanduser()
        return read_boxes(table) if self.letters is not None or table.is_file() else {}

    def _name(self, sample: Sample) -> str:
        return sample.source.relative_to(self.folder).as_posix()

    def _lines(self, root: Path, split: str) -> Mapping[str, tuple[str, str]]:
        wanted = f"{split}_{self.release}.txt"
        for path in (root / "labels" / wanted, root / wanted, root / "data" / wanted):
            if path.is_file():
                return read_list(path)
        others = sorted(
            p.stem.partition("_")[2] for folder in (root / "labels", root) for p in folder.glob("train_*.txt")
        )
        has = f"; it has {', '.join(others)}: set dataset.release" if others else ""
        raise self.missing(f"there is no {wanted} in {root}/labels or {root}{has}")

    def _samples(self, root: Path, split: str, lines: Mapping[str, tuple[str, str]]) -> list[Sample]:
        folders = [folder for folder in (root / "data" / split, root / split) if folder.is_dir()]
        files = files_in(folders, PICTURES)
        return [self._sample(split, *line, files[name]) for name, line in lines.items() if name in files]

    @staticmethod
    def _sample(split: str, patient: str, kind: str, file: os.DirEntry[str]) -> Sample:
        return Sample(file.name, f"patient-{patient}", Path(file.path), size_of(file), CLASSES.index(kind))


@dataclass(frozen=True)
class CleanedCOVIDx(COVIDx):
    """COVIDx++: the folder that `ibxai data clean` made of COVIDx, its burned-in letters painted over."""

    title: ClassVar[str] = "COVIDx without letters"
    how_to_get: ClassVar[str] = (
        "Make it: ibxai data clean dataset=covidx dataset.root=COVIDX --to FOLDER, and set dataset.root to FOLDER."
    )

    def _look(self, root: Path) -> Found:
        if not (root / CLEANED).is_file():
            raise self.missing(f"there is no {CLEANED} in {root}, so its letters have not been painted over")
        return super()._look(root)


def read_list(path: Path) -> Mapping[str, tuple[str, str]]:
    """File name -> (patient, class) of a label file. Raises UserError for a line that is none, and for a picture with
    two classes; train_COVIDx4.txt lists one picture twice, alike.
    """
    found: dict[str, tuple[str, str]] = {}
    for number, line in enumerate(read_lines(path), start=1):
        fields = line.split()
        if len(fields) not in (3, 4) or fields[2] not in CLASSES:
            raise UserError(
                f"{path}, line {number}: {line[:100]!r}.\n"
                f"Expected: patient, file, one of {', '.join(CLASSES)}, and perhaps the source, with blanks between."
            )
        patient, name, kind = fields[:3]
        if found.setdefault(name, (patient, kind))[1] != kind:
            raise UserError(f"{path}, line {number}: {name} is {kind} here and {found[name][1]} further up.")
    return found
