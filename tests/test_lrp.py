"""LRP: every rule against explicit matrices of z_ij in float64, closed forms, gradient x input, zennit; refusals."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torchvision
from networks import (
    batch_of,
    fixed_seed,
    noise_pictures,
    patch_pictures,
    patches_backbone,
    relative,
    shake_norms,
    small_backbone,
    small_net,
)
from timm.layers.split_attn import RadixSoftmax, SplitAttn
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet
from torchvision.models.vgg import cfgs, make_layers

from ibxai.backbones import Backbone, freeze
from ibxai.errors import UserError
from ibxai.methods import LRP
from ibxai.methods.relevance_rules import COMPOSITES
from ibxai.preprocessing import Preprocessing
from ibxai.targets import RegressionTarget
from ibxai.types import Batch

# --- the slow oracle: one picture, float64, an explicit matrix z_ij for every operation


@dataclass
class Node:
    """One operation on vectors: `run` as the network does it, `way` of the relevance, a rule's name or "move"."""

    name: str
    inputs: Sequence[str]
    run: Callable[..., Tensor]
    way: str


def matrix_of(run: Callable[..., Tensor], values: Sequence[Tensor], place: int) -> np.ndarray:
    """W [outputs, inputs] of an affine operation in its input number `place`, one unit vector at a time."""
    count = values[place].numel()
    given = [torch.zeros(count, *v.shape[1:], dtype=torch.float64) for v in values]
    offset = run(*given)
    given[place] = torch.eye(count, dtype=torch.float64).view_as(given[place])
    return (run(*given) - offset).flatten(1).numpy().T


def winners(run: Callable[..., Tensor], value: Tensor) -> np.ndarray:
    """[outputs, inputs] of a max pooling: 1 where an output is that input."""
    out, flat = run(value).flatten().numpy(), value.flatten().numpy()
    return (out[:, None] == flat[None]).astype(float)


