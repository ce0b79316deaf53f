"""What every metric must keep to, whatever it judges. Metrics are found by their YAMLs: a new one joins by itself."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from networks import batch_of, noise_pictures, patch_pictures, patches_backbone, relative, small_backbone
from omegaconf import OmegaConf
from test_method_contract import state_of
from torch import Tensor

from ibxai.backbones import Backbone
from ibxai.catalogue import entries
from ibxai.config import build
from ibxai.errors import UserError
from ibxai.targets import ClassTarget, RegressionTarget
from ibxai.types import Attribution, Batch, Metric

# Settings that only make a metric cheaper, or fit it to pictures of 32 x 32, where its YAML's would not.
QUICK: Mapping[str, Mapping[str, Any]] = {
    "sensitivity_n": {"points": 4, "sets": 12},
    "sensitivity_n_regression": {"points": 4, "sets": 12},
    "deletion_chexplain": {"step": 100},
    "insertion_chexplain": {"step": 100},
    "deletion_input_iba": {"step": 100},
    "insertion_input_iba": {"step": 100},
    "pointing_game": {"tolerance": 0},
}
NAMES = list(entries()["metric"])
MAIN = ("auc", "value")
NOT_ANNOTATED = 2  # this row of `five`


def node_of(name: str) -> dict[str, Any]:
    nodes = OmegaConf.to_container(OmegaConf.create(entries()["metric"][name].text), resolve=True)
    assert isinstance(nodes, dict)
    assert list(nodes) == [name]
    return nodes[name]


def metric_of(name: str, **settings: Any) -> Metric:
    metric = build({**node_of(name), **QUICK.get(name, {}), **settings}, f"metric.{name}")
    assert isinstance(metric, Metric)
    return metric


def five() -> Batch:
    boxes = torch.zeros(5, 2, 32, 32, dtype=torch.bool)
    boxes[0, 0, 4:14, 6:20] = True
    boxes[1, 0, :8, :8] = True
    boxes[1, 1, 20:30, 16:31] = True
    boxes[3, 1, 5:9, 1:30] = True  # the padding may come first
    boxes[4, 0, 12:13, 17:18] = True
    severity = boxes * torch.tensor([1.0, 3.0])[:, None, None]
    rows = batch_of(noise_pictures(5), [0, 1, 2, 3, 4])
    return dataclasses.replace(rows, regions={"target": boxes, "severity": severity, "lungs": boxes.any(1, True)})


def maps() -> Attribution:
    heatmap = noise_pictures(5).mean(1).mul(4).round() / 4  # signed, with ties
    heatmap[0, 8, 8] = 9  # inside the box
    return Attribution(heatmap, "score")


@functools.cache
def network(max_passes: int = 256) -> Backbone:
    return small_backbone(max_passes)


Found = Mapping[str, Tensor]


def same(found: Found, wanted: Found, rows: Any = slice(None), tolerance: float = 1e-5) -> None:
    """Rows of `wanted`, undefined where they are."""
    assert found.keys() == wanted.keys()
    for name, values in wanted.items():
        assert torch.equal(found[name].isnan(), values[rows].isnan()), name
        assert relative(found[name].nan_to_num(), values[rows].nan_to_num()) < tolerance, name


@pytest.fixture(scope="module", params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def whole(name: str) -> Found:
    return metric_of(name)(network(), five(), maps())


def test_the_values(name: str, whole: Found) -> None:
    metric = metric_of(name)
    reads = getattr(metric, "uses_regions", False)
    assert sum(main in whole for main in MAIN) == 1
    assert isinstance(metric.higher_is_better, bool)  # type: ignore[attr-defined]
    assert isinstance(metric.version, int)  # type: ignore[attr-defined]
    for key, values in whole.items():
        assert len(values) == 5, key
        assert values.dtype == torch.float32, key
        assert not values.requires_grad, key
        assert values.dim() == 1 or key in ("curve", "fraction"), key
        defined = [row for row in range(5) if not (reads and row == NOT_ANNOTATED)]
        assert values[defined].isfinite().all(), key
    if "curve" in whole:
        assert whole["curve"].shape == whole["fraction"].shape
        assert (whole["fraction"].diff() > 0).all()
        assert 0 <= whole["fraction"].min() <= whole["fraction"].max() <= 1
    main = whole.get("auc", whole.get("value"))
    assert main is not None
    assert main[[0, 1, 3, 4]].std() > 0


def test_rows_that_are_not_annotated(name: str, whole: Found) -> None:
    metric, batch = metric_of(name), five()
    reads = getattr(metric, "uses_regions", False)
    absent = metric(network(), dataclasses.replace(batch, regions={}), maps())
    for key in whole.keys() - {"fraction"}:
        assert bool(whole[key][NOT_ANNOTATED].isnan().all()) == reads, key
        assert bool(absent[key].isnan().all()) == reads, key
    if not reads:
        same(absent, whole)


def test_alone_in_a_batch_and_in_any_order(name: str, whole: Found) -> None:
    metric, backbone, batch, attribution = metric_of(name), network(), five(), maps()
    for rows in ([0], [4], [3, 1], [3, 0, 4, 1, 2]):
        same(metric(backbone, batch.take(rows), attribution.take(rows)), whole, rows)


def test_more_empty_planes_change_nothing(name: str, whole: Found) -> None:
    """A batch is padded to its row with most planes."""
    batch = five()
    padded = {key: torch.cat([torch.zeros_like(planes), planes], 1) for key, planes in batch.regions.items()}
    same(metric_of(name)(network(), dataclasses.replace(batch, regions=padded), maps()), whole)


@pytest.mark.parametrize("most", [1, 7])
def test_in_passes_of_any_size(name: str, whole: Found, most: int) -> None:
    rows = [1, 2, 4]
    backbone = network(most)
    seen: list[int] = []
    handle = backbone._network.register_forward_hook(lambda module, args, out: seen.append(len(args[0])))
    found = metric_of(name)(backbone, five().take(rows), maps().take(rows))
    handle.remove()
    same(found, whole, rows, 1e-4)
    assert max(seen, default=0) <= -(-most // 4) * 4  # a backbone fills its tiles of four rows


def test_the_same_again(name: str, whole: Found) -> None:
    torch.manual_seed(99)  # must not matter
    with torch.no_grad():
        same(metric_of(name)(network(), five(), maps()), whole, tolerance=1e-7)


def test_nan_stays_with_its_row(name: str, whole: Found) -> None:
    attribution = maps()
    attribution.heatmap[1, 3, 5] = torch.nan
    attribution.heatmap[4] = torch.nan
    found = metric_of(name)(network(), five(), attribution)
    for key in whole.keys() - {"fraction"}:
        assert found[key][[1, 4]].isnan().all(), key
    kept = [0, 2, 3]
    same({key: values[kept] for key, values in found.items()}, whole, kept)


@pytest.mark.parametrize("value", [0.0, 0.05, 1.0, -2.0])
def test_constant_maps_are_judged_or_undefined(name: str, value: float) -> None:
    """And in no case does one of them touch its neighbours."""
    attribution, metric = maps(), metric_of(name)
    attribution.heatmap[0] = value
    found = metric(network(), five(), attribution)
    same({key: values[1:] for key, values in found.items()}, metric(network(), five(), maps()), slice(1, None))
    assert not any(values.isinf().any() for values in found.values())


def test_nothing_is_left_behind(name: str) -> None:
    backbone, batch, attribution = small_backbone(), five(), maps()
    before = state_of(backbone)
    metric_of(name)(backbone, batch, attribution)
    assert state_of(backbone) == before
    fresh = five()
    assert torch.equal(batch.inputs, fresh.inputs)
    assert torch.equal(attribution.heatmap, maps().heatmap)
    for key, planes in fresh.regions.items():
        assert torch.equal(batch.regions[key], planes), key
    assert not batch.inputs.requires_grad


def test_nothing_is_left_behind_by_an_error(name: str, whole: Found, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone, metric = small_backbone(), metric_of(name)
    before = state_of(backbone)
    with monkeypatch.context() as patched:
        patched.setattr(torch.nn.Linear, "forward", lambda *_: 1 / 0)
        if hasattr(metric, "score"):
            with pytest.raises(ZeroDivisionError):
                metric(backbone, five(), maps())
        else:
            metric(backbone, five(), maps())  # it judges the map alone
    assert state_of(backbone) == before
    same(metric(backbone, five(), maps()), whole)


def test_of_a_regression(name: str, whole: Found) -> None:
    """Column 3 of the output as a regression's value is what class 3's logit is."""
    regression = dataclasses.replace(five(), target=RegressionTarget("deviation", torch.zeros(5), 3))
    column = dataclasses.replace(five(), target=ClassTarget(torch.full((5,), 3)))
    metric = metric_of(name)
    if not hasattr(metric, "score"):
        return same(metric(network(), regression, maps()), whole)
    same(
        metric_of(name, score="value")(network(), regression, maps()),
        metric_of(name, score="logit")(network(), column, maps()),
    )
    with pytest.raises(UserError, match="no probability"):
        metric_of(name, score="probability")(network(), regression, maps())
    return None


def test_a_perfect_map_is_better_than_chance_and_the_worst_is_worse(name: str) -> None:
    """One bright patch is all the evidence there is; the maps mark it, leave it out, or are drawn at random."""
    places = [(0, 1, 1), (0, 5, 2), (0, 3, 6), (0, 6, 6)]
    rows = batch_of(patch_pictures([[place] for place in places]), [0] * len(places))
    patch = rows.inputs[:, 0]
    batch = dataclasses.replace(rows, regions={"target": patch[:, None].bool(), "severity": patch[:, None]})
    batch.regions["lungs"] = torch.ones_like(patch[:, None], dtype=torch.bool)  # type: ignore[index]
    metric, backbone = metric_of(name), patches_backbone()

    def mean(heatmap: Tensor) -> float:
        found = metric(backbone, batch, Attribution(heatmap, "score"))
        return float(found.get("auc", found.get("value")).mean())  # type: ignore[union-attr]

    sign = 1 if metric.higher_is_better else -1  # type: ignore[attr-defined]
    generator = torch.Generator().manual_seed(0)
    chance = [sign * mean(torch.rand(patch.shape, generator=generator)) for _ in range(5)]
    assert sign * mean(patch) > sum(chance) / 5 >= sign * mean(1 - patch)
    assert sign * mean(patch) >= max(chance)


def test_every_field_stands_in_the_yaml(name: str) -> None:
    metric = metric_of(name)
    assert {f.name for f in dataclasses.fields(metric)} == node_of(name).keys() - {"_target_"}  # type: ignore[arg-type]
    assert entries()["metric"][name].description


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"score": "propability"}, "propability"),
        ({"baseline": "blurr"}, "blurr"),
        ({"baseline": "blur", "sigma": 0.0}, "sigma"),
        ({"sign": "plus"}, "plus"),
    ],
)
def test_settings_that_cannot_be(name: str, settings: dict[str, Any], word: str) -> None:
    """From a YAML, and from Python, which checks no types."""
    metric = metric_of(name)
    if settings.keys() <= {f.name for f in dataclasses.fields(metric)}:  # type: ignore[arg-type]
        for refuse in (lambda: metric_of(name, **settings), lambda: dataclasses.replace(metric, **settings)):  # type: ignore[type-var]
            with pytest.raises(UserError, match=word) as raised:
                refuse()
            assert len(str(raised.value).splitlines()) <= 2
