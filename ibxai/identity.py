"""What determines a result, and what is written down about how it came to be."""

from __future__ import annotations

import dataclasses
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import torch

from ibxai.backbones import Backbone
from ibxai.datasets.loading import sample_table_digest
from ibxai.store import MetricKey
from ibxai.types import Dataset, Method, Metric, Sample, Study

if TYPE_CHECKING:
    from ibxai.pipeline import Plan

NUMERIC_MODE = "float32"
_PACKAGES = ("ibxai", "torch", "torchvision", "timm", "hydra-core", "numpy")


def identify(plan: Plan, samples: Sequence[Sample], backbone: Backbone) -> dict[str, Any]:
    """All that changes a heatmap, and nothing else: where files lie, the device and sizes of work stay out."""
    identity = {
        "dataset": {"name": plan.dataset.name, "samples": sample_table_digest(samples)},
        "backbone": {"name": backbone.name, "weights": backbone.digest},
        "preprocessing": dataclasses.asdict(backbone.preprocessing),
        "method": _described(plan.method),
        "target": _described(plan.target),
        "seed": plan.seed,
        "numeric": NUMERIC_MODE,
    }
    if uses_reference(plan.method):
        identity["reference"] = sample_table_digest(plan.dataset.reference())
    return identity | _attacked(plan)


def uses_reference(method: Method) -> bool:
    """Whether the reference split changes the method's heatmaps."""
    return getattr(method, "uses_reference", True)


def uses_regions(metric: Metric | Study) -> bool:
    """Whether the dataset's annotations change the metric's scores, or a study's cells."""
    return getattr(metric, "uses_regions", False)


def annotations_digest(dataset: Dataset) -> str:
    """A digest of what the dataset's regions are made from; "" where it has none."""
    return dataset.annotations() if hasattr(dataset, "annotations") else ""


def metric_key(name: str, metric: Metric, annotations: str = "") -> MetricKey:
    """What determines a metric's scores, given the heatmaps; with the direction in which they improve.

    annotations: the dataset's, which count where the metric reads regions.
    """
    settings = _described(metric)
    if uses_regions(metric):
        settings["annotations"] = annotations
    if hasattr(metric, "higher_is_better"):
        settings["higher_is_better"] = metric.higher_is_better
    return MetricKey(name, settings)


def study_key(name: str, study: Study, samples: Sequence[Sample], dataset: Dataset) -> MetricKey:
    """What determines a study's cells, given the run: its settings, the explained samples, and the train split."""
    settings = {**_described(study), "samples": sample_table_digest(samples)}
    if hasattr(dataset, "in_split"):
        settings["train"] = sample_table_digest(dataset.in_split("train"))
    if uses_regions(study):
        settings["annotations"] = annotations_digest(dataset)
    return MetricKey(name, settings)


def responses_identity(plan: Plan, backbone: Backbone, metric: Metric) -> dict[str, Any]:
    """All that changes what the network says of the pictures that a metric shows it whatever the map."""
    return {
        "metric": _described(metric),
        "samples": sample_table_digest(plan.dataset.samples()),
        "weights": backbone.digest,
        "preprocessing": dataclasses.asdict(backbone.preprocessing),
        "numeric": NUMERIC_MODE,
        **_attacked(plan),
    }


def _attacked(plan: Plan) -> dict[str, Any]:
    """What an attack adds to an identity; of clean inputs nothing, so that their folders keep their names."""
    return {} if plan.attack is None else {"attack": _described(plan.attack)}


def _described(part: Any) -> dict[str, Any]:
    """A part's class, version and settings, defaults included."""
    kind = f"{type(part).__module__}.{type(part).__qualname__}"
    return {"class": kind, "version": getattr(part, "version", 1), **dataclasses.asdict(part)}


def provenance(plan: Plan, backbone: Backbone, identity: Mapping[str, Any]) -> dict[str, Any]:
    """What describes a run: its parts, versions, identity. The rest is in its sessions."""
    return {
        "dataset": plan.dataset.name,
        "backbone": backbone.name,
        "weights": "random weights" if backbone.random_weights else f"sha256 {backbone.digest}",
        "method": plan.method_name,
        "reference": plan.dataset.reference_note if uses_reference(plan.method) else None,
        "identity": identity,
        "versions": {"python": platform.python_version(), **{name: version(name) for name in _PACKAGES}},
        "finished": None,
    }


def session_of(plan: Plan, backbone: Backbone) -> dict[str, Any]:
    """What describes one process's part in a run."""
    gpu = torch.cuda.get_device_name(backbone.device) if backbone.device.type == "cuda" else ""
    return {
        "command": plan.command,
        "shard": str(plan.shard or "1/1"),
        "device": f"{backbone.device}, {gpu or f'{platform.machine()}, {torch.get_num_threads()} threads'}",
    }


def warnings_of(plan: Plan, backbone: Backbone) -> list[str]:
    """What a reader of the run must be told before anything else."""
    notes = []
    if backbone.random_weights:
        notes.append("Random weights: the network is untrained, and its explanations mean nothing.")
    if plan.attack is not None:
        settings = ", ".join(f"{name} {value}" for name, value in dataclasses.asdict(plan.attack).items())  # type: ignore[call-overload]
        notes.append(f"Adversarial inputs: what is explained and judged is changed by {plan.attack_name} ({settings}).")
    return notes
