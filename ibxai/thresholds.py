"""Where a map is cut into what is highlighted and what is not, one threshold a map, by one of these rules.

    fixed     `level` times the map's maximum; of a map without a positive value nothing is highlighted
    quantile  the quantile `level` of its pixels
    mean_std  their mean plus `level` deviations
    otsu      Otsu's threshold, which has no level
    absolute  `level` itself, in the map's unit: what is highlighted in one map means the same in another

Metrics and methods share them.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

Rule = Literal["fixed", "quantile", "mean_std", "otsu", "absolute"]
RULES: tuple[str, ...] = get_args(Rule)
_BINS = 256


def cut(maps: Tensor, rule: Rule, level: float) -> Tensor:
    """float64 [B]: the threshold of each map [B, H, W]; a pixel at it is highlighted. See the module."""
    values = maps.double().flatten(1)
    if rule == "otsu":
        return otsu(maps).double()
    if rule == "quantile":
        return quantile(values, torch.tensor([level], dtype=torch.float64, device=values.device))[:, 0]
    if rule == "mean_std":
        return values.mean(1) + level * values.std(1, correction=0)
    if rule == "absolute":
        return torch.full_like(values[:, 0], level)
    highest = values.amax(1)
    return torch.where(highest > 0, level * highest, torch.inf)


def otsu(maps: Tensor) -> Tensor:
    """[B]: Otsu's threshold of each map [B, H, W] (IEEE Trans. SMC 9(1), 1979), over 256 bins between its extremes.

    The cut that maximises the variance between the two classes; of a constant map its value, so nothing is above it.
    """
    flat = maps.flatten(1).double()
    low, high = flat.amin(1, keepdim=True), flat.amax(1, keepdim=True)
    width = (high - low).clamp_min(torch.finfo(torch.float64).tiny) / _BINS
    bins = ((flat - low) / width).long().clamp(0, _BINS - 1)
    counts = torch.zeros(len(flat), _BINS, dtype=torch.float64, device=flat.device)
    counts.scatter_add_(1, bins, torch.ones_like(flat))
    centres = low + width * (torch.arange(_BINS, dtype=torch.float64, device=flat.device) + 0.5)
    below, mass = counts.cumsum(1), (counts * centres).cumsum(1)
    above, total = below[:, -1:] - below, mass[:, -1:]
    mean_below = mass / below.clamp_min(1)
    mean_above = (total - mass) / above.clamp_min(1)
    best = (below * above * (mean_below - mean_above) ** 2)[:, :-1].argmax(1, keepdim=True)
    edge = low + width * (best + 1)
    return torch.where(high > low, edge, high)[:, 0].to(maps.dtype)


def quantile(values: Tensor, levels: Tensor) -> Tensor:
    """[B, T]: quantiles of values [B, P], between neighbours as numpy does. (torch.quantile refuses large batches.)"""
    rising = values.sort(1).values
    place = levels * (values.shape[1] - 1)
    lower = place.floor().long()
    upper = (lower + 1).clamp_max(values.shape[1] - 1)
    return torch.lerp(rising[:, lower], rising[:, upper], (place - lower).to(values.dtype).expand(len(values), -1))
