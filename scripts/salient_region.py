"""The salient-region paper on real MNIST and CIFAR-10: masks, accuracies and histograms, beside its numbers.

    python scripts/salient_region.py MNIST_ROOT OUTPUTS [NAME ...] [--cifar10 CIFAR10_ROOT]

Each experiment is one `ibxai train`, so what was killed goes on behind its last epoch, and what is done is not done
again. Its criteria, minutes and figures land in OUTPUTS/salient_region/. Without names all are made, in this order, and
those of CIFAR-10 when its folder is given.
The trainings are far shorter than a paper's: see docs/boolean_masks.md for what that changes.
"""

from __future__ import annotations

import argparse
import csv
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from hydra import compose, initialize_config_module
from matplotlib.figure import Figure
from omegaconf import OmegaConf
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from ibxai import train
from ibxai.config import make_training
from ibxai.datasets.loading import load_batches
from ibxai.draws import sample_keys, uniform
from ibxai.memory import keep_freed_memory
from ibxai.methods.masker_model import MaskerModel
from ibxai.methods.masker_objective import boolean_mask, with_rectangles
from ibxai.methods.masker_training import MaskerLearner
from ibxai.store import write_atomically
from ibxai.targets import Label
from ibxai.types import Sample

_ANCHORS = ("method=boolean_masker_anchors", "dataset=mnist_anchors")
_CONDITIONAL = (  # its own entropies have weight 1, so the mask stays near where it starts
    *("method.objective.name=conditional", "method.objective.entropy=1", "method.objective.initial_rho=0.5"),
    "method.control.beta=0.05",
)
EXPERIMENTS: dict[str, tuple[str, ...]] = {
    "anomaly": ("method=boolean_masker", "dataset=mnist_anomaly"),
    "anchors": (*_ANCHORS, "method.control.along=1", "method.control.tuning=0"),
    "anchors_randomised": (*_ANCHORS, "method.objective.rectangles=1"),
    "distractor4": ("method=boolean_masker_digits", "dataset=mnist_distractor4"),
    "distractor2": ("method=boolean_masker_digits", "dataset=mnist_distractor2"),
    "anchors_conditional": (*_ANCHORS, "dataset.noise=128", *_CONDITIONAL),
    "anomaly_conditional": ("method=boolean_masker", "dataset=mnist_anomaly", *_CONDITIONAL),
    "cifar10_anomaly": ("method=boolean_masker_cifar10", "dataset=cifar10_anomaly"),
}
DRAWS, SHOWN, TUNING_STEPS, NORM_BINS = 4, 8, 500, 20
SIDES = (0.2, 0.5)  # of the rectangles that every masker is judged with


@dataclass(frozen=True)
class Pictures:
    """Scenes, their classes, the region that defines the class (all False: none), and who they are."""

    inputs: Tensor
    labels: Tensor
    inside: Tensor
    ids: tuple[str, ...]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", help="MNIST's folder")
    parser.add_argument("outputs", type=Path)
    parser.add_argument("names", nargs="*", choices=[*EXPERIMENTS, []], help="which experiments")
    parser.add_argument("--cifar10", help="CIFAR-10's folder")
    given = parser.parse_args()
    if given.cifar10 is None and any(name.startswith("cifar10") for name in given.names):
        parser.error("--cifar10 is missing: the folder with its pictures.")
    keep_freed_memory()
    torch.set_num_threads(1)
    for name in given.names or EXPERIMENTS:
        root = given.cifar10 if name.startswith("cifar10") else given.root
        if root is None:
            continue
        plan = _plan([*EXPERIMENTS[name], f"dataset.root={root}", f"outputs={given.outputs}"])
        trained = train.run(plan)
        splits = train.split(plan)
        learner = plan.trainable.learner(plan, splits)
        assert isinstance(learner, MaskerLearner)
        model = learner.model()
        model.load_state_dict(load_file(trained.weights))
        model.eval().requires_grad_(False)
        folder = given.outputs / "salient_region"
        test = _pictures(learner, splits.test)
        numbers = {"minutes": _minutes(trained.weights.parent / "curves.csv"), **_criteria(trained.weights)}
        numbers |= {f"accuracy of {c}": value for c, value in _by_class(model, test, plan.class_names, False).items()}
        numbers |= {f"randomised, {c}": value for c, value in _by_class(model, test, plan.class_names, True).items()}
        numbers["accuracy of the mask's l1-norm alone"] = _by_norm(model, test)
        if name == "anchors":
            _tuned(model, _pictures(learner, splits.train))
            tuned = _by_class(model, test, plan.class_names, True)
            numbers |= {f"randomised and tuned, {c}": value for c, value in tuned.items()}
        write_atomically(folder / f"{name}.json", json.dumps(numbers, indent=1).encode())
        _draw(model, test, folder / f"{name}.png")
        print(name, json.dumps(numbers))


def _plan(overrides: Sequence[str]) -> train.TrainPlan:
    with initialize_config_module("ibxai.conf", version_base="1.3"):
        cfg = compose("train", [*overrides, "device=cpu"], return_hydra_config=True)
    choices = OmegaConf.to_container(cfg.hydra.runtime.choices)
    OmegaConf.set_struct(cfg, False)
    cfg.pop("hydra")
    assert isinstance(choices, dict)
    return make_training(cfg, {str(group): name for group, name in choices.items()}, {}, "scripts/salient_region.py")


def _minutes(curves: Path) -> float:
    with curves.open() as file:
        return round(sum(float(row["seconds"]) for row in csv.DictReader(file)) / 60, 1)


