"""Curves as small inline SVG that follows the page's colours, light or dark.

Colours and dashes stand in the page's style sheet under the classes line-0, line-1 ...; text sizes are in the chart's
own units, one unit being close to one pixel. Frames, axes and ticks serve the other diagrams too (`diagrams.py`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup
from matplotlib.ticker import MaxNLocator

MOST_POINTS = 101
LINES_IN_A_CHART = 4
CONTEXT = "context"  # the style of a line that stands behind, for comparison
_CONTEXT_POINTS = 26
_LEFT, _RIGHT, _TOP, _BOTTOM = 54, 10, 10, 40
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclass(frozen=True)
class Line:
    """x, y: [S], undefined points are left out; low, high: [S], the edges of a band around it, or None.

    style: its number in the style sheet, or CONTEXT.
    """

    x: np.ndarray
    y: np.ndarray
    style: int | str
    low: np.ndarray | None = None
    high: np.ndarray | None = None


@dataclass(frozen=True)
class Axis:
    """From low to high, linear or logarithmic (base 10)."""

    low: float
    high: float
    ticks: tuple[tuple[float, str], ...]
    log: bool = False

    def part(self, values: np.ndarray) -> np.ndarray:
        """0 at the low end, 1 at the high one."""
        values, low, high = np.asarray(values, dtype=float), self.low, self.high
        if self.log:
            values, low, high = np.log10(np.maximum(values, low)), math.log10(low), math.log10(high)
        return (values - low) / (high - low)


@dataclass(frozen=True)
class Frame:
    """The chart's area, and from numbers to its coordinates."""

    width: int
    height: int
    x: Axis
    y: Axis

    def across(self, x: np.ndarray) -> np.ndarray:
        return _LEFT + self.x.part(x) * (self.width - _LEFT - _RIGHT)

    def down(self, y: np.ndarray) -> np.ndarray:
        return self.height - _BOTTOM - self.y.part(y) * (self.height - _TOP - _BOTTOM)

    def points(self, x: np.ndarray, y: np.ndarray) -> str:
        return " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(self.across(x), self.down(y), strict=True))


def line_chart(
    lines: Sequence[Line],
    description: str,
    width: int,
    height: int,
    x_label: str,
    y_label: str,
    log_x: bool = False,
    y_axis: Axis | None = None,
    x_axis: Axis | None = None,
) -> Markup:
    """An SVG of curves over a fraction 0..1. description: what a screen reader says.

    log_x: the abscissa is logarithmic, from the smallest fraction on. y_axis: what several charts share. x_axis: of an
    abscissa that is no fraction.
    """
    lines = [_thinned(line) for line in lines]
    if x_axis is None:
        x_axis = log_axis([line.x for line in lines]) if log_x else Axis(0, 1, ((0, "0"), (0.5, "0.5"), (1, "1")))
    frame = Frame(width, height, x_axis, y_axis or value_axis(lines))
    body = (
        Markup("").join(_band(frame, line) for line in lines),
        Markup("").join(_polyline(frame, line) for line in lines),
    )
    return svg(frame, description, axes(frame, x_label, y_label), *body)


def svg(frame: Frame, description: str, *parts: Markup, kind: str = "chart") -> Markup:
    start = Markup('<svg class="{}" viewBox="0 0 {} {}" role="img" aria-label="{}">')
    return start.format(kind, frame.width, frame.height, description) + Markup("").join(parts) + Markup("</svg>")


def axes(frame: Frame, x_label: str, y_label: str) -> Markup:
    return _y_axis(frame, y_label) + _x_axis(frame, x_label)


