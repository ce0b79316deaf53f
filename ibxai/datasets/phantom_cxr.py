"""Phantom X-rays: the shadow of made chests, in the layouts of ChestX-ray8 and BrixIA at once, read by their readers.

The picture is ln(I0 / I), the attenuation summed from front to back, with bone counted more as X-rays of chests do, in
the tones of a film. What the real collections do not have: the outline of every finding, not only a box around it, and
lung masks for all.

    phantom.json   masks/00000001_000_Infiltration.png ... (outlines)   letters.csv   records/
    ChestX-ray8:   images/00000001_000.png ...   Data_Entry_2017_v2020.csv   BBox_List_2017.csv   the two lists
    BrixIA:        dicom_clean/00000001_000.dcm ...   metadata_global_v2.csv   lungs/00000001_000.png ...

Two X-rays of three are of a patient's first visit, the third of his second; patients never part. A region's score
follows BrixIA's words: 0 nothing, 1 ground glass alone, 2 consolidation too, 3 consolidation for the most part.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from PIL import Image
from scipy import ndimage

from ibxai.datasets.brixia import HOSPITAL, BrixIA
from ibxai.datasets.chestxray8 import BOXES, FINDINGS, NO_FINDING, TABLES, ChestXRay8
from ibxai.datasets.dicom import require_dicom
from ibxai.datasets.lungs import six_regions
from ibxai.datasets.phantom_anatomy import COARSE, KINDS, LUNG, Block, Body, shares
from ibxai.datasets.phantom_ct import drawn_lesions
from ibxai.datasets.phantoms import (
    Recipe,
    bounding_box,
    box_region,
    letter_for,
    letter_plane,
    read_letters,
    write_letters,
    write_table,
)
from ibxai.datasets.pictures import read_picture
from ibxai.datasets.splits import Found, SplitDataset, content_digest, files_in, train_groups
from ibxai.draws import normal, sample_keys
from ibxai.store import write_atomically
from ibxai.types import Picture, Sample

HEALTH = ("healthy", "ill")
_FIELD = 335.0  # mm: a side of the picture
_DEPTH = np.arange(-150.0, 150.0, 3.0)  # mm, along the beam
_ROWS_AT_ONCE = 16
_BONE = 1.6  # how much more than in Hounsfield units what is denser than 120 HU counts
_SEEN = 4.0  # mm of water that a finding must add to the beam to be part of its outline
_OFFICIAL_SIDE = 1024  # of the boxes' coordinates
# the findings of X-ray n are _PLAN[(n - 1) % 15]
_PLAN: tuple[tuple[str, ...], ...] = (
    *((), ("Infiltration",), (), ("Pneumonia",), ("Nodule",), (), ("Infiltration", "Pneumonia"), ("Effusion",)),
    *((), ("Infiltration",), ("Mass",), (), ("Cardiomegaly",), ("Pneumonia", "Effusion"), ()),
)
_LESIONS = {"Infiltration": "ground glass", "Pneumonia": "consolidation", "Nodule": "nodule", "Mass": "nodule"}
_SCORED = ("Infiltration", "Pneumonia")
_LARGE_HEART = 1.4
# the official headers; the commas inside brackets are not quoted there
_ENTRY_HEADER = (
    "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,"
    "OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y]"
)
_BOX_HEADER = "Image Index,Finding Label,Bbox [x,y,w,h],,,"
_BRIXIA_HEADER = (
    "Filename;StudyDate;Modality;Columns;Rows;Manufacturer;PhotometricInterpretation;BrixiaScore;BrixiaScoreGlobal;"
    "ConsensusTestset;Subject;StudyId;Sex;AgeAtStudyDateFiveYear"
)

require = require_dicom


class _Findings(ChestXRay8):
    title: ClassVar[str] = "Phantom X-rays"
    is_phantom: ClassVar[bool] = True


class _Severity(BrixIA):
    title: ClassVar[str] = "Phantom X-rays"
    is_phantom: ClassVar[bool] = True


@dataclass(frozen=True)
class PhantomCXR(SplitDataset):
    """Made X-rays. outputs: what the network's outputs are: "findings", the 8 of ChestX-ray8, read as that is;
    "health", whether there is any of these, as classes; or "global", "regions", "presence", the severity as `BrixIA`
    has it, read as that is.

    truth: what a finding's region "target@<number>" is, its "outline" or the official "box"; of health those of all
    findings are "target@1". Of severity, "target" is the outline of all that was scored.
    """

    outputs: Literal["findings", "health", "global", "regions", "presence"] = "findings"
    truth: Literal["outline", "box"] = "outline"

    title: ClassVar[str] = "Phantom X-rays"
    is_phantom: ClassVar[bool] = True
    how_to_get: ClassVar[str] = (
        "Make some with `ibxai data phantom phantom_cxr DIR`, and set dataset.root to that folder."
    )

    @property
    def class_names(self) -> Sequence[str]:
        return HEALTH if self.outputs == "health" else self._official.class_names

    def read(self, sample: Sample) -> Picture:
        """The X-ray with the regions of the official reader, "lungs", the outlines, and "letters" where one is burned
        in. "severity" float [6, H, W] comes with the severity's outputs.
        """
        picture = self._official.read(sample)
        name, (width, height) = sample.source.stem, picture.image.size
        regions = dict(picture.regions)
        outlines = {finding: _read_plane(path) for finding, path in self._outlines.get(name, {}).items()}
        if self.outputs in ("findings", "health"):
            regions["lungs"] = _read_plane(self.folder / f"lungs/{name}.png")
            if self.truth == "outline":
                regions |= {f"target@{FINDINGS.index(finding)}": plane for finding, plane in outlines.items()}
        elif self.outputs != "presence":
            scored = [outlines[finding] for finding in _SCORED if finding in outlines]
            regions |= {"target": torch.stack(scored).any(0)} if scored else {}
        if self.outputs == "health":
            found = [regions.pop(region) for region in sorted(regions) if region.startswith("target@")]
            regions |= {"target@1": torch.cat(found)} if found else {}
        if name in self._letters:
            regions["letters"] = box_region(self._letters[name], width, height)
        return Picture(picture.image, regions)

    def annotations(self) -> str:
        """A digest of the official annotations, of the outlines and of the letters; 64 hex digits."""
        drawn = {
            f"{name} {finding}": content_digest(path)
            for name, own in self._outlines.items()
            for finding, path in own.items()
        }
        parts = (self._official.annotations(), self.truth, sorted(drawn.items()), sorted(self._letters.items()))
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    def _look(self, root: Path) -> Found:
        found = self._official._look(root)
        facts = (
            ("phantoms", "made by `ibxai data phantom`: no real data"),
            *found.facts,
            ("outlines", f"{sum(map(len, self._outlines.values())):,} of findings"),
            ("letters", f"burned into {len(self._letters):,} X-rays"),
        )
        if self.outputs == "health":
            found = Found(tuple(map(_health, found.train)), tuple(map(_health, found.test)), facts)
        return replace(found, facts=facts)

    @cached_property
    def _official(self) -> ChestXRay8 | BrixIA:
        common = (self.root, self.name, self.split, self.reference_size)
        if self.outputs == "findings" or self.outputs == "health":
            return _Findings(*common)
        return _Severity(*common, outputs=self.outputs, lungs=str(self.folder / "lungs"))

    @cached_property
    def _outlines(self) -> Mapping[str, Mapping[str, Path]]:
        """Name of an X-ray -> finding -> its outline."""
        found: dict[str, dict[str, Path]] = {}
        for file, entry in sorted(files_in([self.folder / "masks"], (".png",)).items()):
            name, _, finding = Path(file).stem.rpartition("_")
            found.setdefault(name, {})[finding] = Path(entry.path)
        return found

    @cached_property
    def _letters(self) -> Mapping[str, tuple[int, int, int, int]]:
        return read_letters(self.folder)


def _health(sample: Sample) -> Sample:
    return replace(sample, label=int(any(sample.values)), values=())


def _read_plane(path: Path) -> torch.Tensor:
    """bool [1, H, W]"""
    return torch.from_numpy(np.asarray(read_picture(path).convert("L")) > 127)[None]


def write_study(recipe: Recipe, number: int, folder: Path) -> dict[str, Any]:
    """Write X-ray `number` in both layouts; returns its record."""
    patient, visit = 2 * (number - 1) // 3 + 1, int(number % 3 == 2)
    name = f"{patient:08d}_{visit:03d}"
    body, findings = _patient(recipe, patient, name, _PLAN[(number - 1) % len(_PLAN)])
    film = _exposed(body, recipe.size)
    outlines = {finding: film.outline(finding) for finding in findings}
    outlines = {finding: plane for finding, plane in outlines.items() if plane.any()}
    letter = letter_for(recipe, name, bool(outlines))
    plane = letter_plane(recipe, name, letter)
    grey = film.grey(recipe, name)
    grey = grey + plane * (1 - grey)
    lungs = film.lungs()
    _save_plane(folder / f"images/{name}.png", np.rint(grey * 255).astype(np.uint8))
    _save_plane(folder / f"lungs/{name}.png", lungs * np.uint8(255))
    for finding, outline in outlines.items():
        _save_plane(folder / f"masks/{name}_{finding}.png", outline * np.uint8(255))
    kind = ("MONOCHROME2", "MONOCHROME1")[number % 2]
    write_atomically(folder / f"dicom_clean/{name}.dcm", _dicom(name, patient, grey, kind))
    scale = _OFFICIAL_SIDE / recipe.size
    boxes = [[f, *(scale * side for side in box)] for f, outline in outlines.items() for box in _boxes(outline)]
    return {
        "name": name,
        "patient": patient,
        "visit": visit,
        "size": recipe.size,
        "kind": kind,
        "findings": [finding for finding in FINDINGS if finding in outlines],
        "boxes": boxes,
        "scores": film.scores(outlines, lungs),
        "letter": letter,
        "letter_box": bounding_box(plane) if letter else None,
    }


def _patient(recipe: Recipe, patient: int, name: str, findings: Sequence[str]) -> tuple[Body, Sequence[str]]:
    """The patient with these findings."""
    body = Body.drawn(recipe.seed, f"patient-{patient}")
    u = shares(recipe.seed, name, "phantom findings", 4)
    kinds = [_LESIONS[finding] for finding in findings if finding in _LESIONS]
    if kinds:
        count = 1 if "nodule" in kinds else 2 + int(3 * u[0])
        each = -(-count // len(kinds))
        # lesions are drawn by the X-ray's name: a second visit finds others
        drawn = [lesion for kind in kinds for lesion in drawn_lesions(body, f"{name} {kind}", each, (kind,))]
        volume = len(body.places) * COARSE**3
        radius = {"Nodule": 9 + 4 * u[1], "Mass": 19 + 8 * u[1]}.get(findings[0])
        share = 0.03 + 0.12 * u[1] if radius is None else 4 / 3 * np.pi * radius**3 / volume
        body = body.with_disease(drawn, float(share))
    if "Effusion" in findings:
        body = replace(body, fluid=float(-12 + 40 * u[2]))
    if "Cardiomegaly" in findings:
        body = replace(body, heart=_LARGE_HEART)
    return body, findings


@dataclass(frozen=True)
class _Film:
    """What a beam met on its way, mm, float [H, W]. beam: as much as this water would attenuate. added: finding -> the
    water that it adds.
    """

    beam: np.ndarray
    lung: np.ndarray
    heart: np.ndarray
    added: Mapping[str, np.ndarray]

    def grey(self, recipe: Recipe, name: str) -> np.ndarray:
        """float32 [H, W] in 0..1, bright = dense, in the tones of a film, with noise."""
        beam = ndimage.gaussian_filter(self.beam, 0.6)
        dark, bright = np.quantile(beam[beam > 25], [0.02, 0.97])
        tone = np.clip((beam - 0.7 * dark) / (bright - 0.7 * dark), 0, 1)
        grain = normal(sample_keys(recipe.seed, [name], "phantom noise"), 0, beam.shape)[0].numpy()
        noise = 0.02 * ndimage.gaussian_filter(grain, 0.5)
        return np.clip(1 - (1 - tone) ** 1.5 + noise, 0, 1).astype(np.float32)

    def lungs(self) -> np.ndarray:
        """bool [H, W]: where lung makes most of the shadow, so without what heart and diaphragm hide."""
        clear = self.lung > 0.35 * np.quantile(self.lung[self.lung > 0], 0.95)
        return ndimage.binary_opening(clear & (self.heart < 15), iterations=max(self.lung.shape[0] // 128, 1))

    def outline(self, finding: str) -> np.ndarray:
        """bool [H, W]"""
        return self.heart > 15 if finding == "Cardiomegaly" else self.added[finding] > _SEEN

    def scores(self, outlines: Mapping[str, np.ndarray], lungs: np.ndarray) -> list[int]:
        """BrixIA's six, A to F."""
        none = np.zeros_like(lungs)
        glass, dense = (outlines.get(finding, none) for finding in _SCORED)
        return [brixia_score(glass[region], dense[region]) for region in six_regions(lungs)]


