#!/usr/bin/env python
"""What has to hold on a GPU, tried on one: the contract suite, the CPU's heatmaps, flat memory, and rates.

    python scripts/gpu_check.py                                   # all parts on cuda
    python scripts/gpu_check.py heatmaps --methods iba gradcam    # a part, for some methods
    python scripts/gpu_check.py memory --batches 200
    python scripts/gpu_check.py rates --backbone resnet50 --batch 64
    python scripts/gpu_check.py heatmaps memory --device cpu --batches 20   # the script itself, without a GPU

    contract    tests/test_method_contract.py, test_metric_contract.py and test_lstm.py with IBXAI_TEST_DEVICE=cuda
    heatmaps    every method on four photographs, on the GPU and on the CPU: the largest difference over the map's
                largest value, and the rank correlation; a method whose maps correlate below .99 fails
    memory      torch.cuda's allocated bytes after 10 batches and after all of them: growth is a failure
    rates       pictures a second of a plain pass and of forward with backward, in every mode of benchmark_methods.py,
                and what each does to the probabilities

The gradient family agrees to rounding. Searches that amplify rounding (optimised masks, bottlenecks) agree less, which
is why they are judged by their order of pixels. A fast mode may become a default only when insertion and deletion are
unchanged, which `ibxai report` compares row by row.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from benchmark import CONF, _settings, pictures
from benchmark_methods import MODES, in_mode
from scipy.stats import spearmanr

from ibxai.backbones import Backbone
from ibxai.config import build
from ibxai.memory import keep_freed_memory
from ibxai.pipeline import ROWS_AT_ONCE
from ibxai.types import Batch

PARTS = ("contract", "heatmaps", "memory", "rates")
LOWEST_CORRELATION = 0.99
GROWTH = 2**20  # bytes between the tenth and the last batch
# they need weights, tokens or a trained masker of their own
_LEFT_OUT = ("_text", "boolean_masker", "reveal")


def main() -> int:
    options = _options()
    keep_freed_memory()
    torch.backends.cudnn.allow_tf32 = False  # as `ibxai run` does
    device = torch.device(options.device)
    if device.type == "cuda":
        print(f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}, CUDA {torch.version.cuda}")
    parts = {"contract": contract, "heatmaps": heatmaps, "memory": memory, "rates": rates}
    failed = [part for part in options.parts or PARTS if not parts[part](options)]
    print("failed: " + ", ".join(failed) if failed else "all as it should be")
    return 1 if failed else 0


def load(options: argparse.Namespace, device: str) -> Backbone:
    settings = _settings("backbone", options.backbone)
    if settings["weights"] != "packaged":
        settings |= {"weights": "none", "allow_random": True}
    return build(settings, "backbone").load(ROWS_AT_ONCE[torch.device(device).type]).to(device)


def contract(options: argparse.Namespace) -> bool:
    tests = Path(__file__).parent.parent / "tests"
    files = [str(tests / f"test_{name}.py") for name in ("method_contract", "metric_contract", "lstm")]
    environment = {**os.environ, "IBXAI_TEST_DEVICE": options.device}
    return subprocess.run([sys.executable, "-m", "pytest", "-q", *files], env=environment, check=False).returncode == 0


def heatmaps(options: argparse.Namespace) -> bool:
    here, there = load(options, "cpu"), load(options, options.device)
    batches = {backbone: pictures(backbone, 4) for backbone in (here, there)}
    good = True
    print(f"\n{'':24}{'apart':>10}{'ranks':>8}")
    for name in options.methods:
        maps = []
        for backbone, batch in batches.items():
            attribute = build(_settings("method", name), "method").fit(backbone, [pictures(backbone, 7)], 0)
            maps.append(attribute(batch).heatmap.cpu().double())
        one, other = maps
        apart = float((one - other).abs().max() / one.abs().max().clamp(min=1e-30))
        ranks = min(float(spearmanr(a.flatten(), b.flatten())[0]) for a, b in zip(one, other, strict=True))
        agrees = ranks >= LOWEST_CORRELATION
        good &= agrees
        print(f"{name:24}{apart:10.1e}{ranks:8.4f}{'' if agrees else '   too far apart'}", flush=True)
    return good


def memory(options: argparse.Namespace) -> bool:
    backbone = load(options, options.device)
    if backbone.device.type != "cuda":
        print("\nmemory: torch counts no bytes on a CPU; scripts/long_run.py pictures looks at the process")
        return True
    good = True
    print(f"\n{'':24}{'after 10 batches':>18}{f'after {options.batches}':>18}")
    batch = pictures(backbone, 4)
    for name in options.methods:
        attribute = build(_settings("method", name), "method").fit(backbone, [pictures(backbone, 7)], 0)
        taken = []
        for number in range(options.batches):
            attribute(batch)
            if number + 1 in (10, options.batches):
                torch.cuda.synchronize()
                taken.append(torch.cuda.memory_allocated())
        grows = taken[-1] - taken[0] > GROWTH
        good &= not grows
        print(f"{name:24}{taken[0]:18,}{taken[-1]:18,}{'   it grows' if grows else ''}", flush=True)
    return good


def rates(options: argparse.Namespace) -> bool:
    """Pictures a second of the frozen network. Not judged: the figures are for docs/scale.md."""
    backbone = load(options, options.device)
    batch = pictures(backbone, options.batch)
    wanted = backbone._network(batch.inputs).softmax(1)
    print(
        f"\n{options.backbone}, {options.batch} pictures at once{'':8}{'forward':>12}{'with backward':>15}{'apart':>10}"
    )
    for name in MODES:
        with in_mode(backbone, name):
            run = backbone._network
            with torch.no_grad():
                apart = float((run(batch.inputs).softmax(1) - wanted).abs().max())
                forward = a_second(lambda run=run: run(batch.inputs), batch)
            both = a_second(lambda run=run: _backward(run, batch), batch)
        print(f"{name:40}{forward:12,.0f}{both:15,.0f}{apart:10.1e}", flush=True)
    return True


def _backward(run: Callable[[torch.Tensor], torch.Tensor], batch: Batch) -> None:
    inputs = batch.inputs.clone().requires_grad_()
    torch.autograd.grad(batch.target.loss(run(inputs)).sum(), inputs)


def a_second(work: Callable[[], object], batch: Batch, seconds: float = 3.0) -> float:
    """Pictures a second over about so many seconds, after two warm-up calls."""
    cuda = batch.inputs.device.type == "cuda"
    for _ in range(2):
        work()
    if cuda:
        torch.cuda.synchronize()
    started, calls = time.perf_counter(), 0
    while time.perf_counter() - started < seconds:
        work()
        calls += 1
        if cuda:
            torch.cuda.synchronize()
    return calls * len(batch) / (time.perf_counter() - started)


def _options() -> argparse.Namespace:
    named = [path.stem for path in sorted((CONF / "method").glob("*.yaml"))]
    usual = [name for name in named if not any(part in name for part in _LEFT_OUT)]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "parts", nargs="*", choices=[*PARTS, []], metavar="PART", help="contract, heatmaps, memory, rates (all)"
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--backbone", default="efficientnet_lite0")
    parser.add_argument("--methods", nargs="+", default=usual, metavar="METHOD", help="all that need nothing trained")
    parser.add_argument("--batches", type=int, default=200, help="of four pictures, for `memory` (200)")
    parser.add_argument("--batch", type=int, default=64, help="pictures at once, for `rates` (64)")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
