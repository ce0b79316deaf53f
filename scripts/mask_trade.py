"""What passes buy: iGOS++'s deletion and insertion at several numbers of network passes, beside its line search.

    python scripts/mask_trade.py PICTURES                     # 12 pictures drawn from an ImageNet folder
    python scripts/mask_trade.py PICTURES --pictures 100 --cases armijo scaled --table docs/masks.md
    python scripts/mask_trade.py PICTURES --set resolution=224

One picture after another, one thread: seconds are those of the process, and a picture's passes its own. Every map is
kept under --out, so that a run that was stopped goes on, and cases can join later; a changed setting is another file.
Prints means with 95 % bootstrap intervals of the paired differences to the line search, over the pictures that both
have; writes the plot. The metrics are deletion_igospp and insertion_igospp.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: threads that wait must not count as work

import matplotlib.pyplot as plt
import numpy as np
import torch
import yaml

from ibxai.backbones import Backbone
from ibxai.config import build
from ibxai.datasets.imagenet import ImageNet
from ibxai.memory import keep_freed_memory
from ibxai.pipeline import ROWS_AT_ONCE
from ibxai.report.statistics import mean_intervals
from ibxai.targets import ClassTarget
from ibxai.types import Attribution, Batch

ROOT = Path(__file__).parent.parent
BEGIN, END = "<!-- trade: begin -->\n", "<!-- trade: end -->"
CASES: Mapping[str, Mapping[str, Any]] = {
    "armijo": {"step": "armijo"},
    "scaled": {},
    "scaled, all intervals": {"intervals": 20},
    "scaled, 5 intervals": {"intervals": 5},
    "scaled, 5 intervals, rate 0.03": {"intervals": 5, "learning_rate": 0.03},
    "scaled, 30 iterations": {"iterations": 30},
    "adam, 5 intervals, rate 0.1": {"step": "adam", "intervals": 5, "learning_rate": 0.1},
}
Row = dict[str, float]


def main() -> None:
    options = _options()
    torch.set_num_threads(1)
    keep_freed_memory()
    backbone = build(settings("backbone", options.backbone), "backbone").load(ROWS_AT_ONCE["cpu"])
    dataset = ImageNet(root=options.root)
    samples = dataset.samples()
    drawn = torch.randperm(len(samples), generator=torch.Generator().manual_seed(5))[: options.pictures]
    extra = dict(item.split("=", 1) for item in options.set)
    rows: dict[str, dict[str, Row]] = {case: {} for case in options.cases}
    for i in drawn.tolist():  # all cases of a picture before the next one: every stop leaves pairs
        for case in options.cases:
            method = settings("method", options.method) | CASES[case] | {k: yaml.safe_load(v) for k, v in extra.items()}
            kept = options.out / f"{samples[i].sample_id}-{digest([options.backbone, method])}.json"
            if not kept.exists():
                inputs = backbone.preprocessing(dataset.read(samples[i]))[0][None]
                batch = Batch(inputs, ClassTarget.predicted(1), (samples[i].sample_id,)).bound(backbone)
                write(kept, explained(backbone, method, batch))
            rows[case][samples[i].sample_id] = json.loads(kept.read_text())
        print(f"{samples[i].sample_id}: {len(rows[options.cases[0]])} of {len(drawn)}", flush=True)
    text = table(rows)
    print(text)
    if options.table:
        replace(options.table, text)
    if options.plot:
        plot(rows, options.plot)


def explained(backbone: Backbone, method: Mapping[str, Any], batch: Batch) -> Row:
    """Passes, seconds and scores of one picture's map, and the map's share of cells that stayed open."""
    attribute = build(dict(method), "method").fit(backbone, [], 0)
    with backbone.counting() as passes:
        start = time.process_time()
        attribution = attribute(batch)
        seconds = time.process_time() - start
    both = passes.get("backward", 0)
    found = {"forward": passes["forward"] - both, "forward_backward": both, "seconds": seconds}
    found["combined_loss"] = float(attribution.diagnostics["combined_loss"])
    return found | {name: judged(backbone, batch, attribution, name) for name in ("deletion", "insertion")}


def judged(backbone: Backbone, batch: Batch, attribution: Attribution, name: str) -> float:
    """The mean over the batch of deletion_igospp or insertion_igospp."""
    metric = build(next(iter(settings("metric", f"{name}_igospp").values())), "metric")
    return float(metric(backbone, batch, attribution)["auc"].mean())


def table(rows: Mapping[str, Mapping[str, Row]]) -> str:
    lines = [
        "| | forward only | forward + backward | CPU s | deletion | insertion | deletion - armijo | "
        "insertion - armijo |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    armijo = rows.get("armijo", {})
    for case, own in rows.items():
        means = {key: np.mean([row[key] for row in own.values()]) for key in next(iter(own.values()))}
        cells = [f"{means['forward']:,.0f}", f"{means['forward_backward']:,.0f}", f"{means['seconds']:.1f}"]
        cells += [f"{means['deletion']:.3f}", f"{means['insertion']:.3f}"]
        cells += [difference(own, armijo, key) for key in ("deletion", "insertion")]
        lines.append(f"| {case} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + f"\n\n{len(next(iter(rows.values())))} pictures.\n"


def difference(own: Mapping[str, Row], other: Mapping[str, Row], key: str) -> str:
    """The paired difference with its 95 % interval; nothing of a case with itself."""
    shared = [name for name in own if name in other]
    if own is other or not shared:
        return ""
    values = np.array([[own[name][key] - other[name][key]] for name in shared])
    low, high = mean_intervals(values, shared)
    return f"{values.mean():+.3f} [{low[0]:+.3f}, {high[0]:+.3f}]"


def plot(rows: Mapping[str, Mapping[str, Row]], path: Path) -> None:
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for axis, key in zip(axes, ("deletion", "insertion"), strict=True):
        for case, own in rows.items():
            passes = np.mean([row["forward"] + row["forward_backward"] for row in own.values()])
            mean = np.mean([row[key] for row in own.values()])
            axis.plot(passes, mean, "s" if case == "armijo" else "o")
            axis.annotate(case, (passes, mean), textcoords="offset points", xytext=(5, 4), fontsize=8)
        axis.set(xscale="log", xlabel="passes a picture", ylabel=key)
        axis.margins(x=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)


def write(path: Path, row: Mapping[str, float]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(row))
    part.replace(path)


def replace(path: Path, text: str) -> None:
    """Puts the table between its marks."""
    before, rest = path.read_text().split(BEGIN)
    path.write_text(before + BEGIN + text + END + rest.split(END)[1])


def digest(value: object) -> str:
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=6).hexdigest()


def settings(group: str, name: str) -> dict[str, Any]:
    return yaml.safe_load((ROOT / "conf" / group / f"{name}.yaml").read_text())


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", help="an ImageNet validation folder, as dataset.root")
    parser.add_argument("--backbone", default="efficientnet_lite0")
    parser.add_argument("--method", default="igospp", choices=["igospp", "igos"])
    parser.add_argument("--pictures", type=int, default=12)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=CASES)
    parser.add_argument("--set", nargs="*", default=[], metavar="SETTING=VALUE", help="of the method, for all cases")
    parser.add_argument("--out", type=Path, default=Path("outputs/mask_trade"))
    parser.add_argument("--table", type=Path, help="a page that holds the marks of the table")
    parser.add_argument("--plot", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
