#!/usr/bin/env python
"""What a long run costs: memory and time a picture over thousands of them, and how soon a full folder is known.

    python scripts/long_run.py pictures --count 2000    # a cheap method: slope of memory, cost a picture
    python scripts/long_run.py scan --count 50000       # start-up of a run whose samples are all finished
    python scripts/long_run.py report --count 200       # `ibxai report` over so many runs of 100 rows

Each prints its figures; seconds are of CPU, which a busy machine does not stretch. `pictures` exits with 1 when memory
grows by more than a kilobyte a picture, or a picture costs 5 % more CPU time at the end than in the middle.
"""

from __future__ import annotations

import argparse
import os
import resource
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: threads that wait must not count as work

import numpy as np
import torch
from PIL import Image
from torch import nn

from ibxai import pipeline
from ibxai.backbones import Backbone, freeze
from ibxai.methods.gradients import GradientXInput
from ibxai.metrics import Insertion
from ibxai.pipeline import Plan
from ibxai.preprocessing import Preprocessing
from ibxai.report import write_leaderboard, write_report
from ibxai.store import MetricKey, Row, RunStore, StoredHeatmap
from ibxai.targets import Predicted
from ibxai.types import Picture, Sample

SIDE = 64
_WARM = 0.25  # of the pictures, before caches and the allocator have settled


@dataclass(frozen=True)
class MadePictures:
    """Noise, drawn for the sample. seen: (resident bytes, CPU seconds) at every picture."""

    count: int
    seen: list[tuple[int, float]] = field(default_factory=list, compare=False, repr=False)
    name: str = "made"
    class_names: Sequence[str] | None = None
    reference_note: str = ""

    def samples(self) -> Sequence[Sample]:
        return [Sample(f"{place:06d}", f"{place:06d}", Path(), SIDE) for place in range(self.count)]

    def reference(self) -> Sequence[Sample]:
        return self.samples()[:100]

    def read(self, sample: Sample) -> Picture:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        self.seen.append((pages * resource.getpagesize(), time.process_time()))
        draws = np.random.default_rng(int(sample.sample_id)).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
        return Picture(Image.fromarray(draws))


@dataclass(frozen=True)
class SmallNet:
    name: str = "small"

    def load(self, max_passes: int) -> Backbone:
        torch.manual_seed(0)
        network = nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(), nn.Conv2d(8, 8, 3, stride=2), nn.ReLU(),
            nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 10),
        )  # fmt: skip
        preprocessing = Preprocessing(SIDE, SIDE, (0.5,) * 3, (0.5,) * 3)
        return freeze(network, layers={}, preprocessing=preprocessing, name=self.name, max_passes=max_passes)


def plan_of(count: int, outputs: Path) -> Plan:
    return Plan(
        dataset=MadePictures(count), backbone=SmallNet(), method=GradientXInput(), method_name="gradient_x_input",
        metrics={"insertion": Insertion(step=0.25)}, target=Predicted(), settings={}, seed=0, device="cpu",
        batch_size=16, max_passes=None, workers=0, limit=None, pictures=8, outputs=outputs, command="long_run",
    )  # fmt: skip


def pictures(count: int, outputs: Path) -> bool:
    plan = plan_of(count, outputs)
    pipeline.run(plan)
    resident, seconds = np.array(plan.dataset.seen, dtype=float).T  # type: ignore[attr-defined]
    warm = int(_WARM * count)
    slope = np.polyfit(np.arange(warm, count), resident[warm:], 1)[0]
    middle, end = (seconds[stop] - seconds[stop - warm] for stop in (3 * warm, count - 1))
    change = end / middle - 1
    print(
        f"{count:,} pictures: memory grows by {slope:,.0f} bytes a picture, {resident[-1] / 2**20:,.0f} MB at the end;"
    )
    print(f"{1000 * end / warm:.1f} ms of CPU a picture at the end, {100 * change:+.1f} % of what it was in the middle")
    return slope < 1000 and change < 0.05


def scan(count: int, outputs: Path) -> bool:
    plan = plan_of(count, outputs)
    pipeline.run(plan.__class__(**{**plan.__dict__, "limit": 16}))
    [folder] = [path.parent for path in outputs.glob("*/*/*/*/provenance.json")]
    store, ids = RunStore(folder), [f"{place:06d}@predicted" for place in range(count)]
    [key] = store.metrics()
    for row_id in ids[16:]:  # only that it is there, and whole, is looked at
        os.link(folder / "heatmaps" / f"{ids[0]}.npz", folder / "heatmaps" / f"{row_id}.npz")
    known = store.read_scores(key)[ids[0]]
    for start in range(16, count, 16):
        rows = ids[start : start + 16]
        store.write_scores(key, rows, {name: np.stack([value] * len(rows)) for name, value in known.items()})
    started = time.process_time()
    left = pipeline.what_is_left(plan, plan.dataset.samples(), store)
    looked = time.process_time() - started
    started = time.process_time()
    write_report(store)
    tables = time.process_time() - started
    started = time.process_time()
    outcome = pipeline.run(plan)
    whole = time.process_time() - started
    print(
        f"{count:,} finished samples: looked through in {looked:.1f} s of CPU, tables and page made in {tables:.1f} s;"
    )
    print(f"a run with nothing left to do takes {whole:.1f} s")
    return not left.rows and outcome.new_heatmaps == 0


def report(count: int, outputs: Path) -> bool:
    draws = np.random.default_rng(0)
    names = [f"{row}@predicted" for row in range(100)]
    rows = [Row(name, name.partition("@")[0], "predicted", name.partition("@")[0], 0) for name in names]
    fraction = np.linspace(0, 1, 101)
    for number in range(count):
        store = RunStore(outputs / "made" / "small" / f"method{number:03d}" / f"{number:012x}")
        told = {"dataset": "made", "backbone": "small", "method": f"method{number:03d}", "weights": "sha256 0"}
        store.begin("seed: 0\n", {**told, "identity": {}, "finished": "today"}, None, rows)
        store.write_heatmap(StoredHeatmap(names[0], draws.random((8, 8)), "score", 0, 0.5, 0, 0.5))
        for metric, higher in (("insertion", True), ("deletion", False)):
            curves = draws.random((100, 101)).cumsum(1) / 101
            values = {"auc": curves.mean(1), "curve": curves, "fraction": np.tile(fraction, (100, 1))}
            store.write_scores(MetricKey(metric, {"higher_is_better": higher}), names, values)
    times = []
    for _ in range(2):
        started = time.process_time()
        page = write_leaderboard(outputs)
        times.append(time.process_time() - started)
    print(f"{count} runs: {times[0]:.1f} s of CPU with tables to be made, {times[1]:.1f} s with tables that are there;")
    print(f"the page has {page.stat().st_size / 2**20:.1f} MB")
    return True


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("pictures", "scan", "report"))
    parser.add_argument("--count", type=int, help="pictures, samples or runs (2000, 50000, 200)")
    options = parser.parse_args()
    usual = {"pictures": 2000, "scan": 50_000, "report": 200}
    with tempfile.TemporaryDirectory(prefix="long-run-") as place:
        work = {"pictures": pictures, "scan": scan, "report": report}[options.part]
        return 0 if work(options.count or usual[options.part], Path(place)) else 1


if __name__ == "__main__":
    sys.exit(main())
