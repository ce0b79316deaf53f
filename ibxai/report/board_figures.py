"""The figures of a leaderboard's table: insertion against deletion, curves of all methods, ranks and pairs.

Every figure says what it shows, over how many rows or groups, and what to read from it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup

from ibxai.report.charts import CONTEXT, LINES_IN_A_CHART, Line, line_chart
from ibxai.report.columns import Column
from ibxai.report.comparisons import Comparison
from ibxai.report.curves import MeanCurve, kind_of
from ibxai.report.diagrams import Point, rank_diagram, scatter
from ibxai.report.render import fixed, number, span

_INTERVALS = "95\N{NARROW NO-BREAK SPACE}% bootstrap intervals"
MOST_SHOWN = 24  # methods in one figure; more are in the tables


@dataclass(frozen=True)
class Figure:
    """panels: one chart, or one a method with its name. legend: style and name, where a chart has several lines.

    counted: how many rows. reading: what to look for.
    """

    title: str
    panels: list[tuple[str, Markup]]
    legend: list[tuple[int, str]]
    counted: str
    reading: str


@dataclass(frozen=True)
class PairCell:
    """Row method minus column method. sign: "better", "worse" or "" (no difference is shown). told: all of it."""

    difference: str
    n: int
    sign: str
    told: str


@dataclass(frozen=True)
class Differences:
    """What is known of the differences in one metric. diagram: average ranks, or None.

    names and cells: the matrix, ordered by the mean, best first; names is empty where there are too many methods.
    same_n: the rows of every pair, where that is one number. best: the names of the best group. apart: the names of
    runs that have the metric and are not compared.
    """

    column: Column
    diagram: Markup | None
    names: list[str]
    cells: list[list[PairCell | None]]
    same_n: int | None
    best: list[str]
    methods: int
    shown_pairs: int
    apart: list[str]


@dataclass(frozen=True)
class BoardFigures:
    scatters: list[Figure]
    curves: list[Figure]
    differences: list[Differences]


def board_figures(
    names: Sequence[str], curves: Sequence[Mapping[str, MeanCurve]], columns: Sequence[Column], places: str
) -> BoardFigures:
    """names, curves: one entry a run of the table; curves by the run's own label of the metric. places: see `Run`."""
    return BoardFigures(
        scatters=[_scatter(names, *pair) for pair in insertion_deletion_pairs(columns)],
        curves=[figure for column in columns if (figure := _curves(names, curves, column, places)) is not None],
        differences=[_differences(names, c) for c in columns if c.better and len(c.places) > 1],
    )


def insertion_deletion_pairs(columns: Sequence[Column]) -> list[tuple[Column, Column]]:
    """Each insertion with the deletion of its name (insertion_chexplain, deletion_chexplain) and of the most alike
    settings, where at least two methods have both."""
    pairs = []
    for insertion in columns:
        if not insertion.is_main or not insertion.key.name.startswith("insertion"):
            continue
        wanted = insertion.key.name.replace("insertion", "deletion", 1)
        rivals = [column for column in columns if column.is_main and column.key.name == wanted]
        if rivals:
            deletion = max(rivals, key=lambda column: _alike(insertion, column))
            if len(_both(insertion, deletion)) > 1 and insertion.better and deletion.better:
                pairs.append((insertion, deletion))
    return pairs


def _both(one: Column, other: Column) -> list[int]:
    """The compared runs that have a mean in both columns."""
    return [p for p in one.places if p in other.places and one.has_mean(p) and other.has_mean(p)]


def _alike(one: Column, other: Column) -> int:
    """How many settings two columns have in common."""
    ours, theirs = one.key.settings, other.key.settings
    return sum(ours[name] == theirs[name] for name in ours.keys() & theirs.keys())


def _scatter(names: Sequence[str], insertion: Column, deletion: Column) -> Figure:
    points, counts = [], []
    for place in _both(insertion, deletion):
        x, y = deletion.cells[place], insertion.cells[place]
        assert x is not None
        assert y is not None
        points.append(Point(names[place], x.mean, y.mean, (x.low, y.low), (x.high, y.high)))
        counts += [x.n, y.n]
    named = len(points) <= MOST_SHOWN
    title = f"{insertion.title} against {deletion.title}"
    labels = [f"{column.title} AUC ({column.better} is better)" for column in (deletion, insertion)]
    svg = scatter(points, title, labels[0], labels[1], (deletion.better, insertion.better), named)
    return Figure(
        title=title,
        panels=[("", svg)],
        legend=[],
        counted=f"n = {span(counts, 'row')} a method; error bars are {_INTERVALS} of the means.",
        reading="A good method lies toward the corner marked “better”. Error bars that overlap are no proof of a tie: "
        "the paired comparison below is sharper." + ("" if named else " Names show under the pointer."),
    )


