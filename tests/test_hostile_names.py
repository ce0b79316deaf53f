"""Sample ids that look like paths, through whole runs: everything stays inside the run's folder, and nothing meets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from test_pipeline import TinyData, files_of_run, pictures, plan  # noqa: F401  (fixtures)
from test_store import ODD_IDS

from ibxai.errors import BadSample
from ibxai.pipeline import Plan, run
from ibxai.shards import Shard
from ibxai.store import RunStore
from ibxai.types import Picture, Sample

IDS = [name for name in ODD_IDS if name and "\0" not in name]
BAD = {"../../x", "汉", "x" * 300}  # that cannot be read


@dataclass(frozen=True)
class OddlyNamed(TinyData):
    """One picture under many names."""

    def samples(self) -> Sequence[Sample]:
        source = sorted(Path(self.root).glob("*.png"))[0]
        return [Sample(name, name, source, 1, 0) for name in IDS]

    def read(self, sample: Sample) -> Picture:
        if sample.sample_id in BAD:
            raise BadSample("it is bad")
        return super().read(sample)


@pytest.fixture
def odd(plan: Plan, pictures: Path) -> Plan:  # noqa: F811
    return replace(plan, dataset=OddlyNamed(str(pictures)), pictures=len(IDS))


@pytest.mark.parametrize("shards", [[None], [Shard(1, 2), Shard(2, 2)]])
def test_everything_stays_inside_the_run_folder(odd: Plan, tmp_path: Path, shards: list[Shard | None]) -> None:
    before = {path for path in tmp_path.rglob("*") if "outputs" not in path.parts}
    for shard in shards:
        outcome = run(replace(odd, shard=shard))
    assert {path for path in tmp_path.rglob("*") if "outputs" not in path.parts} == before
    names = files_of_run(outcome.folder)  # the page shows 24 rows
    good = len(IDS) - len(BAD)
    for part, count in (("heatmaps", good), ("pictures", good), ("overlays", 24), ("skipped", len(BAD))):
        inside = [name for name in names if name.startswith(f"{part}/")]
        assert len(inside) == len({name.lower() for name in inside}) == count, part
        assert all(name.isascii() and name.count("/") == 1 and len(name) < 150 for name in inside)
    store = RunStore(outcome.folder)
    assert [row.sample_id for row in store.rows()] == IDS
    assert store.skipped().keys() == BAD
    stored = {store.read_heatmap(f"{name}@predicted").row_id for name in IDS if name not in BAD}
    assert len(stored) == good
    again = run(odd)
    assert (again.new_heatmaps, again.skipped.keys()) == (0, BAD)
