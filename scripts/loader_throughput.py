#!/usr/bin/env python
"""Does reading keep up with the network? Pictures a second of each dataset's loader, beside passes a second.

    python scripts/loader_throughput.py covidx=/data/covidx chestxray8=/data/cxr8 --workers 0 2 4
    python scripts/loader_throughput.py brixia=/data/cohen,subset=cohen,lungs=/data/masks
    python scripts/loader_throughput.py sample --device cuda --backbones resnet50

A loader is timed as a run uses it: read, regions, preprocessing to 224 x 224, batches, with this many worker processes.
CPU is the processor time a picture, of all processes, which a busy machine leaves alone; pictures a second are by the
wall. A bottleneck makes a hundred passes or more a picture, a plain gradient one: the last columns say how many passes
of each network a picture's reading costs.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: threads that wait must not count as work

import torch
import yaml

from ibxai.config import build
from ibxai.datasets.loading import load_batches
from ibxai.errors import UserError
from ibxai.memory import keep_freed_memory
from ibxai.preprocessing import Preprocessing
from ibxai.targets import Predicted

CONF = Path(__file__).parent.parent / "conf"
PREPROCESSING = Preprocessing(256, 224, (0.5,) * 3, (0.5,) * 3)
BATCH = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("datasets", nargs="+", metavar="NAME[=ROOT[,SETTING=VALUE ...]]")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2], help="decoding processes (0 2)")
    parser.add_argument("--pictures", type=int, default=64, metavar="N", help="read of each dataset (64)")
    parser.add_argument("--backbones", nargs="+", default=["efficientnet_lite0", "densenet121"], metavar="NAME")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    keep_freed_memory()
    costs = {name: seconds_a_pass(name, options.device) for name in options.backbones}
    for name, (cpu, wall) in costs.items():
        print(f"{name}: {1 / wall:.1f} passes a second on {options.device}, {1000 * cpu:.0f} ms of CPU a pass")
    walls = "".join(f" pictures/s, {workers} workers |" for workers in options.workers)
    print(
        f"\n| dataset | pixels | pictures |{walls} CPU ms a picture |" + "".join(f" in passes of {b} |" for b in costs)
    )
    print("|---|---|---|" + "---|" * (len(options.workers) + 1 + len(costs)))
    for text in options.datasets:
        dataset = named(text)
        rates, cpus = [], []
        for workers in options.workers:
            count, cpu, wall = read_all(dataset, options.pictures, workers)
            rates.append(count / wall)
            cpus.append(cpu / count)
        cpu = statistics.median(cpus)
        width, height = dataset.read(dataset.samples()[0]).image.size
        cells = [
            dataset.name,
            f"{width} x {height}",
            str(count),
            *(f"{rate:.1f}" for rate in rates),
            f"{1000 * cpu:.0f}",
        ]
        print("| " + " | ".join(cells + [f"{cpu / own:.2f}" for own, _ in costs.values()]) + " |", flush=True)


def named(text: str) -> Any:
    """A dataset from "name", "name=root" or "name=root,setting=value"."""
    name, _, rest = text.partition("=")
    root, *more = rest.split(",")
    settings = yaml.safe_load((CONF / "dataset" / f"{name}.yaml").read_text())
    settings.pop("defaults", None)
    settings |= ({"root": root} if root else {}) | {
        key: yaml.safe_load(value) for key, _, value in (setting.partition("=") for setting in more)
    }
    return build(settings, "dataset")


def read_all(dataset: Any, most: int, workers: int) -> tuple[int, float, float]:
    """(pictures, CPU seconds of all processes, seconds by the wall) of reading the first `most` samples."""
    work = [(sample, (0,)) for sample in dataset.samples()[:most]]
    cpu, wall, count = cpu_seconds(), time.perf_counter(), 0
    for loaded in load_batches(dataset, work, Predicted(), PREPROCESSING, BATCH, workers):
        count += len(loaded.row_ids)
    return count, cpu_seconds() - cpu, time.perf_counter() - wall


def cpu_seconds() -> float:
    """Of this process and of its workers that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(own.ru_utime + own.ru_stime for own in used)


def seconds_a_pass(name: str, device: str) -> tuple[float, float]:
    """(CPU, wall) seconds of a forward pass of one picture, in batches, median of five; random weights cost as much."""
    settings = yaml.safe_load((CONF / "backbone" / f"{name}.yaml").read_text())
    settings |= {} if settings["weights"] == "packaged" else {"weights": "none", "allow_random": True}
    backbone = build(settings, "backbone").load(BATCH).to(torch.device(device))
    inputs = torch.zeros(BATCH, *PREPROCESSING.input_shape, device=device)
    times = []
    with torch.no_grad():
        for _ in range(6):
            cpu, wall = time.process_time(), time.perf_counter()
            backbone(inputs)
            if device.startswith("cuda"):
                torch.cuda.synchronize()
            times.append(((time.process_time() - cpu) / BATCH, (time.perf_counter() - wall) / BATCH))
    first, second = (statistics.median(column) for column in zip(*times[1:], strict=True))  # the first one warms up
    return first, second


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(str(error))
