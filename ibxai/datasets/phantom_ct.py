"""Phantom CT: made studies in MosMedData's layout, read by MosMed's reader, with a lesion mask for every study.

What the real archive does not have: all lesions are known (there: 50 masks of 1,110 studies), the share of the lungs
that is affected is exact, and a slice's label is true: the slices of an unhealthy study that show no lesion, which the
study's label would call unhealthy all the same, are left out.

    phantom.json   studies/CT-0/study_0001.nii.gz ...   masks/study_0002_mask.nii.gz ...   dataset_registry.csv
    phantom_slices.csv (pixels of lung and lesion of each slice)   phantom_studies.csv   letters.csv   records/

Half of the studies are healthy. Categories follow MosMedData's rule: of the lungs up to 25 % is affected in CT-1, up to
50 % in CT-2, up to 75 % in CT-3, more in CT-4.
"""

from __future__ import annotations

import gzip
import hashlib
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from scipy import ndimage

from ibxai.datasets.mosmed import CATEGORIES, MosMed
from ibxai.datasets.nifti import require_nifti
from ibxai.datasets.phantom_anatomy import AIR, Block, Body, Lesion, shares
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
from ibxai.datasets.splits import Found
from ibxai.datasets.tables import read_table
from ibxai.draws import normal, sample_keys
from ibxai.errors import UserError
from ibxai.store import write_atomically
from ibxai.types import Picture, Sample

SLICES, STUDIES = "phantom_slices.csv", "phantom_studies.csv"
_SPACING = 8.0  # mm between slices, as in MosMedData
_AT_ONCE = 8  # slices: what is drawn at once stays in the cache
# the category of study n is _ORDER[(n - 1) % 20]: with few studies each is there already
_ORDER = (0, 1, 0, 1, 0, 2, 0, 1, 0, 3, 0, 1, 0, 2, 0, 1, 0, 1, 0, 4)
# category -> affected share of the lungs, from and to: inside the rule's bounds by more than a grid's rounding;
# and the number of lesions
_AFFECTED = {1: (0.005, 0.08), 2: (0.28, 0.46), 3: (0.53, 0.71), 4: (0.79, 0.92)}
_LESIONS = {1: (1, 4), 2: (4, 7), 3: (6, 9), 4: (7, 10)}
_BACKGROUNDS = (-2048, -3024, int(AIR))  # outside the scanner's circle
_LETTER_HU = 1500.0

require = require_nifti


