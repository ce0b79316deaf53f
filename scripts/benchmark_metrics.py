"""What metrics cost beside Quantus: the same network, pictures, maps and numbers of steps and sets, in one run.

    python scripts/benchmark.py metrics                             # 16 pictures, efficientnet_lite0
    python scripts/benchmark.py metrics --steps 48 --sets 200 --points 10 --repeats 3
    python scripts/benchmark.py metrics --device cuda

Quantus (`pip install quantus`) is called as its documentation does, with all the pictures as one batch, the network
that the library gives (in eval mode, not folded), and the baseline 0. What stands against what:

- deletion against `PixelFlipping`, as many steps; Quantus takes a pixel's channels one by one and leaves the start out.
- Sensitivity-N against `FaithfulnessCorrelation`, once an n with as many random sets, since Quantus' own `SensitivityN`
  is another thing (docs/metrics.md); it is timed too, with as many steps as deletion. "another map" is what a second
  method's Sensitivity-N costs, since a run keeps what the network said.
- bbox and pointing game against `RelevanceRankAccuracy` and `PointingGame`, which need no network.

All are timed in turn, the medians are printed, and what counts is their ratio.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from benchmark import _settings, pictures
from torch import Tensor, nn

from ibxai.backbones import Backbone
from ibxai.config import build
from ibxai.metrics import BoxShare, Deletion, PointingGame, SensitivityN
from ibxai.metrics.sensitivity_n import set_sizes
from ibxai.pipeline import ROWS_AT_ONCE
from ibxai.types import Attribution, Batch

Case = Callable[[], object]
QUIET: Mapping[str, Any] = {"normalise": False, "disable_warnings": True, "return_aggregate": False}


class Counted(nn.Module):
    """A network that counts the pictures that it sees."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network, self.rows = network, 0

    def forward(self, x: Tensor) -> Tensor:
        self.rows += len(x)
        return self.network(x)


def main(arguments: Sequence[str]) -> None:
    options = _options(arguments)
    zoo = build(_settings("backbone", options.backbone), "backbone")
    backbone = zoo.load(ROWS_AT_ONCE[torch.device(options.device).type]).to(options.device)
    network = Counted(zoo.network()).to(options.device).eval().requires_grad_(False)
    batch = annotated(pictures(backbone, options.pictures))
    noise = torch.randn(batch.inputs.shape[0], *batch.inputs.shape[2:], generator=torch.Generator().manual_seed(0))
    attribution = Attribution(noise.to(options.device), "score")
    print(f"{options.backbone} on {options.device}, {len(batch)} pictures, {torch.get_num_threads()} threads,")
    print(f"{options.steps} steps, {options.points} n with {options.sets} sets each, median of {options.repeats}\n")
    ours = our_cases(backbone, batch, attribution, options)
    theirs = their_cases(network, batch, attribution, options)
    print(f"{'':34}{'CPU s':>9}{'wall s':>9}{'passes':>9}")
    figures = measured({**ours, **theirs}, backbone, network, options.repeats)
    for name, (cpu, wall, rows) in figures.items():
        print(f"{name:34}{cpu:9.2f}{wall:9.2f}{rows:9}")
    print(f"\n{'Quantus over ours':34}{'CPU':>9}{'wall':>9}")
    for name, other in PAIRS.items():
        cpu, wall = (figures[other][i] / figures[name][i] for i in (0, 1))
        print(f"{name:34}{cpu:8.1f}x{wall:8.1f}x   ({other})")


PAIRS = {
    "deletion": "PixelFlipping",
    "sensitivity_n": "FaithfulnessCorrelation",
    "sensitivity_n, another map": "FaithfulnessCorrelation",
    "bbox": "RelevanceRankAccuracy",
    "pointing_game": "PointingGame",
}


