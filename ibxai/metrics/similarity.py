"""How alike two maps are: SSIM, and Pearson's and Spearman's correlation of their pixels.

    SSIM = mean over windows of  (2 m1 m2 + c1)(2 v12 + c2) / ((m1^2 + m2^2 + c1)(v1 + v2 + c2))      (Wang et al. 2004)

m, v, v12: means, variances and covariance in a window, c1 = 0.01^2, c2 = 0.03^2. As in Adebayo et al. ("Sanity checks
for saliency maps", NeurIPS 2018) each map is scaled to 0..1 before SSIM is taken; the correlations need no scale. The
windows are square, unweighted and lie inside the map, with sample covariances, which is scikit-image's default. A map
that is constant or holds NaN is like nothing: NaN.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ibxai.errors import UserError
from ibxai.metrics.normalisation import Sign, undefined, with_sign
from ibxai.metrics.pearson import correlation

_C1, _C2 = 0.01**2, 0.03**2


def similarities(first: Tensor, second: Tensor, sign: Sign, window: int) -> dict[str, Tensor]:
    """ "ssim", "spearman" and "pearson", [B] each, of two sets of maps [B, H, W].

    sign: what is made of signed maps first (see `normalisation.py`). window: side of SSIM's windows, in pixels.
    """
    one, two = with_sign(first, sign).double(), with_sign(second, sign).double()
    bad = undefined(first) | undefined(second)
    flat_one, flat_two = (torch.where(bad[:, None], 0.0, maps.flatten(1)) for maps in (one, two))
    found = {
        "ssim": ssim(_unit(one), _unit(two), window),
        "spearman": correlation(average_ranks(flat_one), average_ranks(flat_two)),
        "pearson": correlation(flat_one, flat_two),
    }
    return {name: values.masked_fill(bad, torch.nan).float() for name, values in found.items()}


def ssim(first: Tensor, second: Tensor, window: int) -> Tensor:
    """[B]: of maps [B, H, W] in 0..1. NaN where one holds NaN. Raises UserError for a window that is too large."""
    check_window(window, min(first.shape[-2:]))

    def mean(values: Tensor) -> Tensor:
        return F.avg_pool2d(values[:, None], window, stride=1)[:, 0]

    unbiased = window**2 / (window**2 - 1)
    m1, m2 = mean(first), mean(second)
    v1, v2 = (unbiased * (mean(a * a) - m * m) for a, m in ((first, m1), (second, m2)))
    v12 = unbiased * (mean(first * second) - m1 * m2)
    alike = (2 * m1 * m2 + _C1) * (2 * v12 + _C2) / ((m1**2 + m2**2 + _C1) * (v1 + v2 + _C2))
    return alike.mean((1, 2))


def check_window(window: int, side: int) -> None:
    """Raises UserError when windows of this side do not fit a map of that one."""
    if not 2 <= window <= side:
        raise UserError(f"SSIM's window is {window}: 2 to {side}, the side of the map, is expected.")


def average_ranks(values: Tensor) -> Tensor:
    """float64 [B, N]: the rank of each entry in its row [B, N], 1 for the smallest; equal entries share their mean."""
    ordered = values.sort(dim=1).values
    below = torch.searchsorted(ordered, values.contiguous())
    not_above = torch.searchsorted(ordered, values.contiguous(), right=True)
    return (below + not_above + 1).double() / 2


def _unit(maps: Tensor) -> Tensor:
    """Each map scaled to 0..1; NaN where it is constant."""
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    return (maps - low) / (high - low)
