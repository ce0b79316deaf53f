"""Two diagrams of many methods, as inline SVG in the pages' chart language: a labelled scatter, and average ranks.

The rank diagram is the critical-difference diagram of Demsar (JMLR 2006, figure 1): methods on an axis of average
ranks, best at the left, and a bar over every set whose ranks the Nemenyi test does not tell apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup

from ibxai.report.charts import Axis, Frame, axes, round_axis, svg
from ibxai.report.significance import Ranking, level_groups

_LETTER, _LINE = 6.1, 13  # width and height of text, in the chart's units
_RANKS_AXIS, _RANKS_TOP, _ROW, _BAR = 380, 54, 19, 7


@dataclass(frozen=True)
class Point:
    """A method by two means. low, high: (x, y) ends of the intervals, NaN where there is none."""

    name: str
    x: float
    y: float
    low: tuple[float, float]
    high: tuple[float, float]


@dataclass(frozen=True)
class Box:
    """A rectangle in the chart's coordinates, y downwards."""

    left: float
    top: float
    right: float
    bottom: float

    def overlap(self, other: Box) -> float:
        wide = min(self.right, other.right) - max(self.left, other.left)
        high = min(self.bottom, other.bottom) - max(self.top, other.top)
        return max(wide, 0) * max(high, 0)


def scatter(
    points: Sequence[Point], description: str, x_label: str, y_label: str, better: tuple[str, str], named: bool = True
) -> Markup:
    """Points with error bars both ways. better: "higher" or "lower" of x and of y; named: every point has its label."""
    frame = Frame(560, 420, _axis_of(points, 0), _axis_of(points, 1))
    x, y = frame.across(np.array([p.x for p in points])), frame.down(np.array([p.y for p in points]))
    bars = Markup("").join(_error_bars(frame, point) for point in points)
    dot = Markup('<circle class="dot" cx="{:.1f}" cy="{:.1f}" r="4"><title>{}</title></circle>')
    dots = Markup("").join(dot.format(a, b, point.name) for a, b, point in zip(x, y, points, strict=True))
    labels = _labels(frame, points, x, y) if named else Markup()
    parts = (axes(frame, x_label, y_label), bars, labels, dots, _better_corner(frame, better))
    return svg(frame, description, *parts, kind="chart points")


def _axis_of(points: Sequence[Point], side: int) -> Axis:
    ends = np.array([[(p.x, p.y)[side], p.low[side], p.high[side]] for p in points])
    low, high = float(np.nanmin(ends)), float(np.nanmax(ends))
    margin = 0.06 * (high - low) or 0.05
    return round_axis(low - margin, high + margin)


def _error_bars(frame: Frame, point: Point) -> Markup:
    (x, x_low, x_high), (y, y_low, y_high) = (
        frame.across(np.array([point.x, point.low[0], point.high[0]])),
        frame.down(np.array([point.y, point.low[1], point.high[1]])),
    )
    line = Markup('<line class="error" x1="{:.1f}" x2="{:.1f}" y1="{:.1f}" y2="{:.1f}"/>')
    across = line.format(x_low, x_high, y, y) if np.isfinite([x_low, x_high]).all() else Markup()
    return across + (line.format(x, x, y_low, y_high) if np.isfinite([y_low, y_high]).all() else Markup())


def _bar_boxes(frame: Frame, point: Point) -> list[Box]:
    """The error bars as thin rectangles."""
    (left, x, right), (bottom, y, top) = (
        frame.across(np.array([point.low[0], point.x, point.high[0]])),
        frame.down(np.array([point.low[1], point.y, point.high[1]])),
    )
    boxes = [Box(left, y - 1, right, y + 1), Box(x - 1, top, x + 1, bottom)]
    return [box for box in boxes if np.isfinite([box.left, box.top, box.right, box.bottom]).all()]


