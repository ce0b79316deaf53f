"""Training a network: one function from (network, pictures with answers, recipe, seed) to a trained network.

The loop is PyTorch Lightning's (`loop.py`), an optional dependency. A training is settled by its arguments: the order
of the data and any dropout come from the seed, the global random state and torch's modes are as before afterwards, and
the network that was given stays as it was. (On a GPU two trainings of one seed may still differ, since kernels add in
any order.)
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ibxai.datasets.loading import load_batches
from ibxai.errors import BadSample, UserError
from ibxai.preprocessing import Preprocessing
from ibxai.targets import AnswerKind, Predicted
from ibxai.types import Dataset, Sample

log = logging.getLogger(__name__)

Loss = Callable[[Tensor, Tensor], Tensor]
IN_MEMORY = 2**30  # bytes that a decoded split may take; our choice
_AT_ONCE = 64  # pictures that are decoded to a batch


@dataclass(frozen=True)
class Recipe:
    """AdamW on a one-cycle schedule (Smith and Topin, 2019), the weights of the last step are kept.

    learning_rate: the highest of the cycle. Raises UserError for what cannot be trained with.
    """

    epochs: int = 20
    batch_size: int = 64
    learning_rate: float = 0.01
    weight_decay: float = 0.01

    def __post_init__(self) -> None:
        for name, smallest in {"epochs": 1, "batch_size": 2}.items():
            if getattr(self, name) < smallest:
                raise UserError(f"training.{name} is {getattr(self, name)}: at least {smallest} is expected.")
        if self.learning_rate <= 0 or self.weight_decay < 0:
            raise UserError("training.learning_rate must be above 0, and training.weight_decay not below.")


class Examples(Protocol):
    """Pictures with answers, as torch's DataLoader takes them. Item i is (input [C, H, W], answer), or says why not."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> tuple[Tensor, Tensor] | str: ...


@dataclass(frozen=True)
class InMemory:
    """Examples that are tensors already. inputs: [N, C, H, W]; answers: long [N], or float [N, K].

    sample_ids, group_ids: of each example, where they come from a dataset.
    """

    inputs: Tensor
    answers: Tensor
    sample_ids: tuple[str, ...] = ()
    group_ids: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.inputs[index], self.answers[index]

    def __getitems__(self, places: list[int]) -> Batches:
        """What DataLoader asks for where it is there: a batch in one step, not picture by picture."""
        return Batches(self.inputs[places], self.answers[places])


@dataclass(frozen=True)
class Batches:
    """A batch that is one already."""

    inputs: Tensor
    answers: Tensor


def labelled_pictures(
    dataset: Dataset,
    samples: Sequence[Sample],
    preprocessing: Preprocessing,
    batch_size: int,
    workers: int,
    kind: AnswerKind = "class",
) -> InMemory:
    """Pictures with their labels, as a network takes them. Unreadable ones are left out, and said in the log.

    Raises UserError when none is left.
    """
    known, answers = answered(samples, kind)
    inputs: list[Tensor] = []
    kept: list[str] = []
    work = [(sample, (0,)) for sample in known]
    for loaded in load_batches(dataset, work, Predicted(), preprocessing, batch_size, workers):
        for sample_id, reason in loaded.skipped.items():
            log.warning("left out of the training: %s: %s", sample_id, reason)
        if loaded.batch is not None:
            inputs.append(loaded.batch.inputs)
            kept += loaded.batch.sample_ids
    if not inputs:
        raise UserError(f"None of the {len(samples)} pictures of {dataset.name} can be read and has a label.")
    places = {sample.sample_id: place for place, sample in enumerate(known)}
    chosen = [places[sample_id] for sample_id in kept]
    groups = tuple(known[place].group_id for place in chosen)
    return InMemory(torch.cat(inputs), answers[chosen], tuple(kept), groups)


