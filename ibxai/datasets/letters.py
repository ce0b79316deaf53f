"""Letters burned into pictures: found by a text detector, painted over, and written as a new dataset.

An `R` for the right side, "MOBILE ERECT", a date: where such marks follow the hospital, and the hospital the class, a
network learns the marks. Khorram, Lawson and Li (iGOS++, CHIL 2021) saw it on COVIDx and called the dataset without
letters COVIDx++: text boxes of the detector CRAFT (confidence 0.7), filled in by the method of Telea (2004) within a
radius of 10 pixels, `cv2.inpaint`. The same here, but for the detector: CRAFT's weights are in no package, and those of
PP-OCR lie inside the wheel of rapidocr, so nothing is downloaded. Its scores are another scale than CRAFT's:
`THRESHOLD` is chosen by recall and false alarms on boxes drawn by hand (docs/covidx_clean.md).

The new folder has the layout of the old one, which is only read:

- a picture with letters is a PNG under its old name, the same outside the boxes, pixel by pixel: a JPEG compressed
  again would tell a network which pictures had letters. One without letters is copied byte for byte;
- `cleaned.csv` has a line a picture, with letters or without: what is finished, so a stopped cleaning goes on;
- `before_after/` shows the first pictures with letters, `cleaning.json` says how they were found;
- all other files under the root, label lists among them, come last: a folder that is not finished is no dataset.
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor
from tqdm import tqdm

from ibxai.datasets.pictures import read_picture
from ibxai.datasets.splits import SplitDataset
from ibxai.datasets.tables import read_table
from ibxai.errors import BadSample, UserError
from ibxai.store import explained_os_errors, safe_name, write_atomically

TABLE, SETTINGS, SHOWN = "cleaned.csv", "cleaning.json", "before_after"
COLUMNS = ("file", "bytes", "boxes", "scores", "done")
PAINTED, NONE_FOUND, NOT_READ = "painted over", "no letters found", "not read"
RADIUS = 10  # pixels around one that is painted over, from which its colour comes (iGOS++, supplement)
THRESHOLD = 0.4  # the score from which on it is believed
SIDES = (480, 736)  # pixels of the shorter side, at both of which it looks: it misses what is too small or too large
_LONGEST = 4096  # pixels of the longer side
_LARGEST = 0.05  # of the area: twice the largest letters seen; what is larger is a chest or a spine, taken for letters
_PANEL = 512  # height of a picture before and after
_TEXT = ("utf-8", "surrogateescape")  # a file's name may be no text

Corners = tuple[int, int, int, int]
"""left, top, right, bottom in pixels; right and bottom lie outside."""


@dataclass(frozen=True)
class Letters:
    """A box around letters, and the detector's score, 0..1."""

    corners: Corners
    score: float


@dataclass(frozen=True)
class Cleaned:
    """What came of a cleaning. painted: pictures with letters. letters: boxes on them. unread: file -> reason."""

    folder: Path
    pictures: int
    painted: int
    letters: int
    unread: Mapping[str, str]


Finder = Callable[[Image.Image], list[Letters]]


def letter_finder() -> Finder:
    """A function from an RGB picture to its boxes, from top to bottom. Raises UserError without `ibxai[cleaning]`."""
    try:
        from rapidocr import RapidOCR
    except ImportError as error:
        raise UserError("Finding letters needs rapidocr, onnxruntime, opencv: pip install 'ibxai[cleaning]'") from error
    sizes = {"Global.max_side_len": _LONGEST, "Det.limit_type": "min", "Det.limit_side_len": 32}  # 32: as it comes
    detector = RapidOCR(params={"Global.log_level": "error", "Det.box_thresh": THRESHOLD, **sizes})
    # 3.10 sorts the boxes and not their scores, so that a box gets another one's: here none of them are sorted
    detector._load_det_model().sorted_boxes = lambda boxes: boxes

    def find(picture: Image.Image) -> list[Letters]:
        found = [own for side in SIDES for own in _seen(detector, picture, side)]
        return sorted(merged(found), key=lambda own: (own.corners[1], own.corners[0]))

    return find


def _seen(detector: Any, picture: Image.Image, side: int) -> Iterator[Letters]:
    """What the detector finds when the shorter side has so many pixels, as upright boxes in the picture; no giants."""
    width, height = picture.size
    scale = side / min(width, height)
    pixels = np.asarray(picture.resize((round(width * scale), round(height * scale)), Image.Resampling.BILINEAR))
    seen = detector(pixels[..., ::-1].copy(), use_det=True, use_cls=False, use_rec=False)  # blue comes first
    for box, score in zip([] if seen.boxes is None else seen.boxes, seen.scores or (), strict=True):
        points = np.asarray(box) / scale  # [4, 2], x and y
        left, top = (max(int(edge), 0) for edge in points.min(0))
        right, bottom = (min(math.ceil(edge) + 1, end) for edge, end in zip(points.max(0), picture.size, strict=True))
        if 0 < (right - left) * (bottom - top) <= _LARGEST * width * height:
            yield Letters((left, top, right, bottom), float(score))


