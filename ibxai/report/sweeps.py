"""A sweep side by side: what came of each job, and every metric against the setting that was swept.

    <outputs>/sweeps/<sweep>/sweep.csv      a line a job and metric; failed jobs with their reason
                             report.html    the same as a page, with a chart a metric

The folder is named by the jobs' settings, so the same sweep again brings its page up to date. A chart's abscissa is the
swept setting with most numbers, or the first one where none is a number; the other swept settings tell lines apart.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pandas as pd
from markupsafe import Markup

from ibxai.report.charts import LINES_IN_A_CHART, Axis, Frame, axes, round_axis, svg
from ibxai.report.render import render
from ibxai.report.tables import csv_text, read_summary
from ibxai.store import MetricKey, RunStore, digest, write_atomically

MOST_CHARTS = 24
_COLUMNS = ["mean", "low", "high", "n", "better"]
_ROOMY = 20.0  # positive numbers that span so much are drawn on a logarithmic axis
_DODGE = 7.0  # between points of several lines at one value, in the chart's units


@dataclass(frozen=True)
class Job:
    """One job. settings: name -> value as it was typed; folder: its run's, None when it has none; told: one line."""

    settings: Mapping[str, str]
    failed: bool
    told: str
    folder: Path | None

    @cached_property
    def summary(self) -> Mapping[str, Mapping[str, object]]:
        """metric -> its line of the run's summary.csv; empty where there is none that is up to date."""
        table = None if self.folder is None else read_summary(RunStore(self.folder))
        lines = [] if table is None else table.to_dict("records")
        return {str(line["metric"]): {str(name): value for name, value in line.items()} for line in lines}

    def number(self, metric: str, name: str) -> float:
        return float(self.summary[metric][name]) if metric in self.summary else np.nan  # type: ignore[arg-type]


@dataclass(frozen=True)
class Chart:
    """One metric. legend: style and name, where there are several lines."""

    title: str
    svg: Markup
    legend: list[tuple[int, str]]


@dataclass(frozen=True)
class Sweep:
    jobs: Sequence[Job]

    @cached_property
    def swept(self) -> list[str]:
        """The settings in which the jobs differ, in the order in which they were typed."""
        names = dict.fromkeys(name for job in self.jobs for name in job.settings)
        return [name for name in names if len({job.settings.get(name) for job in self.jobs}) > 1]

    @cached_property
    def metrics(self) -> list[str]:
        return sorted({metric for job in self.jobs for metric in job.summary})

    @property
    def one_folder(self) -> bool:
        """Whether jobs share a run folder, as shards and limits do, and so its numbers."""
        folders = [job.folder for job in self.jobs if job.folder is not None]
        return len(set(folders)) < len(folders)

    @cached_property
    def across(self) -> str:
        """The setting on the abscissa; "" where nothing was swept."""
        numeric = [name for name in self.swept if all(_number(v) is not None for v in self.values(name))]
        return max(numeric, key=lambda name: len(self.values(name)), default=next(iter(self.swept), ""))

    def values(self, name: str) -> list[str]:
        return list(dict.fromkeys(job.settings[name] for job in self.jobs if name in job.settings))

    def lines(self) -> dict[str, list[Job]]:
        """The jobs of each line, by what sets it apart from the others."""
        others = [name for name in self.swept if name != self.across]
        found: dict[str, list[Job]] = {}
        for job in self.jobs:
            name = ", ".join(f"{other} = {job.settings.get(other, '')}" for other in others)
            found.setdefault(name, []).append(job)
        return found

    def charts(self) -> list[Chart]:
        """A chart a metric and four lines."""
        lines = list(self.lines().items()) if self.across else []
        pieces = [lines[start : start + LINES_IN_A_CHART] for start in range(0, len(lines), LINES_IN_A_CHART)]
        return [
            _chart(self, metric, dict(piece))
            for metric in self.metrics
            for piece in pieces
            if any(np.isfinite(job.number(metric, "mean")) for _, jobs in piece for job in jobs)
        ][:MOST_CHARTS]


def cost(folder: Path, metric: MetricKey) -> float | None:
    """What a search over settings makes small: the metric's mean in a run, negative where higher is better; None where
    the run has no summary yet, or the metric no direction.
    """
    table = read_summary(RunStore(folder))
    for line in [] if table is None else table.to_dict("records"):
        if line["metric"] in (metric.name, metric.folder) and line["better"] and np.isfinite(line["mean"]):
            return float(-line["mean"] if line["better"] == "higher" else line["mean"])
    return None


