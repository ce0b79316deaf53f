"""Whole runs of a tiny network on tiny pictures: what they leave, what they reuse, what names their folder.

The parts below are shared by test_resume.py and test_bad_input.py, through YAMLs of a --config-dir.
"""

from __future__ import annotations

import csv
import json
import logging
import shutil
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from ibxai import jobs, pipeline
from ibxai.backbones import Backbone
from ibxai.backbones.backbone import freeze
from ibxai.datasets.pictures import read_picture
from ibxai.draws import sample_keys, uniform
from ibxai.errors import BadSample, UserError
from ibxai.identity import metric_key
from ibxai.methods.gradcam import GradCAM
from ibxai.methods.iba import IBA
from ibxai.metrics.insertion import Deletion, Insertion
from ibxai.pipeline import Plan, run
from ibxai.preprocessing import Preprocessing
from ibxai.store import RunStore
from ibxai.targets import Classes, Label, Predicted
from ibxai.types import Attribution, Attributor, Batch, Picture, Sample

SIZE, CLASSES = 16, 4
NAMES = tuple("abcdefg")
ALL_ROWS = [f"{name}@predicted" for name in NAMES]


# tiny parts


def write_pictures(folder: Path, names: Sequence[str] = NAMES) -> Path:
    """Noise with a bright square; 'c' and 'f' have no label, the others their place modulo CLASSES."""
    folder.mkdir(parents=True, exist_ok=True)
    for place, name in enumerate(names):
        pixels = np.random.default_rng(place).integers(0, 90, (20, 22, 3), dtype=np.uint8)
        pixels[place : place + 6, 2 : 2 + 2 * place + 1, place % 3] = 255
        Image.fromarray(pixels).save(folder / f"{name}.png")
    return folder


@dataclass(frozen=True)
class TinyData:
    """The pictures of a folder. raises: a sample whose `read` has a bug."""

    root: str
    name: str = "tinydata"
    classes: int = CLASSES
    raises: str | None = None

    @property
    def class_names(self) -> Sequence[str]:
        return [f"class number {i}" for i in range(self.classes)]

    @property
    def reference_note(self) -> str:
        return "The reference split is the tiny pictures."

    def samples(self) -> Sequence[Sample]:
        paths = sorted(Path(self.root).glob("*.png"))
        return [
            Sample(p.stem, f"group {n // 2}", p, p.stat().st_size, None if p.stem in "cf" else n % CLASSES)
            for n, p in enumerate(paths)
        ]

    def reference(self) -> Sequence[Sample]:
        return self.samples()

    def read(self, sample: Sample) -> Picture:
        if sample.sample_id == self.raises:
            raise ZeroDivisionError("nobody foresaw this")
        return Picture(read_picture(sample.source))


@dataclass(frozen=True)
class TinyNet:
    name: str = "tinynet"
    weights_seed: int = 0
    nan: bool = False
    random_weights: bool = False
    resize: int = SIZE

    def load(self, max_passes: int) -> Backbone:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.weights_seed)
            network = nn.Sequential(
                nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 5, 3, padding=1), nn.ReLU(),
                nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(20, CLASSES),
            )  # fmt: skip
            with torch.no_grad():
                network[-1].weight *= 5
                if self.nan:
                    network[2].bias[1] = torch.nan
        return freeze(
            network,
            layers={"bottleneck": "1", "gradcam": "3"},
            preprocessing=Preprocessing(self.resize, SIZE, (0.5,) * 3, (0.5,) * 3),
            name=self.name,
            random_weights=self.random_weights,
            max_passes=max_passes,
        )


EXPLAINED: list[str] = []  # sample ids, as methods got them
JUDGED: list[str] = []  # sample ids, as metrics got them
STOP_AT: set[str] = set()  # samples at which Ctrl-C comes


@dataclass(frozen=True)
class Spy:
    """Uniform numbers, drawn for the sample, times the picture. fails_at: a sample at which it has a bug.
    seconds: that each batch takes.
    """

    scale: float = 1.0
    fails_at: str | None = None
    seconds: float = 0.0

    version: ClassVar[int] = 1
    uses_reference: ClassVar[bool] = False

    def fit(
        self, backbone: Backbone, reference: Iterable[Batch], seed: int, state: Mapping[str, Tensor] | None = None
    ) -> Attributor:
        def attribute(batch: Batch) -> Attribution:
            if self.fails_at in batch.sample_ids:
                raise RuntimeError("in the middle")
            if not STOP_AT.isdisjoint(batch.sample_ids):
                raise KeyboardInterrupt
            time.sleep(self.seconds)
            EXPLAINED.extend(batch.sample_ids)
            draws = uniform(sample_keys(seed, batch.sample_ids, "spy"), 0, (SIZE, SIZE))
            return Attribution(self.scale * draws * batch.inputs.mean(1), "score", {"sum": draws.sum((1, 2))})

        return attribute


