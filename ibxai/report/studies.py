"""What the studies of a run found: studies.csv, and a section of the run's page with a chart a study.

studies.csv, long:  study, one column a coordinate (fraction, estimator, repeat, order, step, layer, labels), metric,
value, low, high, n, undefined, sign, settings; a line a cell and metric. value is the mean over the n rows that have
one, low and high its 95 % bootstrap interval over groups; a metric of the whole cell has no n. `undefined` rows had
none. sign is what was made of signed maps, settings the hash that names the study's folder. A study that has not come
to its end shows the cells that it has.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from markupsafe import Markup

from ibxai.cells import Cell, finished_cells, studies_in
from ibxai.report.charts import Axis, Line, line_chart, value_axis
from ibxai.report.render import count, number
from ibxai.report.statistics import defined, mean_intervals
from ibxai.report.tables import differing_settings, write_table
from ibxai.store import MetricKey, RunStore

COLUMNS = ["metric", "value", "low", "high", "n", "undefined", "sign", "settings"]
CONTROL, WHOLE = "random_control", "untouched"  # as ROAR names its estimators
GRADES = "CT-"  # as severity names the studies of one grade
_REPEAT = "repeat"
_TITLES = {
    "roar": "ROAR: accuracy after training again without the pixels that the map puts first",
    "roar_keep": "ROAR, keep variant: accuracy after training again on the pixels that the map puts first",
    "parameter_randomization": "Parameter randomisation: similarity to the original map",
    "label_randomization": "Label randomisation: similarity to the original map",
    "severity": "Severity: grades CT-0 to CT-4 from the share of the lung that is hot",
    "reveal": "Reveal: what the network says when one region alone is shown",
}
_NOTES = {
    "roar": "A method is good when its line falls below the random control's: the network misses what was taken out.",
    "roar_keep": "A method is good when its line lies above the random control's: what was kept is what is needed.",
    "parameter_randomization": "The map should change: a line that stays near 1 while layers forget what they learnt "
    "is that of a map which does not depend on them. Step 0 is the method's own noise.",
    "label_randomization": "The map of a network that was taught random labels should be less alike than that of "
    '"true", another network that was taught the true ones.',
    "severity": "A method is good when the share rises with the grade and is small at CT-0, where all heat is false. "
    "The threshold, and heat a pixel, are in the map's unit.",
    "reveal": "A region that should not matter, such as burned-in letters, gives itself away when showing it alone "
    "brings the class back.",
}


@dataclass(frozen=True)
class Entry:
    style: int
    label: str


@dataclass(frozen=True)
class StudyChart:
    title: str
    svg: Markup
    legend: list[Entry]
    note: str


@dataclass(frozen=True)
class StudySection:
    """One study on the page. variant: what sets it apart from another of the same name, and its rows.

    lines: a row of texts a place, coordinates first, under `header`.
    """

    title: str
    variant: str
    finished: bool
    note: str
    charts: list[StudyChart]
    header: list[str]
    lines: list[list[str]]


@dataclass(frozen=True)
class StudyResult:
    """What a study of a run has found so far. table: columns as in studies.csv."""

    key: MetricKey
    table: pd.DataFrame
    finished: bool

    @property
    def title(self) -> str:
        return _TITLES.get(self.key.name, self.key.name.replace("_", " "))

    @property
    def note(self) -> str:
        return _NOTES.get(self.key.name, "")

    @property
    def places(self) -> list[str]:
        """The coordinates, without the repeats."""
        return [str(name) for name in self.table.columns if name not in ("study", *COLUMNS, _REPEAT)]

    @property
    def rows(self) -> int:
        """How many rows a cell is about; 0 where it is about the whole split."""
        return int((self.table["n"] + self.table["undefined"]).max()) if self.table["n"].notna().any() else 0


def read_studies(run_folder: Path) -> list[StudyResult]:
    """The studies of a run that have at least one cell."""
    found = []
    for key, folder in studies_in(run_folder):
        cells = [cell for cell in finished_cells(folder) if cell.values or cell.totals]
        if cells:
            found.append(StudyResult(key, _table(key, cells), (folder / "finished.json").exists()))
    return found


def study_sections(store: RunStore) -> list[StudySection]:
    """The studies of a run, for its page; writes studies.csv where there are any."""
    results = read_studies(store.path)
    variants = differing_variants([result.key for result in results])
    if results:
        whole = pd.concat([result.table for result in results], ignore_index=True)
        places = [str(name) for name in whole.columns if name not in ("study", *COLUMNS)]
        # a whole number would become 1.0 beside a study that has no such coordinate
        whole[places] = whole[places].map(lambda part: "" if pd.isna(part) else _plain(part))
        write_table(store, "studies.csv", whole[["study", *places, *COLUMNS]])
    return [_section(result, variants[result.key.folder]) for result in results]


def _table(key: MetricKey, cells: Sequence[Cell]) -> pd.DataFrame:
    """studies.csv of one study."""
    lines = []
    intervals = _intervals(cells)
    for place, cell in enumerate(cells):
        common = {"study": key.name, **cell.coordinates, "sign": key.settings.get("sign", "")}
        common["settings"] = key.folder.rpartition("-")[2]
        for metric, values in cell.values.items():
            known = np.array(values)[defined(np.array(values))]
            low, high = intervals[place, metric]
            found = {"value": known.mean() if len(known) else np.nan, "low": low, "high": high}
            lines.append({**common, "metric": metric, **found, "n": len(known), "undefined": len(values) - len(known)})
        for metric, value in cell.totals.items():
            low, high = cell.intervals.get(metric, (np.nan, np.nan))
            lines.append({**common, "metric": metric, "value": value, "low": low, "high": high})
    table = pd.DataFrame(lines)
    return table.reindex(columns=[*(c for c in table.columns if c not in COLUMNS), *COLUMNS]).astype(
        {"n": "Int64", "undefined": "Int64"}
    )


def _intervals(cells: Sequence[Cell]) -> dict[tuple[int, str], tuple[float, float]]:
    """(place of the cell, metric) -> low, high. Cells of the same rows are resampled together."""
    of_rows: dict[tuple[str, ...], list[int]] = {}
    for place, cell in enumerate(cells):
        of_rows.setdefault(cell.row_ids, []).append(place)
    found: dict[tuple[int, str], tuple[float, float]] = {}
    for places in of_rows.values():
        columns = [(place, metric) for place in places for metric in cells[place].values]
        if columns:
            values = np.array([cells[place].values[metric] for place, metric in columns], dtype=float).T
            low, high = mean_intervals(values, cells[places[0]].group_ids)
            found |= {column: (float(low[i]), float(high[i])) for i, column in enumerate(columns)}
    return found


def differing_variants(keys: Sequence[MetricKey]) -> dict[str, str]:
    """Folder -> what sets apart studies of one name; the digests of their pictures would tell a reader nothing."""
    digests = ("samples", "train", "annotations")
    told = {
        key.folder: MetricKey(key.name, {k: v for k, v in key.settings.items() if k not in digests}) for key in keys
    }
    differing = differing_settings(told.values())
    return {folder: differing.get(reduced.folder, "") for folder, reduced in told.items()}


def _section(result: StudyResult, variant: str) -> StudySection:
    places, rows = result.places, result.rows
    metrics = list(dict.fromkeys(result.table["metric"]))
    pooled = over_repeats(result)
    kept = {name: [entry for entry in pooled if entry["metric"] == name] for name in metrics}
    charts = _charts(kept, places)
    lines = []
    for place in dict.fromkeys(tuple(entry[name] for name in places) for entry in pooled):
        at = {e["metric"]: e for e in pooled if tuple(e[name] for name in places) == place}
        lines.append(
            [_plain(part).replace("_", " ") for part in place] + [_shown(at.get(metric)) for metric in metrics]
        )
    return StudySection(
        title=result.title,
        finished=result.finished,
        variant=", ".join(part for part in (variant, count(rows, "row") if rows else "") if part),
        note=result.note,
        charts=charts,
        header=[*places, *(metric.replace("_", " ") for metric in metrics)],
        lines=lines,
    )


def over_repeats(result: StudyResult) -> list[dict[str, Any]]:
    """A line a place and metric. With repeats: their mean, and the lowest and highest instead of an interval."""
    table, places = result.table, result.places
    if _REPEAT not in table.columns:
        return [{str(k): v for k, v in line.items()} for line in table.to_dict("records")]
    found = []
    for at, part in table.groupby([*places, "metric"], sort=False):
        values = part["value"].to_numpy(dtype=float)
        edges = (values.min(), values.max()) if len(values) > 1 else (np.nan, np.nan)
        named = dict(zip([*places, "metric"], at, strict=True))
        found.append({**named, "value": values.mean(), "low": edges[0], "high": edges[1]})
    return found


def _charts(kept: Mapping[str, Sequence[Mapping[str, Any]]], places: Sequence[str]) -> list[StudyChart]:
    """A study with other coordinates has its table alone."""
    if "fraction" in places:
        return _fraction_charts(kept)
    if "studies" in places:
        return _grade_charts(kept)
    return _step_charts(kept) if {"step", "labels"} & set(places) else []


def of_grades(entries: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The entries of severity that are about one true grade, with the grade as their abscissa."""
    return [
        {**entry, "fraction": int(entry["studies"].removeprefix(GRADES))}
        for entry in entries
        if entry["studies"].startswith(GRADES)
    ]


