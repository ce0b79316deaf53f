"""Which metrics have curves, their means, and the charts of a run: mean curves over all rows, and one row's own.

curves.csv of a run holds the mean curves that its page shows and that the leaderboard puts beside those of other runs:
method, metric, fraction, mean, low, high, n. It is there when a metric has a curve, and can always be made again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from markupsafe import Markup

from ibxai.report.charts import LINES_IN_A_CHART, Axis, Line, common_curve, line_chart, value_axis
from ibxai.report.render import enumerated, span
from ibxai.report.statistics import mean_intervals
from ibxai.report.tables import CURVE, FRACTION, MetricScores, method_name, read_csv, write_table, write_tables
from ibxai.store import MetricKey, Row, RunStore

CURVES_COLUMNS = ["method", "metric", "fraction", "mean", "low", "high", "n"]


@dataclass(frozen=True)
class Kind:
    """What a metric's curves mean. reading: what to look for. log: fractions run over several powers of ten.

    scores: of the network, which share the axis 0..1 where they fit, or else numbers of any size.
    """

    x_label: str
    y_label: str
    reading: str = ""
    log: bool = False
    scores: bool = True

    def axis(self, lines: Sequence[Line]) -> Axis:
        return value_axis(lines, self.scores)


_SENSITIVITY_N = Kind(
    "n, as a fraction of the pixels",
    "Pearson correlation",
    "High is good: sums of the map in random sets of n pixels tell what removing them changes.",
    log=True,
    scores=False,
)
_IOU = Kind(
    "threshold, as a fraction of the maximum",
    "IoU",
    "The IoU with the annotated region at every threshold; its highest point is the value.",
)
_PIXELS = {"insertion": "fraction of pixels inserted", "deletion": "fraction of pixels deleted"}
_SCORE_READINGS = {
    "insertion": "Insertion should rise early: the first pixels alone carry the evidence.",
    "deletion": "Deletion should fall early: without the first pixels little is left.",
}


def kind_of(key: MetricKey, places: str = "pixels") -> Kind:
    """By the beginning of the metric's name: insertion_input_iba is an insertion. places: what a map has values of."""
    kind = _kind_of(key)
    x_label, reading = (text.replace("pixels", places) for text in (kind.x_label, kind.reading))
    return replace(kind, x_label=x_label, reading=reading)


def _kind_of(key: MetricKey) -> Kind:
    if key.name.startswith("sensitivity_n"):
        return _SENSITIVITY_N
    if key.name.startswith("iou"):
        return _IOU
    word = next((word for word in _PIXELS if key.name.startswith(word)), None)
    if word is None:
        return Kind("fraction", "score")
    score = f"{key.settings.get('score', 'score')} of the target"
    if key.settings.get("change"):
        return Kind(_PIXELS[word], f"change of the {score}", "The change should come early, whatever its direction.")
    return Kind(_PIXELS[word], score, _SCORE_READINGS[word])


@dataclass(frozen=True)
class MeanCurve:
    """The mean over a metric's rows, point by point, each over the rows where it is defined.

    x, mean: [S]. low, high: [S], 95 % bootstrap interval over groups, NaN with a single group. n: [S], rows.
    """

    x: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray
    n: np.ndarray

    @property
    def banded(self) -> bool:
        return bool(np.isfinite(self.low).any())

    def line(self, style: int | str, band: bool = True) -> Line:
        edges = (self.low, self.high) if band and self.banded else (None, None)
        return Line(self.x, self.mean, style, *edges)


def mean_curve(metric: MetricScores) -> MeanCurve | None:
    """None where no row has a usable curve."""
    if not {CURVE, FRACTION} <= metric.curves.keys():
        return None
    log = kind_of(metric.key).log
    x, y, places = common_curve(metric.curves[FRACTION], metric.curves[CURVE], log)
    if not len(places):
        return None
    low, high = mean_intervals(y, [metric.rows[place].group_id for place in places])
    n = np.isfinite(y).sum(axis=0)
    mean = np.divide(np.nansum(y, axis=0), n, out=np.full(len(x), np.nan), where=n > 0)
    return MeanCurve(x, mean, low, high, n)


def write_all_tables(store: RunStore, scores: Sequence[MetricScores]) -> tuple[pd.DataFrame, dict[str, MeanCurve]]:
    """Make metrics.csv, curves.csv and summary.csv of a run; returns the summary, and the mean curves by label.

    The summary comes last: where it is newer than the scores, the others are too.
    """
    means = {metric.label: mean for metric in scores if (mean := mean_curve(metric)) is not None}
    _write_curves(store, means)
    return write_tables(store, scores), means


def _write_curves(store: RunStore, means: dict[str, MeanCurve]) -> None:
    """Without curves there is no such file."""
    if not means:
        (store.path / "curves.csv").unlink(missing_ok=True)
        return
    method = method_name(store)
    parts = [
        pd.DataFrame(
            {"method": method, "metric": label, "fraction": c.x, "mean": c.mean, "low": c.low, "high": c.high, "n": c.n}
        )
        for label, c in means.items()
    ]
    write_table(store, "curves.csv", pd.concat(parts, ignore_index=True)[CURVES_COLUMNS])


