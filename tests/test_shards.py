"""Shards of a run: together they leave what one process leaves, in any order, at once, and with bad samples."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import test_pipeline
from test_pipeline import assert_same_results, files_of_run, pictures, plan  # noqa: F401  (fixtures)
from test_resume import finish, folder_of, start, tiny, undisturbed_tiny  # noqa: F401

from ibxai import pipeline
from ibxai.cells import Cell, Cells
from ibxai.errors import UserError
from ibxai.jobs import _explain
from ibxai.pipeline import Outcome, Plan, run
from ibxai.report import finish_runs
from ibxai.sessions import summed
from ibxai.shards import Shard, parse_shard
from ibxai.store import MetricKey, RunStore
from ibxai.targets import Label
from ibxai.types import Score, Study


@pytest.mark.parametrize("count", [1, 2, 3, 7, 9])
def test_every_item_is_in_one_shard(count: int) -> None:
    items = list(range(7))
    parts = [Shard(number, count).part(items) for number in range(1, count + 1)]
    assert sorted(item for part in parts for item in part) == items
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    for number, part in enumerate(parts, start=1):
        assert [item for item in items if Shard(number, count).has(item)] == part


@pytest.mark.parametrize("text", ["", "0/2", "3/2", "1", "1/0", "-1/2", "1/2/3", "a/b", "1.0/2", "²/3", "1/9999999"])
def test_what_is_no_shard(text: str) -> None:
    with pytest.raises(UserError, match="i/n is expected"):
        parse_shard(text)


def test_what_is_one() -> None:
    assert parse_shard(None) is None
    assert parse_shard("2/4") == Shard(2, 4)
    assert str(Shard(2, 4)) == "2/4"


def told(outcome: Outcome) -> dict[str, Any]:
    return json.loads((outcome.folder / "provenance.json").read_text())


@pytest.mark.parametrize("order", [(1, 2, 3), (3, 1, 2)])
def test_shards_leave_what_one_process_leaves(plan: Plan, tmp_path: Path, order: tuple[int, ...]) -> None:  # noqa: F811
    """Two samples have no label: each is skipped in a shard of its own."""
    plan = replace(plan, target=Label())
    whole = run(replace(plan, outputs=tmp_path / "whole"))
    for number in order[:-1]:
        outcome = run(replace(plan, shard=Shard(number, 3)))
        assert outcome.missing > 0
        assert not outcome.report.exists()
        assert told(outcome)["finished"] is None
    last = run(replace(plan, shard=Shard(order[-1], 3)))
    assert last.missing == 0
    assert last.folder.name == whole.folder.name
    assert_same_results(whole.folder, last.folder)
    for name in ("metrics.csv", "summary.csv", "samples.csv", "skipped.csv"):
        assert (last.folder / name).read_bytes() == (whole.folder / name).read_bytes()
    made = {name for name in files_of_run(last.folder) if name.startswith(("pictures/", "overlays/", "heatmaps/"))}
    assert made <= files_of_run(whole.folder), "the first rows of the run have their picture, not those of each shard"
    assert len(made) == 5 + 2 * 2
    sums = told(last)
    assert sums["passes"] == told(whole)["passes"], "those of all three"
    assert sums["sessions"] == 3
    assert sums["finished"]
    again = run(replace(plan, shard=Shard(1, 3)))
    assert (again.new_heatmaps, again.missing) == (0, 0)
    assert run(plan).new_heatmaps == 0


def test_a_shard_that_ends_while_another_looks_at_the_rows_is_not_forgotten(
    plan: Plan,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The first shard sees rows missing; the second does these and ends the run; then the first goes on."""
    look = pipeline._missing

    def slowly(shard: Plan, *rest: Any) -> int:
        found = look(shard, *rest)
        if shard.shard == Shard(1, 2):
            run(replace(plan, shard=Shard(2, 2)))
        return found

    monkeypatch.setattr(pipeline, "_missing", slowly)
    outcome = run(replace(plan, shard=Shard(1, 2)))
    assert outcome.missing == 3
    assert RunStore(outcome.folder).is_reported()


