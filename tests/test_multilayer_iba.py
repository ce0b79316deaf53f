"""Multi-layer IBA: each layer's map is that of IBA alone; the sum, the thresholds and the intersection by hand."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from networks import batch_of, noise_pictures, relative, small_backbone
from skimage.filters import threshold_otsu
from torch import Tensor

from ibxai.errors import UserError
from ibxai.methods import IBA, MultilayerIBA
from ibxai.methods.multilayer_iba import normalised
from ibxai.thresholds import otsu
from ibxai.types import Batch

LAYERS = ("early", "stage2", "late")
SHARED = {"steps": 5, "draws": 2, "beta": 1.0, "learning_rate": 1.0}


def reference() -> list[Batch]:
    return [batch_of(part, [0] * len(part)) for part in noise_pictures(12, seed=5).split(5)]


def four() -> Batch:
    return batch_of(noise_pictures(4), [0, 1, 2, 3])


@pytest.fixture(scope="module")
def single() -> list[Tensor]:
    """The maps of IBA at each layer, each fitted by itself, divided by their norms: float64 [4, 32, 32]."""
    maps = [IBA(layer=layer, **SHARED).fit(small_backbone(), reference(), 3)(four()).heatmap for layer in LAYERS]
    return [found.double() / found.double().square().sum((1, 2), keepdim=True).sqrt() for found in maps]


# --- combining


def test_the_sum_is_that_of_independent_runs(single: list[Tensor]) -> None:
    found = MultilayerIBA(layers=LAYERS, **SHARED).fit(small_backbone(), reference(), 3)(four())
    assert relative(found.heatmap, torch.stack(single).sum(0)) < 1e-5
    assert found.unit == "score"
    # and the layers differ, so that none of them alone would do
    for one in single:
        assert relative(found.heatmap / len(LAYERS), one) > 0.05


@pytest.mark.parametrize("order", [("late", "early", "stage2"), ("early", "late"), ("stage2",)])
def test_which_other_layers_run_does_not_matter(order: Sequence[str], single: list[Tensor]) -> None:
    found = MultilayerIBA(layers=tuple(order), **SHARED).fit(small_backbone(), reference(), 3)(four())
    wanted = sum(single[LAYERS.index(layer)] for layer in order)
    assert isinstance(wanted, Tensor)
    assert relative(found.heatmap, wanted) < 1e-5


def test_the_capacity_of_each_layer_is_told() -> None:
    found = MultilayerIBA(layers=LAYERS, **SHARED).fit(small_backbone(), reference(), 3)(four())
    assert set(found.diagnostics) == {"capacity_stage1", "capacity_stage2", "capacity_stage3"}
    for layer, name in zip(LAYERS, ("stage1", "stage2", "stage3"), strict=True):
        alone = IBA(layer=layer, **SHARED).fit(small_backbone(), reference(), 3)(four())
        assert relative(found.diagnostics[f"capacity_{name}"], alone.diagnostics["capacity"]) < 1e-5


@pytest.mark.parametrize("threshold", ["otsu", 0.02, 0.035, 0])
def test_the_intersection(threshold: str | float, single: list[Tensor]) -> None:
    settings = MultilayerIBA(layers=LAYERS, combine="intersection", threshold=threshold, **SHARED)  # type: ignore[arg-type]
    found = settings.fit(small_backbone(), reference(), 3)(four()).heatmap
    total = torch.stack(single).sum(0)
    inside = found > 0
    sizes = []
    for one in single:
        masks = []
        for picture in one.numpy():
            if threshold == "otsu":
                low, high = picture.min(), picture.max()
                cut = threshold_otsu(picture.astype(np.float32)) + (high - low) / 512  # see the test of otsu
            else:
                cut = float(threshold)
            masks.append(picture > cut * (1 - 1e-6))  # rounding may let a pixel more in
        mask = torch.from_numpy(np.stack(masks))
        assert not (inside & ~mask).any()
        sizes.append(mask)
    everywhere = torch.stack(sizes).all(0)
    assert (everywhere & ~inside).sum() <= 2  # pixels right at a threshold
    assert inside.any()
    assert inside.all() if threshold == 0 else (not inside.all())
    torch.testing.assert_close(found[inside].double(), total[inside], rtol=1e-4, atol=0)  # the sum inside
    assert not found[~inside].any()


def test_a_threshold_above_all_leaves_nothing() -> None:
    settings = MultilayerIBA(layers=LAYERS, combine="intersection", threshold=1.0, **SHARED)
    assert not settings.fit(small_backbone(), reference(), 3)(four()).heatmap.any()


def test_combining_by_hand() -> None:
    maps = torch.zeros(2, 1, 2, 3)
    maps[0, 0] = torch.tensor([[0.9, 0.8, 0.1], [0.0, 0.7, 0.1]])
    maps[1, 0] = torch.tensor([[0.5, 0.1, 0.6], [0.0, 0.7, 0.1]])
    assert torch.equal(MultilayerIBA().combined(maps), maps[0] + maps[1])
    both = torch.tensor([[[1.4, 0, 0], [0, 1.4, 0]]])
    for threshold in ("otsu", 0.4):
        settings = MultilayerIBA(combine="intersection", threshold=threshold)  # type: ignore[arg-type]
        torch.testing.assert_close(settings.combined(maps), both)
    assert MultilayerIBA(combine="intersection", threshold=0.5).binary(maps)[1, 0].sum() == 2  # above, not at


# --- parts


def test_normalised() -> None:
    maps = noise_pictures(3, (1, 6, 7))[:, 0].abs()
    maps[1] = 0
    found = normalised(maps)
    assert found[0].norm() == pytest.approx(1, rel=1e-5)
    assert not found[1].any()
    torch.testing.assert_close(found[2] * maps[2].norm(), maps[2])


def cuts(maps: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """(our thresholds, skimage's): ours is the upper edge of the last bin below, skimage's is its centre."""
    values = maps.double().numpy()
    width = (values.max((1, 2)) - values.min((1, 2))) / 256
    return otsu(maps).double().numpy(), np.array([threshold_otsu(v) for v in values]) + width / 2


@pytest.mark.parametrize("seed", range(4))
def test_otsu_is_skimages(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    maps = torch.rand(12, 40, 50, generator=generator)
    maps[3:6] = maps[3:6] ** 6  # skewed as heatmaps are
    maps[6:9] = -maps[6:9].log() * 1e-4
    maps[9:] = torch.randn(3, 40, 50, generator=generator) * 1e3 - 5e3
    found, wanted = cuts(maps)
    low, high = maps.amin((1, 2)).numpy(), maps.amax((1, 2)).numpy()
    np.testing.assert_allclose((found - low) / (high - low), (wanted - low) / (high - low), atol=1e-5)


def test_otsu_of_two_humps_is_between_them() -> None:
    generator = torch.Generator().manual_seed(0)
    maps = 0.3 + 0.03 * torch.randn(5, 40, 50, generator=generator)
    bright = torch.rand(5, 40, 50, generator=generator) < torch.linspace(0.05, 0.6, 5)[:, None, None]
    maps[bright] += 0.5
    above = maps > otsu(maps)[:, None, None]
    assert torch.equal(above, bright)
    _, wanted = cuts(maps)
    assert np.array_equal(maps.double().numpy() > wanted[:, None, None], above.numpy())


def test_otsu_of_two_values() -> None:
    maps = torch.zeros(3, 4, 5)
    maps[0, 1, 2] = 1
    maps[1] = 7
    maps[1, 0, 0] = 2
    maps[2, :2] = 1e-6
    assert torch.equal(maps > otsu(maps)[:, None, None], maps == maps.amax((1, 2), keepdim=True))


@pytest.mark.parametrize("value", [0.0, 0.37, -2.0, 1e-30])
def test_otsu_of_a_constant_map_lets_nothing_through(value: float) -> None:
    maps = torch.full((2, 5, 5), value)
    assert otsu(maps).tolist() == maps[:, 0, 0].tolist()
    assert not (maps > otsu(maps)[:, None, None]).any()
    assert otsu(maps)[0].item() == pytest.approx(float(threshold_otsu(maps[0].numpy())), rel=1e-6)


def test_otsu_of_maps_together_or_alone() -> None:
    maps = noise_pictures(5, (1, 20, 20))[:, 0]
    maps[2] *= 1000
    assert torch.equal(otsu(maps), torch.cat([otsu(one[None]) for one in maps]))


def test_one_pass_over_the_reference() -> None:
    class Once:
        passes = 0

        def __iter__(self):
            self.passes += 1
            yield from reference()

    known = Once()
    backbone = small_backbone()
    with backbone.counting() as passes:
        MultilayerIBA(layers=LAYERS, **SHARED).fit(backbone, known, 3)
    assert known.passes == 1
    assert dict(passes) == {"head forward": 12}


# --- settings


def test_settings_that_cannot_be() -> None:
    with pytest.raises(UserError, match=r"method\.layers is empty"):
        MultilayerIBA(layers=())
    with pytest.raises(UserError, match="combine is 'and': sum or intersection"):
        MultilayerIBA(combine="and")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="threshold is 'mean': otsu or a number"):
        MultilayerIBA(threshold="mean")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="steps is 0"):
        MultilayerIBA(steps=0)
    with pytest.raises(UserError, match="no layer 'stage9'"):
        MultilayerIBA(layers=("stage1", "stage9")).fit(small_backbone(), reference(), 0)
    with pytest.raises(UserError, match=r"'fc' gives \[5\]"):
        MultilayerIBA(layers=("stage1", "fc")).fit(small_backbone(), reference(), 0)
