"""Batches: filled, in order, the same with workers, and honest about what was left out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ibxai.datasets.loading import Loaded, load_batches, reference_batches, sample_table_digest
from ibxai.errors import BadSample
from ibxai.preprocessing import Preprocessing
from ibxai.targets import PREDICTED, Classes, Label, MultiLabel, Predicted, Regression, RegressionTarget, TargetSpec
from ibxai.types import Picture, Sample

PREPROCESSING = Preprocessing(resize=8, crop=8, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))


@dataclass(frozen=True)
class Grey:
    """Sample i is a grey picture of value i. Some are bad, some annotated: i planes for picture i."""

    count: int
    bad: tuple[int, ...] = ()
    broken: tuple[int, ...] = ()
    annotated: tuple[int, ...] = ()
    name: str = "grey"
    reference_note: str = "all"
    class_names: Sequence[str] | None = None

    def samples(self) -> Sequence[Sample]:
        return [Sample(f"s{i}", f"g{i // 2}", Path(str(i)), 10 + i, None if i == 1 else i) for i in range(self.count)]

    def reference(self) -> Sequence[Sample]:
        return self.samples()

    def read(self, sample: Sample) -> Picture:
        value = int(sample.source.name)
        if value in self.bad:
            raise BadSample(f"bad {value}")
        if value in self.broken:
            raise ZeroDivisionError("a bug")
        planes = {"target": torch.ones(value, 8, 8, dtype=torch.bool)} if value in self.annotated else {}
        return Picture(Image.new("RGB", (8, 8), (value, value, value)), planes)


def load(dataset: Grey, spec: TargetSpec = Predicted(), size: int = 3, workers: int = 0) -> list[Loaded]:  # noqa: B008
    work = [(sample, tuple(range(len(spec.names())))) for sample in dataset.samples()]
    return list(load_batches(dataset, work, spec, PREPROCESSING, size, workers))


def values(loaded: Loaded) -> list[int]:
    """Which picture each row really holds."""
    assert loaded.batch is not None
    return (loaded.batch.inputs[:, 0, 0, 0] * 255).round().int().tolist()


def test_batches_are_full_and_bad_samples_are_reported_where_they_were_met() -> None:
    batches = load(Grey(9, bad=(1, 4), broken=(8,)))
    assert [values(b) for b in batches[:2]] == [[0, 2, 3], [5, 6, 7]]
    assert [dict(b.skipped) for b in batches] == [
        {"s1": "bad 1"},
        {"s4": "bad 4"},
        {"s8": "unexpected ZeroDivisionError: a bug"},
    ]
    assert batches[2].batch is None
    assert batches[2].row_ids == ()
    assert batches[0].row_ids == ("s0@predicted", "s2@predicted", "s3@predicted")
    assert batches[0].labels == (0, 2, 3)
    assert batches[0].batch is not None
    assert batches[0].batch.sample_ids == ("s0", "s2", "s3")
    assert batches[0].batch.group_ids == ("g0", "g1", "g1")
    assert list(batches[0].batch.target.describe()) == [PREDICTED] * 3


def test_the_last_batch_may_be_smaller_and_there_is_no_empty_one() -> None:
    assert [len(b.row_ids) for b in load(Grey(7))] == [3, 3, 1]
    assert [len(b.row_ids) for b in load(Grey(6))] == [3, 3]
    assert load(Grey(0)) == []
    assert [(b.batch, len(b.skipped)) for b in load(Grey(2, bad=(0, 1)))] == [(None, 2)]


def test_rows_of_a_sample_share_its_picture_and_may_be_split_over_batches() -> None:
    batches = load(Grey(2), Classes((7, 5)), size=3)
    assert [b.row_ids for b in batches] == [("s0@7", "s0@5", "s1@7"), ("s1@5",)]
    assert [values(b) for b in batches] == [[0, 0, 1], [1]]
    assert [list(b.batch.target.describe()) for b in batches if b.batch] == [[7, 5, 7], [5]]
    assert batches[0].labels == (0, 0, None)


def test_only_the_rows_that_are_wanted() -> None:
    dataset = Grey(3)
    first, second, _ = dataset.samples()
    work = [(second, (2,)), (first, (0, 2))]
    (only,) = load_batches(dataset, work, Classes((4, 5, 6)), PREPROCESSING, 8, 0)
    assert only.row_ids == ("s1@6", "s0@4", "s0@6")
    assert values(only) == [1, 0, 0]


def test_a_picture_is_decoded_once_for_all_its_targets(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    original = Grey.read

    def counted(self: Grey, sample: Sample) -> Picture:
        read.append(sample.sample_id)
        return original(self, sample)

    monkeypatch.setattr(Grey, "read", counted)
    load(Grey(3), Classes((1, 2, 3)), size=2)
    assert read == ["s0", "s1", "s2"]


def test_a_sample_without_the_label_asked_for_is_skipped() -> None:
    (loaded,) = load(Grey(3), Label())
    assert loaded.row_ids == ("s0@label", "s2@label")
    assert loaded.batch is not None
    assert list(loaded.batch.target.describe()) == [0, 2]
    assert "no label" in loaded.skipped["s1"]


def test_regions_are_padded_with_empty_planes() -> None:
    (loaded,) = load(Grey(4, annotated=(1, 3)), size=4)
    assert loaded.batch is not None
    target = loaded.batch.regions["target"]
    assert target.shape == (4, 3, 8, 8)
    assert target.dtype == torch.bool
    assert target.any(dim=(2, 3)).sum(1).tolist() == [0, 1, 0, 3]
    (without,) = load(Grey(2), size=4)
    assert without.batch is not None
    assert not without.batch.regions


@dataclass(frozen=True)
class Graded(Grey):
    """Sample i has the values (i, 10 i), the degree i everywhere, and of output c a target of c + 1 planes."""

    def samples(self) -> Sequence[Sample]:
        return [replace(s, values=(float(s.source.name), 10 * float(s.source.name))) for s in super().samples()]

    def read(self, sample: Sample) -> Picture:
        degree = {"severity": torch.full((1, 8, 8), float(sample.source.name))} if sample.sample_id != "s0" else {}
        targets = {f"target@{c}": torch.ones(c + 1, 8, 8, dtype=torch.bool) for c in (0, 2)}
        return Picture(super().read(sample).image, degree | targets)


def test_a_degree_stays_a_number_in_the_batch() -> None:
    (loaded,) = load(Graded(4), Regression("mse", 1), size=8)
    assert loaded.batch is not None
    severity = loaded.batch.regions["severity"]
    assert severity.dtype == torch.float32
    assert severity[:, 0, 3, 3].tolist() == [0.0, 1.0, 2.0, 3.0]


def test_each_row_gets_the_target_that_it_explains() -> None:
    batches = load(Graded(4), MultiLabel((2, 1, 0)), size=12)
    assert batches[0].batch is not None
    planes = batches[0].batch.regions["target"].any(dim=(2, 3)).sum(1).tolist()
    assert planes == [3, 0, 1] * 4
    assert set(batches[0].batch.regions) == {"severity", "target"}
    (predicted,) = load(Graded(4), Predicted(), size=12)  # its labels are 0, none, 2, 3
    assert predicted.batch is not None
    assert predicted.batch.regions["target"].any(dim=(2, 3)).sum(1).tolist() == [1, 0, 3, 0]


def test_values_become_the_labels_of_a_regression() -> None:
    (loaded,) = load(Graded(3), Regression("mse", 1), size=8)
    assert loaded.row_ids == ("s0@1", "s1@1", "s2@1")
    assert loaded.batch is not None
    target = loaded.batch.target
    assert isinstance(target, RegressionTarget)
    assert target.labels.tolist() == [0.0, 10.0, 20.0]
    assert target.output == 1
    (without,) = load(Grey(2), Regression("mse", 0))
    assert without.batch is None
    assert "no value for output 0" in without.skipped["s0"]


def test_workers_change_nothing() -> None:
    dataset = Grey(23, bad=(3, 11, 22), broken=(4,), annotated=(5, 6))
    random_state = torch.random.get_rng_state()
    alone, together = load(dataset, Classes((1, 2)), 4, 0), load(dataset, Classes((1, 2)), 4, 2)
    assert torch.equal(torch.random.get_rng_state(), random_state)  # and the loader leaves the global generator alone
    assert [b.row_ids for b in alone] == [b.row_ids for b in together]
    assert [b.skipped for b in alone] == [b.skipped for b in together]
    for one, other in zip(alone, together, strict=True):
        if one.batch is None or other.batch is None:
            assert one.batch is other.batch
            continue
        assert torch.equal(one.batch.inputs, other.batch.inputs)
        assert one.batch.regions.keys() == other.batch.regions.keys()
        assert all(torch.equal(plane, other.batch.regions[name]) for name, plane in one.batch.regions.items())


def test_the_number_of_threads_is_put_back() -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        for _ in load_batches(Grey(2), [(s, (0,)) for s in Grey(2).samples()], Predicted(), PREPROCESSING, 1, 0):
            assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_inputs_are_the_preprocessed_picture() -> None:
    preprocessing = Preprocessing()
    pixels = np.random.default_rng(0).integers(0, 256, (300, 260, 3), dtype=np.uint8)

    @dataclass(frozen=True)
    class One(Grey):
        def read(self, sample: Sample) -> Picture:
            return Picture(Image.fromarray(pixels))

    (loaded,) = load_batches(One(1), [(One(1).samples()[0], (0,))], Predicted(), preprocessing, 4, 0)
    assert loaded.batch is not None
    expected, _ = preprocessing(Picture(Image.fromarray(pixels)))
    assert torch.equal(loaded.batch.inputs[0], expected)
    assert loaded.batch.inputs.dtype == torch.float32


def test_reference_batches_can_be_gone_through_twice() -> None:
    batches = reference_batches(Grey(5, bad=(2,)), PREPROCESSING, 3, 0)
    for _ in range(2):
        seen = list(batches)
        assert [b.sample_ids for b in seen] == [("s0", "s1", "s3"), ("s4",)]
        assert all(c == PREDICTED for b in seen for c in b.target.describe())
    assert batches.skipped == {"s2": "bad 2"}


def test_the_digest_tells_tables_apart_and_ignores_paths() -> None:
    base = Sample("a", "g", Path("/x/a.png"), 5, 1)
    same = Sample("a", "g", Path("/y/b.png"), 5, 1)
    assert sample_table_digest([base]) == sample_table_digest([same])
    assert len(sample_table_digest([])) == 64
    others = [
        Sample("b", "g", base.source, 5, 1),
        Sample("a", "h", base.source, 5, 1),
        Sample("a", "g", base.source, 6, 1),
        Sample("a", "g", base.source, 5, 2),
        Sample("a", "g", base.source, 5, None),
        Sample("a", "g", base.source, 5, 1, (0.0,)),
        Sample("a", "g", base.source, 5, 1, (1.0,)),
        Sample("a", "g", base.source, 5, 1, (), "window 0 1"),
        Sample("a", "g", base.source, 5, 1, (), "window 0 2"),
    ]
    digests = [sample_table_digest([s]) for s in (base, *others)]
    digests += [sample_table_digest(pair) for pair in ([base, others[0]], [others[0], base])]
    assert len(set(digests)) == len(digests)
