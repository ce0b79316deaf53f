"""Which differences are real: paired tests of methods on the same blocks, and what it costs to make many of them.

A block is a group (patient, study or single picture) with one value a method; d_i is its difference of two methods.

    r  = (R+ - R-) / (R+ + R-)          matched-pairs rank-biserial correlation       (Kerby, Compr. Psychol. 2014)
    p' = max over smaller p of (m - i) p, at most 1, p sorted, i = 0, 1 ...           (Holm, Scand. J. Stat. 1979)
    CD = q sqrt(k (k + 1) / (6 N))      Nemenyi: k methods, N blocks, q of the studentized range over sqrt 2
                                                                                      (Demsar, JMLR 2006, sec. 3.2.2)

R+ and R- are Wilcoxon's sums of the ranks of |d_i| with either sign. Blocks without a difference are ranked and their
ranks dropped (Pratt, JASA 1959): two methods that agree on most blocks are then not told apart by the few others.
Up to 50 blocks p is exact, given these ranks: all 2^N signs are counted, also with ties and zeros, where scipy samples
or turns to the normal law. Above, the normal law with the tie correction is used, as scipy does.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from scipy import stats
from scipy.special import ndtr

LEVEL = 0.05  # of the family of all pairs of one metric
_MOST_EXACT = 50  # blocks


@dataclass(frozen=True)
class SignedRank:
    """Wilcoxon's test, one entry a pair. p: two-sided. effect: rank-biserial, -1..1, 0 where all differences are zero.

    zeros: blocks without a difference.
    """

    p: np.ndarray
    effect: np.ndarray
    zeros: np.ndarray


def signed_rank(differences: np.ndarray) -> SignedRank:
    """differences: [P, N], a row a pair of methods, a column a block; no NaN, N at least 1. Source: see above."""
    ranks = stats.rankdata(np.abs(differences), axis=1)
    ranks[differences == 0] = 0
    above = np.where(differences > 0, ranks, 0).sum(axis=1)
    total = ranks.sum(axis=1)
    effect = np.divide(2 * above - total, total, out=np.zeros(len(total)), where=total > 0)
    smaller = np.minimum(above, total - above)
    p = _exact(ranks, smaller) if differences.shape[1] <= _MOST_EXACT else _normal(ranks, smaller)
    return SignedRank(p, effect, (differences == 0).sum(axis=1))


def _exact(ranks: np.ndarray, smaller: np.ndarray) -> np.ndarray:
    """p of the smaller rank sum [P], over all signs that the ranks [P, N] can take. Mid-ranks double to integers."""
    doubled, reached = np.rint(2 * np.sort(ranks, axis=1)).astype(int), np.rint(2 * smaller).astype(int)
    p = np.empty(len(ranks))
    # without ties all pairs have the ranks 1..N, and one count serves them all
    kinds, kind_of = np.unique(doubled, axis=0, return_inverse=True)
    for place, kind in enumerate(kinds):
        chance = np.zeros(kind.sum() + 1)
        chance[0] = 1
        for rank in kind[kind > 0]:
            chance[rank:] += chance[:-rank].copy()
            chance /= 2
        pairs = kind_of.reshape(-1) == place
        p[pairs] = np.minimum(1, 2 * np.cumsum(chance)[reached[pairs]])
    return p


def _normal(ranks: np.ndarray, smaller: np.ndarray) -> np.ndarray:
    """p [P] of the smaller rank sum by the normal law; squared mid-ranks carry the correction for ties and zeros."""
    deviation = np.sqrt((ranks**2).sum(axis=1) / 4)
    distance = smaller - ranks.sum(axis=1) / 2
    return 2 * ndtr(np.divide(distance, deviation, out=np.zeros(len(ranks)), where=deviation > 0))


def holm(p: np.ndarray) -> np.ndarray:
    """p values [P] adjusted for their number; the same order. NaN (no test was made) stays and does not count."""
    adjusted = np.full(len(p), np.nan)
    tested = np.flatnonzero(np.isfinite(p))
    order = tested[np.argsort(p[tested], kind="stable")]
    adjusted[order] = np.minimum(1, np.maximum.accumulate(np.arange(len(order), 0, -1) * p[order]))
    return adjusted


def smallest_adjusted(blocks: int, pairs: int) -> float:
    """The smallest p that `holm` can leave of a signed-rank test: with few blocks it may lie above the level."""
    return min(1.0, pairs * 2.0 ** (1 - blocks))


@dataclass(frozen=True)
class Ranking:
    """Friedman's test and Nemenyi's critical difference. average: [K], 1 = best on every block; blocks: their number.

    chi_square has K - 1 degrees of freedom; p is NaN where all methods are equal on every block.
    """

    average: np.ndarray
    blocks: int
    chi_square: float
    p: float
    critical_difference: float

    @property
    def differ(self) -> bool:
        return self.p < LEVEL


def ranking(values: np.ndarray, higher_is_better: bool) -> Ranking:
    """values: [N, K], no NaN, N blocks by K methods; at least 2 by 3, or ValueError."""
    blocks, methods = values.shape
    if blocks < 2 or methods < 3:
        raise ValueError(f"ranks of {methods} methods on {blocks} blocks: at least 3 methods and 2 blocks are needed")
    ranks = stats.rankdata(-values if higher_is_better else values, axis=1)
    if (ranks == ranks[:, :1]).all():
        chi_square, p = math.nan, math.nan
    else:
        chi_square, p = (float(part) for part in stats.friedmanchisquare(*ranks.T))
    return Ranking(ranks.mean(axis=0), blocks, chi_square, p, critical_difference(methods, blocks))


def critical_difference(methods: int, blocks: int) -> float:
    """Average ranks further apart than this differ, at the level of 5 % over all pairs (Nemenyi)."""
    return _studentized_range(methods) / math.sqrt(2) * math.sqrt(methods * (methods + 1) / (6 * blocks))


@lru_cache
def _studentized_range(methods: int) -> float:
    return float(stats.studentized_range.ppf(1 - LEVEL, methods, np.inf))


def level_groups(average: np.ndarray, critical: float) -> list[np.ndarray]:
    """Largest sets of at least two methods whose average ranks [K] lie within the critical difference, best first."""
    order = np.argsort(average, kind="stable")
    sorted_ranks = average[order]
    ends = np.searchsorted(sorted_ranks, sorted_ranks + critical, side="right")
    groups, covered = [], 0
    for start, end in enumerate(ends):
        if end > covered and end - start > 1:
            groups.append(order[start:end])
        covered = max(covered, int(end))
    return groups
