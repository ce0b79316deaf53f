"""How sure a mean is: bootstrap intervals that resample groups (patients, studies), not rows.

Rows of one patient are no independent evidence. A resample therefore draws whole groups with replacement, and its
mean is the sum of the drawn rows over their number. The interval lies between the 2.5th and 97.5th percentile of
10,000 such means (Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache

import numpy as np

RESAMPLES = 10_000
FEW_GROUPS = 20  # below this, percentile intervals are known to be too narrow: pages say so
_SEED = 0
_DRAWS_AT_ONCE = 4_000_000  # bounds memory: 32 MB of weights, whatever the number of groups


def defined(values: np.ndarray) -> np.ndarray:
    """Which values count: NaN and infinities do not, as a mean over them says nothing."""
    return np.isfinite(values)


def mean_intervals(values: np.ndarray, groups: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """95 % bootstrap interval of the mean of every column, resampling groups. The same input gives the same output.

    values: [N, K]; undefined values (NaN, infinite) are left out of their column, and a group without any defined
    value is not drawn there. groups: [N].
    Returns low [K] and high [K]; NaN where a column has fewer than two groups.
    """
    values = np.asarray(values, dtype=np.float64)
    named = np.asarray(groups, dtype=object)
    low, high = np.full((2, values.shape[1]), np.nan)
    # columns that are defined on the same rows share their draws: one pass for most tables and for all of a curve
    patterns, pattern_of = np.unique(defined(values), axis=1, return_inverse=True)
    for place in range(patterns.shape[1]):
        rows, columns = patterns[:, place], np.flatnonzero(pattern_of.reshape(-1) == place)
        member = np.unique(named[rows].astype(str), return_inverse=True)[1]
        if member.size and member.max() > 0:
            low[columns], high[columns] = _percentiles(values[np.ix_(rows, columns)], member)
    return low, high


def _percentiles(values: np.ndarray, member: np.ndarray) -> np.ndarray:
    """values [N, K], all defined; member [N]: each row's group 0..G-1, G > 1. Returns [2, K]."""
    counts = np.bincount(member).astype(np.float64)
    centre = values.mean(axis=0)  # resampling deviations keeps a constant column exactly constant
    sums = np.zeros((len(counts), values.shape[1]))
    np.add.at(sums, member, values - centre)

    means = np.empty((values.shape[1], RESAMPLES))
    start = 0
    for weights in _all_draws(len(counts)):
        means[:, start : start + len(weights)] = (sums.T @ weights.T) / (weights @ counts)
        start += len(weights)
    found = centre + np.percentile(means, [2.5, 97.5], axis=1, overwrite_input=True)
    return np.clip(found, values.min(axis=0), values.max(axis=0))  # between which every mean lies, but for rounding


def _all_draws(groups: int) -> Iterable[np.ndarray]:
    """The same resamples for every set of so many groups, in pieces [up to RESAMPLES, groups] that fit in memory."""
    if RESAMPLES * groups <= _DRAWS_AT_ONCE:
        return [_few_draws(groups)]
    generator, chunk = np.random.default_rng(_SEED), max(1, _DRAWS_AT_ONCE // groups)
    sizes = (min(chunk, RESAMPLES - start) for start in range(0, RESAMPLES, chunk))
    return (times_drawn(generator, size, groups) for size in sizes)


@lru_cache(maxsize=2)
def _few_draws(groups: int) -> np.ndarray:
    """Drawn once for all metrics and runs of a report."""
    return times_drawn(np.random.default_rng(_SEED), RESAMPLES, groups)


def times_drawn(generator: np.random.Generator, resamples: int, groups: int) -> np.ndarray:
    """[resamples, groups]: how often each group comes in each resample."""
    drawn = generator.integers(groups, size=(resamples, groups))
    drawn += np.arange(resamples)[:, None] * groups
    return np.bincount(drawn.ravel(), minlength=resamples * groups).reshape(resamples, groups).astype(np.float64)
