"""All runs of an outputs folder side by side: leaderboard.csv, comparisons.csv and a page.

Runs are compared where that is fair: the same dataset, backbone, weights and target, the same setting of the metric,
both finished, on the samples they share (`columns.py`, `comparisons.py`). The largest mean is not crowned: the best
mean and every method that is not shown to be worse are marked as tied.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd

from ibxai.report.board_figures import BoardFigures, board_figures
from ibxai.report.board_studies import BoardStudy, board_studies
from ibxai.report.columns import Column, make_columns
from ibxai.report.render import render
from ibxai.report.runs import DamagedRun, Run, read_runs, run_labels
from ibxai.report.statistics import FEW_GROUPS
from ibxai.report.tables import csv_text
from ibxai.store import digest, write_atomically

LEADERBOARD_COLUMNS = [
    "dataset", "backbone", "method", "run", "metric", "mean", "low", "high", "n", "undefined", "skipped",
    "groups", "better", "settings", "rows", "weights", "finished", "target", "mark", "rank", "blocks",
]  # fmt: skip
COMPARISONS_COLUMNS = [
    "dataset", "backbone", "weights", "target", "metric", "settings", "better", "a", "b", "run_a", "run_b", "n",
    "left_out", "groups", "zeros", "difference", "low", "high", "p", "p_holm", "effect_size",
]  # fmt: skip


@dataclass(frozen=True)
class Table:
    """Runs that may be compared. names: one a run, the method's where that is enough."""

    dataset: str
    backbone: str
    weights: str
    target: str
    runs: list[Run]
    names: list[str]
    columns: list[Column]
    also_differ_in: list[str]

    @cached_property
    def figures(self) -> BoardFigures:
        return board_figures(self.names, [run.curves for run in self.runs], self.columns, self.runs[0].places)

    @cached_property
    def studies(self) -> list[BoardStudy]:
        return board_studies(self.names, [run.studies for run in self.runs])

    @property
    def rows(self) -> int:
        return len({row for run in self.runs for row in run.group_of})

    @property
    def fewest_groups(self) -> int:
        return min((cell.groups for column in self.columns for cell in column.cells if cell is not None), default=0)

    @property
    def fewer_groups(self) -> bool:
        """Whether a group has several rows somewhere."""
        return any(cell.groups < cell.n for column in self.columns for cell in column.cells if cell is not None)

    @property
    def rows_differ(self) -> bool:
        """Whether two compared runs have values for different rows."""
        return any(column.comparison.rows != column.comparison.whole_rows for column in self.columns)

    @property
    def cannot_differ(self) -> list[str]:
        """Metrics with a direction, in which no test could find a difference, however large it is."""
        compared = [column for column in self.columns if column.better and len(column.places) > 1]
        return [column.title for column in compared if not column.comparison.can_differ]


def write_leaderboard(outputs: Path) -> Path:
    """Make leaderboard.csv, comparisons.csv and report.html in an outputs folder from all runs below it; the page.

    A run that cannot be read is listed with the reason. Raises UserError when the folder refuses to be written.
    """
    outputs = Path(outputs)
    found = read_runs(outputs)
    runs = [run for run in found if isinstance(run, Run)]
    tables = make_tables(runs)
    write_atomically(outputs / "leaderboard.csv", csv_text(leaderboard_table(tables)).encode())
    write_atomically(outputs / "comparisons.csv", csv_text(comparisons_table(tables)).encode())
    context = {
        "tables": tables,
        "runs": runs,
        "few_groups": FEW_GROUPS,
        "unfinished": [run for run in runs if not run.finished],
        "unscored": [run for run in runs if not run.judged],
        "damaged": [run for run in found if isinstance(run, DamagedRun)],
    }
    page = outputs / "report.html"
    write_atomically(page, render("leaderboard.html", context))
    return page


def leaderboard_table(tables: Iterable[Table]) -> pd.DataFrame:
    """One line a run and metric, columns LEADERBOARD_COLUMNS. rank and blocks: NaN and 0 where nothing is ranked."""
    lines = []
    for table in tables:
        for place, run in enumerate(table.runs):
            told = {
                "dataset": run.dataset, "backbone": run.backbone, "method": run.method, "run": run.run_id,
                "skipped": run.skipped, "weights": run.weights, "finished": run.finished, "target": run.target,
            }  # fmt: skip
            cells = {column.labels[place]: (column, column.cells[place]) for column in table.columns}
            for line in run.summary.to_dict("records"):
                column, cell = cells[line["metric"]]
                ranks = column.comparison.ranks
                ranked = ranks is not None and cell is not None and math.isfinite(cell.rank)
                judged = {
                    "mark": cell.mark if cell else "",
                    "rank": cell.rank if cell else math.nan,
                    "blocks": ranks.blocks if ranked and ranks else 0,
                }
                lines.append({**{str(key): value for key, value in line.items()}, **told, **judged})
    return pd.DataFrame(lines, columns=LEADERBOARD_COLUMNS)


def comparisons_table(tables: Iterable[Table]) -> pd.DataFrame:
    """One line a pair of runs and metric: a minus b on the rows that both have. Columns: COMPARISONS_COLUMNS."""
    parts = [_pairs(table, column) for table in tables for column in table.columns if len(column.places) > 1]
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=COMPARISONS_COLUMNS)


def _pairs(table: Table, column: Column) -> pd.DataFrame:
    pairs = column.comparison.pairs.copy()
    places = np.array(column.places)
    for side in ("a", "b"):
        runs = places[pairs[side].to_numpy(dtype=int)]
        pairs[f"run_{side}"] = np.array([run.run_id for run in table.runs], dtype=object)[runs]
        pairs[side] = np.array(table.names, dtype=object)[runs]
    pairs["dataset"], pairs["backbone"], pairs["weights"] = table.dataset, table.backbone, table.weights
    pairs["target"], pairs["metric"], pairs["better"] = table.target, column.name, column.better
    pairs["settings"] = digest(column.key.settings)
    return pairs[COMPARISONS_COLUMNS]


def make_tables(runs: Iterable[Run]) -> list[Table]:
    grouped: dict[tuple[str, str, str, str], list[Run]] = {}
    for run in runs:
        if run.judged:
            grouped.setdefault((run.dataset, run.backbone, run.weights, run.target), []).append(run)
    return [
        Table(*names, alike, run_labels(alike), columns=make_columns(alike), also_differ_in=_also_differ_in(alike))
        for names, runs_of in sorted(grouped.items())
        for alike in _with_shared_rows(runs_of)
    ]


def _with_shared_rows(runs: Sequence[Run]) -> list[list[Run]]:
    """The runs in sets of which no two have a row in common: two folders of pictures under one dataset's name, say."""
    sets: list[tuple[list[Run], set[str]]] = []
    for run in runs:
        joined, rows = [run], set(run.group_of)
        for other, its in [one for one in sets if one[1] & rows]:
            joined, rows = other + joined, rows | its
            sets.remove((other, its))
        sets.append((joined, rows))
    return [joined for joined, _ in sets]


def _also_differ_in(runs: Sequence[Run]) -> list[str]:
    """What else, beside the method and what was fitted for it, was not the same in these runs."""
    names = dict.fromkeys(name for run in runs for name in run.identity)
    return [
        name
        for name in names
        if not name.startswith(("method", "fit"))
        # a key that a run does not have does not matter to it: methods without statistics have no reference split
        and len({json.dumps(r.identity[name], sort_keys=True, default=str) for r in runs if name in r.identity}) > 1
    ]
