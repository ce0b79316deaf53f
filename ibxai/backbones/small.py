"""A small network for small pictures, trained here: CIFAR-10, MNIST and studies that retrain a network many times.

    3 x [conv 3x3, batch norm, ReLU, max pool 2], conv 3x3, batch norm, ReLU, global average, linear

With widths 16, 32 and 64: 61,000 weights, 63 % on CIFAR-10's test pictures from 4,500 training pictures in 20 seconds
of one core (`ibxai train dataset=cifar10`).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn

from ibxai.backbones.backbone import Backbone, freeze
from ibxai.backbones.training import Recipe
from ibxai.backbones.zoo import RANDOM_SEED, UNTRAINED, load_strictly, load_with_new_head, state_from_file
from ibxai.errors import UserError
from ibxai.preprocessing import Preprocessing

if TYPE_CHECKING:
    from ibxai.backbones.learner import Learner
    from ibxai.train import Splits, TrainPlan


TRAINING = Recipe(epochs=12, batch_size=64, learning_rate=0.005, weight_decay=0.1)


@dataclass(frozen=True)
class SmallCNN:
    """weights: a path (.pt, .pth, .safetensors), or "none", which needs `allow_random` except in a training.
    widths: channels of the stages. training: how `ibxai train` trains it. layers, preprocessing: as for any backbone.
    """

    name: str = "small_cnn"
    weights: str = "none"
    allow_random: bool = False
    classes: int = 10
    widths: tuple[int, ...] = (16, 32, 64)
    training: Recipe = TRAINING
    layers: dict[str, str] = field(default_factory=dict)
    preprocessing: Preprocessing = field(default_factory=lambda: Preprocessing(32, 32, (0.5,) * 3, (0.25,) * 3))

    architecture_settings: ClassVar[tuple[str, ...]] = ("widths",)

    def load(self, max_passes: int) -> Backbone:
        """The frozen network. Raises UserError when the weights or a layer are not there."""
        return self.frozen(self.network(), max_passes)

    def network(self) -> nn.Module:
        """The network with its weights, not frozen."""
        network = self.fresh(RANDOM_SEED)
        if self.weights == "none":
            if not self.allow_random:
                raise UserError(UNTRAINED)
        else:
            load_strictly(network, state_from_file(Path(self.weights).expanduser()), self.weights)
        return network

    def fresh(self, seed: int) -> nn.Module:
        """The network before training, its weights drawn from this seed."""
        if len(self.widths) < 1 or min(self.widths) < 1 or self.classes < 1:
            raise UserError(f"backbone.widths={list(self.widths)}, backbone.classes={self.classes}: give 1 or more.")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return _small_cnn(self.preprocessing.input_shape[0], self.widths, self.classes)

    def frozen(self, network: nn.Module, max_passes: int) -> Backbone:
        """A network of this architecture, whatever its weights, as a backbone with this name, layers and sizes."""
        return freeze(
            network,
            layers=self.layers,
            preprocessing=self.preprocessing,
            name=self.name,
            random_weights=self.weights == "none",
            max_passes=max_passes,
        )

    def with_learnt(self, weights: str, learnt: Mapping[str, Any]) -> SmallCNN:
        """This network with the weights, the outputs and the preprocessing of a checkpoint."""
        return replace(
            self, weights=weights, classes=learnt["classes"], preprocessing=Preprocessing.of(learnt["preprocessing"])
        )

    def learner(self, plan: TrainPlan, splits: Splits) -> Learner:
        """What `ibxai train` trains: this network from the first weights on, or on from those of a file."""
        from ibxai.backbones.learner import PictureLearner

        spec = replace(self, classes=len(plan.class_names))
        network = spec.fresh(plan.seed)
        if self.weights != "none":
            load_with_new_head(network, state_from_file(Path(self.weights).expanduser()), self.weights)
        return PictureLearner(spec, network, plan, splits)


def _small_cnn(channels: int, widths: tuple[int, ...], classes: int) -> nn.Module:
    parts: OrderedDict[str, nn.Module] = OrderedDict()
    for number, width in enumerate([*widths, widths[-1]], start=1):
        conv = nn.Conv2d(channels, width, 3, padding=1, bias=False)
        parts[f"stage{number}"] = nn.Sequential(OrderedDict(conv=conv, norm=nn.BatchNorm2d(width), relu=nn.ReLU()))
        if number <= len(widths):
            parts[f"pool{number}"] = nn.MaxPool2d(2)
        channels = width
    parts |= {"mean": nn.AdaptiveAvgPool2d(1), "flat": nn.Flatten(), "classifier": nn.Linear(channels, classes)}
    return nn.Sequential(parts)
