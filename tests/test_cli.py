"""The `ibxai` command, in one process with the tests: what it refuses and how, what it runs, what it leaves behind."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from textwrap import dedent

import pytest

from ibxai import pipeline
from ibxai.catalogue import GROUPS, comments, entries
from ibxai.cli import COMMANDS, HELP, RUN_HELP, main
from ibxai.errors import UserError
from ibxai.overrides import for_sweep

# parts without torch, in a module of the user's own inside --config-dir
PARTS = """
from __future__ import annotations
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ibxai.errors import UserError

@dataclass(frozen=True)
class Data:
    name: str
    root: Path | None = None
    def samples(self): ...

@dataclass(frozen=True)
class Inner:
    crop: int = 224
    mean: tuple[float, float, float] = (0.0, 0.0, 0.0)

@dataclass(frozen=True)
class Net:
    name: str
    weights: str = "none"
    layers: dict[str, str] = field(default_factory=dict)
    inner: Inner | None = None
    def load(self, max_passes): ...

@dataclass(frozen=True)
class Blur:
    sigma: float = 1.0
    steps: int = 10
    mode: Literal["fast", "exact"] = "fast"
    def __post_init__(self):
        if self.sigma <= 0:
            raise UserError(f"method.sigma={self.sigma}: a positive number is expected.")
    def fit(self, backbone, reference, seed, state=None): ...

@dataclass
class Thawed:
    def fit(self, backbone, reference, seed, state=None): ...

@dataclass(frozen=True)
class Area:
    step: float = 0.1
    def __call__(self, backbone, batch, attribution): ...

def function(): raise SystemExit("called")
"""

CONFIGS = {
    "dataset/toy": "# Toy data\nname: toy\n_target_: toyparts.Data\n",
    "dataset/pictures": "# A folder\nname: pictures\n_target_: toyparts.Data\nroot: ???  # folder of pictures\n",
    "backbone/toynet": "# Toy network\nname: toynet\n_target_: toyparts.Net\nweights: none\n"
    "layers: {late: a}\ninner:\n  crop: 3\n  mean: [0.1, 0.2, 0.3]\n",
    "method/blur": "# Blurs\nname: blur\n_target_: toyparts.Blur\nsigma: 2.0  # its width\nsteps: 10\nmode: fast\n",
    "method/sharpen": "# Also blurs\nname: sharpen\n_target_: toyparts.Blur\nsigma: 1\n",
    "method/shell": "# Bad\nname: shell\n_target_: os.system\ncommand: touch executed\n",
    "method/func": "# Bad\nname: func\n_target_: toyparts.function\n",
    "method/thawed": "# Bad\nname: thawed\n_target_: toyparts.Thawed\n",
    "method/metric": "# Bad\nname: metric\n_target_: toyparts.Area\n",
    "method/nomodule": "# Bad\nname: nomodule\n_target_: nosuch.module.Thing\n",
    "method/noclass": "# Bad\nname: noclass\n_target_: toyparts.Blurr\n",
    "metric/area": "# Toy metric\narea:\n  _target_: toyparts.Area\n  step: 0.1\n",
    "metric/wrong": "# Bad\nwrong:\n  _target_: toyparts.Blur\n",
    "experiment/preset": "# @package _global_\ndefaults:\n  - override /method: sharpen\nseed: 7\nmethod: {sigma: 5}\n",
    "experiment/typo": "# @package _global_\nsead: 7\n",
    "experiment/badname": "# @package _global_\ndefaults:\n  - override /method: nope\n",
    "experiment/badtype": "# @package _global_\nseed: abc\n",
    "experiment/two": "# @package _global_\ndefaults:\n  - override /method: [blur, sharpen]\n",
}
PRESETS = ("experiment=preset", "experiment=badname", "experiment=two")
TOYS = ["dataset=toy", "backbone=toynet", "method=blur", "metric=[area]"]


@pytest.fixture(scope="module")
def config_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("my conf")  # with a blank, as people have them
    (folder / "toyparts.py").write_text(PARTS)
    for name, text in CONFIGS.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / f"{name}.yaml").write_text(text)
    return folder


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every test runs in an empty folder, and may not leave Hydra's files in it or in the temporary folder."""
    place, temporary = tmp_path / "here", tmp_path / "tmp"
    place.mkdir()
    temporary.mkdir()
    monkeypatch.chdir(place)
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    yield
    assert [p.name for p in place.iterdir() if p.name != "outputs"] == []
    assert list(temporary.iterdir()) == []


