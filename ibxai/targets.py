"""Targets: which output of the network is explained.

A target specification (`target=` on the command line) names the rows that a sample gives, and makes the tensor form
that methods and metrics use. `bind` is called once on the network's unmasked output, so that "predicted" means what
the original network said, also after the picture is masked or the weights are randomised.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ibxai.errors import BadSample, UserError
from ibxai.types import Sample, ScoreKind

PREDICTED = -1


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
