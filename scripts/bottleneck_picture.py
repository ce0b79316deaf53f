"""Make docs/bottlenecks.png: two photographs, and what each of the five bottleneck methods finds in them.

    python scripts/bottleneck_picture.py

Settings are those of the YAMLs. Regression IBA takes the predicted class's logit as its output, and keeps it as it is
("deviation"), since the sample photographs come with a classifier.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import torch
import yaml
from torch import Tensor

from ibxai.backbones import Backbone
from ibxai.backbones.zoo import Zoo
from ibxai.config import build
from ibxai.datasets.sample import SampleDataset
from ibxai.report.figures import overlay
from ibxai.targets import ClassTarget, RegressionTarget
from ibxai.types import Batch

ROOT = Path(__file__).parent.parent
SHOWN = ("chelsea", "china")
METHODS = {
    "IBA": ("iba", False),
    "Inverse IBA": ("inverse_iba", False),
    "Regression IBA": ("iba", True),
    "Multi-layer IBA": ("multilayer_iba", False),
    "InputIBA": ("input_iba", False),
}


def main() -> None:
    zoo: Zoo = build(settings("backbone", "efficientnet_lite0"), "backbone")
    backbone = zoo.load(40)
    dataset = SampleDataset()
    samples = {sample.sample_id: sample for sample in dataset.samples()}
    inputs = torch.stack([backbone.preprocessing(dataset.read(sample))[0] for sample in samples.values()])
    reference = [Batch(inputs, ClassTarget.predicted(len(inputs)), tuple(samples))]
    shown = reference[0].take([list(samples).index(name) for name in SHOWN]).bound(backbone)
    pictures = backbone.preprocessing.picture_of(shown.inputs)
    figure, axes = plt.subplots(len(SHOWN), 1 + len(METHODS), figsize=(13, 4.9), layout="constrained")
    for column, (title, (name, regression)) in enumerate(METHODS.items(), start=1):
        attribute = build(settings("method", name), "method").fit(backbone, reference, 0)
        maps = of_logits(backbone, attribute, shown) if regression else attribute(shown).heatmap
        axes[0, column].set_title(title, fontsize=11)
        for row, heatmap in enumerate(maps):
            axes[row, column].imshow(overlay(pictures[row], heatmap.numpy()))
    names, probabilities = dataset.class_names, backbone(shown.inputs).softmax(1)
    for row, target in enumerate(shown.target.describe()):
        axes[row, 0].imshow(pictures[row])
        axes[row, 0].set_ylabel(f"{names[target] if names else target}, {probabilities[row, target]:.0%}", fontsize=11)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
    figure.savefig(ROOT / "docs/bottlenecks.png", dpi=100)


def of_logits(backbone: Backbone, attribute, batch: Batch) -> Tensor:  # type: ignore[no-untyped-def]
    """The maps of a regression whose output is the explained class's logit, row by row as each has its own class."""
    maps = []
    for row, output in enumerate(batch.target.describe()):
        one = batch.take([row])
        target = RegressionTarget("deviation", torch.zeros(1), output)
        maps.append(attribute(Batch(one.inputs, target, one.sample_ids).bound(backbone)).heatmap)
    return torch.cat(maps)


def settings(group: str, name: str) -> dict:
    return yaml.safe_load((ROOT / "conf" / group / f"{name}.yaml").read_text())


if __name__ == "__main__":
    main()