def merged(found: Iterable[Letters]) -> list[Letters]:
    """Boxes of which one lies to more than half in the other become the one around both, with the higher score."""
    kept: list[Letters] = []
    for new in found:
        for old in [own for own in kept if _overlap(own.corners, new.corners) > 0.5]:
            kept.remove(old)
            (a, b, c, d), (left, top, right, bottom) = old.corners, new.corners
            around = (min(a, left), min(b, top), max(c, right), max(d, bottom))
            new = Letters(around, max(old.score, new.score))
        kept.append(new)
    return kept


def _overlap(one: Corners, other: Corners) -> float:
    """The part of the smaller box that lies in the larger one."""
    across, down = (min(one[i + 2], other[i + 2]) - max(one[i], other[i]) for i in (0, 1))
    smaller = min((own[2] - own[0]) * (own[3] - own[1]) for own in (one, other))
    return max(across, 0) * max(down, 0) / smaller


def paint_over(picture: Image.Image, letters: Sequence[Letters]) -> Image.Image:
    """The picture (L or RGB) with these boxes filled in from their surroundings; the same outside them."""
    import cv2

    pixels = np.asarray(picture)
    mask = np.zeros(pixels.shape[:2], np.uint8)
    for own in letters:
        left, top, right, bottom = own.corners
        mask[top:bottom, left:right] = 1
    return Image.fromarray(cv2.inpaint(pixels, mask, RADIUS, cv2.INPAINT_TELEA))


def read_boxes(path: Path) -> Mapping[str, tuple[Corners, ...]]:
    """File, as a path under its root -> the boxes of its letters, of those that have any, from a cleaned.csv.

    Raises UserError for what is no such table.
    """
    found = {}
    for number, row in enumerate(read_table(path, ("file", "boxes")), start=2):
        boxes = [tuple(map(_edge, box.split())) for box in row["boxes"].split(";") if box.strip()]
        if any(len(box) != 4 or not (0 <= box[0] < box[2] and 0 <= box[1] < box[3]) for box in boxes):
            raise UserError(f"{path}, row {number}: {row['boxes'][:100]!r} is no list of left top right bottom; ...")
        if boxes:
            found[row["file"]] = tuple(boxes)
    return found  # type: ignore[return-value]  # four numbers each, as was looked at


def _edge(text: str) -> int:
    return int(text) if text.isdecimal() else -1


def planes_of(boxes: Sequence[Corners], width: int, height: int) -> Tensor:
    """bool [R, height, width], one plane a box. Raises BadSample for one that lies outside the picture."""
    planes = torch.zeros(len(boxes), height, width, dtype=torch.bool)
    for plane, (left, top, right, bottom) in zip(planes, boxes, strict=True):
        if right > width or bottom > height:
            raise BadSample(f"its letters' box {left} {top} {right} {bottom} leaves its {width} x {height} pixels")
        plane[top:bottom, left:right] = True
    return planes


def clean(dataset: Any, to: Path, shown: int = 100) -> Cleaned:
    """Write the dataset under `to`, in its layout, with its letters painted over. Started again it goes on.

    shown: of how many pictures with letters a before-and-after is written. A picture that cannot be read is copied as
    it is, and listed. Raises UserError.
    """
    find = letter_finder()
    root, to = _root(dataset), Path(os.path.abspath(to.expanduser()))
    sources = _sources(dataset, root)
    if to.resolve().is_relative_to(root.resolve()) or root.resolve().is_relative_to(to.resolve()):
        raise UserError(
            f"--to {to} and dataset.root={root} lie in each other, and the dataset is only read: choose another."
        )
    _same_settings(to, dataset.name)
    with _Table(to / TABLE) as table:
        for name in tqdm(sorted(sources), unit="picture", desc="cleaning", disable=None, leave=False):
            if not table.has(name, sources[name]):
                table.add(_cleaned(name, sources[name], to, find, show=table.painted < shown))
    _copy_the_rest(root, to, set(sources))
    return table.outcome(to)


def _root(dataset: Any) -> Path:
    if not isinstance(dataset, SplitDataset):
        raise UserError(f"{dataset.name}: only a dataset whose pictures lie one by one in folders can be cleaned.")
    return dataset.folder


def _sources(dataset: SplitDataset, root: Path) -> dict[str, Path]:
    """Path under the root, with "/" -> the file, of all samples of both splits."""
    samples = [*dataset.in_split("train"), *dataset.in_split("test")]
    sources = {sample.source.relative_to(root).as_posix(): sample.source for sample in samples}
    if len(sources) < len(samples):
        raise UserError(f"{dataset.name}: several samples share a file, so its pictures cannot be cleaned one by one.")
    return sources


