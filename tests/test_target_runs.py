"""Whole runs whose target is no class: a regression, and one of several labels; and what their report says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from test_pipeline import TinyData, TinyNet, lines_of, pictures, plan  # noqa: F401

from ibxai.metrics.insertion import Insertion
from ibxai.metrics.pearson import SeverityCorrelation
from ibxai.pipeline import Plan, run
from ibxai.store import RunStore
from ibxai.targets import MultiLabel, Regression
from ibxai.types import Picture, Sample


@dataclass(frozen=True)
class GradedData(TinyData):
    """Of the values of each sample 'b' has none. The severity rises from left to right, to 3."""

    def samples(self) -> Sequence[Sample]:
        own = super().samples()
        return [s if s.sample_id == "b" else replace(s, values=(float(i), 0.0)) for i, s in enumerate(own)]

    def read(self, sample: Sample) -> Picture:
        picture = super().read(sample)
        columns = torch.linspace(0, 3, picture.image.width).round()
        return Picture(picture.image, {"severity": columns.expand(1, picture.image.height, -1).clone()})

    def annotations(self) -> str:
        return "one"


def outputs(graded: Plan) -> dict[str, np.ndarray]:
    """What the network says of each picture, read without the pipeline."""
    backbone = TinyNet().load(8)
    said = {}
    for sample in graded.dataset.samples():
        inputs, _ = backbone.preprocessing(graded.dataset.read(sample))
        with torch.no_grad():
            said[sample.sample_id] = backbone(inputs[None])[0].numpy()
    return said


@pytest.fixture
def graded(plan: Plan) -> Plan:  # noqa: F811
    return replace(plan, dataset=GradedData(plan.dataset.root))  # type: ignore[attr-defined]


def test_a_regression_runs_and_is_reported_as_one(graded: Plan) -> None:
    metrics = {"insertion": Insertion(score="value"), "pearson": SeverityCorrelation()}
    outcome = run(replace(graded, target=Regression("deviation", 1), metrics=metrics))
    assert outcome.rows == outcome.new_heatmaps == 7
    assert not outcome.skipped
    said = outputs(graded)
    store = RunStore(outcome.folder)
    for row in store.rows():
        stored = store.read_heatmap(row.row_id)
        assert row.target == "1"
        assert stored.target_value == pytest.approx(float(said[row.sample_id][1]), abs=1e-5)
        assert np.isnan([stored.target_probability, stored.prediction_probability]).all()
    values = [float(line["value"]) for line in lines_of(outcome.folder / "metrics.csv") if "pearson" in line["metric"]]
    assert len(values) == 7
    assert np.isfinite(values).all()
    page = (outcome.folder / "report.html").read_text(encoding="utf-8")
    assert page.count("of which the network says") == 2  # the rows that are shown
    assert "predicts something else" not in page
    assert "the prediction is wrong" not in page
    assert run(replace(graded, target=Regression("deviation", 1), metrics=metrics)).new_heatmaps == 0


def test_a_sample_without_the_value_that_mse_needs_is_skipped(graded: Plan) -> None:
    outcome = run(replace(graded, target=Regression("mse", 0)))
    assert set(outcome.skipped) == {"b"}
    assert "no value for output 0" in outcome.skipped["b"]
    assert outcome.rows == 6


def test_an_output_that_the_network_does_not_have(graded: Plan) -> None:
    from ibxai.errors import UserError

    with pytest.raises(UserError, match="class 9 does not exist"):
        run(replace(graded, target=Regression("deviation", 9)))


def test_labels_run_with_sigmoids(graded: Plan) -> None:
    outcome = run(replace(graded, target=MultiLabel((2, 0))))
    assert outcome.rows == 14
    said = outputs(graded)
    store = RunStore(outcome.folder)
    for row in store.rows():
        stored, logits = store.read_heatmap(row.row_id), said[row.sample_id].astype(np.float64)
        assert stored.target == int(row.target)
        assert stored.target_probability == pytest.approx(1 / (1 + np.exp(-logits[stored.target])), abs=1e-6)
        assert stored.prediction == logits.argmax()
        assert stored.prediction_probability == pytest.approx(1 / (1 + np.exp(-logits.max())), abs=1e-6)


def test_the_kind_of_target_names_the_run(graded: Plan) -> None:
    targets = (Regression("deviation", 0), Regression("rm", 0), Regression("deviation", 1), MultiLabel((0,)))
    folders = {run(replace(graded, target=target, limit=1)).folder for target in targets}
    assert len(folders) == 4