def contributions(rule: str, weight: np.ndarray, x: np.ndarray, bias: np.ndarray, options: Mapping[str, Any]) -> Any:
    """[(factor, z_ij, b_j)] of a rule."""
    z = weight * x
    positive, negative = (np.maximum(z, 0), np.maximum(bias, 0)), (np.minimum(z, 0), np.minimum(bias, 0))
    if rule == "plus":
        return [(1.0, *positive)]
    if rule == "alpha_beta":
        return [(options["alpha"], *positive), (1 - options["alpha"], *negative)]
    if rule == "flat":
        return [(1.0, (weight != 0) * 1.0, 0 * bias)]
    if rule == "box":
        low, high = (np.broadcast_to(b, (3, x.size // 3)).flatten() for b in (options["low"], options["high"]))
        return [(1.0, z - np.maximum(weight, 0) * low - np.minimum(weight, 0) * high, 0 * bias)]
    return [(1.0, z, bias)]


def plain_lrp(nodes: Sequence[Node], picture: Tensor, target: int, options: Mapping[str, Any]) -> tuple[Any, float]:
    """(map [H, W], what bias and epsilon took) of one picture [C, H, W]."""
    values = {"x": picture[None].double()}
    for node in nodes:
        values[node.name] = node.run(*(values[name] for name in node.inputs))
    out = values[nodes[-1].name].flatten().numpy()
    score = out[target]
    relevance: dict[str, np.ndarray] = {name: np.zeros(v.numel()) for name, v in values.items()}
    relevance[nodes[-1].name][target] = score
    for node in reversed(nodes):
        given = [values[name] for name in node.inputs]
        above = relevance[node.name]
        if node.way == "pass":
            relevance[node.inputs[0]] += above
        elif node.way == "max":
            relevance[node.inputs[0]] += winners(node.run, given[0]).T @ above
        elif node.way == "move":
            for k, name in enumerate(node.inputs):
                relevance[name] += matrix_of(node.run, given, k).T @ above
        else:
            bias = node.run(*(torch.zeros_like(v) for v in given)).flatten().numpy()
            weights = [matrix_of(node.run, given, k) for k in range(len(given))]
            x = np.concatenate([v.flatten().numpy() for v in given])
            shares = np.zeros(len(x))
            for factor, z, b in contributions(node.way, np.concatenate(weights, 1), x, bias, options):
                total = z.sum(1) + b
                below = total + options["epsilon"] * np.sign(total)
                quotient = np.divide(above, below, out=np.zeros_like(above), where=total != 0)
                shares += factor * (z * quotient[:, None]).sum(0)
            for name, part in zip(
                node.inputs, np.split(shares, np.cumsum([v.numel() for v in given])[:-1]), strict=True
            ):
                relevance[name] += part
    found = relevance["x"].reshape(picture.shape).sum(0)
    return found, float(score - found.sum())


class Chain(nn.Module):
    """Padded, strided, depthwise and dilated convolutions, both poolings, ReLU6, a batch norm that follows nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, 1, 1)
        self.pool = nn.MaxPool2d(3, 1)
        self.norm = nn.BatchNorm2d(4)
        self.depthwise = nn.Conv2d(4, 8, 3, 2, 1, groups=4)
        self.dilated = nn.Conv2d(8, 6, 2, dilation=2, bias=False)
        self.mean = nn.AvgPool2d(2, 1, padding=1)
        self.hidden = nn.Linear(6 * 2 * 2, 7)
        self.dropout = nn.Dropout(0.5)
        self.fc = nn.Linear(7, 3)
        self.relu, self.relu6 = nn.ReLU(), nn.ReLU6()

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.pool(F.relu(self.conv(x))))
        x = self.relu(self.dilated(3 * self.relu6(self.depthwise(x))))
        x = self.relu(self.hidden(self.mean(x).flatten(1)))
        return self.fc(self.dropout(x))

    def nodes(self, first: str, convolution: str, linear: str) -> list[Node]:
        return [
            Node("conv", ["x"], self.conv, first),
            Node("relu", ["conv"], F.relu, "pass"),
            Node("pool", ["relu"], self.pool, "max"),
            Node("norm", ["pool"], self.norm, "epsilon"),
            Node("depthwise", ["norm"], self.depthwise, convolution),
            Node("relu6", ["depthwise"], F.relu6, "pass"),
            Node("scaled", ["relu6"], lambda v: 3 * v, "pass"),
            Node("dilated", ["scaled"], self.dilated, convolution),
            Node("relu2", ["dilated"], F.relu, "pass"),
            Node("mean", ["relu2"], self.mean, "epsilon"),
            Node("flat", ["mean"], lambda v: v.flatten(1), "move"),
            Node("hidden", ["flat"], self.hidden, linear),
            Node("relu3", ["hidden"], F.relu, "pass"),
            Node("fc", ["relu3"], self.fc, linear),
        ]


class Branches(nn.Module):
    """A residual sum, a concatenation, a difference, split attention by a softmax and a squeeze gate by a sigmoid."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 4, 3, 2, 1), nn.Conv2d(4, 4, 3, 1, 1)
        self.norm = nn.BatchNorm2d(8)
        self.attention = SplitAttn(8, 4, 3, padding=1, radix=2, norm_layer=nn.BatchNorm2d)
        self.squeeze, self.sigmoid = nn.Conv2d(4, 4, 1), nn.Sigmoid()
        self.last = nn.Conv2d(4, 5, 1)
        self.fc = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        one = F.relu(self.one(x))
        both = torch.cat([one, F.relu(one + self.two(one))], 1)
        features = self.attention(F.relu(self.norm(both))) - 0.25 * one
        features = self.sigmoid(self.squeeze(features.mean((2, 3), keepdim=True))) * features
        return self.fc(F.relu(self.last(features) + 0.1).mean((2, 3)))

    def _attended(self, v: Tensor) -> Tensor:
        part = self.attention
        gate = part.rsoftmax(part.fc2(F.relu(part.bn1(part.fc1(v.sum(1).mean((2, 3), keepdim=True))))))
        return v * gate.view(len(v), 2, 4, 1, 1)

    def nodes(self, first: str, convolution: str, linear: str) -> list[Node]:
        convolved = lambda v: self.attention.bn0(self.attention.conv(v))  # noqa: E731
        split = lambda v: F.relu(v).reshape(len(v), 2, 4, *v.shape[2:])  # noqa: E731
        return [
            Node("conv", ["x"], self.one, first),
            Node("one", ["conv"], F.relu, "pass"),
            Node("two", ["one"], self.two, convolution),
            Node("residual", ["one", "two"], operator.add, "epsilon"),
            Node("relu", ["residual"], F.relu, "pass"),
            Node("both", ["one", "relu"], lambda a, b: torch.cat([a, b], 1), "move"),
            Node("norm", ["both"], self.norm, "epsilon"),
            Node("relu2", ["norm"], F.relu, "pass"),
            Node("convolved", ["relu2"], convolved, convolution),
            Node("split", ["convolved"], split, "pass"),
            Node("attended", ["split"], self._attended, "pass"),
            Node("summed", ["attended"], lambda v: v.sum(1), "epsilon"),
            Node("quarter", ["one"], lambda v: 0.25 * v, "pass"),
            Node("difference", ["summed", "quarter"], operator.sub, "epsilon"),
            Node("gated", ["difference"], self._gated, "pass"),
            Node("last", ["gated"], self.last, convolution),
            Node("shifted", ["last"], lambda v: v + 0.1, "epsilon"),
            Node("relu3", ["shifted"], F.relu, "pass"),
            Node("mean", ["relu3"], lambda v: v.mean((2, 3)), "epsilon"),
            Node("fc", ["mean"], self.fc, linear),
        ]

    def _gated(self, v: Tensor) -> Tensor:
        return self.sigmoid(self.squeeze(v.mean((2, 3), keepdim=True))) * v


PREPARED = Preprocessing(resize=8, crop=8, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.25))


@pytest.mark.parametrize("composite", COMPOSITES)
@pytest.mark.parametrize("kind", [Chain, Branches])
def test_every_rule_against_explicit_matrices(kind: type[Chain | Branches], composite: str) -> None:
    with fixed_seed(1):
        network = shake_norms(kind(), 1).eval()
    options = {"epsilon": 0.02, "alpha": 1.7}
    pictures, classes = noise_pictures(3, (3, 8, 8), seed=3), [0, 2, 1]
    backbone = freeze(network, preprocessing=PREPARED)
    found = LRP(composite, **options).fit(backbone, [], 0)(batch_of(pictures, classes))
    plain = copy.deepcopy(network).double().requires_grad_(False)
    mean, std = (np.array(v)[:, None] for v in (PREPARED.mean, PREPARED.std))
    options |= {"low": -mean / std, "high": (1 - mean) / std}
    score = found.diagnostics["score"]
    for i in range(3):
        wanted, absorbed = plain_lrp(plain.nodes(*COMPOSITES[composite]), pictures[i], classes[i], options)
        assert np.abs(wanted).max() > 1e-5
        assert relative(found.heatmap[i], torch.from_numpy(wanted)) < 1e-4
        assert float(found.diagnostics["absorbed"][i]) == pytest.approx(absorbed / float(score[i]), rel=1e-3)
    with torch.no_grad():
        torch.testing.assert_close(score, network(pictures)[range(3), classes])
    assert found.diagnostics["completeness_error"].max() < 1e-5
    assert found.unit == "relevance"


def test_the_composites_differ() -> None:
    """The comparison above would also pass if every composite meant the same rules."""
    with fixed_seed(1):
        backbone = freeze(shake_norms(Chain(), 1), preprocessing=PREPARED)
    batch = batch_of(noise_pictures(1, (3, 8, 8), seed=3), [1])
    maps = [LRP(composite).fit(backbone, [], 0)(batch).heatmap for composite in COMPOSITES]
    for i, one in enumerate(maps):
        assert all(relative(one, other) > 0.01 for other in maps[:i])


# --- closed forms


def test_patches_in_closed_form() -> None:
    """The score is 12 (1 - 1/2). The bias -1/2 takes nothing under z+, and minus the whole score under epsilon."""
    places = [((0, 1, 2), (1, 6, 5)), ((0, 7, 0), (1, 3, 3)), ((0, 4, 4), (1, 0, 7))]
    pictures = patch_pictures(places)
    for composite, pixel, absorbed in (
        ("epsilon_plus_flat", 6 / 16, 0.0),
        ("epsilon_plus", 6 / 16, 0.0),
        ("epsilon", 12 / 16, -1.0),
    ):
        attribute = LRP(composite).fit(patches_backbone(), [], 0)
        for colour in (0, 1):
            found = attribute(batch_of(pictures, [colour] * 3))
            wanted = torch.zeros(3, 32, 32)
            for heatmap, patches in zip(wanted, places, strict=True):
                _, row, column = patches[colour]
                heatmap[4 * row : 4 * row + 4, 4 * column : 4 * column + 4] = pixel
            torch.testing.assert_close(found.heatmap, wanted, rtol=1e-4, atol=1e-6)
            torch.testing.assert_close(found.diagnostics["absorbed"], torch.full((3,), absorbed), rtol=0, atol=1e-4)
    nothing = attribute(batch_of(patch_pictures([()]), [2]))
    assert (nothing.heatmap == 0).all()
    assert nothing.diagnostics["completeness_error"] == 0


def vgg16() -> nn.Module:
    return nn.Sequential(make_layers(cfgs["D"], False), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(2048, 10))


NETWORKS: Mapping[str, Callable[[], nn.Module]] = {
    "vgg16": vgg16,
    "resnet50": partial(torchvision.models.resnet50, num_classes=10),
    "densenet121": partial(torchvision.models.densenet121, num_classes=10),
    "resnest50": partial(timm.create_model, "resnest50d", num_classes=10),
    "efficientnet_lite0": partial(timm.create_model, "tf_efficientnet_lite0", num_classes=10),
}


@pytest.fixture(scope="module", params=NETWORKS)
def zoo(request: pytest.FixtureRequest) -> tuple[str, nn.Module, Backbone]:
    with fixed_seed(2):
        network = shake_norms(NETWORKS[request.param](), 2).eval()
    return request.param, network, freeze(network, (3, 32, 32))


CURVED = (nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SiLU, nn.GELU, nn.Hardswish)


def gradient_times_input(network: nn.Module, pictures: Tensor, classes: Sequence[int]) -> Tensor:
    """[B, H, W] in float64; the weights of split attention, and what f(x) / x is of a curved f, taken as constants."""
    network = copy.deepcopy(network).double()
    for part in network.modules():
        if isinstance(part, RadixSoftmax):
            part.register_forward_hook(lambda module, args, out: out.detach())
        if isinstance(part, CURVED):
            part.inplace = False
            part.register_forward_hook(lambda module, args, out: args[0] * (out / args[0]).detach())
    inputs = pictures.double().requires_grad_()
    score = network(inputs)[range(len(classes)), classes].sum()
    (gradient,) = torch.autograd.grad(score, inputs)
    return (gradient * inputs).sum(1).detach()


def test_without_epsilon_it_is_gradient_times_input(zoo: tuple[str, nn.Module, Backbone]) -> None:
    """True of every ReLU network (Ancona et al., ICLR 2018): so whole networks are wired as they should be."""
    _, network, backbone = zoo
    pictures, classes = noise_pictures(2, (3, 32, 32)), [3, 7]
    found = LRP("epsilon", epsilon=1e-12).fit(backbone, [], 0)(batch_of(pictures, classes))
    assert relative(found.heatmap, gradient_times_input(network, pictures, classes)) < 1e-3


def test_the_networks_of_the_zoo_conserve_relevance(zoo: tuple[str, nn.Module, Backbone]) -> None:
    _, _, backbone = zoo
    batch = batch_of(noise_pictures(2, (3, 32, 32)), [3, 7])
    for composite in ("epsilon_plus_flat", "epsilon_alpha_beta"):
        found = LRP(composite).fit(backbone, [], 0)(batch)
        assert found.diagnostics["completeness_error"].max() < 1e-4
        share = found.heatmap.double().sum((1, 2)) / found.diagnostics["score"]
        torch.testing.assert_close(share.float(), 1 - found.diagnostics["absorbed"], rtol=1e-3, atol=1e-4)
        assert (share.abs() > 1e-3).all()


def test_without_biases_all_of_the_score_arrives() -> None:
    with fixed_seed(4):
        network = nn.Sequential(
            *(nn.Conv2d(3, 8, 3, 1, 1, bias=False), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 8, 3, bias=False)),
            *(nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 4, bias=False)),
        )
    backbone, batch = freeze(network, (3, 16, 16)), batch_of(noise_pictures(4, (3, 16, 16)), [0, 1, 2, 3])
    for composite in ("epsilon", "epsilon_plus", "epsilon_plus_flat", "epsilon_plus_box"):
        found = LRP(composite, epsilon=1e-9).fit(backbone, [], 0)(batch)
        torch.testing.assert_close(found.heatmap.sum((1, 2)), found.diagnostics["score"], rtol=1e-4, atol=1e-6)
        assert found.diagnostics["absorbed"].abs().max() < 1e-4


