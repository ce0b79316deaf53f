"""BrixIA: chest X-rays of COVID-19 patients, each of six regions of the lungs scored 0 to 3 by radiologists.

Signoroni et al., "BS-Net: Learning COVID-19 pneumonia severity on a large chest X-ray dataset", Medical Image Analysis
2021; CheXplain (sec. 3) explains networks trained on it. Two subsets, each in its official files under `root`:

    hospital   metadata_global_v2.csv, and the DICOM files that it names in dicom_clean/, dicom/ or beside it
    cohen      data/public-annotations.csv, data/public-cohen-subset/*, as the repository unpacks (data/ may be root)

Regions of the lungs need lung masks, one picture of the same name an X-ray (of a DICOM file: name.png) in the folder
`lungs`: "lungs" is the mask, "severity" the score of each of the six regions (`lungs.six_regions`), one plane a region.
Without masks there are none, and what reads regions stops: nothing is guessed.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ibxai.datasets.dicom import read_xray, require_dicom
from ibxai.datasets.lungs import REGIONS, six_regions
from ibxai.datasets.pictures import read_picture
from ibxai.datasets.splits import Found, SplitDataset, by_id, content_digest, files_in, order, size_of, train_groups
from ibxai.datasets.tables import read_table
from ibxai.errors import BadSample, UserError
from ibxai.types import Picture, Sample

HOSPITAL, COHEN = "metadata_global_v2.csv", "public-annotations.csv"
PICTURES = (".png", ".jpg", ".jpeg")
_DICOM = (".dcm", ".dicom")
_LARGEST_SCORE = 3
# what a detector of CheXplain (sec. 3) says is present somewhere in the lungs, and the scores that count for it
_PRESENCE = (("score 3", (3,)), ("score 2", (2,)), ("score 0 or 1", (0, 1)))
_SAME_SHAPE = 0.02  # by how much the sides' ratio of a mask may differ from its picture's: rounding of a resize


@dataclass(frozen=True)
class _XRay:
    """A line of a table. scores: of A to F. consensus: of the hospital's 150 rows that five radiologists scored."""

    file: str
    group: str
    scores: tuple[int, ...]
    consensus: bool = False


