"""What `ibxai train` trains: the seam between the job (`ibxai/train.py`) and a network.

A backbone's `learner(plan, splits)` makes one. Networks of pictures share `PictureLearner`. What is read otherwise, or
learnt by other steps than outputs against answers, brings a learner of its own: the job asks for a LightningModule,
examples, what the result depends on, and what is to be kept, and knows nothing else of it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from ibxai.backbones.backbone import weights_digest
from ibxai.backbones.checkpoints import architecture
from ibxai.backbones.performance import Score, performance
from ibxai.backbones.training import Examples, InMemory, answered, examples_of, labelled_pictures, outputs_of
from ibxai.errors import UserError
from ibxai.types import Sample

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule

    from ibxai.train import Splits, TrainPlan

_LEAST_MOMENTUM = 0.1
_TESTED_AT_ONCE = 1024  # pictures of the test split that are decoded before the network sees them


@dataclass(frozen=True)
class Learnt:
    """state: what `backbone.weights=` loads. described: what is written down beside it. scores: of the test split."""

    state: Mapping[str, Tensor]
    described: Mapping[str, Any]
    scores: Sequence[Score]


class Learner(Protocol):
    """Something that can be trained.

    name: the folder under outputs/<dataset>/. It is asked for `identity`, `module`, `examples` (of the train and of the
    validation split), and with what the module has learnt for `finish`.
    """

    @property
    def name(self) -> str: ...
    def identity(self) -> Mapping[str, Any]:
        """All that changes what is learnt and that the plan does not say: the first weights, the preprocessing."""
        ...

    def module(self) -> LightningModule:
        """It logs "training_loss" and "validation_loss", and draws nothing that is not from (seed, epoch)."""
        ...

    def examples(self, samples: Sequence[Sample]) -> Examples: ...
    def finish(self, state: Mapping[str, Tensor]) -> Learnt:
        """state: of the module, at its lowest validation loss."""
        ...


@dataclass(frozen=True)
class PictureLearner:
    """A network of pictures that learns the dataset's answers.

    spec: the backbone with the outputs and the preprocessing that are trained. network: with the first weights.
    """

    spec: Any
    network: nn.Module
    plan: TrainPlan
    splits: Splits

    @property
    def name(self) -> str:
        return self.spec.name

    def identity(self) -> Mapping[str, Any]:
        return {
            "architecture": architecture(self.spec),
            "first weights": weights_digest(self.network),
            "preprocessing": dataclasses.asdict(self.spec.preprocessing),
        }

    def module(self) -> LightningModule:
        from ibxai.backbones.loop import Learning

        answers = answered(self.splits.train, self.plan.answers)[1]
        _quicken_norms(self.network)
        return Learning(self.network, self.plan.recipe, self.plan.minimised.make(answers), self.plan.seed)

    def examples(self, samples: Sequence[Sample]) -> Examples:
        plan = self.plan
        return examples_of(plan.dataset, samples, self.spec.preprocessing, self.plan.answers, plan.workers)

    def finish(self, state: Mapping[str, Tensor]) -> Learnt:
        prefix = "network."
        self.network.load_state_dict({name.removeprefix(prefix): tensor for name, tensor in state.items()})
        network = self.network.eval().requires_grad_(False)
        described = {
            "architecture": architecture(self.spec),
            "learnt": {
                "classes": self.spec.classes,
                "preprocessing": dataclasses.asdict(self.spec.preprocessing),
            },
        }
        scores = self._tested(network)
        return Learnt(network.cpu().state_dict(), described, scores)

    def _tested(self, network: nn.Module) -> list[Score]:
        """On the test split, some pictures after the others, since they need not fit in memory together."""
        plan, test, outputs, answers = self.plan, self.splits.test, [], []
        groups: list[str] = []
        for start in range(0, len(test), _TESTED_AT_ONCE):
            part = test[start : start + _TESTED_AT_ONCE]
            pictures = labelled_pictures(plan.dataset, part, self.spec.preprocessing, 64, plan.workers, plan.answers)
            outputs.append(outputs_of(network, pictures.inputs, plan.device))
            answers.append(pictures.answers)
            groups += pictures.group_ids
        said, right = torch.cat(outputs).numpy(), torch.cat(answers).numpy()
        return performance(said, right, groups, plan.class_names, plan.answers)


@dataclass(frozen=True)
class HeadLearner(PictureLearner):
    """The last layer alone learns, on what the first weights make of each picture: for a few hundred pictures, on which
    a whole network learns by heart. The pictures pass through the network once.

    Raises UserError for a network whose last linear layer does not give its outputs.
    """

    def identity(self) -> Mapping[str, Any]:
        return {**super().identity(), "learns": "the last layer"}

    def module(self) -> LightningModule:
        from ibxai.backbones.loop import Learning

        answers = answered(self.splits.train, self.plan.answers)[1]
        return Learning(self._head[1], self.plan.recipe, self.plan.minimised.make(answers), self.plan.seed)

    def examples(self, samples: Sequence[Sample]) -> Examples:
        plan, network, parts = self.plan, self.network.eval(), []
        for start in range(0, len(samples), _TESTED_AT_ONCE):
            part = samples[start : start + _TESTED_AT_ONCE]
            pictures = labelled_pictures(plan.dataset, part, self.spec.preprocessing, 64, plan.workers, plan.answers)
            parts.append((self._features(network, pictures.inputs), pictures.answers))
        features, answers = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        return InMemory(features, answers)

    def finish(self, state: Mapping[str, Tensor]) -> Learnt:
        name, _ = self._head
        learnt = {f"network.{name}.{entry.removeprefix('network.')}": tensor for entry, tensor in state.items()}
        return super().finish({f"network.{entry}": t for entry, t in self.network.state_dict().items()} | learnt)

    @property
    def _head(self) -> tuple[str, nn.Linear]:
        found = [(name, part) for name, part in self.network.named_modules() if isinstance(part, nn.Linear)]
        if not found:
            raise UserError(f"{self.name} has no linear layer: learns=head is not for it.")
        return found[-1]

    def _features(self, network: nn.Module, inputs: Tensor) -> Tensor:
        """[N, D]: what reaches the last layer. In the place of what it says, which may be 0, it says numbers that have
        to come out of the network.
        """
        seen: list[Tensor] = []
        marks: list[Tensor] = []
        name, head = self._head

        def mark(_: nn.Module, given: tuple[Tensor, ...], out: Tensor) -> Tensor:
            seen.append(given[0].cpu())
            marks.append(torch.linspace(1, 2, out.numel()).view(out.shape))
            return marks[-1].to(out.device)

        with head.register_forward_hook(mark):
            said = outputs_of(network, inputs, self.plan.device)
        features = torch.cat(seen)
        if features.dim() != 2 or not torch.equal(said, torch.cat(marks)):
            raise UserError(f"The last linear layer of {self.name}, {name}, does not give its outputs: use learns=all.")
        return features


def _quicken_norms(network: nn.Module) -> None:
    """Let running statistics follow within tens of steps, PyTorch's own pace.

    timm's EfficientNets move them by 1 % a step, made for ImageNet's hundred thousand steps: a fine-tuning of a few
    hundred pictures would be judged with the statistics of other pictures.
    """
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.momentum is not None:
            module.momentum = max(module.momentum, _LEAST_MOMENTUM)
