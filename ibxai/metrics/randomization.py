"""Sanity checks: does a heatmap change when the network, or what it was taught, is destroyed?

Parameter randomisation (Adebayo et al., "Sanity checks for saliency maps", NeurIPS 2018, sec. 3.1; CheXplain and
InputIBA use it too): layers get the weights of a network that was never trained, from the last one on (cascading), or
one group alone (independent), and the maps of the same targets are compared with the original ones. Label
randomisation (sec. 3.2): the network is trained on labels that have nothing to do with the pictures.

What is done here and often is not: a layer is randomised in all its state, batch norms' weights and running statistics
included (they become those of the untrained network, the latter 0 and 1); that happens before the network is frozen,
and the method is fitted again on the result, so feature statistics are the randomised network's own. The original
network's decision stays the target. Maps of a method that draws random numbers differ from fit to fit: the changed
networks are therefore explained with another seed, and a cell in which nothing is changed but that seed (cascading's
step 0, "nothing") says how much of the difference is the method's own noise.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from ibxai.backbones import Backbone
from ibxai.backbones.training import InMemory, Recipe, outputs_of, require_lightning, train
from ibxai.cells import Cell, Coordinates
from ibxai.draws import sample_keys, tie_breakers
from ibxai.errors import UserError
from ibxai.memory import with_backoff
from ibxai.metrics.normalisation import Sign, check_sign
from ibxai.metrics.similarity import check_window, similarities
from ibxai.metrics.study import Task, accuracy_of, derived_seed
from ibxai.types import Score

log = logging.getLogger(__name__)

Order = Literal["cascading", "independent"]
NOTHING = "nothing"
_LEARNT = 0.95  # share of random labels that a network has to know by heart; Adebayo et al., sec. 3.2


@dataclass(frozen=True)
class ParameterRandomization:
    """orders: "cascading" and "independent". cells: about how many groups the layers are put in: the depth in the tree
    of modules is taken whose number of groups comes closest. sign: of the maps, see `normalisation.py`. window: side of
    SSIM's windows, in pixels.
    """

    orders: tuple[Order, ...] = ("cascading", "independent")
    cells: int = 10
    sign: Sign = "abs"
    window: int = 7

    version: ClassVar[int] = 1

    def __post_init__(self) -> None:
        check_sign(self.sign)
        if self.cells < 1:
            raise UserError(f"study.cells is {self.cells}: at least 1 is expected.")

    def check(self, task: Task) -> None:
        """Raises UserError when no other weights can be put into the network, or windows are larger than maps."""
        task.rebuildable()
        check_window(self.window, task.backbone.preprocessing.crop)

    def __call__(self, task: Task) -> Iterator[Score]:
        """ssim, spearman and pearson to the original map, of every row in every cell."""
        spec, seed = task.rebuildable(), derived_seed(task.seed, "parameter randomization")
        trained, untrained = spec.network(), spec.fresh(seed)
        example = torch.zeros(1, *task.backbone.preprocessing.input_shape)
        groups = layer_groups(trained, example, self.cells)

        def cell(coordinates: Coordinates, randomised: Sequence[str]) -> Cell:
            network = with_state_of(trained, untrained, [e for name in randomised for e in groups[name]])
            backbone = spec.frozen(network, task.backbone.max_passes).to(task.device)
            return compared(task, backbone, seed, coordinates, self.sign, self.window)

        for coordinates, randomised in self._plan(list(groups)):
            yield from task.cells.get(coordinates, partial(cell, coordinates, randomised)).scores()

    def _plan(self, names: Sequence[str]) -> Iterator[tuple[Coordinates, Sequence[str]]]:
        """Coordinates of every cell with the groups that are randomised in it, the last layer first."""
        for order in self.orders:
            if order == "cascading":
                yield {"order": order, "step": 0, "layer": NOTHING}, []
            for step, name in enumerate(reversed(names), start=1):
                chosen = names[len(names) - step :] if order == "cascading" else [name]
                yield {"order": order, "step": step, "layer": name}, chosen


@dataclass(frozen=True)
class LabelRandomization:
    """train_size: the first so many pictures of the train split, None for all. training: of both networks, which have
    to know random labels by heart. sign, window: as for `ParameterRandomization`.
    """

    train_size: int | None = None
    training: Recipe = field(default_factory=Recipe)
    sign: Sign = "abs"
    window: int = 7

    version: ClassVar[int] = 1

    def __post_init__(self) -> None:
        check_sign(self.sign)

    def check(self, task: Task) -> None:
        """Raises UserError when the dataset has no train split, Lightning is missing, or windows exceed the maps."""
        task.rebuildable()
        task.train_split(self.train_size)
        check_window(self.window, task.backbone.preprocessing.crop)
        require_lightning()

    def __call__(self, task: Task) -> Iterator[Score]:
        """ssim, spearman and pearson to the original map, of every row; train_accuracy and test_accuracy of the cell.

        "true": another network, taught the true labels, what two trainings differ by; "random": taught a permutation
        of them, from the same first weights.
        """
        spec, seed = task.rebuildable(), derived_seed(task.seed, "label randomization")
        samples = task.train_split(self.train_size)
        splits: list[InMemory] = []  # read by the first cell that is not finished

        def cell(labels: str) -> Cell:
            if not splits:
                splits.extend([task.pictures(samples), task.pictures(task.samples)])
            pictures, test = splits
            if labels == "random":
                order = tie_breakers(sample_keys(seed, ["labels"], "permutation"), len(pictures))[0]
                pictures = replace(pictures, answers=pictures.answers[order])
            network = train(spec.fresh(seed), pictures, self.training, seed, task.device)
            totals = {"train_accuracy": _right(network, pictures, task), "test_accuracy": _right(network, test, task)}
            if totals["train_accuracy"] < _LEARNT:
                known = 100 * totals["train_accuracy"]
                log.warning("%.0f %% of the %s labels are known by heart: train for longer", known, labels)
            backbone = spec.frozen(network, task.backbone.max_passes).to(task.device)
            found = compared(task, backbone, seed, {"labels": labels}, self.sign, self.window)
            return replace(found, totals=totals)

        for labels in ("true", "random"):
            yield from task.cells.get({"labels": labels}, partial(cell, labels)).scores()


def _right(network: nn.Module, pictures: InMemory, task: Task) -> float:
    return float(accuracy_of(outputs_of(network, pictures.inputs, task.device), pictures.answers).mean())


def compared(task: Task, backbone: Backbone, seed: int, coordinates: Coordinates, sign: Sign, window: int) -> Cell:
    """The method's maps of another network against the run's own: the same rows, the same targets."""
    backbone.rows_that_fit = task.backbone.rows_that_fit  # the same network with other weights
    attribute = task.fitted(backbone, seed)
    row_ids: list[str] = []
    group_ids: list[str] = []
    columns: dict[str, list[Tensor]] = {}
    for explained in task.explained():
        batch = explained.batch
        found = with_backoff(partial(attribute, batch), backbone, "method", batch.inputs.shape[1:]).heatmap
        for name, of_batch in similarities(explained.heatmaps, found, sign, window).items():
            columns.setdefault(name, []).append(of_batch)
        row_ids += explained.row_ids
        group_ids += batch.group_ids
    values = {name: torch.cat(parts).tolist() for name, parts in columns.items()}
    return Cell(coordinates, tuple(row_ids), tuple(group_ids), values)


def with_state_of(network: nn.Module, other: nn.Module, entries: Iterable[str]) -> nn.Module:
    """A copy of the network with these entries of the state dict taken from another one of the same architecture."""
    changed = copy.deepcopy(network)
    changed.load_state_dict({**changed.state_dict(), **{name: other.state_dict()[name] for name in entries}})
    return changed


def layer_groups(network: nn.Module, example: Tensor, cells: int) -> Mapping[str, Sequence[str]]:
    """Group -> its entries of the state dict, the groups in order of execution, about `cells` of them.

    A group is all that is below one node of the module tree, at the depth where their number is nearest (as a ratio) to
    `cells`. Normalisation layers join the layer that they follow. example: [1, C, H, W].
    """
    called = _order_of_execution(network, example)
    owners = {entry: _called_owner(entry, called) for entry in network.state_dict()}
    deepest = max(len(owner.split(".")) for owner in owners.values())
    choices = [_grouped(network, owners, called, depth) for depth in range(1, deepest + 1)]
    return min(choices, key=lambda groups: abs(math.log(len(groups) / cells)))


def _order_of_execution(network: nn.Module, example: Tensor) -> dict[str, int]:
    """Module path -> its place among the first calls; those that are never called are left out. "" is the network."""
    called: dict[str, int] = {}
    network = copy.deepcopy(network).eval()

    def noting(path: str) -> Callable[..., None]:
        def hook(*_: object) -> None:
            called.setdefault(path, len(called))

        return hook

    for path, module in network.named_modules():
        module.register_forward_pre_hook(noting(path))
    with torch.no_grad():
        network(example)
    return called


def _called_owner(entry: str, called: Mapping[str, int]) -> str:
    """The module that a parameter belongs to, or the nearest one above it that is called by itself."""
    path = entry.rpartition(".")[0]
    while path not in called:
        path = path.rpartition(".")[0]
    return path


def _grouped(
    network: nn.Module, owners: Mapping[str, str], called: Mapping[str, int], depth: int
) -> dict[str, list[str]]:
    """The groups at one depth of the module tree."""
    members: dict[str, list[str]] = {}
    for entry in sorted(owners, key=lambda entry: called[owners[entry]]):
        members.setdefault(".".join(owners[entry].split(".")[:depth]), []).append(entry)
    groups: dict[str, list[str]] = {}
    for name, entries in members.items():
        norms_alone = all(_is_norm(network.get_submodule(owners[entry])) for entry in entries)
        if norms_alone and groups:
            groups[next(reversed(groups))] += entries
        else:
            groups[name or "network"] = list(entries)
    return groups


def _is_norm(module: nn.Module) -> bool:
    return "Norm" in type(module).__name__