@pytest.fixture
def plans(monkeypatch: pytest.MonkeyPatch) -> list[pipeline.Plan]:
    """The plans that reach the pipeline, which does nothing but say that it did."""
    seen: list[pipeline.Plan] = []

    def run(plan: pipeline.Plan) -> pipeline.Outcome:
        seen.append(plan)
        folder = plan.outputs / "toy"
        return pipeline.Outcome(folder, folder / "report.html", rows=7, new_heatmaps=7, new_scores=14, skipped={})

    monkeypatch.setattr(pipeline, "run", run)
    return seen


@pytest.fixture
def run(config_dir: Path, plans: list[pipeline.Plan]) -> Callable[..., int]:
    def run(*arguments: str) -> int:
        preset = any(a in PRESETS for a in arguments)  # it chooses the method, and the line would win
        toys = [t for t in TOYS if not (preset and t.startswith("method="))]
        return main(["run", "--config-dir", str(config_dir), *toys, *arguments])

    return run


# what is refused

REFUSED = {
    # root settings
    "seed=abc": "seed=abc: a whole number is expected.",
    "seed=1.5": "seed=1.5: a whole number is expected.",
    "seed=true": "seed=true: a whole number is expected.",
    "seed=null": "seed=null: a whole number is expected.",
    "seed=": "seed=: a whole number is expected.",
    "seed=-1": "seed=-1: at least 0 is expected.",
    "limit=-1": "limit=-1: at least 1 is expected.",
    "limit=0": "limit=0: at least 1 is expected.",
    "limit=many": "limit=many: a whole number or null is expected.",
    "batch_size=0": "batch_size=0: at least 1 is expected.",
    "batch_size=99999999999999999999": "at most 2147483647 is expected.",
    "max_passes=0": "max_passes=0: at least 1 is expected.",
    "workers=-2": "workers=-2: at least 0 is expected.",
    "pictures=-2": "pictures=-2: at least 0 is expected.",
    "device=gpu": "device=gpu: auto, cpu, cuda or cuda:N is expected.",
    "device=cuda:": "device=cuda:",
    "outputs=": "outputs is empty",
    "outputs=null": "outputs=null: a text is expected.",
    "outputs=[a,b]": "outputs=[a,b]: a text is expected.",
    "seed=${oc.env:IBXAI_NO_SUCH}": "seed: Environment variable 'IBXAI_NO_SUCH' not found",
    "seed=${nope}": "seed: Interpolation key 'nope' not found",
    # names
    "metod=iba": "There is no setting 'metod'. Did you mean method",
    "+metod=iba": "There is no setting 'metod'. Did you mean method",
    "a.b.c=3": "There is no setting 'a'.",
    "method=blurr": "There is no method 'blurr'. Did you mean blur",
    "method=../x": "There is no method",
    "dataset=nope": "There is no dataset 'nope'.",
    "metric=[aria]": "There is no metric 'aria'. Did you mean area?",
    "target=classe": "There is no target 'classe'. Did you mean classes",
    "experiment=nope": "There is no experiment 'nope'.",
    "experiment=typo": "experiment/typo.yaml: There is no setting 'sead'. Did you mean seed or shard?",
    "experiment=badname": "There is no method 'nope'.",
    "experiment=badtype": "experiment/badtype.yaml: seed: a whole number is expected.",
    "experiment=two": "method takes one name.",
    "method=": "a name is expected, method=NAME.",
    "method=null": "a name is expected, method=NAME.",
    "method=3": "a name is expected",
    "method=[blur,sharpen]": "method takes one name. To run several, one after the other: -m method=blur,sharpen",
    "dataset=[]": "dataset takes one name.",
    "metric=[[area]]": "a name is expected, metric=[insertion,deletion]",
    "metric=null": "metric=[] for none",
    "+method=sharpen": "choose without '+': method=NAME.",
    "++method=sharpen": "choose without '+': method=NAME.",
    "method@foo=blur": "'@' is of no use here",
    "method/x=blur": "There is no setting 'method/x'",
    # settings of a part
    "method.sgma=3": "method.sgma is not a setting of blur. Did you mean sigma?",
    "+method.sgma=3": "method.sgma is not a setting of blur. Did you mean sigma?",
    "++method.sgma=3": "method.sgma is not a setting of blur. Did you mean sigma?",
    "method.sigma=wide": "method.sigma=wide: a number is expected.",
    "method.sigma=true": "method.sigma=true: a number is expected.",
    "method.sigma=null": "method.sigma=null: a number is expected.",
    "method.sigma=-1": "method.sigma=-1.0: a positive number is expected.",
    "method.steps=1.5": "method.steps=1.5: a whole number is expected.",
    "method.mode=slow": "method.mode=slow: one of fast, exact is expected.",
    "method.name=../../x": "method.name=../../x: letters, digits",
    "method={sgma:1}": "method={sgma:1}: a name is expected",
    "backbone.inner.crop=abc": "backbone.inner.crop=abc: a whole number is expected.",
    "backbone.inner.corp=3": "backbone.inner.corp is not a setting",
    "+backbone.inner.corp=3": "backbone.inner.corp is not a setting of backbone.inner. Did you mean crop?",
    "backbone.inner.mean=[1,2]": "backbone.inner.mean=[1, 2]: a list of 3, like [0.5,0.5,0.5], is expected.",
    "backbone.layers=[a]": "backbone.layers=[a]: settings are expected here",
    "metric.area.step=fine": "metric.area.step=fine: a number is expected.",
    "metric.area.stp=1": "metric.area.stp is not a setting",
    "metric.aria.step=1": "metric.aria",
    "metric.area=3": "metric.area describes no metric.",
    "metric=[wrong]": "which has no `__call__`: it cannot be a metric.",
    "dataset=pictures": "dataset.root is not set: give dataset.root=..., folder of pictures",
    "target=classes": "target.ids is not set: give target.ids=..., class numbers from 0 on",
    "target=classes target.ids=[a]": "target.ids[0]=a: a whole number is expected.",
    "target=classes target.ids=281": "target.ids=281: a list like [1,1] is expected.",
    "target=classes target.ids=[]": "give class numbers from 0 on",
    # classes
    "method=shell": "_target_ is os.system, which is no frozen dataclass",
    "method=func": "no frozen dataclass",
    "method=thawed": "no frozen dataclass",
    "method=metric": "which has no `fit`",
    "method=nomodule": "there is no module 'nosuch' here.",
    "method=noclass": "toyparts has no 'Blurr'. Did you mean Blur?",
    "++method._target_=os.system": "which class runs is not set on the command line.",
    "method={_target_:os.system}": "which class runs is not set on the command line.",
    "++hydra.launcher._target_=os.system": "which class runs is not set on the command line.",
    "+hydra.callbacks.x={_target_:os.system}": "which class runs is not set on the command line.",
    "+hydra/callbacks=x": "ibxai sets Hydra up itself",
    "hydra.searchpath=[file:///tmp]": "ibxai sets Hydra up itself",
    "hydra.run.dir=/tmp/x": "ibxai sets Hydra up itself",
    "hydra.output_subdir=.hydra": "ibxai sets Hydra up itself",
    "hydra={run:{dir:x}}": "ibxai sets Hydra up itself",
    "hydra/launcher=submitit_slurm": "is about sweeps: add -m.",
    "-m hydra/launcher=null": "one name is expected, such as hydra/launcher=local.",
    "-m hydra/launcher=basic,local": "one name is expected",
    "weights=null": "what the network has learnt is backbone.weights=..., a file or a tag.",
    "-m weights=null,trained": "what the network has learnt is backbone.weights=..., a file or a tag.",
    # what cannot be read
    "seed": "'seed' is no setting: name=value is expected.",
    "=3": "a name is missing before the '='.",
    "seed = 3": "without blanks around the '='",
    "méthode=iba": "'méthode' is no name of a setting",
    "method.=3": "is no name of a setting",
    "method=[blur": "is a quote or a bracket left open?",
    'outputs="it': "is a quote or a bracket left open?",
    "outputs=it's": """Quote the value: 'outputs="it'"'"'s"'""",
    "outputs=~/x": """Quote the value: 'outputs="~/x"'""",
    "outputs=données": """Quote the value: 'outputs="données"'""",
    "outputs=a=b": """Quote the value: 'outputs="a=b"'""",
    "outputs=\udcff": "holds bytes that are no text",
    "seed=foo(3)": "cannot be read",
    "seed=1,2": "seed=1,2 gives several values: add -m",
    "metric=a,b": "or metric=[...] to give one list",
    "-m method=null,blur": "a name is expected, method=NAME.",
    "-m attack=null,nope": "There is no attack 'nope'.",
    "-m method=blur,nope": "There is no method 'nope'.",
    "-m seed=1,abc": "seed=abc: a whole number is expected.",
    "-m method=blur,iba method.sigma=3": "method.sigma is not a setting of iba.",
    "-m limit=interval(0,1)": "does not support sweep type",
    "~method": "this cannot be taken away.",
    "~metric": "metric=[] runs without metrics.",
    "~metric.aria": "Could not delete",
    # options
    "--foo": "There is no option '--foo'.",
    "--config-name=x": "There is no option '--config-name'.",
    "--experimental-rerun=x": "There is no option '--experimental-rerun'.",
    "--cfg nope": "invalid choice: 'nope'",
    "--config-dir /no/such/folder": "--config-dir /no/such/folder: there is no such folder.",
    "--config-dir": "expected one argument",
}

