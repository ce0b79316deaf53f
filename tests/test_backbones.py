"""Backbones: cut, folded and cleaned networks are the caller's function, at every layer and in gradients."""

from __future__ import annotations

import copy
import gc
import logging
from collections.abc import Callable, Iterator

import pytest
import timm
import torch
import torchvision
from networks import (
    Block,
    SmallNet,
    fixed_seed,
    noise_pictures,
    record,
    relative,
    replacing,
    shake_norms,
    small_backbone,
    small_net,
)
from torch import Tensor, nn
from torch.nn import functional as F

from ibxai.backbones import Backbone, Features, freeze
from ibxai.errors import UserError

# --- stock networks: name -> (maker, picture size, layers at several depths, of which some inside a residual block)


def slim_vgg11() -> nn.Module:
    """With 64 units in its classifier, not 4096: a hundred million weights fewer to copy."""
    network = torchvision.models.vgg11(init_weights=False, num_classes=20)
    network.classifier[0], network.classifier[3] = nn.Linear(25088, 64), nn.Linear(64, 64)
    network.classifier[6] = nn.Linear(64, 20)
    for part in network.modules():
        if isinstance(part, nn.Conv2d | nn.Linear):
            part.weight.data.mul_(6**0.5)  # He's deviation, or nothing of the picture arrives
    return network


STOCK: dict[str, tuple[Callable[[], nn.Module], int, tuple[str, ...]]] = {
    "resnet18": (
        lambda: torchvision.models.resnet18(num_classes=20),
        64,
        ("bn1", "maxpool", "layer1", "layer2.0.bn2", "layer2.0.bn1", "layer2.0.downsample", "layer3.1", "layer4", "fc"),
    ),
    "resnet50": (
        lambda: torchvision.models.resnet50(num_classes=20),
        64,
        ("layer1.0.bn3", "layer2.1.bn2", "layer3", "layer4.0.downsample", "avgpool"),
    ),
    "densenet121": (
        lambda: torchvision.models.densenet121(num_classes=20),
        64,
        (
            "features.denseblock1",
            "features.denseblock2.denselayer3",
            "features.denseblock2.denselayer3.norm2",
            "features.transition2",
            "features.denseblock3",
            "features",
        ),
    ),
    "vgg11": (
        slim_vgg11,
        32,
        ("features.0", "features.7", "features.8", "features", "classifier.1"),
    ),
    "efficientnet_lite0": (
        lambda: timm.create_model("tf_efficientnet_lite0", num_classes=20),
        64,
        ("bn1", "blocks.1", "blocks.2.1.bn2", "blocks.4", "blocks.5.1.bn3", "bn2", "global_pool"),
    ),
    "resnest14d": (
        lambda: timm.create_model("resnest14d", num_classes=20),
        64,
        ("maxpool", "layer1", "layer2.0.bn1", "layer2.0.conv2", "layer3", "layer3.0.bn3", "layer4"),
    ),
    "vit_tiny": (
        lambda: timm.create_model("vit_tiny_patch16_224", img_size=64, num_classes=20, depth=3),
        64,
        ("patch_embed", "blocks.0", "blocks.1.attn", "blocks.1.mlp.act", "norm"),
    ),
    "swin_tiny": (
        lambda: timm.create_model("swin_tiny_patch4_window7_224", img_size=56, num_classes=20, depths=(1, 1, 1, 1)),
        56,
        ("patch_embed", "layers.0", "layers.1.downsample", "layers.3", "norm"),
    ),
}


class Stock:
    """A stock network with shaken batch norms, its frozen form, two inputs and what the original says of them."""

    def __init__(self, name: str) -> None:
        make, size, self.layers = STOCK[name]
        with fixed_seed(1):
            self.network = shake_norms(make()).eval()
        self.backbone = freeze(self.network, (3, size, size), name=name)
        self.inputs = noise_pictures(2, (3, size, size))
        with torch.no_grad():
            self.out = self.network(self.inputs)


@pytest.fixture(scope="module", params=list(STOCK))
def stock(request: pytest.FixtureRequest) -> Iterator[Stock]:
    yield Stock(request.param)
    gc.collect()


