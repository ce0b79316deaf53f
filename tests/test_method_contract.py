"""What every method must keep to, whatever it computes. Methods are found by their YAMLs: a new one joins by itself."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from networks import batch_of, noise_pictures, relative, small_backbone
from omegaconf import OmegaConf
from torch import Tensor

from ibxai.backbones import Backbone
from ibxai.catalogue import entries
from ibxai.config import build
from ibxai.targets import ClassTarget
from ibxai.types import Attribution, Attributor, Batch, Method, ScoreKind, Unit

# The masks of these pictures would stay open: a blur of sigma 3 leaves some evidence, and a pixel costs less.
_MASKS = {"resolution": 8, "iterations": 6, "lambda1": 0.02, "sigma": 3.0, "lambda2": 1.0, "score": "logit"}
# Settings that only make a method cheaper, where its YAML's would take long even here, or let it see anything here.
QUICK: Mapping[str, Mapping[str, Any]] = {
    "input_iba": {"steps": 12, "draws": 4, "learning_rate": 1.0},
    "input_iba_text": {"steps": 12, "learning_rate": 1.0},
    "lime": {"samples": 64},
    "igospp": _MASKS,
    "igos": _MASKS,
    "mask": _MASKS | {"iterations": 10},
    "rise": {"masks": 200, "check_every": 100},
    "extremal_perturbation": {"steps": 20, "areas": [0.1, 0.4], "sigma": 3.0},
}
# Methods that do not look at the target.
BLIND = {"random", *(name for name in entries()["method"] if name.startswith("boolean_masker"))}
# Looser than rule 2 where rounding is known to be amplified: Adam makes a whole step of a gradient that is nothing but
# rounding, so that 41 of 3072 pixels of one sample differ by 6e-4 when passes are cut at 7 rows.
ROUNDING: Mapping[str, float] = {"input_iba": 3e-3, "input_iba_text": 3e-3}
# Diagnostics that are shares of something already, and nothing but rounding where a method is exact: an error of 1e-6
# that differs by a tenth of itself is the same. Compared as they are.
SHARES = {"completeness_error"}
NAMES = list(entries()["method"])


def method_of(name: str) -> Method:
    node = OmegaConf.to_container(OmegaConf.create(entries()["method"][name].text), resolve=True)
    assert isinstance(node, dict)
    method = build({**node, **QUICK.get(name, {})}, "method")
    assert isinstance(method, Method)
    return method


def reference() -> list[Batch]:
    return [batch_of(part, [0] * len(part)) for part in noise_pictures(10, seed=5).split(4)]


def five() -> Batch:
    return batch_of(noise_pictures(5), [0, 1, 2, 3, 4])


@dataclass
class Fitted:
    name: str
    backbone: Backbone
    attribute: Attributor
    whole: Attribution


@pytest.fixture(scope="module", params=NAMES)
def fitted(request: pytest.FixtureRequest) -> Fitted:
    backbone = small_backbone()
    attribute = method_of(request.param).fit(backbone, reference(), 0)
    return Fitted(request.param, backbone, attribute, attribute(five()))


def same(found: Attribution, wanted: Attribution, tolerance: float = 1e-4) -> None:
    assert relative(found.heatmap, wanted.heatmap) < tolerance
    assert found.unit == wanted.unit
    assert found.diagnostics.keys() == wanted.diagnostics.keys()
    for name, values in wanted.diagnostics.items():
        if name in SHARES:
            assert (found.diagnostics[name] - values).abs().max() < tolerance, name
        else:
            assert relative(found.diagnostics[name], values) < tolerance, name


def state_of(backbone: Backbone) -> dict[str, object]:
    """Everything that a method might leave behind in the network or in torch."""
    found: dict[str, object] = {
        "random": torch.get_rng_state().numpy().tobytes(),
        "modes": (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.get_default_dtype()),
        "deterministic": (torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark),
        "threads": torch.get_num_threads(),
        "max_passes": backbone.max_passes,
    }
    networks = [backbone._network, *(part for cut in backbone._cuts.values() for part in cut)]
    for network in networks:
        for name, part in network.named_modules():
            assert not part._forward_hooks, name
            assert not part._forward_pre_hooks, name
            assert not part._backward_hooks, name
            assert not part._backward_pre_hooks, name
            assert not part.__dict__.get("forward"), name
    for name, part in backbone._network.named_modules():
        found["module " + name] = (type(part), part.training)
    for name, tensor in [*backbone._network.named_parameters(), *backbone._network.named_buffers()]:
        assert tensor.grad is None, name
        found["tensor " + name] = (tensor.detach().cpu().numpy().tobytes(), tensor.requires_grad)
    return found


def test_the_heatmap(fitted: Fitted) -> None:
    heatmap, unit = fitted.whole.heatmap, fitted.whole.unit
    assert heatmap.shape == (5, 32, 32)
    assert heatmap.dtype == torch.float32
    assert heatmap.isfinite().all()
    assert not heatmap.requires_grad
    assert unit in Unit.__args__  # type: ignore[attr-defined]
    uneven = (heatmap.flatten(1).std(1) > 0).nonzero().flatten().tolist()
    assert len(uneven) >= 3  # a rectified map may be empty, where all the evidence is against the class
    if unit in ("bits", "mask"):
        assert heatmap.min() >= 0
    for i, j in itertools.pairwise(uneven):
        assert relative(heatmap[i], heatmap[j]) > 1e-3  # another picture, another map
    for name, values in fitted.whole.diagnostics.items():
        assert len(values) == 5, name
        assert values.dim() in (1, 2), name
        assert not values.requires_grad, name


def test_alone_or_in_a_batch(fitted: Fitted) -> None:
    batch = five()
    for i in (0, 2, 4):
        same(fitted.attribute(batch.take([i])), fitted.whole.take([i]))
    same(fitted.attribute(batch.take([1, 3])), fitted.whole.take([1, 3]))


def test_in_any_order(fitted: Fitted) -> None:
    order = [3, 0, 4, 1, 2]
    same(fitted.attribute(five().take(order)), fitted.whole.take(order))


def test_the_same_again_and_fitted_again(fitted: Fitted) -> None:
    same(fitted.attribute(five()), fitted.whole, 1e-7)
    backbone = small_backbone()
    torch.manual_seed(99)  # must not matter
    same(method_of(fitted.name).fit(backbone, reference(), 0)(five()), fitted.whole, 1e-6)


@pytest.mark.parametrize("most", [1, 7])
def test_in_passes_of_any_size(fitted: Fitted, most: int) -> None:
    backbone = small_backbone(max_passes=most)
    found = method_of(fitted.name).fit(backbone, reference(), 0)(five().take([0, 1, 2]))
    same(found, fitted.whole.take([0, 1, 2]), ROUNDING.get(fitted.name, 1e-4))


def test_several_targets_of_one_sample(fitted: Fitted) -> None:
    """Rows of one picture, each with a class of its own, do not mix."""
    picture = noise_pictures(5)[1:2]
    rows = batch_of(picture.repeat(4, 1, 1, 1), [3, 1, 1, 0], ["sample1"] * 4)
    found = fitted.attribute(rows)
    assert relative(found.heatmap[2], found.heatmap[1]) < 1e-4
    assert relative(found.heatmap[1], fitted.whole.heatmap[1]) < 1e-4
    for i in range(4):
        assert relative(fitted.attribute(rows.take([i])).heatmap, found.heatmap[i : i + 1]) < 1e-4
    if fitted.name not in BLIND:
        assert relative(found.heatmap[0], found.heatmap[1]) > 1e-3


def test_nothing_is_left_behind(fitted: Fitted) -> None:
    backbone, batch = small_backbone(), five()
    inputs = batch.inputs.clone()
    before = state_of(backbone)
    attribute = method_of(fitted.name).fit(backbone, reference(), 0)
    assert state_of(backbone) == before
    attribute(batch)
    assert state_of(backbone) == before
    assert torch.equal(batch.inputs, inputs)
    assert not batch.inputs.requires_grad
    assert batch.inputs.grad is None


class Poisoned(ClassTarget):
    """A target whose third use fails."""

    uses = 0

    def _use(self) -> None:
        Poisoned.uses += 1
        if Poisoned.uses >= 3 or fails_at_once(self):
            raise ZeroDivisionError("poisoned")

    def score(self, out: Tensor, kind: ScoreKind) -> Tensor:
        self._use()
        return super().score(out, kind)

    def loss(self, out: Tensor) -> Tensor:
        self._use()
        return super().loss(out)

    def removal_loss(self, out: Tensor, bound: Any) -> Tensor:
        self._use()
        return super().removal_loss(out, bound)

    def take(self, rows: Tensor) -> Poisoned:
        return Poisoned(self.classes[rows])


def fails_at_once(target: ClassTarget) -> bool:
    return bool((target.classes == 4).any())


@pytest.mark.parametrize("classes", [[0, 1, 2, 3, 3], [0, 1, 2, 3, 4]], ids=["third use", "first use"])
def test_nothing_is_left_behind_by_an_error(fitted: Fitted, classes: list[int]) -> None:
    if fitted.name in BLIND:
        pytest.skip("does not look at the target")
    before = state_of(fitted.backbone)
    Poisoned.uses = 0
    poisoned = dataclasses.replace(five(), target=Poisoned(torch.tensor(classes)))
    try:
        fitted.attribute(poisoned)
    except ZeroDivisionError:
        pass
    else:
        assert 0 < Poisoned.uses < 3  # a method that looks at the target so seldom never meets the third use
    assert state_of(fitted.backbone) == before
    same(fitted.attribute(five()), fitted.whole)


def test_an_error_inside_the_network(fitted: Fitted, monkeypatch: pytest.MonkeyPatch) -> None:
    before = state_of(fitted.backbone)
    with monkeypatch.context() as patched:
        patched.setattr(torch.nn.Linear, "forward", lambda *_: 1 / 0)
        if fitted.name in BLIND:
            fitted.attribute(five())
        else:
            with pytest.raises(ZeroDivisionError):
                fitted.attribute(five())
    assert state_of(fitted.backbone) == before
    same(fitted.attribute(five()), fitted.whole)


def test_constant_pictures(fitted: Fitted) -> None:
    values = (0.0, 1.0, -30.0)
    pictures = torch.stack([torch.full((3, 32, 32), value) for value in values])
    found = fitted.attribute(batch_of(pictures, [0, 1, 2]))
    assert found.heatmap.shape == (3, 32, 32)
    assert found.heatmap.isfinite().all()


def test_with_gradients_off_or_on(fitted: Fitted) -> None:
    """A caller's own grad mode does not matter to the result, and stays."""
    with torch.no_grad():
        try:
            found = fitted.attribute(five())
        except RuntimeError as error:
            assert "grad" in str(error)  # noqa: PT017  # refused loudly is fine, another map is not
            return
        assert not torch.is_grad_enabled()
    same(found, fitted.whole)


def test_every_yaml_says_what_it_is() -> None:
    for name in NAMES:
        entry = entries()["method"][name]
        assert entry.description
        method = method_of(name)
        assert isinstance(method.version, int)  # type: ignore[attr-defined]
        assert dataclasses.is_dataclass(method)
