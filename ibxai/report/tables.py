"""Two tables of a run, made from its score files and always able to be made again (a third, of curves: `curves.py`).

metrics.csv, long:  sample, target, method, metric, value; rows in dataset order, then by metric.
summary.csv:        one line a metric: the mean, its 95 % bootstrap interval over groups, and what it is a mean of.

How a value is called: a metric's main value (stored as "auc" or "value") goes by the metric's name, any other by
"<metric>_<value>". Where a run holds one metric with two different settings, both are called by the names of their
score folders, "<metric>-<hash of the settings>", so that one name never means two things.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pandas as pd

from ibxai.report.charts import common_curve
from ibxai.report.statistics import defined, mean_intervals
from ibxai.store import MetricKey, Row, RunStore, digest

METRICS_COLUMNS = ["sample", "target", "method", "metric", "value"]
SUMMARY_COLUMNS = [
    "method", "metric", "mean", "low", "high", "n", "undefined", "groups", "better", "settings", "rows", "curves",
]  # fmt: skip
_TEXT_COLUMNS = ("method", "metric", "better", "settings", "rows")
_MAIN_VALUES = ("auc", "value")
CURVE, FRACTION = "curve", "fraction"  # a metric's curve, and its abscissa


@dataclass(frozen=True)
class MetricScores:
    """One metric of a run, read once. label: what it is called in tables and pages.

    rows: the scored rows, in dataset order. values: name -> [N], NaN where a row lacks it. curves: name -> one
    array [S] a row, or None (S may differ between rows). places: what a map has values of, pixels or words.
    """

    key: MetricKey
    label: str
    rows: list[Row]
    values: dict[str, np.ndarray]
    curves: dict[str, list[np.ndarray | None]]
    places: str = "pixels"

    @cached_property
    def place(self) -> dict[str, int]:
        """row id -> position in `rows`, and in every list of values and curves."""
        return {row.row_id: number for number, row in enumerate(self.rows)}

    def value_label(self, name: str) -> str:
        return self.label if name in _MAIN_VALUES else f"{self.label}_{name}"

    @property
    def main_value(self) -> str | None:
        return next((name for name in _MAIN_VALUES if name in self.values), None)

    @property
    def curve_rows(self) -> int:
        """How many rows have a curve to draw: "curve" over "fraction"."""
        if not {CURVE, FRACTION} <= self.curves.keys():
            return 0
        return len(common_curve(self.curves[FRACTION], self.curves[CURVE])[2])

    def better(self, name: str) -> str:
        """ "higher", "lower" or "" (not known). The metric's word is about its main value, if it has one."""
        higher = self.key.settings.get("higher_is_better")
        if not isinstance(higher, bool) or self.main_value not in (None, name):
            return ""
        return "higher" if higher else "lower"


def method_name(store: RunStore) -> str:
    return str(store.provenance().get("method") or store.path.resolve().parent.name)


def read_run_scores(store: RunStore) -> list[MetricScores]:
    """All scores of a run, metric by metric. Scores of rows that the dataset does not list are left out."""
    rows, keys = store.rows(), store.metrics()
    often = Counter(key.name for key in keys)
    return [_read_metric(store, key, key.name if often[key.name] == 1 else key.folder, rows) for key in keys]


def _read_metric(store: RunStore, key: MetricKey, label: str, rows: Sequence[Row]) -> MetricScores:
    scores = store.read_scores(key)
    scored = [row for row in rows if row.row_id in scores]
    entries = [scores[row.row_id] for row in scored]
    names = sorted({(name, np.ndim(entry[name]) > 0) for entry in entries for name in entry})
    values = {n: np.array([float(e.get(n, np.nan)) for e in entries]) for n, is_curve in names if not is_curve}
    return MetricScores(
        key=key,
        label=label,
        rows=scored,
        values=values,
        curves={n: [e.get(n) for e in entries] for n, is_curve in names if is_curve},
        places=places_of(store),
    )


def places_of(store: RunStore) -> str:
    """What the maps of a run have values of."""
    return "words" if store.holds_texts() else "pixels"


def metrics_table(store: RunStore) -> pd.DataFrame:
    """Long: sample, target, method, metric, value, a line a row and metric. Undefined values stay in, as NaN."""
    return long_table(read_run_scores(store), store.rows(), method_name(store))


def long_table(scores: Sequence[MetricScores], rows: Sequence[Row], method: str) -> pd.DataFrame:
    """`metrics_table` of scores that have been read already."""
    place = {row.row_id: number for number, row in enumerate(rows)}
    lines = [
        (place[row.row_id], row.sample_id, row.target, method, label, value)
        for metric, name, label in _columns(scores)
        for row, value in zip(metric.rows, metric.values[name], strict=True)
    ]
    table = pd.DataFrame(lines, columns=["place", *METRICS_COLUMNS])
    return table.sort_values(["place", "metric"], kind="stable", ignore_index=True)[METRICS_COLUMNS]