def test_a_stock_network_keeps_its_output(stock: Stock) -> None:
    with torch.no_grad():
        found = stock.backbone(stock.inputs)
    assert found.shape == stock.out.shape
    assert relative(stock.out[:1], stock.out[1:]) > 1e-3  # so that the next line says something
    assert relative(found, stock.out) < 1e-5
    assert stock.backbone.outputs == 20


def test_a_stock_network_is_cut_at_every_depth(stock: Stock) -> None:
    seen, _ = record(stock.network, stock.layers, stock.inputs)
    for layer in stock.layers:
        head, tail = stock.backbone.split(layer)
        with torch.no_grad(), stock.backbone.counting() as passes:
            features = head(stock.inputs)
            assert list(passes) == ["head forward"], layer  # and not the whole network, behind a hook
            kept = [tensor.clone() for tensor in (features.values, *features.bypass)]
            found, again = tail(features), tail(features)
        assert relative(features.values, seen[layer]) < 1e-4, layer
        assert tuple(features.values.shape[1:]) == stock.backbone.layers[layer], layer
        assert relative(found, stock.out) < 1e-4, layer
        assert torch.equal(found, again), layer  # nothing is worked on in place
        for before, after in zip(kept, (features.values, *features.bypass), strict=True):
            assert torch.equal(before, after), layer


def test_a_stock_networks_tail_depends_on_the_layer_as_the_original_does(stock: Stock) -> None:
    seen, _ = record(stock.network, stock.layers, stock.inputs)
    for layer in stock.layers:
        head, tail = stock.backbone.split(layer)
        with torch.no_grad():
            features = head(stock.inputs)
            other = seen[layer] * torch.linspace(0.2, 1.4, seen[layer].shape[-1])
            found = tail(Features(other, features.bypass))
            wanted = replacing(stock.network, layer, other, stock.inputs)
        assert relative(wanted, stock.out) > 1e-3, layer
        assert relative(found, wanted) < 1e-4, layer


def test_a_stock_networks_features_in_one_forward(stock: Stock) -> None:
    seen, _ = record(stock.network, stock.layers, stock.inputs)
    with torch.no_grad():
        found = stock.backbone.features(stock.inputs, stock.layers)
    assert list(found) == list(stock.layers)
    for layer in stock.layers:
        assert relative(found[layer], seen[layer]) < 1e-4, layer


def test_a_stock_networks_gradient_behind_a_layer(stock: Stock) -> None:
    for layer in stock.layers[1:4]:
        kept: dict[str, Tensor] = {}

        def hook(module: nn.Module, args: object, output: Tensor, kept: dict[str, Tensor] = kept) -> Tensor:
            kept["values"] = output.detach().clone().requires_grad_()
            return kept["values"].clone()

        handle = stock.network.get_submodule(layer).register_forward_hook(hook)
        weights = torch.linspace(-1, 1, 20)
        wanted_score = (stock.network(stock.inputs) * weights).sum()
        handle.remove()
        (wanted,) = torch.autograd.grad(wanted_score, kept["values"])
        head, tail = stock.backbone.split(layer)
        with torch.no_grad():
            features = head(stock.inputs)
        values = features.values.clone().requires_grad_()
        (found,) = torch.autograd.grad((tail(Features(values, features.bypass)) * weights).sum(), values)
        assert wanted.abs().max() > 0
        assert relative(found, wanted) < 1e-3, layer


# --- everything about one small residual network, with float64 as the measure


LAYERS = [
    *("stage1", "stage1.1", "stage1.2", "stage2", "stage2.bn1", "stage2.bn2", "stage2.relu", "stage2.downsample"),
    *("stage2.downsample.1", "stage3", "stage3.bn1", "stage3.bn2", "stage3.relu", "stage3.downsample"),
    *("stage3.downsample.1", "pool", "fc"),
]


def test_the_layers_of_a_small_network() -> None:
    backbone = small_backbone()
    shapes = {
        "stage1": (8, 32, 32),
        "stage1.1": (8, 32, 32),
        "stage2": (12, 16, 16),
        "stage2.downsample.1": (12, 16, 16),
        "stage3.bn2": (16, 8, 8),
        "pool": (16, 1, 1),
        "fc": (5,),
    }
    for layer, shape in shapes.items():
        assert backbone.layers[layer] == shape
    assert set(backbone.layers) == set(LAYERS)
    assert backbone.outputs == 5


