"""`ibxai train`: splits by group, early stopping, resume, the same again from the same seed, and what it leaves."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import safetensors.torch
import torch
from test_training import TINY, Blocks

from ibxai import jobs, pipeline, train
from ibxai.backbones import loop
from ibxai.backbones.losses import BCE, MSE, WeightedBCE
from ibxai.backbones.training import InMemory, Streamed, collated, examples_of
from ibxai.backbones.zoo import Zoo
from ibxai.catalogue import entries
from ibxai.cli import main
from ibxai.config import build
from ibxai.errors import UserError
from ibxai.targets import Classes, Label, MultiLabel, Predicted, Regression
from ibxai.train import TrainPlan, run, split
from ibxai.types import Sample

SHORT = {"epochs": 3, "batch_size": 8}


@dataclass(frozen=True)
class Patients(Blocks):
    """As Blocks, three pictures of each patient; a patient's pictures are all of one class. values: one hot, or the
    class's number alone.
    """

    regression: bool = False

    def in_split(self, split: str) -> Sequence[Sample]:
        found = super().in_split(split)
        return [self._of(sample, split, place) for place, sample in enumerate(found)]

    def _of(self, sample: Sample, split: str, place: int) -> Sample:
        label = place // 3 % 3
        values = (float(label),) if self.regression else tuple(float(label == k) for k in range(3))
        return replace(sample, group_id=f"{split}-patient-{place // 3}", label=label, values=values)


def plan_of(outputs: Path, **changed: Any) -> TrainPlan:
    settings: dict[str, Any] = {
        "dataset": Blocks(train=60, test=12),
        "backbone": TINY,
        "target": Predicted(),
        "loss": None,
        "given": SHORT,
        "patience": 5,
        "validation_share": 0.2,
        "settings": {"seed": 0},
        "seed": 0,
        "device": "cpu",
        "devices": 1,
        "precision": "32",
        "workers": 0,
        "outputs": outputs,
        "command": "ibxai train",
    }
    return TrainPlan(**(settings | changed))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> train.Trained:
    """A training that ran through."""
    return run(plan_of(tmp_path_factory.mktemp("outputs")))


def state(trained: train.Trained) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(trained.weights)


def same(one: train.Trained, two: train.Trained) -> bool:
    return all(torch.equal(tensor, state(two)[name]) for name, tensor in state(one).items())


def test_what_it_leaves(trained: train.Trained) -> None:
    folder = trained.weights.parent
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.yaml", "curves.csv", "curves.png", "test.csv", "test.json", "train.log", "weights.json",
        "weights.safetensors",
    ]  # fmt: skip
    curves = pd.read_csv(folder / "curves.csv")
    assert list(curves.columns) == ["epoch", "training_loss", "validation_loss", "learning_rate", "seconds"]
    assert list(curves["epoch"]) == [1, 2, 3]
    scores = pd.read_csv(folder / "test.csv")
    assert set(scores["output"]) == {"all", "red", "green", "blue"}
    assert scores.to_dict("records")[0] == pytest.approx(json.loads((folder / "test.json").read_text())[0])
    described = json.loads((folder / "weights.json").read_text())
    assert described["classes"] == ["red", "green", "blue"]
    assert described["answers"] == "class"
    assert described["learnt"]["preprocessing"] == json.loads(json.dumps(dataclasses.asdict(TINY.preprocessing)))
    assert len(described["seen"]) == 60
    assert "train-0" not in (folder / "weights.json").read_text()  # patients' names stay where they are


def test_it_learns_and_the_same_command_does_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    plan = plan_of(tmp_path, dataset=Blocks(train=120, test=30), given={"epochs": 12, "batch_size": 12})
    first = run(plan)
    assert float(first.summary.split()[1]) >= 0.9
    written = first.weights.stat().st_mtime_ns
    assert run(plan) == first
    assert run(replace(plan, workers=1, device="cpu")) == first  # not what is learnt
    assert first.weights.stat().st_mtime_ns == written
    assert run(replace(plan, seed=1)).weights != first.weights


def test_a_training_that_was_stopped_ends_as_one_that_ran_through(
    trained: train.Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in its second epoch, without any chance to tidy up; dropout and order are those of the epoch."""

    class Killed(BaseException):
        pass

    plain = loop.Learning.training_step

    def step(self: loop.Learning, batch: Any, number: int) -> Any:
        if self.current_epoch == 2 and number == 1:
            raise Killed
        return plain(self, batch, number)

    with monkeypatch.context() as patch:
        patch.setattr(loop.Learning, "training_step", step)
        with pytest.raises(Killed):
            run(plan_of(tmp_path))
    [last] = tmp_path.glob("blocks/small_cnn/training/*/last.ckpt")
    assert not (last.parent / "weights.json").exists()
    torch.manual_seed(99)  # what is drawn elsewhere does not matter
    again = run(plan_of(tmp_path))
    assert again.weights.parent == last.parent
    assert same(again, trained)
    for name in ("training_loss", "validation_loss"):
        curves = [pd.read_csv(t.weights.parent / "curves.csv")[name] for t in (again, trained)]
        assert list(curves[0]) == list(curves[1])


