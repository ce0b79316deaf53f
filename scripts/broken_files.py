#!/usr/bin/env python
"""A hundred broken files among good ones, in every layout: none is lost, each is skipped with a reason, no good one is.

    python scripts/broken_files.py                     # a table: layout, good, odd, broken, read, skipped
    python scripts/broken_files.py --broken 30 mosmed  # fewer, one layout
    python scripts/broken_files.py --reasons           # what is said of each kind

Every kind of damage comes in turn: empty, cut short, text, another format, header only, declared too large, numbers
that are none, a folder or a dangling link in the file's place, a file that vanishes after it was listed. "Odd" files
must be read: 16 bit, palette, CMYK, a JPEG named .png. Then `ibxai run` goes over the same folder, and its skipped.csv
is compared.
Exit code 0: all as it should be; 1: not, and what was wrong is printed.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import gzip
import io
import itertools
import json
import os
import struct
import sys
import tempfile
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pydicom
import yaml
from PIL import Image
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian, JPEG2000Lossless

from ibxai.cli import main as ibxai
from ibxai.config import build
from ibxai.datasets.loading import load_batches
from ibxai.preprocessing import Preprocessing
from ibxai.targets import Predicted

CONF = Path(__file__).parent.parent / "conf"
PIXELS = np.random.default_rng(0).integers(0, 256, (24, 24), dtype=np.uint8)
GONE = "gone"  # deleted after the dataset has been listed

Maker = Callable[[Path], None]


def encoded(picture: Image.Image, kind: str, **options: Any) -> bytes:
    content = io.BytesIO()
    picture.save(content, kind, **options)
    return content.getvalue()


def holding(content: bytes) -> Maker:
    return lambda path: path.write_bytes(content) and None


GREY = Image.fromarray(PIXELS)
PNG, JPEG = encoded(GREY, "PNG"), encoded(GREY, "JPEG")


def png_of_size(width: int, height: int) -> bytes:
    """The header says so, and its checksum is right."""
    header = b"IHDR" + struct.pack(">II", width, height) + PNG[24:29]
    return PNG[:12] + header + struct.pack(">I", zlib.crc32(header)) + PNG[33:]


def without_permission(path: Path) -> None:
    path.write_bytes(PNG)
    path.chmod(0)


def in_its_place(what: str) -> Maker:
    make: dict[str, Maker] = {
        "folder": Path.mkdir,
        "dangling link": lambda path: path.symlink_to(path.parent / "nothing"),
        "link to itself": lambda path: path.symlink_to(path),
        "link to a device": lambda path: path.symlink_to("/dev/zero"),
        "pipe": os.mkfifo,
        "no permission": without_permission,
    }
    return make[what]


ANYWHERE: dict[str, Maker] = {
    "empty": holding(b""),
    "text": holding(b"hello " * 99),
    "web page": holding(b"<!DOCTYPE html><html><body>404 Not Found</body></html>"),
    "zeros": holding(bytes(5000)),
    "zip": holding(b"PK\x03\x04" + bytes(99)),
    **{what: in_its_place(what) for what in ("folder", "dangling link", "link to itself", "link to a device", "pipe")},
    # root may read everything
    **({"no permission": in_its_place("no permission")} if os.geteuid() else {}),
    GONE: holding(PNG),
}
BROKEN_PICTURES: dict[str, Maker] = {
    **ANYWHERE,
    "PNG cut short": holding(PNG[: len(PNG) // 2]),
    "PNG, header only": holding(PNG[:33]),
    "PNG, a wrong checksum": holding(PNG[:60] + b"\xff\x00\xff" + PNG[63:]),
    "PNG of 60,000 x 60,000": holding(png_of_size(60_000, 60_000)),
    "PNG of 2 billion": holding(png_of_size(2**31 - 1, 2**31 - 1)),
    "PNG of no width": holding(png_of_size(0, 24)),
    "PNG, a strip": holding(encoded(Image.new("L", (9000, 1)), "PNG")),
    "JPEG cut short": holding(JPEG[: len(JPEG) // 2]),
    "JPEG, two bytes": holding(JPEG[:2]),
    "TIFF with NaN": holding(encoded(Image.fromarray(np.full((9, 9), np.nan, np.float32)), "TIFF")),
    "TIFF in float, -1000": holding(encoded(Image.fromarray(np.full((9, 9), -1000, np.float32)), "TIFF")),
    "TIFF in int32, -5": holding(encoded(Image.fromarray(np.full((9, 9), -5, np.int32)), "TIFF")),
    "TIFF cut short": holding(encoded(GREY, "TIFF")[:300]),
    "GIF cut short": holding(encoded(GREY, "GIF")[:30]),
    "SVG": holding(b"<svg xmlns='http://www.w3.org/2000/svg'/>"),
    "PostScript": holding(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"),
    "PDF": holding(b"%PDF-1.4\n"),
    "PNG in gzip": holding(gzip.compress(PNG)),
}
WIDE = PIXELS.astype(np.uint16) * 257
ODD_PICTURES: dict[str, Maker] = {
    "16 bit": holding(encoded(Image.fromarray(WIDE), "PNG")),
    "palette": holding(encoded(GREY.convert("P"), "PNG")),
    "palette, transparent": holding(encoded(GREY.convert("P"), "PNG", transparency=3)),
    "RGBA": holding(encoded(GREY.convert("RGBA"), "PNG")),
    "one bit": holding(encoded(GREY.convert("1"), "PNG")),
    "CMYK": holding(encoded(GREY.convert("CMYK"), "JPEG")),
    "progressive": holding(encoded(GREY, "JPEG", progressive=True)),
    "another ending": holding(encoded(GREY, "WEBP", lossless=True)),
    "animation": holding(encoded(GREY, "GIF", save_all=True, append_images=[GREY.rotate(90)])),
    "float 0..1": holding(encoded(Image.fromarray(PIXELS / np.float32(255)), "TIFF")),
    "words behind its end": holding(PNG + b"more"),
}


def dicom(syntax: str = ExplicitVRLittleEndian, **more: Any) -> bytes:
    """A 12-bit X-ray; `more` are its attributes by keyword, None deletes one."""
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = "1.2.840.10008.5.1.4.1.1.1", "1.2.3"
    meta.TransferSyntaxUID = syntax
    file = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    file.SOPClassUID, file.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    plain = {"Rows": 24, "Columns": 24, "BitsAllocated": 16, "BitsStored": 12, "HighBit": 11, "SamplesPerPixel": 1}
    plain |= {"PixelRepresentation": 0, "PhotometricInterpretation": "MONOCHROME2"}
    plain |= {"PixelData": (PIXELS.astype(np.uint16) * 16).tobytes()}
    content = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of numbers that are none, which is the point
        for keyword, value in {**plain, **more}.items():
            if value is not None:
                setattr(file, keyword, value)
        pydicom.dcmwrite(content, file, enforce_file_format=True)
    return content.getvalue()


DICOM = dicom()
BROKEN_DICOM: dict[str, Maker] = {
    **ANYWHERE,
    "cut in the pixels": holding(DICOM[:-500]),
    "cut in the header": holding(DICOM[:180]),
    "no pixels": holding(dicom(PixelData=None)),
    "no rows": holding(dicom(Rows=None)),
    "60,000 x 60,000": holding(dicom(Rows=60_000, Columns=60_000)),
    "no photometric": holding(dicom(PhotometricInterpretation=None)),
    "in colour": holding(dicom(SamplesPerPixel=3, PhotometricInterpretation="RGB", PlanarConfiguration=0)),
    "three frames": holding(dicom(NumberOfFrames=3)),
    "13 bits allocated": holding(dicom(BitsAllocated=13)),
    "pixels of another size": holding(dicom(Rows=48)),
    "no bits": holding(dicom(BitsAllocated=None)),
    "slope NaN": holding(dicom(RescaleSlope="nan", RescaleIntercept="0")),
    "window NaN": holding(dicom(WindowCenter="nan", WindowWidth="100")),
    "JPEG 2000 that is none": holding(
        dicom(JPEG2000Lossless, PixelData=pydicom.encaps.encapsulate([b"\xff\x4f\xff\x51" + bytes(80)]))
    ),
    "a PNG": holding(PNG),
}
ODD_DICOM: dict[str, Maker] = {
    "MONOCHROME1": holding(dicom(PhotometricInterpretation="MONOCHROME1")),
    "implicit": holding(dicom(ImplicitVRLittleEndian)),
    "signed, rescaled": holding(dicom(PixelRepresentation=1, RescaleSlope="1", RescaleIntercept="-1024")),
    "a narrow window": holding(dicom(WindowCenter="2000", WindowWidth="1")),
    "one grey": holding(dicom(PixelData=bytes(2 * 24 * 24))),
    "words behind its end": holding(DICOM + bytes(64)),
}


def nifti(voxels: np.ndarray, affine: np.ndarray | None = None) -> bytes:
    """The bytes of a .nii.gz file."""
    image = nibabel.Nifti1Image(voxels, np.diag([-0.7, 0.7, 8.0, 1.0]) if affine is None else affine)
    return gzip.compress(image.to_bytes())


def with_header(at: int, form: str, *numbers: float) -> bytes:
    """A volume whose header holds these numbers at this byte."""
    content = bytearray(gzip.decompress(VOLUME))
    struct.pack_into(form, content, at, *numbers)
    return gzip.compress(bytes(content))


CT = np.full((24, 24, 5), -900, np.int16)
VOLUME = nifti(CT)
BROKEN_NIFTI: dict[str, Maker] = {
    **ANYWHERE,
    "gzip cut short": holding(VOLUME[: len(VOLUME) // 2]),
    "gzip, a wrong byte": holding(VOLUME[:40] + bytes([VOLUME[40] ^ 0xFF]) + VOLUME[41:]),
    "gzip, a wrong checksum": holding(VOLUME[:-8] + bytes(4) + VOLUME[-4:]),
    "gzip of text": holding(gzip.compress(b"hello " * 99)),
    "gzip of nothing": holding(gzip.compress(b"")),
    "header only": holding(gzip.compress(gzip.decompress(VOLUME)[:352])),
    "voxels cut short": holding(gzip.compress(gzip.decompress(VOLUME)[:-800])),
    "two axes": holding(nifti(CT[:, :, 0])),
    "four axes": holding(nifti(np.stack([CT, CT], -1))),
    "NaN": holding(nifti(np.full((8, 8, 3), np.nan, np.float32))),
    "infinite": holding(nifti(np.full((8, 8, 3), np.inf, np.float32))),
    "complex": holding(nifti(np.ones((8, 8, 3), np.complex64))),
    "colours": holding(nifti(np.zeros((8, 8, 3), [("R", "u1"), ("G", "u1"), ("B", "u1")]))),
    "30,000 x 30,000 x 300": holding(with_header(40, "<8h", 3, 30000, 30000, 300, 1, 1, 1, 1)),
    "a negative axis": holding(with_header(40, "<8h", 3, 24, -24, 5, 1, 1, 1, 1)),
    "an axis of nothing": holding(with_header(40, "<8h", 3, 24, 24, 0, 1, 1, 1, 1)),
    "an unknown type": holding(with_header(70, "<h", 999)),
    "affine of zeros": holding(with_header(280, "<12f", *[0.0] * 12)),
    "affine NaN": holding(with_header(280, "<12f", *[np.nan] * 12)),
}
ODD_NIFTI: dict[str, Maker] = {
    "float": holding(nifti(CT.astype(np.float32))),
    "one time step": holding(nifti(CT[..., None])),
    "axes turned": holding(nifti(CT, np.array([[0, 0, 8.0, 0], [0.7, 0, 0, 0], [0, 0.7, 0, 0], [0, 0, 0, 1]]))),
    "one slice": holding(nifti(CT[:, :, :1])),
    "slope infinite": holding(with_header(112, "<2f", np.inf, 0.0)),  # none, as nibabel has it
}


@dataclass(frozen=True)
class Layout:
    """place: file number -> where it lies. tables: writes what lists the files. settings: of the dataset."""

    dataset: str
    place: Callable[[int], str]
    tables: Callable[[Path, Sequence[str]], None]
    good: bytes
    odd: Mapping[str, Maker]
    broken: Mapping[str, Maker]
    settings: Mapping[str, Any]


def covidx(root: Path, names: Sequence[str]) -> None:
    (root / "labels").mkdir()
    (root / "labels/test_COVIDx4.txt").write_text("".join(f"p{n} {n} normal rsna\n" for n in names))
    (root / "labels/train_COVIDx4.txt").write_text("t t.png pneumonia rsna\n")


def chestxray8(root: Path, names: Sequence[str]) -> None:
    lines = [f"{name},Mass,0,{number}\n" for number, name in enumerate(names)]
    (root / "Data_Entry_2017_v2020.csv").write_text(
        "Image Index,Finding Labels,Follow-up #,Patient ID\n" + "".join(lines)
    )
    (root / "test_list.txt").write_text("\n".join(names))
    (root / "train_val_list.txt").write_text("none.png\n")


def cohen(root: Path, names: Sequence[str]) -> None:
    columns = [f"{reader}-{region}" for reader in "SJ" for region in "ABCDEF"]
    lines = [",".join(["filename", *columns]), *(",".join([name, *"012301012301"]) for name in names)]
    (root / "data/public-annotations.csv").write_text("\n".join(lines) + "\n")


def hospital(root: Path, names: Sequence[str]) -> None:
    lines = ["Filename;BrixiaScore;ConsensusTestset;Subject", *(f"{name};012301;1;{name}" for name in names)]
    (root / "metadata_global_v2.csv").write_text("\n".join(lines) + "\n")


def svhn(root: Path, names: Sequence[str]) -> None:
    box = {"left": 1, "top": 1, "width": 2, "height": 2, "label": 1}
    (root / "test/digitStruct.json").write_text(json.dumps([{"filename": name, "boxes": [box]} for name in names]))


def no_tables(root: Path, names: Sequence[str]) -> None:
    """Its folders say it all."""


PICTURES = (PNG, ODD_PICTURES, BROKEN_PICTURES)
LAYOUTS = {
    "covidx": Layout("covidx", lambda n: f"data/test/x{n}.png", covidx, *PICTURES, {}),
    "chestxray8": Layout("chestxray8", lambda n: f"images_001/images/x{n}.png", chestxray8, *PICTURES, {}),
    "brixia cohen": Layout(
        "brixia", lambda n: f"data/public-cohen-subset/x{n}.jpg", cohen, *PICTURES,
        {"subset": "cohen", "train_share": 1e-9},
    ),
    "brixia hospital": Layout(
        "brixia", lambda n: f"dicom_clean/x{n}.dcm", hospital, DICOM, ODD_DICOM, BROKEN_DICOM, {"subset": "hospital"}
    ),
    "mosmed": Layout(
        "mosmed", lambda n: f"studies/CT-{n % 2}/study_{n:04d}.nii.gz", no_tables, VOLUME, ODD_NIFTI, BROKEN_NIFTI,
        {"train_share": 1e-9, "every": 1000},
    ),
    "imagenet": Layout("imagenet", lambda n: f"n01440764/ILSVRC2012_val_{n:08d}.JPEG", no_tables, *PICTURES, {}),
    "svhn": Layout("svhn", lambda n: f"test/{n}.png", svhn, *PICTURES, {}),
}  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """files: name -> kind. skipped: name -> reason. wrong: what is not as it should be, a line each."""

    files: Mapping[str, str]
    read: Set[str]
    skipped: Mapping[str, str]
    wrong: Sequence[str]


def fill(layout: Layout, root: Path, good: int, broken: int) -> dict[str, str]:
    """Write the files. Returns file -> kind: "good", "odd: ..." or "broken: ..."."""
    kinds = [("good", holding(layout.good))] * good
    kinds += [(f"odd: {kind}", make) for kind, make in layout.odd.items()]
    kinds += [
        (f"broken: {kind}", make) for kind, make in itertools.islice(itertools.cycle(layout.broken.items()), broken)
    ]
    np.random.default_rng(0).shuffle(kinds)
    files = {}
    for number, (kind, make) in enumerate(kinds, start=1):
        path = root / layout.place(number)
        path.parent.mkdir(parents=True, exist_ok=True)
        make(path)
        files[path.name] = kind
    layout.tables(root, list(files))
    return files


def examine(layout: Layout, root: Path, good: int, broken: int) -> Outcome:
    """Read a folder of this layout as a run does; then let `ibxai run` do it, and compare its skipped.csv."""
    files = fill(layout, root / "files", good, broken)
    settings = yaml.safe_load((CONF / "dataset" / f"{layout.dataset}.yaml").read_text())
    settings.pop("defaults", None)
    dataset = build(settings | {"root": str(root / "files")} | layout.settings, "dataset")
    splits = (
        [dataset.in_split(name) for name in ("train", "test")] if hasattr(dataset, "in_split") else [dataset.samples()]
    )
    samples = [sample for split in splits for sample in split]
    for name in (name for name, kind in files.items() if kind.endswith(GONE)):
        next((root / "files").rglob(name)).unlink()
    named = {sample.sample_id: sample.source.name for sample in samples}
    preprocessing = Preprocessing(16, 16, (0.5,) * 3, (0.5,) * 3)
    read: set[str] = set()
    skipped: dict[str, str] = {}
    for loaded in load_batches(dataset, [(sample, (0,)) for sample in samples], Predicted(), preprocessing, 16, 0):
        read |= {named[row_id.rpartition("@")[0]] for row_id in loaded.row_ids}
        skipped |= {named[sample_id]: reason for sample_id, reason in loaded.skipped.items()}
    wrong = list(differences(files, read, skipped))
    expected = {
        own.source.name for own in dataset.samples() if not files[own.source.name].endswith(GONE)
    } & skipped.keys()
    listed = {named[sample_id] for sample_id in skipped_by_a_run(layout, root)}
    wrong += [f"{name}, {files[name]}: in one of skipped.csv and here" for name in listed ^ expected]
    return Outcome(files, read, skipped, wrong)


def skipped_by_a_run(layout: Layout, root: Path) -> set[str]:
    """The sample ids in skipped.csv of `ibxai run`, or a line that says how it ended."""
    arguments = [f"dataset={layout.dataset}", f"dataset.root={root / 'files'}", f"outputs={root / 'outputs'}"]
    arguments += [f"dataset.{key}={value}" for key, value in layout.settings.items()]
    arguments += ["method=random", "metric=[]", "target=predicted", "pictures=0", "backbone=small_cnn"]
    arguments += ["backbone.weights=none", "backbone.allow_random=true", "workers=0"]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as said:
        code = ibxai(["run", *arguments])
    if code != 3:
        raise SystemExit(f"ibxai run {' '.join(arguments)} ended with {code}, not 3:\n{said.getvalue()}")
    (path,) = (root / "outputs").rglob("skipped.csv")
    with path.open(newline="") as file:
        return {row["sample"] for row in csv.DictReader(file) if row["reason"]}


def differences(files: Mapping[str, str], read: Set[str], skipped: Mapping[str, str]) -> Iterator[str]:
    for name, kind in files.items():
        broken = kind.startswith("broken")
        if (name in read) == broken or (name in skipped) != broken:
            yield f"{name}, {kind}: {'read' if name in read else skipped.get(name, 'lost')}"
        elif skipped.get(name, "").startswith("unexpected"):
            yield f"{name}, {kind}: nobody foresaw it: {skipped[name]}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("layouts", nargs="*", metavar="LAYOUT", help=f"{', '.join(LAYOUTS)} (all)")
    parser.add_argument("--good", type=int, default=50, metavar="N", help="good files a layout (50)")
    parser.add_argument("--broken", type=int, default=100, metavar="N", help="broken files a layout (100)")
    parser.add_argument("--reasons", action="store_true", help="print what is said of each kind")
    options = parser.parse_args()
    print(
        f"| {'layout':15} | good | odd | broken | kinds | read | skipped | wrong |\n|---|---|---|---|---|---|---|---|"
    )
    failed = []
    for name in options.layouts or LAYOUTS:
        with tempfile.TemporaryDirectory(prefix="broken-files-") as root:
            found = examine(LAYOUTS[name], Path(root), options.good, options.broken)
        counts = [sum(kind.startswith(part) for kind in found.files.values()) for part in ("good", "odd", "broken")]
        counts += [len(set(found.files.values())) - 1, len(found.read), len(found.skipped), len(found.wrong)]
        print(f"| {name:15} | " + " | ".join(map(str, counts)) + " |", flush=True)
        failed += [f"{name}: {line}" for line in found.wrong]
        if options.reasons:
            reasons = {found.files[file]: reason for file, reason in found.skipped.items()}
            print("\n".join(f"    {kind.removeprefix('broken: '):26} {reasons[kind]}" for kind in sorted(reasons)))
    print("\n".join(failed))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