def test_features_of_all_layers_at_once_are_the_originals() -> None:
    network, backbone, inputs = small_net().eval(), small_backbone(), noise_pictures(3)
    seen, out = record(network, LAYERS, inputs)
    found = backbone.features(inputs, LAYERS)
    for layer in LAYERS:
        assert relative(found[layer], seen[layer]) < 1e-5, layer
    for layer in LAYERS:  # one by one: what a later layer adds must not have been needed, nor written over it
        assert relative(backbone.features(inputs, [layer])[layer], seen[layer]) < 1e-5, layer
    assert relative(backbone(inputs), out) < 1e-5


def test_batch_norm_is_folded_exactly() -> None:
    """Against float64, the frozen network is as close as the original float32 one."""
    network = small_net().eval()
    inputs = noise_pictures(4)
    with torch.no_grad():
        wanted = copy.deepcopy(network).double()(inputs.double())
        assert relative(small_backbone()(inputs), wanted) < 5e-6


def test_roles_and_their_layers() -> None:
    backbone = small_backbone()
    assert backbone.layer("bottleneck") == "stage2"
    assert backbone.layer("stage2.bn1") == "stage2.bn1"
    inputs = noise_pictures(2)
    found = backbone.features(inputs, ["early", "stage3"])
    assert list(found) == ["early", "stage3"]
    assert torch.equal(found["early"], backbone.features(inputs, ["stage1"])["stage1"])


def test_a_folded_convolution_says_where_to_look() -> None:
    backbone = small_backbone()
    for ask in (backbone.layer, backbone.split, lambda name: backbone.features(noise_pictures(1), [name])):
        with pytest.raises(UserError, match=r"'stage2\.conv1' is folded.*take 'stage2\.bn1'"):
            ask("stage2.conv1")
    with pytest.raises(UserError, match=r"role 'early'.*'stage2\.conv1' is folded.*take 'stage2\.bn1'"):
        freeze(small_net(), (3, 32, 32), {"early": "stage2.conv1"})


def test_an_unknown_layer_names_the_nearest() -> None:
    backbone = small_backbone()
    for wrong, near in [("stage22", "stage2"), ("stage3.bn3", r"stage3\.bn2"), ("botleneck", "bottleneck")]:
        with pytest.raises(UserError, match=rf"small has no layer '{wrong}'\. Did you mean .*{near}"):
            backbone.split(wrong)
    with pytest.raises(UserError, match=r"role 'late'.*no layer 'stage9'.*stage"):
        freeze(small_net(), (3, 32, 32), {"late": "stage9"})


def fingerprint(network: nn.Module) -> dict[str, object]:
    found: dict[str, object] = {}
    for name, part in network.named_modules():
        found[name] = (
            type(part),
            part.training,
            getattr(part, "inplace", None),
            tuple(part._forward_hooks),
            tuple(part._forward_pre_hooks),
            tuple(part._backward_hooks),
        )
    for name, tensor in [*network.named_parameters(), *network.named_buffers()]:
        found["tensor " + name] = (tensor.clone().numpy(force=True).tobytes(), tensor.requires_grad, tensor.stride())
        assert tensor.grad is None
    return found


def test_the_callers_network_is_left_as_it_was() -> None:
    network = small_net().train()
    network.get_submodule("stage2.bn1").eval()
    network.get_submodule("fc").weight.requires_grad_(False)
    before = fingerprint(network)
    backbone = freeze(network, (3, 32, 32))
    inputs = noise_pictures(5)
    backbone(inputs)
    backbone.features(inputs, ["stage1", "stage2.bn1"])
    head, tail = backbone.split("stage2.bn2")
    features = head(inputs)
    tail(features.replaced(features.values.requires_grad_(), torch.arange(5))).sum().backward()
    assert fingerprint(network) == before


def test_a_network_in_training_mode_is_frozen_with_its_running_statistics() -> None:
    network = small_net()
    inputs = noise_pictures(4)
    with torch.no_grad():
        wanted = copy.deepcopy(network).eval()(inputs)
        trained = copy.deepcopy(network).train()(inputs)
        found = freeze(network.train(), (3, 32, 32))(inputs)
    assert relative(trained, wanted) > 0.1
    assert relative(found, wanted) < 1e-5


