"""Paired tests, ranks and best groups: against scipy, statsmodels, scikit-posthocs, hand-worked and simulated cases."""

import itertools

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from ibxai.report.comparisons import COLUMNS, Comparison, compare, group_means
from ibxai.report.significance import (
    critical_difference,
    holm,
    level_groups,
    ranking,
    signed_rank,
    smallest_adjusted,
)

# AUC of four variants of a decision tree on 14 data sets (Demsar, JMLR 2006, table 6). The average ranks and the
# statistic that are printed there come out if one tie, of two numbers that round to 0.975, is broken as it is here.
TREES = np.array([
    [0.763, 0.768, 0.771, 0.798], [0.599, 0.591, 0.590, 0.569], [0.954, 0.971, 0.968, 0.967],
    [0.628, 0.661, 0.654, 0.657], [0.882, 0.888, 0.886, 0.898], [0.936, 0.931, 0.916, 0.931],
    [0.661, 0.668, 0.609, 0.685], [0.583, 0.583, 0.563, 0.625], [0.775, 0.838, 0.866, 0.875],
    [1.000, 1.000, 1.000, 1.000], [0.940, 0.962, 0.965, 0.962], [0.619, 0.666, 0.614, 0.669],
    [0.972, 0.981, 0.975, 0.9749], [0.957, 0.978, 0.946, 0.970],
])  # fmt: skip


def by_row(values: np.ndarray) -> list[dict[str, float]]:
    """[R, K] as one mapping a method."""
    return [{f"s{row}": float(value) for row, value in enumerate(column)} for column in values.T]


def compared(values: np.ndarray, better: str = "higher", groups: list[str] | None = None) -> Comparison:
    names = groups or [f"s{row}" for row in range(len(values))]
    return compare(by_row(values), {f"s{row}": name for row, name in enumerate(names)}, better)


# Wilcoxon's signed-rank test


def signs_counted(differences: np.ndarray) -> float:
    """p by going through all signs of the ranks of one pair [N], slowly."""
    ranks = stats.rankdata(np.abs(differences)) * (differences != 0)
    distance = abs(ranks @ np.sign(differences))
    signs = itertools.product((-1, 1), repeat=len(ranks))
    return float(np.mean([abs(ranks @ np.array(sign)) >= distance - 1e-9 for sign in signs]))


def test_signed_rank_of_a_case_worked_by_hand() -> None:
    # ranks of |d|: 0 -> 1 (dropped), 1 and 1 -> 2.5 each, 2 -> 4, 3 -> 5; R+ = 11.5, R- = 2.5
    test = signed_rank(np.array([[0.0, 1, -1, 2, 3]]))
    assert test.zeros.tolist() == [1]
    assert test.effect == pytest.approx((11.5 - 2.5) / 14)
    # of the 16 signs of (2.5, 2.5, 4, 5) the smaller sums up to 2.5 are: none, either 2.5; and so from the other side
    assert test.p == pytest.approx(2 * 3 / 16)


def test_signed_rank_of_demsars_trees() -> None:
    # the paper splits the two zeros' ranks and has R+ = 93, R- = 12; here the ranks 1.5 and 1.5 are dropped
    test = signed_rank((TREES[:, 1] - TREES[:, 0])[None].round(3))
    assert test.zeros.tolist() == [2]
    assert test.effect == pytest.approx((91.5 - 10.5) / 102)
    assert test.p < 0.05


