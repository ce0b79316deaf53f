"""What every metric says of maps whose quality is known: the table in docs/metrics.md.

    python scripts/metric_extremes.py            # print the table
    python scripts/metric_extremes.py --write    # put it into docs/metrics.md

Nine dark pictures of 32 x 32 hold one bright patch of 4 x 4 each, in the colour of its class, and the network looks for
nothing else. The patch is the annotated region and the region of severity too. Maps: the patch itself (perfect), all
but the patch (worst), 1 everywhere, 0 everywhere, uniform noise. Means over the pictures, with the settings of
conf/metric/ but for what does not fit pictures of this size (`FITTED`).
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from ibxai.backbones import Backbone, freeze
from ibxai.config import build
from ibxai.targets import ClassTarget
from ibxai.types import Attribution, Batch

ROOT = Path(__file__).parent.parent
BEGIN, END = "<!-- extremes: begin -->\n", "<!-- extremes: end -->"
FITTED: Mapping[str, Mapping[str, Any]] = {
    "lesions": {"within": None},
    "pointing_game": {"tolerance": 2},
    "sensitivity_n": {"sets": 50},
    "sensitivity_n_regression": {"sets": 50},
    "insertion_igospp": {"resolution": 8},
    "deletion_igospp": {"resolution": 8},
}
SIZE, CELL = 32, 4


class Patches(nn.Module):
    """The logit of class c is 12 times what colour c exceeds one half by, summed over cells of 4 x 4 pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.pool, self.relu = nn.AvgPool2d(CELL), nn.ReLU()
        self.strength = nn.Parameter(torch.tensor(12.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.strength * self.relu(self.pool(x) - 0.5).sum((2, 3))


def pictures() -> Batch:
    """Three patches of each colour at places of their own; "target" and "severity" are the patch."""
    inputs = torch.zeros(9, 3, SIZE, SIZE)
    for row in range(9):
        top, left = CELL * (row % 4 + 2 * (row // 5)), CELL * ((3 * row + 1) % 8)
        inputs[row, row % 3, top : top + CELL, left : left + CELL] = 1
    patch = inputs.amax(1, keepdim=True)
    classes = ClassTarget(torch.arange(9) % 3)
    ids = tuple(f"picture {row}" for row in range(9))
    return Batch(inputs, classes, ids, ids, {"target": patch.bool(), "severity": patch})


def maps(batch: Batch) -> dict[str, Tensor]:
    patch = batch.regions["severity"][:, 0]
    noise = torch.rand(patch.shape, generator=torch.Generator().manual_seed(0))
    return {
        "perfect": patch,
        "worst": 1 - patch,
        "constant": torch.ones_like(patch),
        "zero": torch.zeros_like(patch),
        "random": noise,
    }


def rows() -> list[list[str]]:
    """The lines of the table: metric, direction, and the mean of its main value for each map."""
    batch, backbone = pictures(), freeze(Patches(), (3, SIZE, SIZE), name="patches")
    lines = []
    for path in sorted((ROOT / "conf" / "metric").glob("*.yaml")):
        ((name, settings),) = yaml.safe_load(path.read_text(encoding="utf-8")).items()
        metric = build({**settings, **FITTED.get(name, {})}, f"metric.{name}")
        lines.append(
            [f"`{name}`", "higher" if metric.higher_is_better else "lower"]
            + [value_of(metric, backbone, batch, heatmap) for heatmap in maps(batch).values()]
        )
    return lines


def value_of(metric: Any, backbone: Backbone, batch: Batch, heatmap: Tensor) -> str:
    found = metric(backbone, batch, Attribution(heatmap, "score"))
    value = float(found["auc" if "auc" in found else "value"].mean())
    return "none" if value != value else f"{value:.2f}".replace("-0.00", "0.00")


def table() -> str:
    header = ["metric", "better", *maps(pictures())]
    lines = [header, ["---", "---", *["---:"] * 5], *rows()]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put the table into docs/metrics.md")
    made = table()
    if not parser.parse_args().write:
        print(made, end="")
        return
    page = ROOT / "docs" / "metrics.md"
    before, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    page.write_text(before + BEGIN + made + END + rest.partition(END)[2], encoding="utf-8")


if __name__ == "__main__":
    main()
