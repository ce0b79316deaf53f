"""Studies as part of a run: chosen by name, kept in its folder, resumed by the same command, shown on its page."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from test_studies import Stop, failing_after
from test_training import TINY, Blocks, trained_weights

from ibxai.backbones.training import Recipe
from ibxai.cells import Cell, Cells, finished_cells, studies_in
from ibxai.cli import main
from ibxai.errors import UserError
from ibxai.jobs import told
from ibxai.methods.gradcam import GradCAM
from ibxai.metrics import randomization
from ibxai.metrics.randomization import ParameterRandomization
from ibxai.metrics.roar import ROAR
from ibxai.pipeline import Plan, run
from ibxai.report.studies import study_sections
from ibxai.store import MetricKey, RunStore
from ibxai.targets import Classes, Predicted

STUDY = ParameterRandomization(cells=3, window=3)
PLACES = 1 + 2 * 3  # of its cells: nothing, and three groups in two orders


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained_weights(Blocks(), tmp_path_factory.mktemp("weights"))


@pytest.fixture
def plan(tmp_path: Path, weights: Path) -> Plan:
    return Plan(
        dataset=Blocks(),
        backbone=replace(TINY, weights=str(weights)),
        method=GradCAM(relu=False),
        method_name="gradcam",
        metrics={},
        target=Predicted(),
        settings={"seed": 0},
        seed=0,
        device="cpu",
        batch_size=5,
        max_passes=None,
        workers=0,
        limit=None,
        pictures=1,
        outputs=tmp_path / "outputs",
        command="ibxai run",
        study=STUDY,
        study_name="parameter_randomization",
    )


def files_in(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_a_run_with_a_study(plan: Plan) -> None:
    outcome = run(plan)
    assert (outcome.new_heatmaps, outcome.new_cells) == (12, PLACES)
    assert told(outcome) == "12 rows: 12 heatmaps and 0 scores made, 7 cells of the study"
    [(key, folder)] = studies_in(outcome.folder)
    assert key.name == "parameter_randomization"
    assert key.settings["cells"] == 3
    assert {p.name for p in folder.iterdir()} >= {"settings.json", "finished.json"}
    assert len(list(folder.iterdir())) == PLACES + 2
    before = files_in(outcome.folder)
    again = run(plan)
    assert told(again) == "nothing left to do: 12 rows there already"
    assert files_in(outcome.folder) == before


def test_a_study_of_a_run_that_is_there_already(plan: Plan) -> None:
    first = run(replace(plan, study=None, study_name=""))
    assert first.new_cells == 0
    assert not (first.folder / "studies.csv").exists()
    second = run(plan)
    assert second.folder == first.folder  # a study judges heatmaps, and changes none
    assert (second.new_heatmaps, second.new_cells) == (0, PLACES)
    third = run(replace(plan, study=replace(STUDY, orders=("independent",))))
    assert (third.new_heatmaps, third.new_cells) == (0, 3)
    assert len(studies_in(first.folder)) == 2
    variants = {section.variant for section in study_sections(RunStore(first.folder))}
    assert variants == {"orders = ['cascading', 'independent'], 12 rows", "orders = ['independent'], 12 rows"}
    assert set(pd.read_csv(first.folder / "studies.csv")["sign"]) == {"abs"}
    fewer = run(replace(plan, limit=5))  # another set of rows: other cells
    assert (fewer.folder, fewer.new_cells) == (first.folder, PLACES)


@pytest.mark.parametrize("error", [Stop, KeyboardInterrupt])
def test_a_run_that_is_stopped_in_its_study(
    plan: Plan, tmp_path: Path, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed = run(replace(plan, outputs=tmp_path / "other"))
    with monkeypatch.context() as patched:
        patched.setattr(f"{__name__}.Stop", error)
        patched.setattr("test_studies.Stop", error)
        patched.setattr(randomization, "compared", failing_after(randomization.compared, 3))
        with pytest.raises(error):
            run(plan)
    outcome = run(plan)
    assert (outcome.new_heatmaps, outcome.new_cells) == (0, PLACES - 3)
    tables = [(folder / "studies.csv").read_text() for folder in (outcome.folder, undisturbed.folder)]
    assert tables[0] == tables[1]
    told_of = [
        {k: v for k, v in files_in(o.folder).items() if k.startswith("studies/")} for o in (outcome, undisturbed)
    ]
    assert told_of[0] == told_of[1]


def test_a_study_that_cannot_be_leaves_nothing(plan: Plan) -> None:
    for changed, says in [
        ({"study": ROAR(), "target": Classes((0, 1))}, "choose one target"),
        ({"study": replace(STUDY, window=17)}, "SSIM's window is 17"),
    ]:
        with pytest.raises(UserError, match=says):
            run(replace(plan, **changed))
        assert not plan.outputs.exists()


def test_roar_in_a_run(plan: Plan) -> None:
    asked = replace(plan, study=ROAR(fractions=(0.0, 0.5), repeats=2, training=Recipe(1, 10)), study_name="roar")
    outcome = run(asked)
    assert outcome.new_cells == 6
    table = pd.read_csv(outcome.folder / "studies.csv")
    assert list(table.columns[:4]) == ["study", "fraction", "estimator", "repeat"]
    assert len(table) == 12
    assert set(table["estimator"]) == {"untouched", "gradcam", "random_control"}
    page = outcome.report.read_text()
    assert "Accuracy on the test split" in page
    assert "random control" in page
    assert told(run(asked)).startswith("nothing left to do")


# the table and the page


def write_study(folder: Path, name: str, cells: list[Cell], finished: bool = True) -> None:
    kept = Cells(folder / "studies", MetricKey(name, {"version": 1}))
    for cell in cells:
        kept.get(cell.coordinates, lambda cell=cell: cell)  # type: ignore[misc]
    if finished:
        kept.finish()


@pytest.fixture
def values() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(3, 40))


def test_the_table(tmp_path: Path, values: np.ndarray) -> None:
    values[1, 5:9] = np.nan
    ids = tuple(f"r{i}" for i in range(40))
    groups = tuple(f"g{i // 2}" for i in range(40))
    cells = [
        Cell({"step": i, "layer": f"l<{i}>"}, ids, groups, {"ssim": row.tolist()}, {"train_accuracy": 0.1 * i})
        for i, row in enumerate(values)
    ]
    write_study(tmp_path, "a_study", cells)
    write_study(tmp_path, "b_study", [Cell({"fraction": 0.5, "repeat": 0}, totals={"x": float("nan")})], finished=False)
    sections = study_sections(RunStore(tmp_path))
    table = pd.read_csv(tmp_path / "studies.csv", keep_default_na=False)
    assert list(table.columns) == [
        "study", "step", "layer", "fraction", "repeat", "metric", "value", "low", "high", "n", "undefined", "sign",
        "settings",
    ]  # fmt: skip
    ssim = table[table["metric"] == "ssim"]
    assert ssim["step"].astype(str).tolist() == ["0", "1", "2"]
    assert ssim["layer"].tolist() == ["l<0>", "l<1>", "l<2>"]
    assert ssim["value"].astype(float).tolist() == pytest.approx([np.nanmean(row) for row in values])
    assert ssim["n"].astype(int).tolist() == [40, 36, 40]
    assert ssim["undefined"].astype(int).tolist() == [0, 4, 0]
    for low, high, row in zip(ssim["low"].astype(float), ssim["high"].astype(float), values, strict=True):
        means = np.nanmean(row.reshape(20, 2), axis=1) if not np.isnan(row).any() else None
        if means is not None:  # two rows a group: the deviation of a mean of 20 independent numbers
            error = means.std(ddof=1) / np.sqrt(20)
            assert (high - low) / 3.92 == pytest.approx(error, rel=0.1)
            assert low < row.mean() < high
    total = table[table["metric"] == "train_accuracy"]
    assert total["value"].astype(float).tolist() == pytest.approx([0, 0.1, 0.2])
    assert set(total["n"]) == {"nan"}
    assert table.iloc[-1][["step", "layer", "fraction", "repeat"]].tolist() == ["", "", "0.5", "0"]
    assert [section.finished for section in sections] == [True, False]
    assert sections[0].header == ["step", "layer", "ssim", "train accuracy"]
    assert sections[0].lines[1][:2] == ["1", "l<1>"]
    assert sections[0].lines[1][2].endswith("4 undefined")


def test_repeats_are_put_together(tmp_path: Path) -> None:
    def cell(fraction: float, estimator: str, repeat: int, share: float) -> Cell:
        right = [1.0] * round(10 * share) + [0.0] * round(10 - 10 * share)
        place = {"fraction": fraction, "estimator": estimator, "repeat": repeat}
        ids = tuple(map(str, range(10)))
        return Cell(place, ids, ids, {"accuracy": right}, {"train_accuracy": share})

    cells = [cell(0.0, "untouched", r, 0.9) for r in (0, 1)]
    cells += [cell(0.5, name, r, share) for name, shares in {"iba": (0.2, 0.4), "random_control": (0.7, 0.7)}.items()
              for r, share in enumerate(shares)]  # fmt: skip
    write_study(tmp_path, "roar", cells)
    [section] = study_sections(RunStore(tmp_path))
    assert section.header == ["fraction", "estimator", "accuracy", "train accuracy"]
    assert section.lines[1] == ["0.5", "iba", "0.300 (0.200 to 0.400)", "0.300 (0.200 to 0.400)"]
    [chart] = section.charts
    assert [entry.label for entry in chart.legend] == ["iba", "random control"]
    assert chart.svg.count("<polyline") == 2
    assert len(pd.read_csv(tmp_path / "studies.csv")) == 12


def test_no_study_no_table(tmp_path: Path) -> None:
    (tmp_path / "studies" / "x").mkdir(parents=True)
    (tmp_path / "studies" / "x" / "settings.json").write_text("{}")
    write_study(tmp_path, "empty", [])
    assert study_sections(RunStore(tmp_path)) == []
    assert not (tmp_path / "studies.csv").exists()


def test_cells_without_rows_and_without_defined_values(tmp_path: Path) -> None:
    """Every sample was skipped; every map was constant."""
    write_study(tmp_path, "parameter_randomization", [Cell({"order": "cascading", "step": 0, "layer": "nothing"})])
    assert study_sections(RunStore(tmp_path)) == []
    undefined = {name: [float("nan")] * 3 for name in ("ssim", "spearman")}
    places = [{"order": "independent", "step": step, "layer": f"l{step}"} for step in (1, 2)]
    cells = [Cell(place, ("x", "y", "z"), ("x",) * 3, undefined) for place in places]
    write_study(tmp_path / "b", "parameter_randomization", cells)
    [section] = study_sections(RunStore(tmp_path / "b"))
    assert section.lines[0] == ["independent", "1", "l1", "\N{EN DASH}, 3 undefined", "\N{EN DASH}, 3 undefined"]
    assert len(section.charts) == 1


def test_cells_come_in_the_order_of_the_study(tmp_path: Path) -> None:
    cells = [Cell({"layer": name}, totals={"x": 0.0}) for name in ("z", "a", "M", "b/../c")]
    write_study(tmp_path, "a_study", cells)
    [(_, folder)] = studies_in(tmp_path)
    assert [cell.coordinates["layer"] for cell in finished_cells(folder)] == ["z", "a", "M", "b/../c"]


# the command line


@pytest.fixture
def config(tmp_path: Path, weights: Path) -> list[str]:
    parts = {
        "dataset/blocks": {"_target_": "test_training.Blocks", "name": "blocks"},
        "backbone/tiny": {
            "_target_": "ibxai.backbones.small.SmallCNN", "name": "tiny", "classes": 3, "widths": [8],
            "weights": str(weights), "layers": {"gradcam": "stage2"},
            "preprocessing": {"resize": 16, "crop": 16, "mean": [0.5] * 3, "std": [0.5] * 3},
        },
    }  # fmt: skip
    for name, settings in parts.items():
        path = tmp_path / "conf" / f"{name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("# tiny\n" + yaml.safe_dump(settings))
    chosen = ["dataset=blocks", "backbone=tiny", "method=gradcam", "metric=[]", "device=cpu", "pictures=1"]
    return ["run", "--config-dir", str(tmp_path / "conf"), f"outputs='{tmp_path / 'outputs'}'", *chosen]


def test_a_study_on_the_command_line(config: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    chosen = [*config, "study=parameter_randomization", "study.window=3", "study.cells=3", "limit=4"]
    assert main(chosen) == 0
    assert "7 cells of the study" in capsys.readouterr().out
    assert main(chosen) == 0
    assert "nothing left to do" in capsys.readouterr().out
    [page] = (tmp_path / "outputs").glob("*/*/*/*/report.html")
    text = page.read_text()
    for expected in ("Parameter randomisation", "Cascading", "Independent", "nothing", "classifier", "stage1"):
        assert expected in text


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (["study=roarr"], "There is no study 'roarr'. Did you mean roar"),
        (["study=[roar,roar_keep]"], "-m study=roar,roar_keep"),
        (["study=roar", "study.fraction=[0.1]"], "Did you mean fractions"),
        (["study=roar", "study.fractions=[2]"], "study.fractions is [2.0]"),
        (["study=roar", "study.training.epochs=0"], "training.epochs is 0"),
        (["+study=roar"], "choose without '+'"),
        (["study=parameter_randomization", "study.orders=[up]"], "study.orders[0]=up: one of cascading, independent"),
        (["study=roar", "target=classes", "target.ids=[0,1]"], "study=roar needs one heatmap a picture"),
    ],
)
def test_mistakes_about_studies(
    config: list[str], settings: list[str], says: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main([*config, *settings]) == 2
    out, err = capsys.readouterr()
    assert says in err
    assert out == ""
    assert len(err.splitlines()) <= 2
    assert not (tmp_path / "outputs").exists()


def test_studies_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "study"]) == 0
    out = capsys.readouterr().out
    for name in ("roar", "roar_keep", "parameter_randomization", "label_randomization"):
        assert f"  {name} " in out
    assert "(default)" not in out
    assert main(["run", "--help"]) == 0
    assert "study " in capsys.readouterr().out
