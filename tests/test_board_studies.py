"""The studies of several methods side by side: who is compared with whom, and where each line runs."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from ibxai.cells import Cell, Cells
from ibxai.report.board_studies import board_studies
from ibxai.report.charts import LINES_IN_A_CHART
from ibxai.report.studies import StudyResult, read_studies
from ibxai.store import MetricKey

ROAR = MetricKey("roar", {"fractions": [0.5]})
STEPS = MetricKey("parameter_randomization", {"cells": 1, "samples": "abc"})


def roar(folder: Path, method: str, accuracy: float, finished: bool = True) -> list[StudyResult]:
    """Whole pictures .9, the control .8 in two repeats (.7, .9), the method as given."""
    cells = Cells(folder / method / "studies", ROAR)
    places = [(0.0, "untouched", 0.9), (0.5, method, accuracy), (0.5, "random_control", 0.8)]
    for repeat, shift in enumerate((-0.1, 0.1)):
        for fraction, estimator, value in places:
            place = {"fraction": fraction, "estimator": estimator, "repeat": repeat}
            cells.get(place, lambda p=place, v=value + shift: Cell(p, totals={"accuracy": v}))
    if finished:
        cells.finish()
    return read_studies(folder / method)


def steps(folder: Path, method: str, similarity: float, key: MetricKey = STEPS) -> list[StudyResult]:
    cells = Cells(folder / method / "studies", key)
    for order in ("cascading", "independent"):
        for step, value in enumerate((1.0, similarity)):
            place = {"order": order, "step": step, "layer": "fc"}
            values = {"ssim": [value, value], "pearson": [value, value]}
            cells.get(place, lambda p=place, v=values: Cell(p, ("a@0", "b@0"), ("a", "b"), v))
    cells.finish()
    return read_studies(folder / method)


def points_of(svg: str, style: str) -> list[list[tuple[float, float]]]:
    found = re.findall(rf'<polyline class="line line-{style}" points="([^"]*)"', svg)
    return [[tuple(map(float, point.split(","))) for point in line.split()] for line in found]  # type: ignore[misc]


def test_roar_of_two_methods(tmp_path: Path) -> None:
    results = [roar(tmp_path, "iba", 0.4), roar(tmp_path, "gradcam", 0.6, finished=False)]
    [study] = board_studies(["iba (beta = 5)", "gradcam"], results)
    assert study.unfinished == ["gradcam"]
    [figure] = study.figures
    # the control is trained with the same seeds in every run: it stands once
    assert [name for _, name in figure.legend] == ["iba (beta = 5)", "random control", "gradcam"]
    [(_, svg)] = figure.panels
    heights = {name: points_of(svg, str(style))[0] for style, name in figure.legend}
    starts = {line[0] for line in heights.values()}
    assert len(starts) == 1  # whole pictures belong to every line
    top = starts.pop()[1]
    drops = {name: line[1][1] - top for name, line in heights.items()}  # downward is larger in an SVG
    assert drops["gradcam"] / drops["random control"] == pytest.approx(3, rel=0.02)
    assert drops["iba (beta = 5)"] / drops["random control"] == pytest.approx(5, rel=0.02)


def test_steps_have_a_figure_an_order_and_metric(tmp_path: Path) -> None:
    results = [steps(tmp_path, "iba", 0.5), steps(tmp_path, "gradient", 0.2)]
    [study] = board_studies(["iba", "gradient"], results)
    titles = ["ssim, cascading", "pearson, cascading", "ssim, independent", "pearson, independent"]
    assert [figure.title for figure in study.figures] == titles
    assert all("n = 2 rows" in figure.counted for figure in study.figures)
    assert study.unfinished == []


def test_many_methods_get_a_panel_each(tmp_path: Path) -> None:
    names = [f"method_{i}" for i in range(LINES_IN_A_CHART + 1)]
    [study] = board_studies(names, [steps(tmp_path, name, i / 10) for i, name in enumerate(names)])
    figure = study.figures[0]
    assert [name for name, _ in figure.panels] == names
    assert figure.legend == []
    for _, svg in figure.panels:
        assert len(points_of(svg, "0")) == 1
        assert len(points_of(svg, "context")) == LINES_IN_A_CHART


def test_what_is_not_compared(tmp_path: Path) -> None:
    ours = steps(tmp_path / "a", "iba", 0.5)
    other_rows = steps(tmp_path / "b", "gradcam", 0.5, replace(STEPS, settings={**STEPS.settings, "samples": "xyz"}))
    assert board_studies(["iba", "gradcam"], [ours, other_rows]) == []
    assert board_studies(["iba"], [ours]) == []
    assert board_studies(["iba", "gradcam"], [ours, []]) == []


def test_two_settings_of_a_study_are_told_apart(tmp_path: Path) -> None:
    coarse = replace(STEPS, settings={**STEPS.settings, "cells": 5})
    results = [
        [*steps(tmp_path / "a", name, 0.5), *steps(tmp_path / "b", name, 0.4, coarse)] for name in ("iba", "gradcam")
    ]
    found = board_studies(["iba", "gradcam"], results)
    assert {study.variant for study in found} == {"cells = 1", "cells = 5"}