def test_later_changes_of_the_callers_weights_do_not_reach_the_backbone() -> None:
    network = small_net()
    backbone = freeze(network, (3, 32, 32))
    inputs = noise_pictures(2)
    before = backbone(inputs)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(1)
    assert torch.equal(backbone(inputs), before)


def test_passes_leave_no_gradient_and_no_hook() -> None:
    backbone = small_backbone()
    inputs = noise_pictures(4).requires_grad_()
    backbone(inputs).sum().backward()
    head, tail = backbone.split("stage2.bn2")
    tail(head(inputs)).sum().backward()
    assert inputs.grad is not None
    for parameter in backbone._network.parameters():
        assert parameter.grad is None
        assert not parameter.requires_grad
    for part in backbone._network.modules():
        assert not part._forward_hooks
        assert not part.training


@pytest.mark.parametrize("rows", [1, 3, 5, 16])
def test_a_pictures_output_does_not_depend_on_how_many_run_with_it(rows: int) -> None:
    backbone, inputs = small_backbone(), noise_pictures(16)
    with torch.no_grad():
        whole = backbone(inputs)
        torch.testing.assert_close(backbone(inputs[:rows]), whole[:rows], rtol=1e-6, atol=1e-6)
        for layer in ("stage1", "stage2.bn2"):
            head, tail = backbone.split(layer)
            features, some = head(inputs), head(inputs[:rows])
            assert len(some.values) == rows
            torch.testing.assert_close(some.values, features.values[:rows], rtol=1e-6, atol=1e-6)
            assert tail(some).shape == (rows, 5)
            torch.testing.assert_close(tail(some), tail(features)[:rows], rtol=1e-6, atol=1e-6)
        found = backbone.features(inputs[:rows], ["stage2"])["stage2"]
        torch.testing.assert_close(found, backbone.features(inputs, ["stage2"])["stage2"][:rows], rtol=1e-6, atol=1e-6)


def test_padded_rows_give_no_gradient_of_their_own() -> None:
    """A picture alone is padded by repeating it; its gradient is that of one row, not of four."""
    backbone, inputs = small_backbone(), noise_pictures(4)
    head, tail = backbone.split("stage2")
    gradients = []
    for rows in (inputs[:1], inputs):
        with torch.no_grad():
            values = head(rows).values
        values.requires_grad_()
        gradients.append(torch.autograd.grad(tail(values)[:, 1].sum(), values)[0])
    assert relative(gradients[0], gradients[1][:1]) < 1e-5


def test_replaced_rows_bring_their_own_bypass() -> None:
    backbone, network, inputs = small_backbone(), small_net().eval(), noise_pictures(3)
    head, tail = backbone.split("stage2.bn2")
    with torch.no_grad():
        features = head(inputs)
        assert features.bypass
        rows = torch.tensor([2, 0, 0, 1, 2])
        other = noise_pictures(5, (12, 16, 16), seed=3)
        found = tail(features.replaced(other, rows))
        wanted = replacing(network, "stage2.bn2", other, inputs[rows])
    assert relative(found, wanted) < 1e-5


def test_tail_takes_bare_values_where_nothing_passes_by() -> None:
    backbone, inputs = small_backbone(), noise_pictures(2)
    head, tail = backbone.split("stage2")
    features = head(inputs)
    assert features.bypass == ()
    assert torch.equal(tail(features.values), tail(features))


def test_head_does_not_run_what_lies_behind_the_layer() -> None:
    """The tail's weights set to NaN leave the head finite, and the head's leave the tail."""
    backbone, inputs = small_backbone(), noise_pictures(2)
    head, tail = backbone.split("stage2")
    features = head(inputs)
    with torch.no_grad():
        backbone._network.get_submodule("fc").weight.fill_(torch.nan)
        assert head(inputs).values.isfinite().all()
        assert backbone.features(inputs, ["stage2"])["stage2"].isfinite().all()
        assert tail(features).isnan().all()
    backbone = small_backbone()
    head, tail = backbone.split("stage2")
    with torch.no_grad():
        backbone._network.get_submodule("stage1.0").weight.fill_(torch.nan)
        assert tail(features).isfinite().all()


