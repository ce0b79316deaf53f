"""What a study has finished: one small file a cell, which is read instead of computed when the study is run again.

    studies/<name>-<hash>/settings.json     what determines the cells
                          <cell>.json       coordinates and values, one atomic file a finished cell
                          finished.json     when all are there
    studies/shared/<name>.npz               what several cells need, such as the heatmaps of the train split

Nothing here needs torch: the report reads cells too.
"""

from __future__ import annotations

import dataclasses
import io
import json
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ibxai.shards import Shard
from ibxai.store import MetricKey, safe_name, write_atomically

if TYPE_CHECKING:
    from ibxai.types import Score

log = logging.getLogger(__name__)

Coordinates = Mapping[str, str | int | float]


@dataclass(frozen=True)
class Cell:
    """What a study found at one place. values: metric -> [N], one a row; totals: metric -> one number for the cell;
    intervals: metric -> low and high, of totals that have one.
    """

    coordinates: Coordinates
    row_ids: tuple[str, ...] = ()
    group_ids: tuple[str, ...] = ()
    values: Mapping[str, Sequence[float]] = field(default_factory=dict)
    totals: Mapping[str, float] = field(default_factory=dict)
    intervals: Mapping[str, tuple[float, float]] = field(default_factory=dict)

    def scores(self) -> Iterator[Score]:
        from ibxai.types import Score

        for metric, values in self.values.items():
            for row_id, group_id, value in zip(self.row_ids, self.group_ids, values, strict=True):
                yield Score(metric, value, self.coordinates, row_id, group_id)
        for metric, value in self.totals.items():
            yield Score(metric, value, self.coordinates)


class Cells:
    """The folder of one study. made: the cells that were computed through this object, and not read."""

    def __init__(self, folder: Path, key: MetricKey) -> None:
        self.folder, self.key, self.made = folder / key.folder, key, 0
        self._asked: list[Coordinates] = []
        self._shard: Shard | None = None

    @contextmanager
    def of_shard(self, shard: Shard) -> Iterator[None]:
        """Inside the block only the shard's cells are computed; others that are not there yet are empty."""
        self._shard = shard
        try:
            yield
        finally:
            self._shard, self._asked = None, []

    def get(self, coordinates: Coordinates, compute: Callable[[], Cell]) -> Cell:
        """The cell at these coordinates: read when it is finished, otherwise computed and kept."""
        place = len(self._asked)
        self._asked.append(coordinates)
        path = self.folder / (safe_name("_".join(f"{k}-{v}" for k, v in coordinates.items())) + ".json")
        cell = read_cell(path)
        if cell is None and self._shard is not None and not self._shard.has(place):
            return Cell(coordinates)
        if cell is None:
            log.info("%s: %s", self.key.name, ", ".join(f"{k} {v}" for k, v in coordinates.items()))
            cell = compute()
            self._describe()
            write_atomically(path, _json({"place": place + 1, **dataclasses.asdict(cell)}))
            self.made += 1
        return cell

    def kept(self, name: str, compute: Callable[[], np.ndarray]) -> np.ndarray:
        """An array that several cells need, of this study or another of the same run: read when it is there, otherwise
        computed and kept. name: says all that determines it, given the run.
        """
        path = self.folder.parent / "shared" / f"{name}.npz"
        try:
            with np.load(path, allow_pickle=False) as archive:
                return archive["values"]
        except FileNotFoundError:
            pass
        except Exception as error:  # damage surfaces as whatever its decoder stumbles on: BadZipFile, zlib.error
            log.warning("A kept file is damaged and made again: %s (%s)", path, error)
        values, buffer = compute(), io.BytesIO()
        np.savez_compressed(buffer, values=values)
        write_atomically(path, buffer.getvalue())
        return values

    @property
    def finished(self) -> bool:
        return (self.folder / "finished.json").exists()

    def finish(self) -> None:
        self._describe()
        write_atomically(self.folder / "finished.json", _json({"cells": self._asked}))

    def _describe(self) -> None:
        path = self.folder / "settings.json"
        if not path.exists():
            write_atomically(path, _json({"study": self.key.name, "settings": self.key.settings}))


def read_cell(path: Path) -> Cell | None:
    """A finished cell; None when it is not there, or damaged, and then it has to be made again."""
    try:
        told = json.loads(path.read_bytes())
        values = {name: [_number(v) for v in column] for name, column in told["values"].items()}
        totals = {name: _number(v) for name, v in told["totals"].items()}
        ends = {name: (_number(low), _number(high)) for name, (low, high) in told.get("intervals", {}).items()}
        rows = tuple(told["row_ids"]), tuple(told["group_ids"])
        if any(len(column) != len(rows[0]) for column in (*values.values(), rows[1])):
            raise ValueError("columns of different lengths")
        return Cell(told["coordinates"], *rows, values, totals, ends)
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        log.warning("A cell is damaged and made again: %s (%s)", path, error)
        return None


def _json(content: object) -> bytes:
    return json.dumps(_plain(content), ensure_ascii=True, separators=(",", ":"), allow_nan=False).encode()


def _plain(content: Any) -> Any:
    """JSON has no NaN and no infinity: undefined numbers are null."""
    if isinstance(content, Mapping):
        return {str(key): _plain(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_plain(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


def finished_cells(folder: Path) -> list[Cell]:
    """The cells of one study's folder, in the order in which the study asks for them."""
    found = []
    for path in folder.glob("*.json"):
        if path.name not in ("settings.json", "finished.json"):
            cell = read_cell(path)
            if cell is not None:
                found.append((json.loads(path.read_bytes()).get("place", 0), cell))
    return [cell for _, cell in sorted(found, key=lambda entry: entry[0])]


def studies_in(run_folder: Path) -> list[tuple[MetricKey, Path]]:
    """The studies of a run that have begun, by name: what determines each, and its folder."""
    found = []
    for path in sorted((run_folder / "studies").glob("*/settings.json")):
        try:
            told = json.loads(path.read_bytes())
            found.append((MetricKey(told["study"], told["settings"]), path.parent))
        except (ValueError, KeyError, TypeError) as error:
            log.warning("A study's settings are damaged, and it is left out: %s (%s)", path, error)
    return found
