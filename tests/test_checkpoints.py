"""Checkpoints: a run takes what a training left, with its outputs and preprocessing, and refuses what does not fit."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_train import Patients, plan_of
from test_training import TINY, Blocks

from ibxai import pipeline, train
from ibxai.backbones import checkpoints
from ibxai.backbones.checkpoints import chosen, group_hashes, read
from ibxai.backbones.small import SmallCNN
from ibxai.backbones.zoo import Zoo
from ibxai.errors import UserError
from ibxai.methods.gradcam import GradCAM
from ibxai.preprocessing import Preprocessing
from ibxai.targets import Label, MultiLabel
from ibxai.types import Sample

DATA = Blocks(train=60, test=12)
# what a user has who names nothing: other outputs and another preprocessing than were trained
PLAIN = SmallCNN(weights="trained", widths=TINY.widths, layers=TINY.layers)


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("outputs")
    train.run(plan_of(folder, dataset=DATA))
    return folder


@pytest.fixture
def weights(outputs: Path) -> Path:
    [found] = outputs.glob("*/*/training/*/weights.safetensors")
    return found


def test_a_run_takes_the_newest_with_all_that_it_brings(
    outputs: Path, weights: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(outputs, tmp_path / "outputs")
    older = tmp_path / "outputs" / weights.relative_to(outputs)
    newer = older.parent.with_name("newer")
    shutil.copytree(older.parent, newer)
    described = json.loads((newer / "weights.json").read_text())
    (newer / "weights.json").write_text(json.dumps({**described, "finished": "2999-01-01T00:00:00+00:00"}))
    plan = pipeline.Plan(
        dataset=DATA, backbone=PLAIN, method=GradCAM(), method_name="gradcam", metrics={}, target=Label(), settings={},
        seed=0, device="cpu", batch_size=4, max_passes=None, workers=0, limit=4, pictures=1,
        outputs=tmp_path / "outputs", command="ibxai run",
    )  # fmt: skip
    outcome = pipeline.run(plan)
    assert outcome.rows == 4
    told = json.loads((outcome.folder / "provenance.json").read_text())
    assert any(str(newer / "weights.safetensors") in note for note in told["notes"])
    assert str(newer) in (outcome.folder / "run.log").read_text()
    assert "weights.safetensors, trained on blocks" in outcome.report.read_text()
    assert told["identity"]["preprocessing"]["crop"] == 16
    shutil.rmtree(newer)
    assert pipeline.run(plan).folder == outcome.folder  # the same weights, wherever they lie


def test_of_folds_a_run_takes_its_own(outputs: Path, weights: Path, tmp_path: Path) -> None:
    """The newest has seen what is explained; an older one has not."""
    shutil.copytree(outputs, tmp_path / "outputs")
    own = tmp_path / "outputs" / weights.relative_to(outputs)
    other = own.parent.with_name("other")
    shutil.copytree(own.parent, other)
    described = json.loads((other / "weights.json").read_text())
    seen = group_hashes(DATA.name, [sample.group_id for sample in DATA.samples()[:1]])
    newer = {**described, "finished": "2999-01-01T00:00:00+00:00", "seen": seen}
    (other / "weights.json").write_text(json.dumps(newer))
    checkpoint = chosen(PLAIN, DATA, "class", tmp_path / "outputs")
    assert checkpoint is not None
    assert checkpoint.weights == own
    shutil.rmtree(own.parent)
    with pytest.raises(UserError, match="was trained on 1 of the 12 groups"):
        chosen(PLAIN, DATA, "class", tmp_path / "outputs")


def test_the_network_is_the_trained_one(weights: Path, outputs: Path) -> None:
    checkpoint = chosen(PLAIN, DATA, "class", outputs)
    assert checkpoint is not None
    spec = PLAIN.with_learnt(str(checkpoint.weights), checkpoint.described["learnt"])
    assert (spec.classes, spec.preprocessing) == (3, TINY.preprocessing)
    backbone = spec.load(16)
    assert backbone.outputs == 3
    assert not backbone.random_weights
    by_path = replace(PLAIN, weights=str(weights))
    assert chosen(by_path, DATA, "class", Path("nowhere")) == checkpoint


def test_weights_of_nobodys_training_are_taken_as_they_are(weights: Path, tmp_path: Path) -> None:
    shutil.copy(weights, tmp_path / "mine.safetensors")
    assert chosen(replace(TINY, weights=str(tmp_path / "mine.safetensors")), DATA, "labels", tmp_path) is None
    zoo = Zoo("resnet50", "torchvision", "resnet50", "IMAGENET1K_V1")
    assert chosen(zoo, DATA, "class", tmp_path) is None
    assert chosen(object(), DATA, "class", tmp_path) is None


@dataclass(frozen=True)
class Seen(Blocks):
    """Its test pictures are of groups that the network was trained on."""

    split: str = "test"

    def samples(self) -> Sequence[Sample]:
        return self.in_split("train")[:3]


@dataclass(frozen=True)
class Reds(Blocks):
    class_names = ("red", "other", "blue")


REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"dataset": Seen(train=60)}, "was trained on 3 of the 3 groups", "dataset.split=train"),
    ({"dataset": Reds(train=60)}, "has 3 outputs, red, green, blue", "asks for 3, red, other, blue"),
    ({"spec": replace(PLAIN, widths=(9,))}, r"of another network: widths \[8\], not \[9\]", "backbone=small_cnn"),
    ({"spec": Zoo("x", "timm", "y", "z")}, "of another network: class SmallCNN, not Zoo", "backbone=small_cnn"),
    ({"answers": "labels"}, "was trained for class, and the target asks for labels", "target=predicted, label"),
]


@pytest.mark.parametrize(("changed", "first", "second"), REFUSED)
def test_what_does_not_fit_is_refused_in_two_lines(
    changed: dict[str, Any], first: str, second: str, weights: Path
) -> None:
    spec = replace(changed.get("spec", PLAIN), weights=str(weights))
    with pytest.raises(UserError, match=first) as error:
        chosen(spec, changed.get("dataset", DATA), changed.get("answers", "class"), Path("nowhere"))
    assert second in str(error.value)
    assert len(str(error.value).splitlines()) == 2


def test_the_train_split_may_be_explained_and_it_is_said(weights: Path, caplog: pytest.LogCaptureFixture) -> None:
    spec = replace(PLAIN, weights=str(weights))
    assert chosen(spec, Seen(train=60, split="train"), "class", Path()) is not None
    assert "trained on the pictures that are explained" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        assert chosen(spec, Blocks("elsewhere", train=60), "class", Path()) is not None
    assert "trained on blocks: whether it has seen pictures of elsewhere is not known" in caplog.text


def test_without_a_training_two_lines_say_which_command_makes_one(tmp_path: Path, outputs: Path) -> None:
    with pytest.raises(UserError, match="There is no trained small_cnn for blocks") as error:
        chosen(PLAIN, DATA, "class", tmp_path)
    assert "ibxai train dataset=blocks" in str(error.value)
    assert len(str(error.value).splitlines()) == 2
    with pytest.raises(UserError, match=r"\(1 of other outputs or another architecture\)"):
        chosen(PLAIN, Reds(train=60), "class", outputs)


def test_a_changed_file_is_refused(weights: Path, tmp_path: Path) -> None:
    shutil.copytree(weights.parent, tmp_path / "copy")
    changed = tmp_path / "copy" / weights.name
    changed.write_bytes(changed.read_bytes()[:-1] + b"\1")
    with pytest.raises(UserError, match=r"is not the file that weights\.json describes"):
        read(changed)
    (tmp_path / "copy" / "weights.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        read(changed)


def test_groups_are_known_by_hashes_of_their_own_dataset() -> None:
    assert group_hashes("a", ["x", "y", "x"]) == group_hashes("a", ["y", "x"])
    assert not set(group_hashes("a", ["patient-1"])) & set(group_hashes("b", ["patient-1"]))
    assert "patient" not in "".join(group_hashes("a", ["patient-1"]))


def test_preprocessing_survives_json() -> None:
    settings = Preprocessing(64, 56, (0.5,), (0.25,), "bicubic")
    assert Preprocessing.of(json.loads(json.dumps(settings.__dict__))) == settings


def test_a_multi_label_checkpoint_explains_labels(tmp_path: Path) -> None:
    data = Patients(train=60, test=12)
    train.run(plan_of(tmp_path, dataset=data, target=MultiLabel("label"), given={"epochs": 1, "batch_size": 8}))
    checkpoint = chosen(PLAIN, data, "labels", tmp_path)
    assert checkpoint is not None
    with pytest.raises(UserError, match="target=multilabel"):
        chosen(PLAIN, data, "class", tmp_path)
    state = PLAIN.with_learnt(str(checkpoint.weights), checkpoint.described["learnt"]).network().state_dict()
    assert torch.isfinite(torch.cat([tensor.flatten() for tensor in state.values()])).all()
    assert checkpoints.architecture(PLAIN) == {"class": "SmallCNN", "widths": [8]}
