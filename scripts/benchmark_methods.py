"""What methods cost: passes, seconds and pictures a second, and how much of the time the passes themselves need.

    python scripts/benchmark.py methods                            # every method, efficientnet_lite0, one batch of 4
    python scripts/benchmark.py methods igospp rise --set igospp.step=armijo rise.masks=1000
    python scripts/benchmark.py methods --device cuda --batch 16
    python scripts/benchmark.py methods igospp rise --modes float32 tf32 bf16 compiled channels_first

The limit is the same network run bare at the batch size at which it is fastest, forward alone and forward with backward
to the input, both measured here. "share" is the time that a method's passes of the whole network would take at that
limit, over the time that it took: seconds of CPU, which a busy machine does not stretch, and on a GPU of the clock.
Methods that run parts of the network (a head, a tail: "other passes") have no such share.

--modes: how the whole network runs while maps are made: as `ibxai run` has it (float32, channels last), and otherwise.
Deletion and insertion of each mode's maps, judged by the float32 network, say whether a faster mode may be had: they
have to be those of float32. Cut networks always run in float32.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
import yaml
from benchmark import CONF, _settings, pictures
from mask_trade import judged

from ibxai.backbones import Backbone
from ibxai.config import build
from ibxai.memory import keep_freed_memory
from ibxai.pipeline import ROWS_AT_ONCE
from ibxai.types import Attribution, Batch

MODES = ("float32", "tf32", "bf16", "compiled", "channels_first")
HEADER = f"{'':24}{'forward':>9}{'fwd+bwd':>9}{'CPU s':>9}{'wall s':>9}{'a second':>10}{'share':>8}   other passes"
WHOLE = {"forward", "backward"}  # passes of the whole network, as `Backbone.counting` names them


def main(arguments: Sequence[str]) -> None:
    options = _options(arguments)
    keep_freed_memory()
    backbone = build(_settings("backbone", options.backbone), "backbone")
    backbone = backbone.load(ROWS_AT_ONCE[torch.device(options.device).type]).to(options.device)
    batch = pictures(backbone, options.batch)
    print(f"{options.backbone} on {options.device}, {torch.get_num_threads()} threads")
    for mode in options.modes:
        made = {}
        with in_mode(backbone, mode):
            bare, both = limits(backbone, options.rows)
            print(
                f"\n{mode}: at best a row takes {1e3 * bare:.1f} ms forward, {1e3 * both:.1f} ms forward and backward\n"
            )
            print(HEADER)
            for name in options.methods:
                method = _settings("method", name)
                for item in options.set:
                    key, value = item.split("=", 1)
                    if key.startswith(f"{name}."):
                        method[key.removeprefix(f"{name}.")] = yaml.safe_load(value)
                told, made[name] = line(backbone, method, batch, options.repeats, bare, both)
                print(f"{name:24}{told}", flush=True)
        if len(options.modes) > 1:
            print()
            for name, attribution in made.items():
                found = {metric: judged(backbone, batch, attribution, metric) for metric in ("deletion", "insertion")}
                print(f"{name:24}" + ", ".join(f"{metric} {auc:.4f}" for metric, auc in found.items()), flush=True)


@contextmanager
def in_mode(backbone: Backbone, mode: str) -> Iterator[None]:
    """The backbone with its whole network run otherwise."""
    network, before = backbone._network, torch.backends.cuda.matmul.allow_tf32
    run = network
    if mode == "bf16":
        half = torch.autocast(backbone.device.type, torch.bfloat16)
        run = _As(network, lambda inputs: _within(half, network, inputs))
    elif mode == "compiled":
        compiled = torch.compile(network)
        run = _As(network, compiled)
    elif mode == "channels_first":
        plain = copy.deepcopy(network).to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
        run = _As(plain, lambda inputs: plain(inputs.contiguous()))
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = mode == "tf32"
    backbone._network = run
    try:
        yield
    finally:
        backbone._network = network
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = before


class _As(torch.nn.Module):
    """A network, run by another function."""

    def __init__(self, network: torch.nn.Module, run: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.network, self.run = network, run

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.run(inputs)


def _within(half: torch.autocast, network: torch.nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    with half:
        return network(inputs).float()


def line(
    backbone: Backbone, method: dict, batch: Batch, repeats: int, bare: float, both: float
) -> tuple[str, Attribution]:
    """A picture's passes and the median of its seconds; the maps."""
    attribute = build(method, "method").fit(backbone, [pictures(backbone, 7)], 0)
    times, made = [], []
    for _ in range(repeats):
        with backbone.counting() as counted:
            times.append(timed(backbone, lambda: made.append(attribute(batch))))
    cpu, wall = (statistics.median(column) / len(batch) for column in zip(*times, strict=True))
    passes = {part: number / len(batch) for part, number in counted.items()}
    backward = passes.get("backward", 0)
    forward = passes.get("forward", 0) - backward
    others = {part: number for part, number in passes.items() if part not in WHOLE and number}
    needed, spent = forward * bare + backward * both, (cpu, wall)[_clock(backbone)]
    share = f"{needed / spent:8.0%}" if needed and not others else f"{'':8}"
    told = ", ".join(f"{part} {number:g}" for part, number in others.items())
    return f"{forward:9,.0f}{backward:9,.0f}{cpu:9.2f}{wall:9.2f}{1 / wall:10.3f}{share}   {told}", made[-1]


def limits(backbone: Backbone, sizes: Sequence[int]) -> tuple[float, float]:
    """Seconds a row, forward and forward with backward, each at its best batch size."""
    best = [float("inf"), float("inf")]
    for size in sizes:
        inputs = pictures(backbone, size).inputs

        def forward(inputs: torch.Tensor = inputs) -> None:
            with torch.no_grad():
                backbone(inputs)

        def backward(inputs: torch.Tensor = inputs) -> None:
            leaf = inputs.clone().requires_grad_()
            torch.autograd.grad(backbone(leaf).sum(), leaf)

        for i, run in enumerate((forward, backward)):
            best[i] = min([best[i], *(timed(backbone, run)[_clock(backbone)] / size for _ in range(4))])
    return best[0], best[1]


def _clock(backbone: Backbone) -> int:
    """Which of `timed` counts."""
    return 1 if backbone.device.type == "cuda" else 0


def timed(backbone: Backbone, run: Callable[[], object]) -> tuple[float, float]:
    """(CPU seconds, wall seconds)."""
    cpu, wall = time.process_time(), time.perf_counter()
    run()
    if backbone.device.type == "cuda":
        torch.cuda.synchronize()
    return time.process_time() - cpu, time.perf_counter() - wall


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmark.py methods", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    known = sorted(path.stem for path in (CONF / "method").glob("*.yaml"))
    parser.add_argument("methods", nargs="*", default=known, help="all by default")
    parser.add_argument("--set", nargs="*", default=[], metavar="METHOD.SETTING=VALUE")
    parser.add_argument("--backbone", default="efficientnet_lite0")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rows", nargs="+", type=int, default=[8, 16, 40], help="batch sizes to look for the limit at")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=["float32"], help="how the whole network runs")
    parser.add_argument("--repeats", type=int, default=1)
    return parser.parse_args(arguments)