def _better_corner(frame: Frame, better: tuple[str, str]) -> Markup:
    """A word in the corner where both are better."""
    right, up = better[0] == "higher", better[1] == "higher"
    arrow = {(True, True): "↗", (False, True): "↖", (True, False): "↘", (False, False): "↙"}[right, up]
    text = f"better {arrow}" if right else f"{arrow} better"
    area = _area(frame)
    x, y = (area.right - 6 if right else area.left + 6), (area.top + 14 if up else area.bottom - 7)
    mark = Markup('<text class="corner" x="{:.0f}" y="{:.0f}" text-anchor="{}">{}</text>')
    return mark.format(x, y, "end" if right else "start", text)


def _area(frame: Frame) -> Box:
    (left, right), (bottom, top) = (
        frame.across(np.array([frame.x.low, frame.x.high])),
        frame.down(np.array([frame.y.low, frame.y.high])),
    )
    return Box(left, top, right, bottom)


def _labels(frame: Frame, points: Sequence[Point], x: np.ndarray, y: np.ndarray) -> Markup:
    """Each name beside its point, where it covers least; far ones get a thin line to their point."""
    dots = [Box(a - 5, b - 5, a + 5, b + 5) for a, b in zip(x, y, strict=True)]
    placed = [box for point in points for box in _bar_boxes(frame, point)]
    text = Markup('<text class="name" x="{:.1f}" y="{:.1f}">{}</text>')
    leader = Markup('<line class="leader" x1="{:.1f}" x2="{:.1f}" y1="{:.1f}" y2="{:.1f}"/>')
    parts = []
    for place in np.argsort(y, kind="stable"):
        name, dot = points[place].name, dots[place]
        others = [*placed, *(box for box in dots if box is not dot)]
        box = min(_places(x[place], y[place], _LETTER * len(name)), key=lambda b: _cost(b, others, _area(frame), dot))
        placed.append(box)
        nearest = float(np.clip(x[place], box.left, box.right)), float(np.clip(y[place], box.top, box.bottom))
        if np.hypot(nearest[0] - x[place], nearest[1] - y[place]) > 14:
            parts.append(leader.format(x[place], nearest[0], y[place], nearest[1]))
        parts.append(text.format(box.left, box.bottom - 3, name))
    return Markup("").join(parts)


def _places(x: float, y: float, width: float) -> list[Box]:
    """Where a label may stand, the best first."""
    found = []
    for away in (7.0, 20.0, 36.0, 54.0, 74.0):
        for across, down in ((1, 0), (-1, 0), (0, -1), (0, 1), (1, -1), (1, 1), (-1, -1), (-1, 1)):
            middle = y + down * (away + (_LINE / 2 if across == 0 else 2))
            left = x + across * away - (0 if across > 0 else width if across < 0 else width / 2)
            found.append(Box(left, middle - _LINE / 2, left + width, middle + _LINE / 2))
    return found


def _cost(box: Box, others: Sequence[Box], area: Box, own: Box) -> float:
    """Area that a label hides, counted again outside the chart, and a little for its distance."""
    inside = box.overlap(area)
    outside = (box.right - box.left) * (box.bottom - box.top) - inside
    x, y = (own.left + own.right) / 2, (own.top + own.bottom) / 2
    distance = abs(np.clip(x, box.left, box.right) - x) + abs(np.clip(y, box.top, box.bottom) - y)
    return sum(box.overlap(other) for other in others) + 4 * outside + 0.4 * float(distance)


@dataclass(frozen=True)
class _RankAxis:
    """Ranks 1..methods over a fixed length, with `side` units for names at either end."""

    methods: int
    side: float

    def at(self, rank: float) -> float:
        return self.side + (rank - 1) / (self.methods - 1) * _RANKS_AXIS


def rank_diagram(names: Sequence[str], ranking: Ranking, description: str) -> Markup:
    """Average ranks on an axis, 1 at the left; bars join what the critical difference does not tell apart."""
    order = np.argsort(ranking.average, kind="stable")
    half = (len(order) + 1) // 2
    axis = _RankAxis(len(names), 58 + _LETTER * max(len(name) for name in names))
    bars, levels = _level_bars(ranking)
    rows = _RANKS_TOP + 18 + _BAR * levels
    # the outermost has the uppermost row on its side, so that no line crosses another
    left = _named_ranks(names, ranking.average, order[:half], axis, rows, to_left=True)
    right = _named_ranks(names, ranking.average, order[half:][::-1], axis, rows, to_left=False)
    start = Markup(
        '<svg class="chart ranks" width="{w:.0f}" height="{h}" viewBox="0 0 {w:.0f} {h}" role="img" aria-label="{}">'
    ).format(description, w=2 * axis.side + _RANKS_AXIS, h=rows + _ROW * half)
    parts = (_critical_bar(axis, ranking.critical_difference), _rank_ticks(axis), left, right)
    return start + Markup("").join(parts) + _bars(axis, bars) + Markup("</svg>")


