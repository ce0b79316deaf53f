"""Correlation with a severity map: against numpy, its extremes, and what has none."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
import pytest
import torch
from networks import batch_of, noise_pictures
from torch import Tensor

from ibxai.metrics import SeverityCorrelation
from ibxai.metrics.pearson import correlation
from ibxai.types import Attribution

SIDE = 10


def judge(heatmap: Tensor, regions: Mapping[str, Tensor], **settings) -> Tensor:
    batch = batch_of(torch.zeros(len(heatmap), 1, SIDE, SIDE), [0] * len(heatmap))
    batch = dataclasses.replace(batch, regions=regions)
    return SeverityCorrelation(**settings)(None, batch, Attribution(heatmap, "score"))["value"]  # type: ignore[arg-type]


def six_regions() -> Tensor:
    """[1, 6, SIDE, SIDE]: severities 0..3 of six fields; 0 around them."""
    planes = torch.zeros(1, 6, SIDE, SIDE)
    for place, score in enumerate([0, 1, 3, 2, 3, 0]):
        row, column = divmod(place, 2)
        planes[0, place, 3 * row : 3 * row + 3, 1 + 4 * column : 5 + 4 * column] = score
    return planes


MAPS = noise_pictures(4, (1, SIDE, SIDE))[:, 0]


def test_against_numpy() -> None:
    severity = six_regions().expand(4, -1, -1, -1)
    lungs = (torch.rand(4, 2, SIDE, SIDE, generator=torch.Generator().manual_seed(1)) > 0.4) & (severity[:, :1] < 3)
    regions = {"severity": severity, "lungs": lungs}
    flat = severity.sum(1).numpy()
    for sign, shown in (("none", MAPS), ("abs", MAPS.abs()), ("positive", MAPS.clamp_min(0))):
        wanted = [np.corrcoef(m.numpy().ravel(), s.ravel())[0, 1] for m, s in zip(shown, flat, strict=True)]
        np.testing.assert_allclose(judge(MAPS, regions, sign=sign), wanted, rtol=1e-5)
    inside = lungs.any(1).numpy()
    wanted = [np.corrcoef(m[k], s[k])[0, 1] for m, s, k in zip(MAPS.numpy(), flat, inside, strict=True)]
    np.testing.assert_allclose(judge(MAPS, regions, within="lungs"), wanted, rtol=1e-5)


def test_known_extremes() -> None:
    severity = six_regions().sum(1)
    shown = torch.cat([severity, -severity, 1e-9 * severity, 1e3 + severity])
    found = judge(shown, {"severity": six_regions().expand(4, -1, -1, -1)})
    assert found.tolist() == pytest.approx([1, -1, 1, 1], abs=1e-6)


def test_what_has_no_correlation() -> None:
    """A constant or empty map, a severity that is nowhere or everywhere the same, a map with NaN, no annotation."""
    severity = six_regions().expand(7, -1, -1, -1).clone()
    shown = MAPS[:1].repeat(7, 1, 1)
    shown[0], shown[1], shown[2, 3, 3] = 0.1, 0.0, torch.nan
    severity[3] = 0
    severity[4] = torch.tensor([0.1, 0, 0, 0, 0, 0])[:, None, None]
    shown[5, 0, 0] = torch.inf
    found = judge(shown, {"severity": severity})
    assert found[:6].isnan().all()
    assert found[6].isfinite()
    assert judge(shown, {}).isnan().all()
    assert judge(shown, {"severity": severity}, within="lungs").isnan().all()
    nowhere = torch.zeros(7, 1, SIDE, SIDE, dtype=torch.bool)
    assert judge(shown, {"severity": severity, "lungs": nowhere}, within="lungs").isnan().all()


def test_correlation_of_far_away_and_of_tiny_numbers() -> None:
    generator = torch.Generator().manual_seed(0)
    one = torch.randn(3, 4, 50, generator=generator, dtype=torch.float64)
    two = one + torch.randn(3, 4, 50, generator=generator, dtype=torch.float64)
    wanted = np.array([[np.corrcoef(one[i, j], two[i, j])[0, 1] for j in range(4)] for i in range(3)])
    for first in (one, 1e-200 * one, 1e150 * one, one + 1e6):
        np.testing.assert_allclose(correlation(first, two), wanted, rtol=1e-8)
        np.testing.assert_allclose(correlation(two, first), wanted, rtol=1e-8)
    assert correlation(one, torch.full_like(one, 0.1)).isnan().all()