# --- zennit


def resnet(block: type[BasicBlock | Bottleneck]) -> nn.Module:
    return ResNet(block, [1, 1, 1, 1], num_classes=10)


def vgg_like() -> nn.Module:
    features = make_layers([8, "M", 16, "M", 16, "M"], batch_norm=True)
    return nn.Sequential(
        features, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, 12), nn.ReLU(), nn.Linear(12, 10)
    )


@pytest.mark.parametrize(
    ("composite", "theirs"),
    [
        ("epsilon_plus", "EpsilonPlus"),
        ("epsilon_plus_flat", "EpsilonPlusFlat"),
        ("epsilon_alpha_beta", "EpsilonAlpha2Beta1"),
        ("epsilon_alpha_beta_flat", "EpsilonAlpha2Beta1Flat"),
    ],
)
@pytest.mark.parametrize(
    ("build", "canonizer"),
    [
        (vgg_like, "VGGCanonizer"),
        (partial(resnet, BasicBlock), "ResNetCanonizer"),
        (partial(resnet, Bottleneck), "ResNetCanonizer"),
    ],
    ids=["vgg", "resnet basic", "resnet bottleneck"],
)
def test_against_zennit(composite: str, theirs: str, build: Callable[[], nn.Module], canonizer: str) -> None:
    pytest.importorskip("zennit")
    import zennit.attribution
    import zennit.composites
    import zennit.torchvision

    with fixed_seed(3):
        network = shake_norms(build(), 3).eval()
    for part in network.modules():
        if isinstance(part, nn.ReLU):
            part.inplace = False
    pictures, classes = noise_pictures(2, (3, 32, 32)), [1, 7]
    found = LRP(composite).fit(freeze(network, (3, 32, 32)), [], 0)(batch_of(pictures, classes))
    rules = getattr(zennit.composites, theirs)(canonizers=[getattr(zennit.torchvision, canonizer)()])
    with zennit.attribution.Gradient(network.double(), rules) as attributor:
        _, wanted = attributor(pictures.double(), lambda out: out * F.one_hot(torch.tensor(classes), 10))
    assert relative(found.heatmap, wanted.sum(1)) < 1e-3