def test_reused_relus_become_modules_of_their_own() -> None:
    backbone = small_backbone()
    relus = [part for part in backbone._network.modules() if isinstance(part, nn.ReLU)]
    assert len(relus) == 5  # 1 + 2 x 2: each block calls its only one twice
    assert not any(part.inplace for part in relus)
    calls: dict[nn.Module, int] = {}
    handles = [p.register_forward_hook(lambda m, *_: calls.update({m: calls.get(m, 0) + 1})) for p in relus]
    backbone(noise_pictures(1))
    for handle in handles:
        handle.remove()
    assert set(calls.values()) == {1}
    assert len(calls) == 5


class Functional(nn.Module):
    """Activations as functions and methods, in place and not."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Conv2d(3, 3, 3, padding=1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.a(x), inplace=True)
        x = self.b(x).relu()
        x = F.gelu(self.c(x), approximate="tanh") + torch.relu(x) + F.relu6(input=x, inplace=True)
        return F.silu(self.d(x), True).relu_().mean((2, 3))


def test_functional_activations_become_modules() -> None:
    with fixed_seed(2):
        network = Functional()
    inputs = noise_pictures(3, (3, 8, 8))
    backbone = freeze(network, (3, 8, 8))
    seen, out = record(network, ["a", "b", "c", "d"], inputs)
    assert relative(backbone(inputs), out) < 1e-6
    found = backbone.features(inputs, ["a", "b", "c", "d"])
    for layer in "abcd":
        assert relative(found[layer], seen[layer]) < 1e-6
    kinds = [type(p).__name__ for p in backbone._network.modules() if not list(p.children())]
    assert sorted(k for k in kinds if k != "Conv2d") == ["GELU", "ReLU", "ReLU", "ReLU", "ReLU", "ReLU6", "SiLU"]
    head, tail = backbone.split("b")
    assert relative(tail(head(inputs)), out) < 1e-6


class Extra(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor, scale: float = 2.0, mask: Tensor | None = None) -> Tensor:
        return self.conv(x).mean((2, 3)) * scale


def test_an_optional_second_argument_takes_its_default() -> None:
    with fixed_seed(2):
        network = Extra()
    inputs = noise_pictures(3, (3, 8, 8))
    backbone = freeze(network, (3, 8, 8))
    assert relative(backbone(inputs), network(inputs)) < 1e-6
    head, tail = backbone.split("conv")
    assert relative(tail(head(inputs)), network(inputs)) < 1e-6


class Masked(Extra):
    def forward(self, x: Tensor, scale: float = 1.0, mask: Tensor | None = None) -> Tensor:
        out = self.conv(x)
        if mask is not None:  # a tracer takes this branch, the default does not
            out = out * mask
        return out.mean((2, 3)) * scale


def test_an_optional_argument_that_is_looked_at() -> None:
    with fixed_seed(2):
        network = Masked()
    inputs = noise_pictures(3, (3, 8, 8))
    backbone = freeze(network, (3, 8, 8))
    assert relative(backbone(inputs), network(inputs)) < 1e-6
    head, tail = backbone.split("conv")
    features = head(inputs)
    assert relative(tail(features), network(inputs)) < 1e-6
    doubled = tail(Features(features.values * 2, features.bypass))
    assert relative(doubled, 2 * network(inputs)) < 1e-6


class SharedNorm(nn.Module):
    """Neither pair may be folded: the convolution of the first is used twice, the norm of the second too."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm1, self.norm2 = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.BatchNorm2d(3)
        self.first, self.second, self.norm3 = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        self.both = nn.Conv2d(3, 3, 1)
        self.norm4 = nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm2(self.conv(self.norm1(self.conv(x))))
        x = self.norm3(self.first(x)) + self.norm3(self.second(x))
        y = self.both(x)
        return (self.norm4(y) + y).mean((2, 3))


def test_shared_convolutions_and_norms_are_not_folded(caplog: pytest.LogCaptureFixture) -> None:
    with fixed_seed(2):
        network = shake_norms(SharedNorm()).eval()
    inputs = noise_pictures(3, (3, 8, 8))
    with caplog.at_level(logging.WARNING):
        backbone = freeze(network, (3, 8, 8))
    assert not caplog.records  # it is traced, not run behind hooks
    layers = ["norm1", "conv", "norm2", "first", "second", "norm3", "both", "norm4"]
    seen, out = record(network, layers, inputs)
    found = backbone.features(inputs, layers)
    assert relative(backbone(inputs), out) < 1e-5
    for layer in layers:
        assert relative(found[layer], seen[layer]) < 1e-5, layer


