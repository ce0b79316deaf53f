"""The columns of a leaderboard's table: one metric in one setting, over the runs of the table, compared and marked.

A run that was scored on less than half of the rows of the widest one, or that is not finished, is shown and not
compared, so that a first try on three pictures takes nothing from the others. Which way is better is the metric's own
word; without it nothing is ranked or marked.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from ibxai.report.comparisons import Comparison, compare
from ibxai.report.runs import Run
from ibxai.report.tables import differing_settings
from ibxai.store import MetricKey

_LEAST_SHARED = 0.5  # of the rows of the widest run


@dataclass(frozen=True)
class Cell:
    """A run's line of one metric. mark: "best" (all others are shown to be worse), "tie" or "".

    compared: finished, and scored on enough of the rows that the others have. rank: the average rank, or NaN.
    """

    mean: float
    low: float
    high: float
    n: int
    undefined: int
    groups: int
    rows: str
    compared: bool = True
    mark: str = ""
    rank: float = math.nan

    @property
    def has_interval(self) -> bool:
        return math.isfinite(self.mean) and math.isfinite(self.low) and math.isfinite(self.high)


@dataclass(frozen=True)
class Column:
    """One value of a metric in one setting. cells: one a run of the table, None where the run lacks it.

    name: what the value is called, the metric's own name if it is its main value. variant: what sets its settings apart
    from another column's. places: the runs that are compared, by their position in the table; the comparison speaks of
    them in this order. labels: what each run calls the value, which may differ where it holds two settings.
    """

    name: str
    key: MetricKey
    variant: str
    better: str
    cells: list[Cell | None]
    labels: list[str | None]
    places: list[int]
    comparison: Comparison

    @property
    def is_main(self) -> bool:
        return self.name == self.key.name

    def has_mean(self, place: int) -> bool:
        cell = self.cells[place]
        return cell is not None and math.isfinite(cell.mean)

    @property
    def title(self) -> str:
        return f"{self.name} ({self.variant})" if self.variant else self.name

    @property
    def some_apart(self) -> bool:
        return any(cell is not None and not cell.compared for cell in self.cells)

    @property
    def usual_n(self) -> int:
        """How many rows most cells are a mean of."""
        counts = Counter(cell.n for cell in self.cells if cell is not None)
        return max(counts, key=lambda n: (counts[n], n))


def make_columns(runs: Sequence[Run]) -> list[Column]:
    """The values of these runs' metrics, by name; one metric in two settings makes two columns."""
    keys = {key.folder: key for run in runs for key in run.metrics}
    variants = differing_settings(keys.values())
    lines: dict[tuple[str, str, str], dict[int, tuple[str, Cell]]] = {}
    for place, run in enumerate(runs):
        for line in run.summary.to_dict("records"):
            # within a run, two settings of a metric carry their hash in the name; here the column tells them apart
            name = line["metric"].replace(f"-{line['settings']}", "")
            cell = Cell(*(line[part] for part in ("mean", "low", "high", "n", "undefined", "groups", "rows")))
            lines.setdefault((name, line["settings"], line["better"]), {})[place] = line["metric"], cell
    columns = []
    for (name, settings, better), cells in sorted(lines.items()):
        key = _key_of(name, settings, keys)
        columns.append(_column(name, key, variants.get(key.folder, ""), better, cells, runs))
    return columns


def _key_of(name: str, settings: str, keys: Mapping[str, MetricKey]) -> MetricKey:
    """The metric of a value: "box_hits" is of the metric "box_hits", or else of "box"."""
    parts = name.split("_")
    names = ("_".join(parts[:end]) for end in range(len(parts), 0, -1))
    found = next((f"{known}-{settings}" for known in names if f"{known}-{settings}" in keys), None)
    return keys[found] if found else MetricKey(name, {})


def _column(
    name: str,
    key: MetricKey,
    variant: str,
    better: str,
    cells: Mapping[int, tuple[str, Cell]],
    runs: Sequence[Run],
) -> Column:
    """One value with what is compared, ranked and marked."""
    values = {place: runs[place].values.get(label, {}) for place, (label, _) in cells.items()}
    places = _compared(values, {place: cell for place, (_, cell) in cells.items()}, runs)
    group_of = {row_id: runs[place].group_of[row_id] for place in places for row_id in values[place]}
    comparison = compare([values[place] for place in places], group_of, better)
    best = {places[method] for method in comparison.best_group()}
    ranks = comparison.ranks.average.tolist() if comparison.ranks else [math.nan] * len(places)
    rank_of = dict(zip(places, ranks, strict=True))
    judged: list[Cell | None] = [None] * len(runs)
    for place, (_, cell) in cells.items():
        mark = "" if place not in best else "tie" if len(best) > 1 else "best"
        judged[place] = replace(cell, compared=place in places, mark=mark, rank=rank_of.get(place, math.nan))
    labels = [cells[place][0] if place in cells else None for place in range(len(runs))]
    return Column(name, key, variant, better, judged, labels, places, comparison)


def _compared(values: Mapping[int, Mapping[str, float]], cells: Mapping[int, Cell], runs: Sequence[Run]) -> list[int]:
    """Finished runs with at least half of the rows of the widest; of equally wide ones the most shared set counts."""
    finished = [place for place in cells if runs[place].finished]
    if not finished:
        return []
    widest = _widest([cells[place] for place in finished])
    reference = values[next(place for place in finished if cells[place].rows == widest)].keys()
    least = _LEAST_SHARED * len(reference)
    return [place for place in finished if len(values[place].keys() & reference) >= least]


def _widest(cells: Sequence[Cell]) -> str:
    """The set of rows that most is known of: the largest, and of equals the one that most runs share."""
    shared = Counter(cell.rows for cell in cells)
    return max(cells, key=lambda cell: (cell.n + cell.undefined, shared[cell.rows], cell.rows)).rows
