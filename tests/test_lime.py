"""LIME: networks that are linear in superpixels, sklearn's Ridge on the same draws, patches at known places."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import skimage.segmentation
import torch
from networks import batch_of, noise_pictures, patch_pictures, patches_backbone, relative, small_backbone
from sklearn.linear_model import Ridge
from sklearn.metrics import pairwise_distances
from torch import Tensor, nn

from ibxai.backbones import Backbone, freeze
from ibxai.draws import sample_keys, uniform
from ibxai.errors import UserError
from ibxai.methods import LIME
from ibxai.methods.lime import kernel, mean_colours, superpixels, weighted_ridge
from ibxai.methods.perturbation import baseline_picture
from ibxai.preprocessing import Preprocessing
from ibxai.types import Batch


def weighing(seed: int = 0, size: int = 32) -> tuple[Backbone, Tensor]:
    """(a network that is a weighted sum of its pixels plus a constant, for two classes; its weights [2, C, H, W])."""
    weights = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(seed)) / size
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * size * size, 2))
    with torch.no_grad():
        network[1].weight.copy_(weights.flatten(1))
        network[1].bias.copy_(torch.tensor([0.7, -2.0]))
    return freeze(network, (3, size, size)), weights


def blocks(count: int) -> Tensor:
    """Pictures of 16 squares, neighbours in colours far apart: what the superpixels are is beyond doubt."""
    row, column = torch.meshgrid(torch.arange(4), torch.arange(4), indexing="ij")
    corners = torch.stack([row % 2, column % 2, (row // 2 + column // 2) % 2]).float()
    jitter = torch.rand(count, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    return (0.1 + 0.6 * corners + 0.2 * jitter).repeat_interleave(8, 2).repeat_interleave(8, 3)


def sums_by_segment(values: Tensor, segments: Tensor) -> Tensor:
    """[B, H, W]: at each pixel the sum of values [B, H, W] over its superpixel, one superpixel at a time."""
    out = torch.zeros_like(values)
    for picture, found, of_one in zip(values, out, segments, strict=True):
        for s in of_one.unique():
            found[of_one == s] = picture[of_one == s].sum()
    return out


@pytest.mark.parametrize(("baseline", "value"), [("constant", 0.0), ("constant", -0.4), ("blur", 0.0), ("mean", 0.0)])
def test_a_linear_network_has_exact_coefficients(baseline: str, value: float) -> None:
    """Covering a superpixel takes from the logit what weight x (pixel - baseline) sums to over it, whatever is kept."""
    backbone, weights = weighing()
    pictures, classes = torch.cat([blocks(2), noise_pictures(2).sigmoid()]), [0, 1, 1, 0]
    method = LIME(
        segments=16, segment_blur=0.0, samples=200, ridge=1e-9, baseline=baseline, value=value, sigma=3.0, score="logit"
    )
    found = method.fit(backbone, [], 0)(batch_of(pictures, classes))
    segments = superpixels(backbone, pictures, 16, 10.0, 0.0)
    covered = mean_colours(pictures, segments)
    if baseline != "mean":
        covered = baseline_picture(pictures, baseline, 3.0, value)
    wanted = sums_by_segment((weights[classes] * (pictures - covered)).sum(1), segments)
    scale = wanted.abs().amax((1, 2))
    if baseline == "mean":  # the blocks are their mean colour already
        assert (scale[:2] < 1e-3 * scale[2]).all()
        found, wanted = found.take([2, 3]), wanted[2:]
    assert relative(found.heatmap, wanted) < 1e-4
    torch.testing.assert_close(found.diagnostics["r2"], torch.ones(len(wanted)), rtol=0, atol=1e-6)
    assert found.unit == "score"


def plain_lime(backbone: Backbone, batch: Batch, method: LIME, seed: int) -> tuple[np.ndarray, list[float]]:
    """([B, H, W], weighted R^2) one picture, one draw and one superpixel at a time; the fit is sklearn's."""
    maps, fits = [], []
    for i, sample_id in enumerate(batch.sample_ids):
        picture = (batch.inputs[i].permute(1, 2, 0).numpy() * 255).clip(0, 255).round().astype(np.uint8)
        segments = skimage.segmentation.slic(
            picture, method.segments, method.compactness, sigma=method.segment_blur, start_label=0
        )
        count = segments.max() + 1
        key = sample_keys(seed, [sample_id], "superpixels")
        draws = np.ones((method.samples, count))
        scores = np.zeros(method.samples)
        covered = baseline_picture(batch.inputs[i : i + 1], method.baseline, method.sigma, method.value)[0]
        for n in range(method.samples):
            if n:
                draws[n] = (uniform(key, n, (count,))[0] < method.keep).numpy()
            shown = batch.inputs[i].clone()
            for s in range(count):
                if not draws[n, s]:
                    shown[:, segments == s] = covered[:, segments == s]
            with torch.no_grad():
                out = backbone(shown[None]).double()[0]
            out = out.softmax(0) if method.score == "probability" else out
            scores[n] = out[int(batch.target.describe()[i])]
        distance = pairwise_distances(draws, draws[:1], metric="cosine")[:, 0]
        weights = np.sqrt(np.exp(-(distance**2) / method.kernel_width**2))
        fit = Ridge(alpha=method.ridge).fit(draws, scores, sample_weight=weights)
        maps.append(fit.coef_[segments])
        fits.append(fit.score(draws, scores, sample_weight=weights))
    return np.stack(maps), fits


