"""Which metrics have curves to draw, and the charts of a run: mean curves over all rows, and one row's own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup

from ibxai.report.charts import LINES_IN_A_CHART, Line, common_curve, line_chart
from ibxai.report.statistics import mean_intervals
from ibxai.report.tables import MetricScores
from ibxai.store import Row

_CURVE, _FRACTION = "curve", "fraction"


@dataclass(frozen=True)
class LegendEntry:
    style: int
    label: str
    value: float | None  # the metric's main value, where there is one
    value_name: str


@dataclass(frozen=True)
class Chart:
    svg: Markup
    legend: list[LegendEntry]
    banded: bool = False


@dataclass(frozen=True)
class CurveSet:
    """Metrics that share a chart. A metric's style is its place here, on the mean chart and on every card."""

    metrics: list[MetricScores]

    @property
    def x_label(self) -> str:
        known = all(metric.key.name.startswith(("insertion", "deletion")) for metric in self.metrics)
        return "fraction of pixels inserted or deleted" if known else "fraction"

    def mean_chart(self) -> Chart:
        """The mean of every metric over all its rows, with the 95 % bootstrap interval over groups as a band."""
        lines, legend = [], []
        for style, metric in enumerate(self.metrics):
            x, y, places = common_curve(metric.curves[_FRACTION], metric.curves[_CURVE])
            low, high = mean_intervals(y, [metric.rows[place].group_id for place in places])
            edges = (low, high) if np.isfinite(low).all() else (None, None)
            lines.append(Line(x, y.mean(axis=0), style, *edges))
            legend.append(LegendEntry(style, metric.label, _mean_of_main(metric), f"mean {_main_name(metric)}"))
        names = " and ".join(metric.label for metric in self.metrics)
        svg = line_chart(lines, f"Mean curves over all rows: {names}", 420, 270, self.x_label, "score of the target")
        return Chart(svg, legend, banded=any(line.low is not None for line in lines))

    def row_chart(self, row: Row) -> Chart | None:
        """One row's curves; None where it has none."""
        lines, legend = [], []
        for style, metric in enumerate(self.metrics):
            if row.row_id not in metric.place:
                continue
            place = metric.place[row.row_id]
            x, y, found = common_curve([metric.curves[_FRACTION][place]], [metric.curves[_CURVE][place]])
            if len(found):
                lines.append(Line(x, y[0], style))
            value = float(metric.values[metric.main_value][place]) if metric.main_value else None
            legend.append(LegendEntry(style, metric.label, value, _main_name(metric)))
        if not lines:
            return None
        description = f"Curves of {row.sample_id}: " + ", ".join(entry.label for entry in legend)
        return Chart(line_chart(lines, description, 420, 190, self.x_label, "target score"), legend)


def curve_sets(scores: Sequence[MetricScores]) -> list[CurveSet]:
    """Metrics with a usable "curve" over "fraction", at most four to a chart, those of one kind of score together."""
    bounded: list[MetricScores] = []
    unbounded: list[MetricScores] = []
    order = {"higher": 0, "lower": 1, "": 2}
    for metric in sorted(scores, key=lambda m: (order[m.better(m.main_value or "")], m.label)):
        if not {_CURVE, _FRACTION} <= metric.curves.keys():
            continue
        _, y, _ = common_curve(metric.curves[_FRACTION], metric.curves[_CURVE])
        if y.size:
            (bounded if y.min() >= -1e-6 and y.max() <= 1 + 1e-6 else unbounded).append(metric)
    step = LINES_IN_A_CHART
    return [CurveSet(kind[i : i + step]) for kind in (bounded, unbounded) for i in range(0, len(kind), step)]


def _main_name(metric: MetricScores) -> str:
    return "AUC" if metric.main_value == "auc" else "value"


def _mean_of_main(metric: MetricScores) -> float | None:
    if metric.main_value is None:
        return None
    values = metric.values[metric.main_value]
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if finite.size else float("nan")