# --- passes, targets, what stands in front of the first layer


def test_each_picture_runs_once_and_passes_are_cut() -> None:
    batch = batch_of(noise_pictures(5), [0, 1, 2, 3, 4])
    backbone = small_backbone(max_passes=2)
    with backbone.counting() as passes:
        found = LRP().fit(backbone, [], 0)(batch)
    assert dict(passes) == {"forward": 5}
    assert relative(found.heatmap, LRP().fit(small_backbone(), [], 0)(batch).heatmap) < 1e-5


def test_a_regressions_output() -> None:
    backbone, pictures = small_backbone(), noise_pictures(3)
    attribute = LRP().fit(backbone, [], 0)
    wanted = attribute(batch_of(pictures, [2, 2, 2]))
    target = RegressionTarget("deviation", torch.full((3,), torch.nan), output=2)
    found = attribute(Batch(pictures, target, ("a", "b", "c")).bound(backbone))
    assert relative(found.heatmap, wanted.heatmap) < 1e-6


class Prepared(nn.Module):
    """A network that normalises its pictures itself, by constants or by a batch norm."""

    def __init__(self, network: nn.Module, by_norm: bool) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.register_buffer("mean", torch.tensor([0.3, -0.2, 0.1]).view(1, 3, 1, 1))
        self.network, self.by_norm = network, by_norm
        with torch.no_grad():
            self.norm.running_mean.copy_(self.mean.flatten())
            self.norm.running_var.fill_(0.25 - self.norm.eps)

    def forward(self, x: Tensor) -> Tensor:
        return self.network(self.norm(x) if self.by_norm else (x - self.mean) / 0.5)


