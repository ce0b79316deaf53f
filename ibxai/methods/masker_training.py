"""Training a Boolean masker: for a whole dataset by `ibxai train method=boolean_masker`, or for one network's answers.

`MaskerLearner` is the seam of `backbones/learner.py`: the loop, the splits, the resume and the curves are the training
job's. What it reports of the test split are the criteria by which the paper judges a masker without ground truth
(Zhmoginov et al., sec. 4), and mask averages where the dataset has regions (figs. 10 to 12):

    accuracy, accuracy_unmasked     (a) of the classifier on i.m, and of another one, trained on pictures as they are
    autoencoder_nats, _target       (b) the autoencoder's loss, which is to be near its target
    agreement                       (c) how often its prediction on i.m' is that on i.m, over drawn m and rectangles
    rho, rho_inside, rho_outside    mean of rho over the picture, inside and outside the region "target"
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from ibxai.backbones import Backbone
from ibxai.backbones.checkpoints import architecture
from ibxai.backbones.learner import Learnt
from ibxai.backbones.performance import ALL, Score
from ibxai.backbones.training import Examples, InMemory, examples_of, labelled_pictures, require_lightning, train
from ibxai.datasets.loading import load_batches
from ibxai.draws import sample_keys, uniform
from ibxai.methods.masker_model import MaskerModel
from ibxai.methods.masker_objective import boolean_mask, with_rectangles
from ibxai.preprocessing import Preprocessing
from ibxai.report.statistics import mean_intervals
from ibxai.targets import Label
from ibxai.types import Batch, Sample

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule

    from ibxai.methods.boolean_masker import BooleanMasker
    from ibxai.train import Splits, TrainPlan

DRAWS = 8  # of m and m' a picture, for the agreement
_TESTED = 64  # pictures at once
_PREFIX = "model."


def taught_by(method: BooleanMasker, backbone: Backbone, reference: Iterable[Batch], seed: int) -> dict[str, Tensor]:
    """The state of a masker trained on the reference pictures with the network's own answers as their classes."""
    require_lightning()
    from ibxai.backbones.loop import run_epochs
    from ibxai.methods.masker_loop import MaskerLearning

    inputs, answers = [], []
    for batch in reference:
        with torch.no_grad():
            inputs.append(batch.inputs.cpu())
            answers.append(backbone(batch.inputs.to(backbone.device)).argmax(1).cpu())
    model = new_model(method, backbone.preprocessing, backbone.outputs, seed, given(method, backbone))
    module = MaskerLearning(model, method.training, method.control, seed)
    run_epochs(module, InMemory(torch.cat(inputs), torch.cat(answers)), method.training, seed, device=backbone.device)
    return {name: tensor.cpu() for name, tensor in model.state_dict().items()}


