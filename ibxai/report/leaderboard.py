"""All runs of an outputs folder side by side: leaderboard.csv and a page with a table per dataset and backbone.

Runs are compared where that is fair: the same dataset, backbone and weights, the same setting of the metric, the same
scored rows, and both finished. There, the best mean is not crowned alone: every method whose 95 % interval overlaps
the best one's is marked as tied with it. Which way is better is the metric's own word; without it nothing is marked.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pandas as pd

from ibxai.errors import UserError
from ibxai.report.render import render
from ibxai.report.tables import csv_text, differing_settings, read_run_scores, read_summary, write_tables
from ibxai.store import DamagedFile, MetricKey, RunStore, find_runs, write_atomically

LEADERBOARD_COLUMNS = [
    "dataset", "backbone", "method", "run", "metric", "mean", "low", "high", "n", "undefined", "skipped",
    "groups", "better", "settings", "rows", "weights", "finished",
]  # fmt: skip


@dataclass(frozen=True)
class Run:
    """What the leaderboard knows of a run. report: its page, relative to the outputs folder, or None."""

    dataset: str
    backbone: str
    method: str
    run_id: str
    weights: str
    finished: bool
    skipped: int
    identity: Mapping[str, Any]
    metrics: list[MetricKey]
    summary: pd.DataFrame
    report: str | None


@dataclass(frozen=True)
class DamagedRun:
    path: str
    reason: str


@dataclass(frozen=True)
class Cell:
    """A run's line of one metric. mark: "best", "tie" or "". same_rows: scored on the rows that are compared."""

    mean: float
    low: float
    high: float
    n: int
    undefined: int
    rows: str
    same_rows: bool = True
    mark: str = ""

    @property
    def has_interval(self) -> bool:
        return math.isfinite(self.mean) and math.isfinite(self.low) and math.isfinite(self.high)


@dataclass(frozen=True)
class Column:
    """One metric in one setting. cells: one a run of the table, None where the run lacks it."""

    name: str
    variant: str
    better: str
    cells: list[Cell | None]

    @property
    def sizes_differ(self) -> bool:
        return any(cell is not None and not cell.same_rows for cell in self.cells)


@dataclass(frozen=True)
class Table:
    dataset: str
    backbone: str
    weights: str
    runs: list[Run]
    columns: list[Column]
    also_differ_in: list[str]


def write_leaderboard(outputs: Path) -> Path:
    """Make leaderboard.csv and report.html in an outputs folder from all runs below it; returns the page.

    A run that cannot be read is listed with the reason. Raises UserError when the folder refuses to be written.
    """
    outputs = Path(outputs)
    found = [_read_run(store, outputs) for store in find_runs(outputs)]
    runs = [run for run in found if isinstance(run, Run)]
    write_atomically(outputs / "leaderboard.csv", csv_text(leaderboard_table(runs)).encode())
    context = {
        "tables": _tables(runs),
        "runs": runs,
        "unfinished": [run for run in runs if not run.finished],
        "unscored": [run for run in runs if run.summary.empty],
        "damaged": [run for run in found if isinstance(run, DamagedRun)],
    }
    page = outputs / "report.html"
    write_atomically(page, render("leaderboard.html", context))
    return page


def leaderboard_table(runs: Iterable[Run]) -> pd.DataFrame:
    """One line a run and metric, in the order of the runs' folders. Columns: LEADERBOARD_COLUMNS."""
    parts = [
        run.summary.assign(
            dataset=run.dataset,
            backbone=run.backbone,
            method=run.method,
            run=run.run_id,
            skipped=run.skipped,
            weights=run.weights,
            finished=run.finished,
        )
        for run in runs
        if not run.summary.empty
    ]
    return (
        pd.concat(parts, ignore_index=True)[LEADERBOARD_COLUMNS] if parts else pd.DataFrame(columns=LEADERBOARD_COLUMNS)
    )


def _read_run(store: RunStore, outputs: Path) -> Run | DamagedRun:
    inside = store.path.relative_to(outputs)
    dataset, backbone, method, run_id = inside.parts
    try:
        told = store.provenance()
        summary = read_summary(store)
        if summary is None:
            summary = write_tables(store, read_run_scores(store))
        return Run(
            dataset=str(told.get("dataset") or dataset),
            backbone=str(told.get("backbone") or backbone),
            method=str(told.get("method") or method),
            run_id=run_id,
            weights=str(told.get("weights") or ""),
            finished=bool(told.get("finished")),
            skipped=len(store.skipped()),
            identity=dict(told.get("identity") or {}),
            metrics=store.metrics(),
            summary=summary,
            report=quote((inside / "report.html").as_posix()) if (store.path / "report.html").exists() else None,
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, DamagedFile, UserError) as error:
        return DamagedRun(inside.as_posix(), f"{type(error).__name__}: {error}")


def _tables(runs: Iterable[Run]) -> list[Table]:
    grouped: dict[tuple[str, str, str], list[Run]] = {}
    for run in runs:
        if not run.summary.empty:
            grouped.setdefault((run.dataset, run.backbone, run.weights), []).append(run)
    return [
        Table(*names, runs=alike, columns=_columns(alike), also_differ_in=_also_differ_in(alike))
        for names, alike in sorted(grouped.items())
    ]


def _columns(runs: Sequence[Run]) -> list[Column]:
    """The metrics of these runs, by name; one metric in two settings makes two columns."""
    variants = differing_settings(key for run in runs for key in run.metrics)
    lines: dict[tuple[str, str, str], dict[int, Cell]] = {}
    for place, run in enumerate(runs):
        for line in run.summary.to_dict("records"):
            # within a run, two settings of a metric carry their hash in the name; here the column tells them apart
            name = line["metric"].replace(f"-{line['settings']}", "")
            cell = Cell(*(line[part] for part in ("mean", "low", "high", "n", "undefined", "rows")))
            lines.setdefault((name, line["settings"], line["better"]), {})[place] = cell
    folders = {folder.rsplit("-", 1)[1]: text for folder, text in variants.items()}
    return [
        Column(name, folders.get(settings, ""), better, _marked(cells, runs, better))
        for (name, settings, better), cells in sorted(lines.items())
    ]


def _marked(cells: Mapping[int, Cell], runs: Sequence[Run], better: str) -> list[Cell | None]:
    """The cells in the order of the runs, with what is not compared and what is best or tied marked."""
    compared = _compared_rows([cell for place, cell in cells.items() if runs[place].finished] or list(cells.values()))
    told = {place: replace(cell, same_rows=cell.rows == compared) for place, cell in cells.items()}
    rivals = {p: c for p, c in told.items() if c.same_rows and c.has_interval and runs[p].finished}
    if better and len(rivals) > 1:
        best = (max if better == "higher" else min)(rivals.values(), key=lambda cell: cell.mean)
        level = [p for p, cell in rivals.items() if cell.low <= best.high and best.low <= cell.high]
        for place in level:
            told[place] = replace(told[place], mark="tie" if len(level) > 1 else "best")
    return [told.get(place) for place in range(len(runs))]


def _compared_rows(cells: Sequence[Cell]) -> str:
    """The set of rows that most is known of: the largest, and of equals the one that most runs share."""
    shared = Counter(cell.rows for cell in cells)
    return max(cells, key=lambda cell: (cell.n + cell.undefined, shared[cell.rows], cell.rows)).rows


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