def test_the_weights_of_the_lowest_validation_loss_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the training stops, `patience` epochs after it."""
    losses = iter([3.0, 1.0, 2.0, 2.5, 0.5])
    states: list[dict[str, torch.Tensor]] = []

    def validate(self: loop.Learning, batch: Any, number: int) -> None:
        if number == 0:
            states.append({name: tensor.clone() for name, tensor in self.network.state_dict().items()})
            self.log("validation_loss", torch.tensor(next(losses)))

    monkeypatch.setattr(loop.Learning, "validation_step", validate)
    found = run(plan_of(tmp_path, given={"epochs": 9, "batch_size": 8}, patience=2))
    assert len(states) == 4
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in state(found).items())


def test_a_group_is_in_one_split(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, dataset=Patients(train=60, test=12))
    parts = split(plan)
    groups = [{s.group_id for s in part} for part in (parts.train, parts.validation, parts.test)]
    assert [len(part) for part in (parts.train, parts.validation, parts.test)] == [51, 9, 12]  # 7, 7 and 6 patients
    assert len(set.union(*groups)) == sum(map(len, groups))
    assert {s.label for s in parts.validation} == {0, 1, 2}  # of each class as much
    assert split(replace(plan, seed=1)).validation != parts.validation

    class Shared(Patients):
        def in_split(self, split: str) -> Sequence[Sample]:
            return [replace(s, group_id=s.group_id.removeprefix("train-").removeprefix("test-"))
                    for s in super().in_split(split)]  # fmt: skip

    with pytest.raises(UserError, match="in the train and the test split"):
        split(replace(plan, dataset=Shared()))


@pytest.mark.parametrize(
    ("target", "loss", "regression", "metric"),
    [
        (MultiLabel("label"), WeightedBCE(), False, "roc_auc"),
        (MultiLabel("label"), BCE(), False, "roc_auc"),
        (Regression("deviation", 0), MSE(), True, "pearson"),
    ],
)
def test_labels_and_values_are_learnt(
    target: Any, loss: Any, regression: bool, metric: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = Patients(train=120, test=30, regression=regression)
    if regression:
        monkeypatch.setattr(Patients, "class_names", ("severity",))
    given = {"epochs": 12, "batch_size": 12}
    found = run(plan_of(tmp_path, dataset=data, target=target, loss=loss, given=given))
    scores = pd.read_csv(found.weights.parent / "test.csv").set_index(["output", "metric"])["value"]
    assert scores["severity" if regression else "all", metric] > 0.9
    described = json.loads(found.weights.with_suffix(".json").read_text())
    assert described["answers"] == target.answers


@pytest.fixture(scope="module")
def first_weights(tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    """A network of torchvision's that was trained for four classes."""
    path = tmp_path_factory.mktemp("weights") / "first.safetensors"
    spec = Zoo("resnet18", "torchvision", "resnet18", str(path), classes=4, preprocessing=TINY.preprocessing)
    safetensors.torch.save_file(spec.fresh(3).state_dict(), path)
    return spec


def test_the_head_alone_learns(first_weights: Zoo, tmp_path: Path) -> None:
    """From the features of the first weights, which stay bit for bit, running statistics too."""
    given = {"epochs": 30, "batch_size": 12, "learning_rate": 0.03}
    plan = plan_of(tmp_path, backbone=first_weights, learns="head", given=given, patience=30)
    learner = first_weights.learner(plan, split(plan))
    pictures = examples_of(plan.dataset, split(plan).test, TINY.preprocessing, "class", 0)
    assert isinstance(pictures, InMemory)
    network = first_weights.fresh(3).eval()
    with torch.no_grad():
        features = torch.nn.Sequential(*list(network.children())[:-1])(pictures.inputs).flatten(1)
    found = learner.examples(split(plan).test)
    assert isinstance(found, InMemory)
    torch.testing.assert_close(found.inputs, features)
    assert torch.equal(found.answers, pictures.answers)
    trained = run(plan)
    learnt, first = state(trained), network.state_dict()
    assert learnt["fc.weight"].shape == (3, 512)
    assert all(torch.equal(tensor, first[name]) for name, tensor in learnt.items() if not name.startswith("fc."))
    scores = pd.read_csv(trained.weights.parent / "test.csv").set_index(["output", "metric"])["value"]
    with torch.no_grad():
        said = (features @ learnt["fc.weight"].T + learnt["fc.bias"]).argmax(1)
    assert scores["all", "accuracy"] == pytest.approx(float((said == pictures.answers).float().mean()))
    assert scores["all", "accuracy"] > 0.6  # chance is a third
    whole = run(plan_of(tmp_path, backbone=first_weights, given={"epochs": 1, "batch_size": 12}))
    assert whole.weights != trained.weights
    assert not torch.equal(state(whole)["conv1.weight"], first["conv1.weight"])