@pytest.mark.parametrize("by_norm", [True, False])
def test_preprocessing_inside_the_network_takes_nothing(by_norm: bool) -> None:
    with fixed_seed(1):
        network = shake_norms(Chain(), 1)
        outer = Prepared(network, by_norm)
    pictures = noise_pictures(2, (3, 8, 8))
    for composite in ("epsilon_plus_flat", "epsilon_alpha_beta"):
        found = LRP(composite).fit(freeze(outer, (3, 8, 8)), [], 0)(batch_of(pictures, [0, 1]))
        inner = LRP(composite).fit(freeze(network, (3, 8, 8)), [], 0)
        wanted = inner(batch_of((pictures - outer.mean) / 0.5, [0, 1]))
        assert relative(found.heatmap, wanted.heatmap) < 1e-4


# --- refusals, by name


class Odd(nn.Module):
    """A convolution, something, a linear layer."""

    def __init__(self, odd: Callable[[Tensor], Tensor] | nn.Module, first: nn.Module | None = None) -> None:
        super().__init__()
        self.first = first or nn.Identity()
        self.conv = nn.Conv2d(3, 4, 3)
        self.odd = odd
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.odd(self.conv(self.first(x))).mean((2, 3)))


class ScaledConvolution(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) ** 3


@pytest.mark.parametrize(
    ("odd", "message"),
    [
        (nn.GroupNorm(2, 4), r"'odd' \(GroupNorm\)"),
        (nn.Sigmoid(), r"'odd' \(Sigmoid\)"),
        (ScaledConvolution(4, 4, 1), r"'odd' \(ScaledConvolution\)"),
        (lambda v: v * v, r"'mul' \(mul\)"),
        (lambda v: v * v.exp(), r"'mul' \(mul\)"),
        (lambda v: v.sigmoid() * v.softmax(1), r"'mul' \(mul\)"),
        (lambda v: 1 / (1 + v), r"'truediv' \(truediv\)"),
        (lambda v: v / v.sigmoid(), r"'truediv' \(truediv\)"),
        (lambda v: torch.div(v, 2, rounding_mode="floor"), r"'div' \(div\)"),
        (lambda v: v + v.sigmoid(), r"'sigmoid' \(sigmoid\)"),
        (lambda v: v**2, r"'pow_1' \(pow\)"),
        (lambda v: v.chunk(2, 1)[0].repeat(1, 2, 1, 1), r"'repeat' \(repeat\)"),
        (lambda v: torch.cat(v.chunk(2, 1), 1), r"'chunk' \(chunk\)"),
        (lambda v: v.mT, r"'getattr_1' \(getattr\)"),
        (lambda v: v.clamp_(min=0), r"'clamp_' \(clamp_, in place\)"),
    ],
)
def test_what_no_rule_covers_is_refused_by_name(odd: Callable[[Tensor], Tensor], message: str) -> None:
    backbone = freeze(Odd(odd), (3, 8, 8), name="odd one")
    assert backbone._trace is not None
    with pytest.raises(UserError, match=rf"LRP has no rule for {message} of odd one\.\nCovered are convolution"):
        LRP().fit(backbone, [], 0)