def _criteria(weights: Path) -> dict[str, float]:
    return {score["metric"]: score["value"] for score in json.loads((weights.parent / "test.json").read_bytes())}


def _pictures(learner: MaskerLearner, samples: Sequence[Sample]) -> Pictures:
    inputs, inside = [], []
    labels: list[int | None] = []
    ids: list[str] = []
    work = [(sample, (0,)) for sample in samples]
    for loaded in load_batches(learner.plan.dataset, work, Label(), learner.preprocessing, 256, 0):
        assert loaded.batch is not None
        batch = loaded.batch
        none = torch.zeros(len(batch), 1, *batch.inputs.shape[2:], dtype=torch.bool)
        inputs.append(batch.inputs)
        labels += loaded.labels
        inside.append(batch.regions.get("target", none).any(1))
        ids += batch.sample_ids
    return Pictures(torch.cat(inputs), torch.tensor(labels), torch.cat(inside), tuple(ids))


def _said(model: MaskerModel, pictures: Pictures, draw: int, randomised: bool) -> Tensor:
    keys = sample_keys(0, pictures.ids, "salient region")
    logits = model.logits(pictures.inputs)
    mask = boolean_mask(logits, uniform(keys, 2 * draw, logits.shape[1:]))
    if randomised:
        mask = with_rectangles(mask, uniform(keys, 2 * draw + 1, (1, 4)), SIDES)
    return model.says(pictures.inputs, mask)


def _by_class(model: MaskerModel, pictures: Pictures, names: Sequence[str], randomised: bool) -> dict[str, float]:
    with torch.no_grad():
        said = torch.stack([_said(model, pictures, draw, randomised).argmax(1) for draw in range(DRAWS)])
    right = (said == pictures.labels).float().mean(0)
    found = {name: float(right[pictures.labels == c].mean()) for c, name in enumerate(names)}
    return {**found, "all": float(right.mean())}


def _by_norm(model: MaskerModel, pictures: Pictures) -> float:
    """Share right of the second half when the class is the commonest one, in the first half, of masks as large."""
    with torch.no_grad():
        norms = model.logits(pictures.inputs).sigmoid().mean((1, 2, 3))
    half = len(norms) // 2
    edges = norms[:half].quantile(torch.linspace(0, 1, NORM_BINS + 1)[1:-1])
    bins = torch.bucketize(norms, edges)
    counts = torch.zeros(NORM_BINS, model.classes)
    counts.index_put_((bins[:half], pictures.labels[:half]), torch.ones(half), accumulate=True)
    return float((counts.argmax(1)[bins[half:]] == pictures.labels[half:]).float().mean())


def _tuned(model: MaskerModel, pictures: Pictures) -> None:
    """The classifier alone goes on with randomised masks, in place (sec. 4.3)."""
    assert model.classifier is not None
    model.classifier.requires_grad_(True)
    optimizer = torch.optim.Adam(model.classifier.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(0)
    for step in range(TUNING_STEPS):
        rows = torch.randint(len(pictures.ids), (64,), generator=generator)
        part = Pictures(
            pictures.inputs[rows], pictures.labels[rows], pictures.inside[rows],
            tuple(pictures.ids[i] for i in rows.tolist()),
        )  # fmt: skip
        optimizer.zero_grad()
        F.cross_entropy(_said(model, part, 1_000 + step, True), part.labels).backward()
        optimizer.step()
    model.classifier.requires_grad_(False)


def _draw(model: MaskerModel, pictures: Pictures, path: Path) -> None:
    """Scenes, rho and one mask of them, and below the histograms of figs. 8, 10 to 12."""
    with torch.no_grad():
        rho = model.logits(pictures.inputs).sigmoid()[:, 0]
        keys = sample_keys(0, pictures.ids, "salient region")
        mask = (uniform(keys, 0, rho.shape[1:]) < rho).float()
    shown = model.pixels(pictures.inputs[:SHOWN]).movedim(1, -1)  # one grey or three colours
    figure = Figure(figsize=(SHOWN, 6), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=[3.2, 2])  # type: ignore[misc]  # an array of two
    axes = above.subplots(3, SHOWN)
    for row, planes in enumerate((shown, rho, shown * mask[:SHOWN, ..., None])):
        for column in range(SHOWN):
            axes[row, column].imshow(planes[column], cmap="gray", vmin=0, vmax=1)
            axes[row, column].axis("off")
    annotated = pictures.inside.flatten(1).any(1)
    mean: Callable[[Tensor, Tensor], Tensor] = lambda values, plane: (values * plane).sum((1, 2)) / plane.sum((1, 2))  # noqa: E731
    left, right = below.subplots(1, 2)
    sizes = rho.mean((1, 2))
    span = (0.0, max(float(sizes.max()), 0.01))  # masks that are all alike too
    for c in range(model.classes):
        left.hist(sizes[pictures.labels == c].numpy(), bins=40, range=span, alpha=0.5, label=f"class {c}")
    left.set(xlabel="mean of rho over the picture", ylabel="pictures")
    for plane, label in ((pictures.inside, "inside"), (~pictures.inside, "outside")):
        values = mean(rho[annotated], plane[annotated])
        right.hist(values.numpy(), bins=40, range=(0, 1), alpha=0.5, label=f"{label} the region")
    right.set(xlabel="mean of rho")
    for ax in (left, right):
        ax.legend(frameon=False, fontsize=7)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
