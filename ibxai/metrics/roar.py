"""ROAR: pixels that a method calls important are taken out of all pictures, and the network is trained again.

    score(t) = accuracy on the test split of a network trained from scratch on pictures without their top t pixels

Reference: Hooker, Erhan, Kindermans and Kim, "A benchmark for interpretability methods in deep neural networks",
NeurIPS 2019; the keep variant (KAR) leaves only the top t. Removed pixels become the train split's mean colour in the
train and the test split alike, so a fall of the accuracy is lost information, not an unfamiliar kind of picture.

Every fraction is also done with a random map, the control that the paper asks for: a method that is no better than it
has not found what matters. The heatmaps are those of the run's method and network, for the run's target; with
target=label the masks of the test pictures have seen their labels. The last weights of a training are kept, so no
validation split is needed. Pixels of one value are ordered at random, and those that are NaN come last. Both splits are
held in memory as float32: 0.6 GB for 50,000 pictures of CIFAR-10, and twice that while a network is trained.

How to read it: the shape of what is missing can tell the class by itself (Rong et al., "A consistent and efficient
evaluation strategy for attribution methods", ICML 2022), and smooth maps do better than sharp ones of the same
information (Song, Cha and Seo, "On pitfalls of RemOve-And-Retrain", arXiv:2304.13836).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from ibxai.backbones.training import InMemory, Recipe, outputs_of, require_lightning, train
from ibxai.cells import Cell, Coordinates
from ibxai.datasets.loading import load_batches, sample_table_digest
from ibxai.draws import sample_keys, uniform
from ibxai.errors import UserError
from ibxai.memory import with_backoff
from ibxai.metrics.insertion import pixel_ranks
from ibxai.metrics.normalisation import Sign, check_sign, with_sign
from ibxai.metrics.study import Rebuildable, Task, accuracy_of, derived_seed
from ibxai.types import Attributor, Batch, Sample, Score

CONTROL = "random_control"
UNTOUCHED = "untouched"
_PIECE = 256  # pictures of the train split whose heatmaps share a file


@dataclass(frozen=True)
class ROAR:
    """fractions: shares of the pixels that are taken out, or with `keep` the shares that stay; where that is nothing
    or all, 0 or 1, the pictures are whole and every map is the same. repeats: trainings of each. training: how.
    train_size: the first so many pictures of the train split, None for all. sign: of the maps, see `normalisation.py`.
    """

    fractions: tuple[float, ...] = (0.0, 0.1, 0.3, 0.5, 0.7, 0.9)
    keep: bool = False
    repeats: int = 3
    training: Recipe = field(default_factory=lambda: Recipe(epochs=30))
    train_size: int | None = None
    sign: Sign = "none"

    version: ClassVar[int] = 1

    def __post_init__(self) -> None:
        check_sign(self.sign)
        if not self.fractions or not all(0 <= fraction <= 1 for fraction in self.fractions):
            raise UserError(f"study.fractions is {list(self.fractions)}: shares of the pixels, 0 to 1, are expected.")
        if self.repeats < 1:
            raise UserError(f"study.repeats is {self.repeats}: at least 1 is expected.")

    def check(self, task: Task) -> None:
        """Raises UserError without a train split or Lightning, and when a picture has several targets."""
        task.rebuildable()
        task.train_split(self.train_size)
        if len(task.target.names()) > 1:
            raise UserError(f"study={task.cells.key.name} needs one heatmap a picture: choose one target.")
        require_lightning()

    def __call__(self, task: Task) -> Iterator[Score]:
        """accuracy of every test picture (1 right, 0 wrong) and train_accuracy, by fraction, estimator and repeat."""
        spec = task.rebuildable()
        data = _Data(task, task.train_split(self.train_size), self.sign)
        for fraction in self.fractions:
            whole = fraction == (1 if self.keep else 0)
            for estimator in (UNTOUCHED,) if whole else (task.method_name, CONTROL):
                for repeat in range(self.repeats):
                    place: Coordinates = {"fraction": fraction, "estimator": estimator, "repeat": repeat}
                    taken = partial(data.without, fraction, estimator, self.keep)
                    work = partial(_retrained, task, spec, self.training, repeat, taken, place)
                    yield from task.cells.get(place, work).scores()


def _retrained(
    task: Task,
    spec: Rebuildable,
    training: Recipe,
    repeat: int,
    splits: Callable[[], tuple[InMemory, InMemory]],
    place: Coordinates,
) -> Cell:
    """How well a new network does on the test split when it has only seen such pictures as are in `splits`."""
    seen, test = splits()
    seed = derived_seed(task.seed, "roar", repeat)
    network = train(spec.fresh(seed), seen, training, seed, task.device)
    right_train, right = (
        accuracy_of(outputs_of(network, part.inputs, task.device), part.answers) for part in (seen, test)
    )
    totals = {"train_accuracy": float(right_train.mean())}
    return Cell(place, test.sample_ids, test.group_ids, {"accuracy": right.tolist()}, totals)


@dataclass(frozen=True)
class _Data:
    """Both splits in memory, and in which order their pixels go; nothing is read before a cell asks for it."""

    task: Task
    samples: Sequence[Sample]
    sign: Sign

    @cached_property
    def train(self) -> InMemory:
        return self.task.pictures(self.samples)

    @cached_property
    def test(self) -> InMemory:
        return self.task.pictures([s for s in self.task.samples if s.label is not None])

    @cached_property
    def mean(self) -> Tensor:
        """[C, 1, 1]: the mean colour of the train split, in normalised units."""
        return self.train.inputs.mean((0, 2, 3))[:, None, None]

    def without(self, fraction: float, estimator: str, keep: bool) -> tuple[InMemory, InMemory]:
        """The train and the test split with the pixels taken out that an estimator's maps name."""
        train, test = self.train, self.test
        method = estimator not in (CONTROL, UNTOUCHED)
        train_ranks, test_ranks = self._method_ranks if method else (self._control(train), self._control(test))
        return (
            replace(train, inputs=without(train.inputs, train_ranks, fraction, keep, self.mean)),
            replace(test, inputs=without(test.inputs, test_ranks, fraction, keep, self.mean)),
        )

    @cached_property
    def _method_ranks(self) -> tuple[Tensor, Tensor]:
        """Of the train and the test split, int32 [N, H, W]: 0 for the most important pixel."""
        stored = {
            row_id.rpartition("@")[0]: heatmap
            for explained in self.task.explained()
            for row_id, heatmap in zip(explained.row_ids, explained.heatmaps.cpu(), strict=True)
        }
        test = torch.stack([stored[sample_id] for sample_id in self.test.sample_ids])
        return (
            _ranks(with_sign(self._train_heatmaps(), self.sign), self.train.sample_ids),
            _ranks(with_sign(test, self.sign), self.test.sample_ids),
        )

    def _train_heatmaps(self) -> Tensor:
        """[N, H, W], made once and kept in the study's folder, some hundred to a file."""
        task, known = self.task, {sample.sample_id: sample for sample in self.samples}
        samples = [known[sample_id] for sample_id in self.train.sample_ids]
        attributors: list[Attributor] = []  # fitted when the first file is missing

        def made(piece: Sequence[Sample]) -> np.ndarray:
            if not attributors:
                attributors.append(task.attributor())
            work, preprocessing = [(sample, (0,)) for sample in piece], task.backbone.preprocessing
            loaded = load_batches(task.dataset, work, task.target, preprocessing, task.batch_size, task.workers)
            batches = [part.batch for part in loaded if part.batch is not None]
            heatmaps = [
                with_backoff(partial(heatmap, batch), task.backbone, "method", batch.inputs.shape[1:])
                for batch in batches
            ]
            return torch.cat(heatmaps).numpy()

        def heatmap(batch: Batch) -> Tensor:
            return attributors[0](batch.to(task.device).bound(task.backbone)).heatmap.cpu()

        pieces = [samples[start : start + _PIECE] for start in range(0, len(samples), _PIECE)]
        names = [f"heatmaps-{sample_table_digest(piece)[:12]}" for piece in pieces]
        found = [task.cells.kept(name, partial(made, piece)) for name, piece in zip(names, pieces, strict=True)]
        return torch.from_numpy(np.concatenate(found))

    def _control(self, part: InMemory) -> Tensor:
        """Ranks of a random map, whose draws are not those of the method `random`."""
        keys = sample_keys(self.task.seed, part.sample_ids, "roar control")
        size = part.inputs.shape[-2:]
        maps = torch.cat([uniform(some, 0, size) for some in keys.split(_PIECE)])
        return _ranks(maps, part.sample_ids)


def _ranks(heatmaps: Tensor, sample_ids: Sequence[str]) -> Tensor:
    """int32 [N, H, W], picture by picture in pieces, since sorting needs several times its memory."""
    places = range(0, len(heatmaps), _PIECE)
    pieces = [
        pixel_ranks(heatmaps[i : i + _PIECE].nan_to_num(nan=-torch.inf), tuple(sample_ids[i : i + _PIECE])).int()
        for i in places
    ]
    return torch.cat(pieces).view(heatmaps.shape)


def without(inputs: Tensor, ranks: Tensor, fraction: float, keep: bool, mean: Tensor) -> Tensor:
    """[N, C, H, W]: inputs whose first `fraction` of the pixels by rank (with `keep`: all the others) became `mean`.

    ranks: int [N, H, W], 0 for the most important. mean: [C, 1, 1]. The number of pixels is rounded to the nearest.
    """
    first = ranks < round(fraction * ranks[0].numel())
    return torch.where((~first if keep else first)[:, None], mean, inputs)
