"""Guided backpropagation: layer by layer in float64, zennit and captum as outsiders, and what it refuses."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest
import timm
import torch
from networks import (
    batch_of,
    fixed_seed,
    noise_pictures,
    patch_pictures,
    patches_backbone,
    relative,
    small_backbone,
    small_net,
)
from torch import Tensor, nn
from torch.nn import functional as F

from ibxai.backbones import freeze
from ibxai.errors import UserError
from ibxai.methods import GradCAM, Gradient, GuidedBackprop, GuidedGradCAM


class Branched(nn.Module):
    """Both kinds of rectifiers; branches leave behind one and in front of it, so that gradients partly cancel."""

    def __init__(self, ceiling: bool = True) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 3, 1, 1)
        self.clip = nn.ReLU6() if ceiling else nn.ReLU()
        self.conv2 = nn.Conv2d(6, 6, 3, 1, 1)
        self.relu = nn.ReLU()
        self.conv3 = nn.Conv2d(6, 5, 3, 2, 1)
        self.last = nn.ReLU()
        self.fc = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        before = self.conv1(x)
        first = self.clip(before)
        second = self.relu(self.conv2(first)) + first + 0.2 * before
        return self.fc(self.last(self.conv3(second)).mean((2, 3)))


def branched(ceiling: bool = True) -> Branched:
    with fixed_seed(6):
        network = Branched(ceiling)
    with torch.no_grad():
        network.conv1.weight.mul_(12)  # so that some inputs of the ReLU6 are above 6
    return network


def back(conv: nn.Conv2d, relevance: Tensor, size: torch.Size) -> Tensor:
    return torch.nn.grad.conv2d_input(size, conv.weight, relevance, conv.stride, conv.padding)


def plain_guided(network: Branched, picture: Tensor, target: int) -> Tensor:
    """[3, H, W]: what comes back, written out from the last layer to the first."""
    z1 = network.conv1(picture[None])
    a1 = network.clip(z1)
    z2 = network.conv2(a1)
    z3 = network.conv3(F.relu(z2) + a1 + 0.2 * z1)
    top = network.fc.weight[target].view(1, -1, 1, 1).expand_as(z3) / z3[0, 0].numel()
    r3 = top * (top > 0) * (z3 > 0)
    middle = back(network.conv3, r3, a1.shape)
    r2 = middle * (middle > 0) * (z2 > 0)
    below = middle + back(network.conv2, r2, a1.shape)  # the sum of two branches, of which the positive part stays
    passed = (z1 > 0) & (z1 < 6) if isinstance(network.clip, nn.ReLU6) else z1 > 0
    r1 = below * (below > 0) * passed
    return back(network.conv1, r1 + 0.2 * middle, picture[None].shape)[0]  # the third passes no rectifier


@pytest.mark.parametrize("ceiling", [True, False])
@pytest.mark.parametrize("channels", ["sum", "max_abs"])
def test_layer_by_layer_in_float64(ceiling: bool, channels: str) -> None:
    network, pictures, classes = branched(ceiling), noise_pictures(3, (3, 12, 12)), [2, 0, 3]
    batch = batch_of(pictures, classes)
    found = GuidedBackprop(channels=channels).fit(freeze(network, (3, 12, 12)), [], 0)(batch)
    slow = branched(ceiling).double()
    with torch.no_grad():
        assert float((slow.conv1(pictures.double()) > 6).double().mean()) > 0.1  # saturated ones there are
        wanted = torch.stack([plain_guided(slow, p.double(), c) for p, c in zip(pictures, classes, strict=True)])
        scores = network(pictures)[range(3), classes]
    assert relative(found.heatmap, wanted.sum(1) if channels == "sum" else wanted.abs().amax(1)) < 1e-5
    torch.testing.assert_close(found.diagnostics["score"], scores)
    plain = Gradient(channels=channels).fit(freeze(network, (3, 12, 12)), [], 0)(batch)
    assert relative(plain.heatmap, found.heatmap) > 0.1


def test_the_probability_scales_the_logits() -> None:
    """Of two classes, d p_0 = p_0 p_1 d (s_0 - s_1)."""
    with fixed_seed(1):
        network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    pictures = noise_pictures(2, (3, 8, 8))
    found = GuidedBackprop(channels="sum", score="probability").fit(freeze(network, (3, 8, 8)), [], 0)
    difference = nn.Linear(4, 1)
    with torch.no_grad():
        p = network(pictures).softmax(1)
        difference.weight.copy_(network[4].weight[:1] - network[4].weight[1:])
        network[4] = difference
    logit = GuidedBackprop(channels="sum").fit(freeze(network, (3, 8, 8)), [], 0)(batch_of(pictures, [0, 0])).heatmap
    assert relative(found(batch_of(pictures, [0, 0])).heatmap, p.prod(1).view(2, 1, 1) * logit) < 1e-4


@pytest.fixture
def residual() -> tuple[nn.Module, Tensor, list[int]]:
    network = small_net().eval()
    for part in network.modules():
        if isinstance(part, nn.ReLU):
            part.inplace = False
    return network, noise_pictures(3), [1, 4, 2]


@pytest.mark.filterwarnings("ignore:Input Tensor:UserWarning", "ignore:Setting backward hooks:UserWarning")
def test_against_captum_where_there_is_only_relu(residual: tuple[nn.Module, Tensor, list[int]]) -> None:
    captum = pytest.importorskip("captum.attr")
    network, pictures, classes = residual
    wanted = captum.GuidedBackprop(network).attribute(pictures, target=torch.tensor(classes)).sum(1)
    found = GuidedBackprop(channels="sum").fit(small_backbone(), [], 0)(batch_of(pictures, classes))
    assert relative(found.heatmap, wanted) < 1e-4


def test_against_zennit(residual: tuple[nn.Module, Tensor, list[int]]) -> None:
    attribution = pytest.importorskip("zennit.attribution")
    composites = pytest.importorskip("zennit.composites")
    network, pictures, classes = residual
    with attribution.Gradient(model=network, composite=composites.GuidedBackprop()) as attribute:
        _, wanted = attribute(pictures, torch.eye(5)[classes])
    found = GuidedBackprop(channels="sum").fit(small_backbone(), [], 0)(batch_of(pictures, classes))
    assert relative(found.heatmap, wanted.sum(1)) < 1e-4


class Last(nn.Module):
    """Two convolutions with something between them."""

    def __init__(self, between: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.between, self.after = nn.Conv2d(3, 4, 3), between, nn.Conv2d(4, 5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.between(self.conv(x))).mean((2, 3))


class Swish(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * x.sigmoid()


@pytest.mark.parametrize(
    ("between", "name"),
    [
        (nn.SiLU(), "SiLU"),
        (nn.LeakyReLU(), "LeakyReLU"),
        (F.gelu, "GELU"),
        (F.hardswish, "hardswish"),
        (lambda x: x.clamp(min=0), "clamp"),
    ],
)
def test_an_activation_without_a_rule_is_refused(between: Callable[[Tensor], Tensor], name: str) -> None:
    backbone = freeze(Last(between), (3, 8, 8), name="other")
    with pytest.raises(UserError, match=rf"^Guided backpropagation knows ReLU and ReLU6; other has {name}\."):
        GuidedBackprop().fit(backbone, [], 0)


def test_efficientnet_lite_is_known_and_efficientnet_is_not() -> None:
    lite = freeze(timm.create_model("tf_efficientnet_lite0"), (3, 32, 32))
    batch = batch_of(noise_pictures(1), [3])
    guided, plain = (method.fit(lite, [], 0)(batch).heatmap for method in (GuidedBackprop(), Gradient()))
    assert relative(guided, plain) > 0.1
    with pytest.raises(UserError, match="has SiLU"):
        GuidedBackprop().fit(freeze(timm.create_model("efficientnet_b0"), (3, 32, 32)), [], 0)


@pytest.mark.parametrize("gate", [nn.Sigmoid(), nn.Hardsigmoid(), nn.Softmax(1), timm.layers.Sigmoid()])
def test_a_gate_passes_the_plain_gradient(gate: nn.Module, caplog: pytest.LogCaptureFixture) -> None:
    """Without a rectifier nothing differs from the gradient."""
    with fixed_seed(2):
        backbone = freeze(Last(gate), (3, 8, 8))
    batch = batch_of(noise_pictures(2, (3, 8, 8)), [1, 2])
    found, plain = (method.fit(backbone, [], 0)(batch).heatmap for method in (GuidedBackprop(), Gradient()))
    assert relative(found, plain) < 1e-6
    assert not caplog.records


def test_a_layer_of_ones_own_is_told(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        GuidedBackprop().fit(freeze(Last(Swish()), (3, 8, 8), name="mine"), [], 0)
    assert "plain gradient through Swish of mine" in caplog.text
    caplog.clear()
    GuidedBackprop().fit(small_backbone(), [], 0)
    assert not caplog.records


def test_patches_at_known_places_and_the_class_matters() -> None:
    """Every gradient of this network is positive, so that 12 / 16 come back to the pixels of the class's patch."""
    places = [((0, 1, 2), (1, 6, 5)), ((0, 7, 0), (1, 3, 3))]
    pictures = patch_pictures(places)
    for method in (GuidedBackprop(), GuidedGradCAM()):
        attribute = method.fit(patches_backbone(), [], 0)
        for colour in (0, 1):
            found = attribute(batch_of(pictures, [colour] * 2)).heatmap
            wanted = torch.zeros(2, 32, 32, dtype=torch.bool)
            for one, patches in zip(wanted, places, strict=True):
                _, row, column = patches[colour]
                one[4 * row : 4 * row + 4, 4 * column : 4 * column + 4] = True
            assert torch.equal(found > 0, wanted)
            assert isinstance(method, GuidedGradCAM) or torch.equal(found, 0.75 * wanted)


@pytest.mark.parametrize("relu", [True, False])
def test_guided_gradcam_is_the_product(relu: bool) -> None:
    batch = batch_of(noise_pictures(3), [1, 4, 2])
    found = GuidedGradCAM(layer="stage2", relu=relu, channels="sum").fit(small_backbone(), [], 0)(batch).heatmap
    coarse = GradCAM("stage2", relu).fit(small_backbone(), [], 0)(batch).heatmap
    fine = GuidedBackprop(channels="sum").fit(small_backbone(), [], 0)(batch).heatmap
    assert coarse.flatten(1).amax(1).min() > 0
    torch.testing.assert_close(found, coarse * fine)


def test_passes() -> None:
    backbone = small_backbone(max_passes=3)
    with backbone.counting() as passes:
        GuidedBackprop().fit(backbone, [], 0)(batch_of(noise_pictures(5), [0, 1, 2, 3, 4]))
    assert dict(passes) == {"forward": 5, "backward": 5}


def test_settings_that_cannot_be() -> None:
    with pytest.raises(UserError, match=r"method.channels is 'abs'"):
        GuidedGradCAM(channels="abs")  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"no layer 'stage7'"):
        GuidedGradCAM(layer="stage7").fit(small_backbone(), [], 0)