@pytest.mark.parametrize(
    "settings",
    [
        {"baseline": "blur", "sigma": 2.0},
        {"baseline": "constant", "value": 0.3, "keep": 0.7, "kernel_width": 0.1, "score": "logit"},
    ],
)
def test_against_sklearn_one_draw_at_a_time(settings: dict[str, Any]) -> None:
    backbone = small_backbone()
    batch = batch_of(noise_pictures(3, seed=1).sigmoid(), [-1, -1, -1]).bound(backbone)
    method = LIME(segments=12, samples=60, ridge=0.5, compactness=30.0, segment_blur=1.5, **settings)
    found = method.fit(backbone, [], 4)(batch)
    wanted, fits = plain_lime(backbone, batch, method, 4)
    for i in range(3):
        assert np.abs(wanted[i]).max() > 1e-4
        assert relative(found.heatmap[i], torch.from_numpy(wanted[i])) < 1e-3
    np.testing.assert_allclose(found.diagnostics["r2"], fits, atol=1e-3)
    assert len(set(found.diagnostics["segments"].tolist())) > 1  # padded differently, solved together


def test_weighted_ridge_is_sklearns() -> None:
    generator = torch.Generator().manual_seed(0)
    draws = (torch.rand(4, 50, 9, generator=generator) < 0.4).double()
    draws[1, :, 6:] = 0  # variables that a picture does not have
    values, weights = torch.randn(4, 50, generator=generator), torch.rand(4, 50, generator=generator)
    found, r2 = weighted_ridge(draws, values, weights, 0.8)
    for i in range(4):
        fit = Ridge(alpha=0.8).fit(draws[i].numpy(), values[i].double().numpy(), sample_weight=weights[i].numpy())
        np.testing.assert_allclose(found[i], fit.coef_, atol=1e-8)
        wanted = fit.score(draws[i].numpy(), values[i].numpy(), sample_weight=weights[i].numpy())
        assert float(r2[i]) == pytest.approx(wanted, abs=1e-6)
    assert (found[1, 6:] == 0).all()
    flat, perfect = weighted_ridge(draws, torch.full((4, 50), 0.25), weights, 0.8)
    assert flat.abs().max() < 1e-12
    assert perfect.isfinite().all()


def test_the_kernels_extremes() -> None:
    kept = torch.tensor([[[True] * 4, [True, False, False, False], [False] * 4]])
    found = kernel(kept, torch.tensor([4]), 0.25)[0]
    wanted = np.exp(-np.array([0, (1 - 0.5) ** 2, 1]) / (2 * 0.25**2))
    np.testing.assert_allclose(found, wanted, rtol=1e-12)


