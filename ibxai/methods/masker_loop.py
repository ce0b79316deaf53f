"""The steps of a Boolean masker's training, for the loop of `backbones/loop.py`. Behind `require_lightning` alone."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as lightning
import torch
from torch import Tensor
from torch.nn import functional as F

from ibxai.backbones.training import Recipe
from ibxai.methods.masker_model import MaskerModel
from ibxai.methods.masker_objective import Control

_NOT_YET = 1e5  # beyond any loss


class MaskerLearning(lightning.LightningModule):
    """A model that learns by Adam on a one-cycle schedule while beta keeps its autoencoder's loss where it is wanted.

    Which epoch is kept: "validation_loss" is the cross-entropy plus the share by which the autoencoder's loss lies
    above the last target, so that no epoch is kept whose masks tell too much. All draws are from (seed, epoch).
    """

    beta: Tensor
    seen: Tensor

    def __init__(self, model: MaskerModel, recipe: Recipe, control: Control, seed: int) -> None:
        super().__init__()
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # half again as fast on a CPU
        self.model, self.recipe, self.control, self.seed = model, recipe, control, seed
        self.register_buffer("beta", torch.tensor(control.beta, dtype=torch.float64))
        self.register_buffer("seen", torch.tensor(torch.inf, dtype=torch.float64))  # the autoencoder's last loss

    def on_train_epoch_start(self) -> None:
        torch.manual_seed(self.seed + 1_000_003 * (self.current_epoch + 1) + self.global_rank)

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
        inputs, labels = batch
        if self.model.classifier is not None and self._progress() < self.control.warmup:
            loss = F.cross_entropy(self.model.at_first(inputs), labels)
            self.log("training_loss", loss, on_step=False, on_epoch=True, batch_size=len(inputs))
            return loss
        beta = self._next_beta()
        terms = self.model(inputs, labels, beta)
        self.seen[...] = terms.autoencoder.detach().mean()
        loss = terms.loss(1.0 if self.model.objective.name == "conditional" else beta)  # there H(M|I) has no weight
        self.log("training_loss", loss, on_step=False, on_epoch=True, batch_size=len(inputs))
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], _: int) -> None:
        terms = self.model(*batch, 0.0)
        measured = {
            "cross_entropy": terms.cross_entropy,
            "accuracy": terms.correct.float(),
            "autoencoder": terms.autoencoder,
            "rho": terms.rho,
        }
        for name, values in measured.items():
            mean = values.mean()
            self.log(f"validation_{name}", mean, on_step=False, on_epoch=True, sync_dist=True, batch_size=len(values))

    def on_validation_epoch_end(self) -> None:
        if self._progress() < self.control.warmup:  # no epoch of these is kept, nor does one count as no progress
            self.log("validation_loss", _NOT_YET - self.current_epoch)
            return
        found = self.trainer.callback_metrics
        excess = (found["validation_autoencoder"] / self.control.target - 1).clamp_min(0)
        self.log("validation_loss", found["validation_cross_entropy"] + excess)

    def configure_optimizers(self) -> Any:
        masking = list(self.model.masker.parameters())
        own = {id(weights) for weights in masking}
        groups = [masking, [weights for weights in self.model.parameters() if id(weights) not in own]]
        rates = [self.control.pace * self.recipe.learning_rate, self.recipe.learning_rate]
        optimizer = torch.optim.Adam([{"params": group} for group in groups], weight_decay=self.recipe.weight_decay)
        steps = int(self.trainer.estimated_stepping_batches)
        cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=rates, total_steps=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": cycle, "interval": "step"}}

    def _progress(self) -> float:
        return self.global_step / int(self.trainer.estimated_stepping_batches)

    def _next_beta(self) -> float:
        if not self.seen.isinf():  # the first step behind the warmup shows where the loss is
            self.beta[...] = self.control.next_beta(float(self.beta), float(self.seen))
        return float(self.beta)
