"""SSIM and correlations of maps against scikit-image and scipy, and where they are undefined."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from networks import noise_pictures
from scipy import stats
from skimage.metrics import structural_similarity

from ibxai.errors import UserError
from ibxai.metrics.similarity import average_ranks, similarities, ssim


def maps(count: int = 4, seed: int = 0) -> torch.Tensor:
    """[count, 20, 24] at very different scales."""
    scale = 10.0 ** torch.arange(-3, count - 3)
    return noise_pictures(count, (1, 20, 24), seed)[:, 0] * scale[:, None, None]


def unit(values: np.ndarray) -> np.ndarray:
    return (values - values.min()) / (values.max() - values.min())


@pytest.mark.parametrize("window", [3, 5, 7])
@pytest.mark.parametrize("sign", ["abs", "none", "positive"])
def test_against_other_libraries(window: int, sign: str) -> None:
    one, two = maps(), maps(seed=1) + 0.5 * maps()
    found = similarities(one, two, sign, window)  # type: ignore[arg-type]
    change = {"abs": np.abs, "none": lambda v: v, "positive": lambda v: np.maximum(v, 0)}[sign]
    for i in range(4):
        a, b = change(one[i].double().numpy()), change(two[i].double().numpy())
        wanted = structural_similarity(unit(a), unit(b), win_size=window, data_range=1.0)
        assert float(found["ssim"][i]) == pytest.approx(wanted, abs=1e-6)
        assert float(found["pearson"][i]) == pytest.approx(stats.pearsonr(a.ravel(), b.ravel())[0], abs=1e-6)
        assert float(found["spearman"][i]) == pytest.approx(stats.spearmanr(a.ravel(), b.ravel())[0], abs=1e-6)


def test_extremes() -> None:
    one = maps()
    for values in similarities(one, one, "none", 7).values():
        assert values.tolist() == pytest.approx([1] * 4, abs=1e-6)
    opposite = similarities(one, -one, "none", 7)
    assert opposite["spearman"].tolist() == opposite["pearson"].tolist() == pytest.approx([-1] * 4, abs=1e-6)
    assert (opposite["ssim"] < 0).all()
    for values in similarities(one, -3 * one, "abs", 7).values():
        assert values.tolist() == pytest.approx([1] * 4, abs=1e-6)
    stretched = similarities(one, torch.expm1(one / one.abs().amax((1, 2), keepdim=True)), "none", 7)
    assert stretched["spearman"].tolist() == pytest.approx([1] * 4, abs=1e-6)  # the order alone counts
    assert (stretched["pearson"] < 0.9999).all()


def test_equal_values_share_their_rank() -> None:
    values = torch.tensor([[3.0, 1, 3, 3, 0, 1], [2, 2, 2, 2, 2, 2]])
    wanted = np.stack([stats.rankdata(row) for row in values.numpy()])
    assert np.array_equal(average_ranks(values).numpy(), wanted)


def test_undefined() -> None:
    """Constant and NaN maps are like nothing, and do not spoil their neighbours."""
    one, two = maps(), maps(seed=1)
    good = similarities(one, two, "abs", 5)
    one[1], two[2, 3, 4] = 7.0, torch.nan
    for name, values in similarities(one, two, "abs", 5).items():
        assert values.isnan().tolist() == [False, True, True, False], name
        assert values[[0, 3]].tolist() == good[name][[0, 3]].tolist()
    assert similarities(torch.zeros(1, 8, 8), torch.zeros(1, 8, 8), "none", 3)["ssim"].isnan().all()


@pytest.mark.parametrize("window", [1, 21])
def test_a_window_that_does_not_fit(window: int) -> None:
    with pytest.raises(UserError, match="2 to 20"):
        ssim(maps(), maps(), window)
