"""What the parts hand to each other: samples, batches, targets, attributions, and the protocols they follow.

The way the data goes is in `pipeline.py`; these are the things that travel on it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol, get_args, runtime_checkable

import torch
from PIL import Image
from torch import Tensor

if TYPE_CHECKING:
    from ibxai.backbones import Backbone
    from ibxai.metrics.study import Task
    from ibxai.targets import Bound

Unit = Literal["bits", "score", "relevance", "mask"]
ScoreKind = Literal["probability", "logit", "value"]
SCORE_KINDS: tuple[str, ...] = get_args(ScoreKind)


@dataclass(frozen=True)
class Sample:
    """One line of a dataset's table: what is known before any pixel is read.

    sample_id: unique in its dataset, stable between machines (it names files and seeds random draws).
    group_id: patient, study or the sample itself; splits and bootstrap intervals resample groups.
    source: the file its pixels come from, and `size` the file's bytes (0 when it is not known).
    label: class index, or None where the dataset gives none.
    values: what a network with several labels or with real outputs is to say, one number an output in the order of
    the dataset's class names (0 or 1 for a label, a score for a regression); empty where the dataset gives none.
    decoding: the dataset's settings that change the pixels made from the file, such as a window; "" where none do.
    """

    sample_id: str
    group_id: str
    source: Path
    size: int
    label: int | None = None
    values: tuple[float, ...] = ()
    decoding: str = ""


@dataclass(frozen=True)
class Picture:
    """A decoded sample, before the network's preprocessing.

    regions: named planes [R, H, W] at the picture's own size, bool, or float where they have a degree ("severity"); a
    name is absent when nothing was annotated. "target@3" is "target" in the rows that explain output 3, and only there.
    """

    image: Image.Image
    regions: Mapping[str, Tensor] = field(default_factory=dict)


class Dataset(Protocol):
    """A dataset in its official on-disk layout. Implementations are frozen dataclasses; every field is in its YAML.

    `samples` and `reference` raise `UserError` when the layout is not there; `read` raises `BadSample`.
    `reference` is the split that feature statistics are estimated on; `reference_note` says what it is.
    A dataset with regions also has `annotations() -> str`, a digest of what they are made from: scores of metrics that
    read regions are named by it. One with a train and a test split has `in_split(name)`, and `facts()` where there is
    more to say in `ibxai data check` than what all datasets have.
    """

    @property
    def name(self) -> str: ...
    @property
    def class_names(self) -> Sequence[str] | None: ...
    @property
    def reference_note(self) -> str: ...
    def samples(self) -> Sequence[Sample]: ...
    def reference(self) -> Sequence[Sample]: ...
    def read(self, sample: Sample) -> Picture: ...


class Target(Protocol):
    """What is explained: one output a row, its score for a person and its loss for an optimiser."""

    def bind(self, out: Tensor) -> Target:
        """Fix "predicted" and the reference output, once, on the unmasked output [B, K] of the original network."""
        ...

    def score(self, out: Tensor, kind: ScoreKind) -> Tensor:
        """[B]: the explained output as a probability, a logit or a value."""
        ...

    def loss(self, out: Tensor) -> Tensor:
        """[B]: what a bottleneck minimises, in nats or squared error, one a row."""
        ...

    def removal_loss(self, out: Tensor, bound: Bound) -> Tensor:
        """[B]: what an inverse bottleneck minimises: small when the evidence is gone, bounded as `bound` says."""
        ...

    def prediction(self, out: Tensor) -> tuple[Tensor, Tensor]:
        """What the network says: an output's index [B] and its probability [B], NaN where outputs have none."""
        ...

    def take(self, rows: Tensor) -> Target: ...
    def to(self, device: torch.device) -> Target: ...
    def describe(self) -> Sequence[int]:
        """The explained output's index, one a row."""
        ...


