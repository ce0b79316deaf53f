"""scripts/paper.py and its data: commands that compose, cells that name one run each, pages that say what lacks."""

from __future__ import annotations

import csv
import importlib.util
import itertools
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import yaml

from ibxai import pipeline, train
from ibxai.catalogue import entries
from ibxai.cli import DATA, main
from ibxai.store import Row, RunStore

ROOT = Path(__file__).parent.parent


def _script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("paper", ROOT / "scripts/paper.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["paper"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


paper = _script()
PAPERS = {name: paper.read(name) for name in paper.PAPERS}


def choices_of(command: dict[str, str]) -> set[tuple[str, ...]]:
    """What a command line says, word by word: each name that a group gets, and each setting with what it is one of."""
    line = f"{command['all']} {command.get('full', command.get('smoke'))}"
    word, *settings = re.sub(r"[\d.]*\d|\$\{\w+\}", "N", line).split()
    chosen = {key: value.strip("[]").split(",") for key, _, value in (text.partition("=") for text in settings)}
    found = set()
    for key, values in chosen.items():
        group, _, setting = key.partition(".")
        owners = chosen.get(group, chosen.get("experiment", [""])) if setting and group != "metric" else [""]
        found |= {(word, key, value, owner) for value in values for owner in owners}
    return found


def commands_to_try() -> list[tuple[str, str]]:
    """Composing is slow, and the commands are much alike: those that say something which none before them says."""
    every = {(name, key): choices_of(own) for name, told in PAPERS.items() for key, own in told["commands"].items()}
    said: set[tuple[str, ...]] = set()
    tried = []
    for command, own in sorted(every.items(), key=lambda pair: -len(pair[1])):
        if own - said:
            tried.append(command)
            said |= own
    return tried


def jobs_of(words: list[str]) -> list[set[str]]:
    """The settings of every job of a command line, its sweep taken apart as Hydra does."""
    swept: dict[str, list[str]] = {}
    for word in words:
        key, _, value = word.partition("=")
        if key == "experiment":
            preset = yaml.safe_load(entries()["experiment"][value].text)
            values = {k: str(v).replace("[]", "null") for k, v in preset["hydra"]["sweeper"]["params"].items()}
            swept |= {k: v.split(",") for k, v in values.items()}
    for word in words:
        key, _, value = word.partition("=")
        lists = value.startswith("[") and "],[" in value
        values = value.replace("],[", "];[").split(";") if lists else [value] if "[" in value else value.split(",")
        if "-m" in words and (len(values) > 1 or key in swept):
            swept[key] = values
    combined = itertools.product(*([f"{key}={value}" for value in values] for key, values in swept.items()))
    return [set(words) | set(job) for job in combined]


@pytest.fixture
def composed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Any]:
    """The plans that reach the pipeline and the trainer, which do nothing."""
    seen: list[Any] = []

    def run(plan: pipeline.Plan) -> pipeline.Outcome:
        seen.append(plan)
        return pipeline.Outcome(plan.outputs, plan.outputs / "report.html", 1, 1, 1, {})

    def trained(plan: train.TrainPlan) -> train.Trained:
        seen.append(plan)
        return train.Trained(tmp_path / "weights.safetensors", [], "")

    monkeypatch.setattr(pipeline, "run", run)
    monkeypatch.setattr(train, "run", trained)
    monkeypatch.chdir(tmp_path)
    return seen


