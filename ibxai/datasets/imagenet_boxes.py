"""The bounding boxes of ILSVRC 2012, from its XML files or from `LOC_val_solution.csv`, as boolean planes.

Coordinates count pixels from 0 and both corners belong to the box. PASCAL VOC, whose XML this is, counts from 1; the
boxes of ILSVRC do not: of 151 official validation boxes looked at, 18 start at 0 and 14 end at width - 1 or height - 1,
none at width or height.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol
from xml.etree import ElementTree

import torch
from torch import Tensor

from ibxai.errors import BadSample

MAX_XML_BYTES = 1_000_000
FARTHEST = 1_000_000  # no coordinate of a picture lies beyond


@dataclass(frozen=True)
class Box:
    """xmin, ymin, xmax, ymax in pixels from 0, both corners inside."""

    wnid: str
    corners: tuple[float, float, float, float]


@dataclass(frozen=True)
class Annotation:
    """The boxes of one picture and the (width, height) they were drawn at, None when that is not known."""

    boxes: tuple[Box, ...]
    size: tuple[int, int] | None


class Annotations(Protocol):
    """Where boxes come from. `of` is None for a picture without annotation, `BadSample` for one that is unreadable.

    `digest` stands for the annotations of these pictures, byte for byte; where they lie does not count.
    """

    def of(self, stem: str) -> Annotation | None: ...
    def digest(self, stems: Iterable[str]) -> str: ...


@dataclass(frozen=True)
class XmlAnnotations:
    """A folder with one `<stem>.xml` a picture."""

    folder: Path

    def of(self, stem: str) -> Annotation | None:
        path = self.folder / f"{stem}.xml"
        try:
            return parse_xml(_text(path))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, ElementTree.ParseError) as error:
            raise BadSample(f"annotation {path.name} is unreadable: {error}") from error

    def digest(self, stems: Iterable[str]) -> str:
        return _digest((stem, self._bytes(stem)) for stem in stems)

    def _bytes(self, stem: str) -> bytes | None:
        """None for a file that is absent or cannot be opened: its picture has no boxes, or is skipped."""
        try:
            with (self.folder / f"{stem}.xml").open("rb") as file:
                return file.read(MAX_XML_BYTES + 1)
        except OSError:
            return None


@dataclass(frozen=True)
class CsvAnnotations:
    """The lines of `LOC_val_solution.csv`: picture stem to "wnid xmin ymin xmax ymax wnid xmin ...", without sizes."""

    lines: Mapping[str, str]

    def of(self, stem: str) -> Annotation | None:
        if stem not in self.lines:
            return None
        try:
            return Annotation(parse_prediction_string(self.lines[stem]), None)
        except ValueError as error:
            raise BadSample(f"the line of {stem} in LOC_val_solution.csv is unreadable: {error}") from error

    def digest(self, stems: Iterable[str]) -> str:
        return _digest((stem, self.lines[stem].encode()) for stem in stems if stem in self.lines)


def read_csv(path: Path) -> Mapping[str, str]:
    """Picture stem -> its "PredictionString", unparsed, so that one broken line costs one picture."""
    lines: dict[str, str] = {}
    with path.open(encoding="utf-8", errors="replace") as file:
        next(file, None)  # ImageId,PredictionString
        for line in file:
            stem, _, boxes = line.partition(",")
            if stem.strip():
                lines[stem.strip()] = boxes.strip().strip('"')
    return lines


def parse_prediction_string(text: str) -> tuple[Box, ...]:
    """Groups of five: wnid and four corners. Raises ValueError."""
    words = text.split()
    if not words or len(words) % 5:
        raise ValueError(f"{len(words)} words, not groups of five")
    groups = [words[start : start + 5] for start in range(0, len(words), 5)]
    return tuple(_box(wnid, corners) for wnid, *corners in groups)


def parse_xml(text: str) -> Annotation:
    """The boxes of one VOC file. Raises ValueError or ParseError. Entities are refused: they can expand without end."""
    if "<!DOCTYPE" in text or "<!ENTITY" in text:
        raise ValueError("it holds a document type or entities, which annotations have no use for")
    root = ElementTree.fromstring(text)
    if root.tag != "annotation":
        raise ValueError(f"it holds <{root.tag[:40]}>, not an <annotation>")
    boxes = []
    for thing in root.iter("object"):
        corners = [thing.findtext(f"bndbox/{corner}") for corner in ("xmin", "ymin", "xmax", "ymax")]
        boxes.append(_box(thing.findtext("name"), corners))
    return Annotation(tuple(boxes), _size(root))


def box_planes(annotation: Annotation, wnid: str, width: int, height: int) -> Tensor | None:
    """bool [R, height, width], one plane a box of this class, cut to the picture; None when no box is left.

    Boxes are scaled when the picture has another size than the one they were drawn at, each side by its own factor:
    copies of ImageNet are often resized, also without keeping the aspect, with the annotations left as they were.
    Raises `BadSample` when boxes reach beyond a picture and no size tells how to scale them.
    """
    own = [box.corners for box in annotation.boxes if box.wnid == wnid]
    if annotation.size is None:
        _check_inside(own, width, height)
    across, down = (width, height) if annotation.size is None else annotation.size
    planes = []
    for xmin, ymin, xmax, ymax in own:
        left, right = _span(xmin, xmax, width / across, width)
        top, bottom = _span(ymin, ymax, height / down, height)
        if left < right and top < bottom:
            plane = torch.zeros(height, width, dtype=torch.bool)
            plane[top:bottom, left:right] = True
            planes.append(plane)
    return torch.stack(planes) if planes else None


def _span(first: float, last: float, scale: float, length: int) -> tuple[int, int]:
    """Pixels [start, stop) of an inclusive range after scaling: its outer edges are first and last + 1."""
    if last < first:
        return 0, 0
    start, stop = round(first * scale), round((last + 1) * scale)
    stop = max(stop, start + 1)  # scaling down never makes a box vanish
    return max(start, 0), min(stop, length)


def _check_inside(corners: list[tuple[float, float, float, float]], width: int, height: int) -> None:
    """One pixel of tolerance: an end at the width itself is the habit of counting from 1."""
    right = max((box[2] for box in corners), default=0)
    bottom = max((box[3] for box in corners), default=0)
    if right > width or bottom > height:
        raise BadSample(
            f"a box reaches ({right:g}, {bottom:g}) in a picture of {width} x {height}: the picture was resized, and "
            "its annotation gives no size to scale by (the XML annotations do)"
        )


def _digest(annotations: Iterable[tuple[str, bytes | None]]) -> str:
    """sha256 over the pictures that have an annotation, each with its own."""
    hasher = hashlib.sha256()
    for stem, content in annotations:
        if content is not None:
            name = stem.encode("utf-8", "surrogateescape")
            hasher.update(b"%d %d " % (len(name), len(content)) + name + content)
    return hasher.hexdigest()


def _text(path: Path) -> str:
    if path.stat().st_size > MAX_XML_BYTES:
        raise ValueError(f"{path.stat().st_size:,} bytes, more than the {MAX_XML_BYTES:,} that are read")
    return path.read_text(encoding="utf-8")


def _box(wnid: str | None, corners: list[str] | list[str | None]) -> Box:
    if not wnid:
        raise ValueError("a box without a class")
    numbers = [float(corner or "nan") for corner in corners]
    if not all(abs(number) < FARTHEST for number in numbers):  # false for NaN too
        raise ValueError(f"a box with corners {corners}")
    return Box(wnid.strip(), (numbers[0], numbers[1], numbers[2], numbers[3]))


def _size(root: ElementTree.Element) -> tuple[int, int] | None:
    """Width and height as annotated; a size of 0, which VOC tools write when they do not know it, is none."""
    width, height = (int(root.findtext(f"size/{side}") or 0) for side in ("width", "height"))
    return (width, height) if width > 0 and height > 0 else None