@pytest.mark.parametrize("blocks", [1, 2, 6, 11])
@pytest.mark.parametrize("kind", ["distinct", "ties", "zeros"])
def test_small_samples_are_counted_exactly_also_with_ties_and_zeros(blocks: int, kind: str) -> None:
    differences = np.random.default_rng(blocks).normal(0.3, 1, size=(5, blocks))
    if kind == "ties":
        differences = np.round(differences)
    elif kind == "zeros":
        differences[:, : blocks // 2] = 0
    expected = [signs_counted(pair) for pair in differences]
    assert signed_rank(differences).p == pytest.approx(expected)


@pytest.mark.parametrize(("blocks", "method"), [(20, "exact"), (50, "exact"), (51, "asymptotic"), (300, "asymptotic")])
def test_signed_rank_agrees_with_scipy(blocks: int, method: str) -> None:
    differences = np.random.default_rng(blocks).normal(0.15, 1, size=(6, blocks))
    expected = [stats.wilcoxon(pair, zero_method="pratt", method=method).pvalue for pair in differences]
    assert signed_rank(differences).p == pytest.approx(expected, rel=1e-9)


def test_large_samples_with_ties_and_zeros_agree_with_scipy() -> None:
    differences = np.random.default_rng(9).integers(-2, 4, size=(6, 120)).astype(float)
    expected = [stats.wilcoxon(pair, zero_method="pratt", method="asymptotic").pvalue for pair in differences]
    assert signed_rank(differences).p == pytest.approx(expected, rel=1e-9)


def test_a_pairs_p_does_not_depend_on_the_other_pairs() -> None:
    differences = np.random.default_rng(3).normal(size=(4, 30))
    differences[2] = np.round(differences[2])  # scipy would turn to the normal law for all four
    alone = [signed_rank(pair[None]).p[0] for pair in differences]
    assert signed_rank(differences).p.tolist() == alone


@pytest.mark.parametrize("blocks", [7, 80])
def test_known_extremes_of_the_effect_size(blocks: int) -> None:
    ones = np.arange(1.0, blocks + 1)
    test = signed_rank(np.stack([ones, -ones, np.zeros(blocks)]))
    assert test.effect.tolist() == [1, -1, 0]
    assert test.p[0] == test.p[1] < 0.02
    assert test.p[2] == 1
    assert test.zeros.tolist() == [0, 0, blocks]


# many tests


def test_holm_by_hand_and_against_statsmodels() -> None:
    assert holm(np.array([0.04, 0.01, 0.03])) == pytest.approx([0.06, 0.03, 0.06])
    assert holm(np.array([0.9, 0.8])) == pytest.approx([1, 1])
    with_gap = holm(np.array([0.04, np.nan, 0.01, 0.03]))
    assert np.isnan(with_gap[1])
    assert with_gap[[0, 2, 3]] == pytest.approx([0.06, 0.03, 0.06])
    assert holm(np.zeros(0)).size == 0
    multitest = pytest.importorskip("statsmodels.stats.multitest")
    p = np.random.default_rng(0).random(40) ** 4
    assert holm(p) == pytest.approx(multitest.multipletests(p, method="holm")[1])


def test_the_smallest_p_that_few_blocks_can_give() -> None:
    best = signed_rank(np.arange(1.0, 7)[None]).p  # one method wins on all six blocks
    assert smallest_adjusted(6, 1) == pytest.approx(best[0]) == pytest.approx(2 / 64)
    assert smallest_adjusted(6, 3) == pytest.approx(holm(np.repeat(best, 3))[0])
    assert smallest_adjusted(2, 66) == 1


def test_no_more_than_one_family_in_twenty_has_a_false_claim() -> None:
    generator = np.random.default_rng(11)
    first, second = np.triu_indices(4, k=1)
    any_claim, any_uncorrected = 0, 0
    for _ in range(500):
        scores = generator.normal(size=(30, 1)) + 0.3 * generator.normal(size=(30, 4))  # four methods, all the same
        p = signed_rank((scores[:, first] - scores[:, second]).T).p
        any_claim += bool((holm(p) < 0.05).any())
        any_uncorrected += bool((p < 0.05).any())
    assert any_claim / 500 <= 0.07  # 5 % and two standard errors
    assert any_uncorrected / 500 > 0.12  # without the correction it would be far more


def test_pictures_of_one_patient_are_one_piece_of_evidence() -> None:
    generator = np.random.default_rng(12)
    groups = np.array([f"p{i // 5}" for i in range(100)])
    false_rows, false_groups = 0, 0
    for _ in range(300):
        differences = np.repeat(generator.normal(size=20), 5) + 0.1 * generator.normal(size=100)
        false_rows += bool(signed_rank(differences[None]).p[0] < 0.05)
        false_groups += bool(signed_rank(group_means(differences[:, None], groups).T).p[0] < 0.05)
    assert false_rows / 300 > 0.2
    assert false_groups / 300 <= 0.08


# Friedman, Nemenyi


def test_ranks_of_demsars_trees() -> None:
    told = ranking(TREES, higher_is_better=True)
    assert told.average == pytest.approx([3.143, 2.000, 2.893, 1.964], abs=5e-4)  # as printed there
    assert told.critical_difference == pytest.approx(1.25, abs=5e-3)
    assert (told.chi_square, told.p) == pytest.approx(stats.friedmanchisquare(*TREES.T))
    # the paper's statistic, 9.28, has no correction for ties: 12 N / (k (k + 1)) (sum of squares - k (k + 1)^2 / 4)
    plain = 12 * 14 / 20 * (np.square(told.average).sum() - 25)
    assert plain == pytest.approx(9.28, abs=5e-3)
    assert told.chi_square > plain
    assert [sorted(group.tolist()) for group in level_groups(told.average, told.critical_difference)] == [[0, 1, 2, 3]]


@pytest.mark.parametrize(("methods", "q"), [(3, 2.343), (4, 2.569), (5, 2.728), (10, 3.164)])
def test_critical_values_are_the_printed_ones(methods: int, q: float) -> None:
    # Demsar's table 5 (a), 5 %
    assert critical_difference(methods, 10) == pytest.approx(q * (methods * (methods + 1) / 60) ** 0.5, rel=5e-4)


def test_ranks_go_the_metrics_way_and_share_ties() -> None:
    values = np.array([[0.1, 0.2, 0.2], [0.3, 0.1, 0.2], [0.1, 0.3, 0.2]])
    assert ranking(values, higher_is_better=True).average == pytest.approx(
        [7 / 3, (1.5 + 3 + 1) / 3, (1.5 + 2 + 2) / 3]
    )
    assert ranking(values, higher_is_better=False).average == pytest.approx(
        4 - ranking(values, higher_is_better=True).average
    )


def test_nemenyi_agrees_with_scikit_posthocs() -> None:
    posthocs = pytest.importorskip("scikit_posthocs")
    values = np.random.default_rng(2).normal(size=(25, 6)) + np.linspace(0, 1.2, 6)
    told = ranking(values, higher_is_better=True)
    differ = np.abs(told.average[:, None] - told.average) > told.critical_difference
    p = posthocs.posthoc_nemenyi_friedman(values).to_numpy()
    assert 3 < np.triu(differ).sum() < 15  # both answers occur
    np.testing.assert_array_equal(differ, p < 0.05)


def test_methods_that_are_all_alike_have_no_friedman_test() -> None:
    told = ranking(np.ones((5, 3)), higher_is_better=True)
    assert told.average.tolist() == [2, 2, 2]
    assert np.isnan(told.p)
    assert not told.differ
    for shape in ((1, 3), (5, 2)):
        with pytest.raises(ValueError, match="at least 3 methods and 2 blocks"):
            ranking(np.zeros(shape), higher_is_better=True)


def test_bars_join_the_largest_sets_within_the_critical_difference() -> None:
    ranks = np.array([5.0, 1.0, 1.8, 2.6, 4.2])

    def joined(critical: float) -> list[list[int]]:
        return [group.tolist() for group in level_groups(ranks, critical)]

    assert joined(0.5) == []
    assert joined(1.0) == [[1, 2], [2, 3], [4, 0]]
    assert joined(2.0) == [[1, 2, 3], [3, 4], [4, 0]]
    assert joined(4.0) == [[1, 2, 3, 4, 0]]


# comparisons of runs


def test_pairs_by_a_slow_plain_computation() -> None:
    generator = np.random.default_rng(4)
    values = generator.normal(size=(40, 3)) + np.array([0, 0.2, 0.9])
    values[3, 0] = values[7, 1] = np.nan
    values[9, 2] = np.inf
    groups = [f"p{row // 2}" for row in range(40)]
    table = compared(values, groups=groups).pairs
    assert list(table.columns) == COLUMNS
    p = []
    for line in table.to_dict("records"):
        a, b = values[:, line["a"]], values[:, line["b"]]
        both = np.isfinite(a) & np.isfinite(b)
        frame = pd.DataFrame({"d": (a - b)[both], "group": np.array(groups)[both]})
        means = frame.groupby("group")["d"].mean()
        test = stats.wilcoxon(means, method="exact")
        p.append(test.pvalue)
        assert (line["n"], line["left_out"], line["groups"]) == (both.sum(), 40 - both.sum(), len(means))
        assert line["difference"] == pytest.approx(frame["d"].mean())
        assert line["p"] == pytest.approx(test.pvalue)
        ranks = stats.rankdata(means.abs())
        assert line["effect_size"] == pytest.approx((ranks * np.sign(means)).sum() / ranks.sum())
        members = [part["d"].to_numpy() for _, part in frame.groupby("group")]
        drawn = [
            np.concatenate([members[i] for i in generator.integers(len(members), size=len(members))]).mean()
            for _ in range(2000)
        ]
        width = line["high"] - line["low"]
        assert [line["low"], line["high"]] == pytest.approx(np.percentile(drawn, [2.5, 97.5]), abs=0.08 * width)
    assert table["p_holm"].to_numpy() == pytest.approx(holm(np.array(p)))


def test_a_pairs_interval_is_that_of_its_differences_and_narrower_than_the_means_own() -> None:
    generator = np.random.default_rng(5)
    hard = generator.normal(size=60)  # some pictures are hard for every method
    line = compared(np.stack([hard + 0.05, hard + 0.01 * generator.normal(size=60)], axis=1)).pairs.iloc[0]
    assert line["low"] > 0.04
    assert line["high"] < 0.06
    assert line["p_holm"] < 1e-6


def test_rows_that_only_one_method_was_scored_on_are_counted_as_left_out() -> None:
    one, other = {"s0": 1.0, "s1": 2.0, "s2": 5.0}, {"s1": 1.0, "s2": np.nan, "s3": 0.0}
    comparison = compare([one, other], {f"s{i}": f"s{i}" for i in range(4)}, "higher")
    line = comparison.pairs.iloc[0]
    assert (line["n"], line["left_out"], line["groups"], line["difference"]) == (1, 3, 1, 1)
    assert np.isnan([line["p"], line["p_holm"], line["low"]]).all()  # one group proves nothing
    assert (comparison.rows, comparison.whole_rows) == (4, 1)
    assert comparison.best_group() == []


def test_friedman_takes_whole_blocks_of_group_means() -> None:
    values = np.array([[1, 2, 3], [3, 4, 5], [1, 5, 9], [9, np.nan, 1], [2, 1, 3], [np.nan, 1, 2]], dtype=float)
    comparison = compared(values, groups=["p", "p", "q", "q", "r", "t"])
    blocks = np.array([[2, 3, 4], [1, 5, 9], [2, 1, 3]])  # of q its first row, t has none
    assert comparison.ranks is not None
    assert comparison.ranks.blocks == 3
    assert (comparison.rows, comparison.whole_rows) == (6, 4)
    assert comparison.ranks.average == pytest.approx(stats.rankdata(-blocks, axis=1).mean(axis=0))
    assert compared(values, better="").ranks is None
    assert compared(values[:, :2]).ranks is None


@pytest.mark.parametrize("better", ["higher", "lower"])
def test_the_best_group_is_the_best_mean_and_all_not_shown_to_be_worse(better: str) -> None:
    generator = np.random.default_rng(6)
    picture, sign = generator.normal(size=(80, 1)), 1 if better == "higher" else -1
    quality = np.array([0.0, 0.5, 0.5, 0.1])
    values = picture + sign * quality + 0.2 * generator.normal(size=(80, 4))
    comparison = compared(values, better)
    assert comparison.best_group() == [1, 2]
    assert comparison.winners()[comparison.pairs.index[comparison.pairs.eval("a == 0 and b == 1")]].tolist() == [1]
    values[:, 3] += sign * 2
    assert compared(values, better).best_group() == [3]


def test_without_a_direction_nothing_wins() -> None:
    comparison = compared(np.stack([np.arange(30.0), np.arange(30.0) + 1], axis=1), "")
    assert comparison.pairs["p_holm"][0] < 1e-6
    assert comparison.winners().tolist() == [-1]
    assert comparison.best_group() == []


def test_methods_that_are_the_same_are_tied_and_a_planted_one_is_not() -> None:
    generator = np.random.default_rng(7)
    all_tied, found = 0, 0
    for _ in range(25):
        values = generator.normal(size=(30, 1)) + 0.3 * generator.normal(size=(30, 4))
        all_tied += compared(values).best_group() == [0, 1, 2, 3]
        values[:, 2] += 0.5
        found += compared(values).best_group() == [2]
    assert all_tied >= 22
    assert found >= 22


def test_a_method_whose_mean_an_outlier_spoils_is_not_called_worse() -> None:
    steady = np.linspace(0.5, 0.6, 40)
    spoiled = steady + 0.02
    spoiled[0] = -5
    comparison = compared(np.stack([steady, spoiled], axis=1))
    assert comparison.means[0] > comparison.means[1]
    assert comparison.pairs["p_holm"][0] < 0.001  # better nearly everywhere: the ranks see it, the means do not
    assert comparison.best_group() == [0, 1]


def test_order_of_methods_and_rows_does_not_matter() -> None:
    generator = np.random.default_rng(8)
    values = generator.normal(size=(25, 3))
    order = generator.permutation(25)
    plain, turned = compared(values).pairs, compared(values[:, ::-1]).pairs
    groups = [f"s{row}" for row in order]
    shuffled = compare(by_row(values[order]), {f"s{row}": name for row, name in enumerate(groups)}, "higher").pairs
    assert turned.iloc[::-1]["difference"].to_numpy() == pytest.approx(-plain["difference"].to_numpy())
    assert turned.iloc[::-1]["p_holm"].to_numpy() == pytest.approx(plain["p_holm"].to_numpy())
    pd.testing.assert_frame_equal(plain, shuffled)
    assert len(compared(values[:, :1]).pairs) == 0


def test_hundreds_of_pairs_in_pieces_are_the_same_as_alone() -> None:
    values = np.random.default_rng(10).normal(size=(12, 22))  # 231 pairs: more than one piece
    many = compared(values).pairs
    chosen = many[(many.a == 3) & (many.b == 20) | (many.a == 20) & (many.b == 21)]
    for line in chosen.to_dict("records"):
        alone = compared(values[:, [line["a"], line["b"]]]).pairs.iloc[0]
        for name in ("n", "groups", "difference", "low", "high", "p", "effect_size"):
            assert line[name] == pytest.approx(alone[name]), name