@pytest.mark.parametrize(("name", "command"), commands_to_try())
def test_a_command_is_one_that_ibxai_takes(
    name: str, command: str, composed: list[Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The scale that has it is composed and built; of a sweep one job, as test_experiments.py builds presets."""
    told = PAPERS[name]["commands"][command]
    for variable in paper.Template("\n".join(map(str, told.values()))).get_identifiers():
        monkeypatch.setenv(variable, str(tmp_path))
    scale = "full" if "full" in told else "smoke"
    words = paper.words_of(told, scale, tmp_path)
    if words[0] == "data":
        assert words[1] in DATA
        return
    word, *rest = words
    first = jobs_of(rest)[0] - set(rest)
    swept = {setting.partition("=")[0] for setting in first}
    kept = [setting for setting in rest if setting.partition("=")[0] not in swept]
    preset = any(setting.startswith("experiment=") for setting in kept)  # it is run with -m, and no other needs it
    sweeps = [] if preset else ["-m"]
    assert main([word, *(text for text in kept if text not in sweeps), *first, f"outputs={tmp_path}"]) == 0
    assert len(composed) == 1


@pytest.mark.parametrize("name", PAPERS)
def test_cells_name_one_run_of_a_command(name: str) -> None:
    commands, items = PAPERS[name]["commands"], PAPERS[name]["items"]
    assert len({item["id"] for item in items}) == len(items)
    for item in items:
        assert paper.commands_of(item) or item.get("none"), f"{item['title']}: filled by nothing, and no reason why"
        assert set(paper.commands_of(item)) <= set(commands)
        for row, column, _, cell in paper.cells_of(item):
            command = commands[cell["from"]]
            for scale in {"smoke", "full"} & set(command):
                if scale == "full" or name != "igospp" or cell["from"] != "weights":  # Table 7's smoke has two weights
                    words = f"{command['all']} {command[scale]}".split()
                    found = [job for job in jobs_of(words) if set(cell["job"].split()) <= job]
                    assert len(found) == 1, (item["id"], row, column, scale)


@pytest.mark.parametrize("name", PAPERS)
def test_what_a_command_comes_after_stands_before_it(name: str) -> None:
    commands = PAPERS[name]["commands"]
    order = list(commands)
    for place, command in enumerate(commands.values()):
        assert all(order.index(other) < place for other in command.get("after", ()))
        assert {"smoke", "full"} & set(command)
        assert "why" not in command or "smoke" not in command  # a reason for nothing


def test_the_published_numbers_add_up() -> None:
    """Sums and averages that the papers' own numbers must meet, so that a slip of the pen shows."""
    pathologies = next(i for i in PAPERS["chexplain"]["items"] if i["id"] == "table3")["rows"]
    bce = pathologies["BCE"]["values"]
    assert np.mean(bce[:8]) == pytest.approx(bce[8], abs=0.0025)  # 0.026 of the rounded columns; the paper: 0.024
    text = next(i for i in PAPERS["iba-covid-ct"]["items"] if i["id"] == "table1")["shows"]
    numbers = [int(n.replace(",", "")) for n in ("254", "684", "125", "45", "2", "1,110") if f"{n} " in text]
    assert sum(numbers[:-1]) == numbers[-1] == 1110
    shared = [
        next(i for i in PAPERS["igospp"]["items"] if i["id"] == table)["rows"]["iGOS++"]["values"][:4]
        for table in ("table1", "table3")
    ]
    assert shared[0] == shared[1]  # one method at two resolutions, printed twice


def test_a_missing_dataset_is_a_line_that_names_its_variable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("IBXAI_NOWHERE", raising=False)
    command = {"all": "run dataset=mosmed", "full": "dataset.root=${IBXAI_NOWHERE}"}
    outcome = paper.attempt(command, "full", tmp_path, [])
    assert outcome.problem.startswith("dataset.root of mosmed is not set: IBXAI_NOWHERE=")
    assert not outcome.jobs
    item = {"columns": {"c": {"from": "x", "metric": "iou"}}, "rows": {"r": {"values": [0.5]}}}
    assert paper.filled(item, {"x": outcome}).lines == [("r", [(0.5, None)])]  # published, and no number of ours


def test_a_command_after_a_failed_one_is_not_run(tmp_path: Path) -> None:
    command = {"all": "run", "smoke": "no=such", "full": ""}
    assert paper.attempt(command, "smoke", tmp_path, [], "the first reason").problem == "the first reason"


def test_a_command_of_the_other_scale_is_left_out(tmp_path: Path) -> None:
    silent = paper.attempt({"all": "data phantom", "smoke": ""}, "full", tmp_path, [])
    assert (silent.command, silent.problem) == ("", "")
    said = paper.attempt({"all": "run", "full": "", "why": "no weights."}, "smoke", tmp_path, [])
    assert said.problem == "Computed at SCALE=full only: no weights."


def test_jobs_of_a_sweep_are_read_from_its_summary() -> None:
    words = ["run", "-m", "dataset=sample", "method=iba,gradcam,lime"]
    lines = [
        "report: outputs/a/b/iba/1/report.html",
        "3 jobs: 2 done, 1 failed",
        "  0  method=iba       done: 2 rows",
        "                      outputs/a/b/iba/1",
        "  1  method=gradcam   done: nothing left to do: 2 rows there already",
        "                      outputs/a/b/gradcam/2",
        "  2  method=lime      failed: it broke",
        "sweep: outputs/sweep.html",
    ]
    jobs = paper.jobs_in(lines, words)
    assert [job.folder for job in jobs] == [Path("outputs/a/b/iba/1"), Path("outputs/a/b/gradcam/2"), None]
    assert jobs[2].told == "it broke"
    assert "method=gradcam" in jobs[1].settings
    assert "dataset=sample" in jobs[1].settings


def test_pictures_are_named_by_what_sets_their_runs_apart() -> None:
    def job(*words: str) -> Any:
        return paper.Job(frozenset({"run", "dataset=sample", "metric.insertion.resolution=7", *words}), None)

    coarse, fine = job("method=igospp", "method.resolution=7"), job("method=igospp", "+method.resolution=28")
    assert paper.names_of([coarse, fine]) == ["method.resolution=7", "method.resolution=28"]
    assert paper.names_of([fine, job("method=rise")]) == ["method=igospp method.resolution=28", "method=rise"]
    assert paper.names_of([job("method=igospp")]) == ["method=igospp"]
    assert paper.names_of([job("attack=null"), job()]) == ["attack=null", "the defaults"]


def test_a_table_of_dashes_names_no_network() -> None:
    outcome = paper.Outcome("", [paper.Job(frozenset(), Path("d/b/m/1"))])
    empty, full = ([("row", [(0.5, None)])], [("row", [(0.5, None), (0.5, paper.Value(0.4))])])
    assert paper.Item({}, {"x": outcome}, lines=empty).networks == []
    assert paper.Item({}, {"x": outcome}, lines=full).networks == ["b on d"]
    assert paper.Item({}, {"x": outcome}).networks == ["b on d"]  # no table at all


def test_a_command_that_fails_says_why_in_its_own_words() -> None:
    outcome = paper.run_command(["list", "nowhere"])
    assert "nowhere" in outcome.problem
    assert not outcome.jobs
    assert paper.run_command(["list", "loss"]).problem == ""


@pytest.mark.parametrize(
    ("line", "folder"),
    [
        ("report: out/d/b/m/1/report.html", "out/d/b/m/1"),
        ("checkpoint: out/d/b/training/1/weights.safetensors", "out/d/b/training/1"),
        ("3 rows of other shards not there yet: the last one makes the page. The folder: out/d/b/m/1", "out/d/b/m/1"),
    ],
)
def test_the_folder_of_a_single_job(line: str, folder: str) -> None:
    (job,) = paper.jobs_in(["noise", line], ["run"])
    assert job.folder == Path(folder)


def test_numbers_come_from_the_tables_of_the_run_that_is_named(tmp_path: Path) -> None:
    folders = {}
    for method, mean in (("iba", 0.25), ("gradcam", 0.75)):
        folders[method] = tmp_path / "d" / "b" / method / "1"
        folders[method].mkdir(parents=True)
        (folders[method] / "summary.csv").write_text(f"metric,mean,low,high,n\niou,{mean},0,1,7\nehr,9,,,7\n")
        (folders[method] / "studies.csv").write_text("study,labels,metric,value,low,high,n\ns,random,ssim,0.1,,,4\n")
    jobs = [paper.Job(frozenset({"run", f"method={method}"}), folder) for method, folder in folders.items()]
    outcomes = {"maps": paper.Outcome("ibxai run", jobs)}
    cell = {"from": "maps", "job": "method=gradcam", "metric": "iou"}
    assert paper.measured(cell, outcomes) == paper.Value(0.75, 0, 1, 7)
    assert paper.measured({**cell, "metric": "absent"}, outcomes) is None
    assert paper.measured({**cell, "job": ""}, outcomes) is None  # two runs: neither is taken for the other
    study = paper.measured(
        {"from": "maps", "job": "method=iba", "study": {"metric": "ssim", "labels": "random"}}, outcomes
    )
    assert study.value == 0.1
    (folders["iba"] / "test.csv").write_text("output,metric,value,low,high\nall,accuracy,0.8,0.7,0.9\n")
    (folders["iba"] / "weights.json").write_text('{"tested": 12}')
    trained = {"from": "maps", "job": "method=iba", "test": {"metric": "accuracy"}}
    assert paper.measured(trained, outcomes) == paper.Value(0.8, 0.7, 0.9, 12)
    assert paper.measured({**trained, "test": {"metric": "f1"}}, outcomes) is None


def test_the_mean_of_one_class(tmp_path: Path) -> None:
    """Three samples of class 1, one of which has no value, in two groups; class 0 does not count."""
    store = RunStore(tmp_path / "d" / "b" / "m" / "1")
    rows = [Row(f"{s}@label", s, "label", g, c) for s, g, c in
            (("a", "p", 1), ("b", "q", 1), ("c", "q", 1), ("d", "r", 0))]  # fmt: skip
    store.begin("", {}, None, rows)
    lines = [("a", "0.2"), ("b", "0.4"), ("c", "nan"), ("d", "1.0")]
    with (store.path / "metrics.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("sample", "metric", "value"), *((s, "iou", v) for s, v in lines)])
    outcomes = {"maps": paper.Outcome("", [paper.Job(frozenset(), store.path)])}
    value = paper.measured({"from": "maps", "metric": "iou", "label": 1}, outcomes)
    assert value.value == pytest.approx(0.3)
    assert value.n == 2
    assert 0.2 <= value.low < 0.3 < value.high <= 0.4
    assert paper.measured({"from": "maps", "metric": "iou", "label": 5}, outcomes) is None


def test_the_page_shows_both_numbers_and_says_that_smoke_is_none(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    told = {
        "title": "A <paper>", "source": "somebody", "smoke": "another network", "full": "the data",
        "commands": {"maps": {"all": "run", "smoke": ""}, "gone": {"all": "run", "full": "", "why": "no data."}},
        "items": [{"id": "t", "title": "Table 1", "at": "p. 1", "shows": "it", "columns": {"IoU": {"metric": "iou"}},
                   "rows": {"a": {"from": "maps", "values": [0.123]}, "b": {"from": "gone", "values": [0.456]}}}],
    }  # fmt: skip
    folder = tmp_path / "d" / "b" / "m" / "1"
    folder.mkdir(parents=True)
    (folder / "summary.csv").write_text("metric,mean,low,high,n\niou,0.789,0.7,0.8,3\n")
    monkeypatch.setattr(paper, "read", lambda name: told)
    monkeypatch.setattr(
        paper, "run_command", lambda words: paper.Outcome("ibxai run", [paper.Job(frozenset(), folder)])
    )
    page = paper.compute("any", "smoke", [], tmp_path, []).read_text()
    for text in (
        "A &lt;paper&gt;",
        "0.123",
        "0.789",
        "0.700 to 0.800",
        "0.456",
        "not a reproduction",
        "another network",
    ):
        assert text in page
    assert "Computed at SCALE=full only: no data." in page
    lines = list(csv.DictReader((tmp_path / "paper.csv").read_text().splitlines()))
    assert [(line["published"], line["value"]) for line in lines] == [("0.123", "0.789"), ("0.456", "")]


def test_the_tables_of_the_docs_are_those_of_the_data() -> None:
    text = (ROOT / "docs/papers.md").read_text(encoding="utf-8")
    assert paper.coverage() in text, "renew them: python scripts/paper.py --coverage"


def test_settings_behind_only_are_no_items(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls: list[Any] = []
    monkeypatch.setattr(paper, "compute", lambda *given: calls.append(given) or tmp_path)
    monkeypatch.setattr(sys, "argv", ["paper.py", "igospp", "--scale", "full", "--only", "table1,fig4", "shard=1/4"])
    paper.main()
    assert calls == [("igospp", "full", ["table1", "fig4"], Path("outputs/papers/igospp-full"), ["shard=1/4"])]
    monkeypatch.setattr(sys, "argv", ["paper.py", "igospp", "--only", "tabel1"])
    with pytest.raises(paper.UserError, match="has no item 'tabel1'"):
        paper.main()


def test_every_paper_has_its_target() -> None:
    makefile = (ROOT / "Makefile").read_text()
    assert len(PAPERS) == 5
    for name in PAPERS:
        assert f"\npaper-{name}:" in makefile
