"""Studies: methods with known answers in every cell, planted truth, and the same table after any interruption."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import torchvision
import yaml
from networks import ROLES, fixed_seed, noise_pictures, small_net
from PIL import Image
from test_training import TINY, Blocks, trained_weights
from torch import Tensor, nn

from ibxai.backbones import Backbone, freeze
from ibxai.backbones.training import InMemory, Recipe
from ibxai.catalogue import entries
from ibxai.cells import Cell, Cells, read_cell
from ibxai.config import build
from ibxai.errors import UserError
from ibxai.identity import study_key
from ibxai.methods.gradcam import GradCAM
from ibxai.methods.random import Random
from ibxai.metrics import randomization, roar
from ibxai.metrics.randomization import LabelRandomization, ParameterRandomization, layer_groups, with_state_of
from ibxai.metrics.roar import CONTROL, ROAR, UNTOUCHED, without
from ibxai.metrics.similarity import similarities
from ibxai.metrics.study import Rebuildable, Task, derived_seed, run_study
from ibxai.preprocessing import Preprocessing
from ibxai.store import RunStore, StoredHeatmap
from ibxai.targets import Classes, ClassTarget, Predicted
from ibxai.types import Attribution, Attributor, Batch, Dataset, Method, Picture, Sample, Score

SIMILARITIES = ("ssim", "spearman", "pearson")


# parts


@dataclass(frozen=True)
class Noise:
    """32 x 32 pictures with structure. There is no train split."""

    count: int = 6
    name: str = "noise"

    class_names = None
    reference_note = "The reference split is the pictures."

    def samples(self) -> Sequence[Sample]:
        return [Sample(f"s{i}", f"s{i // 2}", Path("none"), 0, i % 5) for i in range(self.count)]

    def reference(self) -> Sequence[Sample]:
        return self.samples()

    def read(self, sample: Sample) -> Picture:
        values = noise_pictures(1, seed=int(sample.sample_id[1:]))[0]
        pixels = ((values / 4 + 0.5).clamp(0, 1) * 255).byte().permute(1, 2, 0).numpy()
        return Picture(Image.fromarray(pixels))


@dataclass(frozen=True)
class Small:
    """`SmallNet`, as if trained: its norms are shaken, and its classes differ clearly."""

    name: str = "small"

    def network(self) -> nn.Module:
        return small_net(0)

    def fresh(self, seed: int) -> nn.Module:
        with fixed_seed(seed):
            return type(small_net(0))()

    def frozen(self, network: nn.Module, max_passes: int) -> Backbone:
        preprocessing = Preprocessing(32, 32, (0.5,) * 3, (0.5,) * 3)
        return freeze(network, layers=ROLES, preprocessing=preprocessing, name=self.name, max_passes=max_passes)


@dataclass(frozen=True)
class Intensity:
    """The picture's own brightness: a map that no network changes. seen: what `fit` and the attributor were given."""

    seen: list[Any] = field(default_factory=list)

    version: ClassVar[int] = 1

    def fit(
        self, backbone: Backbone, reference: Iterable[Batch], seed: int, state: Mapping[str, Tensor] | None = None
    ) -> Attributor:
        assert state is None
        self.seen.append((backbone.digest, seed, sum(len(batch) for batch in reference)))

        def attribute(batch: Batch) -> Attribution:
            self.seen.append((batch.sample_ids, batch.target.describe()))
            return Attribution(batch.inputs.amax(1), "score")

        return attribute