def write_sweep(sweep: Sweep, outputs: Path) -> Path | None:
    """Make the table and the page of a sweep; the page. None where no job has scores."""
    if not sweep.metrics:
        return None
    folder = outputs / "sweeps" / digest([dict(job.settings) for job in sweep.jobs])
    write_atomically(folder / "sweep.csv", csv_text(sweep_table(sweep)).encode("utf-8", "surrogateescape"))
    links = [None if job.folder is None else _link(job.folder, outputs) for job in sweep.jobs]
    context = {"sweep": sweep, "links": links, "charts": sweep.charts()}
    write_atomically(folder / "report.html", render("sweep.html", context))
    return folder / "report.html"


def sweep_table(sweep: Sweep) -> pd.DataFrame:
    """A line a job and metric: job, the swept settings, told, run, metric, mean, low, high, n, better. A job without
    scores has one line, without a metric."""
    lines = []
    for number, job in enumerate(sweep.jobs):
        about = {"job": number, **{name: job.settings.get(name, "") for name in sweep.swept}}
        about |= {"told": job.told, "run": "" if job.folder is None else job.folder.name}
        for metric, line in job.summary.items():
            lines.append({**about, "metric": metric, **{name: line[name] for name in _COLUMNS}})
        if not job.summary:
            lines.append({**about, "metric": "", **dict.fromkeys(_COLUMNS, "")})
    return pd.DataFrame(lines)


def _link(folder: Path, outputs: Path) -> str | None:
    """From the sweep's page to the run's, where there is one."""
    page = folder / "report.html"
    if not page.exists() or not page.is_relative_to(outputs):
        return None
    return quote(Path("../..", page.relative_to(outputs)).as_posix())


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _chart(sweep: Sweep, metric: str, lines: Mapping[str, Sequence[Job]]) -> Chart:
    values = sweep.values(sweep.across)
    numbers = [_number(value) for value in values]
    ordered = all(number is not None and np.isfinite(number) for number in numbers)
    place = dict(zip(values, numbers if ordered else range(len(values)), strict=True))
    drawn = {
        name: np.array(
            sorted((place[job.settings[sweep.across]], *(job.number(metric, n) for n in ("mean", "low", "high")))
                   for job in jobs if sweep.across in job.settings), dtype=float,
        ).reshape(-1, 4)
        for name, jobs in lines.items()
    }  # fmt: skip
    ends = np.concatenate([points[:, 1:].ravel() for points in drawn.values()])
    low, high = np.nanmin(ends), np.nanmax(ends)
    margin = 0.06 * (high - low) or 0.05
    frame = Frame(560, 320, _abscissa(values, place, ordered), round_axis(low - margin, high + margin))
    better = next((job.summary[metric]["better"] for job in sweep.jobs if metric in job.summary), "")
    label = f"{metric} ({better} is better)" if better else metric
    parts = [_line(frame, points, style, len(drawn), ordered) for style, points in enumerate(drawn.values())]
    described = f"{metric} against {sweep.across}"
    legend = list(enumerate(drawn)) if len(drawn) > 1 else []
    return Chart(described, svg(frame, described, axes(frame, sweep.across, label), *parts), legend)


def _abscissa(values: Sequence[str], place: Mapping[str, float | int | None], ordered: bool) -> Axis:
    """A tick at every value that was swept; of many, at some."""
    at = {value: float(place[value]) for value in values}  # type: ignore[arg-type]
    shown = sorted(values, key=at.__getitem__)
    step = -(-len(shown) // 9)
    ticks = tuple((at[value], value if len(value) <= 16 else f"{value[:15]}…") for value in shown[::step])
    low, high = min(at.values()), max(at.values())
    if ordered and low > 0 and high / low >= _ROOMY:
        return Axis(low / 1.3, high * 1.3, ticks, log=True)
    margin = 0.06 * (high - low) if ordered and high > low else 0.5
    return Axis(low - margin, high + margin, ticks)


def _line(frame: Frame, points: np.ndarray, style: int, count: int, joined: bool) -> Markup:
    """Means with their intervals. points: [N, 4] of place, mean, low, high; joined: the places have an order."""
    points = points[np.isfinite(points[:, 1])]
    x = frame.across(points[:, 0]) + _DODGE * (style - (count - 1) / 2)
    y, low, high = (frame.down(points[:, column]) for column in (1, 2, 3))
    bar = Markup('<line class="interval line-{}" x1="{:.1f}" x2="{:.1f}" y1="{:.1f}" y2="{:.1f}"/>')
    dot = Markup('<circle class="band-{}" cx="{:.1f}" cy="{:.1f}" r="3.5"><title>{:.4g}</title></circle>')
    parts = [bar.format(style, a, a, b, c) for a, b, c in zip(x, low, high, strict=True) if np.isfinite([b, c]).all()]
    if joined and len(x) > 1:
        path = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y, strict=True))
        parts.append(Markup('<polyline class="line line-{}" points="{}"/>').format(style, path))
    parts += [dot.format(style, a, b, mean) for a, b, mean in zip(x, y, points[:, 1], strict=True)]
    return Markup("").join(parts)
