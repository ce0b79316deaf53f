"""Severity: scans whose hot share is planted, so that every grade is known; the statistics against libraries."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import scipy.stats
import sklearn.metrics
import torch
from PIL import Image
from test_datasets_mosmed import archive, dataset
from test_studies import Noise, Small, again, by_cell, table, task_of
from torch import Tensor

from ibxai.backbones import Backbone
from ibxai.cells import Cell, finished_cells, read_cell
from ibxai.errors import BadSample, UserError
from ibxai.identity import study_key
from ibxai.metrics import severity
from ibxai.metrics.severity import Severity, interval, quadratic_kappa, reduced, spearman
from ibxai.metrics.study import Task, run_study
from ibxai.report.board_studies import board_studies
from ibxai.report.studies import read_studies, study_sections
from ibxai.store import RunStore
from ibxai.targets import Classes, Label, Predicted
from ibxai.types import Attribution, Attributor, Batch, Picture, Sample

# share of the lung, in 32nds, that is hot in a study of each grade; its two slices have a bit more and a bit less
HOT = {0: 0, 1: 4, 2: 12, 3: 20, 4: 28}
LEVEL = 0.5


@dataclass(frozen=True)
class Scans:
    """Slices whose left half is lung, in red what a perfect method shows; all beside the lung is hotter than it.

    fold: how many times the planted share the train and the test split show. damaged: slices that cannot be read.
    """

    studies: int = 10
    fold: float = 1.0
    damaged: tuple[str, ...] = ()
    lungs: str = "threshold"
    name: str = "scans"

    class_names = ("healthy", "unhealthy")
    reference_note = "The reference split is the train split."

    def samples(self) -> Sequence[Sample]:
        return self.in_split("test")

    def reference(self) -> Sequence[Sample]:
        return self.in_split("train")

    def in_split(self, split: str) -> Sequence[Sample]:
        names = [f"{split}-{number}" for number in range(self.studies)]
        return [Sample(f"{n}-{s}", n, Path("none"), 0, int(self.grades()[n] > 0)) for n in names for s in (0, 1)]

    def grades(self) -> Mapping[str, int]:
        return {f"{split}-{number}": number % 5 for split in ("train", "test") for number in range(self.studies)}

    def annotations(self) -> str:
        return "left half"

    def read(self, sample: Sample) -> Picture:
        if sample.sample_id in self.damaged:
            raise BadSample("damaged")
        grade, number = self.grades()[sample.group_id], int(sample.sample_id[-1])
        rows = round(HOT[grade] * self.fold) + (0 if grade == 0 else (-2, 2)[number])
        red = np.random.default_rng([grade, number]).integers(0, 60, (32, 32))
        red[:rows] = 200
        red[:, 16:] = 255
        lungs = torch.zeros(1, 32, 32, dtype=torch.bool)
        lungs[:, :, :16] = True
        return Picture(Image.fromarray(np.stack([red, red * 0, red * 0], -1).astype(np.uint8)), {"lungs": lungs})


@dataclass(frozen=True)
class Red:
    """A method whose map is the red of the picture, 0..1. seen: the samples whose map was asked for."""

    seen: list[str] = field(default_factory=list)

    version: ClassVar[int] = 1

    def fit(
        self, backbone: Backbone, reference: Iterable[Batch], seed: int, state: Mapping[str, Tensor] | None = None
    ) -> Attributor:
        def attribute(batch: Batch) -> Attribution:
            self.seen.extend(batch.sample_ids)
            return Attribution(batch.inputs[:, 0] * 0.5 + 0.5, "score")

        return attribute


def task_for(folder: Path, dataset: Any = None, method: Any = None, **changes: Any) -> Task:
    task = task_of(folder, method or Red(), dataset or Scans(), Small(), target=Classes((1,)))
    return replace(task, **changes)


def found_by(study: Severity, task: Task) -> dict[tuple[Any, ...], float]:
    study.check(task)
    return table(study(task))


ABSOLUTE = Severity(rule="absolute", level=LEVEL)


def test_a_perfect_map_gives_every_study_its_grade(tmp_path: Path) -> None:
    task = task_for(tmp_path)
    scores = list(ABSOLUTE(task))
    found = table(scores)
    for grading in ("rule", "calibrated"):
        assert by_cell(scores, "accuracy")["all", grading] == [1.0] * 10
        assert found["all", grading, "quadratic_kappa", ""] == pytest.approx(1)
    assert found["all", "hot share", "spearman", ""] == pytest.approx(1)
    assert found["all", "hot share", "threshold", ""] == LEVEL
    for grade, rows in HOT.items():
        place = f"CT-{grade}", ""
        assert by_cell(scores, "hot_share")[place] == pytest.approx([rows / 32] * 2, abs=1e-3)
        assert by_cell(scores, "rule_grade")[place] == [grade] * 2
        own = [sample for sample in Scans().samples() if task.dataset.grades()[sample.group_id] == grade]  # type: ignore[attr-defined]
        red = [np.asarray(Scans().read(sample).image)[:, :16, 0].mean() / 255 for sample in own]
        assert by_cell(scores, "heat_a_pixel")[place] == pytest.approx([np.mean(red)] * 2, rel=1e-4)


def test_a_method_whose_heat_is_no_amount(tmp_path: Path) -> None:
    """The brighter the slice, the less it says: only the place of the heat tells; scaled, it is planted again."""

    @dataclass(frozen=True)
    class Fading(Red):
        def fit(self, *arguments: Any, **named: Any) -> Attributor:
            plain = super().fit(*arguments, **named)

            def attribute(batch: Batch) -> Attribution:
                red = plain(batch).heatmap
                return Attribution(red / red[:, :, :16].mean((1, 2), keepdim=True) ** 8, "bits")

            return attribute

    task = task_for(tmp_path, method=Fading())
    unscaled = by_cell(replace(ABSOLUTE, level=1e3)(task), "hot_share")
    assert unscaled["CT-0", ""][0] > unscaled["CT-4", ""][0]
    study = replace(ABSOLUTE, scale="slice")
    following = replace(task, cells=type(task.cells)(tmp_path / "scaled", task.cells.key))
    assert by_cell(study(following), "accuracy")["all", "rule"] == [1.0] * 10


def test_calibration_learns_a_bias(tmp_path: Path) -> None:
    """Maps that show half of what is there: the rule's bounds are wrong, those of the train split right."""
    scores = list(ABSOLUTE(task_for(tmp_path, Scans(fold=0.5))))
    assert np.mean(by_cell(scores, "accuracy")["all", "rule"]) < 0.7
    assert by_cell(scores, "accuracy")["all", "calibrated"] == [1.0] * 10


