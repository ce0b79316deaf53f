"""Baselines: the blur against scipy in float64, and what it must keep."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.ndimage
import torch
from networks import batch_of, noise_pictures, relative

from ibxai.errors import UserError
from ibxai.methods.perturbation import (
    BASELINES,
    METHOD_BASELINES,
    Baseline,
    PerturbationSettings,
    baseline_picture,
    gaussian_blur,
    mean_picture,
)


@pytest.mark.parametrize("sigma", [0.5, 1.3, 4.0])
@pytest.mark.parametrize("shape", [(3, 40, 40), (1, 25, 60)])
def test_blur_is_scipys(sigma: float, shape: tuple[int, int, int]) -> None:
    pictures = noise_pictures(2, shape)
    wanted = scipy.ndimage.gaussian_filter(
        pictures.double().numpy(), sigma, mode="mirror", radius=math.ceil(3 * sigma), axes=(2, 3)
    )
    found = gaussian_blur(pictures, sigma)
    assert found.dtype == torch.float32
    assert relative(found, torch.from_numpy(wanted)) < 1e-5
    assert relative(found, pictures) > 0.05


def test_ten_pixels_reach_three_deviations() -> None:
    """The sigma of the metrics' YAMLs, with scipy's own truncation at three deviations."""
    pictures = noise_pictures(1, (1, 64, 70))
    wanted = scipy.ndimage.gaussian_filter(pictures.double().numpy(), 10, mode="mirror", truncate=3, axes=(2, 3))
    assert relative(gaussian_blur(pictures, 10.0), torch.from_numpy(wanted)) < 1e-5


@pytest.mark.parametrize("shape", [(3, 5, 40), (3, 40, 5), (2, 2, 3), (1, 1, 1), (1, 1, 9)])
def test_pictures_smaller_than_the_kernel(shape: tuple[int, int, int]) -> None:
    pictures = noise_pictures(2, shape)
    sigma = 10.0
    wanted = pictures.double().numpy()
    for axis in (2, 3):
        radius = min(30, pictures.shape[axis] - 1)
        wanted = scipy.ndimage.gaussian_filter1d(wanted, sigma, axis=axis, mode="mirror", radius=radius)
    found = gaussian_blur(pictures, sigma)
    assert found.shape == pictures.shape
    assert relative(found, torch.from_numpy(wanted)) < 1e-5


def test_blur_keeps_constants_and_each_channels_mean_colour() -> None:
    colours = torch.tensor([[0.3, -2.0, 5.0]]).view(1, 3, 1, 1).expand(1, 3, 33, 21).contiguous()
    torch.testing.assert_close(gaussian_blur(colours, 7.0), colours, rtol=1e-6, atol=1e-6)


def test_blur_is_each_pictures_own() -> None:
    pictures = noise_pictures(4)
    together = gaussian_blur(pictures, 3.0)
    for i in range(4):
        torch.testing.assert_close(gaussian_blur(pictures[i : i + 1], 3.0)[0], together[i], rtol=1e-6, atol=1e-6)


def test_baselines() -> None:
    pictures = noise_pictures(2)
    before = pictures.clone()
    assert torch.equal(baseline_picture(pictures, "constant", 3.0, -0.7), torch.full_like(pictures, -0.7))
    assert torch.equal(baseline_picture(pictures, "blur", 3.0, -0.7), gaussian_blur(pictures, 3.0))
    assert torch.equal(pictures, before)
    assert set(BASELINES) == {"blur", "constant"}
    with pytest.raises(UserError, match=r"no baseline 'blurr'.*blur"):
        baseline_picture(pictures, "blurr", 3.0, 0.0)


def test_the_blurs_impulse_response() -> None:
    picture = torch.zeros(1, 1, 41, 41)
    picture[0, 0, 20, 20] = 1
    found = gaussian_blur(picture, 4.0)[0, 0].double().numpy()
    offsets = np.arange(-20, 21)
    kernel = np.where(abs(offsets) <= 12, np.exp(-(offsets**2) / 32), 0)
    np.testing.assert_allclose(found, np.outer(kernel, kernel) / kernel.sum() ** 2, atol=1e-7)


@pytest.mark.parametrize("kernel", [1, 3, 9])
def test_a_kernel_of_a_given_width(kernel: int) -> None:
    """An impulse spreads over `kernel` pixels, with a Gaussian's proportions cut there."""
    picture = torch.zeros(1, 1, 21, 21)
    picture[0, 0, 10, 10] = 1
    found = gaussian_blur(picture, 3.0, kernel)[0, 0]
    weights = np.exp(-(np.arange(-(kernel // 2), kernel // 2 + 1) ** 2) / 18)
    weights /= weights.sum()
    lowest = 10 - kernel // 2
    inside = found[lowest : lowest + kernel, lowest : lowest + kernel].double().numpy()
    np.testing.assert_allclose(inside, np.outer(weights, weights), atol=1e-7)
    assert found.sum().item() == pytest.approx(1, abs=1e-6)


def test_a_methods_baselines() -> None:
    assert set(METHOD_BASELINES) == {"blur", "constant", "noise", "dataset_mean"}
    batch = batch_of(noise_pictures(3), [0, 1, 2])
    blurred = Baseline("blur", 3.0, 5, 0.0, seed=0)(batch)
    assert torch.equal(blurred, baseline_picture(batch.inputs, "blur", 3.0, 0.0, 5))
    assert torch.equal(Baseline("constant", 1.0, None, 0.7, seed=0)(batch), torch.full_like(batch.inputs, 0.7))
    mean = torch.arange(3 * 32 * 32.0).view(3, 32, 32)
    assert torch.equal(Baseline("dataset_mean", 1.0, None, 0.0, 0, mean)(batch), mean.expand(3, 3, 32, 32))


def test_noise_is_normal_around_a_value_and_belongs_to_the_sample_and_the_seed() -> None:
    batch = batch_of(torch.zeros(3, 3, 64, 64), [0, 1, 2])
    found = Baseline("noise", 1.0, None, 0.7, seed=4)(batch)
    assert float(found.mean()) == pytest.approx(0.7, abs=0.03)
    assert float(found.std()) == pytest.approx(1, abs=0.03)
    assert torch.equal(Baseline("noise", 1.0, None, 0.7, seed=4)(batch.take([2, 0])), found[[2, 0]])
    assert relative(found[0], found[1]) > 0.1
    assert relative(Baseline("noise", 1.0, None, 0.7, seed=5)(batch), found) > 0.1


def test_settings_that_the_mask_methods_share() -> None:
    batch = batch_of(noise_pictures(3), [0, 1, 2])
    found = PerturbationSettings(sigma=3.0, kernel=5).baselines([], 0)(batch)
    assert torch.equal(found, gaussian_blur(batch.inputs, 3.0, 5))
    mean = PerturbationSettings(baseline="dataset_mean")
    assert (mean.uses_reference, PerturbationSettings().uses_reference) == (True, False)
    assert relative(mean.baselines([batch], 0)(batch.take([1])), batch.inputs.mean(0, keepdim=True)) < 1e-6
    drawn = PerturbationSettings(baseline="noise", value=0.7)
    assert torch.equal(drawn.baselines([], 4)(batch), Baseline("noise", 1.0, None, 0.7, seed=4)(batch))
    for wrong, says in (
        ({"kernel": 4}, r"method.kernel is 4: it must be odd, or null"),
        ({"sigma": 0.0}, r"method.sigma is 0.0: it must be above 0"),
        ({"baseline": "mean"}, r"method.baseline is 'mean': blur, constant, noise or dataset_mean"),
        ({"score": "bits"}, r"method.score is 'bits'"),
    ):
        with pytest.raises(UserError, match=says):
            PerturbationSettings(**wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [1, 3, 10])
def test_the_mean_of_a_reference_split(size: int) -> None:
    pictures = noise_pictures(10)
    found = mean_picture([batch_of(part, [0] * len(part)) for part in pictures.split(size)])
    assert found.dtype == torch.float32
    assert relative(found, pictures.double().mean(0)) < 1e-6
    with pytest.raises(UserError, match=r"the reference split, which is empty"):
        mean_picture([])
