"""What a training leaves, and how a run takes it: `weights.safetensors`, and `weights.json`, which describes it.

The description holds the architecture with its arguments, the preprocessing, the outputs and what they answer, digests
of the splits and of the weights, the recipe, the seed, the test report, and the groups (patients, studies) that the
network has seen, as hashes. So `backbone.weights=outputs/.../weights.safetensors` needs nothing else to be set, a
network of another shape is refused, and so is one that was trained on what it is to be tested on. A weights file
without such a description is a file of the user's: nothing is known of it, and nothing is checked.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self

import safetensors.torch
from torch import Tensor

from ibxai.errors import UserError
from ibxai.store import write_atomically
from ibxai.targets import AnswerKind
from ibxai.types import Dataset

log = logging.getLogger(__name__)

TRAINED = "trained"  # backbone.weights: the newest checkpoint of this dataset and this network
FILE = "weights.safetensors"
FITTING = {"class": "predicted, label or classes", "labels": "multilabel", "values": "regression"}  # targets


class Spec(Protocol):
    """A backbone by name whose weights can come from a checkpoint.

    architecture_settings: those that a checkpoint must have been trained with.
    """

    architecture_settings: ClassVar[tuple[str, ...]]

    @property
    def name(self) -> str: ...
    @property
    def weights(self) -> str: ...
    def with_learnt(self, weights: str, learnt: Mapping[str, Any]) -> Self:
        """This spec with the weights of a checkpoint and what else it brings, such as its preprocessing."""
        ...


@dataclass(frozen=True)
class Checkpoint:
    """weights: the file; described: the JSON beside it."""

    weights: Path
    described: Mapping[str, Any]

    def __str__(self) -> str:
        told = self.described
        return f"{self.weights}, trained on {told['dataset']['name']}, finished {told['finished']}"


def write(folder: Path, state: Mapping[str, Tensor], described: Mapping[str, Any]) -> Path:
    """The weights file. The description comes last: a training is finished when it is there."""
    content = safetensors.torch.save({name: tensor.contiguous() for name, tensor in state.items()})
    write_atomically(folder / FILE, content)
    told = {**described, "weights": hashlib.sha256(content).hexdigest()}
    write_atomically(_description(folder / FILE), (json.dumps(told, indent=1, ensure_ascii=False) + "\n").encode())
    return folder / FILE


def read(weights: Path) -> Checkpoint | None:
    """The checkpoint that this file belongs to; None where no description is beside it. Raises UserError."""
    path = _description(weights)
    if weights.suffix != ".safetensors" or not path.is_file():
        return None
    try:
        described = json.loads(path.read_bytes())
        digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    except (OSError, ValueError) as error:
        raise UserError(f"The checkpoint {weights} cannot be read: {error}.") from error
    if digest != described.get("weights"):
        raise UserError(f"{weights} is not the file that {path.name} describes.\nPut both there as they were written.")
    return Checkpoint(weights, described)


def chosen(spec: Any, dataset: Dataset, answers: AnswerKind, outputs: Path) -> Checkpoint | None:
    """The checkpoint that `backbone.weights` stands for, checked against what it is to be used for; None for weights
    that are none of a training's.
    """
    if not hasattr(spec, "with_learnt"):
        return None
    if spec.weights == TRAINED:
        found: Checkpoint | None = newest(spec, dataset, outputs)
    else:
        found = read(Path(spec.weights).expanduser())
    if found is not None:
        _check_fits(found, spec, dataset, answers)
        _check_apart(found, dataset)
    return found


def newest(spec: Spec, dataset: Dataset, outputs: Path) -> Checkpoint:
    """The one of this network for these outputs that was finished last, before those one that has seen nothing of what
    is explained (of a cross-validation, the fold's own). Raises UserError when there is none.
    """
    folder = outputs / dataset.name / spec.name / "training"
    found = [checkpoint for path in sorted(folder.glob(f"*/{FILE}")) if (checkpoint := read(path)) is not None]
    same = [c for c in found if c.described["classes"] == _names(dataset) and not _differing(c, spec)]
    if not same:
        others = f" ({len(found)} of other outputs or another architecture)" if found else ""
        kind = "method" if hasattr(spec, "fit") else "backbone"
        chosen_as = f"method={spec.name} " if kind == "method" else ""
        raise UserError(
            f"There is no trained {spec.name} for {dataset.name} in {folder}{others}.\n"
            f"Train one, with the same settings: ibxai train {chosen_as}dataset={dataset.name} ..., "
            f"or give {kind}.weights=FILE."
        )
    return max(same, key=lambda checkpoint: (not _seen(checkpoint, dataset), checkpoint.described["finished"]))


def group_hashes(dataset: str, groups: Iterable[str]) -> list[str]:
    """What groups are known by in a checkpoint: patients' names do not belong into a file that is passed on."""
    return sorted(hashlib.sha256(f"{dataset} {group}".encode()).hexdigest()[:16] for group in set(groups))


def architecture(spec: Spec) -> dict[str, Any]:
    """What another spec must have alike to take this one's weights, as JSON has it."""
    settings = dataclasses.asdict(spec)  # type: ignore[call-overload]  # a spec is a dataclass
    own = {name: settings[name] for name in type(spec).architecture_settings}
    return json.loads(json.dumps({"class": type(spec).__qualname__, **own}))


def _differing(checkpoint: Checkpoint, spec: Spec) -> list[str]:
    """Of each setting that differs: "widths [8], not [16, 32]"."""
    own, its = architecture(spec), checkpoint.described["architecture"]
    return [f"{name} {its.get(name)}, not {own.get(name)}" for name in (own | its) if own.get(name) != its.get(name)]


def _check_fits(checkpoint: Checkpoint, spec: Spec, dataset: Dataset, answers: AnswerKind) -> None:
    differing, told = _differing(checkpoint, spec), checkpoint.described
    if differing:
        raise UserError(
            f"{checkpoint.weights} is of another network: {', '.join(differing)}.\n"
            f"It was trained as backbone={told['backbone']}."
        )
    if told["answers"] != answers:
        raise UserError(
            f"{checkpoint.weights} was trained for {told['answers']}, and the target asks for {answers}.\n"
            f"What fits it: target={FITTING[told['answers']]}."
        )
    names = _names(dataset)
    if names is not None and told["classes"] != names:
        raise UserError(
            f"{checkpoint.weights} has {len(told['classes'])} outputs, {_listed(told['classes'])}.\n"
            f"{dataset.name} asks for {len(names)}, {_listed(names)}: train a network for these."
        )


def _check_apart(checkpoint: Checkpoint, dataset: Dataset) -> None:
    """A network is tested on patients that it has not seen; where that cannot be known, it is said."""
    told = checkpoint.described
    if told["dataset"]["name"] != dataset.name:
        log.warning(
            "the network was trained on %s: whether it has seen pictures of %s is not known",
            *(told["dataset"]["name"], dataset.name),
        )
        return
    seen = _seen(checkpoint, dataset)
    if seen and getattr(dataset, "split", "test") == "train":
        log.warning("the network was trained on the pictures that are explained (dataset.split=train)")
    elif seen:
        groups = {sample.group_id for sample in dataset.samples()}
        raise UserError(
            f"{checkpoint.weights} was trained on {len(seen)} of the {len(groups)} groups (patients, studies) that are "
            "explained.\nTrain on this split: its train and test split share no group; or give dataset.split=train."
        )


def _seen(checkpoint: Checkpoint, dataset: Dataset) -> set[str]:
    """The explained groups that it was trained on, as hashes."""
    groups = group_hashes(dataset.name, (sample.group_id for sample in dataset.samples()))
    return set(checkpoint.described["seen"]) & set(groups)


def _names(dataset: Dataset) -> list[str] | None:
    return None if dataset.class_names is None else list(dataset.class_names)


def _listed(names: list[str]) -> str:
    return ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")


def _description(weights: Path) -> Path:
    return weights.with_suffix(".json")