def test_superpixels_are_slics_of_the_picture_as_people_see_it() -> None:
    """Normalised inputs are taken back to colours first; one superpixel for each block of one colour."""
    pictures = blocks(2)
    prepared = Preprocessing(resize=32, crop=32, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.25))
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 2))
    column = lambda values: torch.tensor(values).view(1, 3, 1, 1)  # noqa: E731
    normalised = (pictures - column(prepared.mean)) / column(prepared.std)
    found = superpixels(freeze(network, preprocessing=prepared), normalised, 16, 1.0, 0.0)
    places = torch.arange(16).view(4, 4).repeat_interleave(8, 0).repeat_interleave(8, 1)
    assert torch.equal(found, places.expand(2, -1, -1))
    assert found.dtype == torch.int64


def test_pictures_of_one_colour_channel() -> None:
    network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    backbone = freeze(network, (1, 16, 16))
    found = LIME(segments=6, samples=20).fit(backbone, [], 0)(batch_of(noise_pictures(2, (1, 16, 16)), [0, 1]))
    assert found.heatmap.isfinite().all()
    assert found.heatmap[0].unique().numel() > 1


def test_mean_colours() -> None:
    pictures = noise_pictures(2, (3, 8, 8))
    segments = torch.stack([torch.arange(64).view(8, 8) // 20, torch.arange(64).view(8, 8) % 3])
    found = mean_colours(pictures, segments)
    for i in range(2):
        for s in segments[i].unique():
            inside = segments[i] == s
            wanted = pictures[i][:, inside].mean(1, keepdim=True).expand(-1, int(inside.sum()))
            torch.testing.assert_close(found[i][:, inside], wanted)


def test_patches_at_known_places_and_the_class_matters() -> None:
    places: Sequence[Sequence[tuple[int, int, int]]]
    places = [((0, 1, 2), (1, 6, 5)), ((0, 7, 0), (1, 3, 3)), ((0, 4, 4), (1, 0, 7))]
    method = LIME(segments=64, segment_blur=0.0, samples=300, baseline="constant", score="logit")
    attribute = method.fit(patches_backbone(), [], 0)
    for colour in (0, 1):
        found = attribute(batch_of(patch_pictures(places), [colour] * 3)).heatmap
        for heatmap, patches in zip(found, places, strict=True):
            _, row, column = patches[colour]
            inside = torch.zeros(32, 32, dtype=torch.bool)
            inside[4 * row : 4 * row + 4, 4 * column : 4 * column + 4] = True
            assert heatmap[inside].min() > 5 * heatmap[~inside].abs().max()
            assert float(heatmap[inside].mean()) == pytest.approx(6, rel=0.15)


def test_passes() -> None:
    backbone = small_backbone(max_passes=7)
    with backbone.counting() as passes:
        LIME(samples=9).fit(backbone, [], 0)(batch_of(noise_pictures(2), [0, 1]))
    assert dict(passes) == {"forward": 18}


def test_seeds_and_samples_draw_their_own() -> None:
    backbone, pictures = small_backbone(), noise_pictures(1).repeat(2, 1, 1, 1)
    found = LIME(samples=40).fit(backbone, [], 0)(batch_of(pictures, [0, 0])).heatmap
    assert relative(found[0], found[1]) > 1e-3
    other = LIME(samples=40).fit(backbone, [], 1)(batch_of(pictures, [0, 0])).heatmap
    assert relative(other[0], found[0]) > 1e-3


def test_settings() -> None:
    for name in ("segments", "compactness", "kernel_width", "ridge", "sigma"):
        with pytest.raises(UserError, match=f"method.{name} is 0: it must be above 0"):
            LIME(**{name: 0})
    with pytest.raises(UserError, match="segment_blur is -1: it must not be negative"):
        LIME(segment_blur=-1)
    with pytest.raises(UserError, match="samples is 1: a fit needs 2 or more"):
        LIME(samples=1)
    with pytest.raises(UserError, match="baseline is 'grey': mean, blur or constant is expected"):
        LIME(baseline="grey")
    with pytest.raises(UserError, match="score is 'odds'"):
        LIME(score="odds")  # type: ignore[arg-type]
    for keep in (0.0, 1.0):
        with pytest.raises(UserError, match=f"keep is {keep}: a chance above 0 and below 1"):
            LIME(keep=keep)