@dataclass(frozen=True)
class PhantomCT(MosMed):
    """The axial slices of made studies; label 0 is healthy, 1 unhealthy. Settings as for `MosMed`, and:

    smallest_lesion: a slice of an unhealthy study is left out unless more than this share of its lung is affected.
    """

    smallest_lesion: float = 0.02

    title: ClassVar[str] = "Phantom CT"
    is_phantom: ClassVar[bool] = True
    how_to_get: ClassVar[str] = (
        "Make some with `ibxai data phantom phantom_ct DIR`, and set dataset.root to that folder."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.smallest_lesion < 1:
            raise UserError(f"dataset.smallest_lesion={self.smallest_lesion}: a share from 0 to 1 is expected.")

    def read(self, sample: Sample) -> Picture:
        """As `MosMed.read`: every unhealthy slice has its "target"; and "letters" where one is burned in."""
        picture = super().read(sample)
        box = self._letters.get(sample.group_id)
        if box is None:
            return picture
        letters = box_region(box, picture.image.width, picture.image.height)
        return Picture(picture.image, {**picture.regions, "letters": letters})

    def annotations(self) -> str:
        """A digest as `MosMed.annotations`, and of the letters; 64 hex digits."""
        return hashlib.sha256(f"{super().annotations()} {sorted(self._letters.items())}".encode()).hexdigest()

    def _look(self, root: Path) -> Found:
        found = super()._look(root)
        studies = {s.group_id: s.source.parent.name for s in (*found.train, *found.test)}
        count = Counter(studies.values())
        taken = f"{len(found.train) + len(found.test):,}, one in {self.every}; unhealthy ones show a lesion"
        facts = (
            ("phantoms", "made by `ibxai data phantom`: no real data"),
            ("studies", f"{len(studies):,}: " + ", ".join(f"{c} {count[c]}" for c in CATEGORIES)),
            ("slices", f"{taken} of more than {self.smallest_lesion:g} of the lung"),
            ("letters", f"burned into {len(self._letters.keys() & studies.keys()):,} studies"),
        )
        return replace(found, facts=facts)

    def _samples(self, study: str, category: str, entry: os.DirEntry[str]) -> list[Sample]:
        samples = super()._samples(study, category, entry)
        if category == "CT-0":
            return samples
        return [sample for sample in samples if self._affected.get(sample.sample_id, 1) > self.smallest_lesion]

    @cached_property
    def _affected(self) -> Mapping[str, float]:
        """Sample id -> the share of the slice's lung that is affected."""
        rows = read_table(self.folder / SLICES, ("study", "slice", "lung", "lesion"))
        return {
            f"{row['study']}_slice_{int(row['slice']):03d}": int(row["lesion"]) / max(int(row["lung"]), 1)
            for row in rows
        }

    @cached_property
    def _letters(self) -> Mapping[str, tuple[int, int, int, int]]:
        return read_letters(self.folder)


def write_study(recipe: Recipe, number: int, folder: Path) -> dict[str, Any]:
    """Write study `number` and its mask; returns its record."""
    name = f"study_{number:04d}"
    grade = _ORDER[(number - 1) % len(_ORDER)]
    body = Body.drawn(recipe.seed, name)
    body = ill_body(body, grade) if grade else body
    spacing = 2.06 * (body.width + body.wall + body.fat) / recipe.size
    blocks = list(_drawn(body, recipe.size, spacing))
    lungs, lesions = np.concatenate([b.lungs for b in blocks]), np.concatenate([b.kinds for b in blocks]) > 0
    hu = _scanned(recipe, name, body, np.concatenate([block.hu for block in blocks]), spacing)
    letter = letter_for(recipe, name, grade > 0)
    plane = letter_plane(recipe, name, letter)
    hu = hu + plane * (_LETTER_HU - hu)
    _save(folder / f"studies/CT-{grade}/{name}.nii.gz", hu, spacing)
    if grade:
        _save(folder / f"masks/{name}_mask.nii.gz", lesions, spacing)
    return {
        "name": name,
        "category": f"CT-{grade}",
        "affected": float(lesions.sum() / lungs.sum()),
        "lung": lungs.sum((1, 2)).tolist(),
        "lesion": lesions.sum((1, 2)).tolist(),
        "letter": letter,
        "letter_box": bounding_box(plane) if letter else None,
    }


def ill_body(body: Body, grade: int) -> Body:
    """A patient of category CT-`grade`. Lesions lie where COVID-19 likes to: at the lungs' border, behind and below."""
    u = shares(body.seed, body.name, "phantom disease", 2)
    (low, high), (fewest, most) = _AFFECTED[grade], _LESIONS[grade]
    count = fewest + int(u[1] * (most - fewest + 1))
    return body.with_disease(drawn_lesions(body, body.name, count), low + (high - low) * u[0])


def drawn_lesions(
    body: Body, name: str, count: int, kinds: Sequence[str] = ("ground glass", "consolidation")
) -> list[Lesion]:
    """Lesions of one of these kinds each, at places in the patient's lungs that are drawn by this name."""
    x, y, z = body.places.T
    border = (np.abs(x) / body.width) ** 2 + (y / body.depth) ** 2
    weights = np.cumsum(np.exp(3 * border + y / body.depth - z / body.height))
    draws = shares(body.seed, name, "phantom lesions", 3 * count).reshape(count, 3)
    places = body.places[np.searchsorted(weights, draws[:, 0] * weights[-1])]
    return [
        Lesion(kinds[int(kind * len(kinds))], (float(x), float(y), float(z)), 16 + 14 * float(radius))
        for (x, y, z), (_, kind, radius) in zip(places, draws, strict=True)
    ]


def _drawn(body: Body, size: int, spacing: float) -> Iterator[Block]:
    across = (np.arange(size) - (size - 1) / 2) * spacing
    heights = np.arange(-48, body.height + 28, _SPACING)
    for start in range(0, len(heights), _AT_ONCE):
        yield body.block(heights[start : start + _AT_ONCE], across, across)


def _scanned(recipe: Recipe, name: str, body: Body, hu: np.ndarray, spacing: float) -> np.ndarray:
    """The volume [Z, H, W] as a scanner gives it: on a table, blurred, noisy, and of one value outside its circle."""
    size = recipe.size
    u = shares(recipe.seed, name, "phantom scanner", 3)
    across = (np.arange(size) - (size - 1) / 2) * spacing
    y, x = across[:, None], across[None, :]
    top = body.depth + body.wall + body.fat + 12 - 9e-4 * x**2
    table = (np.abs(y - top) < 3) | (np.abs(y - top - 26) < 2)
    hu[:, table] = np.maximum(hu[:, table], -250)
    hu = ndimage.gaussian_filter(hu, (0, 0.45, 0.45))
    keys, deviation = sample_keys(recipe.seed, [name], "phantom noise"), 15 + 20 * u[0]
    for number in range(len(hu)):
        grain = normal(keys, number, (size, size))[0].numpy()
        hu[number] += deviation * 1.6 * ndimage.gaussian_filter(grain, 0.6)
    hu = np.clip(hu, -1024, 3071)
    circle = np.hypot(x, y) < across[-1] + spacing
    return np.where(circle, hu, _BACKGROUNDS[int(u[1] * 3)]).astype(np.float32)


def _save(path: Path, volume: np.ndarray, spacing: float) -> None:
    """A volume [Z, H, W] as the official files are: int16, from the patient's right, from the back, from the feet."""
    import nibabel

    stored = np.flip(np.rint(volume).astype(np.int16), 1).transpose(2, 1, 0)
    image = nibabel.Nifti1Image(stored, np.diag([-spacing, spacing, _SPACING, 1.0]))
    write_atomically(path, gzip.compress(image.to_bytes(), compresslevel=1, mtime=0))


def write_tables(folder: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """The official registry, and what is known of phantoms alone."""
    registry, slices, studies = [], [], []
    for record in records:
        name, category = record["name"], record["category"]
        mask = f"/masks/{name}_mask.nii.gz" if category != "CT-0" else ""
        registry.append([int(name.removeprefix("study_")), category, f"/studies/{category}/{name}.nii.gz", mask])
        studies.append([name, category, f"{record['affected']:.6f}"])
        slices += [[name, z, *pixels] for z, pixels in enumerate(zip(record["lung"], record["lesion"], strict=True))]
    header = ("study_id", "category", "study_file", "mask_file")
    write_table(folder / "dataset_registry.csv", header, registry, excel=True)
    write_table(folder / STUDIES, ("study", "category", "affected"), studies)
    write_table(folder / SLICES, ("study", "slice", "lung", "lesion"), slices)
    write_letters(folder, records)
