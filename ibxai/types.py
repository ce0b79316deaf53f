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


@dataclass(frozen=True)
class Text:
    """A decoded sample of a dataset of texts, as it stands in its file: places in it count its characters."""

    text: str


class Dataset(Protocol):
    """A dataset in its official on-disk layout. Implementations are frozen dataclasses; every field is in its YAML.

    `samples` and `reference` raise `UserError` when the layout is not there; `read` raises `BadSample`.
    `reference` is the split that feature statistics are estimated on; `reference_note` says what it is.
    A dataset with regions also has `annotations() -> str`, a digest of what they are made from: scores of metrics that
    read regions are named by it. One with a train and a test split has `in_split(name)`, one
    whose groups have a grade of severity `grades()`, group -> grade, 0 for healthy; and `facts()` where there is
    more to say in `ibxai data check` than what all datasets have. One of texts says so: `modality` is "text".
    """

    @property
    def name(self) -> str: ...
    @property
    def class_names(self) -> Sequence[str] | None: ...
    @property
    def reference_note(self) -> str: ...
    def samples(self) -> Sequence[Sample]: ...
    def reference(self) -> Sequence[Sample]: ...
    def read(self, sample: Sample) -> Picture | Text: ...


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

    inputs: pictures [B, C, H, W] after normalisation, or the embeddings [B, T, D] of texts. group_ids: the sample ids
    when not given.
    regions: "target" bool [B, R, H, W] (one plane a box or lesion, padded with empty planes), "severity" float of the
    same form; a row whose planes are all empty is not annotated, nor are any where the name is absent.
    tokens, valid: of texts alone, long and bool [B, T]. Texts of different lengths are padded at their end, where
    `valid` is False: padding never gets attribution, and how much there is changes nothing.
    """

    inputs: Tensor
    target: Target
    sample_ids: tuple[str, ...]
    group_ids: tuple[str, ...] = ()
    regions: Mapping[str, Tensor] = field(default_factory=dict)
    tokens: Tensor | None = None
    valid: Tensor | None = None

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
            tokens=None if self.tokens is None else self.tokens[index],
            valid=self.valid_of(index),
        )

    def valid_of(self, rows: Tensor) -> Tensor | None:
        """bool [N, T] of the texts at these positions; None of pictures."""
        return None if self.valid is None else self.valid[rows]

    @property
    def places(self) -> torch.Size:
        """The size of one map: (H, W) of pictures, (T,) of texts."""
        return self.inputs.shape[-2:] if self.valid is None else self.inputs.shape[1:2]

    @property
    def channels(self) -> int:
        """The dimension of the inputs that a map has not: a picture's colours, a text's embedding."""
        return 1 if self.valid is None else 2

    def over_inputs(self, values: Tensor) -> Tensor:
        """Values [N, P], one a place, in the shape that broadcasts over inputs: [N, 1, H, W] or [N, T, 1]."""
        return values.view(-1, *self.places).unsqueeze(self.channels)

    def scores(self, network: Callable[..., Tensor], inputs: Tensor, rows: Tensor, kind: ScoreKind) -> Tensor:
        """[N]: the score of the rows at these positions when the network sees `inputs` [N, ...] in their place."""
        out = network(inputs) if self.valid is None else network(inputs, self.valid[rows])
        return self.target.take(rows).score(out, kind)

    def bound(self, backbone: Backbone) -> Batch:
        """The same rows with the target bound to what the network says of the unmasked inputs."""
        with torch.no_grad():
            return replace(self, target=self.target.bind(backbone(self.inputs, self.valid)))

    def to(self, device: torch.device | str) -> Batch:
        device = torch.device(device)
        return Batch(
            inputs=self.inputs.to(device),
            target=self.target.to(device),
            sample_ids=self.sample_ids,
            group_ids=self.group_ids,
            regions={name: plane.to(device) for name, plane in self.regions.items()},
            tokens=None if self.tokens is None else self.tokens.to(device),
            valid=None if self.valid is None else self.valid.to(device),
        )


@dataclass(frozen=True)
class Attribution:
    """Heatmaps of a batch, raw: never cut to 8 bit, never scaled to 0..1. Higher = stronger evidence for the target.

    heatmap: float32 [B, H, W] at the input's size, or [B, T] of texts, 0 in the padding.
    unit: "bits" are bits a pixel or token (the sum over the sample is the capacity of the bottleneck).
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
    changes), `uses_reference` (True when absent) says whether the reference split matters; one that explains texts too
    has `modalities = ("picture", "text")`, and so has a metric that judges their maps. `fit` estimates whatever
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


@runtime_checkable
class DrawsOutlines(Protocol):
    """A metric that finds places in a map, which the run's page draws on its overlays."""

    def outlines(self, batch: Batch, attribution: Attribution) -> Tensor:
        """uint8 [B, H, W]: 1 at the border of what was found, 2 at that of what was annotated, 0 elsewhere."""
        ...


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
