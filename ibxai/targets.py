"""Targets: which output of the network is explained.

A target specification (`target=` on the command line) names the rows that a sample gives, and makes the tensor form
that methods and metrics use. `bind` is called once on the network's unmasked output, so that "predicted" means what
the original network said, also after the picture is masked or the weights are randomised.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, Protocol, Self, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from ibxai.errors import BadSample, UserError, nearest
from ibxai.types import Sample, ScoreKind, Target

PREDICTED = -1
_TINY = 1e-12

# How the objective of an inverse bottleneck, minus the target's loss (CheXplain Eq. 6), is kept from running away. With
# p the target's probability: "complement" -ln(1 - p), the cross-entropy of "not this"; "probability" p; "none" ln p,
# as published, which has no lower bound. Of a regression p stands for 1 / (1 + d), d the loss relative to the output.
Bound = Literal["complement", "probability", "none"]
BOUNDS: tuple[str, ...] = get_args(Bound)


@dataclass(frozen=True)
class _OneOutput(ABC):
    """One output of a classifier a row. classes: long [B]; PREDICTED stands for the top class until bound."""

    classes: Tensor

    @classmethod
    def predicted(cls, rows: int) -> Self:
        """The network's own choice for this many rows."""
        return cls(torch.full((rows,), PREDICTED))

    def bind(self, out: Tensor) -> Self:
        if self.classes.numel() and int(self.classes.max()) >= out.shape[1]:
            raise UserError(
                f"Target class {int(self.classes.max())} does not exist: the network has {out.shape[1]} outputs, "
                f"0 to {out.shape[1] - 1}."
            )
        return replace(self, classes=torch.where(self.classes == PREDICTED, out.argmax(1), self.classes))

    @abstractmethod
    def score(self, out: Tensor, kind: ScoreKind) -> Tensor: ...

    @abstractmethod
    def loss(self, out: Tensor) -> Tensor: ...

    @abstractmethod
    def removal_loss(self, out: Tensor, bound: Bound) -> Tensor: ...

    @abstractmethod
    def prediction(self, out: Tensor) -> tuple[Tensor, Tensor]: ...

    def take(self, rows: Tensor) -> Self:
        return replace(self, classes=self.classes[rows])

    def to(self, device: torch.device) -> Self:
        return replace(self, classes=self.classes.to(device))

    def describe(self) -> Sequence[int]:
        return self.classes.tolist()

    def _bound(self) -> Tensor:
        if (self.classes == PREDICTED).any():
            raise RuntimeError("the target has not been bound: call target.bind(backbone(inputs)) first")
        return self.classes


@dataclass(frozen=True)
class ClassTarget(_OneOutput):
    """One class of a softmax classifier a row. classes: long [B]; PREDICTED stands for the top class until bound."""

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

    def prediction(self, out: Tensor) -> tuple[Tensor, Tensor]:
        """The top class and its softmax probability, [B] each."""
        probability, index = out.softmax(1).max(1)
        return index, probability


@dataclass(frozen=True)
class MultiLabelTarget(_OneOutput):
    """One label a row of a network with a sigmoid an output, such as the 8 findings of ChestX-ray8 (CheXplain, sec. 3).

    classes: long [B]; PREDICTED stands for the most probable label until bound. What is explained is that the label is
    present, whether the dataset says so or not: its loss is the binary cross-entropy to 1, and the other outputs do not
    count.
    """

    def score(self, out: Tensor, kind: ScoreKind) -> Tensor:
        """[B]: sigmoid probability (of out [B, K]), or the logit itself; "value" is the logit too."""
        logit = out.gather(1, self._bound()[:, None])[:, 0]
        return logit.sigmoid() if kind == "probability" else logit

    def loss(self, out: Tensor) -> Tensor:
        """[B]: -ln sigmoid of the label's logit, in nats."""
        return F.softplus(-self.score(out, "logit"))

    def removal_loss(self, out: Tensor, bound: Bound) -> Tensor:
        """[B]: small when the evidence for the label is gone. See `Bound`."""
        if bound == "none":
            return -self.loss(out)
        return self.score(out, "probability") if bound == "probability" else F.softplus(self.score(out, "logit"))

    def prediction(self, out: Tensor) -> tuple[Tensor, Tensor]:
        """The most probable label and its sigmoid probability, [B] each."""
        logit, index = out.max(1)
        return index, logit.sigmoid()


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

    def prediction(self, out: Tensor) -> tuple[Tensor, Tensor]:
        """The explained output itself, [B], with NaN [B]: a regression has no probability."""
        return torch.full_like(out[:, 0], self.output, dtype=torch.long), torch.full_like(out[:, 0], torch.nan)

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