def brixia_score(glass: np.ndarray, dense: np.ndarray) -> int:
    """0 to 3 of a region's pixels, bool [N] each: whether ground glass, and whether consolidation lies there. A region
    is affected from a fiftieth of its area.
    """
    affected, consolidated = np.mean(glass | dense), np.mean(dense)
    if affected < 0.02:
        return 0
    if consolidated < 0.02:
        return 1
    return 3 if consolidated > affected / 2 else 2


def _exposed(body: Body, size: int) -> _Film:
    across = (np.arange(size) - (size - 1) / 2) * _FIELD / size
    heights = across + 0.47 * body.height  # from the lowest row up
    films = [
        _shadow(body.block(heights[start : start + _ROWS_AT_ONCE], _DEPTH, across))
        for start in range(0, size, _ROWS_AT_ONCE)
    ]
    names = ("beam", "lung", "heart", "glass", "dense", "nodule", "fluid")
    beam, lung, heart, glass, dense, nodule, fluid = (
        np.concatenate([film[name] for film in films])[::-1].copy() for name in names
    )
    added = {"Infiltration": glass, "Pneumonia": dense, "Nodule": nodule, "Mass": nodule, "Effusion": fluid}
    return _Film(beam, lung, heart, added)


def _shadow(block: Block) -> dict[str, np.ndarray]:
    """What a block adds to the film: each a sum over the depth, mm [Z, X]."""
    step = _DEPTH[1] - _DEPTH[0]
    water = np.maximum(block.hu / 1000 + 1, 0)
    more = np.maximum(water - (LUNG / 1000 + 1), 0)
    kinds = {"glass": "ground glass", "dense": "consolidation", "nodule": "nodule"}
    found = {
        "beam": water + _BONE * np.maximum(block.hu - 120, 0) / 1000,
        "lung": block.lungs & ~block.fluid,
        "heart": block.heart,
        "fluid": more * block.fluid,
        **{short: more * (block.kinds == list(KINDS).index(kind) + 1) for short, kind in kinds.items()},
    }
    return {name: planes.sum(1, dtype=np.float32) * step for name, planes in found.items()}


