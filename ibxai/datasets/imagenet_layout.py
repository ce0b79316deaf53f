"""Finds the pictures, labels and boxes of ImageNet in the layouts in which people have it, without opening a picture.

- Class folders: `<root>/<wnid>/*.JPEG` or `<root>/val/<wnid>/*.JPEG`; the folder is the label.
- A flat folder of validation pictures, `ILSVRC2012_val_00000001.JPEG` ..., in the tree of Kaggle's archive
  (`ILSVRC/Data/CLS-LOC/val`, of which `root` may be any level) or as the official tar file unpacks it. Labels are
  taken from the first of these found beside it: `LOC_val_solution.csv`, the development kit
  (`ILSVRC2012_devkit_t12/data`), the XML annotations.

Boxes are the XML annotations (`Annotations/CLS-LOC/val`, or `Annotations/val`, or unpacked beside the pictures), else
`LOC_val_solution.csv`. XML goes first, as it alone says at which picture size the boxes were drawn.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ibxai.datasets.imagenet_boxes import Annotations, CsvAnnotations, XmlAnnotations, read_csv
from ibxai.datasets.imagenet_classes import class_index
from ibxai.errors import BadSample, UserError
from ibxai.types import Sample

PICTURE_ENDINGS = (".jpeg", ".jpg", ".png")
INSIDE_ROOT = ("ILSVRC/Data/CLS-LOC/val", "Data/CLS-LOC/val", "val", "")
XML_BESIDE = ("Annotations/CLS-LOC/val", "Annotations/val")
SOLUTION = "LOC_val_solution.csv"
DEVKIT = "ILSVRC2012_devkit_t12/data"
WNID = re.compile(r"n\d{8}")
HOW_TO_GET = (
    "Get the ILSVRC2012 validation pictures from image-net.org (after accepting its terms) or from Kaggle's ImageNet "
    "Object Localization Challenge, unpack them, and set dataset.root to that folder."
)


@dataclass(frozen=True)
class Layout:
    """What was found under a root. description: one line for the log."""

    description: str
    samples: tuple[Sample, ...]
    annotations: Annotations | None


@dataclass(frozen=True)
class _File:
    path: str
    stem: str
    size: int
    wnid: str | None


def find_layout(root: str, boxes: str | None) -> Layout:
    """The pictures under this folder, sorted by sample id. boxes: where annotations are, None to look for them.

    Raises `UserError` when there is nothing there, or nothing that can be labelled.
    """
    folder, class_folders = _find_pictures(Path(os.path.abspath(os.path.expanduser(root))))
    beside = _beside(folder)
    solution = _first(beside, SOLUTION)
    lines = read_csv(solution) if solution else None
    annotations = _annotations(folder, beside, lines) if boxes is None else _given_annotations(Path(boxes).expanduser())
    if class_folders:
        files = [file for wnid in class_folders for file in _pictures(folder / wnid, wnid)]
        labels_from = "their folders"
    else:
        files, labels_from = _label(_pictures(folder, None), lines, beside, annotations)
    _check(folder, files, bool(class_folders))
    shape = f"{len(class_folders)} class folders" if class_folders else "one flat folder"
    described = f"{len(files)} pictures in {shape} under {folder}, labels from {labels_from}, {_describe(annotations)}"
    return Layout(described, _samples(files), annotations)


def _find_pictures(root: Path) -> tuple[Path, list[str]]:
    """The folder that holds the pictures, and its class folders (none: the pictures lie flat in it)."""
    if not root.is_dir():
        what = "is a file, not a folder" if root.exists() else "does not exist"
        raise UserError(f"ImageNet: dataset.root={root} {what}.\n{HOW_TO_GET}")
    for inside in INSIDE_ROOT:
        folder = root / inside
        if not folder.is_dir():
            continue
        with _scan(folder) as entries:
            names = [entry.name for entry in entries]
        class_folders = sorted(name for name in names if WNID.fullmatch(name) and (folder / name).is_dir())
        flat = any(_is_picture(name) for name in names)
        if flat and class_folders:
            raise UserError(
                f"ImageNet: {folder} holds pictures as well as class folders such as {class_folders[0]}.\n"
                "Expected one or the other: move one of them away, or set dataset.root to another folder."
            )
        if flat or class_folders:
            return folder, class_folders
    raise UserError(
        f"ImageNet: no pictures under {root}: looked for *.JPEG and for class folders such as n01440764, there and in "
        f"{', '.join(inside for inside in INSIDE_ROOT if inside)}.\n{HOW_TO_GET}"
    )


def _pictures(folder: Path, wnid: str | None) -> list[_File]:
    found = []
    with _scan(folder) as entries:
        for entry in entries:
            if not _is_picture(entry.name):
                continue
            try:
                size = entry.stat().st_size
            except OSError:  # a dangling link: reading it tells why, as a bad sample
                size = 0
            found.append(_File(entry.path, os.path.splitext(entry.name)[0], size, wnid))
    return found


def _is_picture(name: str) -> bool:
    """macOS leaves "._name.JPEG" beside a picture: not one."""
    return name.lower().endswith(PICTURE_ENDINGS) and not name.startswith(".")


def _scan(folder: Path) -> os._ScandirIterator[str]:
    try:
        return os.scandir(folder)
    except OSError as error:
        raise UserError(f"ImageNet: the folder {folder} cannot be read: {error.strerror}.") from error


def _beside(folder: Path) -> list[Path]:
    """Where archives put labels and annotations, seen from the folder of the pictures."""
    in_tree = folder.parts[-3:] == ("Data", "CLS-LOC", "val")
    return [folder, folder.parent, *(folder.parents[2:4] if in_tree else ())]


def _first(folders: Sequence[Path], name: str) -> Path | None:
    return next((folder / name for folder in folders if (folder / name).exists()), None)


def _annotations(folder: Path, beside: Sequence[Path], lines: Mapping[str, str] | None) -> Annotations | None:
    # The official tar of boxes unpacks to val/*.xml, the one of pictures to *.JPEG without a folder.
    candidates = [base / inside for base in beside for inside in XML_BESIDE] + [folder / "val", folder]
    for candidate in candidates:
        if _holds_xml(candidate):
            return XmlAnnotations(candidate)
    return None if lines is None else CsvAnnotations(lines)


def _given_annotations(boxes: Path) -> Annotations:
    if boxes.is_file() and boxes.suffix.lower() == ".csv":
        return CsvAnnotations(read_csv(boxes))
    if _holds_xml(boxes):
        return XmlAnnotations(boxes)
    found = "holds no .xml file" if boxes.is_dir() else "is not a .csv file" if boxes.exists() else "does not exist"
    raise UserError(
        f"ImageNet: dataset.boxes={boxes} {found}.\n"
        f"Expected a folder of XML annotations (ILSVRC2012_val_00000001.xml ...) or {SOLUTION}."
    )


def _holds_xml(folder: Path) -> bool:
    if not folder.is_dir():
        return False
    with _scan(folder) as entries:
        return any(entry.name.endswith(".xml") for entry in entries)


def _describe(annotations: Annotations | None) -> str:
    if isinstance(annotations, XmlAnnotations):
        return f"boxes from {annotations.folder}"
    return "no boxes" if annotations is None else "boxes from LOC_val_solution.csv"


def _label(
    files: list[_File], lines: Mapping[str, str] | None, beside: Sequence[Path], annotations: Annotations | None
) -> tuple[list[_File], str]:
    """The same files with the class of each, and the name of where it was read."""
    wnids: Mapping[str, str] = {}
    source = "nowhere"
    devkit = _first(beside, DEVKIT)
    if lines is not None:
        wnids, source = _csv_labels(lines), SOLUTION
    elif devkit is not None:
        wnids, source = _devkit_labels(devkit), DEVKIT
    elif isinstance(annotations, XmlAnnotations):
        wnids, source = _xml_labels(annotations, [file.stem for file in files]), "the XML annotations"
    return [_File(file.path, file.stem, file.size, wnids.get(file.stem)) for file in files], source


def _csv_labels(lines: Mapping[str, str]) -> Mapping[str, str]:
    return {stem: boxes.split(" ", 1)[0] for stem, boxes in lines.items()}


def _xml_labels(annotations: XmlAnnotations, stems: Sequence[str]) -> Mapping[str, str]:
    """The class of the first box. An unreadable annotation gives none, and its picture fails when it is read."""
    labels = {}
    for stem in stems:
        try:
            annotation = annotations.of(stem)
        except BadSample:
            continue
        if annotation is not None and annotation.boxes:
            labels[stem] = annotation.boxes[0].wnid
    return labels


def _devkit_labels(devkit: Path) -> Mapping[str, str]:
    """Line i of the ground truth is the class of ILSVRC2012_val_<i> in the kit's own numbers, explained by meta.mat."""
    truth, meta = devkit / "ILSVRC2012_validation_ground_truth.txt", devkit / "meta.mat"
    # Here and not above: it takes half a second, and few have this layout.
    from scipy.io import loadmat

    try:
        synsets = loadmat(meta, squeeze_me=True)["synsets"]
        wnids = {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in synsets}
        numbers = [int(line) for line in truth.read_text().split()]
        return {f"ILSVRC2012_val_{place:08d}": wnids[number] for place, number in enumerate(numbers, start=1)}
    except Exception as error:  # a damaged .mat file surfaces as whatever scipy stumbles on
        raise UserError(
            f"ImageNet: the development kit in {devkit} cannot be read ({type(error).__name__}: {error}).\n"
            f"Expected meta.mat and {truth.name} as in ILSVRC2012_devkit_t12.tar.gz, or {SOLUTION} beside the pictures."
        ) from error