def new_model(
    method: BooleanMasker,
    preprocessing: Preprocessing,
    classes: int,
    seed: int,
    network: Callable[[Tensor], Tensor] | None = None,
) -> MaskerModel:
    """With first weights drawn from this seed. network: the frozen one in the classifier's place."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return MaskerModel(method.networks, method.objective, preprocessing, classes, network)


def given(method: BooleanMasker, backbone: Backbone) -> Callable[[Tensor], Tensor] | None:
    return backbone if method.classifier == "backbone" else None


@dataclass(frozen=True)
class MaskerLearner:
    """A masker that learns a dataset's classes. backbone: the frozen network in the classifier's place, or None."""

    method: BooleanMasker
    preprocessing: Preprocessing
    backbone: Backbone | None
    plan: TrainPlan
    splits: Splits

    @property
    def name(self) -> str:
        return self.method.name

    def identity(self) -> Mapping[str, Any]:
        return {
            "architecture": architecture(self.method),
            "preprocessing": dataclasses.asdict(self.preprocessing),
            "network": self.backbone.digest if self.backbone is not None else None,
        }

    def model(self) -> MaskerModel:
        return new_model(self.method, self.preprocessing, len(self.plan.class_names), self.plan.seed, self.backbone)

    def module(self) -> LightningModule:
        from ibxai.methods.masker_loop import MaskerLearning

        return MaskerLearning(self.model(), self.plan.recipe, self.method.control, self.plan.seed)

    def examples(self, samples: Sequence[Sample]) -> Examples:
        plan = self.plan
        return examples_of(plan.dataset, samples, self.preprocessing, plan.answers, plan.workers)

    def finish(self, state: Mapping[str, Tensor]) -> Learnt:
        model = self.model()
        own = {name.removeprefix(_PREFIX): tensor for name, tensor in state.items() if name.startswith(_PREFIX)}
        model.load_state_dict(own)
        model.eval().requires_grad_(False)
        described = {"architecture": architecture(self.method), "learnt": {"input": self.preprocessing.input_shape}}
        return Learnt(own, described, self._criteria(model))

    def _criteria(self, model: MaskerModel) -> list[Score]:
        """Of the test split, with 95 % intervals over its groups."""
        plan = self.plan
        unmasked = self._unmasked()
        measured: dict[str, list[np.ndarray]] = {}
        groups: list[str] = []
        work = [(sample, (0,)) for sample in self.splits.test if sample.label is not None]
        for loaded in load_batches(plan.dataset, work, Label(), self.preprocessing, _TESTED, plan.workers):
            if loaded.batch is not None:
                labels = torch.tensor(loaded.labels)
                for name, values in criteria(model, unmasked, loaded.batch, labels, plan.seed).items():
                    measured.setdefault(name, []).append(values.double().numpy())
                groups += loaded.batch.group_ids
        columns = {name: np.concatenate(parts) for name, parts in measured.items()}
        columns = {name: values for name, values in columns.items() if np.isfinite(values).any()}  # regions or not
        low, high = mean_intervals(np.stack(list(columns.values()), 1), groups)
        scores = [
            Score(ALL, name, float(np.nanmean(values)), float(low[place]), float(high[place]))
            for place, (name, values) in enumerate(columns.items())
        ]
        target = self.method.control.target
        return [*scores, Score(ALL, "autoencoder_target", target, target, target)]

    def _unmasked(self) -> Callable[[Tensor], Tensor]:
        """What says the class of pictures as they are: the given network, or one like the classifier."""
        if self.backbone is not None:
            return self.backbone
        plan = self.plan
        pictures = labelled_pictures(plan.dataset, self.splits.train, self.preprocessing, _TESTED, plan.workers)
        return train(_Unmasked(self.model()), pictures, plan.recipe, plan.seed, plan.device)


class _Unmasked(nn.Module):
    """The classifier of a new model, behind a mask that lets everything through."""

    def __init__(self, model: MaskerModel) -> None:
        super().__init__()
        self.classifier = model.classifier
        self.model = [model]  # in a list: its other networks are not to be trained

    def forward(self, inputs: Tensor) -> Tensor:
        return self.model[0].unmasked(inputs)


def criteria(
    model: MaskerModel, unmasked: Callable[[Tensor], Tensor], batch: Batch, labels: Tensor, seed: int
) -> dict[str, Tensor]:
    """[B] each; NaN inside and outside a region where there is none. The draws belong to the samples."""
    inputs, chosen, labels = batch.inputs, model.objective, model.answers(batch.inputs, labels)
    keys = sample_keys(seed, batch.sample_ids, "criteria")
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # of the latent
        rho = model.logits(inputs)
        agreeing, correct, nats = torch.zeros(3, len(inputs)).unbind()
        for draw in range(DRAWS):
            mask = boolean_mask(rho, uniform(keys, 2 * draw, rho.shape[1:]))
            rectangle = uniform(keys, 2 * draw + 1, (max(chosen.rectangles, 1), 4))
            said = model.says(inputs, mask).argmax(1)
            with_more = model.says(inputs, with_rectangles(mask, rectangle, chosen.sides)).argmax(1)
            agreeing += (said == with_more) / DRAWS
            correct += (said == labels) / DRAWS
            nats += model.compressed(model.pixels(inputs), mask, labels, 0.0)[0] / DRAWS
        whole = (unmasked(inputs).argmax(1) == labels).float()
    found = {"accuracy": correct, "accuracy_unmasked": whole, "autoencoder_nats": nats, "agreement": agreeing}
    shares = rho.sigmoid()[:, 0]
    region = batch.regions.get("target")
    inside = region.any(1) if region is not None else torch.zeros_like(shares, dtype=torch.bool)
    annotated = inside.flatten(1).any(1)
    found["rho"] = shares.mean((1, 2))
    for name, plane in (("rho_inside", inside), ("rho_outside", ~inside & annotated[:, None, None])):
        found[name] = (shares * plane).sum((1, 2)) / plane.sum((1, 2))  # 0 / 0 is NaN
    return found
