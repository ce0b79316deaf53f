"""Training a network: one function from (network, pictures with answers, recipe, seed) to a trained network.

The loop is PyTorch Lightning's, an optional dependency. A training is settled by its arguments: the order of the data
and any dropout come from the seed, the global random state and torch's modes are as before afterwards, and the network
that was given stays as it was. (On a GPU two trainings of one seed may still differ, since kernels add in any order.)
"""

from __future__ import annotations

import contextlib
import copy
import logging
import signal
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from ibxai.datasets.loading import load_batches
from ibxai.errors import UserError
from ibxai.preprocessing import Preprocessing
from ibxai.targets import Label
from ibxai.types import Dataset, Sample

log = logging.getLogger(__name__)

Loss = Callable[[Tensor, Tensor], Tensor]


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
    """Pictures with answers, as torch's DataLoader takes them: item i is (input [C, H, W], answer)."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]: ...


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
    dataset: Dataset, samples: Sequence[Sample], preprocessing: Preprocessing, batch_size: int, workers: int
) -> InMemory:
    """Pictures with their labels, as a network takes them. Unreadable ones are left out, and said in the log.

    Raises UserError when none is left.
    """
    inputs: list[Tensor] = []
    labels: list[int | None] = []
    kept: list[tuple[tuple[str, ...], tuple[str, ...]]] = []
    work = [(sample, (0,)) for sample in samples]
    for loaded in load_batches(dataset, work, Label(), preprocessing, batch_size, workers):
        for sample_id, reason in loaded.skipped.items():
            log.warning("left out of the training: %s: %s", sample_id, reason)
        if loaded.batch is not None:
            inputs.append(loaded.batch.inputs)
            labels += loaded.labels
            kept.append((loaded.batch.sample_ids, loaded.batch.group_ids))
    if not inputs:
        raise UserError(f"None of the {len(samples)} pictures of {dataset.name} can be read and has a label.")
    sample_ids, group_ids = (tuple(i for ids in of_batches for i in ids) for of_batches in zip(*kept, strict=True))
    return InMemory(torch.cat(inputs), torch.tensor(labels), sample_ids, group_ids)


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
    lightning = require_lightning()
    from lightning.fabric.plugins.environments import LightningEnvironment

    device = torch.device(device)
    if len(examples) < 2:
        raise UserError(f"Training needs at least 2 pictures, and there are {len(examples)}.")
    with _own_state(seed, device):
        loader: DataLoader[Any] = DataLoader(
            examples,  # type: ignore[arg-type]  # what a DataLoader needs of it, Examples has
            batch_size=min(recipe.batch_size, len(examples)),
            shuffle=True,
            drop_last=True,  # a last batch of one would have no deviation for a batch norm
            num_workers=workers,
            collate_fn=_collated,
            generator=torch.Generator().manual_seed(seed),
        )
        network = copy.deepcopy(network)
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # half again as fast on a CPU
        module = _lightning_module(lightning, network, recipe, loss, len(loader))
        trainer = lightning.Trainer(
            max_epochs=recipe.epochs,
            accelerator="gpu" if device.type == "cuda" else "cpu",
            devices=[device.index or 0] if device.type == "cuda" else 1,
            plugins=[LightningEnvironment()],  # alone, also in a cluster's job
            **dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False),
        )
        with _signals_as_before(trainer):
            trainer.fit(module, loader)
    return module.network.cpu().eval().requires_grad_(False)


def outputs_of(network: nn.Module, inputs: Tensor, device: torch.device | str = "cpu", rows: int = 256) -> Tensor:
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


def _lightning_module(lightning: Any, network: nn.Module, recipe: Recipe, loss: Loss, steps: int) -> Any:
    """The network in Lightning's form. A class in a function, since its base is known only when Lightning is there."""

    class Training(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.network = network.train().requires_grad_(True)

        def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
            inputs, answers = batch
            return loss(self.network(inputs), answers)

        def configure_optimizers(self) -> dict[str, Any]:
            optimizer = torch.optim.AdamW(self.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
            cycle = torch.optim.lr_scheduler.OneCycleLR(
                optimizer, max_lr=recipe.learning_rate, total_steps=recipe.epochs * steps
            )
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": cycle, "interval": "step"}}

    return Training()


def _collated(items: Any) -> Any:
    if isinstance(items, Batches):
        return items.inputs, items.answers
    return torch.utils.data.default_collate(items)


@contextlib.contextmanager
def _signals_as_before(trainer: Any) -> Iterator[None]:
    """Lightning turns Ctrl-C and SIGTERM into an exit of its own, and ignores Ctrl-C from then on: here they stay."""
    kinds = (signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(kind) for kind in kinds]
    try:
        yield
    except SystemExit as stop:
        _restore(kinds, before)
        if trainer.received_sigterm:
            signal.raise_signal(signal.SIGTERM)
        raise KeyboardInterrupt from stop
    finally:
        _restore(kinds, before)


def _restore(kinds: Sequence[signal.Signals], handlers: Sequence[Any]) -> None:
    for kind, handler in zip(kinds, handlers, strict=True):
        if signal.getsignal(kind) is not handler:
            signal.signal(kind, handler)


@contextlib.contextmanager
def _own_state(seed: int, device: torch.device) -> Iterator[None]:
    """Random numbers from the seed, gradients on, Lightning's advice unsaid; all of it as before when left."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric", "lightning")]
    levels = [logger.level for logger in loggers]
    devices = [device.index or 0] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.enable_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        try:
            for logger in loggers:
                logger.setLevel(logging.ERROR)
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