def _check(folder: Path, files: Sequence[_File], class_folders: bool) -> None:
    if not files:
        raise UserError(f"ImageNet: the class folders in {folder} hold no pictures (*.JPEG).\n{HOW_TO_GET}")
    if any(file.wnid in class_index() for file in files):
        return
    if class_folders:
        raise UserError(
            f"ImageNet: none of the class folders in {folder} is one of the 1,000 classes of ILSVRC 2012 "
            f"(found {files[0].wnid} ...).\nThis dataset is ImageNet-1k: set dataset.root to its validation pictures."
        )
    raise UserError(
        f"ImageNet: {folder} holds {len(files)} pictures but no labels for them.\nPut {SOLUTION} (Kaggle), the XML "
        "annotations or ILSVRC2012_devkit_t12 (image-net.org) beside it, or sort the pictures into class folders."
    )


def _samples(files: Sequence[_File]) -> tuple[Sample, ...]:
    """Sorted by id. The id is the stem where it is the only one of its kind, as in every official archive: so a picture
    has the same id in every layout. Else it is the path below the root: "n01440764/1", and with the file's ending
    where only that differs.
    """
    stems = Counter(file.stem for file in files)
    paths = Counter((file.wnid, file.stem) for file in files)
    made = []
    for file in files:
        path = Path(file.path)
        if stems[file.stem] == 1:
            sample_id = file.stem
        else:
            tail = file.stem if paths[file.wnid, file.stem] == 1 else path.name
            sample_id = f"{file.wnid}/{tail}" if path.parent.name == file.wnid else tail
        made.append(Sample(sample_id, sample_id, path, file.size, class_index().get(file.wnid or "")))
    return tuple(sorted(made, key=lambda sample: sample.sample_id))