def our_cases(
    backbone: Backbone, batch: Batch, attribution: Attribution, options: argparse.Namespace
) -> dict[str, Case]:
    deletion = Deletion(step=1 / options.steps, baseline="constant")
    sensitivity = SensitivityN(points=options.points, sets=options.sets)
    kept: list[Tensor] = []

    def first() -> object:
        kept[:] = [sensitivity.responses(backbone, batch)]
        return sensitivity(backbone, batch, attribution, kept[0])

    return {
        "deletion": lambda: deletion(backbone, batch, attribution),
        "sensitivity_n": first,
        "sensitivity_n, another map": lambda: sensitivity(backbone, batch, attribution, kept[0]),
        "bbox": lambda: BoxShare()(backbone, batch, attribution),
        "pointing_game": lambda: PointingGame()(backbone, batch, attribution),
    }


def their_cases(
    network: Counted, batch: Batch, attribution: Attribution, options: argparse.Namespace
) -> dict[str, Case]:
    import quantus

    pixels = batch.inputs[0, 0].numel()
    features = batch.inputs[0].numel() // options.steps
    given: dict[str, Any] = {
        "model": network,
        "x_batch": batch.inputs.cpu().numpy(),
        "y_batch": np.array(batch.target.describe()),
        "a_batch": attribution.heatmap.cpu().numpy(),
        "s_batch": batch.regions["target"].cpu().numpy(),
        "device": options.device,
    }
    flipping = quantus.PixelFlipping(features_in_step=features, perturb_baseline=0.0, **QUIET)
    own = quantus.SensitivityN(features_in_step=features, perturb_baseline=0.0, **QUIET)
    at_each_n = [
        quantus.FaithfulnessCorrelation(nr_runs=options.sets, subset_size=n, perturb_baseline=0.0, **QUIET)
        for n in set_sizes(pixels, options.points, 1, 0.63).tolist()
    ]
    return {
        "PixelFlipping": lambda: flipping(**given, softmax=True),
        "FaithfulnessCorrelation": lambda: [metric(**given, softmax=False) for metric in at_each_n],
        "SensitivityN": lambda: own(**given, softmax=False),
        "RelevanceRankAccuracy": lambda: quantus.RelevanceRankAccuracy(**QUIET)(**given),
        "PointingGame": lambda: quantus.PointingGame(**QUIET)(**given),
    }


def measured(
    cases: Mapping[str, Case], backbone: Backbone, network: Counted, repeats: int
) -> dict[str, tuple[float, float, int]]:
    """(CPU seconds, wall seconds, network rows) of each case: medians, after a first round that warms up."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in cases}
    rows = {}
    for repeat in range(repeats + 1):
        for name, case in cases.items():
            network.rows = 0
            with backbone.counting() as counted, warnings.catch_warnings():
                warnings.simplefilter("ignore")
                cpu, wall = time.process_time(), time.perf_counter()
                case()
                if backbone.device.type == "cuda":
                    torch.cuda.synchronize()
                spent = time.process_time() - cpu, time.perf_counter() - wall
            if repeat:
                times[name].append(spent)
            rows[name] = counted.total() + network.rows
    medians = {
        name: [statistics.median(column) for column in zip(*spent, strict=True)] for name, spent in times.items()
    }
    return {name: (cpu, wall, rows[name]) for name, (cpu, wall) in medians.items()}


def annotated(batch: Batch) -> Batch:
    """The same pictures with a box in the middle, a ninth of the area."""
    plane = torch.zeros(len(batch), 1, *batch.inputs.shape[-2:], dtype=torch.bool, device=batch.inputs.device)
    third = plane.shape[-1] // 3
    plane[..., third : 2 * third, third : 2 * third] = True
    return dataclasses.replace(batch, regions={"target": plane})


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="benchmark.py metrics", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--backbone", default="efficientnet_lite0")
    parser.add_argument("--pictures", type=int, default=16)
    parser.add_argument("--steps", type=int, default=24, help="of deletion; Quantus takes multiples of 3 that fit")
    parser.add_argument("--points", type=int, default=4, help="sizes n of the sets")
    parser.add_argument("--sets", type=int, default=10, help="random sets an n; 200 in a run")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    return parser.parse_args(arguments)
