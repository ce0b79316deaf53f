"""What methods cost: network passes and seconds of CPU a picture, beside a plain bottleneck through the whole network.

    python scripts/benchmark.py                               # iba on efficientnet_lite0, batches of 1 and 16
    python scripts/benchmark.py --backbone densenet121 --layer features.denseblock3 --repeats 3
    python scripts/benchmark.py --methods iba inverse_iba gradcam --device cuda
    python scripts/benchmark.py metrics                       # metrics, beside Quantus: benchmark_metrics.py
    python scripts/benchmark.py methods                       # every method's passes, seconds: benchmark_methods.py

The plain bottleneck is how IBA is usually written: the original network with its batch norms, a hook at the layer, one
picture and ten noise draws a step, forward and backward through everything. Both are timed in turn in one run, the
medians are printed, and what counts is their ratio: single figures drift with the machine. Weights that are not at hand
are replaced by random ones, which cost the same.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: threads that wait must not count as work

import torch
import yaml

from ibxai.backbones import Backbone
from ibxai.backbones.zoo import Zoo
from ibxai.config import build
from ibxai.datasets.sample import SampleDataset
from ibxai.memory import keep_freed_memory
from ibxai.pipeline import ROWS_AT_ONCE
from ibxai.targets import ClassTarget
from ibxai.types import Batch

CONF = Path(__file__).parent.parent / "conf"


def main() -> None:
    options = _options()
    keep_freed_memory()  # as `ibxai run` does; both sides of a comparison have it
    settings = _settings("backbone", options.backbone)
    if settings["weights"] != "packaged":
        settings |= {"weights": "none", "allow_random": True}
    zoo: Zoo = build(settings, "backbone")
    rows = options.max_passes or ROWS_AT_ONCE[torch.device(options.device).type]
    backbone = zoo.load(rows).to(options.device)
    layer = backbone.layer(options.layer)
    print(f"{options.backbone} on {options.device}, layer {layer} {backbone.layers[layer]}, {rows} rows at once,")
    print(f"{torch.get_num_threads()} threads, median of {options.repeats}\n")
    batches = {size: pictures(backbone, size) for size in options.batch}
    cases: dict[str, Callable[[], int]] = {}
    for name in options.methods:
        method = _settings("method", name)
        if "layer" in method and name != "gradcam":
            method["layer"] = options.layer
        attributor = build(method, "method").fit(backbone, [pictures(backbone, 7)], 0)
        for size, batch in batches.items():
            cases[f"{name}, batch {size}"] = lambda a=attributor, b=batch: len(a(b).heatmap)
    plain_batch = pictures(backbone, options.plain_pictures)
    network = zoo.fresh(0).to(options.device).eval().requires_grad_(False)
    cases["plain bottleneck, whole network"] = lambda: plain_bottleneck(network, layer, plain_batch)
    for name, figures in measured(cases, backbone, options.repeats).items():
        print(f"{name:34} {figures}")


def measured(cases: dict[str, Callable[[], int]], backbone: Backbone, repeats: int) -> dict[str, str]:
    """Median seconds a picture of each case, taken in turn so that drift meets all alike, and its passes."""
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in cases}
    passes: dict[str, dict[str, float]] = {}
    for repeat in range(repeats + 1):
        for name, case in cases.items():
            with backbone.counting() as counted:
                cpu, wall = time.process_time(), time.perf_counter()
                count = case()
                if backbone.device.type == "cuda":
                    torch.cuda.synchronize()
                if repeat:  # the first round warms up
                    seconds[name].append(((time.process_time() - cpu) / count, (time.perf_counter() - wall) / count))
            passes[name] = {part: number / count for part, number in counted.items()}
    plain = statistics.median(cpu for cpu, _ in seconds["plain bottleneck, whole network"])
    return {name: _line(times, passes[name], plain) for name, times in seconds.items()}


def _line(times: list[tuple[float, float]], passes: dict[str, float], plain: float) -> str:
    cpu, wall = (statistics.median(column) for column in zip(*times, strict=True))
    told = ", ".join(f"{part} {number:g}" for part, number in passes.items()) or "forward 100, backward 100"
    return f"CPU {cpu:6.3f} s, wall {wall:6.3f} s a picture, {cpu / plain:5.2f} of plain; passes a picture: {told}"


def pictures(backbone: Backbone, count: int) -> Batch:
    """The photographs of the sample dataset, as often as needed, each with an id of its own."""
    dataset = SampleDataset()
    samples = dataset.samples()
    inputs = torch.stack([backbone.preprocessing(dataset.read(samples[i % len(samples)]))[0] for i in range(count)])
    ids = tuple(f"{samples[i % len(samples)].sample_id} {i}" for i in range(count))
    return Batch(inputs, ClassTarget.predicted(count), ids).to(backbone.device).bound(backbone)


def plain_bottleneck(network: torch.nn.Module, layer: str, batch: Batch, draws: int = 10, steps: int = 10) -> int:
    """IBA by a hook, a picture at a time, through the whole network; its statistics are the picture's own."""
    module = network.get_submodule(layer)
    mix: list[Callable[[torch.Tensor], torch.Tensor]] = []
    handle = module.register_forward_hook(lambda _, __, out: mix[0](out) if mix else None)
    kept: list[torch.Tensor] = []
    keeper = module.register_forward_hook(lambda _, __, out: kept.append(out.detach()))
    try:
        for row in range(len(batch)):
            one = batch.take([row])
            mix.clear()
            kept.clear()
            with torch.no_grad():
                network(one.inputs)
            mean, std = kept[0].mean(), kept[0].std()
            alpha = torch.full_like(kept[0], 5.0, requires_grad=True)
            optimiser = torch.optim.Adam([alpha], lr=1.0)
            inputs, target = one.inputs.expand(draws, -1, -1, -1), one.target.take(torch.zeros(draws, dtype=torch.long))

            def noised(out: torch.Tensor, alpha: torch.Tensor = alpha, mean: torch.Tensor = mean) -> torch.Tensor:
                share = torch.sigmoid(alpha)
                return share * out + (1 - share) * (mean + std * torch.randn_like(out))  # noqa: B023

            mix.append(noised)
            for _ in range(steps):
                optimiser.zero_grad()
                share = torch.sigmoid(alpha)
                information = -0.5 * (1 + 2 * (1 - share).log() - (1 - share) ** 2 - share**2)
                (target.loss(network(inputs)).mean() + 10 * information.mean()).backward()
                optimiser.step()
    finally:
        handle.remove()
        keeper.remove()
    return len(batch)


def _settings(group: str, name: str) -> dict:
    return yaml.safe_load((CONF / group / f"{name}.yaml").read_text())


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="efficientnet_lite0")
    parser.add_argument("--layer", default="bottleneck", help="a role or a name")
    parser.add_argument("--methods", nargs="+", default=["iba"])
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 16])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--max-passes", type=int, help="network rows at once")
    parser.add_argument("--plain-pictures", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    return parser.parse_args()


if __name__ == "__main__":
    if sys.argv[1:2] == ["metrics"]:
        import benchmark_metrics

        benchmark_metrics.main(sys.argv[2:])
    elif sys.argv[1:2] == ["methods"]:
        import benchmark_methods

        benchmark_methods.main(sys.argv[2:])
    else:
        main()