def common_curve(
    fractions: Sequence[np.ndarray | None], curves: Sequence[np.ndarray | None], log: bool = False
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Curves of many rows on one abscissa: x [S], y [M, S], and which rows they are [M].

    Rows that lack a curve, or whose curve holds no defined value, are left out; a value that is undefined stays NaN.
    Rows with the same abscissa keep it, up to 101 points; others are interpolated to 101 points (log: geometric ones).
    """
    usable = [
        (place, fraction, curve)
        for place, (fraction, curve) in enumerate(zip(fractions, curves, strict=True))
        if fraction is not None and curve is not None and len(fraction) == len(curve) > 1 and np.isfinite(curve).any()
    ]
    if not usable:
        return np.zeros(0), np.zeros((0, 0)), np.zeros(0, dtype=int)
    x = usable[0][1]
    if len(x) > MOST_POINTS or not all(np.array_equal(x, fraction) for _, fraction, _ in usable):
        ends = min(f[0] for _, f, _ in usable), max(f[-1] for _, f, _ in usable)
        x = np.geomspace(*ends, MOST_POINTS) if log and ends[0] > 0 else np.linspace(0, 1, MOST_POINTS)
    y = np.stack([np.interp(x, fraction, curve) for _, fraction, curve in usable])
    y[~np.isfinite(y)] = np.nan
    return x, y, np.array([place for place, _, _ in usable])


def _thinned(line: Line) -> Line:
    most = _CONTEXT_POINTS if line.style == CONTEXT else MOST_POINTS
    if len(line.x) <= most:
        return line
    kept = np.unique(np.linspace(0, len(line.x) - 1, most).round().astype(int))
    low, high = (None if edge is None else edge[kept] for edge in (line.low, line.high))
    return Line(line.x[kept], line.y[kept], line.style, low, high)


def value_axis(lines: Sequence[Line], scores: bool = True) -> Axis:
    """The ordinate of curves. Scores that are probabilities of usual size keep 0..1, so that charts can be compared."""
    edges = [edge for line in lines for edge in (line.y, line.low, line.high) if edge is not None]
    numbers = np.concatenate([np.asarray(edge, dtype=float) for edge in edges]) if edges else np.zeros(0)
    numbers = numbers[np.isfinite(numbers)]
    low, high = (float(numbers.min()), float(numbers.max())) if numbers.size else (0.0, 1.0)
    if scores and low >= -1e-6 and 0.25 < high <= 1 + 1e-6:
        return _with_ticks(np.array([0, 0.25, 0.5, 0.75, 1]))
    return round_axis(0.0 if 0 <= low < high else low, high)


def round_axis(low: float, high: float) -> Axis:
    """From a round number below to one above, with up to four steps between."""
    locator = MaxNLocator(nbins=4, steps=[1, 2, 2.5, 5, 10])
    return _with_ticks(np.asarray(locator.tick_values(low, high if high > low else low + 1)))


def log_axis(values: Sequence[np.ndarray]) -> Axis:
    """From the power of ten below the smallest positive value to the one above the largest."""
    numbers = np.concatenate([np.asarray(part, dtype=float) for part in values]) if values else np.zeros(0)
    numbers = numbers[np.isfinite(numbers) & (numbers > 0)]
    low, high = (math.log10(numbers.min()), math.log10(numbers.max())) if numbers.size else (-1.0, 0.0)
    first, last = math.floor(low + 1e-9), math.ceil(high - 1e-9)
    last = max(last, first + 1)
    step = math.ceil((last - first) / 5)
    powers = range(first, last + 1, step)
    return Axis(10.0**first, 10.0**last, tuple((10.0**power, _power(power)) for power in powers), log=True)


def _power(exponent: int) -> str:
    return "1" if exponent == 0 else f"10{str(exponent).translate(_SUPERSCRIPTS)}"


def _with_ticks(ticks: np.ndarray) -> Axis:
    return Axis(float(ticks[0]), float(ticks[-1]), tuple((float(tick), f"{tick:g}") for tick in ticks))


def _y_axis(frame: Frame, label: str) -> Markup:
    row = Markup(
        '<line class="grid" x1="{x1}" x2="{x2}" y1="{y:.1f}" y2="{y:.1f}"/>'
        '<text x="{x}" y="{below:.1f}" text-anchor="end">{tick}</text>'
    )
    places = frame.down(np.array([tick for tick, _ in frame.y.ticks]))
    rows = Markup("").join(
        row.format(x1=_LEFT, x2=frame.width - _RIGHT, y=y, x=_LEFT - 6, below=y + 4, tick=text)
        for (_, text), y in zip(frame.y.ticks, places, strict=True)
    )
    middle = (_TOP + frame.height - _BOTTOM) / 2
    name = Markup('<text class="axis" transform="translate(12 {:.0f}) rotate(-90)" text-anchor="middle">{}</text>')
    return rows + name.format(middle, label)


def _x_axis(frame: Frame, label: str) -> Markup:
    mark = Markup('<text x="{:.1f}" y="{}" text-anchor="middle">{}</text>')
    places = frame.across(np.array([tick for tick, _ in frame.x.ticks]))
    base = frame.height - _BOTTOM
    marks = (mark.format(x, base + 17, text) for (_, text), x in zip(frame.x.ticks, places, strict=True))
    name = Markup('<text class="axis" x="{:.0f}" y="{}" text-anchor="middle">{}</text>')
    return Markup("").join(marks) + name.format((_LEFT + frame.width - _RIGHT) / 2, frame.height - 5, label)


def _band(frame: Frame, line: Line) -> Markup:
    if line.low is None or line.high is None:
        return Markup()
    known = np.isfinite(line.low) & np.isfinite(line.high)
    if not known.any():
        return Markup()
    x, low, high = line.x[known], line.low[known], line.high[known]
    outline = frame.points(np.r_[x, x[::-1]], np.r_[high, low[::-1]])
    return Markup('<polygon class="band band-{}" points="{}"/>').format(line.style, outline)


def _polyline(frame: Frame, line: Line) -> Markup:
    known = np.isfinite(line.y)
    points = frame.points(line.x[known], line.y[known])
    return Markup('<polyline class="line line-{}" points="{}"/>').format(line.style, points)
