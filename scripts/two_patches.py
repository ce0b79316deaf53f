"""Two patches that each suffice for the class: which methods mark one of them, and which mark both?

    python scripts/two_patches.py

CheXplain's first figure as planted truth. The class is shown by one bright red cell of 4 x 4 pixels anywhere: a second
one adds nothing, and a green one means nothing. A method marks a patch when at least a tenth of its heat lies in it.
Everything runs with its YAML's settings, but without smoothing, as the evidence is a single cell of the layer.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import yaml
from torch import Tensor, nn

from ibxai.backbones import freeze
from ibxai.config import build
from ibxai.targets import ClassTarget
from ibxai.types import Batch

CONF = Path(__file__).parent.parent / "conf"
CELLS, CELL = 8, 4
BARE = {"smoothing": 0.0}
METHODS: dict[str, tuple[str, dict]] = {
    "iba": ("iba", BARE),
    "iba, 100 steps": ("iba", BARE | {"steps": 100}),
    "inverse_iba": ("inverse_iba", BARE),
    "multilayer_iba": ("multilayer_iba", BARE | {"layers": ["early", "bottleneck"]}),
    "input_iba": ("input_iba", BARE),
    "gradcam": ("gradcam", {}),
    "integrated_gradients": ("integrated_gradients", {"channels": "sum_abs"}),
    "random": ("random", {}),
}


class Either(nn.Module):
    """[B, 3, 32, 32] -> [B, 2]: class 0 by the brightest red cell; class 1 has the same logit whatever the picture."""

    def __init__(self) -> None:
        super().__init__()
        self.pixels = nn.Conv2d(3, 3, 1, groups=3)
        self.cells = nn.Conv2d(3, 3, CELL, CELL, groups=3)
        self.relu = nn.ReLU()
        self.logits = nn.Linear(1, 2)
        with torch.no_grad():
            for layer, weight in ((self.pixels, 1.0), (self.cells, 1 / CELL**2)):
                layer.weight.fill_(weight)
                layer.bias.zero_()  # type: ignore[union-attr]
            self.logits.weight.copy_(torch.tensor([[60.0], [0.0]]))
            self.logits.bias.copy_(torch.tensor([0.0, 10.0]))

    def forward(self, x: Tensor) -> Tensor:
        best = self.relu(self.cells(self.pixels(x))[:, 0] - 0.5).flatten(1).amax(1, keepdim=True)
        return self.logits(best)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=60)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    roles = {"early": "pixels", "bottleneck": "cells", "gradcam": "cells"}
    backbone = freeze(Either(), (3, 32, 32), roles, name="either")
    pictures, places = planted(options.pictures)
    ids = tuple(f"picture {i}" for i in range(options.pictures))
    batch = Batch(pictures, ClassTarget(torch.zeros(options.pictures, dtype=torch.long)), ids)
    reference = [background(192)]
    print(f"{options.pictures} pictures, {options.seeds} seeds; share of the runs in which a method marks\n")
    print("| method | neither | one patch | both | heat in the two |\n|---|---|---|---|---|")
    for label, (name, changes) in METHODS.items():
        counts, heat = [], []
        for seed in range(options.seeds):
            heatmap = method(name, changes).fit(backbone, reference, seed)(batch).heatmap
            marked, inside = judged(heatmap, places)
            counts.append(marked)
            heat.append(inside)
        marked, inside = torch.cat(counts), torch.cat(heat)
        shares = " | ".join(f"{(marked == n).float().mean():.0%}" for n in range(3))
        print(f"| {label} | {shares} | {inside.mean():.0%} |")


def method(name: str, changes: dict):  # type: ignore[no-untyped-def]
    node = yaml.safe_load((CONF / "method" / f"{name}.yaml").read_text())
    if name == "input_iba":
        node["feature"] |= {"smoothing": 0.0}
        node["direct"] |= {"smoothing": 0.0}
    return build(node | changes, "method")


def planted(count: int) -> tuple[Tensor, Tensor]:
    """(pictures [N, 3, 32, 32], cells [N, 2, 2] of the two red patches); the first is a little brighter."""
    draw = torch.Generator().manual_seed(0)
    pictures = 0.1 * torch.rand(count, 3, CELLS * CELL, CELLS * CELL, generator=draw)
    places = torch.zeros(count, 2, 2, dtype=torch.long)
    for i in range(count):
        first, second, green = torch.randperm(CELLS**2, generator=draw)[:3].tolist()
        for place, channel, value in ((first, 0, 0.95), (second, 0, 0.9), (green, 1, 0.9)):
            pictures[i, channel][cell(place // CELLS, place % CELLS)] = value
        places[i] = torch.tensor([[p // CELLS, p % CELLS] for p in (first, second)])
    return pictures, places


def background(count: int) -> Batch:
    """Reference pictures: every cell of every colour bright with one chance in ten."""
    draw = torch.Generator().manual_seed(1)
    bright = (torch.rand(count, 3, CELLS, CELLS, generator=draw) < 0.1).float() * 0.9
    pictures = bright.repeat_interleave(CELL, 2).repeat_interleave(CELL, 3) + 0.05
    names = tuple(f"reference {i}" for i in range(count))
    return Batch(pictures, ClassTarget(torch.zeros(count, dtype=torch.long)), names)


def cell(row: int, column: int) -> tuple[slice, slice]:
    return slice(CELL * row, CELL * (row + 1)), slice(CELL * column, CELL * (column + 1))


def judged(heatmap: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
    """(patches marked [N], share of the heat in the two [N]); of signed maps the positive part counts."""
    heatmap = heatmap.clamp_min(0)
    heatmap = heatmap / heatmap.sum((1, 2), keepdim=True).clamp_min(1e-12)
    shares = torch.tensor(
        [[float(one[cell(*place)].sum()) for place in pair.tolist()] for one, pair in zip(heatmap, places, strict=True)]
    )
    return (shares >= 0.1).sum(1), shares.sum(1)


if __name__ == "__main__":
    main()
