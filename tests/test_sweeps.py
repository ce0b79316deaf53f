"""Sweeps: what they sum up, their page, jobs that fail, launchers, and one that breaks down in the middle."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from test_bad_input import Shell, shell  # noqa: F401  (a fixture)
from test_pipeline import EXPLAINED

from ibxai import jobs
from ibxai.cli import main
from ibxai.overrides import for_sweep
from ibxai.report.sweeps import Job, Sweep, cost, sweep_table, write_sweep
from ibxai.store import MetricKey, Row, RunStore


def page_of(out: str) -> Path:
    return Path(re.findall(r"^sweep: (.*)$", out, re.MULTILINE)[-1])


def test_a_sweep_ends_with_its_page_and_table(shell: Shell) -> None:  # noqa: F811
    code, out, _ = shell("-m", "method.scale=1,10,100", "seed=0,1", "method.fails_at=null")
    assert code == 0
    page = page_of(out)
    table = pd.read_csv(page.with_name("sweep.csv"))
    assert len(table) == 6 * 2, "a line a job and value: the mean of the map, and that of the picture"
    assert set(table["method.scale"]) == {1, 10, 100}
    means = table[table["metric"] == "mean"].set_index(["method.scale", "seed"])["mean"]
    for seed in (0, 1):  # the heat is the scale times a number of the seed
        np.testing.assert_allclose(means[10, seed] / means[1, seed], 10, rtol=1e-5)
        np.testing.assert_allclose(means[100, seed] / means[1, seed], 100, rtol=1e-5)
    text = page.read_text()
    assert "mean against method.scale" in text
    assert "seed = 0" in text
    assert "seed = 1" in text
    links = re.findall(r'<a href="([^"]+)">\d', text)
    assert len(links) == 6
    assert all((page.parent / link).is_file() for link in links)
    EXPLAINED.clear()
    code, again, _ = shell("-m", "method.scale=1,10,100", "seed=0,1", "method.fails_at=null")
    assert (code, EXPLAINED, page_of(again)) == (0, [], page)
    assert again.count("nothing left to do") == 2 * 6


def test_failed_jobs_hide_no_others_and_are_told_with_their_reason(shell: Shell) -> None:  # noqa: F811
    code, out, _ = shell("-m", "method.scale=1,much,3")
    assert code == 2
    assert "3 jobs: 2 done, 1 failed" in out
    table = pd.read_csv(page_of(out).with_name("sweep.csv"))
    [reason] = table[table["method.scale"] == "much"]["told"]
    assert reason == "failed: method.scale=much: a number is expected."
    assert len(table[table["metric"] == "mean"]) == 2
    assert reason in page_of(out).read_text()


def test_without_scores_there_is_no_page(shell: Shell) -> None:  # noqa: F811
    code, out, _ = shell("-m", "seed=x,y")
    assert code == 2
    assert "sweep: " not in out
    assert not shell.outputs.exists()


def test_a_run_needs_no_temporary_folder(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """So that one that is killed leaves none."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a folder was made")

    monkeypatch.setattr(jobs.tempfile, "TemporaryDirectory", refuse)
    assert shell("limit=1")[0] == 0


def test_a_launcher_that_breaks_down_hides_no_finished_job(
    shell: Shell,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    job, count = jobs._job, []

    def broken(cfg: object) -> None:
        if len(count) == 2:
            raise MemoryError("the worker was killed")
        count.append(1)
        job(cfg)  # type: ignore[arg-type]

    monkeypatch.setattr(jobs, "_job", broken)
    code, out, err = shell("-m", "method.scale=1,2,3,4")
    assert code == 1
    assert "2 jobs: 2 done, 0 failed" in out
    assert "MemoryError: the worker was killed" in err
    assert "The same command goes on" in err
    assert page_of(out).exists()


# launchers: worker processes of their own, which have to find the tiny parts


@pytest.fixture
def _workers_find_the_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.path.dirname(__file__))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.mark.usefixtures("_workers_find_the_tests")
@pytest.mark.parametrize("launcher", ["local", "submitit_local"])
def test_launchers_run_shards_in_processes_of_their_own(shell: Shell, launcher: str) -> None:  # noqa: F811
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    pytest.importorskip("submitit")
    try:
        code, out, _ = shell("-m", f"hydra/launcher={launcher}", "shard=1/2,2/2", "method.scale=2")
    finally:
        from joblib.externals.loky import get_reusable_executor

        get_reusable_executor().shutdown(wait=True)
    assert code == 0
    assert EXPLAINED == [], "not in this process"
    assert "2 jobs: 2 done, 0 failed" in out
    store = RunStore(shell.folder)
    assert {session["shard"] for session in store.sessions()} == {"1/2", "2/2"}
    assert store.is_reported()
    assert len(pd.read_csv(shell.folder / "metrics.csv")) == 14
    assert "share its numbers" in page_of(out).read_text()