def _curves(
    names: Sequence[str], curves: Sequence[Mapping[str, MeanCurve]], column: Column, places: str
) -> Figure | None:
    """The mean curves of a metric: together up to four methods, above that a panel each before all others in grey."""
    if not column.is_main:
        return None
    known = {}
    for place in column.places:
        label = column.labels[place]
        if label is not None and label in curves[place]:
            known[place] = curves[place][label]
    order = _best_first(column, list(known))[:MOST_SHOWN]
    if len(order) < 2:
        return None  # the run's own page shows it
    kind = kind_of(column.key, places)
    together = len(order) <= LINES_IN_A_CHART
    axis = kind.axis([known[place].line(0) for place in order])

    def chart(lines: Sequence[Line], who: str, width: int, height: int) -> Markup:
        told = f"{column.title}: mean curve of {who}"
        return line_chart(lines, told, width, height, kind.x_label, kind.y_label, kind.log, axis)

    if together:
        lines = [known[place].line(style) for style, place in enumerate(order)]
        panels = [("", chart(lines, ", ".join(names[place] for place in order), 560, 320))]
    else:
        panels = []
        for place in order:
            behind = [known[other].line(CONTEXT, band=False) for other in order if other != place]
            panels.append((names[place], chart([*behind, known[place].line(0)], names[place], 300, 210)))
    left_out = f" The {MOST_SHOWN} methods with the best means of {len(known)}." if len(known) > MOST_SHOWN else ""
    counts = np.concatenate([known[place].n for place in order])
    return Figure(
        title=f"{column.title}: mean curves",
        panels=panels,
        legend=[(style, names[place]) for style, place in enumerate(order)] if together else [],
        counted=f"n = {span(counts, 'row')} a point; bands are {_INTERVALS}, point by point.{left_out}",
        reading=kind.reading if together else f"{kind.reading} Grey: all other methods; best mean first.".strip(),
    )


def _best_first(column: Column, places: Sequence[int]) -> list[int]:
    """By the mean, in the metric's direction; without a direction as they come, undefined means last."""
    sign = {"higher": -1, "lower": 1, "": 0}[column.better]

    def key(place: int) -> float:
        cell = column.cells[place]
        return sign * cell.mean if cell is not None and np.isfinite(cell.mean) else np.inf

    return sorted(places, key=key)


def _differences(names: Sequence[str], column: Column) -> Differences:
    comparison = column.comparison
    ranks = comparison.ranks
    inside = [names[place] for place in column.places]
    few = len(inside) <= MOST_SHOWN
    diagram = rank_diagram(inside, ranks, f"Average ranks of {column.title}") if ranks is not None and few else None
    order = [column.places.index(place) for place in _best_first(column, column.places)] if few else []
    cells = _matrix(inside, comparison, order)
    counts = set(comparison.pairs["n"])
    return Differences(
        column=column,
        diagram=diagram,
        names=[inside[method] for method in order],
        cells=cells,
        same_n=int(counts.pop()) if len(counts) == 1 else None,
        best=[inside[method] for method in comparison.best_group()],
        methods=len(inside),
        shown_pairs=int((comparison.winners() >= 0).sum()),
        apart=[name for name, cell in zip(names, column.cells, strict=True) if cell is not None and not cell.compared],
    )


def _matrix(names: Sequence[str], comparison: Comparison, order: Sequence[int]) -> list[list[PairCell | None]]:
    """Row minus column, None on the diagonal."""
    place = {method: number for number, method in enumerate(order)}
    cells: list[list[PairCell | None]] = [[None] * len(order) for _ in order]
    if not order:
        return cells
    places = _places(comparison.pairs["difference"].to_numpy())
    for line, winner in zip(comparison.pairs.to_dict("records"), comparison.winners().tolist(), strict=True):
        for row, column, sign in ((line["a"], line["b"], 1), (line["b"], line["a"], -1)):
            low, high = sorted((sign * line["low"], sign * line["high"]))
            told = (
                f"{names[row]} minus {names[column]}: {number(sign * line['difference'])} "
                f"({number(low)} to {number(high)}), {span([line['n']], 'row')}, {span([line['groups']], 'group')}, "
                f"p {number(line['p'])}, by Holm {number(line['p_holm'])}, effect {number(sign * line['effect_size'])}"
            )
            mark = "" if winner < 0 else "better" if winner == row else "worse"
            difference = fixed(sign * line["difference"], places)
            cells[place[row]][place[column]] = PairCell(difference, line["n"], mark, told)
    return cells


def _places(differences: np.ndarray) -> int:
    """Decimal places for a whole matrix: three digits of its largest number."""
    largest = np.nanmax(np.abs(differences)) if np.isfinite(differences).any() else 0
    return int(np.clip(2 - np.floor(np.log10(largest)), 0, 6)) if largest > 0 else 1