# What a network's outputs answer: "class" one of them is right (softmax); "labels" each is there or not (sigmoid);
# "values" each is a number.
AnswerKind = Literal["class", "labels", "values"]


class TargetSpec(Protocol):
    """What `target=` chooses: the rows that a sample gives, before the network has seen it. A frozen dataclass.

    answers: the kind of network that it explains.
    """

    answers: ClassVar[AnswerKind]

    def names(self) -> tuple[str, ...]:
        """The part after "@" in the ids of the rows that one sample gives."""
        ...

    def make(self, sample: Sample) -> Tensor:
        """long [len(names)]: the output that each row of this sample explains, PREDICTED for the network's own choice.

        Raises BadSample where the dataset does not give what is asked for.
        """
        ...

    def of_rows(self, outputs: Tensor, values: Tensor) -> Target:
        """The target of rows that explain these outputs, long [B]. values: [B], what the dataset says that they are to
        be, NaN where it says nothing.
        """
        ...


@dataclass(frozen=True)
class Predicted:
    """Explain the class that the network predicts."""

    answers: ClassVar[AnswerKind] = "class"

    def names(self) -> tuple[str, ...]:
        return ("predicted",)

    def make(self, sample: Sample) -> Tensor:
        return torch.tensor([PREDICTED])

    def of_rows(self, outputs: Tensor, values: Tensor) -> ClassTarget:
        return ClassTarget(outputs)


@dataclass(frozen=True)
class Label:
    """Explain the class that the dataset gives. A sample without one is skipped, and listed."""

    answers: ClassVar[AnswerKind] = "class"

    def names(self) -> tuple[str, ...]:
        return ("label",)

    def make(self, sample: Sample) -> Tensor:
        return _label(sample, "target=label")

    def of_rows(self, outputs: Tensor, values: Tensor) -> ClassTarget:
        return ClassTarget(outputs)


@dataclass(frozen=True)
class Classes:
    """Explain the same given classes of every sample: one row a class."""

    ids: tuple[int, ...]

    answers: ClassVar[AnswerKind] = "class"

    def __post_init__(self) -> None:
        _check_ids(self.ids)

    def names(self) -> tuple[str, ...]:
        return tuple(str(i) for i in self.ids)

    def make(self, sample: Sample) -> Tensor:
        return torch.tensor(self.ids)

    def of_rows(self, outputs: Tensor, values: Tensor) -> ClassTarget:
        return ClassTarget(outputs)


@dataclass(frozen=True)
class MultiLabel:
    """Explain labels of a network with a sigmoid an output.

    ids: the same given labels of every sample, one row a label; or "label", the one that the dataset gives as the
    sample's own; or "predicted", the most probable one.
    """

    ids: tuple[int, ...] | Literal["label", "predicted"]

    answers: ClassVar[AnswerKind] = "labels"

    def __post_init__(self) -> None:
        if not isinstance(self.ids, str):
            _check_ids(self.ids)

    def names(self) -> tuple[str, ...]:
        return (self.ids,) if isinstance(self.ids, str) else tuple(str(i) for i in self.ids)

    def make(self, sample: Sample) -> Tensor:
        if self.ids == "label":
            return _label(sample, "target.ids=label")
        return torch.tensor([PREDICTED] if self.ids == "predicted" else self.ids)

    def of_rows(self, outputs: Tensor, values: Tensor) -> MultiLabelTarget:
        return MultiLabelTarget(outputs)


@dataclass(frozen=True)
class Regression:
    """Explain one real output of the network (Regression IBA). kind, output: see `RegressionTarget`."""

    kind: RegressionLoss
    output: int

    answers: ClassVar[AnswerKind] = "values"

    def __post_init__(self) -> None:
        if self.output < 0:
            raise UserError(f"target.output is {self.output}: give the number of an output, from 0 on.")

    def names(self) -> tuple[str, ...]:
        return (str(self.output),)

    def make(self, sample: Sample) -> Tensor:
        if self.kind == "mse" and self.output >= len(sample.values):
            raise BadSample(f"the dataset gives no value for output {self.output}, and target.kind=mse asks for it")
        return torch.tensor([self.output])

    def of_rows(self, outputs: Tensor, values: Tensor) -> RegressionTarget:
        return RegressionTarget(self.kind, values, self.output)


def _label(sample: Sample, asking: str) -> Tensor:
    if sample.label is None:
        raise BadSample(f"the dataset gives no label, and {asking} asks for it")
    return torch.tensor([sample.label])


def _check_ids(ids: Sequence[int]) -> None:
    if not ids or min(ids) < 0:
        raise UserError(f"target.ids is {list(ids)}: give class numbers from 0 on, e.g. target.ids=[281,285].")