def _same_settings(to: Path, name: str) -> None:
    """Leave what the boxes depend on beside them; raises UserError when a folder was begun with something else."""
    settings = {
        **{"dataset": name, "detector": f"rapidocr {version('rapidocr')}", "sides": SIDES, "threshold": THRESHOLD},
        **{"inpainting": "telea", "radius": RADIUS},
    }
    content = (json.dumps(settings, indent=2) + "\n").encode()
    path = to / SETTINGS
    if not path.exists():
        if to.is_dir() and any(to.iterdir()):
            raise UserError(f"--to {to} has files in it, and none of a cleaning: choose another folder.")
        write_atomically(path, content)
    elif path.read_bytes() != content:
        raise UserError(
            f"{path} says that this folder was begun with other settings: {' '.join(path.read_text().split())}.\n"
            "Choose another folder, or remove it to clean again."
        )


def _cleaned(name: str, source: Path, to: Path, find: Finder, show: bool) -> dict[str, str]:
    """Write one picture, and before-and-after if that is to be shown. Returns its line of the table."""
    row = {"file": name, "bytes": str(_size(source)), "boxes": "", "scores": "", "done": NONE_FOUND}
    try:
        picture = _grey_if_it_is(read_picture(source))
        letters = find(picture.convert("RGB"))
    except BadSample as error:
        letters, row["done"] = [], f"{NOT_READ}: {error}"
    except Exception as error:  # one picture that nobody foresaw must not end the cleaning of 14,000
        letters, row["done"] = [], f"{NOT_READ}: unexpected {type(error).__name__}: {error}"
    if not letters:
        _copy(source, to / name)
        return row
    after = paint_over(picture, letters)
    if show:
        write_atomically(to / SHOWN / f"{safe_name(name)}.png", _png(_before_after(picture, after, letters)))
    write_atomically(to / name, _png(after))
    row["boxes"] = "; ".join(" ".join(map(str, own.corners)) for own in letters)
    row["scores"] = " ".join(f"{own.score:.2f}" for own in letters)
    return row | {"done": PAINTED}


def _grey_if_it_is(picture: Image.Image) -> Image.Image:
    grey = picture.getchannel(0)
    return grey if (np.asarray(picture) == np.asarray(grey)[..., None]).all() else picture


def _before_after(before: Image.Image, after: Image.Image, letters: Sequence[Letters]) -> Image.Image:
    """Both side by side, the boxes in red on the first."""
    marked = before.convert("RGB")
    pen = ImageDraw.Draw(marked)
    for own in letters:
        left, top, right, bottom = own.corners
        pen.rectangle((left - 1, top - 1, right, bottom), outline=(255, 0, 0), width=max(before.height // 400, 1))
    width = max(round(before.width * _PANEL / before.height), 1)
    page = Image.new("RGB", (2 * width, _PANEL))
    for place, panel in enumerate((marked, after.convert("RGB"))):
        page.paste(panel.resize((width, _PANEL), Image.Resampling.LANCZOS), (place * width, 0))
    return page


def _png(picture: Image.Image) -> bytes:
    content = io.BytesIO()
    picture.save(content, "PNG")
    return content.getvalue()


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _copy(source: Path, to: Path) -> None:
    """Byte for byte. What is no file, or may not be read, leaves nothing: its line in the table says why."""
    if source.is_file() and os.access(source, os.R_OK):
        part = to.with_name(f".{to.name[:100]}.part")
        with explained_os_errors(to):
            to.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, part)
            part.replace(to)


def _copy_the_rest(root: Path, to: Path, sources: set[str]) -> None:
    own = {TABLE, SETTINGS}
    for folder, _, names in os.walk(root):
        for path in (Path(folder, name) for name in names):
            name = path.relative_to(root).as_posix()
            if name not in sources and name not in own and not name.startswith(f"{SHOWN}/"):
                _copy(path, to / name)


class _Table:
    """cleaned.csv: read when it is there, then a line appended for each picture that is finished."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._rows: dict[str, dict[str, str]] = {}
        if path.is_file():
            text = path.read_bytes().decode(*_TEXT)
            whole = text[: text.rfind("\n") + 1]  # a line that a kill has cut short is done again
            self._rows = {row["file"]: row for row in csv.DictReader(io.StringIO(whole))}

    def __enter__(self) -> _Table:
        lines = "".join(map(_line, [COLUMNS, *(tuple(row.values()) for row in self._rows.values())]))
        write_atomically(self._path, lines.encode(*_TEXT))
        self._file = self._path.open("ab")
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    @property
    def painted(self) -> int:
        return sum(row["done"] == PAINTED for row in self._rows.values())

    def has(self, name: str, source: Path) -> bool:
        """Whether this file is finished, and still has the size that it had then."""
        return name in self._rows and self._rows[name]["bytes"] == str(_size(source))

    def add(self, row: dict[str, str]) -> None:
        self._rows[row["file"]] = row
        self._file.write(_line([row[column] for column in COLUMNS]).encode(*_TEXT))
        self._file.flush()

    def outcome(self, folder: Path) -> Cleaned:
        rows = self._rows.values()
        unread = {row["file"]: row["done"] for row in rows if row["done"].startswith(NOT_READ)}
        letters = sum(len(row["scores"].split()) for row in rows)
        return Cleaned(folder, len(rows), self.painted, letters, unread)


def _line(cells: Sequence[str]) -> str:
    content = io.StringIO()
    csv.writer(content, lineterminator="\n").writerow(cells)
    return content.getvalue()
