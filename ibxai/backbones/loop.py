"""The loop of a training: PyTorch Lightning's, with early stopping, mixed precision, several GPUs and resume.

Lightning is optional, so this module is imported behind `training.require_lightning` alone. Two things are added to it.
The order of the pictures and all draws of an epoch come from (seed, epoch), so a training that was killed and started
again ends with the weights of one that ran through. Its checkpoints are written whole or not at all, and read without
unpickling. Several devices share each batch and are processes that Lightning spawns.
"""

from __future__ import annotations

import contextlib
import io
import logging
import math
import signal
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as lightning
import torch
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler

from ibxai.backbones.training import Examples, Loss, Recipe, collated
from ibxai.errors import UserError
from ibxai.store import write_atomically, write_rows

log = logging.getLogger(__name__)

PRECISIONS = {"32": "32-true", "bf16": "bf16-mixed"}
LAST, BEST = "last", "best"
WATCHED = "validation_loss"


class Learning(lightning.LightningModule):
    """A network that learns by AdamW on a one-cycle schedule. seed: of what it draws, epoch by epoch.

    What is trained otherwise brings a module of its own, which logs "training_loss" and "validation_loss".
    """

    def __init__(self, network: nn.Module, recipe: Recipe, loss: Loss, seed: int) -> None:
        super().__init__()
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # half again as fast on a CPU
        self.network = network.train().requires_grad_(True)
        self.recipe, self.loss, self.seed = recipe, loss, seed

    def on_train_epoch_start(self) -> None:
        torch.manual_seed(self.seed + 1_000_003 * (self.current_epoch + 1) + self.global_rank)

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
        return self._measured(batch, "training_loss")

    def validation_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
        return self._measured(batch, WATCHED)

    def _measured(self, batch: tuple[Tensor, Tensor], name: str) -> Tensor:
        inputs, answers = batch
        loss = self.loss(self.network(inputs).float(), answers)
        self.log(name, loss, on_step=False, on_epoch=True, sync_dist=True, batch_size=len(inputs))
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(
            self.parameters(), lr=self.recipe.learning_rate, weight_decay=self.recipe.weight_decay
        )
        steps = int(self.trainer.estimated_stepping_batches)
        cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=self.recipe.learning_rate, total_steps=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": cycle, "interval": "step"}}


class History(lightning.Callback):
    """One row an epoch: losses, learning rate, seconds, and what else the module logs. Kept in the checkpoints, so that
    a resumed training has all.

    path: of the CSV file, written anew after each epoch.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.rows, self._started = path, [], 0.0  # type: tuple[Path, list[dict[str, float]], float]

    def on_train_epoch_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        self._started = time.perf_counter()

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        found = {name: float(trainer.callback_metrics[name]) for name in ("training_loss", WATCHED)}
        rate = trainer.optimizers[0].param_groups[0]["lr"]
        more = {name: float(value) for name, value in trainer.callback_metrics.items() if name not in found}
        seconds = time.perf_counter() - self._started
        row = {"epoch": trainer.current_epoch + 1, **found, "learning_rate": rate, "seconds": round(seconds, 2), **more}
        self.rows.append(row)
        if trainer.is_global_zero:
            log.info("epoch %d of %s: training loss %.4f, validation loss %.4f, %.1f s",
                     row["epoch"], trainer.max_epochs, *found.values(), seconds)  # fmt: skip
            write_rows(self.path, self.rows)

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self.rows}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.rows = list(state_dict["rows"])


class WholeFiles(TorchCheckpointIO):
    """Checkpoints that a kill cannot cut short."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        write_atomically(Path(path), buffer.getvalue())