# --- networks that cannot be traced, or not cut


class DataDependent(nn.Module):
    """Control flow on the data: torch.fx cannot trace it. Its ReLU behind `conv` works in place."""

    def __init__(self, inplace: bool = False) -> None:
        super().__init__()
        self.stage = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4))
        self.relu = nn.ReLU(inplace=inplace)
        self.last = nn.Conv2d(4, 6, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.stage(x))
        if bool(x.sum() > 1e9):
            raise RuntimeError("poisoned tail")
        return self.last(x).mean((2, 3))


def data_dependent(inplace: bool = False) -> nn.Module:
    with fixed_seed(4):
        return shake_norms(DataDependent(inplace)).eval()


def hooks_of(backbone: Backbone) -> int:
    return sum(len(part._forward_hooks) for part in backbone._network.modules())


def test_an_untraceable_network_still_splits(caplog: pytest.LogCaptureFixture) -> None:
    network, inputs = data_dependent(), noise_pictures(3, (3, 8, 8))
    with caplog.at_level(logging.WARNING):
        backbone = freeze(network, (3, 8, 8), {"bottleneck": "stage"}, name="odd")
    assert "odd cannot be cut at a layer" in caplog.text
    assert backbone.layers["stage"] == (4, 8, 8)
    assert backbone.layers["stage.0"] == (4, 8, 8)
    assert backbone.outputs == 6
    seen, out = record(network, ["stage", "stage.0", "last"], inputs)
    assert relative(backbone(inputs), out) < 1e-6
    assert hooks_of(backbone) == 0
    found = backbone.features(inputs, ["bottleneck", "stage.0", "last"])
    for name, layer in [("bottleneck", "stage"), ("stage.0", "stage.0"), ("last", "last")]:
        assert relative(found[name], seen[layer]) < 1e-6
    assert hooks_of(backbone) == 0

    head, tail = backbone.split("bottleneck")
    features = head(inputs)
    assert relative(features.values, seen["stage"]) < 1e-6
    assert relative(tail(features), out) < 1e-6
    rows = torch.tensor([2, 2, 0, 1])
    other = noise_pictures(4, (4, 8, 8)).requires_grad_()
    found = tail(features.replaced(other, rows))
    assert hooks_of(backbone) == 0
    assert relative(found, network.last(network.relu(other)).mean((2, 3))) < 1e-6
    (gradient,) = torch.autograd.grad(found[:, 1].sum(), other)
    (wanted,) = torch.autograd.grad(network.last(network.relu(other)).mean((2, 3))[:, 1].sum(), other)
    assert relative(gradient, wanted) < 1e-5


def test_an_untraceable_network_keeps_no_hook_after_an_error() -> None:
    backbone, inputs = freeze(data_dependent(), (3, 8, 8)), noise_pictures(3, (3, 8, 8))
    head, tail = backbone.split("stage")
    features = head(inputs)
    with pytest.raises(RuntimeError, match="poisoned tail"):
        tail(features.replaced(features.values + 1e9, torch.arange(3)))
    assert hooks_of(backbone) == 0
    huge = torch.full((1, 3, 8, 8), 1e12)
    with pytest.raises(RuntimeError, match="poisoned tail"):
        backbone.features(torch.cat([huge, -huge]), ["stage"])
    assert hooks_of(backbone) == 0
    assert relative(tail(features), backbone(inputs)) < 1e-6


def test_an_untraceable_networks_unknown_layer() -> None:
    with pytest.raises(UserError, match=r"no layer 'stag'.*stage"):
        freeze(data_dependent(), (3, 8, 8)).split("stag")


def test_an_untraceable_tail_wants_the_features_of_its_head() -> None:
    _, tail = freeze(data_dependent(), (3, 8, 8)).split("stage")
    with pytest.raises(TypeError, match="Features that head returned"):
        tail(torch.zeros(1, 4, 8, 8))