def _level_bars(ranking: Ranking) -> tuple[list[tuple[float, float, int]], int]:
    """From rank, to rank and height of every bar, so that none lies on another; and the number of heights."""
    ends: list[float] = []
    bars = []
    for group in level_groups(ranking.average, ranking.critical_difference):
        low, high = float(ranking.average[group].min()), float(ranking.average[group].max())
        height = next((place for place, end in enumerate(ends) if end < low), len(ends))
        ends[height : height + 1] = [high]
        bars.append((low, high, height))
    return bars, len(ends)


def _bars(axis: _RankAxis, bars: Sequence[tuple[float, float, int]]) -> Markup:
    bar = Markup('<line class="level" x1="{:.1f}" x2="{:.1f}" y1="{y}" y2="{y}"/>')
    return Markup("").join(
        bar.format(axis.at(low) - 3, axis.at(high) + 3, y=_RANKS_TOP + 11 + _BAR * height) for low, high, height in bars
    )


def _critical_bar(axis: _RankAxis, critical: float) -> Markup:
    """The critical difference as a length, above the axis; cut where it is longer."""
    longer = 1 + critical > axis.methods
    text = f"critical difference {critical:.2f}" + (", longer than the axis" if longer else "")
    mark = Markup(
        '<path class="critical" d="M{left:.1f} 16v8m0-4H{right:.1f}{}"/>'
        '<text class="name" x="{left:.1f}" y="11">{}</text>'
    )
    right = axis.at(axis.methods if longer else 1 + critical)
    return mark.format("" if longer else "m0-4v8", text, left=axis.at(1), right=right)


def _rank_ticks(axis: _RankAxis) -> Markup:
    line = Markup('<line class="rule" x1="{:.1f}" x2="{:.1f}" y1="{y}" y2="{y}"/>')
    tick = Markup(
        '<line class="rule" x1="{x:.1f}" x2="{x:.1f}" y1="{}" y2="{}"/>'
        '<text x="{x:.1f}" y="{}" text-anchor="middle">{}</text>'
    )
    step = -(-axis.methods // 13)
    ticks = Markup("").join(
        tick.format(_RANKS_TOP - 5, _RANKS_TOP, _RANKS_TOP - 9, rank, x=axis.at(rank))
        for rank in range(1, axis.methods + 1, step)
    )
    name = Markup('<text class="axis" x="{:.1f}" y="{}" text-anchor="start">average rank, 1 is best</text>')
    ends = line.format(axis.at(1), axis.at(axis.methods), y=_RANKS_TOP)
    return ends + ticks + name.format(axis.at(axis.methods) + 10, _RANKS_TOP + 4)


def _named_ranks(
    names: Sequence[str], average: np.ndarray, order: np.ndarray, axis: _RankAxis, top: int, to_left: bool
) -> Markup:
    """From the axis down to a row each, and to the name at the side."""
    end, away, anchor = (axis.at(1), -1, "end") if to_left else (axis.at(axis.methods), 1, "start")
    mark = Markup(
        '<path class="leader" d="M{x:.1f} {}V{y}H{:.1f}"/>'
        '<text class="name" x="{:.1f}" y="{below}" text-anchor="{}">{} <tspan class="soft">{:.2f}</tspan></text>'
    )
    return Markup("").join(
        mark.format(
            *(_RANKS_TOP, end + 14 * away, end + 19 * away, anchor, names[method], average[method]),
            **{"x": axis.at(average[method]), "y": top + _ROW * row, "below": top + _ROW * row + 4},
        )
        for row, method in enumerate(order)
    )