WITH_BLANKS = ("seed = 3",)


@pytest.mark.parametrize("line", REFUSED, ids=ascii)
def test_a_mistake_is_one_or_two_lines_and_nothing_runs(
    line: str, run: Callable[..., int], plans: list[pipeline.Plan], capfd: pytest.CaptureFixture[str]
) -> None:
    code = run(*([line] if line in WITH_BLANKS else line.split()))
    out, err = capfd.readouterr()
    assert REFUSED[line] in err
    assert err.startswith("ibxai: ")
    assert len(err.splitlines()) <= 2
    assert max(map(len, err.splitlines())) <= 240
    assert code == 2
    assert plans == []
    assert out == ""
    assert not Path("outputs").exists()
    assert not Path("executed").exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["runn"], "There is no command 'runn'. Did you mean run?"),
        (["method=iba"], "A command comes first: ibxai run method=iba"),
        (["-x"], "There is no command '-x'."),
        (["list", "methods"], "There is no group 'methods'. Did you mean method?"),
        (["list", "target", "labl"], "There is no target 'labl'. Did you mean label or multilabel?"),
        (["list", "--config-dir", "/nope"], "there is no such folder"),
        (["report", "/nope"], "There is no folder '/nope'"),
        (["report", "a", "b"], "unrecognized arguments: b"),
        (["completion", "tcsh"], "There is no completion for 'tcsh', only for bash."),
        (["doctor", "--fix"], "unrecognized arguments: --fix"),
    ],
)
def test_mistakes_in_other_commands(arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    err = capsys.readouterr().err
    assert says in err
    assert len(err.splitlines()) == 1


def test_config_dir_must_hold_configs_and_may_not_hide_ours(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--config-dir", str(tmp_path)]) == 2
    assert "holds no config" in capsys.readouterr().err
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "label.yaml").write_text("# mine\n_target_: a.B\n")
    assert main(["list", "--config-dir", str(tmp_path)]) == 2
    assert "has the name of an option of ibxai's own" in capsys.readouterr().err


def test_broken_yaml_of_a_user(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "method").mkdir()
    (tmp_path / "method" / "broken.yaml").write_text("# mine\nname: [\n")
    assert main(["run", "--config-dir", str(tmp_path), "metric=[]", "method=broken"]) == 2
    err = capsys.readouterr().err
    assert "broken.yaml" in err
    assert len(err.splitlines()) <= 2
    (tmp_path / "method" / "broken.yaml").write_bytes(b"\xff\xfe")
    assert main(["list", "--config-dir", str(tmp_path)]) == 2
    assert "broken.yaml" in capsys.readouterr().err


def test_missing_gpu_is_an_error(run: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    wanted = "cuda:99" if torch.cuda.is_available() else "cuda"
    assert run(f"device={wanted}") == 2
    assert f"device={wanted}: " in capsys.readouterr().err


# what runs


def test_plan_holds_what_was_typed(run: Callable[..., int], plans: list[pipeline.Plan]) -> None:
    assert run("seed=3", "limit=2", "method.sigma=4", "target=classes", "target.ids=[1,2]", 'outputs="a b=ü"') == 0
    (plan,) = plans
    assert (plan.seed, plan.limit, plan.batch_size, plan.max_passes, plan.workers) == (3, 2, 16, None, 0)
    assert plan.outputs == Path("a b=ü")
    assert (plan.method_name, plan.method.sigma, plan.method.mode) == ("blur", 4.0, "fast")  # type: ignore[attr-defined]
    assert isinstance(plan.method.sigma, float)  # type: ignore[attr-defined]
    assert plan.backbone.inner.mean == (0.1, 0.2, 0.3)
    assert list(plan.metrics) == ["area"]
    assert plan.target.ids == (1, 2)  # type: ignore[union-attr]
    assert plan.settings["method"] == {
        "name": "blur",
        "_target_": "toyparts.Blur",
        "sigma": 4,
        "steps": 10,
        "mode": "fast",
    }
    assert "hydra" not in plan.settings
    assert plan.command.startswith("ibxai run --config-dir '")
    assert "method.sigma=4" in plan.command
    assert plan.device in ("cpu", "cuda")


@pytest.mark.parametrize(
    ("arguments", "check"),
    [
        (["metric=[]"], lambda p: p.metrics == {}),
        (["attack=null", "study=null"], lambda p: (p.attack, p.study) == (None, None)),
        (["metric=area"], lambda p: list(p.metrics) == ["area"]),
        (["~metric.area"], lambda p: p.metrics == {}),
        (["experiment=preset"], lambda p: (p.seed, p.method_name, p.method.sigma) == (7, "sharpen", 5.0)),
        (["experiment=preset", "seed=8"], lambda p: p.seed == 8),
        (["seed=1", "seed=2"], lambda p: p.seed == 2),
        (["seed='3'"], lambda p: p.seed == 3),
        (["limit=null"], lambda p: p.limit is None),
        (["+method.steps=4", "method=sharpen"], lambda p: p.method.steps == 4),
        (["backbone.inner=null"], lambda p: p.backbone.inner is None),
        (["+backbone.layers.early=b"], lambda p: p.backbone.layers == {"late": "a", "early": "b"}),
        (["dataset=pictures", "dataset.root=/some/where"], lambda p: p.dataset.root == Path("/some/where")),
        (["dataset=pictures", "dataset.root=${oc.env:HOME}"], lambda p: p.dataset.root == Path(os.environ["HOME"])),
        (["dataset=pictures", 'dataset.root="~/x"'], lambda p: p.dataset.root == Path.home() / "x"),
        (
            ["dataset=pictures", 'dataset.root="/dönnées, a=b#c (1)"'],
            lambda p: p.dataset.root == Path("/dönnées, a=b#c (1)"),
        ),
        (["method.steps=${oc.env:IBXAI_STEPS}"], lambda p: p.method.steps == 12),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_lines_that_are_fine(
    arguments: list[str],
    check: Callable[[pipeline.Plan], bool],
    run: Callable[..., int],
    plans: list[pipeline.Plan],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("IBXAI_STEPS", "12")
    assert run(*arguments) == 0
    assert check(plans[0])


def test_options_may_stand_anywhere(config_dir: Path, plans: list[pipeline.Plan]) -> None:
    assert main(["run", *TOYS[:2], "-m", "metric=[]", "--config-dir", str(config_dir), "method=blur,sharpen"]) == 0
    assert [p.method_name for p in plans] == ["blur", "sharpen"]


@pytest.mark.parametrize("value", ["3", "'3'", "${oc.env:IBXAI_SIGMA}"])
def test_a_setting_of_all_swept_methods_that_the_default_one_lacks(
    config_dir: Path, plans: list[pipeline.Plan], value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("IBXAI_SIGMA", "3")
    swept = ["metric=[]", "method=blur,sharpen", f"method.sigma={value}"]
    assert main(["run", "-m", "--config-dir", str(config_dir), *TOYS[:2], *swept]) == 0
    assert [p.method_name for p in plans] == ["blur", "sharpen"]
    assert {p.method.sigma for p in plans} == {3}  # type: ignore[attr-defined]


def test_before_a_sweep_over_parts_the_first_of_them_is_chosen() -> None:
    swept = ["seed=1,2", "method=iba,rise", "metric=[insertion],[]", "method.a=1,2", "experiment=a,b", "limit=3"]
    assert for_sweep(swept) == [
        *("seed=1,2", "method=iba", "method=iba,rise", "metric=[insertion]", "metric=[insertion],[]"),
        *("method.a=1,2", "experiment=a,b", "limit=3"),
    ]
    assert for_sweep(["method=choice(rise,iba)", "method=lime", "~metric.a"]) == [
        *("method=rise", "method=choice(rise,iba)", "method=lime", "~metric.a")
    ]


def test_none_and_an_attack_in_one_sweep(
    run: Callable[..., int], plans: list[pipeline.Plan], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("-m", "attack=null,mi_fgsm", "seed=1") == 0
    assert [p.attack is None for p in plans] == [True, False]
    assert [p.command.rpartition(" attack=")[2].split()[0] for p in plans] == ["null", "mi_fgsm"]
    out = capsys.readouterr().out
    assert "  0  attack=null     done" in out
    assert "  1  attack=mi_fgsm  done" in out


def test_end_of_a_run_names_the_report(
    run: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    outcome = pipeline.Outcome(Path("o/x"), Path("o/x/report.html"), rows=7, new_heatmaps=5, new_scores=10, skipped={})
    for result, code, text in [
        (outcome, 0, "7 rows: 5 heatmaps and 10 scores made, 2 heatmaps there already\n"),
        (replace(outcome, new_heatmaps=0, new_scores=0), 0, "nothing left to do: 7 rows there already\n"),
        (replace(outcome, new_heatmaps=7, new_scores=1), 0, "7 rows: 7 heatmaps and 1 score made\n"),
        (
            replace(outcome, new_heatmaps=7, skipped={"a": "why"}),
            3,
            "7 rows: 7 heatmaps and 10 scores made\n1 sample skipped: o/x/skipped.csv says why\n",
        ),
    ]:
        monkeypatch.setattr(pipeline, "run", lambda plan, result=result: result)
        assert run() == code
        assert capsys.readouterr().out == text + "report: o/x/report.html\n"


def test_a_sweep_goes_on_past_failing_jobs_and_sums_up(
    run: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run_some(plan: pipeline.Plan) -> pipeline.Outcome:
        if plan.seed == 1:
            raise UserError("no such picture\nput it there")
        skipped = {"a": "why", "b": "why"} if plan.seed == 2 else {}
        return pipeline.Outcome(Path(f"o/{plan.seed}"), Path("r"), 7, 7, 14, skipped)

    monkeypatch.setattr(pipeline, "run", run_some)
    assert run("-m", "seed=0,1,2") == 2
    out, err = capsys.readouterr()
    assert err == "ibxai: no such picture\nput it there\n"
    summary = out[out.index("3 jobs") :]
    assert summary == dedent("""\
        3 jobs: 2 done, 1 failed
          0  seed=0  done: 7 rows: 7 heatmaps and 14 scores made
                     o/0
          1  seed=1  failed: no such picture
          2  seed=2  done: 7 rows: 7 heatmaps and 14 scores made, 2 samples skipped
                     o/2
        """)
    assert run("-m", "seed=0,2") == 3
    assert run("-m", "seed=0,3") == 0


def test_a_bug_keeps_its_traceback(
    run: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(plan: pipeline.Plan) -> pipeline.Outcome:
        if plan.seed == 0:
            raise ZeroDivisionError("of ours")
        return pipeline.Outcome(Path("o"), Path("r"), 7, 7, 14, {})

    monkeypatch.setattr(pipeline, "run", fail)
    assert run() == 1
    assert "Traceback" in capsys.readouterr().err
    assert run("-m", "seed=0,1") == 1
    assert "failed: ZeroDivisionError: of ours" in capsys.readouterr().out


@pytest.mark.parametrize("error", [KeyboardInterrupt, BrokenPipeError])
@pytest.mark.parametrize("sweep", [[], ["-m", "seed=0,1"]])
def test_interruptions(
    error: type[BaseException],
    sweep: list[str],
    run: Callable[..., int],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    def interrupted(plan: pipeline.Plan) -> pipeline.Outcome:
        raise error

    monkeypatch.setattr(pipeline, "run", interrupted)
    monkeypatch.setattr("ibxai.cli._silence_stdout", lambda: None)  # the test's own stdout stays
    code, says = {
        KeyboardInterrupt: (130, "ibxai: stopped. What is finished is kept: the same command continues from there."),
        BrokenPipeError: (141, ""),
    }[error]
    assert run(*sweep) == code
    assert capfd.readouterr().err.strip() == says


def test_cfg_prints_yaml_and_runs_nothing(
    run: Callable[..., int], plans: list[pipeline.Plan], capsys: pytest.CaptureFixture[str]
) -> None:
    import yaml

    assert run("--cfg", "job", "seed=3", "method.steps=${seed}") == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["seed"] == 3
    assert printed["method"]["steps"] == "${seed}"
    assert "hydra" not in printed
    assert run("--cfg", "job", "--resolve", "seed=3", "method.steps=${seed}") == 0
    assert yaml.safe_load(capsys.readouterr().out)["method"]["steps"] == 3
    assert plans == []


def test_arguments_and_environment_of_the_process_are_given_back(
    run: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = list(sys.argv)
    run()
    run("method=nope")
    assert sys.argv == before


# help and lists


def test_no_argument_prints_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["--help"], ["-h"]):
        assert main(arguments) == 0
        assert capsys.readouterr().out == HELP
    for command in COMMANDS:
        assert f"\n  {command} " in HELP


def test_run_help_names_every_part_and_setting(config_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from ibxai.config import RunConfig

    assert main(["run", "--help", "--config-dir", str(config_dir)]) == 0
    text = capsys.readouterr().out
    for name in ("blur", "toynet", "pictures", "classes", "preset", "predicted*"):
        assert name in text
    for setting in RunConfig.__dataclass_fields__:
        assert f"  {setting}" in text


def test_examples_of_the_help_exist(capsys: pytest.CaptureFixture[str]) -> None:
    """Every `ibxai run` line of both helps composes with the configs that we ship."""
    import shlex

    lines = [line for line in (HELP + RUN_HELP).splitlines() if line.startswith("  ibxai run")]
    assert len(lines) >= 8
    for line in lines:
        arguments = shlex.split(line.split("   ")[0])[2:] if "   " in line.strip() else shlex.split(line)[2:]
        if "--config-dir" in arguments:
            continue
        singles = [a.partition(",")[0] if "," in a and "[" not in a else a for a in arguments if a != "-m"]
        assert main(["run", "--cfg", "job", *singles]) == 0, line


def test_list(config_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "--config-dir", str(config_dir)]) == 0
    text = capsys.readouterr().out
    assert [line for line in text.splitlines() if line in GROUPS] == list(GROUPS)
    assert main(["list", "target"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "target"
    assert "  predicted   The class that the network predicts  (default)" in lines
    assert main(["list", "method", "blur", "--config-dir", str(config_dir)]) == 0
    assert "sigma: 2.0  # its width" in capsys.readouterr().out


def test_every_config_of_ours_says_what_it_is() -> None:
    for group, options in entries().items():
        for name, entry in options.items():
            assert entry.description, f"conf/{group}/{name}.yaml has no description in its first line"


def test_comments_of_a_yaml() -> None:
    text = "# title\na: 1  # first\nb:  # group\n  c: x # inner\n  d: 3\ne: [1, 2]\n"
    assert comments(text) == {"a": "first", "b": "group", "b.c": "inner"}


def test_report_is_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    seen = []
    monkeypatch.setattr("ibxai.report.write_leaderboard", lambda o: seen.append(o) or o / "report.html", raising=False)
    assert main(["report", str(tmp_path)]) == 2
    assert f"There are no runs in '{tmp_path}'" in capsys.readouterr().err
    run = tmp_path / "dataset" / "backbone" / "method" / "identity"
    run.mkdir(parents=True)
    (run / "provenance.json").write_text("{}")
    assert main(["report", f"outputs={tmp_path}"]) == 0
    assert main(["report", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"{tmp_path}/report.html\n" * 2
    assert seen == [tmp_path, tmp_path]


# the program itself

IBXAI = [sys.executable, "-m", "ibxai"]


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], ["list"], ["run", "--help"], ["run", "metric=[]", "method=nope"]]
)
def test_quick_answers_do_without_torch(arguments: list[str]) -> None:
    code = f"import sys; from ibxai.cli import main; main({arguments}); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=60)


def test_a_closed_pipe_is_quiet() -> None:
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", f"{' '.join(IBXAI)} list | true; {' '.join(IBXAI)} --help | head -1"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stderr == ""
    assert done.stdout.startswith("ibxai explains")


def test_output_of_a_terminal_without_unicode() -> None:
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(
        [*IBXAI, "run", "outputs=ü"], capture_output=True, text=True, timeout=60, env=environment, check=False
    )
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


def test_the_installed_command_and_its_exit_code() -> None:
    done = subprocess.run(
        [*IBXAI, "run", "metric=[]", "method=nope"], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("ibxai: There is no method 'nope'.")
