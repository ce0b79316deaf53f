"""What studies work on.

A study (ROAR, parameter and label randomisation) judges a method by fitting it, or the network, again. It gets a
`Task`, a finished run and the means to repeat what led to it, and cuts its work into cells (`ibxai/cells.py`), so that
the same command goes on behind the last finished one.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from ibxai.backbones import Backbone
from ibxai.backbones.training import InMemory, labelled_pictures
from ibxai.cells import Cells
from ibxai.datasets.loading import load_batches, reference_batches
from ibxai.draws import sample_keys
from ibxai.errors import UserError
from ibxai.memory import with_backoff
from ibxai.store import DamagedFile, RunStore
from ibxai.targets import TargetSpec
from ibxai.types import Attributor, Batch, Dataset, Method, Sample, Study

log = logging.getLogger(__name__)


class Rebuildable(Protocol):
    """A backbone by name of which networks with other weights can be made."""

    @property
    def name(self) -> str: ...
    def network(self) -> nn.Module:
        """The network with its weights, not frozen."""
        ...

    def fresh(self, seed: int) -> nn.Module:
        """The network before training, its weights drawn from this seed."""
        ...

    def frozen(self, network: nn.Module, max_passes: int) -> Backbone:
        """A network of this architecture as a backbone."""
        ...


@dataclass(frozen=True)
class Explained:
    """Rows of the run: their batch, the targets bound to what the original network says, with their heatmaps.

    heatmaps: [B, H, W], raw, as the run has stored them.
    """

    batch: Batch
    row_ids: tuple[str, ...]
    heatmaps: Tensor


@dataclass(frozen=True)
class Task:
    """A finished run, and the means to repeat what led to it.

    samples: the explained ones. backbone: the run's network; spec: what it was made from. cells: where the study keeps
    its work. cache: the folder of feature statistics that belong to the run's network, None for none.
    """

    dataset: Dataset
    samples: Sequence[Sample]
    target: TargetSpec
    spec: Rebuildable
    backbone: Backbone
    method: Method
    method_name: str
    run: RunStore
    cells: Cells
    seed: int
    batch_size: int
    workers: int = 0
    cache: Path | None = None

    @property
    def device(self) -> torch.device:
        return self.backbone.device

    def rebuildable(self) -> Rebuildable:
        """`spec`. Raises UserError when no network with other weights can be made of it."""
        if not all(hasattr(self.spec, name) for name in ("network", "fresh", "frozen")):
            raise UserError(
                f"study={self.cells.key.name} needs networks with other weights, and {self.spec.name} has only its own."
            )
        return self.spec

    def explained(self) -> Iterator[Explained]:
        """The run's rows, batch by batch. Rows whose sample cannot be read are left out, as they were in the run."""
        names = tuple(range(len(self.target.names())))
        work = [(sample, names) for sample in self.samples]
        preprocessing = self.backbone.preprocessing
        for loaded in load_batches(self.dataset, work, self.target, preprocessing, self.batch_size, self.workers):
            if loaded.batch is None:
                continue
            batch = loaded.batch.to(self.device)
            batch = with_backoff(partial(batch.bound, self.backbone), self.backbone, "target", batch.inputs.shape[1:])
            yield Explained(batch, loaded.row_ids, self._stored(loaded.row_ids))

    def _stored(self, row_ids: Sequence[str]) -> Tensor:
        try:
            found = [self.run.read_heatmap(row_id).heatmap for row_id in row_ids]
        except DamagedFile as error:
            raise UserError(f"{error}: the same command makes it again.") from error
        return torch.from_numpy(np.stack(found)).to(self.device)

    def attributor(self) -> Attributor:
        """The method, fitted as it was for the run."""
        return self.fitted(self.backbone, self.seed, self.cache)

    def fitted(self, backbone: Backbone, seed: int, cache: Path | None = None) -> Attributor:
        """The method, fitted on any network: all that it estimates is estimated on this one."""
        reference = reference_batches(self.dataset, backbone.preprocessing, self.batch_size, self.workers, cache)
        return with_backoff(lambda: self.method.fit(backbone, reference, seed), backbone, "fit")

    def train_split(self, size: int | None) -> Sequence[Sample]:
        """The first `size` pictures that a network may be trained on. Raises UserError when there are none apart."""
        if not hasattr(self.dataset, "in_split"):
            raise UserError(
                f"study={self.cells.key.name} trains networks, and {self.dataset.name} has no train split.\n"
                "Datasets with one: cifar10, mnist, fashion_mnist."
            )
        samples: Sequence[Sample] = self.dataset.in_split("train")[:size]
        if {sample.sample_id for sample in samples} & {sample.sample_id for sample in self.samples}:
            study = self.cells.key.name
            raise UserError(f"study={study} tests on pictures that no network has seen: choose dataset.split=test.")
        return samples

    def pictures(self, samples: Sequence[Sample]) -> InMemory:
        """These samples with their labels, as the network takes them, in memory."""
        return labelled_pictures(self.dataset, samples, self.backbone.preprocessing, self.batch_size, self.workers)


def run_study(study: Study, task: Task) -> int:
    """Do what is left of a study; returns the number of cells that were computed."""
    log.info("study %s: %s", task.cells.key.name, task.cells.folder)
    for _ in study(task):
        pass
    task.cells.finish()
    return task.cells.made


def derived_seed(seed: int, purpose: str, number: int = 0) -> int:
    """A seed in 0 .. 2^31 - 1 of its own for a purpose, such as the first weights of the third repeat."""
    return int(sample_keys(seed, [str(number)], purpose)) & (2**31 - 1)


def accuracy_of(out: Tensor, labels: Tensor) -> Tensor:
    """float [N]: 1 where the highest output is the label, 0 elsewhere."""
    return (out.argmax(1) == labels).float()
