"""The parts of every bottleneck, each against numpy, scipy, torch.distributions or a count by hand."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
import scipy.ndimage
import torch
from networks import Patches, batch_of, noise_pictures, patch_reference, patches_backbone, relative, small_backbone
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence

from ibxai.backbones import Backbone, freeze
from ibxai.errors import UserError
from ibxai.methods.bottleneck import Smoothing, bits_per_pixel, gaussian_kl
from ibxai.methods.feature_statistics import FeatureStatistics, estimate_statistics
from ibxai.types import Batch

CPU = torch.device("cpu")


def uneven(pictures: Tensor, sizes: Sequence[int]) -> list[Batch]:
    parts = torch.as_tensor(pictures).split(list(sizes))
    return [batch_of(part, [0] * len(part)) for part in parts]


def estimate_one(backbone: Backbone, layer: str, *settings) -> FeatureStatistics:
    return estimate_statistics(backbone, [layer], *settings)[layer]


def features_in_float64(backbone: Backbone, layer: str, pictures: Tensor) -> np.ndarray:
    with torch.no_grad():
        return torch.cat([backbone.split(layer).head(p[None]).values for p in pictures]).double().numpy()


@pytest.mark.parametrize("sizes", [(23,), (1, 5, 2, 9, 6), (22, 1)])
def test_statistics_a_neuron(sizes: tuple[int, ...]) -> None:
    backbone, pictures = small_backbone(), noise_pictures(23) + 30  # far from zero: sums of squares would cancel
    found = estimate_one(backbone, "stage2", uneven(pictures, sizes), 23, 0.01, 0.1)
    values = features_in_float64(backbone, "stage2", pictures)
    np.testing.assert_allclose(found.mean.numpy(), values.mean(0), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found.std.numpy(), np.maximum(values.std(0), 0.01), rtol=1e-4, atol=1e-5)
    assert np.array_equal(found.active.numpy(), (values != 0).mean(0) > 0.1)
    assert (found.count, found.pooled) == (23, False)
    assert found.mean.dtype == found.std.dtype == torch.float32


@pytest.mark.parametrize("sizes", [(23,), (1, 5, 2, 9, 6)])
def test_statistics_pooled_over_positions(sizes: tuple[int, ...]) -> None:
    backbone, pictures = small_backbone(), noise_pictures(23)
    found = estimate_one(backbone, "stage2", uneven(pictures, sizes), 24, 0.01, 0.3)
    values = features_in_float64(backbone, "stage2", pictures)
    flat = values.transpose(1, 0, 2, 3).reshape(12, -1)  # all pictures and positions of a channel in one heap
    assert found.mean.shape == found.std.shape == found.active.shape == (12, 1, 1)
    np.testing.assert_allclose(found.mean.flatten().numpy(), flat.mean(1), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found.std.flatten().numpy(), np.maximum(flat.std(1), 0.01), rtol=1e-5, atol=1e-6)
    assert np.array_equal(found.active.flatten().numpy(), (flat != 0).mean(1) > 0.3)
    assert (found.count, found.pooled) == (23, True)


def identity_backbone() -> Backbone:
    """Its layer "0" is the picture itself."""
    conv = nn.Conv2d(1, 1, 1)
    nn.init.ones_(conv.weight)
    nn.init.zeros_(conv.bias)
    return freeze(nn.Sequential(conv, nn.Flatten()), (1, 2, 2))


@pytest.mark.parametrize(("share", "wanted"), [(0.01, [False, True, True, True]), (0.25, [False, False, True, True])])
def test_active_means_more_than_this_share_of_the_pictures(share: float, wanted: list[bool]) -> None:
    """Four neurons that differ from zero in 0, 1, 2 and 4 of 4 pictures; negative values count."""
    pictures = torch.zeros(4, 1, 2, 2)
    pictures[0, 0, 0, 1] = -3
    pictures[:2, 0, 1, 0] = 1e-20
    pictures[:, 0, 1, 1] = 5
    found = estimate_one(identity_backbone(), "0", uneven(pictures, (3, 1)), 1, 0.01, share)
    assert found.active.flatten().tolist() == wanted
    assert found.std.flatten()[3] == pytest.approx(0.01)  # a constant neuron: the floor
    assert found.std.flatten()[1] == pytest.approx(3 * math.sqrt(3) / 4)
    pooled = estimate_one(identity_backbone(), "0", uneven(pictures, (3, 1)), 99, 0.01, 7 / 16)
    assert pooled.active.tolist() == [[[False]]]  # 7 of 16 is not more than 7 / 16
    pooled = estimate_one(identity_backbone(), "0", uneven(pictures, (3, 1)), 99, 0.01, 6.9 / 16)
    assert pooled.active.tolist() == [[[True]]]


def test_no_reference() -> None:
    with pytest.raises(UserError, match="reference split is empty"):
        estimate_one(identity_backbone(), "0", [], 1, 0.01, 0.01)


def test_several_layers_from_one_pass_over_the_reference() -> None:
    backbone, pictures = small_backbone(), noise_pictures(12)
    passes = iter(uneven(pictures, (4, 8)))  # an iterator: a second pass would find nothing
    with backbone.counting() as counted:
        found = estimate_statistics(backbone, ["early", "stage3"], passes, 12, 0.01, 0.01)
    assert sum(counted.values()) == 12
    for layer in ("early", "stage3"):
        alone = estimate_one(backbone, layer, uneven(pictures, (4, 8)), 12, 0.01, 0.01)
        torch.testing.assert_close(found[layer].mean, alone.mean, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found[layer].std, alone.std, rtol=1e-5, atol=1e-6)


def test_statistics_need_no_gradient() -> None:
    found = estimate_one(patches_backbone(), "cells", [patch_reference(8)], 100, 0.01, 0.01)
    assert not found.mean.requires_grad
    assert not found.std.requires_grad


# --- the information


def statistics(mean: Tensor, std: Tensor) -> FeatureStatistics:
    return FeatureStatistics(mean, std, torch.ones_like(mean, dtype=torch.bool), 200, False)


def by_torch(values: Tensor, nu: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    return kl_divergence(Normal((1 - nu) * values + nu * mean, nu * std), Normal(mean, std))


def some_features(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    values = 3 * torch.randn(2, 4, 5, 6, generator=generator, dtype=torch.float64)
    mean = torch.randn(4, 5, 6, generator=generator, dtype=torch.float64)
    std = 0.05 + 2 * torch.rand(4, 5, 6, generator=generator, dtype=torch.float64)
    nu = 1e-3 + 0.99 * torch.rand(2, 4, 5, 6, generator=generator, dtype=torch.float64)
    return values, nu, mean, std


def test_kl_is_torchs() -> None:
    values, nu, mean, std = some_features()
    wanted = by_torch(values, nu, mean, std)
    torch.testing.assert_close(gaussian_kl(values, nu, statistics(mean, std)), wanted, rtol=1e-9, atol=1e-9)
    single = gaussian_kl(values.float(), nu.float(), statistics(mean.float(), std.float()))
    torch.testing.assert_close(single.double(), wanted, rtol=1e-4, atol=1e-5)


def test_kl_is_what_sampling_says() -> None:
    """E over Z of ln P(Z|R) - ln Q(Z), with Z = (1 - nu) R + nu eps drawn as the bottleneck draws it."""
    generator = torch.Generator().manual_seed(0)
    for value, nu, mean, std in [(2.0, 0.3, 0.5, 1.0), (-1.0, 0.9, 0.0, 0.5), (0.2, 0.05, 0.2, 2.0)]:
        eps = mean + std * torch.randn(200_000, generator=generator, dtype=torch.float64)
        z = (1 - nu) * value + nu * eps
        ratio = Normal((1 - nu) * value + nu * mean, nu * std).log_prob(z) - Normal(mean, std).log_prob(z)
        one = [torch.tensor(number, dtype=torch.float64) for number in (value, nu, mean, std)]
        found = gaussian_kl(one[0], one[1], statistics(one[2], one[3]))
        assert float(found) == pytest.approx(float(ratio.mean()), abs=5 * float(ratio.std()) / math.sqrt(200_000))


def test_pure_noise_carries_nothing() -> None:
    values, _, mean, std = (tensor.float() for tensor in some_features())
    assert torch.equal(gaussian_kl(values, torch.ones_like(values), statistics(mean, std)), torch.zeros_like(values))


def test_kl_is_exact_when_the_mask_is_almost_open() -> None:
    """nu = 1e-6 as sigmoid(-alpha): as 1 - sigmoid(alpha) it would be wrong in the second digit."""
    alpha = torch.tensor([5.0, 13.815510557964274, 20.0, 60.0])
    nu = torch.sigmoid(-alpha)
    found = gaussian_kl(torch.zeros(4), nu, statistics(torch.zeros(4), torch.ones(4)))
    exact = torch.sigmoid(-alpha.double())
    torch.testing.assert_close(found.double(), 0.5 * (exact**2 - 1) - exact.log(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_kl_is_never_negative(dtype: torch.dtype) -> None:
    """Also where it is nothing but rounding, for masks that are almost closed."""
    nu = torch.sigmoid(torch.linspace(-3, 20, 200_001, dtype=dtype))
    zero = torch.zeros_like(nu)
    for value in (0.0, 0.3, -3.0):
        assert gaussian_kl(zero + value, nu, statistics(zero, zero + 1)).min() >= 0


# --- smoothing


@pytest.mark.parametrize("sigma", [0.6, 1.0, 2.0, 3.3])
@pytest.mark.parametrize("size", [(14, 14), (28, 15)])
def test_smoothing_is_scipys(sigma: float, size: tuple[int, int]) -> None:
    values = noise_pictures(3, (4, *size))
    wanted = values.double().numpy()
    for axis in (2, 3):
        wanted = scipy.ndimage.gaussian_filter1d(wanted, sigma, axis=axis, mode="mirror", truncate=2)
    assert relative(Smoothing(sigma, CPU)(values), torch.from_numpy(wanted)) < 1e-5


@pytest.mark.parametrize("size", [(1, 1), (2, 7), (3, 2), (1, 9)])
def test_smoothing_of_maps_smaller_than_the_kernel(size: tuple[int, int]) -> None:
    values = noise_pictures(3, (2, *size))
    wanted = values.double().numpy()
    for axis in (2, 3):
        radius = min(4, values.shape[axis] - 1)
        wanted = scipy.ndimage.gaussian_filter1d(wanted, 2.0, axis=axis, mode="mirror", radius=radius)
    found = Smoothing(2.0, CPU)(values)
    assert found.shape == values.shape
    assert relative(found, torch.from_numpy(wanted)) < 1e-5


@pytest.mark.parametrize("sigma", [0.0, 1.0, 2.0])
def test_smoothing_keeps_constants(sigma: float) -> None:
    values = torch.full((2, 3, 7, 5), 0.37)
    torch.testing.assert_close(Smoothing(sigma, CPU)(values), values, rtol=1e-6, atol=1e-7)


def test_no_smoothing() -> None:
    values = noise_pictures(2, (3, 6, 6))
    assert torch.equal(Smoothing(0.0, CPU)(values), values)


def test_smoothing_keeps_channels_and_pictures_apart() -> None:
    values = torch.zeros(2, 3, 7, 7)
    values[1, 2, 3, 3] = 1
    found = Smoothing(1.0, CPU)(values)
    assert found[1, 2].sum() == pytest.approx(1, abs=1e-6)
    found[1, 2] = 0
    assert not found.any()


# --- bits


@pytest.mark.parametrize("cells", [(8, 8), (7, 7), (1, 1), (5, 9), (32, 32)])
@pytest.mark.parametrize("size", [(32, 32), (30, 50)])
def test_bits_per_pixel_keep_the_capacity(cells: tuple[int, int], size: tuple[int, int]) -> None:
    nats = noise_pictures(3, (4, *cells)).abs()
    nats[1, :, :, 0] *= 50  # much at the border, where bilinear weights do not sum to a constant
    found = bits_per_pixel(nats, size)
    assert found.shape == (3, *size)
    assert found.min() >= 0
    wanted = nats.double().sum((1, 2, 3)) / math.log(2)
    torch.testing.assert_close(found.double().sum((1, 2)), wanted, rtol=1e-5, atol=0)


def test_bits_per_pixel_of_one_cell_and_of_an_even_map() -> None:
    nats = torch.full((1, 5, 4, 4), 2.0)
    bits = 5 * 2.0 * 16 / math.log(2)
    torch.testing.assert_close(bits_per_pixel(nats, (8, 12)), torch.full((1, 8, 12), bits / 96))
    one = torch.zeros(1, 2, 4, 4)
    one[0, :, 1, 2] = math.log(2)  # one bit in each of two channels
    found = bits_per_pixel(one, (16, 16))[0]
    assert found.sum() == pytest.approx(2, rel=1e-5)
    peak = int(found.argmax())
    assert (peak // 16 // 4, peak % 16 // 4) == (1, 2)
    # bilinear: the four pixels around the cell's centre have 7/8 * 7/8 of it, and the sum of all weights is 16
    assert found[5, 9] == pytest.approx(2 * 0.875**2 / 16, rel=1e-5)
    assert not found[12:].any()


def test_nothing_stays_nothing() -> None:
    assert torch.equal(bits_per_pixel(torch.zeros(2, 3, 7, 7), (20, 20)), torch.zeros(2, 20, 20))


def test_the_strength_of_planted_patches_is_known() -> None:
    """The layer of `Patches` is the mean of each cell: what the other tests of the bottleneck stand on."""
    reference = patch_reference(6)
    found = features_in_float64(patches_backbone(), "cells", reference.inputs)
    cells = reference.inputs.double().unflatten(3, (8, 4)).unflatten(2, (8, 4)).mean((3, 5))
    np.testing.assert_allclose(found, cells.numpy(), atol=1e-6)
    with torch.no_grad():
        assert Patches()(reference.inputs).argmax(1).tolist() == reference.target.describe()