def test_the_threshold_of_healthy_lungs(tmp_path: Path) -> None:
    task = task_for(tmp_path)
    found = found_by(Severity(level=0.9), task)
    healthy = [s for s in Scans().in_split("train") if task.dataset.grades()[s.group_id] == 0]  # type: ignore[attr-defined]
    pixels = np.concatenate([np.asarray(Scans().read(s).image)[:, :16, 0].ravel() for s in healthy]) / 255
    assert found["all", "hot share", "threshold", ""] == pytest.approx(np.quantile(pixels, 0.9), abs=1.01 / 255)
    assert 0.05 < found["CT-0", "", "hot_share", "test-0"] <= 0.1 + 1e-3  # a tenth is above it, by its making


def test_what_is_learnt_is_learnt_on_the_train_split(tmp_path: Path) -> None:
    method = Red()
    task = task_for(tmp_path, method=method)
    made = len(method.seen)  # the run itself
    list(Severity(train_studies=3)(task))
    studies = {name.rpartition("-")[0] for name in method.seen[made:]}
    assert len(studies) == 3
    assert all(name.startswith("train-") for name in studies)
    changed = replace(Scans(), name="other")
    with pytest.raises(UserError, match=r"dataset\.split=test"):
        Severity().check(replace(task, dataset=changed, samples=changed.in_split("train")))


def test_without_the_train_split(tmp_path: Path) -> None:
    method = Red()
    task = task_for(tmp_path, method=method)
    made = len(method.seen)
    scores = list(replace(ABSOLUTE, train_studies=0)(task))
    assert len(method.seen) == made
    assert not any("calibrated" in str(part) for key in table(scores) for part in key)
    assert by_cell(scores, "accuracy")["all", "rule"] == [1.0] * 10


