"""The papers' sweeps: every preset composes, builds each of its jobs, and says so when -m was forgotten."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import yaml

from ibxai import pipeline
from ibxai.catalogue import entries
from ibxai.cli import main

PRESETS = list(entries()["experiment"])


@pytest.fixture
def plans(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[pipeline.Plan]:
    """The plans that reach the pipeline, which does nothing."""
    seen: list[pipeline.Plan] = []

    def run(plan: pipeline.Plan) -> pipeline.Outcome:
        seen.append(plan)
        return pipeline.Outcome(plan.outputs, plan.outputs / "report.html", 1, 1, 1, {})

    monkeypatch.setattr(pipeline, "run", run)
    monkeypatch.chdir(tmp_path)
    return seen


def swept(name: str) -> dict[str, list[str]]:
    """setting -> its values."""
    preset = yaml.safe_load(entries()["experiment"][name].text)
    params = preset["hydra"]["sweeper"]["params"]
    return {key: str(values).split(",") for key, values in params.items()}


@pytest.mark.parametrize("name", PRESETS)
def test_every_job_of_a_sweep_is_a_plan(name: str, plans: list[pipeline.Plan]) -> None:
    assert main(["run", "-m", f"experiment={name}"]) == 0
    sweep = swept(name)
    assert len(plans) == math.prod(map(len, sweep.values()))
    described = [str((plan.settings["method"], plan.settings["attack"])) for plan in plans]
    assert len(set(described)) == len(plans)  # each job is another
    for key, values in sweep.items():
        for value in values:
            assert any(_setting(plan, key) == value for plan in plans), (key, value)


def _setting(plan: pipeline.Plan, key: str) -> str:
    if key == "method":
        return plan.method_name
    if key == "attack":
        return plan.attack_name or "[]"
    node = plan.settings
    for part in key.split("."):
        node = node[part]
    return str(node)


@pytest.mark.parametrize("name", PRESETS)
def test_without_m_nothing_runs(name: str, plans: list[pipeline.Plan], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", f"experiment={name}"]) == 2
    error = capsys.readouterr().err
    assert "is a sweep over" in error
    assert "-m" in error
    assert len(error.splitlines()) == 2
    assert not plans
