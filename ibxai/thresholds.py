"""Where a map is cut into what is highlighted and what is not: Otsu's threshold and quantiles, one a map."""

from __future__ import annotations

import torch
from torch import Tensor

_BINS = 256


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