def _boxes(outline: np.ndarray) -> list[tuple[int, int, int, int]]:
    """The boxes of an outline's pieces; crumbs of less than a tenth of the largest have none."""
    pieces, _ = ndimage.label(outline)
    sizes = np.bincount(pieces.ravel())[1:]
    large = [piece for piece, size in enumerate(sizes, start=1) if size >= 0.1 * sizes.max()]
    return [bounding_box(pieces == piece) for piece in large]


def _save_plane(path: Path, pixels: np.ndarray) -> None:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    write_atomically(path, buffer.getvalue())


def _dicom(name: str, patient: int, grey: np.ndarray, kind: str) -> bytes:
    """A computed radiograph of 12 bits."""
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import ComputedRadiographyImageStorage, ExplicitVRLittleEndian, generate_uid

    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.TransferSyntaxUID = ComputedRadiographyImageStorage, ExplicitVRLittleEndian
    meta.MediaStorageSOPInstanceUID = generate_uid(entropy_srcs=["ibxai phantom", name])
    file = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    file.SOPClassUID, file.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    file.Modality, file.PatientID, file.ImageComments = "CR", f"P{patient:04d}", "phantom: made by ibxai, no patient"
    file.Rows, file.Columns = grey.shape
    file.SamplesPerPixel, file.PhotometricInterpretation = 1, kind
    file.BitsAllocated, file.BitsStored, file.HighBit, file.PixelRepresentation = 16, 12, 11, 0
    file.WindowCenter, file.WindowWidth = "2048", "4096"
    shown = 1 - grey if kind == "MONOCHROME1" else grey
    file.PixelData = np.rint(shown * 4095).astype("<u2").tobytes()
    buffer = io.BytesIO()
    file.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def write_tables(folder: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """The official tables of both collections; their splits are the same."""
    patients = {f"{record['patient']}": "all" for record in records}
    trains = train_groups(patients, 0.7, 0)
    lists: dict[str, list[str]] = {"train_val_list.txt": [], "test_list.txt": []}
    entries, boxes, brixia = [], [], []
    for record in records:
        file, patient, size = f"{record['name']}.png", record["patient"], record["size"]
        trained = str(patient) in trains
        lists["train_val_list.txt" if trained else "test_list.txt"].append(file)
        findings = "|".join(record["findings"]) or NO_FINDING
        entries.append([file, findings, record["visit"], patient, 60, "M", "AP", size, size, *[_FIELD / size] * 2])
        boxes += [
            [file, "Infiltrate" if finding == "Infiltration" else finding, *box] for finding, *box in record["boxes"]
        ]
        scores = record["scores"]
        digits, test = "".join(map(str, scores)), int(not trained)
        row = [
            f"{record['name']}.dcm",
            20200301,
            "CR",
            size,
            size,
            "phantom",
            record["kind"],
            digits,
            sum(scores),
            test,
        ]
        brixia.append([*row, f"P{patient:04d}", f"A{record['name']}", "M", 12])
    for name, files in lists.items():
        write_atomically(folder / name, "".join(f"{file}\n" for file in files).encode())
    write_table(folder / TABLES[0], _ENTRY_HEADER.split(","), entries)
    write_table(folder / BOXES, _BOX_HEADER.split(","), boxes)
    write_table(folder / HOSPITAL, _BRIXIA_HEADER.split(";"), brixia, ";", excel=True)
    write_letters(folder, records)