def read_curves(store: RunStore) -> dict[str, MeanCurve] | None:
    """curves.csv as it was written; None where it is absent or another table."""
    table = read_csv(store, "curves.csv", CURVES_COLUMNS, CURVES_COLUMNS[:2], CURVES_COLUMNS[2:6])
    if table is None:
        return None
    return {
        str(label): MeanCurve(*(part[name].to_numpy() for name in CURVES_COLUMNS[2:]))
        for label, part in table.groupby("metric", sort=False)
    }


@dataclass(frozen=True)
class LegendEntry:
    style: int
    label: str
    value: float | None  # the metric's main value, where there is one
    value_name: str


@dataclass(frozen=True)
class Chart:
    """title: what it shows. note: how many rows, and what to read from it."""

    svg: Markup
    legend: list[LegendEntry]
    title: str = ""
    note: str = ""


@dataclass(frozen=True)
class CurveSet:
    """Metrics that share a chart. A metric's style is its place here, on the mean chart and on every card."""

    metrics: list[MetricScores]
    means: list[MeanCurve]

    @property
    def kind(self) -> Kind:
        places = self.metrics[0].places
        kinds = [kind_of(metric.key, places) for metric in self.metrics]
        if len({kind.x_label for kind in kinds}) == 1:
            return kinds[0]
        known = all(metric.key.name.startswith(("insertion", "deletion")) for metric in self.metrics)
        return Kind(f"fraction of {places} inserted or deleted" if known else "fraction", kinds[0].y_label)

    def mean_chart(self) -> Chart:
        """The mean of every metric over all its rows, with the 95 % bootstrap interval over groups as a band."""
        lines = [mean.line(style) for style, mean in enumerate(self.means)]
        legend = [
            LegendEntry(style, metric.label, _mean_of_main(metric), f"mean {_main_name(metric)}")
            for style, metric in enumerate(self.metrics)
        ]
        kind, names = self.kind, enumerated([metric.label for metric in self.metrics])
        description = f"Mean curves over all rows: {names}"
        svg = line_chart(lines, description, 420, 270, kind.x_label, kind.y_label, kind.log, kind.axis(lines))
        return Chart(svg, legend, f"Mean {'curves' if len(lines) > 1 else 'curve'}: {names}", self._note())

    def row_chart(self, row: Row) -> Chart | None:
        """One row's curves; None where it has none."""
        lines, legend, kind = [], [], self.kind
        for style, metric in enumerate(self.metrics):
            if row.row_id not in metric.place:
                continue
            place = metric.place[row.row_id]
            x, y, found = common_curve([metric.curves[FRACTION][place]], [metric.curves[CURVE][place]], kind.log)
            if len(found):
                lines.append(Line(x, y[0], style))
            value = float(metric.values[metric.main_value][place]) if metric.main_value else None
            legend.append(LegendEntry(style, metric.label, value, _main_name(metric)))
        if not lines:
            return None
        description = f"Curves of {row.sample_id}: " + ", ".join(entry.label for entry in legend)
        svg = line_chart(lines, description, 420, 190, kind.x_label, kind.y_label, kind.log, kind.axis(lines))
        return Chart(svg, legend)

    def _note(self) -> str:
        """How many rows, and how to read it."""
        counts = np.concatenate([mean.n for mean in self.means])
        undefined = max(len(metric.rows) for metric in self.metrics) - int(counts.min())
        note = f"Mean over n = {span(counts.tolist(), 'row')}"
        note += f", up to {undefined:,} more undefined. " if undefined else ". "
        if any(mean.banded for mean in self.means):
            note += "The bands are 95\N{NARROW NO-BREAK SPACE}% bootstrap intervals, point by point. "
        return note + " ".join(dict.fromkeys(kind_of(metric.key, metric.places).reading for metric in self.metrics))


def curve_sets(scores: Sequence[MetricScores], means: dict[str, MeanCurve]) -> list[CurveSet]:
    """Metrics with a mean curve, at most four to a chart, those of one kind of axes and of score together."""
    kinds: dict[tuple[str, bool], list[MetricScores]] = {}
    order = {"higher": 0, "lower": 1, "": 2}
    for metric in sorted(scores, key=lambda m: (order[m.better(m.main_value or "")], m.label)):
        if metric.label in means:
            mean = means[metric.label].mean
            bounded = bool(np.nanmin(mean) >= -1e-6 and np.nanmax(mean) <= 1 + 1e-6)
            kinds.setdefault((kind_of(metric.key).y_label, bounded), []).append(metric)
    step = LINES_IN_A_CHART
    return [
        CurveSet(alike[i : i + step], [means[metric.label] for metric in alike[i : i + step]])
        for alike in kinds.values()
        for i in range(0, len(alike), step)
    ]


def _main_name(metric: MetricScores) -> str:
    return "AUC" if metric.main_value == "auc" else "value"


def _mean_of_main(metric: MetricScores) -> float | None:
    if metric.main_value is None:
        return None
    values = metric.values[metric.main_value]
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if finite.size else float("nan")