def task_of(
    folder: Path,
    method: Method,
    dataset: Dataset,
    spec: Rebuildable,
    network: nn.Module | None = None,
    samples: Sequence[Sample] | None = None,
    target: Any = None,
) -> Task:
    """A run of this method, finished, as the pipeline leaves it."""
    backbone = spec.frozen(spec.network() if network is None else network, 64)
    run = RunStore(folder / "run")
    samples = dataset.samples() if samples is None else samples
    key = study_key("study", ROAR(), samples, dataset)  # whose it is does not matter
    task = Task(
        dataset=dataset,
        samples=samples,
        target=target or Predicted(),
        spec=spec,
        backbone=backbone,
        method=method,
        method_name="method",
        run=run,
        cells=Cells(folder / "run" / "studies", key),
        seed=3,
        batch_size=4,
    )
    attribute = task.attributor()
    for sample in samples:
        inputs, _ = backbone.preprocessing(dataset.read(sample))
        batch = Batch(inputs[None], one_predicted(), (sample.sample_id,)).bound(backbone)
        heatmap = attribute(batch).heatmap[0].numpy()
        for name in task.target.names():
            run.write_heatmap(StoredHeatmap(f"{sample.sample_id}@{name}", heatmap, "score", 0, 0.0, 0, 0.0))
    return task


def one_predicted() -> ClassTarget:
    return ClassTarget.predicted(1)


def again(task: Task, **changes: Any) -> Task:
    """The same task in a new process."""
    return replace(task, cells=Cells(task.cells.folder.parent, task.cells.key), **changes)


def table(scores: Iterable[Score]) -> dict[tuple[Any, ...], float]:
    found = {}
    for score in scores:
        key = (*score.coordinates.values(), score.metric, score.row_id)
        assert key not in found
        found[key] = score.value
    return found


def by_cell(scores: Iterable[Score], metric: str) -> dict[tuple[Any, ...], list[float]]:
    found: dict[tuple[Any, ...], list[float]] = {}
    for score in scores:
        if score.metric == metric:
            found.setdefault(tuple(score.coordinates.values()), []).append(score.value)
    return found


# groups of layers


def test_groups_of_a_residual_network() -> None:
    """ResNet-18 in stages: every entry once, norms with their convolution, in order of execution."""
    network = torchvision.models.resnet18(num_classes=3)
    example = torch.zeros(1, 3, 32, 32)
    groups = layer_groups(network, example, 6)
    assert list(groups) == ["conv1", "layer1", "layer2", "layer3", "layer4", "fc"]
    assert sorted(e for entries in groups.values() for e in entries) == sorted(network.state_dict())
    for name, members in groups.items():
        own = {e for e in network.state_dict() if e.startswith(name + ".")}
        assert set(members) == (
            own | {e for e in network.state_dict() if e.startswith("bn1.")} if name == "conv1" else own
        )
    blocks = [f"layer{i}.{j}" for i in range(1, 5) for j in range(2)]
    assert list(layer_groups(network, example, 10)) == ["conv1", *blocks, "fc"]
    assert list(layer_groups(network, example, 1)) == list(groups)  # the least that there are