def killed_before_the_page(plan: Plan) -> None:  # noqa: F811
    """All that a run does to its rows, and not what comes behind them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "_missing", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run(plan)


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def test_a_report_ends_a_run_whose_last_shard_was_killed_behind_its_rows(plan: Plan, tmp_path: Path) -> None:  # noqa: F811
    plan = replace(plan, target=Label())  # two samples have none and are skipped
    whole = run(replace(plan, outputs=tmp_path / "whole"))
    outcome = run(replace(plan, shard=Shard(1, 2)))
    assert finish_runs(plan.outputs) == [], "half of the rows are missing"
    killed_before_the_page(replace(plan, shard=Shard(2, 2)))
    assert not outcome.report.exists()
    assert finish_runs(plan.outputs) == [outcome.report]
    for name in ("metrics.csv", "summary.csv", "samples.csv", "skipped.csv"):
        assert (outcome.folder / name).read_bytes() == (whole.folder / name).read_bytes()
    assert told(outcome)["passes"] == told(whole)["passes"]
    assert RunStore(outcome.folder).is_reported()
    assert finish_runs(plan.outputs) == []


def test_a_report_ends_no_run_that_lacks_scores_or_cells(plan: Plan, with_study: Plan) -> None:  # noqa: F811
    killed_before_the_page(replace(with_study, limit=2))
    assert finish_runs(plan.outputs) == [], "the study has not begun"
    killed_before_the_page(replace(plan, limit=2))
    [folder] = [path.parent for path in plan.outputs.glob("*/*/*/*/provenance.json")]
    assert finish_runs(plan.outputs) == [folder / "report.html"], "which only the command before this one wanted"
    assert len(test_pipeline.lines_of(folder / "metrics.csv")) == 4
    killed_before_the_page(plan)
    next((folder / "scores").glob("*/*.npz")).unlink()
    assert finish_runs(plan.outputs) == []


def test_a_shard_that_is_started_again_does_nothing_twice(plan: Plan) -> None:  # noqa: F811
    first = run(replace(plan, shard=Shard(1, 2)))
    test_pipeline.EXPLAINED.clear()
    again = run(replace(plan, shard=Shard(1, 2)))
    assert test_pipeline.EXPLAINED == []
    assert (first.rows, again.rows, again.missing) == (4, 4, 3)


def test_other_cuts_of_a_run_go_together(plan: Plan, tmp_path: Path) -> None:  # noqa: F811
    """One half by a shard, one sample by a limit, the rest by the whole run."""
    run(replace(plan, shard=Shard(2, 2)))
    run(replace(plan, limit=1))
    last = run(plan)
    assert last.new_heatmaps == 3
    assert_same_results(run(replace(plan, outputs=tmp_path / "whole")).folder, last.folder)


def test_more_shards_than_samples(plan: Plan) -> None:  # noqa: F811
    outcome = run(replace(plan, limit=2, shard=Shard(3, 3)))
    assert (outcome.rows, outcome.missing) == (0, 2)


def test_what_a_shard_tells_its_user(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("ibxai.jobs.make_plan", lambda *_: None)
    for missing, says in ((3, "3 rows of other shards"), (1, "1 row of other shards"), (0, "report: ")):
        outcome = Outcome(tmp_path, tmp_path / "report.html", 4, 4, 4, {}, 0, missing)
        monkeypatch.setattr("ibxai.pipeline.run", lambda _, told=outcome: told)
        assert _explain(None, {}, {}, "").lines[-1].startswith(says)  # type: ignore[arg-type]


def test_two_shards_at_once(tiny: list[str], undisturbed_tiny: Path, tmp_path: Path) -> None:  # noqa: F811
    outputs = tmp_path / "outputs"
    both = [start(outputs, *tiny, f"shard={number}/2", "method.seconds=0.1") for number in (1, 2)]
    for process in both:
        finish(process)
    assert_same_results(undisturbed_tiny, folder_of(outputs))
    assert (folder_of(outputs) / "report.html").exists()
    assert RunStore(folder_of(outputs)).provenance()["finished"]
    assert not list(outputs.rglob("*.tmp"))


# studies


class Counted:
    """A study of five cells that says which were computed."""

    version = 1

    def __init__(self, fails: bool = False) -> None:
        self.computed: list[int] = []
        self.fails = fails

    def check(self, task: Any) -> None: ...

    def __call__(self, task: Any) -> Any:
        for number in range(5):
            if self.fails and number == 2:
                raise UserError("the third cell cannot be made.")

            def compute(number: int = number) -> Cell:
                self.computed.append(number)
                return Cell({"number": number}, totals={"square": number**2})

            yield from task.cells.get({"number": number}, compute).scores()


def test_a_shard_begins_with_its_own_cells(tmp_path: Path) -> None:
    cells, study = Cells(tmp_path, MetricKey("counted", {})), Counted()

    class Task:
        pass

    task = Task()
    task.cells = cells  # type: ignore[attr-defined]
    with cells.of_shard(Shard(2, 2)):
        scores: list[Score] = list(study(task))
    assert study.computed == [1, 3]
    assert [score.value for score in scores] == [1.0, 9.0]
    assert [score.value for score in study(task)] == [0.0, 1.0, 4.0, 9.0, 16.0]
    assert study.computed == [1, 3, 0, 2, 4]
    cells.finish()
    asked = json.loads((cells.folder / "finished.json").read_text())["cells"]
    assert asked == [{"number": number} for number in range(5)]


@pytest.fixture
def with_study(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> Plan:  # noqa: F811
    monkeypatch.setattr("ibxai.pipeline.study_key", lambda *_: MetricKey("counted", {}))
    study: Study = Counted()  # type: ignore[assignment]
    return replace(plan, study=study, study_name="counted")


def test_the_study_waits_for_the_heatmaps_of_all_shards(with_study: Plan) -> None:
    first = run(replace(with_study, shard=Shard(1, 2)))
    assert (first.new_cells, first.missing) == (0, 3)
    last = run(replace(with_study, shard=Shard(2, 2)))
    assert (last.new_cells, last.missing) == (5, 0)
    assert with_study.study.computed == [1, 3, 0, 2, 4]  # type: ignore[union-attr]
    assert run(with_study).new_cells == 0


def test_a_mistake_in_a_study_leaves_the_page_of_what_was_finished(with_study: Plan) -> None:
    study: Study = Counted(fails=True)  # type: ignore[assignment]
    with pytest.raises(UserError, match="third cell"):
        run(replace(with_study, study=study))
    [folder] = [path.parent for path in with_study.outputs.glob("*/*/*/*/provenance.json")]
    assert (folder / "report.html").exists()
    assert len(test_pipeline.lines_of(folder / "metrics.csv")) == 14
    assert not RunStore(folder).is_reported(), "the same command goes on"
    assert run(with_study).new_cells == 3


# sessions


def test_sessions_add_up() -> None:
    def session(start: str, **more: Any) -> Mapping[str, Any]:
        return {"command": f"run {start}", "device": "cpu", "notes": ["pooled"], "started": start, **more}

    sums = summed(
        [
            session("1", seconds=1.5, passes={"forward": 3, "tail": 1}),
            session("2", device="cuda", notes=["pooled", "hot"], seconds=2.0, passes={"forward": 4}),
            session("3"),  # killed before its first batch
        ]
    )
    assert sums["passes"] == {"forward": 7, "tail": 1}
    assert sums["seconds"] == 3.5
    assert sums["notes"] == ["pooled", "hot"]
    assert sums["device"] == "cpu; cuda"
    assert (sums["started"], sums["command"], sums["sessions"]) == ("1", "run 3", 3)


def test_a_run_that_was_stopped_has_counted_its_passes(plan: Plan) -> None:  # noqa: F811
    test_pipeline.STOP_AT.add("e")
    with pytest.raises(KeyboardInterrupt):
        run(plan)
    [folder] = [path.parent for path in plan.outputs.glob("*/*/*/*/provenance.json")]
    [stopped] = RunStore(folder).sessions()
    assert stopped["passes"] == {"forward": 3}, "those of the batch that was finished"
    assert stopped["finished"] is None
    test_pipeline.STOP_AT.clear()
    assert told(run(plan))["passes"] == {"forward": 3 + 4}
