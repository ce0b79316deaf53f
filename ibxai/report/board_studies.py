"""The studies of a leaderboard's table: what each found about the methods, side by side.

A study is compared where its settings and its rows are the same. A line is a method: ROAR's accuracy over the fraction
of the pixels, with the random control, or the similarity of the maps over the steps of a randomisation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from ibxai.report.board_figures import MOST_SHOWN, Figure
from ibxai.report.charts import CONTEXT, LINES_IN_A_CHART, Line, line_chart, value_axis
from ibxai.report.render import count, span
from ibxai.report.studies import (
    CONTROL,
    WHOLE,
    StudyResult,
    differing_variants,
    grade_ticks,
    of_grades,
    over_repeats,
    step_axis,
    study_line,
)

Entry = Mapping[str, Any]


@dataclass(frozen=True)
class BoardStudy:
    """variant: what sets it apart from another of the same name. unfinished: the methods whose study goes on."""

    title: str
    variant: str
    note: str
    unfinished: list[str]
    figures: list[Figure]


@dataclass(frozen=True)
class _Chart:
    """One chart, over all methods. lines: a name's points. ticks: of an abscissa that is no fraction."""

    title: str
    x_label: str
    y_label: str
    counted: str
    lines: Mapping[str, Sequence[Entry]]
    ticks: Mapping[float, str] | None = None


def board_studies(names: Sequence[str], studies: Sequence[Sequence[StudyResult]]) -> list[BoardStudy]:
    """names, studies: one entry a run of the table. A study that one run alone has is left to that run's page."""
    alike: dict[str, dict[str, StudyResult]] = {}
    for name, results in zip(names, studies, strict=True):
        for result in results:
            alike.setdefault(result.key.folder, {})[name] = result
    shared = {folder: results for folder, results in sorted(alike.items()) if len(results) > 1}
    variants = differing_variants([next(iter(results.values())).key for results in shared.values()])
    compared = [_study(results, variants[folder]) for folder, results in shared.items()]
    return [study for study in compared if study.figures]


def _study(results: Mapping[str, StudyResult], variant: str) -> BoardStudy:
    first = next(iter(results.values()))
    charts = _charts(results, first.places)
    return BoardStudy(
        title=first.title,
        variant=variant,
        note=first.note,
        unfinished=[name for name, result in results.items() if not result.finished],
        figures=[_figure(chart) for chart in charts],
    )


def _charts(results: Mapping[str, StudyResult], places: Sequence[str]) -> list[_Chart]:
    if "fraction" in places:
        return _fraction_charts(results)
    if "studies" in places:
        return _severity_charts(results)
    return _step_charts(results) if {"step", "labels"} & set(places) else []


def _severity_charts(results: Mapping[str, StudyResult]) -> list[_Chart]:
    """The hot share by true grade, and how well each grading does."""
    found = {name: over_repeats(result) for name, result in results.items()}
    note = "Mean over the studies; bands are 95 % bootstrap intervals."
    shares = {name: of_grades(e for e in own if e["metric"] == "hot_share") for name, own in found.items()}
    ticks = grade_ticks(point for points in shares.values() for point in points)
    charts = [_Chart("Hot share of the lung", "true grade", "hot share", note, shares, ticks)]
    gradings = list(dict.fromkeys(e["grading"] for own in found.values() for e in own if e["metric"] == "accuracy"))
    for metric in ("quadratic_kappa", "accuracy"):
        lines = {
            name: [{**e, "fraction": gradings.index(e["grading"])} for e in own if e["metric"] == metric]
            for name, own in found.items()
        }
        named = metric.replace("_", " ")
        charts.append(_Chart(named.capitalize(), "grading", named, note, lines, dict(enumerate(gradings))))
    return charts


def _fraction_charts(results: Mapping[str, StudyResult]) -> list[_Chart]:
    """Accuracy over the fraction; the control of every run is the same one, so it is taken from the first."""
    lines: dict[str, list[Entry]] = {}
    for name, result in results.items():
        entries = [entry for entry in over_repeats(result) if entry["metric"] == "accuracy"]
        whole = [entry for entry in entries if entry["estimator"] == WHOLE]
        for control in (False, True):
            own = [e for e in entries if e["estimator"] != WHOLE and (e["estimator"] == CONTROL) == control]
            label = "random control" if control else name
            if own and label not in lines:
                lines[label] = sorted([*whole, *own], key=lambda entry: entry["fraction"])
    note = "Accuracy on the test split, mean over the trainings; bands from the lowest to the highest of them."
    return [_Chart("Accuracy", "fraction of the pixels", "accuracy", note, lines)] if lines else []


def _step_charts(results: Mapping[str, StudyResult]) -> list[_Chart]:
    """A chart an order and metric; where a study has but one coordinate (labels), a chart a metric."""
    found: dict[tuple[str, str], dict[str, list[Entry]]] = {}
    for name, result in results.items():
        for entry in over_repeats(result):
            if not pd.isna(entry.get("n")):
                found.setdefault((entry.get("order", ""), entry["metric"]), {}).setdefault(name, []).append(entry)
    charts = []
    rows = span([result.rows for result in results.values()], "row")
    for (order, metric), lines in found.items():
        longest = max(lines.values(), key=len)
        ticks = {float(e.get("step", i)): str(e.get("step", e.get("labels"))) for i, e in enumerate(longest)}
        placed = {n: [{**e, "fraction": e.get("step", i)} for i, e in enumerate(es)] for n, es in lines.items()}
        title = f"{metric.replace('_', ' ')}, {order or 'by labels'}"
        counted = f"n = {rows} a point; bands are 95 % bootstrap intervals."
        counted += " The page of a run names the layers of each step." if order else ""
        charts.append(_Chart(title, "step" if order else "labels", "similarity", counted, placed, ticks))
    return charts


def _figure(chart: _Chart) -> Figure:
    """Together up to four lines; above that a panel a method before all others in grey."""
    names = list(chart.lines)[:MOST_SHOWN]
    lines = {name: study_line(chart.lines[name], 0) for name in names}
    y_axis = value_axis(list(lines.values()))
    x_axis = step_axis(chart.ticks) if chart.ticks is not None else None

    def draw(drawn: Sequence[Line], who: str, width: int, height: int) -> Any:
        told = f"{chart.title} of {who}"
        return line_chart(drawn, told, width, height, chart.x_label, chart.y_label, y_axis=y_axis, x_axis=x_axis)

    together = len(names) <= LINES_IN_A_CHART
    if together:
        drawn = [study_line(chart.lines[name], style) for style, name in enumerate(names)]
        panels = [("", draw(drawn, ", ".join(names), 560, 320))]
    else:
        panels = []
        for name in names:
            behind = [Line(lines[n].x, lines[n].y, CONTEXT) for n in names if n != name]
            panels.append((name, draw([*behind, lines[name]], name, 300, 210)))
    left_out = f" The first {MOST_SHOWN} of {count(len(chart.lines), 'line')}." if len(chart.lines) > MOST_SHOWN else ""
    return Figure(
        title=chart.title,
        panels=panels,
        legend=list(enumerate(names)) if together else [],
        counted=chart.counted + left_out,
        reading="" if together else "Grey: all other methods.",
    )