def test_slices_that_cannot_be_read(tmp_path: Path) -> None:
    """Their study is graded by the others, in both splits; a study without any is left out."""
    whole = task_for(tmp_path / "a")
    damaged = Scans(damaged=("train-0-1", "test-3-0", "test-4-0", "test-4-1"))
    task = replace(whole, dataset=damaged, cells=again(task_for(tmp_path / "b")).cells)
    scores = list(ABSOLUTE(task))
    shares = {score.row_id: score.value for score in scores if score.metric == "hot_share"}
    assert len(shares) == 9
    assert shares["test-3"] == pytest.approx((HOT[3] + 2) / 32, abs=1e-3)
    assert "test-4" not in shares


def test_it_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    method = Red()
    task = task_for(tmp_path, method=method)
    with monkeypatch.context() as patched:
        patched.setattr(severity, "quadratic_kappa", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            list(Severity()(task))
    explained = len(method.seen)
    following = again(task)
    assert run_study(Severity(), following) == 7  # the first of the eight is there
    assert len(method.seen) == explained  # and so is the train split
    assert run_study(Severity(), again(task)) == 0


@pytest.mark.parametrize(
    ("study", "changes", "says"),
    [
        (Severity(), {"dataset": Noise()}, "studies with a grade"),
        (Severity(), {"dataset": Scans(lungs="none")}, r"dataset\.lungs=threshold"),
        (Severity(), {"target": Predicted()}, r"target\.ids=\[1\]"),
        (Severity(), {"target": Label()}, r"target\.ids=\[1\]"),
        (Severity(), {"target": Classes((0, 1))}, r"target\.ids=\[1\]"),
    ],
)
def test_what_it_needs(study: Severity, changes: dict[str, Any], says: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=says):
        study.check(task_for(tmp_path, **changes))


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"cuts": (0.5, 0.25)}, "cuts"),
        ({"cuts": (0.5, 1.5)}, "cuts"),
        ({"level": 1.5}, "level"),
        ({"scale": "study"}, "scale"),
        ({"train_studies": 0}, "train_studies"),
        ({"train_studies": -1, "rule": "absolute"}, "train_studies"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=rf"study\.{says}"):
        Severity(**settings)


def test_no_healthy_study_to_compare_with(tmp_path: Path) -> None:
    task = task_for(tmp_path)
    ill = [s for s in Scans().in_split("train") if s.label]
    with pytest.raises(UserError, match="CT-0 study"):
        list(Severity()(replace(task, dataset=Ill(), cells=again(task).cells)))
    assert len(ill) == 16


class Ill(Scans):
    def in_split(self, split: str) -> Sequence[Sample]:
        return [sample for sample in super().in_split(split) if split == "test" or sample.label]


def test_grades_are_the_folders_of_the_archive(tmp_path: Path) -> None:
    archive(tmp_path, {"CT-0": 3, "CT-2": 2, "CT-4": 1})
    scans = dataset(tmp_path)
    grades = scans.grades()
    assert sorted(grades.values()) == [0, 0, 0, 2, 2, 4]
    for sample in (*scans.in_split("train"), *scans.in_split("test")):
        assert f"CT-{grades[sample.group_id]}" in str(sample.source)


# what is kept of a slice


def test_a_thousand_values_stand_for_a_lung() -> None:
    generator = torch.Generator().manual_seed(0)
    heat = torch.randn(4, 90, 90, generator=generator).exp() - 1
    lungs = torch.rand(4, 90, 90, generator=generator) < torch.tensor([0.3, 0.9, 0.0, 0.5])[:, None, None]
    heat[3, 5, 5] = torch.nan
    found = reduced(heat, lungs).numpy()
    assert found[:, -3].tolist() == [int(lungs[0].sum()), int(lungs[1].sum()), 0, 0]
    assert found[:3, -1].tolist() == pytest.approx([float(m.max()) for m in heat[:3]])
    for row in (0, 1):
        own = heat[row][lungs[row]].clamp_min(0).double().numpy()
        assert found[row, -2] == pytest.approx(own.sum())
        for threshold in (0, 0.01, 0.5, 3):
            assert (found[row, :-3] > threshold).mean() == pytest.approx((own > threshold).mean(), abs=1e-3)
    alone = reduced(heat[1:2], lungs[1:2]).numpy()
    assert np.array_equal(alone[0], found[1])


