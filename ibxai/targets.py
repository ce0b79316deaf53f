"""Targets: which output of the network is explained.

A target specification (`target=` on the command line) names the rows that a sample gives, and makes the tensor form
that methods and metrics use. `bind` is called once on the network's unmasked output, so that "predicted" means what
the original network said, also after the picture is masked or the weights are randomised.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from ibxai.errors import BadSample, UserError, nearest
from ibxai.types import Sample, ScoreKind

PREDICTED = -1
_TINY = 1e-12

# How the objective of an inverse bottleneck, minus the target's loss (CheXplain Eq. 6), is kept from running away. With
# p the target's probability: "complement" -ln(1 - p), the cross-entropy of "not this"; "probability" p; "none" ln p,
# as published, which has no lower bound. Of a regression p stands for 1 / (1 + d), d the loss relative to the output.
Bound = Literal["complement", "probability", "none"]
BOUNDS: tuple[str, ...] = get_args(Bound)


@dataclass(frozen=True)
class ClassTarget:
    """One class of a softmax classifier a row. classes: long [B]; PREDICTED stands for the top class until bound."""

    classes: Tensor

    @classmethod
    def predicted(cls, rows: int) -> ClassTarget:
        """The network's own choice for this many rows."""
        return cls(torch.full((rows,), PREDICTED))

    def bind(self, out: Tensor) -> ClassTarget:
        if self.classes.numel() and int(self.classes.max()) >= out.shape[1]:
            raise UserError(
                f"Target class {int(self.classes.max())} does not exist: the network has {out.shape[1]} outputs, "
                f"0 to {out.shape[1] - 1}."
            )
        return ClassTarget(torch.where(self.classes == PREDICTED, out.argmax(1), self.classes))

    def score(self, out: Tensor, kind: ScoreKind) -> Tensor:
        """[B]: softmax probability (of out [B, K]), or the logit itself; "value" is the logit too."""
        values = out.softmax(1) if kind == "probability" else out
        return values.gather(1, self._bound()[:, None])[:, 0]

    def loss(self, out: Tensor) -> Tensor:
        """[B]: cross-entropy in nats."""
        return F.cross_entropy(out, self._bound(), reduction="none")

    def removal_loss(self, out: Tensor, bound: Bound) -> Tensor:
        """[B]: small when the evidence for the class is gone. See `Bound`."""
        if bound == "none":
            return -self.loss(out)
        if bound == "probability":
            return self.score(out, "probability")
        others = out.scatter(1, self._bound()[:, None], -torch.inf).logsumexp(1)
        return F.softplus(self.score(out, "logit") - others)

    def take(self, rows: Tensor) -> ClassTarget:
        return ClassTarget(self.classes[rows])

    def to(self, device: torch.device) -> ClassTarget:
        return ClassTarget(self.classes.to(device))

    def describe(self) -> Sequence[int]:
        return self.classes.tolist()

    def _bound(self) -> Tensor:
        if (self.classes == PREDICTED).any():
            raise RuntimeError("the target has not been bound: call target.bind(backbone(inputs)) first")
        return self.classes


RegressionLoss = Literal["mse", "rm", "deviation"]
REGRESSION_LOSSES: tuple[str, ...] = get_args(RegressionLoss)


@dataclass(frozen=True)
class RegressionTarget:
    """One real output a row, for Regression IBA (CheXplain, sec. 2.2).

    kind: "mse" (Phi(Z) - y)^2 to the label; "deviation" (Phi(Z) - Phi(X))^2 to the unmasked output; "rm" favours large
    outputs. As published "rm" minimises -Phi(Z)^2, which has no bound; here it is ln(1 + Phi(X)^2 / Phi(Z)^2), which
    falls with Phi(Z)^2 too, and ends at 0. labels: [B], needed by "mse". output: the column of the network's output.
    """

    kind: RegressionLoss
    labels: Tensor
    output: int = 0
    reference: Tensor | None = None

    def __post_init__(self) -> None:
        if self.kind not in REGRESSION_LOSSES:
            raise UserError(f"There is no regression loss '{self.kind}'. {nearest(self.kind, REGRESSION_LOSSES)}")
        if self.kind == "mse" and self.labels.isnan().any():
            raise UserError("The regression loss 'mse' needs a label for every sample; 'deviation' and 'rm' do not.")

    def bind(self, out: Tensor) -> RegressionTarget:
        return replace(self, reference=out[:, self.output].detach())

    def score(self, out: Tensor, kind: ScoreKind) -> Tensor:
        """[B]: the value; a regression has no probability."""
        if kind == "probability":
            raise UserError("A regression has no probability: choose score=value.")
        return out[:, self.output]

    def loss(self, out: Tensor) -> Tensor:
        """[B]: squared error, in squared units of the output; of "rm" the bounded form, without unit."""
        value = out[:, self.output]
        if self.kind == "mse":
            return (value - self.labels) ** 2
        if self.kind == "deviation":
            return (value - self._bound()) ** 2
        return torch.log1p(self._bound() ** 2 / value.square().clamp_min(_TINY))

    def removal_loss(self, out: Tensor, bound: Bound) -> Tensor:
        """[B]: small when the output has left what it was. See `Bound`."""
        if bound == "none":
            return -self.loss(out)
        distance = self.loss(out) / (1.0 if self.kind == "rm" else self._bound().square().clamp_min(_TINY))
        return 1 / (1 + distance) if bound == "probability" else torch.log1p(1 / distance.clamp_min(_TINY))

    def take(self, rows: Tensor) -> RegressionTarget:
        return replace(
            self, labels=self.labels[rows], reference=None if self.reference is None else self.reference[rows]
        )

    def to(self, device: torch.device) -> RegressionTarget:
        return replace(
            self, labels=self.labels.to(device), reference=None if self.reference is None else self.reference.to(device)
        )

    def describe(self) -> Sequence[int]:
        return [self.output] * len(self.labels)

    def _bound(self) -> Tensor:
        if self.reference is None:
            raise RuntimeError("the target has not been bound: call target.bind(backbone(inputs)) first")
        return self.reference


@dataclass(frozen=True)
class Predicted:
    """Explain the class that the network predicts."""

    def names(self) -> tuple[str, ...]:
        """The part after "@" in the ids of the rows that one sample gives."""
        return ("predicted",)

    def make(self, sample: Sample) -> Tensor:
        """long [len(names)]: the class of each row of this sample, PREDICTED for the network's own choice."""
        return torch.tensor([PREDICTED])


@dataclass(frozen=True)
class Label:
    """Explain the class that the dataset gives. A sample without one is skipped, and listed."""

    def names(self) -> tuple[str, ...]:
        return ("label",)

    def make(self, sample: Sample) -> Tensor:
        if sample.label is None:
            raise BadSample("the dataset gives no label, and target=label asks for it")
        return torch.tensor([sample.label])


@dataclass(frozen=True)
class Classes:
    """Explain the same given classes of every sample: one row a class."""

    ids: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.ids or min(self.ids) < 0:
            raise UserError(f"target.ids is {list(self.ids)}: give class numbers from 0 on, e.g. target.ids=[281,285].")

    def names(self) -> tuple[str, ...]:
        return tuple(str(i) for i in self.ids)

    def make(self, sample: Sample) -> Tensor:
        return torch.tensor(self.ids)


TargetSpec = Predicted | Label | Classes