def test_an_untraceable_network_with_an_activation_in_place() -> None:
    network, inputs = data_dependent(inplace=True), noise_pictures(3, (3, 8, 8))
    backbone = freeze(network, (3, 8, 8))
    seen, out = record(network, ["stage"], inputs)
    assert relative(backbone.features(inputs, ["stage"])["stage"], seen["stage"]) < 1e-6
    head, tail = backbone.split("stage")
    features = head(inputs)
    values = features.values.clone().requires_grad_()
    assert relative(tail(Features(values, features.bypass)), out) < 1e-6


class SizeInFront(nn.Module):
    """Traceable, but a size read in front of `block` is used behind it, so that it cannot be cut there."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 1)
        self.block = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU())
        self.plain = nn.Conv2d(4, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        rows, _, height, _ = self.first(x).shape
        x = self.plain(self.block(self.first(x)))
        return x.reshape(rows, 5, -1).sum(2) / height


@pytest.mark.parametrize(
    "layer",
    [
        "plain",
        "block",
    ],
)
def test_a_layer_that_cannot_be_cut_at(layer: str, caplog: pytest.LogCaptureFixture) -> None:
    with fixed_seed(5):
        network = SizeInFront().eval()
    inputs = noise_pictures(3, (3, 8, 8))
    backbone = freeze(network, (3, 8, 8), name="sized")
    head, tail = backbone.split(layer)
    assert f"sized cannot be cut behind {layer}" in caplog.text
    features = head(inputs)
    assert relative(tail(features), network(inputs)) < 1e-6
    rows = torch.tensor([0, 0, 2, 1, 1])
    other = features.values[rows] * torch.tensor([0.5, 2, 3, 0, 1]).view(-1, 1, 1, 1)
    other.requires_grad_()
    wanted = replacing(network, layer, other, inputs[rows])
    found = tail(features.replaced(other, rows))
    assert hooks_of(backbone) == 0
    assert relative(found, wanted) < 1e-6
    (gradient,) = torch.autograd.grad(found[:, 2].sum(), other)
    assert relative(gradient, torch.autograd.grad(wanted[:, 2].sum(), other)[0]) < 1e-5


def test_the_output_as_a_layer() -> None:
    with fixed_seed(1):
        network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Sequential(nn.Linear(144, 5), nn.ReLU())).eval()
    inputs = noise_pictures(2, (3, 8, 8))
    head, tail = freeze(network, (3, 8, 8)).split("2")
    features = head(inputs)
    assert relative(tail(features), network(inputs)) < 1e-6
    assert relative(tail(features.replaced(features.values * 3, torch.arange(2))), 3 * network(inputs)) < 1e-6


class Stem(nn.Module):
    """timm's deep stem (resnest50d's conv1): a container that ends with a convolution, the batch norm after it."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3))
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.stem(x)).mean((2, 3))


def test_a_container_that_ends_with_a_folded_convolution() -> None:
    with fixed_seed(5):
        network = shake_norms(Stem()).eval()
    inputs = noise_pictures(2, (3, 8, 8))
    backbone = freeze(network, (3, 8, 8))
    seen, _ = record(network, ["stem"], inputs)
    if "stem" in backbone.layers:
        assert relative(backbone.features(inputs, ["stem"])["stem"], seen["stem"]) < 1e-5
    else:
        with pytest.raises(UserError, match="norm"):
            backbone.split("stem")


