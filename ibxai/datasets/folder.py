"""Anyone's own pictures: a folder, and a table that says what each of them shows. Pictures, DICOM, and NIfTI slices.

`samples.csv` in `root` has a line a picture, or several for one with several boxes. Its columns:

    path      inside root, with "/"                 target   what it shows, as `targets` says below
    group     patient or study; splits never part one        split    train or test; without: drawn by a hash
    slice     of a NIfTI volume: the axial slice, 0 at the feet's end
    x, y, width, height    a box, in pixels of the picture as it is stored, from its upper left corner
    mask      inside root: a picture as large as the other, white where the evidence lies, or a NIfTI volume

path and target are needed, the others are not. A box or a mask is the region "target" of the rows that explain what its
line says. No path leaves root, not by "..", and not by a link: a table from elsewhere reads nothing of yours.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ibxai.datasets.dicom import read_grey, require_dicom
from ibxai.datasets.nifti import ENDINGS, read_volume, require_nifti
from ibxai.datasets.pictures import read_picture
from ibxai.datasets.splits import Found, SplitDataset, by_id, content_digest, train_groups
from ibxai.datasets.tables import read_table
from ibxai.errors import BadSample, UserError
from ibxai.types import Picture, Sample

_DICOM = (".dcm", ".dicom")
_BOX = ("x", "y", "width", "height")
_COLUMNS = ("path", "target", "group", "split", "slice", *_BOX, "mask")
_MOST_CLASSES = 1000


@dataclass(frozen=True)
class _Line:
    """A line of the table. box: x, y, width, height; slice: None of a picture; where: for errors."""

    path: str
    target: str
    group: str
    split: str
    slice: int | None
    box: tuple[float, ...] | None
    mask: str
    where: str

    @property
    def sample_id(self) -> str:
        return self.path if self.slice is None else f"{self.path}_slice_{self.slice:03d}"


@dataclass(frozen=True)
class Folder(SplitDataset):
    """The pictures that `table`, a file in `root`, names.

    targets: what the column "target" holds: "class", a name; "labels", names with "|" between, or none; "value", a
    number. classes: the names in the order of the network's outputs, None for all that the table has, sorted; of
    "value" the name of the output. train_share, split_seed: without a column "split", of the groups.
    level, width: the window, in the files' own units (of a CT: Hounsfield), of DICOM and NIfTI; None for that of the
    DICOM file, and for the whole range of a volume.
    """

    table: str = "samples.csv"
    targets: Literal["class", "labels", "value"] = "class"
    classes: tuple[str, ...] | None = None
    train_share: float = 0.7
    split_seed: int = 0
    level: float | None = None
    width: float | None = None

    title: ClassVar[str] = "Folder"
    how_to_get: ClassVar[str] = (
        "Put a table samples.csv with the columns path and target (and, as you have them: group, split, slice, x, y, "
        "width, height, mask) into the folder of your pictures, and set dataset.root to it."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.level is None) != (self.width is None) or (self.width is not None and self.width <= 0):
            raise UserError(
                f"dataset.level={self.level}, dataset.width={self.width}: both, width above 0, or neither is expected."
            )

    @property
    def class_names(self) -> Sequence[str]:
        if self.targets == "value":
            return self.classes or ("value",)
        return self.classes or tuple(sorted({name for line in self._lines for name in self._names(line)}))

    def read(self, sample: Sample) -> Picture:
        """The picture, with "target@<output>" [R, H, W], a plane a box or mask, for each output that has some."""
        lines = self._by_id[sample.sample_id]
        image = self._image(sample.source, lines[0].slice)
        regions: dict[str, list[Tensor]] = {}
        for line in lines:
            planes = [_box_plane(line, image)] if line.box else []
            planes += [self._mask_plane(line, image)] if line.mask else []
            for output in self._outputs(line):
                regions.setdefault(f"target@{output}", []).extend(planes)
        return Picture(image, {name: torch.stack(planes) for name, planes in regions.items() if planes})

    def annotations(self) -> str:
        """A digest of the boxes and masks of the explained pictures, 64 hex digits."""
        hasher = hashlib.sha256()
        for sample in self.samples():
            for line in self._by_id[sample.sample_id]:
                drawn = content_digest(self.folder / line.mask) if line.mask else ""
                hasher.update(repr((sample.sample_id, line.target, line.box, drawn)).encode())
        return hasher.hexdigest()

    def _look(self, root: Path) -> Found:
        samples = {sample_id: self._sample(lines) for sample_id, lines in self._by_id.items()}
        if not any(sample.size for sample in samples.values()):
            raise self.missing(f"none of the {len(samples):,} pictures of {self.table} is in {root}")
        trains = self._trains(list(samples.values()))
        train, test = (by_id(s for i, s in samples.items() if (i in trains) == wanted) for wanted in (True, False))
        here = sum(bool(sample.size) for sample in samples.values())
        facts = (
            ("table", f"{len(self._lines):,} lines of {len(samples):,} pictures in {self.table}"),
            ("pictures", f"{here:,} of them are here, {len(samples) - here:,} are not"),
            ("regions", f"{sum(bool(line.box) for line in self._lines):,} boxes, "
                        f"{sum(bool(line.mask) for line in self._lines):,} masks"),
        )  # fmt: skip
        return Found(train, test, facts)

    @cached_property
    def _lines(self) -> Sequence[_Line]:
        path = _inside(self.folder, self.table, "dataset.table")
        if not path.is_file():
            raise self.missing(f"there is no {self.table} in {self.root}")
        rows = read_table(path, ("path", "target"))
        if not rows:
            raise self.missing(f"{self.table} has no line below its header")
        unknown = [column for column in rows[0] if column and column not in _COLUMNS]
        if unknown:
            raise UserError(f"{path} has a column {unknown[0]!r}: {', '.join(_COLUMNS)} are understood.")
        return [self._line(row, f"{path}, line {number}") for number, row in enumerate(rows, start=2)]

    def _line(self, row: Mapping[str, str], where: str) -> _Line:
        cells = {column: row.get(column, "") for column in _COLUMNS}
        for column in ("path", "mask"):
            if cells[column]:
                _inside(self.folder, cells[column], f"{where}, {column}")
        if not cells["path"]:
            raise UserError(f"{where}: no path.")
        if cells["split"] not in ("", "train", "test"):
            raise UserError(f"{where}: split {cells['split']!r}: train or test is expected.")
        volume = cells["path"].lower().endswith(ENDINGS)
        if volume != cells["slice"].isdecimal():
            expected = "the number of its axial slice" if volume else "none, since it is no NIfTI volume,"
            raise UserError(f"{where}: slice {cells['slice']!r} of {cells['path']}: {expected} is expected.")
        if cells["mask"].lower().endswith(ENDINGS) and not volume:
            raise UserError(
                f"{where}: {cells['mask']} is a volume, and {cells['path']} is none: a picture is expected."
            )
        return _Line(
            cells["path"], cells["target"], cells["group"] or cells["path"], cells["split"],
            int(cells["slice"]) if volume else None, _box([cells[side] for side in _BOX], where), cells["mask"], where,
        )  # fmt: skip

    @cached_property
    def _by_id(self) -> Mapping[str, Sequence[_Line]]:
        """Sample id -> its lines, which agree on all but target and region."""
        found: dict[str, list[_Line]] = {}
        for line in self._lines:
            first = found.setdefault(line.sample_id, [line])[0]
            if first is line:
                continue
            same = first.group == line.group and first.split == line.split
            if not same or (self.targets != "labels" and first.target != line.target):
                raise UserError(f"{line.where}: {line.path} has another target, group or split than further up.")
            found[line.sample_id].append(line)
        return found

    def _sample(self, lines: Sequence[_Line]) -> Sample:
        first = lines[0]
        source = self.folder / first.path
        if source.suffix.lower() in _DICOM:
            require_dicom()
        if first.slice is not None:
            require_nifti()
        size = source.stat().st_size if source.is_file() else 0  # one that is missing is told as a bad sample
        outputs = {output for line in lines for output in self._outputs(line)}
        label: int | None = None
        values: tuple[float, ...] = ()
        if self.targets == "class":
            label = min(outputs)
        elif self.targets == "labels":
            values = tuple(float(place in outputs) for place in range(len(self.class_names)))
            label = min(outputs) if len(outputs) == 1 else None
        else:
            values = (_number(first),)
        window = f"window {self.level:g} {self.width:g}" if self.level is not None else ""
        return Sample(first.sample_id, first.group, source, size, label, values, window)

    def _names(self, line: _Line) -> list[str]:
        """The classes that a line names."""
        names = line.target.split("|") if self.targets == "labels" else [line.target]
        names = [name.strip() for name in names if name.strip()]
        if not names and self.targets == "class":
            raise UserError(f"{line.where}: no target. A picture of no class is for dataset.targets=labels.")
        return names

    def _outputs(self, line: _Line) -> list[int]:
        """The outputs of a network that a line is about."""
        if self.targets == "value":
            return [0]
        known = self._places
        for name in self._names(line):
            if name not in known:
                raise UserError(f"{line.where}: {name!r} is none of dataset.classes={list(self.class_names)}.")
        return [known[name] for name in self._names(line)]

    @cached_property
    def _places(self) -> Mapping[str, int]:
        if len(self.class_names) > _MOST_CLASSES:
            raise UserError(
                f"{self.table} names {len(self.class_names):,} classes.\nFor numbers that are measured: "
                "dataset.targets=value."
            )
        return {name: place for place, name in enumerate(self.class_names)}

    def _trains(self, samples: Sequence[Sample]) -> set[str]:
        """The ids of the train split."""
        given = {sample.sample_id: self._by_id[sample.sample_id][0].split for sample in samples}
        if all(given.values()):
            return {sample_id for sample_id, split in given.items() if split == "train"}
        if any(given.values()):
            line = next(lines[0] for lines in self._by_id.values() if not lines[0].split)
            raise UserError(f"{line.where}: no split, which other lines have: give all of them one, or none.")
        strata: dict[str, object] = {}
        for sample in samples:
            strata.setdefault(sample.group_id, sample.label)
        groups = train_groups(strata, self.train_share, self.split_seed)
        return {sample.sample_id for sample in samples if sample.group_id in groups}

    def _image(self, path: Path, number: int | None) -> Image.Image:
        if number is not None:
            return _grey(self._windowed(_slice(path, number), read_volume(path)))
        if path.suffix.lower() in _DICOM:
            read = read_grey(path)
            return _grey(read.shown if self.level is None else self._windowed(read.values, read.values))
        return read_picture(path)

    def _windowed(self, values: np.ndarray, whole: np.ndarray) -> np.ndarray:
        """0..1. whole: what the range is taken from without a window."""
        if self.level is not None and self.width is not None:
            return np.clip((values - self.level) / self.width + 0.5, 0, 1)
        low, high = float(whole.min()), float(whole.max())
        return (values - low) / max(high - low, 1e-6)

    def _mask_plane(self, line: _Line, image: Image.Image) -> Tensor:
        path = self.folder / line.mask
        try:
            if path.name.lower().endswith(ENDINGS):
                drawn = _slice(path, line.slice or 0) > 0.5
            else:
                drawn = np.asarray(read_picture(path).convert("L")) > 127
        except BadSample as error:
            raise BadSample(f"its mask {line.mask}: {error}") from error
        if drawn.shape != (image.height, image.width):
            raise BadSample(
                f"its mask {line.mask} is {drawn.shape[1]} x {drawn.shape[0]}, it is {image.width} x {image.height}"
            )
        return torch.from_numpy(np.ascontiguousarray(drawn))


def _inside(root: Path, text: str, where: str) -> Path:
    """root / text. Raises UserError when it is not inside root, links followed."""
    path = root / text
    try:
        leaves = (
            Path(text).is_absolute() or ".." in Path(text).parts or not path.resolve().is_relative_to(root.resolve())
        )
    except (OSError, RuntimeError, ValueError):  # a loop of links, a NUL
        leaves = True
    if leaves:
        raise UserError(f"{where}: {text!r} is not inside {root}: give a path relative to that folder.")
    return path


def _box(cells: Sequence[str], where: str) -> tuple[float, ...] | None:
    if not any(cells):
        return None
    try:
        box = tuple(float(cell) for cell in cells)
    except ValueError:
        box = ()
    if not box or not all(map(math.isfinite, box)) or min(box[2:]) <= 0:
        raise UserError(
            f"{where}: {', '.join(cells)!r} is no box: x, y, and a width and a height above 0 are expected."
        )
    return box


def _number(line: _Line) -> float:
    try:
        value = float(line.target)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise UserError(
            f"{line.where}: target {line.target!r}: a number is expected.\nFor names: dataset.targets=class or labels."
        )
    return value


def _slice(path: Path, number: int) -> np.ndarray:
    """float32 [H, W]: an axial slice as a radiologist sees it. Raises BadSample."""
    volume = read_volume(path)
    if number >= len(volume):
        raise BadSample(f"{path.name} has {len(volume)} slices, and number {number} is asked for")
    return volume[number]


def _grey(shown: np.ndarray) -> Image.Image:
    return Image.fromarray(np.rint(shown * 255).astype(np.uint8)).convert("RGB")


def _box_plane(line: _Line, image: Image.Image) -> Tensor:
    """bool [H, W]: the pixels whose centre lies in the box. Raises BadSample when none does."""
    assert line.box is not None
    x, y, across, down = line.box
    columns, rows = np.arange(image.width) + 0.5, np.arange(image.height) + 0.5
    inside = ((rows >= y) & (rows < y + down))[:, None] & ((columns >= x) & (columns < x + across))
    if not inside.any():
        raise BadSample(f"its box {line.box} covers no pixel of {image.width} x {image.height}")
    return torch.from_numpy(inside)