def test_a_network_whose_last_layer_is_not_its_output(first_weights: Zoo, tmp_path: Path) -> None:
    @dataclass(frozen=True)
    class Doubled(Zoo):
        def fresh(self, seed: int) -> Any:
            network = super().fresh(seed)
            network.register_forward_hook(lambda module, given, out: 2 * out)
            return network

    spec = Doubled(**{f.name: getattr(first_weights, f.name) for f in dataclasses.fields(first_weights)})
    with pytest.raises(UserError, match="fc, does not give its outputs: use learns=all"):
        run(plan_of(tmp_path, backbone=spec, learns="head"))


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"learns": "head"}, "here it starts from none"),
        ({"loss": MSE()}, "MSE is for values, the target for class: CrossEntropy fits it"),
        ({"validation_share": 1.5}, "validation_share=1.5"),
        ({"given": {"batch_size": 9}, "devices": 2}, "cannot be shared by devices=2"),
        ({"target": Regression("mse", 0)}, "gives no sample's values"),
        ({"dataset": Blocks(train=1)}, "validation split of blocks is empty"),
        ({"given": {"learning_rate": -1.0}}, "learning_rate must be above 0"),
    ],
)
def test_mistakes_leave_no_folder(changed: dict[str, Any], says: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=says):
        run(plan_of(tmp_path, **changed))
    assert list(tmp_path.iterdir()) == []


def test_a_loss_that_is_nowhere_finite_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="never finite"):
        run(plan_of(tmp_path, given={"epochs": 1, "batch_size": 8, "learning_rate": 1e30}))


def test_two_processes_share_a_batch(tmp_path: Path) -> None:
    """As several GPUs would, through Lightning's own strategy."""
    found = run(plan_of(tmp_path, devices=2, given={"epochs": 1, "batch_size": 8}))
    assert len(pd.read_csv(found.weights.parent / "curves.csv")) == 1
    start = TINY.fresh(0).state_dict()
    assert not torch.equal(state(found)["classifier.weight"], start["classifier.weight"])


def test_bfloat16(tmp_path: Path) -> None:
    found = run(plan_of(tmp_path, precision="bf16", given={"epochs": 1, "batch_size": 8}))
    assert all(tensor.dtype != torch.bfloat16 for tensor in state(found).values())


# examples


def test_a_split_larger_than_memory_is_decoded_as_it_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    data = Blocks(train=20, damaged=True)
    samples = data.in_split("train")
    kept = examples_of(data, samples, TINY.preprocessing, "class", 0)
    assert isinstance(kept, InMemory)
    monkeypatch.setattr("ibxai.backbones.training.IN_MEMORY", 10)
    streamed = examples_of(data, samples, TINY.preprocessing, "class", 0)
    assert isinstance(streamed, Streamed)
    good = [i for i in range(20) if i not in (7, 17)]
    for place, i in enumerate(good):
        item = streamed[i]
        assert not isinstance(item, str)
        assert torch.equal(item[0], kept.inputs[place])
        assert int(item[1]) == int(kept.answers[place])


def test_a_damaged_picture_does_not_make_a_batch_smaller(caplog: pytest.LogCaptureFixture) -> None:
    one, two = (torch.zeros(1), torch.tensor(0)), (torch.ones(1), torch.tensor(1))
    with caplog.at_level(logging.WARNING):
        inputs, answers = collated([one, "train-7: damaged", two])
    assert answers.tolist() == [0, 1, 0]
    assert inputs[:, 0].tolist() == [0, 1, 0]
    assert "train-7: damaged" in caplog.text
    with pytest.raises(UserError, match="None of the 2 pictures of a batch"):
        collated(["a", "b"])


# the command line