class Windows(nn.Module):
    """A module that sees windows of a picture as rows of their own, as in a Swin transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Conv2d(3, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.reshape(-1, 3, 4, 8)).reshape(-1, 2, 5, 4, 8).mean((1, 3, 4))


def test_a_layer_with_several_rows_a_picture_is_not_offered() -> None:
    with fixed_seed(5):
        network = Windows()
    inputs = noise_pictures(3, (3, 8, 8))
    backbone = freeze(network, (3, 8, 8))
    assert relative(backbone(inputs), network(inputs)) < 1e-6
    assert "inner" not in backbone.layers


class TwoOutputs(Extra):
    def forward(self, x: Tensor, scale: float = 1.0, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        out = self.conv(x)
        return out.mean((2, 3)), out


def test_a_network_with_several_outputs_is_a_users_error() -> None:
    with pytest.raises(UserError, match="one tensor"):
        freeze(TwoOutputs(), (3, 8, 8))


class Unsquare(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3 * 4 * 8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.flatten(1))


def test_an_input_that_is_not_square() -> None:
    with pytest.raises(UserError, match="square"):
        freeze(Unsquare(), (3, 4, 8))


def test_batch_norm_without_running_statistics() -> None:
    """There is no way to freeze such a norm, so it has to be said."""
    with pytest.raises(UserError, match="statistics"):
        freeze(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False), nn.Flatten()), (3, 8, 8))


# --- counting, digest, checks


def test_counting() -> None:
    backbone, inputs = small_backbone(), noise_pictures(4)
    with backbone.counting() as all_of_it:
        backbone(inputs)
        with backbone.counting() as inner, torch.no_grad():
            head, tail = backbone.split("stage2")
            features = head(inputs)
            tail(features)
            tail(features)
            backbone.features(inputs, ["stage1", "stage3"])
        assert dict(inner) == {"head forward": 8, "tail forward": 8}
        values = features.values.clone().requires_grad_()
        tail(values).sum().backward()
    assert dict(all_of_it) == {"forward": 4, "head forward": 8, "tail forward": 12, "tail backward": 4}
    backbone(inputs)
    assert all_of_it["forward"] == 4  # closed


def test_counting_counts_pictures_and_no_padding() -> None:
    backbone, inputs = small_backbone(), noise_pictures(5)
    with backbone.counting() as counter:
        backbone(inputs)
        head, tail = backbone.split("stage2")
        tail(head(inputs))
    assert dict(counter) == {"forward": 5, "head forward": 5, "tail forward": 5}


def test_counting_closes_after_an_error() -> None:
    backbone = small_backbone()
    with pytest.raises(ZeroDivisionError), backbone.counting() as counter:
        raise ZeroDivisionError
    backbone(noise_pictures(4))
    assert dict(counter) == {}


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("where", ["stage2.conv2.weight", "stage1.1.running_var"])
def test_weights_that_are_not_finite(bad: float, where: str) -> None:
    network = small_net()
    network.state_dict()[where].view(-1)[3] = bad
    with pytest.raises(UserError, match=rf"weights of mine are not finite: {where}"):
        freeze(network, (3, 32, 32), name="mine")


def test_the_digest_is_of_the_weights() -> None:
    network = small_net()
    digest = freeze(network, (3, 32, 32)).digest
    assert freeze(network.train(), (3, 32, 32), {"late": "stage3"}, name="other").digest == digest
    assert freeze(small_net(), (3, 32, 32)).to("cpu").digest == digest
    for path, tensor in network.state_dict().items():
        if tensor.is_floating_point():
            one = copy.deepcopy(network)
            one.state_dict()[path].view(-1)[-1] += 1e-4
            assert freeze_digest(one) != digest, path
    swapped = copy.deepcopy(network)
    weight = swapped.get_submodule("fc").weight.data
    weight[[0, 1]] = weight[[1, 0]]
    assert freeze_digest(swapped) != digest


def freeze_digest(network: nn.Module) -> str:
    from ibxai.backbones.backbone import weights_digest

    return weights_digest(network)


def test_half_precision_weights() -> None:
    network = small_net().eval()
    inputs = noise_pictures(2)
    with torch.no_grad():
        wanted = copy.deepcopy(network).half().float()(inputs)
        assert relative(freeze(network.half(), (3, 32, 32))(inputs), wanted) < 1e-5
    assert network.get_submodule("fc").weight.dtype == torch.float16


def test_freezing_leaves_global_state_alone() -> None:
    torch.manual_seed(11)
    network = small_net()
    state = torch.get_rng_state()
    freeze(network, (3, 32, 32))(noise_pictures(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.is_grad_enabled()


def test_a_small_class_count_is_seen() -> None:
    with fixed_seed():
        assert freeze(SmallNet(classes=2), (3, 32, 32)).outputs == 2


def test_grayscale_input() -> None:
    network = nn.Sequential(Block(1, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    backbone = freeze(network, (1, 16, 16))
    assert backbone.preprocessing.input_shape == (1, 16, 16)
    assert backbone(noise_pictures(2, (1, 16, 16))).shape == (2, 4)