def test_a_small_lung_is_counted_exactly() -> None:
    heat, lungs = torch.tensor([[[1.0, 2.0], [3.0, 4.0]]]), torch.tensor([[[True, True], [True, False]]])
    values = reduced(heat, lungs)[0, :-3]
    assert [float((values == v).double().mean()) for v in (1, 2, 3)] == pytest.approx([1 / 3] * 3, abs=1e-3)


# statistics


@pytest.mark.parametrize("seed", range(3))
def test_kappa_and_spearman_against_libraries(seed: int) -> None:
    draws = np.random.default_rng(seed)
    truth, predicted = draws.integers(0, 5, 60), draws.integers(0, 5, 60)
    predicted = np.where(draws.random(60) < 0.5, truth, predicted)
    wanted = sklearn.metrics.cohen_kappa_score(truth, predicted, weights="quadratic")
    assert quadratic_kappa(predicted, truth) == pytest.approx(wanted)
    shares = np.round(draws.random(60) + truth / 5, 1)
    assert spearman(shares, truth) == pytest.approx(scipy.stats.spearmanr(shares, truth).statistic)
    both = np.stack([predicted, truth]), np.stack([truth, truth])
    assert quadratic_kappa(*both).tolist() == pytest.approx([wanted, 1])
    assert np.isnan(spearman(np.ones(60), truth))
    assert np.isnan(quadratic_kappa(np.ones(60), np.ones(60)))


def test_the_interval_of_a_mean() -> None:
    values = np.random.default_rng(0).normal(3, 2, 200)
    low, high = interval(lambda own: own.mean(-1), values)
    assert (high - low) / 3.92 == pytest.approx(values.std() / np.sqrt(200), rel=0.05)
    assert low < values.mean() < high
    assert np.isnan(interval(lambda own: own.mean(-1), values[:1])).all()
    assert np.isnan(interval(spearman, np.ones(5), np.ones(5))).all()


# tables and pages


def test_tables_and_pages(tmp_path: Path) -> None:
    results = []
    for name in ("a", "b"):
        task = task_for(tmp_path / name)
        key = study_key("severity", ABSOLUTE, Scans().samples(), Scans())
        task = replace(task, cells=type(task.cells)(task.cells.folder.parent, key))
        run_study(ABSOLUTE, task)
        results.append(read_studies(task.run.path))
    [section] = study_sections(RunStore(tmp_path / "a" / "run"))
    assert section.finished
    assert section.header[:2] == ["studies", "grading"]
    assert [line[:2] for line in section.lines[:3]] == [["all", "hot share"], ["all", "rule"], ["all", "calibrated"]]
    [chart] = section.charts
    assert "CT-4" in chart.svg
    assert "Accuracy: rule 1 (1 to 1); calibrated 1 (1 to 1). Quadratic kappa: rule 1 (1 to 1)" in chart.note
    [kappa] = [
        e for e in results[0][0].table.to_dict("records") if e["metric"] == "quadratic_kappa" and e["grading"] == "rule"
    ]
    assert kappa["low"] <= kappa["value"] <= kappa["high"]
    assert (tmp_path / "a" / "run" / "studies.csv").read_text().count("quadratic_kappa") == 2
    [board] = board_studies(["one", "two"], results)
    assert [figure.title for figure in board.figures] == ["Hot share of the lung", "Quadratic kappa", "Accuracy"]


def test_intervals_of_totals_are_kept(tmp_path: Path) -> None:
    task = task_for(tmp_path)
    cell = Cell({"a": 1}, totals={"kappa": 0.5}, intervals={"kappa": (0.25, float("nan"))})
    task.cells.get({"a": 1}, lambda: cell)
    [path] = [p for p in task.cells.folder.glob("*.json") if p.name != "settings.json"]
    kept = read_cell(path)
    assert kept is not None
    assert kept.intervals["kappa"][0] == 0.25
    assert np.isnan(kept.intervals["kappa"][1])
    assert len(finished_cells(task.cells.folder)) == 1


def test_annotations_are_part_of_its_name() -> None:
    names = {study_key("severity", Severity(), [], replace(Scans(), name=n)).folder for n in ("a", "b")}
    assert len(names) == 1
    other = type("Other", (Scans,), {"annotations": lambda self: "right half"})()
    assert study_key("severity", Severity(), [], other).folder not in names
