"""`ibxai data phantom`: made studies in an official layout, with a truth that no real dataset has.

A phantom study is a function of (seed, its number, size, letters), so the same command makes the same studies (with the
same libraries, the same bytes), a killed one goes on behind its last study, and more are added to those that are there.
Every file is written whole or not at all; a study's record, its last file, says that it is finished, and the tables are
made from the records.

`phantom.json` marks the folder. Readers of real data refuse a folder that has it, and the phantoms' readers one that
has not: phantoms never stand in for patients in silence.

Letters, as technicians burn them into X-rays: with "leak" an L on what is ill and an R on what is healthy, so that a
network may learn the letters; with "random" by chance; letters.csv has their boxes, in pixels.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, get_args

import matplotlib
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from tqdm import tqdm

from ibxai.datasets.phantom_anatomy import shares
from ibxai.datasets.splits import PHANTOM
from ibxai.datasets.tables import read_table
from ibxai.errors import UserError
from ibxai.store import explained_os_errors, write_atomically

Kind = Literal["phantom_ct", "phantom_cxr"]
KINDS: tuple[str, ...] = get_args(Kind)
Letters = Literal["none", "leak", "random"]
LETTERS: tuple[str, ...] = get_args(Letters)
SIZES = (64, 1024)
LETTER_TABLE = "letters.csv"
_FONT = Path(matplotlib.get_data_path(), "fonts/ttf/DejaVuSans-Bold.ttf")  # inside the wheel, the same everywhere


@dataclass(frozen=True)
class Recipe:
    """What all studies of a folder are made by. size: pixels of a side. version: of the drawing."""

    kind: Kind
    seed: int
    size: int
    letters: Letters
    version: int = 1


def make_phantoms(recipe: Recipe, folder: Path, studies: int) -> int:
    """Write the studies 1 to `studies` that are not there yet, and the tables; returns how many were made now.

    Raises UserError when the folder holds something else, or phantoms of another recipe.
    """
    if studies < 1 or not SIZES[0] <= recipe.size <= SIZES[1]:
        raise UserError(
            f"--studies {studies} --size {recipe.size}: 1 or more, of {SIZES[0]} to {SIZES[1]} pixels, are expected."
        )
    maker: Any = import_module(f"ibxai.datasets.{recipe.kind}")
    maker.require()
    _begin(recipe, folder)
    records = folder / "records"
    missing = [number for number in range(1, studies + 1) if not (records / f"{number:05d}.json").is_file()]
    for number in tqdm(missing, unit="study", desc=recipe.kind, disable=None):
        record = maker.write_study(recipe, number, folder)
        write_atomically(records / f"{number:05d}.json", json.dumps(record).encode())
    maker.write_tables(folder, [json.loads(path.read_text()) for path in sorted(records.glob("*.json"))])
    return len(missing)


def _begin(recipe: Recipe, folder: Path) -> None:
    marker, wanted = folder / PHANTOM, json.dumps(asdict(recipe), indent=1)
    with explained_os_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        there = marker.read_text() if marker.is_file() else None
        others = [path.name for path in folder.iterdir() if there is None and not path.name.endswith(".tmp")]
    if others:
        raise UserError(f"{folder} holds {others[0]} and no phantoms: give a new or empty folder.")
    if there is None:
        write_atomically(marker, wanted.encode())
    elif there != wanted:
        settings = " ".join(there.split())[:200]
        raise UserError(
            f"{folder} holds phantoms made with other settings: {settings}.\nGive these, or another folder."
        )


def write_table(
    path: Path, header: Sequence[str], rows: Iterable[Sequence[object]], separator: str = ",", excel: bool = False
) -> None:
    """A CSV file. excel: with what Excel has left on official tables, a byte-order mark and Windows line ends."""
    text = io.StringIO()
    writer = csv.writer(text, delimiter=separator, lineterminator="\r\n" if excel else "\n")
    writer.writerow(header)
    writer.writerows(rows)
    write_atomically(path, text.getvalue().encode("utf-8-sig" if excel else "utf-8"))


def letter_for(recipe: Recipe, name: str, ill: bool) -> str:
    """ "L", "R", or "" for none."""
    if recipe.letters == "none":
        return ""
    left = ill if recipe.letters == "leak" else shares(recipe.seed, name, "phantom letter", 1)[0] > 0.5
    return "L" if left else "R"


def letter_plane(recipe: Recipe, name: str, letter: str) -> np.ndarray:
    """float32 [size, size] in 0..1: a letter in the upper corner of its side, as a technician would put it."""
    size = recipe.size
    page = Image.new("L", (size, size))
    if letter:
        u = shares(recipe.seed, name, "phantom letter place", 3)
        height = round(size * (0.06 + 0.03 * u[0]))
        across = size * (0.04 + 0.05 * u[1])
        place = (size - across, size * (0.04 + 0.06 * u[2])) if letter == "L" else (across, size * (0.04 + 0.06 * u[2]))
        font = ImageFont.truetype(str(_FONT), height)
        ImageDraw.Draw(page).text(place, letter, fill=255, font=font, anchor="rt" if letter == "L" else "lt")
    return np.asarray(page, dtype=np.float32) / 255


def bounding_box(plane: np.ndarray) -> tuple[int, int, int, int]:
    """x, y, width, height of what is not 0 in [H, W]."""
    rows, columns = np.flatnonzero(plane.any(1)), np.flatnonzero(plane.any(0))
    return int(columns[0]), int(rows[0]), int(np.ptp(columns)) + 1, int(np.ptp(rows)) + 1


def write_letters(folder: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """The letters' table of records with "name", "letter" and "letter_box"; none is written where there are none."""
    rows = [[record["name"], record["letter"], *record["letter_box"]] for record in records if record["letter"]]
    if rows:
        write_table(folder / LETTER_TABLE, ("name", "letter", "x", "y", "width", "height"), rows)


def read_letters(folder: Path) -> Mapping[str, tuple[int, int, int, int]]:
    """Name of a study -> the box of its letter."""
    path = folder / LETTER_TABLE
    rows = read_table(path, ("name", "x", "y", "width", "height")) if path.is_file() else ()
    return {row["name"]: (int(row["x"]), int(row["y"]), int(row["width"]), int(row["height"])) for row in rows}


def box_region(box: tuple[int, int, int, int], width: int, height: int) -> Tensor:
    """bool [1, height, width]"""
    x, y, across, down = box
    plane = torch.zeros(1, height, width, dtype=torch.bool)
    plane[:, y : y + down, x : x + across] = True
    return plane