def answered(samples: Sequence[Sample], kind: AnswerKind) -> tuple[Sequence[Sample], Tensor]:
    """The samples whose answer the dataset gives, and the answers: long [N] of "class", float [N, K] of the others.

    The others are said in the log. Raises UserError when there is none, or when they have not all as many values.
    """
    given = [s for s in samples if (s.label is not None if kind == "class" else s.values)]
    if len(given) < len(samples):
        log.warning("left out of the training: %d samples without an answer", len(samples) - len(given))
    if not given:
        what = "class" if kind == "class" else "values of the outputs"
        fits = "target=label" if kind != "class" else "target=multilabel or target=regression"
        raise UserError(f"The dataset gives no sample's {what}, which the target asks for. Perhaps {fits} fits it.")
    if kind == "class":
        return given, torch.tensor([sample.label for sample in given])
    if len({len(sample.values) for sample in given}) > 1:
        raise UserError("The samples of the dataset have not all as many values.")
    return given, torch.tensor([sample.values for sample in given])


@dataclass(frozen=True)
class Streamed:
    """Examples that are decoded when they are asked for, by the loader's processes: for splits larger than memory.

    answers: long [N] or float [N, K], of the samples in their order. An item that cannot be read is its reason.
    """

    dataset: Dataset
    samples: Sequence[Sample]
    answers: Tensor
    preprocessing: Preprocessing

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor] | str:
        sample = self.samples[index]
        try:
            content = self.dataset.read(sample)
            return self.preprocessing(content)[0], self.answers[index]  # type: ignore[arg-type]  # pictures alone are streamed
        except BadSample as error:
            return f"{sample.sample_id}: {error}"
        except Exception as error:  # one picture that nobody foresaw must not end a training of days
            return f"{sample.sample_id}: unexpected {type(error).__name__}: {error}"


def examples_of(
    dataset: Dataset, samples: Sequence[Sample], preprocessing: Preprocessing, kind: AnswerKind, workers: int
) -> InMemory | Streamed:
    """Pictures with answers: decoded once where they fit in `IN_MEMORY` bytes, else each time they are shown."""
    if len(samples) * 4 * math.prod(preprocessing.input_shape) <= IN_MEMORY:
        return labelled_pictures(dataset, samples, preprocessing, _AT_ONCE, workers, kind)
    known, answers = answered(samples, kind)
    return Streamed(dataset, known, answers, preprocessing)


def train(
    network: nn.Module,
    examples: Examples,
    recipe: Recipe,
    seed: int,
    device: torch.device | str = "cpu",
    loss: Loss = F.cross_entropy,
    workers: int = 0,
) -> nn.Module:
    """A trained copy of the network, on the CPU and in eval mode.

    network: pictures [B, C, H, W] -> outputs [B, K], with the weights to start from. loss: (outputs, answers) -> one
    number, the mean over the batch. Raises UserError when Lightning is missing or there are too few examples.
    """
    require_lightning()
    from ibxai.backbones.loop import Learning, run_epochs

    if len(examples) < 2:
        raise UserError(f"Training needs at least 2 pictures, and there are {len(examples)}.")
    module = Learning(copy.deepcopy(network), recipe, loss, seed)
    run_epochs(module, examples, recipe, seed, device=torch.device(device), workers=workers)
    return module.network.cpu().eval().requires_grad_(False)


def outputs_of(network: nn.Module, inputs: Tensor, device: torch.device | str = "cpu", rows: int = 32) -> Tensor:
    """[N, K] on the CPU: what a network in eval mode says of inputs [N, C, H, W], `rows` at once."""
    network = network.to(device)
    with torch.no_grad():
        return torch.cat([network(part.to(device)).cpu() for part in inputs.split(rows)])


def require_lightning() -> Any:
    """PyTorch Lightning. Raises UserError when it is not installed."""
    try:
        import lightning.pytorch
    except ModuleNotFoundError as error:
        raise UserError(
            "Training needs PyTorch Lightning, which is not installed: pip install 'ibxai[train]'"
        ) from error
    return lightning.pytorch


def collated(items: Any) -> tuple[Tensor, Tensor]:
    """A batch (inputs, answers). In the place of an item that cannot be read another of its batch stands twice: a batch
    norm needs more than one row, and a compiled kernel always as many.
    """
    if isinstance(items, Batches):
        return items.inputs, items.answers
    good = [item for item in items if not isinstance(item, str)]
    for reason in (item for item in items if isinstance(item, str)):
        _say_once(reason)
    if not good:
        raise UserError(f"None of the {len(items)} pictures of a batch can be read; the first: {items[0]}")
    return torch.utils.data.default_collate([good[place % len(good)] for place in range(len(items))])


@cache
def _say_once(reason: str) -> None:
    log.warning("left out of the training: %s", reason)