class Gated(nn.Module):
    def __init__(self, gate: Callable[[Tensor], Tensor] | nn.Module) -> None:
        super().__init__()
        self.gate, self.constant = gate, False
        self.pool = nn.AdaptiveAvgPool2d(1)  # a module without children would be traced as one operation

    def forward(self, v: Tensor) -> Tensor:
        weights = self.gate(self.pool(v**2).exp())  # whatever feeds a gate needs no rule
        return torch.mul(v, weights.detach() if self.constant else weights.contiguous())


@pytest.mark.parametrize(
    "gate",
    [
        *(torch.sigmoid, lambda v: v.sigmoid(), nn.Sigmoid(), timm.layers.Sigmoid(), nn.Hardsigmoid(), F.hardsigmoid),
        *(nn.Softmax(1), partial(F.softmax, dim=1), partial(torch.softmax, dim=1), lambda v: v.softmax(1)),
    ],
)
def test_a_gate_is_a_weight(gate: Callable[[Tensor], Tensor]) -> None:
    with fixed_seed(5):
        network = Odd(Gated(gate))
    batch = batch_of(noise_pictures(2, (3, 8, 8)), [0, 1])
    found = LRP("epsilon", epsilon=1e-12).fit(freeze(network, (3, 8, 8)), [], 0)(batch)
    changing = gradient_times_input(network, batch.inputs, [0, 1])
    network.odd.constant = True
    assert relative(found.heatmap, gradient_times_input(network, batch.inputs, [0, 1])) < 1e-4
    assert relative(found.heatmap, changing) > 1e-3