@dataclass(frozen=True)
class BrixIA(SplitDataset):
    """subset: "hospital" (DICOM, train and consensus test set) or "cohen" (192 public pictures).

    outputs: what the network's outputs are: "global", the sum of the scores, 0 to 18; "regions", the six scores A to F;
    "presence", whether a score of 3, of 2, and of 0 or 1 is present (CheXplain's detectors, whose region "target" is
    the union of the regions with that score). reader: whose scores of the cohen subset.
    lungs: folder of lung masks, None for none. The hospital's test split is the consensus set, and X-rays of its
    patients are left out of the train split. The cohen subset has no official split: train_share of its patients, or of
    `folds` parts of them all but number `fold` (from 0 on) for training and that one to test. split_seed names the
    draw. patients: the metadata.csv of the Cohen collection, which says whose the pictures are; None: pictures of one
    patient may part.
    """

    subset: Literal["hospital", "cohen"] = "hospital"
    outputs: Literal["global", "regions", "presence"] = "global"
    reader: Literal["senior", "junior"] = "senior"
    lungs: str | None = None
    train_share: float = 0.7
    split_seed: int = 0
    folds: int = 5
    fold: int | None = None
    patients: str | None = None

    title: ClassVar[str] = "BrixIA"
    how_to_get: ClassVar[str] = (
        "Get dicom_clean and metadata_global_v2.csv from https://brixia.github.io (on request, for research), or for "
        "dataset.subset=cohen the repository github.com/BrixIA/Brixia-score-COVID-19, and set dataset.root to it."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.subset != "cohen" and (self.fold is not None or self.patients is not None):
            raise UserError("dataset.fold and dataset.patients are of the public pictures: dataset.subset=cohen.")
        if self.fold is not None and not 0 <= self.fold < self.folds:
            raise UserError(f"dataset.fold={self.fold}: of {self.folds} folds, 0 to {self.folds - 1} is expected.")

    @property
    def class_names(self) -> Sequence[str]:
        if self.outputs == "presence":
            return tuple(name for name, _ in _PRESENCE)
        return tuple(f"score {region}" for region in REGIONS) if self.outputs == "regions" else ("global score",)

    def read(self, sample: Sample) -> Picture:
        """The X-ray in grey, bright = dense; with a lung mask "lungs" [1, H, W], "severity" float [6, H, W], and for
        "presence" a "target@<output>" [1, H, W] each.
        """
        dicom = sample.source.suffix.lower() in _DICOM
        # a third of the colour files are not exactly grey, which is no finding: an X-ray has no colours
        image = read_xray(sample.source) if dicom else read_picture(sample.source).convert("L").convert("RGB")
        mask = self._mask_of(sample.source.name)
        if mask is None:
            return Picture(image)
        parts = torch.from_numpy(six_regions(_read_mask(mask, image)))
        return Picture(image, self._regions(parts, self._rows[sample.source.name].scores))

    def annotations(self) -> str:
        """A digest of the scores and the lung masks, 64 hex digits. Raises UserError without masks."""
        if self.lungs is None:
            raise UserError(
                "BrixIA: metrics that read regions need lung masks, and dataset.lungs is not set.\n"
                "Set dataset.lungs to a folder with one mask an X-ray, of the same name (white = lung)."
            )
        hasher = hashlib.sha256(self.outputs.encode())
        for sample in self.samples():
            mask = self._mask_of(sample.source.name)
            drawn = "" if mask is None else content_digest(mask)
            hasher.update(repr((sample.sample_id, self._rows[sample.source.name].scores, drawn)).encode())
        return hasher.hexdigest()

    def _look(self, root: Path) -> Found:
        table, files = self._hospital(root) if self.subset == "hospital" else self._cohen(root)
        here = [row for name, row in self._rows.items() if name in files]
        if not here:
            raise self.missing(f"none of the {len(self._rows):,} X-rays of {table.name} is there")
        train, test = (by_id(self._sample(row, files[row.file]) for row in part) for part in self._split(here))
        masked = sum(self._mask_of(row.file) is not None for row in here)
        left_out = len(here) - len(train) - len(test)
        facts = [
            ("table", f"{len(self._rows):,} X-rays in {table.name}"),
            ("pictures", f"{len(here):,} of them are here, {len(self._rows) - len(here):,} are not"),
            ("lung masks", f"for {masked:,} of the pictures" if self.lungs else "none: dataset.lungs is not set"),
        ]
        if self.subset == "hospital":
            facts.append(("left out", f"{left_out:,} X-rays: of patients of the test set, and not in it"))
        elif self.patients is None:
            facts.append(("patients", "not named, and the pictures of one may part: dataset.patients is not set"))
        else:
            facts.append(("patients", f"{len({row.group for row in here}):,}, a picture without one being its own"))
        return Found(train, test, tuple(facts))

    def _hospital(self, root: Path) -> tuple[Path, Mapping[str, os.DirEntry[str]]]:
        require_dicom()
        if not (root / HOSPITAL).is_file():
            raise self.missing(f"there is no {HOSPITAL} in {root}")
        folders = [root / "dicom_clean", root / "dicom", root]
        return root / HOSPITAL, files_in([folder for folder in folders if folder.is_dir()], _DICOM)

    def _cohen(self, root: Path) -> tuple[Path, Mapping[str, os.DirEntry[str]]]:
        folder = self._cohen_folder(root)
        if not (folder / "public-cohen-subset").is_dir():
            raise self.missing(f"there is no folder public-cohen-subset in {folder}")
        return folder / COHEN, files_in([folder / "public-cohen-subset"], PICTURES)

    def _cohen_folder(self, root: Path) -> Path:
        for folder in (root / "data", root):
            if (folder / COHEN).is_file():
                return folder
        raise self.missing(f"there is no {COHEN} in {root} or {root}/data")

    @cached_property
    def _rows(self) -> Mapping[str, _XRay]:
        """File name -> its line of the subset's table."""
        if self.subset == "hospital":
            return hospital_rows(self.folder / HOSPITAL)
        rows = cohen_rows(self._cohen_folder(self.folder) / COHEN, self.reader)
        if self.patients is None:
            return rows
        table = read_table(Path(self.patients).expanduser(), ("filename", "patientid"))
        patients = {line["filename"]: line["patientid"] for line in table if line["patientid"]}
        return {name: replace(row, group=patients.get(name, name)) for name, row in rows.items()}

    def _split(self, rows: Sequence[_XRay]) -> tuple[list[_XRay], list[_XRay]]:
        if self.subset == "hospital":
            test = [row for row in rows if row.consensus]
            patients = {row.group for row in self._rows.values() if row.consensus}
            return [row for row in rows if row.group not in patients], test
        groups = {row.group for row in self._rows.values()}
        if self.fold is None:
            trains = train_groups(dict.fromkeys(groups, "all"), self.train_share, self.split_seed)
        else:
            trains = groups - set(sorted(groups, key=partial(order, self.split_seed))[self.fold :: self.folds])
        return [row for row in rows if row.group in trains], [row for row in rows if row.group not in trains]

    def _sample(self, row: _XRay, file: os.DirEntry[str]) -> Sample:
        if self.outputs == "presence":
            values = tuple(float(any(score in counted for score in row.scores)) for _, counted in _PRESENCE)
        else:
            values = tuple(map(float, row.scores)) if self.outputs == "regions" else (float(sum(row.scores)),)
        return Sample(row.file, row.group, Path(file.path), size_of(file), None, values)

    def _regions(self, parts: Tensor, scores: Sequence[int]) -> dict[str, Tensor]:
        """parts: bool [6, H, W]"""
        degree = torch.tensor(scores, dtype=torch.float32)[:, None, None]
        regions = {"lungs": parts.any(0, keepdim=True), "severity": parts * degree}
        if self.outputs == "presence":
            for output, (_, counted) in enumerate(_PRESENCE):
                own = [place for place, score in enumerate(scores) if score in counted]
                if own:
                    regions[f"target@{output}"] = parts[own].any(0, keepdim=True)
        return regions

    def _mask_of(self, file: str) -> Path | None:
        """A mask of the same name; of a DICOM file, of the same stem. "a.png" must not get the mask of "a.jpg"."""
        names = [file, *(Path(file).stem + ending for ending in PICTURES if file.lower().endswith(_DICOM))]
        return next((self._masks[name] for name in names if name in self._masks), None)

    @cached_property
    def _masks(self) -> Mapping[str, Path]:
        """File name -> mask. Empty without a folder."""
        if self.lungs is None:
            return {}
        folder = Path(self.lungs).expanduser()
        if not folder.is_dir():
            raise UserError(f"BrixIA: dataset.lungs={self.lungs} is no folder.\nGive a folder with one mask an X-ray.")
        return {name: Path(entry.path) for name, entry in files_in([folder], PICTURES).items()}


def hospital_rows(path: Path) -> dict[str, _XRay]:
    """File name -> its line of metadata_global_v2.csv."""
    rows = read_table(path, ("Filename", "BrixiaScore", "ConsensusTestset", "Subject"))
    return {
        row["Filename"]: _XRay(
            row["Filename"], row["Subject"], _scores(row["BrixiaScore"], path), row["ConsensusTestset"] == "1"
        )
        for row in rows
    }


def cohen_rows(path: Path, reader: Literal["senior", "junior"]) -> dict[str, _XRay]:
    """File name -> its line of public-annotations.csv, with the scores of one of the two readers."""
    columns = [f"{reader[0].upper()}-{region}" for region in REGIONS]
    rows = read_table(path, ("filename", *columns))
    return {
        row["filename"]: _XRay(row["filename"], row["filename"], _scores([row[c] for c in columns], path))
        for row in rows
    }


def _scores(digits: str | Sequence[str], path: Path) -> tuple[int, ...]:
    """Six scores from "000001" or six cells: as text, since the number 1 has lost its zeros. Raises UserError."""
    allowed = {str(score): score for score in range(_LARGEST_SCORE + 1)}
    if len(digits) != len(REGIONS) or not all(digit in allowed for digit in digits):
        raise UserError(
            f"{path} has the scores {''.join(digits)!r}: six digits from 0 to {_LARGEST_SCORE} are expected.\n"
            "A spreadsheet that has opened and saved the file drops leading zeros: put the official file there."
        )
    return tuple(allowed[digit] for digit in digits)


def _read_mask(path: Path, image: Image.Image) -> np.ndarray:
    """bool [H, W] at the picture's size. Its own size is that of the picture as published, which may since have been
    scaled; a mask of another shape belongs to another picture, and is a BadSample.
    """
    try:
        mask = read_picture(path).convert("L")
    except BadSample as error:
        raise BadSample(f"its lung mask {path.name}: {error}") from error
    across, down = mask.width / image.width, mask.height / image.height
    if abs(across / down - 1) > _SAME_SHAPE:
        raise BadSample(f"its lung mask is {mask.width} x {mask.height}, the picture {image.width} x {image.height}")
    return np.asarray(mask.resize(image.size, Image.Resampling.NEAREST)) > 127