@dataclass(frozen=True)
class Batch:
    """Rows that run together. A row is a (sample, target); its id in a run is "<sample>@<target>".

    inputs: pictures [B, C, H, W] after normalisation. group_ids: the sample ids when not given.
    regions: "target" bool [B, R, H, W] (one plane a box or lesion, padded with empty planes), "severity" float of the
    same form; a row whose planes are all empty is not annotated, nor are any where the name is absent.
    """

    inputs: Tensor
    target: Target
    sample_ids: tuple[str, ...]
    group_ids: tuple[str, ...] = ()
    regions: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.group_ids:
            object.__setattr__(self, "group_ids", self.sample_ids)
        if not len(self.inputs) == len(self.sample_ids) == len(self.group_ids):
            raise ValueError(
                f"{len(self.inputs)} inputs, {len(self.sample_ids)} sample ids, {len(self.group_ids)} group ids"
            )

    def __len__(self) -> int:
        return len(self.sample_ids)

    def take(self, rows: Sequence[int] | Tensor) -> Batch:
        """The rows at these positions, in this order; a position may come more than once. Targets go along."""
        index = torch.as_tensor(rows, dtype=torch.long, device=self.inputs.device)
        places = index.tolist()
        return Batch(
            inputs=self.inputs[index],
            target=self.target.take(index),
            sample_ids=tuple(self.sample_ids[i] for i in places),
            group_ids=tuple(self.group_ids[i] for i in places),
            regions={name: plane[index] for name, plane in self.regions.items()},
        )

    def bound(self, backbone: Backbone) -> Batch:
        """The same rows with the target bound to what the network says of the unmasked inputs."""
        with torch.no_grad():
            return replace(self, target=self.target.bind(backbone(self.inputs)))

    def to(self, device: torch.device | str) -> Batch:
        device = torch.device(device)
        return Batch(
            inputs=self.inputs.to(device),
            target=self.target.to(device),
            sample_ids=self.sample_ids,
            group_ids=self.group_ids,
            regions={name: plane.to(device) for name, plane in self.regions.items()},
        )


@dataclass(frozen=True)
class Attribution:
    """Heatmaps of a batch, raw: never cut to 8 bit, never scaled to 0..1. Higher = stronger evidence for the target.

    heatmap: float32 [B, H, W] at the input's size.
    unit: "bits" are bits a pixel (the sum over the picture is the capacity of the bottleneck).
    diagnostics: [B] each (final loss, capacity, network passes ...), or [B, steps] for a curve.
    """

    heatmap: Tensor
    unit: Unit
    diagnostics: Mapping[str, Tensor] = field(default_factory=dict)

    def take(self, rows: Sequence[int] | Tensor) -> Attribution:
        index = torch.as_tensor(rows, dtype=torch.long, device=self.heatmap.device)
        chosen = {name: value[index.to(value.device)] for name, value in self.diagnostics.items()}
        return Attribution(self.heatmap[index], self.unit, chosen)


Attributor = Callable[[Batch], Attribution]


@runtime_checkable
class Method(Protocol):
    """An attribution method: a frozen dataclass of hyper-parameters, every one in its YAML with its source.

    Two class attributes: `version` goes into the identity of a run (raise it when the heatmap of the same settings
    changes), `uses_reference` (True when absent) says whether the reference split matters. `fit` estimates whatever
    the method needs from the reference batches, in a bottleneck's case feature statistics, and returns the function
    that makes heatmaps.
    """

    def fit(
        self,
        backbone: Backbone,
        reference: Iterable[Batch],
        seed: int,
        state: Mapping[str, Tensor] | None = None,
    ) -> Attributor: ...


@runtime_checkable
class Metric(Protocol):
    """A judgement of finished heatmaps, one value a row. Implementations are frozen dataclasses with a `version`.

    Two more class attributes: `higher_is_better`, of the value named "auc" or "value", and `uses_regions` (False when
    absent): the scores depend on the dataset's annotations too. A map that holds NaN gets NaN, and so does a row that
    is not annotated where regions are read.

    Returns [B] tensors, each a value for the tables, and [B, S] tensors, curves for the report. A curve named
    "curve" has its abscissa under "fraction".
    """

    def __call__(self, backbone: Backbone, batch: Batch, attribution: Attribution) -> Mapping[str, Tensor]: ...


@dataclass(frozen=True)
class Score:
    """One number of a study. coordinates: the cell that it belongs to (fraction, layer, repeat ...), in a fixed order.

    row_id, group_id: the row that it is about and what intervals resample, both "" when it is about the whole cell.
    """

    metric: str
    value: float
    coordinates: Mapping[str, str | int | float]
    row_id: str = ""
    group_id: str = ""


@runtime_checkable
class Study(Protocol):
    """A judgement that fits the method again or trains the network again. A frozen dataclass with a `version`.

    Its work is cut into cells, each kept by `task.cells` when it is finished, so that a study that was stopped goes on
    behind its last cell.
    """

    def check(self, task: Task) -> None:
        """Raise UserError when the task lacks what the study needs. Asked before the first heatmap is computed."""
        ...

    def __call__(self, task: Task) -> Iterable[Score]: ...
