"""A training, on one page: dataset -> splits by group -> learner -> Lightning's loop -> checkpoint and test report.

`ibxai train` makes a network for `ibxai run` to explain. The groups (patients, studies) of the train split are parted
once more, a share of them to stop in time; the test split is touched by nothing but the report. All is left in

    <outputs>/<dataset>/<backbone>/training/<identity>/
        weights.safetensors weights.json   the checkpoint (`backbones/checkpoints.py`), last of all: with it, it is done
        test.csv test.json                 how good it is, with intervals (`backbones/performance.py`)
        curves.csv curves.png              losses by epoch
        config.yaml train.log              how it came to be
        last.ckpt best.ckpt                while it is trained: where a killed training goes on

What is trained is chosen by whom the job asks for a learner, `learner(plan, splits)` of the backbone, and not here: a
network that reads texts, or a method that is trained over a dataset, brings its own (`backbones/learner.py`), and gets
splits, loop, resume, curves and folder from here.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from omegaconf import OmegaConf

from ibxai.backbones.checkpoints import FILE, group_hashes, read, write
from ibxai.backbones.learner import Learner, Learnt
from ibxai.backbones.losses import USUAL, LossSpec
from ibxai.backbones.performance import Score, table
from ibxai.backbones.training import Recipe, require_lightning
from ibxai.backbones.zoo import Zoo
from ibxai.datasets.loading import sample_table_digest
from ibxai.datasets.splits import train_groups
from ibxai.errors import UserError
from ibxai.logs import also_to_file, run_log
from ibxai.memory import keep_freed_memory
from ibxai.modality import check_reads
from ibxai.report.training import draw_curves
from ibxai.sessions import now
from ibxai.store import digest, write_atomically, write_rows
from ibxai.targets import AnswerKind, TargetSpec
from ibxai.types import Dataset, Sample

log = logging.getLogger(__name__)

PRECISIONS = ("32", "bf16")
LEARNS = ("all", "head")


class Trainable(Protocol):
    """What `ibxai train` can train: a backbone or a method by name with a `training` recipe of its own."""

    training: Recipe

    @property
    def name(self) -> str: ...
    def learner(self, plan: TrainPlan, splits: Splits) -> Learner: ...


@dataclass(frozen=True)
class Splits:
    """Samples that no group (patient, study) is shared between. validation: to stop in time. test: for the report."""

    train: Sequence[Sample]
    validation: Sequence[Sample]
    test: Sequence[Sample]


@dataclass(frozen=True)
class TrainPlan:
    """A training, all of it. The parts are built; `settings` are the plain values they were built from.

    method: what is trained in the backbone's place, on pictures as the backbone takes them; None for the backbone.
    loss: None for the usual one of the target. given: what was set of the backbone's recipe. patience: epochs without
    a lower validation loss. validation_share: of the train split's groups. devices: that share each batch. learns:
    "all" of the network, or its "head", the last layer.
    """

    dataset: Dataset
    backbone: Trainable
    target: TargetSpec
    loss: LossSpec | None
    given: Mapping[str, Any]
    patience: int
    validation_share: float
    settings: Mapping[str, Any]
    seed: int
    device: str
    devices: int
    precision: str
    workers: int
    outputs: Path
    command: str
    method: Trainable | None = None
    learns: str = "all"

    @property
    def trainable(self) -> Trainable:
        return self.method or self.backbone

    @property
    def answers(self) -> AnswerKind:
        return self.target.answers

    @property
    def minimised(self) -> LossSpec:
        return self.loss or USUAL[self.answers]

    @cached_property
    def recipe(self) -> Recipe:
        return dataclasses.replace(self.trainable.training, **self.given)

    @property
    def class_names(self) -> Sequence[str]:
        """Of the outputs. Raises UserError when the dataset names none."""
        names = self.dataset.class_names
        if not names:
            raise UserError(f"{self.dataset.name} does not name its classes, so their number is not known.")
        return tuple(names)


@dataclass(frozen=True)
class Trained:
    """What came of a training. weights: the checkpoint. table: the test report, lines for people. summary: one line."""

    weights: Path
    table: Sequence[str]
    summary: str


def run(plan: TrainPlan) -> Trained:
    """Do what is left of a training. Raises UserError for what a user can put right."""
    keep_freed_memory()
    with run_log() as said:
        require_lightning()
        _check(plan)
        splits = split(plan)
        learner = plan.trainable.learner(plan, splits)
        identity = identify(plan, splits, learner)
        folder = plan.outputs / plan.dataset.name / learner.name / "training" / digest(identity)
        if read(folder / FILE) is not None:
            log.info("trained already: %s", folder)
            return _trained(folder)
        module = learner.module()  # before anything is written: a target that the dataset has no answers for ends here
        write_atomically(folder / "config.yaml", OmegaConf.to_yaml(plan.settings).encode())
        with also_to_file(folder / "train.log", said.records):
            _announce(plan, splits, learner)
            learnt = _learnt(plan, splits, learner, module, folder)
            write_rows(folder / "test.csv", [asdict(score) for score in learnt.scores])
            text = json.dumps([asdict(score) for score in learnt.scores], indent=1, ensure_ascii=False)
            write_atomically(folder / "test.json", (text + "\n").encode())
            write(folder, learnt.state, _described(plan, splits, learner, identity, learnt))
            for name in ("last.ckpt", "best.ckpt"):  # as large as the network three times over, and of no more use
                (folder / name).unlink()
        return _trained(folder)


def split(plan: TrainPlan) -> Splits:
    """Raises UserError when the dataset has no train and test split, or a group is in both."""
    dataset: Any = plan.dataset
    if not hasattr(dataset, "in_split"):
        raise UserError(f"{dataset.name} has no train and test split, and nothing can be trained on it: dataset=NAME.")
    given, test = dataset.in_split("train"), dataset.in_split("test")
    both = {sample.group_id for sample in given} & {sample.group_id for sample in test}
    if both:
        raise UserError(f"{dataset.name}: {min(both)} and {len(both) - 1} others are in the train and the test split.")
    strata = {sample.group_id: sample.label for sample in given}
    trains = train_groups(strata, 1 - plan.validation_share, plan.seed)
    train, validation = ([s for s in given if (s.group_id in trains) == wanted] for wanted in (True, False))
    for name, samples in {"train": train, "validation": validation, "test": test}.items():
        if not samples:
            raise UserError(f"The {name} split of {dataset.name} is empty: too few patients, studies or pictures.")
    return Splits(train, validation, test)


def identify(plan: TrainPlan, splits: Splits, learner: Learner) -> dict[str, Any]:
    """All that changes what is learnt: not the device, the processes, or where files lie."""
    return {
        "dataset": plan.dataset.name,
        "splits": {name: sample_table_digest(getattr(splits, name)) for name in ("train", "validation", "test")},
        "answers": plan.answers,
        "loss": {"class": type(plan.minimised).__qualname__, **asdict(plan.minimised)},  # type: ignore[call-overload]
        "recipe": asdict(plan.recipe),
        "patience": plan.patience,
        "precision": plan.precision,
        "seed": plan.seed,
        **learner.identity(),
    }


def _check(plan: TrainPlan) -> None:
    """Raise now what would end a training late."""
    check_reads(plan.backbone, plan.dataset)
    if not hasattr(plan.trainable, "learner"):
        kind = "backbone" if plan.method is None else "method"
        raise UserError(f"{kind}={plan.settings[kind]['name']} cannot be trained: its class has no `learner`.")
    if plan.minimised.answers != plan.answers:
        usual = type(USUAL[plan.answers]).__name__
        raise UserError(
            f"The loss {type(plan.minimised).__name__} is for {plan.minimised.answers}, the target for {plan.answers}: "
            f"{usual} fits it (loss=null)."
        )
    if plan.learns == "head" and not (isinstance(plan.trainable, Zoo) and plan.trainable.weights != "none"):
        raise UserError(
            "learns=head keeps the weights that a training starts from, and here it starts from none.\n"
            "Choose a network that has some, such as backbone=efficientnet_lite0 backbone.weights=packaged."
        )
    if not 0 < plan.validation_share < 1:
        raise UserError(f"validation_share={plan.validation_share}: a share between 0 and 1 is expected.")
    if plan.recipe.batch_size % plan.devices:
        raise UserError(f"batch_size={plan.recipe.batch_size} cannot be shared by devices={plan.devices}.")
    if plan.device.startswith("cuda") and plan.devices > torch.cuda.device_count():
        raise UserError(f"devices={plan.devices}: there are {torch.cuda.device_count()} GPUs here.")


def _announce(plan: TrainPlan, splits: Splits, learner: Learner) -> None:
    log.info("%s", plan.command)
    log.info(
        "%s on %s: %d samples train, %d of other groups say when to stop, %d test; %s; %s; up to %d epochs",
        *(learner.name, plan.dataset.name, len(splits.train), len(splits.validation), len(splits.test)),
        *(type(plan.minimised).__name__, plan.device, plan.recipe.epochs),
    )


def _learnt(plan: TrainPlan, splits: Splits, learner: Learner, module: Any, folder: Path) -> Learnt:
    """Trained to its lowest validation loss, and tested."""
    from ibxai.backbones.loop import fit

    state, rows = fit(
        module,
        learner.examples(splits.train),
        learner.examples(splits.validation),
        plan.recipe,
        plan.seed,
        folder,
        plan.patience,
        torch.device(plan.device),
        plan.devices,
        plan.precision,
        plan.workers,
    )
    draw_curves(rows, folder / "curves.png")
    return learner.finish(state)


def _described(
    plan: TrainPlan, splits: Splits, learner: Learner, identity: Mapping[str, Any], learnt: Learnt
) -> dict[str, Any]:
    seen = {sample.group_id for sample in (*splits.train, *splits.validation)}
    return {
        "backbone": learner.name,
        **learnt.described,
        "classes": list(plan.class_names),
        "answers": plan.answers,
        "dataset": {"name": plan.dataset.name, **identity["splits"]},
        "identity": identity,
        "test": [asdict(score) for score in learnt.scores],
        "tested": len(splits.test),
        "command": plan.command,
        "finished": now(),
        "seen": group_hashes(plan.dataset.name, seen),
    }


def _trained(folder: Path) -> Trained:
    """From what is in the folder."""
    scores = [Score(**entry) for entry in json.loads((folder / "test.json").read_bytes())]
    first = scores[0]
    summary = f"{first.metric} {first.value:.3f} ({first.low:.3f} to {first.high:.3f}) on the test split"
    return Trained(folder / FILE, table(scores), summary)
