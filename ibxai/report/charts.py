"""Curves as small inline SVG that follows the page's colours, light or dark.

Colours and dashes stand in the page's style sheet under the classes line-0, line-1 ...; text sizes are in the chart's
own units, one unit being close to one pixel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup
from matplotlib.ticker import MaxNLocator

MOST_POINTS = 101
LINES_IN_A_CHART = 4
_LEFT, _RIGHT, _TOP, _BOTTOM = 54, 10, 10, 40


@dataclass(frozen=True)
class Line:
    """x, y: [S]; low, high: [S], the edges of a band around it, or None. style: its number in the style sheet."""

    x: np.ndarray
    y: np.ndarray
    style: int
    low: np.ndarray | None = None
    high: np.ndarray | None = None


@dataclass(frozen=True)
class _Frame:
    """The chart's area, and from numbers to its coordinates. x runs 0..1."""

    width: int
    height: int
    bottom: float
    top: float

    def points(self, x: np.ndarray, y: np.ndarray) -> str:
        across = _LEFT + np.asarray(x) * (self.width - _LEFT - _RIGHT)
        return " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(across, self.down(y), strict=True))

    def down(self, y: np.ndarray) -> np.ndarray:
        part = (np.asarray(y, dtype=float) - self.bottom) / (self.top - self.bottom)
        return self.height - _BOTTOM - part * (self.height - _TOP - _BOTTOM)


def line_chart(lines: Sequence[Line], description: str, width: int, height: int, x_label: str, y_label: str) -> Markup:
    """An SVG of curves over a fraction 0..1. description: what a screen reader says."""
    lines = [_thinned(line) for line in lines]
    ticks = _ticks(lines)
    frame = _Frame(width, height, ticks[0], ticks[-1])
    return Markup('<svg class="chart" viewBox="0 0 {} {}" role="img" aria-label="{}">{}{}{}{}</svg>').format(
        width,
        height,
        description,
        _y_axis(frame, ticks, y_label),
        _x_axis(frame, x_label),
        Markup("").join(_band(frame, line) for line in lines),
        Markup("").join(_polyline(frame, line) for line in lines),
    )


def common_curve(
    fractions: Sequence[np.ndarray | None], curves: Sequence[np.ndarray | None]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Curves of many rows on one abscissa: x [S], y [M, S], and which rows they are [M].

    Rows that lack a curve, or whose curve holds undefined values, are left out. Rows with the same abscissa keep it,
    up to 101 points; others are interpolated to 101 points.
    """
    usable = [
        (place, fraction, curve)
        for place, (fraction, curve) in enumerate(zip(fractions, curves, strict=True))
        if fraction is not None and curve is not None and len(fraction) == len(curve) > 1 and np.isfinite(curve).all()
    ]
    if not usable:
        return np.zeros(0), np.zeros((0, 0)), np.zeros(0, dtype=int)
    x = usable[0][1]
    if len(x) > MOST_POINTS or not all(np.array_equal(x, fraction) for _, fraction, _ in usable):
        x = np.linspace(0, 1, MOST_POINTS)
    y = np.stack([np.interp(x, fraction, curve) for _, fraction, curve in usable])
    return x, y, np.array([place for place, _, _ in usable])


def _thinned(line: Line) -> Line:
    if len(line.x) <= MOST_POINTS:
        return line
    kept = np.unique(np.linspace(0, len(line.x) - 1, MOST_POINTS).round().astype(int))
    low, high = (None if edge is None else edge[kept] for edge in (line.low, line.high))
    return Line(line.x[kept], line.y[kept], line.style, low, high)


def _ticks(lines: Sequence[Line]) -> np.ndarray:
    """Probabilities of usual size keep 0..1, so that charts can be compared; anything else gets round numbers."""
    edges = [edge for line in lines for edge in (line.y, line.low, line.high) if edge is not None]
    numbers = np.concatenate([np.asarray(edge, dtype=float) for edge in edges])
    numbers = numbers[np.isfinite(numbers)]
    low, high = (float(numbers.min()), float(numbers.max())) if numbers.size else (0.0, 1.0)
    if low >= -1e-6 and 0.25 < high <= 1 + 1e-6:
        return np.array([0, 0.25, 0.5, 0.75, 1])
    low = 0.0 if 0 <= low < high else low
    locator = MaxNLocator(nbins=4, steps=[1, 2, 2.5, 5, 10])
    return np.asarray(locator.tick_values(low, high if high > low else low + 1))


def _y_axis(frame: _Frame, ticks: np.ndarray, label: str) -> Markup:
    row = Markup(
        '<line class="grid" x1="{x1}" x2="{x2}" y1="{y:.1f}" y2="{y:.1f}"/>'
        '<text x="{x}" y="{below:.1f}" text-anchor="end">{tick}</text>'
    )
    rows = Markup("").join(
        row.format(x1=_LEFT, x2=frame.width - _RIGHT, y=y, x=_LEFT - 6, below=y + 4, tick=f"{tick:g}")
        for tick, y in zip(ticks, frame.down(ticks), strict=True)
    )
    middle = (_TOP + frame.height - _BOTTOM) / 2
    name = Markup('<text class="axis" transform="translate(12 {:.0f}) rotate(-90)" text-anchor="middle">{}</text>')
    return rows + name.format(middle, label)


def _x_axis(frame: _Frame, label: str) -> Markup:
    mark = Markup('<text x="{:.1f}" y="{}" text-anchor="middle">{}</text>')
    span = frame.width - _LEFT - _RIGHT
    marks = (mark.format(_LEFT + part * span, frame.height - _BOTTOM + 17, f"{part:g}") for part in (0, 0.5, 1))
    name = Markup('<text class="axis" x="{:.0f}" y="{}" text-anchor="middle">{}</text>')
    return Markup("").join(marks) + name.format(_LEFT + span / 2, frame.height - 5, label)


def _band(frame: _Frame, line: Line) -> Markup:
    if line.low is None or line.high is None:
        return Markup()
    outline = frame.points(np.r_[line.x, line.x[::-1]], np.r_[line.high, line.low[::-1]])
    return Markup('<polygon class="band band-{}" points="{}"/>').format(line.style, outline)


def _polyline(frame: _Frame, line: Line) -> Markup:
    return Markup('<polyline class="line line-{}" points="{}"/>').format(line.style, frame.points(line.x, line.y))
