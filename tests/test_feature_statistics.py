"""Feature statistics: several layers in one pass, of the input, their cache; grids of tokens and channels-last maps;
and the bottleneck's price per pixel."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
from networks import batch_of, fixed_seed, noise_pictures, relative, small_backbone
from torch import Tensor, nn

from ibxai.backbones import Backbone, freeze
from ibxai.errors import UserError
from ibxai.methods import IBA, MultilayerIBA
from ibxai.methods.feature_statistics import INPUT, FeatureGrid, FeatureStatistics, estimate_statistics
from ibxai.preprocessing import Preprocessing
from ibxai.types import Batch


class Counted:
    """A reference that counts how often it is gone through, with or without a cache."""

    def __init__(self, pictures: Tensor, cache: Path | None = None, digest: str = "these") -> None:
        self.pictures, self.cache, self.digest, self.passes = pictures, cache, digest, 0

    def __iter__(self) -> Iterator[Batch]:
        self.passes += 1
        for part in self.pictures.split(5):
            yield batch_of(part, [0] * len(part))


PICTURES = noise_pictures(12)
LAYERS = ["stage1", "stage2", "late"]


def estimate(
    reference: Counted, layers: Sequence[str] = LAYERS, backbone: Backbone | None = None, least: int = 12
) -> dict[str, FeatureStatistics]:
    return estimate_statistics(backbone or small_backbone(), layers, reference, least, 0.01, 0.1)


def alike(found: FeatureStatistics, wanted: FeatureStatistics) -> None:
    assert torch.equal(found.mean, wanted.mean)
    assert torch.equal(found.std, wanted.std)
    assert torch.equal(found.active, wanted.active)
    assert (found.count, found.pooled) == (wanted.count, wanted.pooled)


# --- several layers, and the input


@pytest.mark.parametrize("least", [12, 13])
def test_several_layers_in_one_pass_are_the_same_one_by_one(least: int) -> None:
    reference = Counted(PICTURES)
    backbone = small_backbone()
    with backbone.counting() as passes:
        found = estimate(reference, [*LAYERS, INPUT], backbone, least)
    assert reference.passes == 1
    assert dict(passes) == {"head forward": 12}
    assert list(found) == [*LAYERS, INPUT]
    for layer in [*LAYERS, INPUT]:
        alike(found[layer], estimate(Counted(PICTURES), [layer], least=least)[layer])
    assert found["stage1"].mean.shape == ((8, 32, 32) if least == 12 else (8, 1, 1))
    assert found["late"].mean.shape == ((16, 8, 8) if least == 12 else (16, 1, 1))
    assert found["late"].pooled == (least == 13)


@pytest.mark.parametrize("least", [12, 13])
def test_of_the_input(least: int) -> None:
    backbone, pictures = small_backbone(), PICTURES.clone()
    pictures[:, 2, 5:] = 0
    with backbone.counting() as passes:
        found = estimate(Counted(pictures), [INPUT], backbone, least)[INPUT]
    assert not passes  # no network is asked
    values, dims = pictures.double(), (0, 2, 3)  # pooled, however many pictures there are
    assert found.pooled
    torch.testing.assert_close(found.mean.double(), values.mean(dims, keepdim=True)[0], rtol=1e-6, atol=1e-6)
    deviation = values.std(dims, unbiased=False, keepdim=True)[0].clamp_min(0.01)
    torch.testing.assert_close(found.std.double(), deviation, rtol=1e-6, atol=1e-6)
    assert torch.equal(found.active, (values != 0).double().mean(dims, keepdim=True)[0] > 0.1)
    assert found.active.all()  # 5 of 32 rows of the third channel are more than a tenth


def test_layers_by_role_and_by_name_in_one_call() -> None:
    found = estimate(Counted(PICTURES), ["stage2", "mid"])
    alike(found["stage2"], found["mid"])


def test_an_empty_reference() -> None:
    with pytest.raises(UserError, match="reference split is empty"):
        estimate_statistics(small_backbone(), ["stage2", INPUT], [], 1, 0.01, 0.1)


# --- the cache


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_cache_is_written_and_read(tmp_path: Path) -> None:
    first = Counted(PICTURES, tmp_path / "cache")
    found = estimate(first, [*LAYERS, INPUT])
    assert first.passes == 1
    assert len(files(tmp_path / "cache")) == 4
    assert all(name.startswith("moments-") and name.endswith(".safetensors") for name in files(tmp_path / "cache"))
    plain = estimate(Counted(PICTURES), [*LAYERS, INPUT])
    again = Counted(PICTURES, tmp_path / "cache")
    backbone = small_backbone()
    with backbone.counting() as passes:
        read = estimate(again, [*LAYERS, INPUT], backbone)
    assert again.passes == 0
    assert not passes
    for layer in [*LAYERS, INPUT]:
        alike(found[layer], plain[layer])
        alike(read[layer], plain[layer])


def test_only_missing_layers_are_estimated(tmp_path: Path) -> None:
    estimate(Counted(PICTURES, tmp_path), ["stage2"])
    reference = Counted(PICTURES, tmp_path)
    found = estimate(reference, LAYERS)
    assert reference.passes == 1
    assert len(files(tmp_path)) == 3
    for layer, wanted in estimate(Counted(PICTURES)).items():
        alike(found[layer], wanted)


def test_settings_come_after_the_cache(tmp_path: Path) -> None:
    """Moments are kept, not statistics: pooling, floor and activity may be others without another pass."""
    estimate(Counted(PICTURES, tmp_path), ["stage2"])
    reference = Counted(PICTURES, tmp_path)
    found = estimate_statistics(small_backbone(), ["stage2"], reference, 99, 0.5, 0.4)["stage2"]
    assert reference.passes == 0
    alike(found, estimate_statistics(small_backbone(), ["stage2"], Counted(PICTURES), 99, 0.5, 0.4)["stage2"])
    assert found.pooled


def test_a_role_and_its_layer_share_a_file(tmp_path: Path) -> None:
    estimate(Counted(PICTURES, tmp_path), ["stage2"])
    reference = Counted(PICTURES, tmp_path)
    estimate(reference, ["bottleneck"])
    assert reference.passes == 0


def test_the_cache_is_keyed_by_what_matters(tmp_path: Path) -> None:
    estimate(Counted(PICTURES, tmp_path), ["stage2"])
    network = small_backbone()
    others = {
        "weights": (Counted(PICTURES, tmp_path), "stage2", small_backbone(seed=1)),
        "layer": (Counted(PICTURES, tmp_path), "stage3", network),
        "reference": (Counted(noise_pictures(12, seed=9), tmp_path, "others"), "stage2", network),
        "input": (Counted(PICTURES, tmp_path), INPUT, network),
    }
    for i, (name, (reference, layer, backbone)) in enumerate(others.items()):
        found = estimate(reference, [layer], backbone)
        assert reference.passes == 1, name
        assert len(files(tmp_path)) == i + 2, name
        alike(found[layer], estimate(Counted(reference.pictures), [layer], backbone)[layer])


def test_the_cache_is_keyed_by_the_preprocessing(tmp_path: Path) -> None:
    made = [
        freeze(nn.Sequential(nn.Conv2d(3, 2, 3), nn.Flatten()), preprocessing=Preprocessing(8, 8, mean, (1.0,) * 3))
        for mean in ((0.0, 0.0, 0.0), (0.5, 0.5, 0.5))
    ]
    made[1].digest = made[0].digest
    for i, backbone in enumerate(made):
        estimate(Counted(noise_pictures(12, (3, 8, 8)), tmp_path), [INPUT], backbone)
        assert len(files(tmp_path)) == i + 1


@pytest.mark.parametrize("left", [0, 5, 8, 40, 0.5, -1])
def test_a_file_cut_short_is_estimated_again(tmp_path: Path, left: float) -> None:
    wanted = estimate(Counted(PICTURES, tmp_path), ["stage2"])["stage2"]
    (name,) = files(tmp_path)
    whole = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(whole[: int(left * len(whole)) if isinstance(left, float) else left])
    reference = Counted(PICTURES, tmp_path)
    alike(estimate(reference, ["stage2"])["stage2"], wanted)
    assert reference.passes == 1
    assert (tmp_path / name).read_bytes() == whole  # and it is whole again
    assert files(tmp_path) == [name]


def test_a_file_that_is_something_else_is_estimated_again(tmp_path: Path) -> None:
    wanted = estimate(Counted(PICTURES, tmp_path), ["stage2"])["stage2"]
    (name,) = files(tmp_path)
    for content in (b"\x00" * 500, b"not a tensor " * 50, safetensors.torch.save({"mean": torch.zeros(3)})):
        (tmp_path / name).write_bytes(content)
        reference = Counted(PICTURES, tmp_path)
        alike(estimate(reference, ["stage2"])["stage2"], wanted)
        assert reference.passes == 1


# --- grids


@pytest.mark.parametrize(
    ("shape", "kind", "plane", "prefix"),
    [
        ((12, 16, 16), "map", (16, 16), 0),
        ((12, 5, 7), "map", (5, 7), 0),
        ((16, 16, 16), "map", (16, 16), 0),
        ((1, 2, 1), "map", (2, 1), 0),
        ((14, 14, 96), "channels last", (14, 14), 0),
        ((7, 7, 768), "channels last", (7, 7), 0),
        ((197, 192), "tokens", (14, 14), 1),
        ((196, 192), "tokens", (14, 14), 0),
        ((201, 384), "tokens", (14, 14), 5),
        ((4, 3), "tokens", (2, 2), 0),
    ],
)
def test_a_grid_goes_to_the_plane_and_back(
    shape: tuple[int, ...], kind: str, plane: tuple[int, int], prefix: int
) -> None:
    grid = FeatureGrid.of(shape, "layer")
    assert (grid.kind, (grid.height, grid.width), grid.prefix) == (kind, plane, prefix)
    values = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    mapped = grid.to_map(values)
    assert mapped.shape[2:] == plane
    other = torch.randn(2, *shape, generator=torch.Generator().manual_seed(1))
    back = grid.from_map(mapped, other)
    assert back.shape == values.shape
    assert torch.equal(back[:, prefix:], values[:, prefix:])
    if prefix:
        assert torch.equal(back[:, :prefix], other[:, :prefix])
    assert torch.equal(grid.from_map(mapped, values), values)


def test_where_a_value_lies() -> None:
    tokens = torch.arange(10.0)[:, None].repeat(1, 2)[None]  # a class token 0, then patches 1 ... 9, row by row
    assert FeatureGrid.of((10, 2), "t").to_map(tokens)[0, 1].tolist() == [[1, 2, 3], [4, 5, 6], [7, 8, 9]]
    last = torch.zeros(1, 4, 4, 6)
    last[0, 1, 3, 5] = 1
    assert FeatureGrid.of((4, 4, 6), "l").to_map(last).nonzero().tolist() == [[0, 5, 1, 3]]


@pytest.mark.parametrize("shape", [(5,), (10, 1, 1), (1, 8), (3, 5), (214, 8), (2, 3, 4, 5), ()])
def test_no_plane(shape: tuple[int, ...]) -> None:
    with pytest.raises(UserError, match="lies on the picture"):
        FeatureGrid.of(shape, "somewhere")


# --- bottlenecks on tokens and on channels-last maps


class Turned(nn.Module):
    """The same network, whose layer "turned" gives [C, h, w], [h, w, C], or tokens behind `prefix` of their own."""

    def __init__(self, form: str, prefix: int = 0) -> None:
        super().__init__()
        self.form, self.prefix = form, prefix
        with fixed_seed(3):
            self.conv, self.fc = nn.Conv2d(3, 6, 4, 4), nn.Linear(6, 4)
            self.fc.weight.data.mul_(10)
            self.register_buffer("first", torch.randn(1, prefix, 6))
        self.turned = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        maps = self.conv(x).relu()
        if self.form == "map":
            return self.fc(self.turned(maps).mean((2, 3)))
        if self.form == "channels last":
            return self.fc(self.turned(maps.permute(0, 2, 3, 1)).mean((1, 2)))
        tokens = maps.flatten(2).transpose(1, 2)
        tokens = self.turned(torch.cat([self.first.expand(len(x), -1, -1), tokens], 1))
        return self.fc(tokens[:, self.prefix :].mean(1) + tokens[:, : self.prefix].sum(1))


def turned(form: str, prefix: int = 0) -> Backbone:
    return freeze(Turned(form, prefix), (3, 32, 32), {"bottleneck": "turned"}, name=form)


@pytest.mark.parametrize("least", [1, 100])
@pytest.mark.parametrize("form", ["channels last", "tokens"])
def test_another_layout_starts_with_the_same_bits(form: str, least: int) -> None:
    """One network in three layouts: before the first step, where no noise counts, the maps are equal."""
    batch, reference = batch_of(noise_pictures(3), [0, 1, 2]), list(Counted(PICTURES))
    start = IBA(steps=1, draws=1, learning_rate=1e-9, min_reference=least)
    wanted = start.fit(turned("map"), reference, 0)(batch)
    found = start.fit(turned(form), reference, 0)(batch)
    assert relative(found.heatmap, wanted.heatmap) < 1e-4
    assert wanted.heatmap.std() > 0
    # and the search runs, one by one as in a batch
    search = IBA(steps=4, draws=2, min_reference=least).fit(turned(form), reference, 0)
    whole = search(batch)
    assert whole.heatmap.shape == (3, 32, 32)
    assert relative(search(batch.take([1])).heatmap[0], whole.heatmap[1]) < 1e-4
    assert relative(whole.heatmap, wanted.heatmap) > 0.1


@pytest.mark.parametrize("prefix", [1, 3])
def test_smoothing_leaves_prefix_tokens_alone(prefix: int) -> None:
    settings = IBA(smoothing=1.0, min_reference=1)
    backbone = turned("tokens", prefix)
    statistics = settings.statistics(backbone, ["turned"], list(Counted(PICTURES)))
    (bottleneck,) = settings.bottlenecks(backbone, ["turned"], statistics, 0)
    share = torch.rand(2, 64 + prefix, 6, generator=torch.Generator().manual_seed(0))
    found = bottleneck.smoothed(share)
    assert torch.equal(found[:, :prefix], share[:, :prefix])
    assert (found[:, prefix:] - share[:, prefix:]).abs().max() > 0.1
    moved = share.clone()
    moved[:, :prefix] += 5  # and no patch feels them
    assert torch.equal(bottleneck.smoothed(moved)[:, prefix:], found[:, prefix:])
    # a patch spreads over its neighbours on the plane, not to those before and after it in the row of tokens
    one = torch.zeros(1, 64 + prefix, 6)
    one[0, prefix + 8 * 3 + 7, 2] = 1  # the last of its row
    spread = bottleneck.smoothed(one)[0, prefix:, 2].view(8, 8)
    assert spread[2, 7] > 0
    assert spread[4, 7] > 0
    assert spread[4, 0] == 0
    assert not bottleneck.smoothed(one)[0, :, [0, 1, 3, 4, 5]].any()


@pytest.fixture(scope="module")
def vit() -> Backbone:
    with fixed_seed():
        network = timm.create_model("vit_tiny_patch16_224", num_classes=10, depth=4)
    return freeze(network, (3, 224, 224), {"bottleneck": "blocks.1"}, name="vit_tiny", random_weights=True)


def test_a_vision_transformer(vit: Backbone) -> None:
    assert vit.layers["blocks.1"] == (197, 192)
    reference = [batch_of(noise_pictures(3, (3, 224, 224), seed=1), [0] * 3)]
    batch = batch_of(noise_pictures(2, (3, 224, 224)), [3, 5])
    found = IBA(steps=2, draws=1).fit(vit, reference, 0)(batch)
    assert found.heatmap.shape == (2, 224, 224)
    assert found.heatmap.isfinite().all()
    assert (found.heatmap >= 0).all()
    assert (found.heatmap.flatten(1).std(1) > 0).all()
    assert found.unit == "bits"


# --- the price


@pytest.mark.parametrize("beta", [0.5, 10.0])
def test_per_pixel_the_price_is_the_same_at_all_layers(beta: float) -> None:
    backbone, layers = small_backbone(), ["stage1", "stage2", "stage3"]
    reference = list(Counted(PICTURES))
    sizes = [math.prod(backbone.layers[layer]) for layer in layers]
    assert len(set(sizes)) == 3
    statistics = MultilayerIBA().statistics(backbone, layers, reference)
    per_pixel = MultilayerIBA(beta=beta, beta_per="pixel").bottlenecks(backbone, layers, statistics, 0)
    assert [b.price for b in per_pixel] == [pytest.approx(beta / 32**2)] * 3
    per_neuron = MultilayerIBA(beta=beta).bottlenecks(backbone, layers, statistics, 0)
    assert [b.price for b in per_neuron] == [pytest.approx(beta / size) for size in sizes]


def test_per_pixel_or_per_neuron_is_the_same_search_at_the_same_price() -> None:
    backbone, batch = small_backbone(), batch_of(noise_pictures(3), [0, 1, 2])
    neurons = math.prod(backbone.layers["stage2"])
    settings = IBA(layer="stage2", steps=8, draws=2, beta=0.3, min_reference=1)
    wanted = settings.fit(backbone, list(Counted(PICTURES)), 0)(batch).heatmap
    same = dataclasses.replace(settings, beta=0.3 * 32**2 / neurons, beta_per="pixel")
    assert relative(same.fit(backbone, list(Counted(PICTURES)), 0)(batch).heatmap, wanted) < 1e-3
    other = dataclasses.replace(settings, beta_per="pixel")
    assert relative(other.fit(backbone, list(Counted(PICTURES)), 0)(batch).heatmap, wanted) > 1e-2


@pytest.mark.parametrize("layer", ["stage1", "stage3"])
def test_a_huge_price_per_pixel_leaves_nothing(layer: str) -> None:
    backbone, batch = small_backbone(), batch_of(noise_pictures(2), [0, 1])
    settings = IBA(layer=layer, steps=25, draws=1, beta=1e6, beta_per="pixel", min_reference=1)
    found = settings.fit(backbone, list(Counted(PICTURES)), 0)(batch)
    assert (found.diagnostics["capacity"] < 1e-3 * found.diagnostics["capacity_curve"][:, 0]).all()
    assert found.heatmap.isfinite().all()