def test_groups_follow_execution_and_not_the_order_of_definition() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last = nn.Linear(4, 2)
            self.scale = nn.Parameter(torch.ones(1))  # the network's own
            self.attention = nn.MultiheadAttention(4, 2, batch_first=True)  # its out_proj is never called
            self.norm = nn.LayerNorm(4)
            self.first = nn.Conv2d(3, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            tokens = self.scale * self.first(x).flatten(2).mT
            return self.last(self.norm(self.attention(tokens, tokens, tokens)[0]).mean(1))

    groups = layer_groups(Odd(), torch.zeros(1, 3, 5, 5), 4)
    assert list(groups) == ["network", "first", "attention", "last"]
    assert groups["network"] == ["scale"]
    assert {"attention.out_proj.weight", "norm.weight", "norm.bias"} < set(groups["attention"])


def test_state_goes_over_entry_by_entry() -> None:
    trained, untrained = small_net(0), Small().fresh(7)
    inputs = noise_pictures(2)
    assert torch.equal(with_state_of(trained, untrained, []).eval()(inputs), trained.eval()(inputs))
    whole = with_state_of(trained, untrained, list(trained.state_dict()))
    assert torch.equal(whole.eval()(inputs), untrained.eval()(inputs))
    before = {name: tensor.clone() for name, tensor in trained.state_dict().items()}
    norm = [name for name in before if name.startswith("stage1.1.")]
    changed = with_state_of(trained, untrained, norm).state_dict()
    assert torch.equal(changed["stage1.1.running_mean"], torch.zeros(8))
    assert torch.equal(changed["stage1.1.running_var"], torch.ones(8))
    assert torch.equal(changed["stage1.1.weight"], torch.ones(8))
    assert all(torch.equal(changed[name], tensor) for name, tensor in before.items() if name not in norm)
    assert all(torch.equal(tensor, before[name]) for name, tensor in trained.state_dict().items())


# parameter randomisation

GROUPS = ["stage1.0", "stage2", "stage3", "fc"]  # of SmallNet: a norm joins its convolution, at the depth nearest to 4


@pytest.fixture
def study() -> ParameterRandomization:
    return ParameterRandomization(cells=4)


def cells_of(names: Sequence[str]) -> list[tuple[str, int, str]]:
    cascade = [("cascading", 0, "nothing")]
    steps = [(step, name) for step, name in enumerate(reversed(names), 1)]
    return cascade + [(order, step, name) for order in ("cascading", "independent") for step, name in steps]


def test_a_map_that_ignores_the_network_stays_the_same(tmp_path: Path, study: ParameterRandomization) -> None:
    method = Intensity()
    task = task_of(tmp_path, method, Noise(), Small())
    groups = list(layer_groups(small_net(), torch.zeros(1, 3, 32, 32), 4))
    original = [entry for entry in method.seen if len(entry) == 2]
    digest = task.backbone.digest
    method.seen.clear()
    scores = list(study(task))
    for metric in SIMILARITIES:
        found = by_cell(scores, metric)
        assert list(found) == cells_of(groups)
        assert all(values == pytest.approx([1] * 6, abs=1e-6) for values in found.values())
    # each cell fits the method once, on a network of its own, before anything is explained
    fits = [entry for entry in method.seen if len(entry) == 3]
    assert len(fits) == len(cells_of(groups))
    assert [fit[0] == digest for fit in fits] == [True] + [False] * (len(fits) - 1)
    distinct = {fit[0] for fit in fits[: 1 + len(groups)]}
    assert len(distinct) == 1 + len(groups)
    assert {fit[1:] for fit in fits} == {(derived_seed(3, "parameter randomization"), 6)}
    # and the targets are what the original network said
    targets = {sample: target for ids, classes in original for sample, target in zip(ids, classes, strict=True)}
    for ids, classes in [entry for entry in method.seen if len(entry) == 2]:
        assert classes == [targets[sample] for sample in ids]


def test_a_random_map_is_like_nothing(tmp_path: Path, study: ParameterRandomization) -> None:
    task = task_of(tmp_path, Random(), Noise(), Small())
    scores = list(study(task))
    for metric in SIMILARITIES:
        for place, values in by_cell(scores, metric).items():
            assert abs(np.mean(values)) < 0.06, (metric, place)  # 6 maps of 1,024 pixels: 0.013 is one deviation


def test_gradcam_against_a_network_that_was_never_trained(tmp_path: Path, study: ParameterRandomization) -> None:
    """The first cell is the original, the last of the cascade wholly untrained; the targets stay."""
    data, spec = Noise(), Small()
    task = task_of(tmp_path, GradCAM(relu=False), data, spec)
    scores = list(study(task))
    untrained = spec.frozen(spec.fresh(derived_seed(3, "parameter randomization")), 64)
    inputs = torch.stack([task.backbone.preprocessing(data.read(s))[0] for s in data.samples()])
    batch = Batch(inputs, one_predicted().take(torch.zeros(6, dtype=torch.long)), tuple(f"s{i}" for i in range(6)))
    batch = batch.bound(task.backbone)
    one, two = (GradCAM(relu=False).fit(b, (), 0)(batch).heatmap for b in (task.backbone, untrained))
    wanted = similarities(one, two, "abs", 7)
    for metric in SIMILARITIES:
        found = by_cell(scores, metric)
        assert found["cascading", 0, "nothing"] == pytest.approx([1] * 6, abs=1e-5)
        last = list(found["cascading", len(found) // 2, list(found)[len(found) // 2][2]])
        assert last == pytest.approx(wanted[metric].tolist(), abs=1e-4)
        # a cascade of one step and the last layer alone are the same network
        [name] = [place[2] for place in found if place[:2] == ("independent", 1)]
        assert found["cascading", 1, name] == pytest.approx(found["independent", 1, name], abs=1e-6)


def test_the_rows_of_a_cell(tmp_path: Path, study: ParameterRandomization) -> None:
    task = task_of(tmp_path, Intensity(), Noise(), Small(), target=Classes((1, 4)))
    scores = [s for s in study(task) if s.coordinates["step"] == 0 and s.metric == "ssim"]
    assert [s.row_id for s in scores] == [f"s{i}@{c}" for i in range(6) for c in (1, 4)]
    assert [s.group_id for s in scores] == [f"s{i // 2}" for i in range(6) for _ in range(2)]


def test_settings_of_parameter_randomization(tmp_path: Path) -> None:
    for settings, says in [({"cells": 0}, "cells is 0"), ({"sign": "both"}, "no sign 'both'")]:
        with pytest.raises(UserError, match=says):
            ParameterRandomization(**settings)  # type: ignore[arg-type]

    class Fixed:
        name = "fixed"

    task = replace(task_of(tmp_path, Intensity(), Noise(), Small()), spec=Fixed())  # type: ignore[arg-type]
    with pytest.raises(UserError, match="fixed has only its own"):
        ParameterRandomization().check(task)
    with pytest.raises(UserError, match="SSIM's window is 33: 2 to 32"):
        ParameterRandomization(window=33).check(task_of(tmp_path / "b", Intensity(), Noise(), Small()))


# stopped and going on


class Stop(Exception):
    pass


def failing_after(work: Callable[..., Any], times: int) -> Callable[..., Any]:
    left = [times]

    def run(*arguments: Any, **more: Any) -> Any:
        if not left[0]:
            raise Stop
        left[0] -= 1
        return work(*arguments, **more)

    return run


@pytest.mark.parametrize("stop", [0, 1, 4])
def test_a_study_goes_on_behind_its_last_cell(
    tmp_path: Path, study: ParameterRandomization, stop: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed = table(study(task_of(tmp_path / "a", GradCAM(), Noise(), Small())))
    task = task_of(tmp_path / "b", GradCAM(), Noise(), Small())
    with monkeypatch.context() as patched:
        patched.setattr(randomization, "compared", failing_after(randomization.compared, stop))
        with pytest.raises(Stop):
            run_study(study, task)
    assert task.cells.made == stop
    assert not task.cells.finished
    task = again(task)
    assert run_study(study, task) == 9 - stop
    assert task.cells.finished
    task = again(task)
    assert run_study(study, task) == 0
    assert table(study(again(task))) == pytest.approx(undisturbed, nan_ok=True)
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_damaged_cell_is_made_again(tmp_path: Path, study: ParameterRandomization) -> None:
    task = task_of(tmp_path, GradCAM(), Noise(), Small())
    before = table(study(task))
    paths = sorted(p for p in task.cells.folder.glob("*.json") if p.name != "settings.json")
    assert len(paths) == 9
    for path, content in zip(paths, (b"", paths[1].read_bytes()[:-9], b"[]", b'{"values": {}}'), strict=False):
        path.write_bytes(content)
    assert [read_cell(path) is None for path in paths] == [True] * 4 + [False] * 5
    task = again(task)
    assert run_study(study, task) == 4
    assert table(study(again(task))) == pytest.approx(before, nan_ok=True)


def test_undefined_values_are_kept_as_such(tmp_path: Path) -> None:
    task = task_of(tmp_path, Intensity(), Noise(), Small())
    made = Cell({"a": 1}, ("x", "y"), ("x", "y"), {"m": [0.5, float("nan")]}, {"t": float("nan")})
    task.cells.get({"a": 1}, lambda: made)
    [path] = [p for p in task.cells.folder.glob("*.json") if p.name != "settings.json"]
    json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    values = table(again(task).cells.get({"a": 1}, lambda: pytest.fail("made again")).scores())
    assert values == pytest.approx(table(made.scores()), nan_ok=True)
    assert len(values) == 3


def test_cells_belong_to_settings_and_samples() -> None:
    data = Blocks()
    key = study_key("roar", ROAR(), data.samples(), data)
    others = [
        study_key("roar", ROAR(training=Recipe(31)), data.samples(), data),
        study_key("roar", ROAR(), data.samples()[:5], data),
        study_key("roar", ROAR(), data.samples(), Blocks(train=23)),
    ]
    assert len({k.folder for k in (key, *others)}) == 4
    assert study_key("roar", ROAR(), data.samples(), data).folder == key.folder


# label randomisation


@pytest.fixture(scope="module")
def blocks_network(tmp_path_factory: pytest.TempPathFactory) -> nn.Module:
    weights = trained_weights(Blocks(train=96), tmp_path_factory.mktemp("weights"))
    return replace(TINY, weights=str(weights)).network()


def test_label_randomization(tmp_path: Path, blocks_network: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both networks know their labels; one of them knows nothing of the pictures."""
    taught: list[Tensor] = []

    def watched(network: nn.Module, data: InMemory, *more: Any) -> nn.Module:
        taught.append(data.answers)
        return train(network, data, *more)

    train = randomization.train
    monkeypatch.setattr(randomization, "train", watched)
    data = Blocks(train=96, test=60)
    spec = replace(TINY, widths=(24,))
    study = LabelRandomization(train_size=48, training=Recipe(80, 16, 0.02, 0.0), window=3)
    scores = list(study(task_of(tmp_path, Intensity(), data, spec, spec.fresh(0))))
    accuracy = {s.coordinates["labels"]: {} for s in scores}  # type: ignore[var-annotated]
    for score in scores:
        if not score.row_id:
            accuracy[score.coordinates["labels"]][score.metric] = score.value
    assert list(accuracy) == ["true", "random"]
    assert accuracy["true"]["train_accuracy"] == 1
    assert accuracy["true"]["test_accuracy"] > 0.9
    assert accuracy["random"]["train_accuracy"] > 0.95
    assert accuracy["random"]["test_accuracy"] < accuracy["true"]["test_accuracy"] - 0.25
    for metric in SIMILARITIES:  # of a map that ignores the network
        found = by_cell(scores, metric)
        assert found["true",] == found["random",] == pytest.approx([1] * 60, abs=1e-6)
    assert [len(answers) for answers in taught] == [48, 48]
    assert taught[0].tolist() == [i % 3 for i in range(48)]
    assert sorted(taught[1].tolist()) == sorted(taught[0].tolist())
    assert 0.2 < float((taught[1] == taught[0]).float().mean()) < 0.5


def test_too_little_training_is_said(
    tmp_path: Path, blocks_network: nn.Module, caplog: pytest.LogCaptureFixture
) -> None:
    task = task_of(tmp_path, Intensity(), Blocks(train=96), TINY, blocks_network)
    run_study(LabelRandomization(training=Recipe(1, 48), window=3), task)
    assert any("random labels are known by heart: train for longer" in r.getMessage() for r in caplog.records)


# ROAR


def test_pixels_are_taken_out_in_the_order_of_their_ranks() -> None:
    inputs = torch.arange(12.0).view(1, 3, 2, 2)
    ranks, mean = torch.tensor([[[2, 0], [3, 1]]]), torch.tensor([-1.0, -2, -3])[:, None, None]
    wanted = {
        (0.0, False): [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]],
        (0.5, False): [[0, -1, 2, -1], [4, -2, 6, -2], [8, -3, 10, -3]],
        (0.25, True): [[-1, 1, -1, -1], [-2, 5, -2, -2], [-3, 9, -3, -3]],
        (1.0, True): [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]],
        (1.0, False): [[-1] * 4, [-2] * 4, [-3] * 4],
    }
    for (fraction, keep), pixels in wanted.items():
        assert without(inputs, ranks, fraction, keep, mean)[0].flatten(1).tolist() == pixels, (fraction, keep)


QUICK = Recipe(epochs=12, batch_size=16, learning_rate=0.03)
PLANTED = Blocks(train=120, test=60)


def test_roar_of_the_planted_truth(tmp_path: Path, blocks_network: nn.Module) -> None:
    """The patch is 16 of 256 pixels, the brightest: without it there is chance, and with it alone all is known."""
    task = task_of(tmp_path, Intensity(), PLANTED, TINY, blocks_network)
    removed = list(ROAR(fractions=(0.0, 0.1), repeats=1, training=QUICK)(task))
    mean = {place: float(np.mean(values)) for place, values in by_cell(removed, "accuracy").items()}
    assert list(mean) == [(0.0, UNTOUCHED, 0), (0.1, "method", 0), (0.1, CONTROL, 0)]
    assert mean[0.0, UNTOUCHED, 0] > 0.9
    assert mean[0.1, "method", 0] < 0.55  # chance is 0.33, and a coin that is thrown 60 times has a deviation of 0.06
    assert mean[0.1, CONTROL, 0] > 0.9
    assert all(len(values) == 60 for values in by_cell(removed, "accuracy").values())
    keep = ROAR(fractions=(0.02, 0.1), keep=True, repeats=1, training=QUICK)
    cells = Cells(task.cells.folder.parent, study_key("roar_keep", keep, task.samples, task.dataset))
    kept = list(keep(replace(task, cells=cells)))
    mean = {place: float(np.mean(values)) for place, values in by_cell(kept, "accuracy").items()}
    assert mean[0.1, "method", 0] > 0.9
    assert mean[0.02, "method", 0] > mean[0.02, CONTROL, 0] + 0.2


def test_both_splits_lose_their_pixels_to_the_train_splits_mean(
    tmp_path: Path, blocks_network: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Tensor] = []
    outputs_of = roar.outputs_of
    monkeypatch.setattr(roar, "outputs_of", lambda n, inputs, *a: seen.append(inputs) or outputs_of(n, inputs, *a))  # type: ignore[func-returns-value]
    data = Blocks(train=20, test=6)
    task = task_of(tmp_path, Intensity(), data, TINY, blocks_network)
    run_study(ROAR(fractions=(0.1,), repeats=1, training=Recipe(1, 10)), task)
    splits = [
        torch.stack([TINY.preprocessing(data.read(sample))[0] for sample in data.in_split(name)])
        for name in ("train", "test")
    ]
    mean = torch.stack([splits[0][:, channel].mean() for channel in range(3)])
    for place, (found, whole) in enumerate(zip(seen, splits * 2, strict=True)):
        gone = ((found - mean.view(3, 1, 1)).abs() < 1e-6).all(1)
        assert gone.flatten(1).sum(1).tolist() == [26] * len(whole)  # a tenth of 256
        kept = ~gone[:, None].expand_as(found)
        assert torch.equal(found[kept], whole[kept])
        brightness = whole.amax(1)
        hidden = torch.where(gone, brightness, torch.inf).amin((1, 2))
        shown = torch.where(gone, -torch.inf, brightness).amax((1, 2))
        assert bool((hidden >= shown).all()) == (place < 2)  # the method's order, and then the control's


def test_roar_explains_the_train_split_once(tmp_path: Path, blocks_network: nn.Module) -> None:
    """Heatmaps are those of the run's network for the run's targets; a second study of the run finds them there."""
    method = Intensity()
    task = task_of(tmp_path, method, Blocks(train=20, test=4), TINY, blocks_network)
    method.seen.clear()
    study = ROAR(fractions=(0.5,), repeats=2, training=Recipe(1, 10), train_size=10)
    run_study(study, task)
    fits = [entry for entry in method.seen if len(entry) == 3]
    assert [fit[:2] for fit in fits] == [(task.backbone.digest, 3)]
    explained = [sample for ids, _ in (entry for entry in method.seen if len(entry) == 2) for sample in ids]
    assert explained == [f"train-{i}" for i in range(10)]
    method.seen.clear()
    other = Cells(
        task.cells.folder.parent, study_key("roar_keep", replace(study, keep=True), task.samples, task.dataset)
    )
    run_study(replace(study, keep=True), replace(task, cells=other))
    assert method.seen == []


def test_roar_is_repeatable_and_resumable(
    tmp_path: Path, blocks_network: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, study = Blocks(train=20, test=6), ROAR(fractions=(0.0, 0.3), repeats=2, training=Recipe(2, 10))
    seeds: list[int] = []
    with monkeypatch.context() as patched:
        train = roar.train
        patched.setattr(roar, "train", lambda *a: seeds.append(a[3]) or train(*a))  # type: ignore[func-returns-value]
        undisturbed = table(study(task_of(tmp_path / "a", Intensity(), data, TINY, blocks_network)))
    assert seeds == 3 * seeds[:2]  # a repeat starts from weights of its own, the same for every fraction and map
    assert seeds[0] != seeds[1]
    task = task_of(tmp_path / "b", Intensity(), data, TINY, blocks_network)
    with monkeypatch.context() as patched:
        patched.setattr(roar, "train", failing_after(roar.train, 3))
        with pytest.raises(Stop):
            run_study(study, task)
    task = again(task)
    assert run_study(study, task) == 3
    assert table(study(again(task))) == undisturbed


def test_maps_with_undefined_pixels(tmp_path: Path, blocks_network: nn.Module) -> None:
    ranks = roar._ranks(torch.tensor([[[torch.nan, 1.0], [2.0, torch.nan]]]), ["a"])
    assert ranks[0, 1, 0] == 0
    assert ranks[0, 0, 1] == 1
    assert sorted(ranks.flatten().tolist()) == [0, 1, 2, 3]


def test_mistakes_about_roar(tmp_path: Path, blocks_network: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    for settings, says in [
        ({"fractions": ()}, "fractions is"),
        ({"fractions": (1.5,)}, "fractions is"),
        ({"repeats": 0}, "repeats is 0"),
        ({"sign": "x"}, "no sign"),
    ]:
        with pytest.raises(UserError, match=says):
            ROAR(**settings)  # type: ignore[arg-type]
    quick = ROAR(training=Recipe(1, 4))
    task = task_of(tmp_path / "a", Intensity(), Noise(), Small())
    with pytest.raises(UserError, match="noise has no train split") as error:
        quick.check(task)
    assert len(str(error.value).splitlines()) == 2
    blocks = task_of(tmp_path / "b", Intensity(), Blocks(), TINY, blocks_network)
    with pytest.raises(UserError, match="choose one target"):
        quick.check(replace(blocks, target=Classes((0, 1))))
    with pytest.raises(UserError, match=r"choose dataset.split=test"):
        quick.check(replace(blocks, samples=Blocks().in_split("train")[:3]))
    quick.check(blocks)
    monkeypatch.setitem(sys.modules, "lightning", None)
    for study in (quick, LabelRandomization(window=3)):
        with pytest.raises(UserError, match="pip install"):
            study.check(blocks)


@pytest.mark.parametrize("name", ["roar", "roar_keep", "parameter_randomization", "label_randomization"])
def test_every_setting_stands_in_the_yaml(name: str) -> None:
    from dataclasses import fields

    node = yaml.safe_load(entries()["study"][name].text)
    built = build(node, "study")
    assert set(node) - {"_target_", "name"} == {f.name for f in fields(built)}
    if name != "roar_keep":
        kept = {"training": built.training} if name == "label_randomization" else {}
        kept |= {"train_size": built.train_size} if name == "label_randomization" else {}
        assert built == replace(type(built)(), **kept)