def summary_table(store: RunStore) -> pd.DataFrame:
    """One line a metric, by name. Columns: SUMMARY_COLUMNS.

    n rows in `groups` groups make the mean; `undefined` more were scored without a finite value and are left out.
    low, high: 95 % bootstrap interval over groups, NaN with a single group. better: "higher", "lower" or "".
    settings: hash of the metric's settings. rows: hash of the scored rows' ids (equal = the same rows). curves: how
    many rows have a curve with a defined value, of which curves.csv holds the mean.
    """
    return summarise(read_run_scores(store), store.rows(), method_name(store))


def summarise(scores: Sequence[MetricScores], rows: Sequence[Row], method: str) -> pd.DataFrame:
    """`summary_table` of scores that have been read already."""
    columns = sorted(_columns(scores), key=lambda column: column[2])
    if not columns:
        return pd.DataFrame(columns=SUMMARY_COLUMNS)
    place = {row.row_id: number for number, row in enumerate(rows)}
    values = np.full((len(rows), len(columns)), np.nan)
    for number, (metric, name, _) in enumerate(columns):
        values[[place[row.row_id] for row in metric.rows], number] = metric.values[name]
    low, high = mean_intervals(values, [row.group_id for row in rows])
    row_sets = {metric.label: digest(sorted(row.row_id for row in metric.rows)) for metric in scores}

    lines = []
    for number, (metric, name, label) in enumerate(columns):
        counted = defined(values[:, number])
        lines.append(
            {
                "method": method,
                "metric": label,
                "mean": values[counted, number].mean() if counted.any() else np.nan,
                "low": low[number],
                "high": high[number],
                "n": int(counted.sum()),
                "undefined": len(metric.rows) - int(counted.sum()),
                "groups": len({row.group_id for row, counts in zip(rows, counted, strict=True) if counts}),
                "better": metric.better(name),
                "settings": digest(metric.key.settings),
                "rows": row_sets[metric.label],
                "curves": metric.curve_rows if name == metric.main_value else 0,
            }
        )
    return pd.DataFrame(lines, columns=SUMMARY_COLUMNS)


def _columns(scores: Sequence[MetricScores]) -> Iterator[tuple[MetricScores, str, str]]:
    """Every value of every metric: the metric, the value's name in it, its label."""
    for metric in scores:
        for name in metric.values:
            yield metric, name, metric.value_label(name)


def differing_settings(keys: Iterable[MetricKey]) -> dict[str, str]:
    """Score folder -> "steps = 50, baseline = blur": what sets apart metrics of one name; others are left out."""
    named: dict[str, list[MetricKey]] = {}
    for key in {key.folder: key for key in keys}.values():
        named.setdefault(key.name, []).append(key)
    return {
        key.folder: ", ".join(
            f"{n} = {v}"
            for n, v in key.settings.items()
            if any(n not in o.settings or o.settings[n] != v for o in alike)
        )
        for alike in named.values()
        if len(alike) > 1
        for key in alike
    }


def write_tables(store: RunStore, scores: Sequence[MetricScores]) -> pd.DataFrame:
    """Make metrics.csv and summary.csv of a run from its scores; returns the summary."""
    rows, method = store.rows(), method_name(store)
    write_table(store, "metrics.csv", long_table(scores, rows, method))
    summary = summarise(scores, rows, method)
    write_table(store, "summary.csv", summary)
    return summary


def write_table(store: RunStore, name: str, table: pd.DataFrame) -> None:
    store.write_text(name, csv_text(table))


def csv_text(table: pd.DataFrame) -> str:
    """Full precision; an undefined number is written "nan", so that it cannot be taken for a missing one."""
    return table.to_csv(index=False, na_rep="nan", lineterminator="\n")


def read_summary(store: RunStore) -> pd.DataFrame | None:
    """summary.csv where it is there, whole and newer than every score; None: make it again."""
    try:
        if (store.path / "summary.csv").stat().st_mtime_ns <= _newest_score(store):
            return None
    except OSError:
        return None
    return read_csv(store, "summary.csv", SUMMARY_COLUMNS, _TEXT_COLUMNS, ("mean", "low", "high"))


def read_values(store: RunStore) -> pd.DataFrame | None:
    """metrics.csv as it was written beside a fresh summary.csv, or None: make it again."""
    return read_csv(store, "metrics.csv", METRICS_COLUMNS, METRICS_COLUMNS[:-1], ("value",))


def read_csv(
    store: RunStore, name: str, columns: Sequence[str], text: Sequence[str], exact: Sequence[str]
) -> pd.DataFrame | None:
    """A table of a run that was written with `csv_text`; None where it is absent or another one."""
    try:
        # a method may be called "NA", and a hash may look like a number: text stays text
        table = pd.read_csv(
            store.path / name,
            dtype=dict.fromkeys(text, str),
            keep_default_na=False,
            converters=dict.fromkeys(exact, float),  # Python's own: exact
            encoding_errors="surrogateescape",
        )
    except (OSError, ValueError):
        return None
    return table if list(table.columns) == list(columns) else None


def _newest_score(store: RunStore) -> int:
    """Time of the last change below scores/, in ns. Folders count too: their time tells of a removed file."""
    folder = store.path / "scores"
    return max((path.stat().st_mtime_ns for path in [folder, *folder.glob("**/*")] if path.exists()), default=0)
