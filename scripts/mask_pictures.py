"""Pictures of optimised masks for docs/masks.md: maps, what their best 6 % of the pixels show, deletion and insertion.

    python scripts/mask_pictures.py thin         # one long thin object at 224: I-GOS beside iGOS++     (paper, Fig. 1)
    python scripts/mask_pictures.py smoothness   # BTV beside TV over lambda2                           (Fig. 10)
    python scripts/mask_pictures.py failure      # of the photographs the one with the lowest confidence (Fig. 6)

Photographs of the sample dataset, EfficientNet-lite0, settings of the YAMLs but for those that a title names.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
import yaml
from torch import Tensor

from ibxai.backbones import Backbone
from ibxai.config import build
from ibxai.datasets.sample import SampleDataset
from ibxai.memory import keep_freed_memory
from ibxai.methods.perturbation import baseline_picture
from ibxai.metrics.insertion import pixel_ranks
from ibxai.report.figures import overlay
from ibxai.targets import ClassTarget
from ibxai.types import Attribution, Batch

ROOT = Path(__file__).parent.parent
SHOWN = 0.06  # of the pixels, as in Figs. 1 and 11
Panels = Mapping[str, tuple[str, Mapping[str, Any]]]  # title -> (method, settings)
PANELS: Mapping[str, Panels] = {
    "thin": {
        "I-GOS, 224": ("igos", {"resolution": 224}),
        "iGOS++, 224": ("igospp", {"resolution": 224}),
    },
    "smoothness": {
        f"{smoothness.upper()}, lambda2 {weight:g}": (
            "igospp",
            {"resolution": 224, "smoothness": smoothness, "lambda2": weight},
        )
        for smoothness in ("btv", "tv")
        for weight in (2.0, 20.0, 200.0)
    },
    "failure": {"iGOS++, 28": ("igospp", {})},
}


def main() -> None:
    which = _options().figure
    keep_freed_memory()
    backbone = build(settings("backbone", "efficientnet_lite0"), "backbone").load(40)
    dataset = SampleDataset()
    samples = {sample.sample_id: sample for sample in dataset.samples()}
    inputs = torch.stack([backbone.preprocessing(dataset.read(sample))[0] for sample in samples.values()])
    batch = Batch(inputs, ClassTarget.predicted(len(inputs)), tuple(samples)).bound(backbone)
    probability = batch.target.score(backbone(batch.inputs), "probability")
    row = int(probability.argmin()) if which == "failure" else list(samples).index("rocket")
    batch, names = batch.take([row]), dataset.class_names
    panels = PANELS[which]
    figure, axes = plt.subplots(
        3, 1 + len(panels), figsize=(2.6 * (1 + len(panels)), 6.6), layout="constrained", squeeze=False
    )
    picture, target = backbone.preprocessing.picture_of(batch.inputs)[0], int(batch.target.describe()[0])
    axes[0, 0].imshow(picture)
    axes[0, 0].set_title(f"{names[target] if names else target}, {probability[row]:.0%}", fontsize=10)
    axes[1, 0].set_visible(False)
    axes[2, 0].set_visible(False)
    for column, (title, (name, changed)) in enumerate(panels.items(), start=1):
        chosen = {**settings("method", name), **changed}
        attribution = build(chosen, "method").fit(backbone, [], 0)(batch)
        axes[0, column].imshow(overlay(picture, attribution.heatmap[0].numpy()))
        axes[0, column].set_title(title, fontsize=10)
        shown = best_alone(batch, attribution)
        says = batch.target.score(backbone(shown), "probability")
        axes[1, column].imshow(backbone.preprocessing.picture_of(shown)[0])
        axes[1, column].set_title(f"{SHOWN:.0%} of the pixels alone: {float(says):.0%}", fontsize=8)
        cells = chosen["resolution"]
        told = [
            curve(backbone, batch, attribution, which, cells, axes[2, column]) for which in ("deletion", "insertion")
        ]
        axes[2, column].set_xlabel(", ".join(told), fontsize=8)
        axes[2, column].set(ylim=(0, 1), xticks=[0, 1])
    axes[2, 1].legend(frameon=False, fontsize=8)
    for axis in axes[:2].flat:
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
    figure.savefig(ROOT / f"docs/masks_{which}.png", dpi=100)


def best_alone(batch: Batch, attribution: Attribution) -> Tensor:
    """The map's best pixels in the blurred picture, the methods' own baseline (Fig. 1)."""
    baseline = baseline_picture(batch.inputs, "blur", 50.0, 0.0, 51)
    rank = pixel_ranks(attribution.heatmap, batch.sample_ids).view_as(attribution.heatmap)
    return torch.where((rank < SHOWN * rank[0].numel())[:, None], batch.inputs, baseline)


def curve(
    backbone: Backbone, batch: Batch, attribution: Attribution, name: str, resolution: int, axis: plt.Axes
) -> str:
    """Draws the score over the share of cells that went or came, cells as large as the mask's."""
    chosen = {**next(iter(settings("metric", f"{name}_igospp").values())), "resolution": resolution}
    found = build(chosen, "metric")(backbone, batch, attribution)
    axis.plot(found["fraction"][0], found["curve"][0], label=name)
    return f"{name} {float(found['auc']):.2f}"


def settings(group: str, name: str) -> dict[str, Any]:
    return yaml.safe_load((ROOT / "conf" / group / f"{name}.yaml").read_text())


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("figure", choices=PANELS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