@pytest.mark.parametrize(
    "odd",
    [
        *(nn.LeakyReLU(0.2), nn.ELU(), nn.SiLU(), nn.GELU(), nn.Hardswish(), nn.Dropout(0.4), nn.Dropout2d(0.4)),
        *(nn.AdaptiveMaxPool2d(2), lambda v: F.max_pool2d(v, 3, 1, 1), lambda v: F.avg_pool2d(v, 3, 2, 1)),
        *(lambda v: F.adaptive_avg_pool2d(v, (2, 3)), lambda v: F.dropout(v, 0.4, False)),
        *(
            lambda v: torch.flatten(v, 2)[:, :, :, None],
            lambda v: v.flatten(2).unsqueeze(3),
            lambda v: v[:, :, 1:, ::2],
        ),
        *(lambda v: torch.reshape(v, (v.shape[0], 4, 4, 9)), lambda v: v.permute(0, 1, 3, 2).transpose(2, 3)),
        *(lambda v: torch.permute(v, (0, 1, 3, 2)), lambda v: torch.transpose(v, 2, 3)),
        *(lambda v: torch.squeeze(torch.unsqueeze(v, 4), 4), lambda v: v.unsqueeze(4).squeeze(4)),
        *(lambda v: torch.sum(v, 3, keepdim=True), lambda v: torch.mean(v, 3, keepdim=True), lambda v: v + v),
        *(lambda v: torch.add(v, v, alpha=0.5), lambda v: v.add(0.5 * v), lambda v: torch.sub(v, 0.5 * v)),
        *(lambda v: v.sub(0.3), lambda v: 0.3 - v, lambda v: v.mul(0.7) / 3, lambda v: torch.div(v, 7).div(0.1)),
        *(lambda v: v / v.shape[2], lambda v: v.view(v.size(0), -1, 6, 6)),
    ],
)
def test_what_is_covered(odd: Callable[[Tensor], Tensor] | nn.Module) -> None:
    """Each operation by the gradient, which is right for whatever is linear where it stands."""
    with fixed_seed(5):
        network = Odd(odd).eval()
    batch = batch_of(noise_pictures(2, (3, 8, 8)), [0, 1])
    backbone = freeze(network, (3, 8, 8))
    assert backbone._trace is not None
    found = LRP("epsilon", epsilon=1e-12).fit(backbone, [], 0)(batch)
    assert relative(found.heatmap, gradient_times_input(network, batch.inputs, [0, 1])) < 1e-4
    assert found.diagnostics["completeness_error"].max() < 1e-5


