"""From a dataset to batches: pictures are decoded in worker processes, bad ones are left out and reported.

A row of a run is a (sample, target). The rows of a sample come one after the other and share one decoded picture.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from ibxai.errors import BadSample
from ibxai.preprocessing import Preprocessing
from ibxai.targets import PREDICTED, Predicted, TargetSpec
from ibxai.tokenisation import PAD_ID, Tokeniser
from ibxai.types import Batch, Dataset, Sample, Text

Work = Sequence[tuple[Sample, tuple[int, ...]]]
# Decoded pictures that wait for the consumer, a worker: enough to even out large and small files.
PREFETCH = 4


@dataclass(frozen=True)
class Loaded:
    """A batch, and what was met on the way to it.

    batch: None only in a last one, when bad samples came after the last good one. Of texts its inputs are token
    numbers still: `backbone.embed` makes them what a network takes.
    row_ids: "<sample>@<target>", one a row. labels: the dataset's class of each row, None where it gives none.
    skipped: sample id -> reason, of the bad samples met since the batch before. texts: of each row, where it is one.
    """

    batch: Batch | None
    row_ids: tuple[str, ...] = ()
    labels: tuple[int | None, ...] = ()
    skipped: Mapping[str, str] = field(default_factory=dict)
    texts: tuple[Text, ...] = ()


def load_batches(
    dataset: Dataset,
    work: Work,
    target_spec: TargetSpec,
    preprocessing: Preprocessing | Tokeniser,
    batch_size: int,
    workers: int,
) -> Iterator[Loaded]:
    """Batches of at most `batch_size` rows in the order of `work`; only the last may be smaller.

    work: samples with the rows that are wanted of each, as positions in `target_spec.names()`.
    workers: processes that decode; 0 decodes in this one. The result is the same.

    A sample for which `dataset.read` or the target fails is left out, and the batch is filled with the next ones.
    Regions get as many planes as the row with most has, and rows with fewer or without the region get empty ones: an
    all-empty region of a row means that there is nothing to judge it by, not annotated or cut away by the crop. A
    region "target@3" is "target" in the rows that explain output 3; a row that explains what the network predicts gets
    that of the sample's label.
    """
    names = target_spec.names()
    rows: list[_Row] = []
    skipped: dict[str, str] = {}
    decoder = _Decoder(dataset, work, target_spec, preprocessing)
    for (sample, positions), item in zip(work, _decoded(decoder, workers), strict=True):
        if isinstance(item, str):
            skipped[sample.sample_id] = item
            continue
        for position in positions:
            rows.append(_Row(sample, names[position], int(item.classes[position]), item))
            if len(rows) == batch_size:
                yield _loaded(rows, target_spec, skipped)
                rows, skipped = [], {}
    if rows or skipped:
        yield _loaded(rows, target_spec, skipped)


@dataclass
class ReferenceBatches:
    """The reference split of a dataset as batches that may be gone through more than once, targets "predicted".

    cache: a folder where a method may keep what it estimates on these pictures, None for none. skipped: sample id ->
    reason, of the bad samples met so far.
    """

    dataset: Dataset
    preprocessing: Preprocessing | Tokeniser
    batch_size: int
    workers: int
    cache: Path | None = None
    skipped: dict[str, str] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """What these pictures are known by in a cache."""
        return sample_table_digest(self.dataset.reference())

    def __iter__(self) -> Iterator[Batch]:
        work = [(sample, (0,)) for sample in self.dataset.reference()]
        for loaded in load_batches(self.dataset, work, Predicted(), self.preprocessing, self.batch_size, self.workers):
            self.skipped.update(loaded.skipped)
            if loaded.batch is not None:
                yield loaded.batch


def reference_batches(
    dataset: Dataset,
    preprocessing: Preprocessing | Tokeniser,
    batch_size: int,
    workers: int,
    cache: Path | None = None,
) -> ReferenceBatches:
    """Batches of `dataset.reference()` for `Method.fit`. Bad samples are left out; their reasons are in `.skipped`."""
    return ReferenceBatches(dataset, preprocessing, batch_size, workers, cache)


def sample_table_digest(samples: Sequence[Sample]) -> str:
    """sha256 over all of a sample but its path, in this order, as 64 hex digits."""
    digest = hashlib.sha256()
    for sample in samples:
        more = [entry for entry in (sample.values, sample.decoding) if entry]
        line = json.dumps([sample.sample_id, sample.group_id, sample.label, sample.size, *more])
        digest.update(line.encode() + b"\n")
    return digest.hexdigest()


@dataclass(frozen=True)
class _Item:
    """Numpy, not torch: a tensor would go from a worker through shared memory and hold a file descriptor while it
    waits for its batch, and both run out (64 MB of /dev/shm in a container, 1,024 descriptors).
    """

    inputs: np.ndarray
    regions: Mapping[str, np.ndarray]
    classes: np.ndarray
    text: Text | None = None


@dataclass(frozen=True)
class _Row:
    sample: Sample
    target_name: str
    target_class: int
    item: _Item

    @property
    def value(self) -> float:
        """What the dataset says that the explained output is to be; NaN where it says nothing."""
        values = self.sample.values
        return values[self.target_class] if 0 <= self.target_class < len(values) else float("nan")

    @property
    def regions(self) -> Mapping[str, np.ndarray]:
        """By name, those of the explained output and those that belong to all rows."""
        own = self.sample.label if self.target_class == PREDICTED else self.target_class
        named = ((*name.partition("@"), planes) for name, planes in self.item.regions.items())
        return {name: planes for name, at, output, planes in named if not at or output == str(own)}


@dataclass(frozen=True)
class _Decoder(TorchDataset):
    """Item i of the work: decoded, or the reason why it cannot be used. Never raises, so that no worker dies of it."""

    dataset: Dataset
    work: Work
    target_spec: TargetSpec
    preprocessing: Preprocessing | Tokeniser

    def __len__(self) -> int:
        return len(self.work)

    def __getitem__(self, index: int) -> _Item | str:
        sample, _ = self.work[index]
        try:
            classes = self.target_spec.make(sample)
            content = self.dataset.read(sample)
            inputs, regions = self.preprocessing(content)  # type: ignore[arg-type]  # a run refuses what does not fit
        except BadSample as error:
            return str(error)
        except Exception as error:  # one picture that nobody foresaw must not end a run of 50,000
            return f"unexpected {type(error).__name__}: {error}"
        planes = {name: region.numpy() for name, region in regions.items()}
        return _Item(inputs.numpy(), planes, classes.numpy(), content if isinstance(content, Text) else None)


def _decoded(decoder: _Decoder, workers: int) -> Iterator[_Item | str]:
    """The items in order. Each worker computes on one thread (torch sees to that), so `workers` is the cores in use."""
    workers = min(workers, len(decoder))
    if workers <= 0:
        return _decoded_here(decoder)
    return iter(
        DataLoader(
            decoder,
            batch_size=None,
            num_workers=workers,
            prefetch_factor=PREFETCH,
            collate_fn=_as_it_is,
            # Without one of its own the loader would draw from torch's global generator.
            generator=torch.Generator(),
        )
    )


def _decoded_here(decoder: _Decoder) -> Iterator[_Item | str]:
    """On one thread too: on a busy machine threads that wait for each other made small resizes thirty times slower."""
    for index in range(len(decoder)):
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            item = decoder[index]
        finally:
            torch.set_num_threads(threads)
        yield item


def _as_it_is(item: Any) -> Any:
    return item


def _loaded(rows: Sequence[_Row], target_spec: TargetSpec, skipped: Mapping[str, str]) -> Loaded:
    if not rows:
        return Loaded(None, skipped=skipped)
    texts = tuple(row.item.text for row in rows if row.item.text is not None)
    items = [row.item.inputs for row in rows]
    inputs, valid = _padded(items) if texts else (torch.from_numpy(np.stack(items)), None)
    batch = Batch(
        inputs=inputs,
        target=target_spec.of_rows(
            torch.tensor([row.target_class for row in rows]), torch.tensor([row.value for row in rows])
        ),
        sample_ids=tuple(row.sample.sample_id for row in rows),
        group_ids=tuple(row.sample.group_id for row in rows),
        regions=_regions([row.regions for row in rows]),
        tokens=inputs if texts else None,
        valid=valid,
    )
    row_ids = tuple(f"{row.sample.sample_id}@{row.target_name}" for row in rows)
    return Loaded(batch, row_ids, tuple(row.sample.label for row in rows), skipped, texts)


def _padded(texts: Sequence[np.ndarray]) -> tuple[Tensor, Tensor]:
    """(token numbers, long [B, T], whether there is one, bool [B, T]) of texts of different lengths."""
    tokens = torch.nn.utils.rnn.pad_sequence([torch.from_numpy(text) for text in texts], True, PAD_ID)
    lengths = torch.tensor([len(text) for text in texts])
    return tokens, torch.arange(tokens.shape[1]) < lengths[:, None]


def _regions(of_rows: Sequence[Mapping[str, np.ndarray]]) -> Mapping[str, Tensor]:
    """[B, R, H, W] of each name that any row has, bool or float as the planes are."""
    padded = {}
    for name in sorted({name for regions in of_rows for name in regions}):
        planes = [regions.get(name) for regions in of_rows]
        most = max(len(own) for own in planes if own is not None)
        first = next(own for own in planes if own is not None)
        whole = np.zeros((len(planes), most, *first.shape[1:]), dtype=first.dtype)
        for row, own in enumerate(planes):
            if own is not None:
                whole[row, : len(own)] = own
        padded[name] = torch.from_numpy(whole)
    return padded
