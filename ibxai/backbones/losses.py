"""What a training minimises: cross-entropy, binary cross-entropy, its weighted form, mean squared error.

    L = -(1/K) sum_k [ beta_k y_k ln p_k + (1 - y_k) ln(1 - p_k) ],   beta_k = absences / presences of label k

is CheXplain's weighted BCE (Eq. 8). The paper leaves open what beta is: here it is counted on the train split, a label
at a time, so that a label's presences weigh as much as its absences, however rare they are. The paper sums over the
labels; here they are averaged, so that a learning rate suits 8 labels and 14.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from ibxai.backbones.training import Loss
from ibxai.targets import AnswerKind


class LossSpec(Protocol):
    """What `loss=` chooses. answers: the kind that it can be computed from."""

    answers: ClassVar[AnswerKind]

    def make(self, answers: Tensor) -> Loss:
        """(outputs [B, K], answers of the batch) -> one number, the mean over the batch.

        answers: of the whole train split, long [N] of "class", float [N, K] of the others.
        """
        ...


@dataclass(frozen=True)
class CrossEntropy:
    """Of a softmax over the outputs, in nats."""

    answers: ClassVar[AnswerKind] = "class"

    def make(self, answers: Tensor) -> Loss:
        return F.cross_entropy


@dataclass(frozen=True)
class BCE:
    """Of a sigmoid an output, in nats, the mean over outputs."""

    answers: ClassVar[AnswerKind] = "labels"

    def make(self, answers: Tensor) -> Loss:
        return F.binary_cross_entropy_with_logits


@dataclass(frozen=True)
class WeightedBCE:
    """As BCE, the presences of a label times beta. A label that all pictures have, or none, gets a beta of one."""

    answers: ClassVar[AnswerKind] = "labels"

    def make(self, answers: Tensor) -> Loss:
        present = answers.double().sum(0)
        absent = len(answers) - present
        beta = torch.where((present > 0) & (absent > 0), absent / present, 1.0)
        return partial(_weighted_bce, beta=beta.float())


@dataclass(frozen=True)
class MSE:
    """Squared difference of each output, in squared units of the answer, the mean over outputs."""

    answers: ClassVar[AnswerKind] = "values"

    def make(self, answers: Tensor) -> Loss:
        return F.mse_loss


def _weighted_bce(outputs: Tensor, answers: Tensor, beta: Tensor) -> Tensor:
    """beta: [K]."""
    return F.binary_cross_entropy_with_logits(outputs, answers, pos_weight=beta.to(outputs.device))


# what a training minimises where no loss is chosen; of labels CheXplain's, whose maps lie better on the findings
USUAL: dict[AnswerKind, LossSpec] = {"class": CrossEntropy(), "labels": WeightedBCE(), "values": MSE()}