def test_pixels_mixed_before_the_first_layer() -> None:
    """The flat rule gives to pixels of value 0, and a mean of 0 could not hand it on; z+ has no such trouble."""
    backbone = freeze(Odd(nn.ReLU(), nn.AvgPool2d(2)), (3, 8, 8))
    with pytest.raises(UserError, match=r"'first' \(AvgPool2d in front of the first convolution\)"):
        LRP("epsilon_plus_flat").fit(backbone, [], 0)
    found = LRP("epsilon_plus").fit(backbone, [], 0)(batch_of(noise_pictures(1, (3, 8, 8)), [0]))
    assert found.diagnostics["completeness_error"].max() < 1e-4


class Untraceable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(192, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.flatten(1)) if x.sum() < 1e9 else self.fc(-x.flatten(1))


class Constant(Untraceable):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc.bias.expand(x.shape[0], 3)


def test_networks_without_a_graph_or_without_an_input() -> None:
    with pytest.raises(UserError, match="network cannot be traced"):
        LRP().fit(freeze(Untraceable(), (3, 8, 8)), [], 0)
    with pytest.raises(UserError, match="LRP cannot explain network: its output does not depend on the picture"):
        LRP().fit(freeze(Constant(), (3, 8, 8)), [], 0)


def test_relevance_that_is_not_conserved_is_an_error() -> None:
    """Two pixels that cancel to the seventh digit: float32 cannot hand such relevance on."""
    network = nn.Sequential(nn.Flatten(), nn.Linear(2, 2), nn.Linear(2, 1))
    with torch.no_grad():
        network[1].weight.copy_(torch.tensor([[1e6, 0.0], [0.0, -1.000003e6]]))
        network[1].bias.copy_(torch.tensor([0.1, 0.2]))
        network[2].weight.fill_(0.3)
        network[2].bias.zero_()
    backbone = freeze(network, preprocessing=Preprocessing(resize=1, crop=1, mean=(0.0, 0.0), std=(1.0, 1.0)))
    batch = batch_of(torch.ones(1, 2, 1, 1), [0], ["p1"])
    with pytest.raises(UserError, match=r"does not conserve relevance on network: the completeness error of p1 is"):
        LRP("epsilon").fit(backbone, [], 0)(batch)


def test_a_score_near_zero_is_no_error() -> None:
    """Its own rounding is as large as it is; what it is a difference of is what counts."""
    network, pictures = small_net(), noise_pictures(1)
    with torch.no_grad():
        network.fc.bias -= (1 - 1e-6) * network.eval()(pictures)[0] * torch.tensor([0.0, 1, 1, 1, 1])
    found = LRP("epsilon").fit(freeze(network, (3, 32, 32)), [], 0)(batch_of(pictures.repeat(4, 1, 1, 1), [1, 2, 3, 4]))
    assert found.diagnostics["score"].abs().max() < 1e-4
    assert found.heatmap.abs().amax((1, 2)).min() > 0


def test_settings() -> None:
    with pytest.raises(UserError, match=r"no composite 'epsilon_minus'. Did you mean .*epsilon_plus"):
        LRP("epsilon_minus")
    for name in ("epsilon", "tolerance"):
        with pytest.raises(UserError, match=f"method.{name} is 0: it must be above 0"):
            LRP(**{name: 0})
    with pytest.raises(UserError, match=r"method.alpha is 0.5: at least 1"):
        LRP(alpha=0.5)