@pytest.fixture
def plans(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[TrainPlan]:
    seen: list[TrainPlan] = []

    def keep(plan: TrainPlan) -> train.Trained:
        seen.append(plan)
        return train.Trained(plan.outputs / "weights.safetensors", ["the table"], "accuracy 1")

    monkeypatch.setattr(train, "run", keep)
    monkeypatch.chdir(tmp_path)
    return seen


def test_the_command_line_makes_a_plan(plans: list[TrainPlan], capsys: pytest.CaptureFixture[str]) -> None:
    line = ["train", "dataset=chestxray8", "dataset.root=/x", "loss=bce", "epochs=2", "learning_rate=1e-4"]
    assert main([*line, "precision=bf16"]) == 0
    [plan] = plans
    assert plan.backbone.name == "densenet121"  # the dataset's own
    assert plan.backbone.weights == "IMAGENET1K_V1"  # type: ignore[attr-defined]  # where a training starts
    assert isinstance(plan.target, MultiLabel)
    assert plan.loss == BCE()
    assert (plan.recipe.epochs, plan.recipe.learning_rate, plan.recipe.batch_size) == (2, 1e-4, 32)
    assert plan.precision == "bf16"
    out = capsys.readouterr().out
    assert "the table" in out
    assert out.endswith("weights.safetensors\n")


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("dataset=mnist", "dataset.root is not set"),
        ("dataset=mnist study=roar", "`ibxai train` takes no study; `ibxai run` does."),
        ("dataset=mnist loss=bc", "There is no loss 'bc'. Did you mean bce"),
        ("dataset=mnist epohcs=3", "There is no setting 'epohcs'. Did you mean epochs?"),
        ("dataset=mnist dataset.root=x epochs=0", "epochs=0: at least 1 is expected."),
        ("dataset=mnist dataset.root=x epochs=x", "epochs=x: a whole number or null is expected."),
        ("dataset=mnist dataset.root=x precision=16", "precision=16: one of 32, bf16 is expected."),
        ("dataset=mnist loss=[bce,mse]", "loss takes one name."),
        ("dataset=mnist --foo", "`ibxai train --help` lists the options."),
    ],
)
def test_mistakes_of_a_line(line: str, says: str, plans: list[TrainPlan], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *line.split()]) == 2
    error = capsys.readouterr().err
    assert says in error
    assert len(error.splitlines()) <= 2
    assert not plans


def test_a_dataset_has_to_be_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["train"]) == 2
    assert "sample has no train and test split" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_run_takes_no_loss(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "loss=bce"]) == 2
    assert "`ibxai run` takes no loss; `ibxai train` does." in capsys.readouterr().err


def test_help_names_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    from ibxai.config import TrainConfig

    assert main(["train", "--help"]) == 0
    text = capsys.readouterr().out
    for setting in TrainConfig.__dataclass_fields__:
        assert f"  {setting}" in text
    assert main(["train", "--cfg", "job", "dataset=mnist"]) == 0
    assert "small_cnn" in capsys.readouterr().out


def test_every_loss_builds() -> None:
    import yaml

    for name, entry in entries()["loss"].items():
        assert build(yaml.safe_load(entry.text), "loss").answers in ("class", "labels", "values"), name


# what `ibxai run` takes when only the dataset is chosen


PAPERS = {
    "mosmed": ("resnest50", Label),
    "chestxray8": ("densenet121", MultiLabel),
    "brixia": ("densenet121", Regression),
    "covidx": ("covidnext50", Label),
    "cifar10": ("small_cnn", Predicted),
    "mnist": ("small_cnn", Predicted),
    "fashion_mnist": ("small_cnn", Predicted),
}


@pytest.fixture
def composed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., pipeline.Plan]:
    seen: list[pipeline.Plan] = []

    def keep(plan: pipeline.Plan) -> pipeline.Outcome:
        seen.append(plan)
        return pipeline.Outcome(tmp_path, tmp_path, 0, 0, 0, {})

    def compose(*line: str) -> pipeline.Plan:
        assert jobs.run_jobs([*line, f"dataset.root={tmp_path}"], False, None) == 0
        return seen[-1]

    monkeypatch.setattr(pipeline, "run", keep)
    return compose


@pytest.mark.parametrize("dataset", PAPERS)
def test_the_papers_network_and_target(dataset: str, composed: Callable[..., pipeline.Plan]) -> None:
    plan = composed(f"dataset={dataset}")
    backbone, target = PAPERS[dataset]
    assert plan.backbone.name == backbone
    assert plan.backbone.weights == "trained"  # type: ignore[attr-defined]
    assert isinstance(plan.target, target)


def test_what_is_chosen_wins(composed: Callable[..., pipeline.Plan]) -> None:
    line = ["dataset=chestxray8", "backbone=resnet50", "target=classes", "target.ids=[0]", "backbone.weights=x.pt"]
    plan = composed(*line)
    assert (plan.backbone.name, plan.backbone.weights) == ("resnet50", "x.pt")  # type: ignore[attr-defined]
    assert plan.target == Classes((0,))
    plan = composed("dataset=imagenet")
    assert (plan.backbone.name, plan.backbone.weights) == ("efficientnet_lite0", "packaged")  # type: ignore[attr-defined]


def test_recipes_are_the_backbones_where_nothing_is_given(tmp_path: Path) -> None:
    assert plan_of(tmp_path, given={}).recipe == TINY.training
    assert plan_of(tmp_path, given={"epochs": 2}).recipe == replace(TINY.training, epochs=2)
