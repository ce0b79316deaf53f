"""What the leaderboard reads of a run: who it is, its summary, its values row by row, and its mean curves.

The tables of a run are read where they are newer than its scores, and made again where they are not, so that a folder
of hundreds of runs is read in seconds.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pandas as pd

from ibxai.errors import UserError
from ibxai.report.curves import MeanCurve, read_curves, write_all_tables
from ibxai.report.studies import StudyResult, read_studies
from ibxai.report.tables import long_table, method_name, places_of, read_run_scores, read_summary, read_values
from ibxai.store import DamagedFile, MetricKey, Row, RunStore, find_runs

UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError, DamagedFile, UserError)  # of a run's folder
_LONGEST_DETAIL = 32  # characters of what tells two runs of a method apart; longer, the run's id says it


@dataclass(frozen=True)
class Run:
    """A run and what came of it. report: its page, relative to the outputs folder, or None.

    target: what its rows explain, "predicted" or class numbers. values: label of a value -> row id -> value, NaN where
    undefined. curves: label of a metric -> its mean curve. group_of: row id -> group, of all rows of the dataset.
    places: what its maps have values of, pixels or words.
    """

    dataset: str
    backbone: str
    method: str
    run_id: str
    weights: str
    target: str
    finished: bool
    skipped: int
    identity: Mapping[str, Any]
    metrics: list[MetricKey]
    summary: pd.DataFrame
    values: Mapping[str, Mapping[str, float]]
    curves: Mapping[str, MeanCurve]
    group_of: Mapping[str, str]
    places: str
    studies: list[StudyResult]
    report: str | None

    @property
    def judged(self) -> bool:
        """Whether there is anything to compare: scores, or a study."""
        return not self.summary.empty or bool(self.studies)


@dataclass(frozen=True)
class DamagedRun:
    path: str
    reason: str


def read_runs(outputs: Path) -> list[Run | DamagedRun]:
    """All runs below a folder, in the order of their paths; of those that cannot be read, the reason."""
    tables: dict[bytes, list[Row]] = {}
    return [_read_run(store, outputs, tables) for store in find_runs(outputs)]


def _read_run(store: RunStore, outputs: Path, tables: dict[bytes, list[Row]]) -> Run | DamagedRun:
    inside = store.path.relative_to(outputs)
    dataset, backbone, method, run_id = inside.parts
    try:
        told = store.provenance()
        rows = _rows(store, tables)
        summary, values, curves = _read_tables(store, rows)
        return Run(
            dataset=str(told.get("dataset") or dataset),
            backbone=str(told.get("backbone") or backbone),
            method=str(told.get("method") or method),
            run_id=run_id,
            weights=str(told.get("weights") or ""),
            target=", ".join(dict.fromkeys(row.target for row in rows)),
            finished=bool(told.get("finished")),
            skipped=len(store.skipped()),
            identity=dict(told.get("identity") or {}),
            metrics=store.metrics(),
            summary=summary,
            values=values,
            curves=curves,
            group_of={row.row_id: row.group_id for row in rows},
            places=places_of(store),
            studies=read_studies(store.path),
            report=quote((inside / "report.html").as_posix()) if (store.path / "report.html").exists() else None,
        )
    except UNREADABLE as error:
        return DamagedRun(inside.as_posix(), f"{type(error).__name__}: {error}")


def _rows(store: RunStore, tables: dict[bytes, list[Row]]) -> list[Row]:
    """The rows of the run's dataset. Runs on one dataset have the same table: it is parsed once."""
    content = (store.path / "samples.csv").read_bytes()
    if content not in tables:
        tables[content] = store.rows()
    return tables[content]


def _read_tables(
    store: RunStore, rows: Sequence[Row]
) -> tuple[pd.DataFrame, dict[str, dict[str, float]], Mapping[str, MeanCurve]]:
    """Summary, values and mean curves, from the run's tables where they are fresh, else from its scores."""
    summary, lines, curves = read_summary(store), read_values(store), read_curves(store)
    row_ids = {(row.sample_id, row.target): row.row_id for row in rows}
    if summary is not None and lines is not None and (curves is not None or not summary["curves"].any()):
        values = _by_label(lines, row_ids)
        if values is not None:
            return summary, values, curves or {}
    scores = read_run_scores(store)
    summary, curves = write_all_tables(store, scores)
    return summary, _by_label(long_table(scores, rows, method_name(store)), row_ids) or {}, curves


def _by_label(lines: pd.DataFrame, row_ids: Mapping[tuple[str, str], str]) -> dict[str, dict[str, float]] | None:
    """metrics.csv as label -> row id -> value; None where it names a row that the run does not have."""
    try:
        named = [row_ids[pair] for pair in zip(lines["sample"], lines["target"], strict=True)]
    except KeyError:
        return None
    return {
        str(label): dict(part.itertuples(index=False, name=None))
        for label, part in lines.assign(row=named).groupby("metric")[["row", "value"]]
    }


def run_labels(runs: Sequence[Run]) -> list[str]:
    """A name for every run of a table: its method, and where a method comes more than once, what sets the run apart."""
    often = Counter(run.method for run in runs)
    labels = [
        run.method
        if often[run.method] == 1
        else f"{run.method} ({_detail(run, [r for r in runs if r.method == run.method])})"
        for run in runs
    ]
    twice = Counter(labels)
    return [
        label if twice[label] == 1 else f"{run.method} ({run.run_id})" for label, run in zip(labels, runs, strict=True)
    ]


def _detail(run: Run, alike: Iterable[Run]) -> str:
    """ "beta = 5, seed = 1": the settings in which this run differs from others of its method; where that is long their
    values alone, "direct, mask"; or its id."""
    others = [_settings(other) for other in alike]
    differing = {
        name: value.strip('"')
        for name, value in _settings(run).items()
        if any(other.get(name) != value for other in others)
    }
    for text in (", ".join(f"{name} = {value}" for name, value in differing.items()), ", ".join(differing.values())):
        if 0 < len(text) <= _LONGEST_DETAIL:
            return text
    return run.run_id


def _settings(run: Run) -> dict[str, str]:
    method = run.identity.get("method")
    settings = {**method} if isinstance(method, Mapping) else {}
    settings["seed"] = run.identity.get("seed")
    attack = run.identity.get("attack")
    settings["attack"] = attack["class"].rpartition(".")[2] if attack else "none"
    return {str(name): json.dumps(value, default=str) for name, value in settings.items() if value is not None}
