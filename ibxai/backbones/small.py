"""A small network for small pictures, trained here: CIFAR-10, MNIST and studies that retrain a network many times.

    3 x [conv 3x3, batch norm, ReLU, max pool 2], conv 3x3, batch norm, ReLU, global average, linear

With widths 16, 32 and 64: 61,000 weights, 63 % on CIFAR-10's test pictures from 5,000 training pictures in half a
minute on one core. `weights=train` trains it on the dataset's train split before the run, and keeps the weights.
"""

from __future__ import annotations

import dataclasses
import logging
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path

import safetensors.torch
import torch
from torch import nn

from ibxai.backbones.backbone import Backbone, freeze
from ibxai.backbones.training import Recipe, labelled_pictures, train
from ibxai.backbones.zoo import UNTRAINED, load_strictly, state_from_file
from ibxai.datasets.loading import sample_table_digest
from ibxai.errors import UserError
from ibxai.preprocessing import Preprocessing
from ibxai.store import digest, write_atomically
from ibxai.types import Dataset

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SmallCNN:
    """weights: "train" (on the dataset's train split), a path (.pt, .pth, .safetensors), or "none", which needs
    `allow_random`. widths: channels of the stages. seed: of the first weights and of the training; the run's own seed
    is about heatmaps. training: how it is trained. layers, preprocessing: as for any backbone.
    """

    name: str = "small_cnn"
    weights: str = "train"
    allow_random: bool = False
    classes: int = 10
    widths: tuple[int, ...] = (16, 32, 64)
    seed: int = 0
    training: Recipe = field(default_factory=Recipe)
    layers: dict[str, str] = field(default_factory=dict)
    preprocessing: Preprocessing = field(default_factory=lambda: Preprocessing(32, 32, (0.5,) * 3, (0.25,) * 3))

    def load(self, max_passes: int) -> Backbone:
        """The frozen network. Raises UserError when the weights or a layer are not there."""
        return self.frozen(self.network(), max_passes)

    def network(self) -> nn.Module:
        """The network with its weights, not frozen."""
        network = self.fresh(self.seed)
        if self.weights == "train":
            raise RuntimeError("the network has not been trained: call spec.trained(dataset, ...) first")
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

    def trained(self, dataset: Dataset, folder: Path, device: str, workers: int) -> SmallCNN:
        """This network with its weights in a file of `folder`: trained now, unless they are there. Same settings and
        pictures, same file. Raises UserError when the dataset has no train split, or more classes.
        """
        if self.weights != "train":
            return self
        if not hasattr(dataset, "in_split"):
            raise UserError(
                f"backbone.weights=train: {dataset.name} has no train split. Give backbone.weights=/path/to/file."
            )
        if len(dataset.class_names or ()) > self.classes:
            raise UserError(f"{dataset.name} has {len(dataset.class_names or ())} classes: give backbone.classes.")
        samples = dataset.in_split("train")
        deciding = ("classes", "widths", "seed", "training", "preprocessing")
        key = {"pictures": sample_table_digest(samples), **{name: str(getattr(self, name)) for name in deciding}}
        path = folder / f"weights-{digest(key)}.safetensors"
        if not path.exists():
            log.info("training %s on %d pictures, %d epochs", self.name, len(samples), self.training.epochs)
            pictures = labelled_pictures(dataset, samples, self.preprocessing, self.training.batch_size, workers)
            network = train(self.fresh(self.seed), pictures, self.training, self.seed, device)
            state = {name: tensor.contiguous() for name, tensor in network.state_dict().items()}
            write_atomically(path, safetensors.torch.save(state))
        return dataclasses.replace(self, weights=str(path))


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
