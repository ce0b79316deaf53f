"""The steps of a Boolean masker's training, for the loop of `backbones/loop.py`. Behind `require_lightning` alone."""

from __future__ import annotations

import itertools
import math
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
    """A model that learns by Adam, in the three parts of a training that `Control` describes.

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
        self._let_learn()
        if self._part() == 0:
            loss = F.cross_entropy(self.model.behind_any(inputs), labels)
        else:
            beta = self._next_beta()
            terms = self.model(inputs, labels, beta)
            self.seen[...] = terms.autoencoder.detach().mean()
            loss = terms.loss(1.0 if self.model.objective.name == "conditional" else beta)  # there H(M|I) has no weight
        self.log("training_loss", loss, on_step=False, on_epoch=True, batch_size=len(inputs))
        return loss

    def _let_learn(self) -> None:
        """The networks whose turn it is. The classifier's batch statistics are those of the warmup, for masks come to
        hide nearly all."""
        part = self._part()
        self.model.masker.requires_grad_(part == 1)
        if self.model.classifier is not None:
            self.model.classifier.train(part == 0).requires_grad_(part != 1 or self.control.along > 0)

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
        if self._part() == 0:  # no epoch of these is kept, nor does one count as no progress
            self.log("validation_loss", _NOT_YET - self.current_epoch)
            return
        found = self.trainer.callback_metrics
        excess = (found["validation_autoencoder"] / self.control.target - 1).clamp_min(0)
        self.log("validation_loss", found["validation_cross_entropy"] + excess)

    def configure_optimizers(self) -> Any:
        own = [] if self.model.classifier is None else list(self.model.classifier.parameters())
        others = [p for name, p in self.model.named_parameters() if not name.startswith("classifier.")]
        optimizer = torch.optim.Adam(
            [{"params": group} for group in (others, own) if group],
            lr=self.recipe.learning_rate,
            weight_decay=self.recipe.weight_decay,
        )
        paces = (self._pace, self._pace_of_classifier)[: len(optimizer.param_groups)]
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, list(paces))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _pace(self, step: int) -> float:
        """The learning rate's share of its highest: in each part it rises for a twentieth of the time, and falls as a
        cosine in the second half."""
        done = step / self._steps()
        start, end = next((a, b) for a, b in itertools.pairwise(self._borders()) if done < b or b == 1)
        share = min((done - start) / (end - start), 1.0)
        return min(share * 20, 1.0) * (0.5 + 0.5 * math.cos(math.pi * max(2 * share - 1, 0.0)))

    def _pace_of_classifier(self, step: int) -> float:
        _, first, last, _ = self._borders()
        along = self.control.along if first <= step / self._steps() < last else 1.0
        return along * self._pace(step)

    def _borders(self) -> list[float]:
        """Where the parts of the training begin and end: with a network that is given there is one."""
        control, own = self.control, self.model.classifier is not None
        return [0.0, control.warmup * own, 1 - control.tuning * own, 1.0]

    def _part(self) -> int:
        """0: the classifier learns alone, 1: the masking network learns, 2: the classifier again."""
        return sum(self._progress() >= border for border in self._borders()[1:3])

    def _steps(self) -> int:
        return int(self.trainer.estimated_stepping_batches)

    def _progress(self) -> float:
        return self.global_step / self._steps()

    def _next_beta(self) -> float:
        if not self.seen.isinf():  # the first step behind the warmup shows where the loss is
            self.beta[...] = self.control.next_beta(float(self.beta), float(self.seen))
        return float(self.beta) * self.control.risen(self._progress())