def grade_ticks(points: Iterable[Mapping[str, Any]]) -> dict[float, str]:
    return {float(point["fraction"]): point["studies"] for point in points}


def _grade_charts(kept: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[StudyChart]:
    """The share of the lung that is hot, by true grade."""
    points = of_grades(kept.get("hot_share", []))
    if not points:
        return []
    x_axis, line = step_axis(grade_ticks(points)), study_line(points, 0)
    svg = line_chart([line], "Hot share of the lung by grade", 420, 270, "true grade", "hot share", x_axis=x_axis)
    notes = ["Mean over the studies; bands are 95 % bootstrap intervals."]
    for metric in ("accuracy", "quadratic_kappa"):
        graded = "; ".join(f"{entry['grading']} {_shown(entry)}" for entry in kept.get(metric, []))
        notes.append(f"{metric.replace('_', ' ').capitalize()}: {graded}.")
    return [StudyChart("Hot share of the lung", svg, [], " ".join(notes))]


def _fraction_charts(kept: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[StudyChart]:
    """Accuracy over the fraction of the pixels, a line an estimator; whole pictures belong to every line."""
    entries = kept.get("accuracy", [])
    whole = [entry for entry in entries if entry["estimator"] == WHOLE]
    names = list(dict.fromkeys(e["estimator"] for e in entries if e["estimator"] != WHOLE))
    lines = [
        study_line(
            sorted([*whole, *(e for e in entries if e["estimator"] == name)], key=lambda e: e["fraction"]), style
        )
        for style, name in enumerate(names)
    ]
    if not lines:
        return []
    svg = line_chart(lines, "Accuracy by fraction of the pixels", 420, 270, "fraction of the pixels", "accuracy")
    legend = [Entry(style, name.replace("_", " ")) for style, name in enumerate(names)]
    note = "Accuracy on the test split, mean over the trainings; bands from the lowest to the highest of them."
    return [StudyChart("Accuracy on the test split", svg, legend, note)]


def _step_charts(kept: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[StudyChart]:
    """Similarity by step, a line a metric, a chart an order; or by the only coordinate, where there is but one."""
    metrics = [name for name, entries in kept.items() if not all(pd.isna(e.get("n")) for e in entries)]
    orders = list(dict.fromkeys(e.get("order", "") for name in metrics for e in kept[name]))
    drawn: dict[str, list[Line]] = {}
    ticks: dict[str, dict[float, str]] = {}
    for order in orders:
        of_order = [[e for e in kept[name] if e.get("order", "") == order] for name in metrics]
        ticks[order] = {float(e.get("step", i)): str(e.get("step", e.get("labels"))) for i, e in enumerate(of_order[0])}
        places = [{**e, "fraction": e.get("step", i)} for entries in of_order for i, e in enumerate(entries)]
        drawn[order] = [
            study_line([e for e in places if e["metric"] == name], style) for style, name in enumerate(metrics)
        ]
    shared = value_axis([line for lines in drawn.values() for line in lines])
    return [_step_chart(order, drawn[order], metrics, ticks[order], shared) for order in orders]


def _step_chart(
    order: str, lines: Sequence[Line], metrics: Sequence[str], ticks: Mapping[float, str], y_axis: Axis
) -> StudyChart:
    label = "step: the layers are named in the table" if order else "labels"
    name = order or "by labels"
    svg = line_chart(
        lines, f"Similarity, {name}", 420, 270, label, "similarity", y_axis=y_axis, x_axis=step_axis(ticks)
    )
    legend = [Entry(style, metric) for style, metric in enumerate(metrics)]
    return StudyChart(name.capitalize(), svg, legend, "Mean over all rows; bands are 95 % bootstrap intervals.")


def step_axis(ticks: Mapping[float, str]) -> Axis:
    """The abscissa of a study's steps or labels."""
    first, last = min(ticks), max(ticks)
    numbers = all(text.isdecimal() for text in ticks.values())
    margin = 0 if numbers else 0.5  # words are wider than numbers
    return Axis(first - margin, max(last, first + 1) + margin, tuple(ticks.items()))


def study_line(entries: Iterable[Mapping[str, Any]], style: int | str) -> Line:
    """Entries of `over_repeats` over their fraction."""
    columns = {name: np.array([e[name] for e in entries], dtype=float) for name in ("fraction", "value", "low", "high")}
    return Line(columns["fraction"], columns["value"], style, columns["low"], columns["high"])


def _plain(part: Any) -> str:
    return f"{part:g}" if isinstance(part, int | float | np.number) else str(part)


def _shown(entry: Mapping[str, Any] | None) -> str:
    if entry is None:
        return ""
    text = number(entry["value"])
    if not np.isnan(entry["low"]):
        text += f" ({number(entry['low'])} to {number(entry['high'])})"
    undefined = entry.get("undefined", 0)
    return text if pd.isna(undefined) or not undefined else f"{text}, {undefined} undefined"