class Data(lightning.LightningDataModule):
    """The loaders of a training. batch_size: rows of a step, whatever the number of devices that share them."""

    def __init__(self, train: Examples, validation: Examples | None, batch_size: int, workers: int, seed: int) -> None:
        super().__init__()
        self.train, self.validation, self.seed = train, validation, seed
        self.batch_size, self.workers = batch_size, workers

    def train_dataloader(self) -> DataLoader[Any]:
        return self._loader(self.train, shuffle=True)

    def val_dataloader(self) -> DataLoader[Any] | list[Any]:
        return [] if self.validation is None else self._loader(self.validation, shuffle=False)

    def _loader(self, examples: Examples, shuffle: bool) -> DataLoader[Any]:
        assert self.trainer is not None
        ranks = self.trainer.world_size
        return DataLoader(
            examples,  # type: ignore[arg-type]  # what a DataLoader needs of it, Examples has
            batch_size=max(1, min(self.batch_size, len(examples)) // ranks),
            # its order comes from (seed, epoch), also on one device
            sampler=DistributedSampler(examples, ranks, self.trainer.global_rank, shuffle, self.seed),  # type: ignore[arg-type]
            drop_last=shuffle,  # a last batch of one would have no deviation for a batch norm
            num_workers=self.workers,
            persistent_workers=self.workers > 0,
            collate_fn=collated,
            generator=torch.Generator().manual_seed(self.seed),
        )


def run_epochs(
    module: lightning.LightningModule,
    train: Examples,
    recipe: Recipe,
    seed: int,
    validation: Examples | None = None,
    device: torch.device | None = None,
    devices: int = 1,
    precision: str = "32",
    workers: int = 0,
    callbacks: Sequence[lightning.Callback] = (),
    resume: Path | None = None,
) -> None:
    """Train the module, in place; with several devices what they learn stays in their processes and in checkpoints."""
    device = device or torch.device("cpu")
    gpu = device.type == "cuda"
    with _own_state(seed, device):
        trainer = lightning.Trainer(
            max_epochs=recipe.epochs,
            accelerator="gpu" if gpu else "cpu",
            devices=[device.index or 0] if gpu and devices == 1 else devices,
            strategy="auto" if devices == 1 else "ddp_spawn",
            precision=PRECISIONS[precision],  # type: ignore[arg-type]
            plugins=[LightningEnvironment(), WholeFiles()],  # alone, also in a cluster's job
            callbacks=list(callbacks),
            limit_val_batches=None if validation is not None else 0,
            num_sanity_val_steps=0,
            logger=False,
            enable_checkpointing=any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
            enable_progress_bar=bool(callbacks) and sys.stderr.isatty(),
            enable_model_summary=False,
        )
        with _signals_as_before(trainer):
            data = Data(train, validation, recipe.batch_size, workers, seed)
            trainer.fit(module, datamodule=data, ckpt_path=resume, weights_only=True)


def fit(
    module: lightning.LightningModule,
    train: Examples,
    validation: Examples,
    recipe: Recipe,
    seed: int,
    folder: Path,
    patience: int,
    device: torch.device,
    devices: int,
    precision: str,
    workers: int,
) -> tuple[Mapping[str, Tensor], Sequence[Mapping[str, float]]]:
    """Train with early stopping, from the last epoch that is in `folder` on.

    Returns the module's state dict at its lowest validation loss, on the CPU, and the history, a row an epoch. `folder`
    holds curves.csv, and Lightning's checkpoints for the resume. Raises UserError when no loss was ever finite.
    """
    kept: dict[str, Any] = {"dirpath": folder, "enable_version_counter": False, "save_on_train_epoch_end": True}
    callbacks = [
        EarlyStopping(WATCHED, patience=patience),
        History(folder / "curves.csv"),
        ModelCheckpoint(filename=BEST, monitor=WATCHED, save_weights_only=True, **kept),
        ModelCheckpoint(filename=LAST, **kept),
    ]
    last = folder / f"{LAST}.ckpt"
    if last.exists():
        log.info("going on behind the last finished epoch: %s", last)
    run_epochs(
        module, train, recipe, seed, validation, device, devices, precision, workers, callbacks,
        last if last.exists() else None,
    )  # fmt: skip
    ended = torch.load(last, map_location="cpu", weights_only=True)
    rows = ended["callbacks"][History.__qualname__]["rows"]
    if not any(math.isfinite(row[WATCHED]) for row in rows):
        raise UserError("The validation loss was never finite: a lower learning_rate may help.")
    best = torch.load(folder / f"{BEST}.ckpt", map_location="cpu", weights_only=True)
    return best["state_dict"], rows


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