# a search over settings


def test_a_search_finds_the_best_job_and_goes_on_where_it_stopped(shell: Shell) -> None:  # noqa: F811
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    search = ["-m", "hydra/sweeper=optuna", "hydra.sweeper.n_trials=3", "hydra.sweeper.sampler.seed=0"]
    code, out, _ = shell(*search, "method.scale=interval(1,10)", "limit=2")
    assert code == 0
    assert "3 jobs: 3 done, 0 failed" in out
    table = pd.read_csv(page_of(out).with_name("sweep.csv"))
    means = table[table["metric"] == "mean"].set_index("method.scale")["mean"]
    assert means.nunique() == 3
    [best] = re.findall(r"^best: method\.scale=([\d.]+)", out, re.MULTILINE)
    assert float(best) == pytest.approx(means.idxmax())  # a higher mean is better
    EXPLAINED.clear()
    assert shell(*search, "method.scale=interval(1,10)", "limit=2")[1].endswith(out[out.index("best: ") :])
    assert EXPLAINED == [], "the same seed makes the same jobs"


def test_a_search_over_methods_takes_all_of_them() -> None:
    overrides = ["hydra/sweeper=optuna", "method=iba,rise"]
    assert for_sweep(overrides) == overrides, "one that is given before the sweep would be fixed"


@pytest.mark.parametrize(("higher", "expected"), [(True, -0.2), (False, 0.2), (None, None)])
def test_what_a_search_makes_small(tmp_path: Path, higher: bool | None, expected: float | None) -> None:
    key = MetricKey("insertion", {} if higher is None else {"higher_is_better": higher})
    assert cost(made(tmp_path, [0.1, 0.3, np.nan], key), key) == (None if expected is None else pytest.approx(expected))
    assert cost(tmp_path, MetricKey("deletion", {})) is None
    (tmp_path / "summary.csv").unlink()
    assert cost(tmp_path, key) is None, "another shard will make it"


def test_a_search_calls_nothing_by_name(shell: Shell) -> None:  # noqa: F811
    search = ["-m", "hydra/sweeper=optuna", "seed=0,1"]
    for setting in ("custom_search_space=os.system", "storage=sqlite:///x.db", "direction=maximize"):
        code, out, err = shell(*search, f"hydra.sweeper.{setting}")
        assert (code, out) == (2, "")
        assert "ibxai sets Hydra up itself" in err


