"""Every pair of methods on the samples that both have, for one metric: how much, how sure, and what is tied.

A pair's rows are those where both values are defined; the others are counted as left out. The mean difference is over
rows, its 95 % interval resamples groups (`statistics.py`). The test (`significance.py`) takes one difference a group,
the mean over the group's rows, since pictures of one patient are no independent evidence. Holm's correction is over
all tested pairs of the metric. Friedman's test needs whole blocks: groups where every method has a value, the mean
over the rows that all methods share.

The best group is the method with the best mean and all that are not shown to be worse than it. A method that could not
be tested against the best is not in it, and where the groups are so few that no difference could be shown, nobody is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from ibxai.report.significance import LEVEL, Ranking, holm, ranking, signed_rank, smallest_adjusted
from ibxai.report.statistics import defined, mean_intervals

_PAIRS_AT_ONCE, _NUMBERS_AT_ONCE = 200, 4_000_000  # bound memory: 16 MB of resampled means, 32 MB of differences
_LEAST_GROUPS = 2
COLUMNS = ["a", "b", "n", "left_out", "groups", "zeros", "difference", "low", "high", "p", "p_holm", "effect_size"]


@dataclass(frozen=True)
class Comparison:
    """K methods on one metric. better: "higher", "lower" or "" (not known).

    pairs: one line a pair, columns `COLUMNS`; a and b are positions of methods, difference is a minus b, and p is NaN
    with fewer than two groups. ranks: NaN-free average ranks, or None where there are fewer than three methods, two
    whole blocks or no direction. rows, whole_rows: rows that any method, and that every method, has a value of.
    """

    better: str
    means: np.ndarray
    pairs: pd.DataFrame
    ranks: Ranking | None
    rows: int
    whole_rows: int

    @property
    def tested(self) -> int:
        return int(self.pairs["p"].notna().sum())

    @property
    def can_differ(self) -> bool:
        """Whether any pair has groups enough for the test to find a difference at all."""
        most = int(self.pairs["groups"].max()) if len(self.pairs) else 0
        return most >= _LEAST_GROUPS and smallest_adjusted(most, self.tested) < LEVEL

    def winners(self) -> np.ndarray:
        """[P]: of each pair the method that is shown to be better, -1 where none is."""
        first = self.pairs["effect_size"].to_numpy() > 0
        if self.better == "lower":
            first = ~first
        better = np.where(first, self.pairs["a"], self.pairs["b"]).astype(int)
        shown = (self.pairs["p_holm"].to_numpy() < LEVEL) & bool(self.better)
        return np.where(shown, better, -1)

    def best_group(self) -> list[int]:
        """The method with the best mean and all not shown to be worse; empty where the test could show nothing."""
        candidates = np.flatnonzero(np.isfinite(self.means))
        if not self.better or len(candidates) < 2 or not self.can_differ:
            return []
        best = int(candidates[(np.argmax if self.better == "higher" else np.argmin)(self.means[candidates])])
        a, b = (self.pairs[name].to_numpy(dtype=int) for name in ("a", "b"))
        with_best = ((a == best) | (b == best)) & self.pairs["p"].notna().to_numpy()
        level = with_best & (self.winners() != best)
        return sorted({best, *a[level], *b[level]}) if with_best.any() else []


def compare(scores: Sequence[Mapping[str, float]], group_of: Mapping[str, str], better: str) -> Comparison:
    """Compare methods by their scores, row id -> value (NaN where undefined), one mapping a method.

    group_of: row id -> group, for every row. better: "higher", "lower" or "".
    """
    row_ids = sorted({row_id for values in scores for row_id in values})
    place = {row_id: number for number, row_id in enumerate(row_ids)}
    values = np.full((len(row_ids), len(scores)), np.nan)
    scored = np.zeros(values.shape, dtype=bool)
    for method, known in enumerate(scores):
        rows = [place[row_id] for row_id in known]
        values[rows, method] = list(known.values())
        scored[rows, method] = True
    values[~defined(values)] = np.nan
    groups = np.array([group_of[row_id] for row_id in row_ids], dtype=object)
    whole = np.isfinite(values).all(axis=1)
    counts = np.isfinite(values).sum(axis=0)
    return Comparison(
        better=better,
        means=np.divide(np.nansum(values, axis=0), counts, out=np.full(len(scores), np.nan), where=counts > 0),
        pairs=_pairs(values, scored, groups),
        ranks=_ranks(values[whole], groups[whole], better),
        rows=len(row_ids),
        whole_rows=int(whole.sum()),
    )


def _pairs(values: np.ndarray, scored: np.ndarray, groups: np.ndarray) -> pd.DataFrame:
    """One line a pair. values: [R, K], NaN where undefined; scored: [R, K], whether there is a value at all."""
    first, second = np.triu_indices(values.shape[1], k=1)
    step = max(1, min(_PAIRS_AT_ONCE, _NUMBERS_AT_ONCE // max(1, len(values))))
    parts = []
    for start in range(0, len(first), step):
        a, b = first[start : start + step], second[start : start + step]
        parts.append(_some_pairs(values[:, a] - values[:, b], groups).assign(a=a, b=b))
        parts[-1]["left_out"] = (scored[:, a] | scored[:, b]).sum(axis=0) - parts[-1]["n"]
    if not parts:
        return pd.DataFrame(columns=COLUMNS)
    table = pd.concat(parts, ignore_index=True)
    return table.assign(p_holm=holm(table["p"].to_numpy()))[COLUMNS]


def _some_pairs(differences: np.ndarray, groups: np.ndarray) -> pd.DataFrame:
    """What one pair alone tells. differences: [R, P], NaN where a pair lacks the row."""
    n = np.isfinite(differences).sum(axis=0)
    low, high = mean_intervals(differences, groups.tolist())
    blocks = group_means(differences, groups)
    p, effect = np.full((2, len(n)), np.nan)
    zeros = np.zeros(len(n), dtype=int)
    # pairs with the same groups are tested together
    patterns, pattern_of = np.unique(np.isfinite(blocks), axis=1, return_inverse=True)
    for number in range(patterns.shape[1]):
        columns = np.flatnonzero(pattern_of.reshape(-1) == number)
        inside = blocks[np.ix_(patterns[:, number], columns)]
        if len(inside) >= _LEAST_GROUPS:
            test = signed_rank(inside.T)
            p[columns], effect[columns], zeros[columns] = test.p, test.effect, test.zeros
    return pd.DataFrame(
        {
            "n": n,
            "groups": np.isfinite(blocks).sum(axis=0),
            "zeros": zeros,
            "difference": np.divide(np.nansum(differences, axis=0), n, out=np.full(len(n), np.nan), where=n > 0),
            "low": low,
            "high": high,
            "p": p,
            "effect_size": effect,
        }
    )


def group_means(values: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """[G, K]: the mean of every group's defined rows, by the groups' names; NaN where it has none. values: [R, K]."""
    member = np.unique(groups.astype(str), return_inverse=True)[1]
    sums = np.zeros((member.max(initial=-1) + 1, values.shape[1]))
    counts = np.zeros_like(sums)
    np.add.at(sums, member, np.nan_to_num(values))
    np.add.at(counts, member, np.isfinite(values))
    return np.divide(sums, counts, out=np.full(sums.shape, np.nan), where=counts > 0)


def _ranks(values: np.ndarray, groups: np.ndarray, better: str) -> Ranking | None:
    blocks = group_means(values, groups)
    if not better or len(blocks) < _LEAST_GROUPS or blocks.shape[1] < 3:
        return None
    return ranking(blocks, higher_is_better=better == "higher")