@dataclass(frozen=True)
class Mean:
    """The mean of the heatmap and of its picture, and a curve."""

    power: int = 1

    version: ClassVar[int] = 1
    higher_is_better: ClassVar[bool] = True

    def __call__(self, backbone: Backbone, batch: Batch, attribution: Attribution) -> Mapping[str, Tensor]:
        JUDGED.extend(batch.sample_ids)
        flat = attribution.heatmap.flatten(1) ** self.power
        return {"value": flat.mean(1), "picture": batch.inputs.mean((1, 2, 3)), "curve": flat[:, :5]}


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Threads that wait for each other cost more than pictures of this size."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _nothing_seen_yet() -> None:
    EXPLAINED.clear()
    JUDGED.clear()
    STOP_AT.clear()


@pytest.fixture
def plan(pictures: Path, tmp_path: Path) -> Plan:
    return Plan(
        dataset=TinyData(str(pictures)),
        backbone=TinyNet(),
        method=Spy(),
        method_name="spy",
        metrics={"mean": Mean()},
        target=Predicted(),
        settings={"seed": 0, "note": "tiny"},
        seed=0,
        device="cpu",
        batch_size=3,
        max_passes=None,
        workers=0,
        limit=None,
        pictures=2,
        outputs=tmp_path / "outputs",
        command="ibxai run tiny",
    )


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Every pass of every network, whoever asks for it."""
    counted: Counter[str] = Counter()
    count = Backbone._count

    def also(self: Backbone, part: str, rows: Tensor) -> None:
        counted[part] += len(rows)
        count(self, part, rows)

    monkeypatch.setattr(Backbone, "_count", also)
    return counted


# what a folder says, read the plain way


def lines_of(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def heatmaps_of(folder: Path) -> dict[str, np.ndarray]:
    """row -> heatmap, straight from the files."""
    found = {}
    for path in (folder / "heatmaps").glob("*"):
        with np.load(path) as arrays:
            found[str(arrays["row"])] = arrays["heatmap"]
    return found


def assert_same_results(folder: Path, other: Path, tolerance: float = 1e-4) -> None:
    """Rows and order identical, numbers within 1e-4 (rule 2)."""
    for name in ("samples.csv", "skipped.csv"):
        assert (folder / name).exists() == (other / name).exists()
        if (folder / name).exists():
            assert (folder / name).read_bytes() == (other / name).read_bytes()
    one, two = lines_of(folder / "metrics.csv"), lines_of(other / "metrics.csv")
    keys = ("sample", "target", "method", "metric")
    assert [[line[k] for k in keys] for line in one] == [[line[k] for k in keys] for line in two]
    np.testing.assert_allclose(*[[float(line["value"]) for line in table] for table in (one, two)], rtol=tolerance)
    maps, others = heatmaps_of(folder), heatmaps_of(other)
    assert maps.keys() == others.keys()
    for row, values in maps.items():
        np.testing.assert_allclose(values, others[row], rtol=tolerance, atol=tolerance * np.abs(values).max())


def scores_of(folder: Path) -> set[str]:
    return {path.name for path in (folder / "scores").iterdir()}


def files_of_run(folder: Path) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}


def snapshot(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {str(p): (p.stat().st_mtime_ns, p.read_bytes()) for p in sorted(folder.rglob("*")) if p.is_file()}


# the layout


def test_a_run_leaves_what_is_documented_and_nothing_else(plan: Plan) -> None:
    outcome = run(plan)
    identity = outcome.folder.name
    assert outcome.folder == plan.outputs / "tinydata" / "tinynet" / "spy" / identity
    assert len(identity) == 12
    [scores] = scores_of(outcome.folder)
    assert scores.startswith("mean-")
    batches = {name for name in files_of_run(outcome.folder) if name.startswith("scores/") and name.endswith(".npz")}
    assert len(batches) == 3, "seven rows in batches of three, one file each"
    [session] = {name for name in files_of_run(outcome.folder) if name.startswith("sessions/")}
    assert files_of_run(outcome.folder) - batches - {session} == {
        "config.yaml", "provenance.json", "classes.json", "samples.csv", "run.log", "skipped.csv", "metrics.csv",
        "summary.csv", "report.html", f"scores/{scores}/settings.json",
        *(f"heatmaps/{row}.npz" for row in ALL_ROWS),
        *(f"{folder}/{row}.png" for folder in ("pictures", "overlays") for row in ALL_ROWS[:2]),
    } - ({"skipped.csv"} - files_of_run(outcome.folder))  # fmt: skip
    assert [p.name for p in plan.outputs.iterdir()] == ["tinydata"]
    assert (outcome.rows, outcome.new_heatmaps, outcome.new_scores, outcome.skipped) == (7, 7, 7, {})
    assert outcome.report == outcome.folder / "report.html"


def test_provenance(plan: Plan) -> None:
    told = json.loads((run(plan).folder / "provenance.json").read_text())
    assert told["command"] == "ibxai run tiny"
    assert (told["dataset"], told["backbone"], told["method"]) == ("tinydata", "tinynet", "spy")
    assert told["weights"] == f"sha256 {TinyNet().load(1).digest}"
    assert told["identity"]["method"]["scale"] == 1.0
    assert told["identity"]["seed"] == 0
    assert set(told["versions"]) >= {"python", "ibxai", "torch", "torchvision", "timm", "numpy"}
    assert told["device"].startswith("cpu")
    assert told["notes"] == []
    assert told["reference"] is None
    assert told["started"] <= told["finished"]
    assert told["passes"] == {"forward": 7}, "one a row"
    assert told["seconds"] >= 0
    assert str(plan.dataset.root) not in json.dumps(told["identity"])  # type: ignore[attr-defined]


def test_config_log_and_classes(plan: Plan) -> None:
    folder = run(plan).folder
    assert (folder / "config.yaml").read_text() == "seed: 0\nnote: tiny\n"
    log = (folder / "run.log").read_text()
    assert "ibxai run tiny" in log
    assert "tinynet on cpu" in log
    assert json.loads((folder / "classes.json").read_text()) == [f"class number {i}" for i in range(CLASSES)]
    assert [line["row"] for line in lines_of(folder / "samples.csv")] == ALL_ROWS
    assert [line["label"] for line in lines_of(folder / "samples.csv")] == ["0", "1", "", "3", "0", "", "2"]


def test_tables_agree_with_the_score_files(plan: Plan) -> None:
    """Made again from the raw files with nothing but numpy."""
    folder = run(replace(plan, metrics={"mean": Mean(), "insertion": Insertion(step=0.25)})).folder
    expected: dict[tuple[str, str], float] = {}
    for name, entry, label in (
        ("mean", "value", "mean"), ("mean", "picture", "mean_picture"), ("insertion", "auc", "insertion")
    ):  # fmt: skip
        for path in folder.glob(f"scores/{name}-*/*.npz"):
            with np.load(path) as arrays:
                expected |= {
                    (str(r).removesuffix("@predicted"), label): float(v)
                    for r, v in zip(arrays["row"], arrays[entry], strict=True)
                }
    table = lines_of(folder / "metrics.csv")
    assert [(line["sample"], line["metric"]) for line in table] == [
        (sample, label) for sample in NAMES for label in ("insertion", "mean", "mean_picture")
    ]
    assert {(line["sample"], line["metric"]): float(line["value"]) for line in table} == expected
    assert {line["target"] for line in table} == {"predicted"}
    assert {line["method"] for line in table} == {"spy"}
    summary = {line["metric"]: line for line in lines_of(folder / "summary.csv")}
    assert summary.keys() == {"insertion", "mean", "mean_picture"}
    for label, line in summary.items():
        values = [expected[sample, label] for sample in NAMES]
        assert float(line["mean"]) == pytest.approx(np.mean(values), rel=1e-12)
        assert float(line["low"]) <= float(line["mean"]) <= float(line["high"])
        assert (line["n"], line["undefined"], line["groups"]) == ("7", "0", "4")


def test_heatmap_files_hold_what_the_method_and_the_network_said(plan: Plan, pictures: Path) -> None:
    store = RunStore(run(plan).folder)
    backbone, data = TinyNet().load(8), TinyData(str(pictures))
    for sample in data.samples():
        inputs, _ = backbone.preprocessing(data.read(sample))
        probabilities = backbone(inputs[None]).softmax(1)[0]
        stored = store.read_heatmap(f"{sample.sample_id}@predicted")
        assert stored.prediction == stored.target == int(probabilities.argmax())
        assert stored.target_probability == pytest.approx(float(probabilities.max()), rel=1e-5)
        draws = uniform(sample_keys(0, [sample.sample_id], "spy"), 0, (SIZE, SIZE))[0]
        np.testing.assert_allclose(stored.heatmap, draws * inputs.mean(0), rtol=1e-5, atol=1e-6)
        assert float(stored.diagnostics["sum"]) == pytest.approx(float(draws.sum()), rel=1e-5)


def test_runs_from_anywhere(plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere = tmp_path / "else where"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    outcome = run(replace(plan, outputs=Path("my results")))
    assert (elsewhere / outcome.report).is_file()
    assert {p.name for p in elsewhere.iterdir()} == {"my results"}
    assert_same_results(elsewhere / outcome.folder, run(plan).folder, tolerance=0)


# doing no work twice


def test_the_same_plan_again_does_nothing(plan: Plan, passes: Counter[str]) -> None:
    first = run(plan)
    assert passes.total() > 0
    before = snapshot(plan.outputs)
    passes.clear()
    EXPLAINED.clear()
    JUDGED.clear()
    again = run(plan)
    assert again == replace(first, new_heatmaps=0, new_scores=0)
    assert (passes.total(), EXPLAINED, JUDGED) == (0, [], [])
    assert snapshot(plan.outputs) == before, "not a byte, not a time"
    assert jobs.told(again) == "nothing left to do: 7 rows there already"


def test_a_new_metric_reuses_the_heatmaps(plan: Plan) -> None:
    first = run(plan)
    before = heatmaps_of(first.folder)
    EXPLAINED.clear()
    JUDGED.clear()
    more = run(replace(plan, metrics={"mean": Mean(), "deletion": Deletion(step=0.5)}))
    assert more.folder == first.folder
    assert EXPLAINED == [], "the method was not asked again"
    assert JUDGED == [], "nor was the metric that was there"
    assert (more.new_heatmaps, more.new_scores) == (0, 7)
    assert jobs.told(more) == "7 rows: 0 heatmaps and 7 scores made, 7 heatmaps there already"
    after = heatmaps_of(first.folder)
    assert all((after[row] == before[row]).all() for row in before)
    assert [line["metric"] for line in lines_of(more.folder / "summary.csv")] == ["deletion", "mean", "mean_picture"]
    assert "deletion" in more.report.read_text()


def test_scores_made_later_are_those_made_at_once(plan: Plan) -> None:
    metrics = {"mean": Mean(), "deletion": Deletion(step=0.5)}
    at_once = run(replace(plan, metrics=metrics))
    run(replace(plan, metrics={}, outputs=plan.outputs / "later"))
    later = run(replace(plan, metrics=metrics, outputs=plan.outputs / "later"))
    assert_same_results(at_once.folder, later.folder)


def test_another_setting_of_a_metric_stands_beside_the_first(plan: Plan) -> None:
    first = run(plan)
    EXPLAINED.clear()
    second = run(replace(plan, metrics={"mean": Mean(power=2)}))
    assert second.folder == first.folder
    assert EXPLAINED == []
    assert scores_of(first.folder) == {metric_key("mean", Mean(power)).folder for power in (1, 2)}
    settings = [json.loads(p.read_text())["settings"] for p in first.folder.glob("scores/*/settings.json")]
    assert {s["power"] for s in settings} == {1, 2}
    labels = {line["metric"] for line in lines_of(first.folder / "summary.csv")}
    assert labels == {f"{folder}{part}" for folder in scores_of(first.folder) for part in ("", "_picture")}


@pytest.mark.parametrize(
    ("part", "other"),
    [
        ("seed", 1),
        ("method", Spy(scale=2.0)),
        ("method", IBA(beta=1.0, steps=2)),
        ("target", Classes((0,))),
        ("target", Label()),
        ("backbone", TinyNet(weights_seed=1)),
        ("backbone", TinyNet(resize=SIZE + 2)),
    ],
)
def test_what_changes_a_heatmap_changes_the_folder(plan: Plan, part: str, other: Any) -> None:
    plan = replace(plan, limit=1, metrics={})
    folders = [run(plan).folder, run(replace(plan, **{part: other})).folder]
    assert folders[0] != folders[1]
    maps = [next(iter(heatmaps_of(folder).values())) for folder in folders]
    if part in ("seed", "method"):
        assert not np.array_equal(*maps), "the setting has reached the method"


def test_every_setting_of_a_method_counts(plan: Plan) -> None:
    plan = replace(plan, limit=1, metrics={})
    one, other = (run(replace(plan, method=IBA(beta=beta, steps=1, draws=1))) for beta in (1.0, 2.0))
    assert one.folder != other.folder
    assert json.loads((one.folder / "provenance.json").read_text())["reference"].startswith("The reference split")


@dataclass(frozen=True)
class FewerReferences(TinyData):
    def reference(self) -> Sequence[Sample]:
        return self.samples()[:3]


def test_the_reference_split_counts_where_it_is_used(plan: Plan, pictures: Path) -> None:
    plan = replace(plan, limit=1, metrics={})
    for method, folders in ((IBA(steps=1, draws=1), 2), (Spy(), 1)):
        made = {
            run(replace(plan, method=method, dataset=data)).folder
            for data in (TinyData(str(pictures)), FewerReferences(str(pictures)))
        }
        assert len(made) == folders


def test_a_methods_version_counts(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    first = run(replace(plan, limit=1))
    monkeypatch.setattr(Spy, "version", 2)
    assert run(replace(plan, limit=1)).folder != first.folder


def test_another_picture_counts(plan: Plan, tmp_path: Path) -> None:
    first = run(replace(plan, limit=1, metrics={}))
    root = write_pictures(tmp_path / "more", [*NAMES, "h"])
    more = run(replace(plan, limit=1, metrics={}, dataset=TinyData(str(root))))
    assert more.folder.parent == first.folder.parent
    assert more.folder != first.folder


def test_what_changes_no_heatmap_keeps_the_folder(plan: Plan, pictures: Path, tmp_path: Path) -> None:
    first = run(replace(plan, limit=2))
    shutil.copytree(pictures, tmp_path / "moved")
    for changes in (
        {"dataset": TinyData(str(tmp_path / "moved"))},
        {"batch_size": 1},
        {"max_passes": 3},
        {"workers": 1},
        {"limit": 1},
        {"pictures": 0},
        {"command": "other words"},
        {"settings": {"seed": "zero"}},
    ):
        again = run(replace(plan, **{"limit": 2, **changes}))  # type: ignore[arg-type]
        assert again.folder == first.folder, changes
        assert (again.new_heatmaps, again.new_scores) == (0, 0), changes


def test_a_larger_limit_continues(plan: Plan) -> None:
    first = run(replace(plan, limit=2))
    assert (first.rows, first.new_heatmaps) == (2, 2)
    assert len(lines_of(first.folder / "metrics.csv")) == 4
    assert len(lines_of(first.folder / "samples.csv")) == 7, "all rows of the dataset, whatever part is computed"
    EXPLAINED.clear()
    more = run(replace(plan, limit=4))
    assert more.folder == first.folder
    assert EXPLAINED == ["c", "d"]
    assert [line["sample"] for line in lines_of(first.folder / "metrics.csv")] == list("aabbccdd")
    assert (more.rows, more.new_heatmaps, more.new_scores) == (4, 2, 2)
    less = run(replace(plan, limit=3))
    assert (less.rows, less.new_heatmaps) == (3, 0)
    everything = run(plan)
    assert_same_results(everything.folder, run(replace(plan, outputs=plan.outputs / "at once")).folder)


# the same results however the work is cut


REAL: dict[str, Any] = {
    "method": IBA(steps=3, draws=3, min_reference=2),
    "method_name": "iba",
    "metrics": {"insertion": Insertion(step=0.25, sigma=2.0), "deletion": Deletion(step=0.25)},
}


def test_results_do_not_depend_on_the_sizes(plan: Plan) -> None:
    plan = replace(plan, **REAL)
    folders = [
        run(replace(plan, batch_size=size, max_passes=most, workers=workers, outputs=plan.outputs / str(size))).folder
        for size, most, workers in ((1, 2, 0), (3, 5, 1), (16, None, 0))
    ]
    for folder in folders[1:]:
        assert_same_results(folders[0], folder)
    assert len({folder.name for folder in folders}) == 1
    maps = heatmaps_of(folders[0])
    assert not np.allclose(maps["a@predicted"], maps["b@predicted"]), "or the comparison would say nothing"


@pytest.mark.parametrize("at", "bdg")
def test_an_interrupted_run_goes_on(plan: Plan, at: str) -> None:
    undisturbed = run(replace(plan, outputs=plan.outputs / "undisturbed"))
    kept = {row[0] for row in NAMES[: NAMES.index(at) // 3 * 3]}
    EXPLAINED.clear()
    STOP_AT.add(at)
    with pytest.raises(KeyboardInterrupt):
        run(plan)
    STOP_AT.clear()
    assert sorted(kept) == EXPLAINED, "batches before it"
    folder = plan.outputs / "tinydata" / "tinynet" / "spy"
    [name] = [p.name for p in folder.iterdir()]
    assert heatmaps_of(folder / name).keys() == {f"{sample}@predicted" for sample in kept}
    assert not (folder / name / "report.html").exists()
    EXPLAINED.clear()
    finished = run(plan)
    assert finished.folder == folder / name
    assert sorted(set(NAMES) - kept) == EXPLAINED, "nothing is computed twice"
    assert_same_results(undisturbed.folder, finished.folder, tolerance=0)


def test_a_run_killed_before_its_page_gets_one_later(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    """limit=2 has left a page; limit=4 is killed when all is computed, and before the page of four is written."""
    run(replace(plan, limit=2))

    def killed(store: RunStore) -> Path:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "write_report", killed)
        with pytest.raises(KeyboardInterrupt):
            run(replace(plan, limit=4))
    again = run(replace(plan, limit=4))
    assert (again.new_heatmaps, again.new_scores) == (0, 0)
    assert [line["sample"] for line in lines_of(again.folder / "metrics.csv")] == list("aabbccdd")
    assert json.loads((again.folder / "provenance.json").read_text())["finished"]


def test_less_memory_than_hoped_for(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    undisturbed = run(replace(plan, **REAL, max_passes=8, outputs=plan.outputs / "undisturbed"))
    call = Backbone.__call__

    def small(self: Backbone, inputs: Tensor, *rest: Any) -> Tensor:
        if len(inputs) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return call(self, inputs, *rest)

    monkeypatch.setattr(Backbone, "__call__", small)
    outcome = run(replace(plan, **REAL, max_passes=8))
    assert_same_results(undisturbed.folder, outcome.folder)
    notes = json.loads((outcome.folder / "provenance.json").read_text())["notes"]
    halved = [note for note in notes if "memory ran out" in note]
    assert halved == [f"memory ran out: metric.{name} goes on with max_passes=4" for name in ("insertion", "deletion")]


# targets


def test_two_targets_a_sample(plan: Plan) -> None:
    outcome = run(replace(plan, target=Classes((2, 0)), limit=3, batch_size=4))
    names = [f"{sample}@{target}" for sample in "abc" for target in (2, 0)]
    assert heatmaps_of(outcome.folder).keys() == set(names)
    assert [line["row"] for line in lines_of(outcome.folder / "samples.csv")][:6] == names
    table = [(line["sample"], line["target"]) for line in lines_of(outcome.folder / "metrics.csv")]
    assert table == [(sample, target) for sample in "abc" for target in "20" for _ in ("mean", "mean_picture")]
    assert (outcome.rows, outcome.new_heatmaps) == (6, 6)
    store = RunStore(outcome.folder)
    for name in names:
        assert store.read_heatmap(name).target == int(name[-1])
    probabilities = [store.read_heatmap(f"a@{target}").target_probability for target in (2, 0)]
    assert probabilities[0] != probabilities[1]


def test_more_targets_of_a_sample_are_resumed_one_by_one(plan: Plan) -> None:
    plan = replace(plan, target=Classes((2, 0)), limit=2)
    folder = run(plan).folder
    before = heatmaps_of(folder)
    (folder / "heatmaps" / "a@0.npz").unlink()
    EXPLAINED.clear()
    again = run(plan)
    assert EXPLAINED == ["a"]
    assert (again.new_heatmaps, again.new_scores, again.rows) == (1, 1, 4)
    np.testing.assert_array_equal(heatmaps_of(folder)["a@0"], before["a@0"])


def test_samples_without_a_label_are_skipped_and_listed(plan: Plan) -> None:
    outcome = run(replace(plan, target=Label()))
    assert outcome.skipped.keys() == {"c", "f"}
    assert (outcome.rows, outcome.new_heatmaps) == (5, 5)
    listed = {line["sample"]: line["reason"] for line in lines_of(outcome.folder / "skipped.csv")}
    assert listed == dict(outcome.skipped)
    assert all("no label" in reason for reason in listed.values())
    page = outcome.report.read_text()
    assert "no label" in page
    assert "skipped c:" in (outcome.folder / "run.log").read_text()
    again = run(replace(plan, target=Label()))
    assert again.skipped == outcome.skipped, "told every time"
    assert (again.new_heatmaps, again.rows) == (0, 5)


def test_a_sample_that_was_mended_is_no_longer_listed(plan: Plan, pictures: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(pictures, tmp_path / "root"))
    whole = (root / "b.png").read_bytes()
    (root / "b.png").write_bytes(bytes(len(whole)))
    (root / "e.png").write_bytes(bytes(99))
    plan = replace(plan, dataset=TinyData(str(root)))
    broken = run(plan)
    assert broken.skipped.keys() == {"b", "e"}
    assert "b" in (page := broken.report.read_text())
    assert all(reason in page for reason in broken.skipped.values())
    (root / "b.png").write_bytes(whole)
    EXPLAINED.clear()
    mended = run(replace(plan, limit=3))
    assert mended.folder == broken.folder
    assert EXPLAINED == ["b"]
    assert [line["sample"] for line in lines_of(mended.folder / "skipped.csv")] == ["e"], "e was not looked at"
    assert run(plan).skipped.keys() == {"e"}


# what a reader must be told


def test_random_weights_are_told_everywhere(plan: Plan, capsys: pytest.CaptureFixture[str]) -> None:
    outcome = run(replace(plan, backbone=TinyNet(random_weights=True)))
    told = json.loads((outcome.folder / "provenance.json").read_text())
    assert told["weights"] == "random weights"
    assert any("untrained" in note for note in told["notes"])
    assert "random weights" in outcome.report.read_text().lower()
    assert "random weights" in (outcome.folder / "run.log").read_text().lower()
    assert "random weights" in capsys.readouterr().err.lower()


def test_class_names_that_do_not_fit_are_told(plan: Plan) -> None:
    outcome = run(replace(plan, dataset=replace(plan.dataset, classes=9)))  # type: ignore[type-var]
    assert json.loads((outcome.folder / "classes.json").read_text()) is None
    [note] = json.loads((outcome.folder / "provenance.json").read_text())["notes"]
    assert "4 outputs" in note
    assert "9 classes" in note
    assert note in outcome.report.read_text()
    assert "class number" not in outcome.report.read_text()


def test_notes_outlive_the_run_that_wrote_them(plan: Plan) -> None:
    """The statistics of few pictures matter to whoever reads the scores that were added later."""
    plan = replace(plan, method=IBA(steps=1, draws=1), metrics={})
    first = run(plan)
    [note] = json.loads((first.folder / "provenance.json").read_text())["notes"]
    assert "7 pictures" in note
    again = run(replace(plan, metrics={"mean": Mean()}))
    assert json.loads((again.folder / "provenance.json").read_text())["notes"] == [note]
    assert "pooled" in again.report.read_text()


def test_notes_outlive_a_killed_run(plan: Plan) -> None:
    method = IBA(steps=1, draws=1)
    with pytest.raises(KeyboardInterrupt):
        run(replace(plan, method=method, metrics={"stop": Stop()}))
    folder = next(plan.outputs.glob("*/*/*/*/provenance.json")).parent
    told = json.loads((folder / "provenance.json").read_text())
    assert told["finished"] is None
    assert any("7 pictures" in note for note in told["notes"])


@dataclass(frozen=True)
class Stop:
    def __call__(self, *_: object) -> Mapping[str, Tensor]:
        raise KeyboardInterrupt


# damaged files in a run's folder


@pytest.mark.parametrize("damage", [b"", b"half a file", None])
def test_a_damaged_heatmap_is_made_again_and_told(plan: Plan, damage: bytes | None) -> None:
    first = run(plan)
    before = heatmaps_of(first.folder)
    path = first.folder / "heatmaps" / "d@predicted.npz"
    path.write_bytes((first.folder / "heatmaps" / "a@predicted.npz").read_bytes() if damage is None else damage)
    EXPLAINED.clear()
    JUDGED.clear()
    again = run(replace(plan, metrics={"mean": Mean(), "deletion": Deletion(step=0.5)}))
    assert EXPLAINED == JUDGED == ["d"], "the scores of the damaged heatmap are made again too"
    assert (again.new_heatmaps, again.rows) == (1, 7)
    assert "d@predicted" in (again.folder / "run.log").read_text()
    np.testing.assert_array_equal(heatmaps_of(again.folder)["d@predicted"], before["d@predicted"])
    at_once = run(replace(plan, metrics={"mean": Mean(), "deletion": Deletion(step=0.5)}, outputs=plan.outputs / "x"))
    assert_same_results(at_once.folder, again.folder)


@pytest.mark.parametrize("damage", [b"", b"half a file"])
def test_a_damaged_score_file_is_made_again_and_told(
    plan: Plan, damage: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    first = run(plan)
    before = (first.folder / "metrics.csv").read_bytes()
    path = sorted(first.folder.glob("scores/*/*.npz"))[1]
    path.write_bytes(damage)
    EXPLAINED.clear()
    JUDGED.clear()
    again = run(plan)
    assert EXPLAINED == []
    assert len(JUDGED) == again.new_scores in (1, 3)
    assert path.name in capsys.readouterr().err
    assert (first.folder / "metrics.csv").read_bytes() == before


# mistakes


def test_ids_that_come_twice(plan: Plan) -> None:
    with pytest.raises(UserError, match="'2' comes more than once"):
        run(replace(plan, target=Classes((2, 0, 2))))
    with pytest.raises(UserError, match="'a' comes more than once"):
        run(replace(plan, dataset=Twice(plan.dataset.root)))  # type: ignore[attr-defined]
    assert not plan.outputs.exists()


@dataclass(frozen=True)
class Twice(TinyData):
    def samples(self) -> Sequence[Sample]:
        return [*super().samples()[:2], super().samples()[0]]


def test_a_dataset_without_samples(plan: Plan, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no samples"):
        run(replace(plan, dataset=TinyData(str(tmp_path))))
    assert not plan.outputs.exists()


@dataclass(frozen=True)
class Nested(Spy):
    """A method that is made of another, and of several layers, as the bottlenecks are."""

    inner: GradCAM | None = None
    layers: tuple[str, ...] = ()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"target": Classes((1, CLASSES))}, f"Target class {CLASSES} does not exist"),
        ({"method": IBA(layer="nosuch")}, "has no layer 'nosuch'"),
        ({"method": IBA(layer="6")}, r"needs a layer"),
        ({"method": Nested(inner=GradCAM(layer="nosuch"))}, "has no layer 'nosuch'"),
        ({"method": Nested(layers=("1", "nosuch"))}, "has no layer 'nosuch'"),
        ({"backbone": TinyNet(nan=True)}, "not finite"),
    ],
)
def test_mistakes_leave_no_folder(plan: Plan, changes: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        run(replace(plan, **changes))
    assert not plan.outputs.exists()


def test_logging_is_left_as_it_was(plan: Plan) -> None:
    logger = logging.getLogger("ibxai")
    before = (list(logger.handlers), logger.level, logger.propagate)
    run(replace(plan, limit=1))
    with pytest.raises(RuntimeError):
        run(replace(plan, method=Spy(fails_at="a")))
    assert (list(logger.handlers), logger.level, logger.propagate) == before


@dataclass(frozen=True)
class Unread(TinyData):
    def read(self, sample: Sample) -> Picture:
        raise BadSample("nothing can be read")


def test_a_dataset_of_bad_pictures_alone(plan: Plan) -> None:
    outcome = run(replace(plan, dataset=Unread(plan.dataset.root), **REAL))  # type: ignore[attr-defined]
    assert outcome.skipped == dict.fromkeys(NAMES, "nothing can be read")
    assert (outcome.rows, outcome.new_heatmaps) == (0, 0)
    assert outcome.report.is_file()
    assert len(lines_of(outcome.folder / "skipped.csv")) == 7