def test_the_slurm_preset_composes(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("submitit")
    assert main(["run", "--cfg", "hydra", "hydra/launcher=slurm", "hydra.launcher.timeout_min=7"]) == 0
    told = capsys.readouterr().out
    assert "SlurmLauncher" in told
    assert "timeout_min: 7" in told
    assert "max_num_timeout: 10" in told


@pytest.mark.parametrize("name", ["joblib", "submitit_slurm"])
def test_a_launcher_that_is_not_installed(name: str) -> None:
    from hydra.errors import MissingConfigException

    from ibxai.overrides import explained

    error = MissingConfigException(f"Could not find 'hydra/launcher/{name}'", f"hydra/launcher/{name}")
    assert "pip install 'ibxai[launchers]'" in str(explained(error, {}))


def test_shards_share_the_gpus_out(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from ibxai.config import _usable_device
    from ibxai.shards import Shard

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [_usable_device("auto", Shard(n, 5)) for n in range(1, 6)] == [
        "cuda:0",
        "cuda:1",
        "cuda:0",
        "cuda:1",
        "cuda:0",
    ]
    assert _usable_device("auto") == "cuda"
    assert _usable_device("cuda:1", Shard(1, 2)) == "cuda:1"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert _usable_device("auto", Shard(2, 2)) == "cuda", "a cluster shows each job its own"


# the page


INSERTION = MetricKey("insertion", {"higher_is_better": True})


def made(folder: Path, values: Sequence[float], key: MetricKey = INSERTION) -> Path:
    """A run with one value a row."""
    store = RunStore(folder)
    ids = [str(place) for place in range(len(values))]
    store.begin("seed: 0\n", {"method": "iba"}, None, [Row(f"{i}@p", i, "p", i, None) for i in ids])
    store.write_scores(key, [f"{i}@p" for i in ids], {"auc": np.array(values)})
    from ibxai.report.page import write_report

    write_report(store)
    return folder


def sweep_of(tmp_path: Path, settings: Sequence[dict[str, str]]) -> Sweep:
    jobs_ = []
    for number, chosen in enumerate(settings):
        folder = made(tmp_path / "d" / "b" / "m" / str(number), [0.1 * number, 0.1 * number + 0.2])
        jobs_.append(Job(chosen, False, "done", folder))
    return Sweep(jobs_)


def heights(svg: str) -> list[float]:
    return [float(y) for y in re.findall(r'<circle [^>]*cy="([\d.]+)"', svg)]


def places(svg: str) -> list[float]:
    return [float(x) for x in re.findall(r'<circle [^>]*cx="([\d.]+)"', svg)]


def test_points_stand_where_their_numbers_are(tmp_path: Path) -> None:
    sweep = sweep_of(tmp_path, [{"method.beta": b, "limit": "9"} for b in ("100", "1", "10")])
    assert sweep.swept == ["method.beta"]
    [chart] = sweep.charts()
    x, y = np.array(places(str(chart.svg))), np.array(heights(str(chart.svg)))
    assert np.all(np.diff(x) > 0)
    np.testing.assert_allclose(x[1] - x[0], x[2] - x[1], atol=0.2), "1, 10, 100 are evenly apart: a logarithmic axis"
    # in the order of beta 1, 10, 100 the means are .2, .3, .1; downwards is larger in an SVG
    np.testing.assert_allclose((y[0] - y[1]) / (y[2] - y[0]), 1.0, atol=0.02)
    assert y[1] < y[0] < y[2]
    assert str(chart.svg).count('class="interval') == 3
    assert "polyline" in str(chart.svg)


def test_words_have_places_and_no_line_between_them(tmp_path: Path) -> None:
    [chart] = sweep_of(tmp_path, [{"method.step": word} for word in ("armijo", "fixed")]).charts()
    assert "polyline" not in str(chart.svg)
    assert ">armijo</text>" in str(chart.svg)
    assert len(heights(str(chart.svg))) == 2


def test_more_than_four_lines_are_several_charts(tmp_path: Path) -> None:
    settings = [{"beta": b, "seed": s} for s in "abcde" for b in ("1", "2")]
    charts = sweep_of(tmp_path, settings).charts()
    assert [len(chart.legend) for chart in charts] == [4, 0]
    assert [name for _, name in charts[0].legend] == [f"seed = {s}" for s in "abcd"]


def test_hostile_settings_stay_text(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>"
    sweep = sweep_of(tmp_path, [{evil: evil, "a": "nan"}, {evil: '"><b>', "a": "inf"}])
    page = write_sweep(sweep, tmp_path)
    assert page is not None
    assert page.is_relative_to(tmp_path)
    assert evil not in page.read_text()
    assert "<b>&" not in page.read_text()


def test_jobs_without_scores_have_a_line(tmp_path: Path) -> None:
    sweep = sweep_of(tmp_path, [{"beta": "1"}])
    failed = Job({"beta": "2"}, True, "failed: no such layer", None)
    table = sweep_table(dataclasses.replace(sweep, jobs=[*sweep.jobs, failed]))
    assert list(table["told"]) == ["done", "failed: no such layer"]
    assert list(table["metric"]) == ["insertion", ""]
    assert write_sweep(Sweep([failed]), tmp_path) is None


def test_a_record_that_was_cut_short_is_no_record(tmp_path: Path) -> None:
    whole = {"overrides": ["seed=1"], "exit_code": 0, "summary": "done"}
    (tmp_path / "job-000000.json").write_text(json.dumps(whole))
    (tmp_path / "job-000001.tmp").write_text("{")
    assert [record.overrides for record in jobs._records(tmp_path)] == [["seed=1"]]
