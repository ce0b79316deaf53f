"""Draws: SplitMix64 worked out again in Python's integers, and what a statistician would ask of the numbers."""

from __future__ import annotations

import hashlib
import math

import numpy as np
import pytest
import scipy.stats
import torch

from ibxai.draws import normal, sample_keys, tie_breakers, uniform

WORD = (1 << 64) - 1


def splitmix(x: int) -> int:
    """The finaliser as published (Steele, Lea and Flood, Fig. 16: mix64variant13), on unsigned 64 bits."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & WORD
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & WORD
    return x ^ (x >> 31)


def plain_bits(seed: int, sample_id: str, purpose: str, step: int, count: int) -> list[int]:
    key = int.from_bytes(hashlib.blake2b(f"{seed}\0{purpose}\0{sample_id}".encode(), digest_size=8).digest(), "little")
    start = splitmix((key + (step + 1) * 0x9E3779B97F4A7C15) & WORD)
    return [splitmix((start + i * 0x9E3779B97F4A7C15) & WORD) for i in range(1, count + 1)]


IDS = ("a", "b/ünïcode", "n01440764_10026", "")
STEPS = (0, 1, 7, 12345)


def test_splitmix_of_the_oracle_itself() -> None:
    # the published generator's first outputs from state 1234567 (java.util.SplittableRandom, Rosetta Code)
    golden, state, found = 0x9E3779B97F4A7C15, 1234567, []
    for _ in range(3):
        state = (state + golden) & WORD
        found.append(splitmix(state))
    assert found == [6457827717110365317, 3203168211198807973, 9817491932198370423]


@pytest.mark.parametrize("step", STEPS)
def test_uniform_is_the_high_23_bits(step: int) -> None:
    found = uniform(sample_keys(3, IDS, "test"), step, (5, 7))
    assert found.shape == (4, 5, 7)
    assert found.dtype == torch.float32
    for row, sample_id in enumerate(IDS):
        wanted = [((b >> 41) + 0.5) / 2**23 for b in plain_bits(3, sample_id, "test", step, 35)]
        np.testing.assert_allclose(found[row].flatten().double().numpy(), wanted, rtol=0, atol=2**-24)


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("count", [6, 7])
def test_normal_is_box_and_muller_of_both_halves(step: int, count: int) -> None:
    found = normal(sample_keys(0, IDS, "noise"), step, (count,))
    assert found.shape == (4, count)
    assert found.dtype == torch.float32
    for row, sample_id in enumerate(IDS):
        bits = plain_bits(0, sample_id, "noise", step, math.ceil(count / 2))
        radius = [math.sqrt(-2 * math.log(((b >> 41) + 0.5) / 2**23)) for b in bits]
        angle = [2 * math.pi * (((b >> 8) & 0x7FFFFF) + 0.5) / 2**23 for b in bits]
        cosines = [r * math.cos(a) for r, a in zip(radius, angle, strict=True)]
        sines = [r * math.sin(a) for r, a in zip(radius, angle, strict=True)]
        np.testing.assert_allclose(found[row].double().numpy(), (cosines + sines)[:count], rtol=0, atol=3e-6)


def test_the_numbers_are_uniform_and_normal() -> None:
    keys = sample_keys(0, [str(i) for i in range(40)], "moments")
    flat, bell = (draw(keys, 3, (50, 101)).flatten().double().numpy() for draw in (uniform, normal))
    n = flat.size
    assert flat.min() > 0
    assert flat.max() < 1
    assert abs(flat.mean() - 0.5) < 5 * math.sqrt(1 / 12 / n)
    assert abs(bell.mean()) < 5 / math.sqrt(n)
    assert abs(bell.std() - 1) < 5 / math.sqrt(2 * n)
    assert abs((bell**3).mean()) < 5 * math.sqrt(15 / n)
    assert abs((bell**4).mean() - 3) < 5 * math.sqrt(96 / n)
    assert scipy.stats.kstest(flat, "uniform").pvalue > 1e-3
    assert scipy.stats.kstest(bell, "norm").pvalue > 1e-3
    assert np.abs(bell).max() > 4  # tails: P(none of 202,000 beyond 4) is 3e-6


@pytest.mark.parametrize("draw", [uniform, normal])
def test_samples_purposes_seeds_steps_and_neighbours_are_independent(draw) -> None:
    size = 20_000
    streams = [
        draw(sample_keys(0, ["a"], "one"), 0, (size,)),
        draw(sample_keys(0, ["b"], "one"), 0, (size,)),
        draw(sample_keys(0, ["a"], "two"), 0, (size,)),
        draw(sample_keys(1, ["a"], "one"), 0, (size,)),
        draw(sample_keys(0, ["a"], "one"), 1, (size,)),
        draw(sample_keys(0, ["a"], "one"), 2, (size,)),
    ]
    table = torch.cat(streams).double().numpy()
    shifted = [np.roll(table[0], k) for k in (1, 2, size // 2)]  # a stream against itself, places further on
    correlations = np.corrcoef(np.vstack([table, *shifted]))
    np.fill_diagonal(correlations, 0)
    assert np.abs(correlations).max() < 5 / math.sqrt(size)


def test_the_two_halves_of_a_normal_pair_are_independent() -> None:
    values = normal(sample_keys(0, ["a"], "pair"), 0, (40_000,))[0].double().numpy()
    first, second = values[:20_000], values[20_000:]
    for power in (1, 2):
        assert abs(np.corrcoef(first**power, second**power)[0, 1]) < 5 / math.sqrt(20_000)


def test_a_steps_stream_is_no_shifted_copy_of_the_next_steps() -> None:
    keys = sample_keys(0, ["a"], "overlap")
    first, second = (set(uniform(keys, step, (2000,))[0].tolist()) for step in (0, 1))
    assert len(first & second) < 10  # chance: 2000^2 / 2^24 = 0.24 expected


@pytest.mark.parametrize("draw", [uniform, normal, lambda keys, step, shape: tie_breakers(keys, math.prod(shape))])
def test_the_same_alone_in_a_batch_and_in_another_order(draw) -> None:
    ids = [f"s{i}" for i in range(9)]
    together = draw(sample_keys(5, ids, "p"), 2, (3, 5))
    order = [4, 8, 0, 2, 1, 7, 3, 5, 6]
    assert torch.equal(draw(sample_keys(5, [ids[i] for i in order], "p"), 2, (3, 5)), together[order])
    for i in (0, 4, 8):
        assert torch.equal(draw(sample_keys(5, [ids[i]], "p"), 2, (3, 5))[0], together[i])
    assert len({tuple(row.flatten().tolist()) for row in together}) == 9


@pytest.mark.parametrize("draw", [uniform, normal])
def test_steps_as_a_tensor(draw) -> None:
    keys = sample_keys(0, ["a", "b", "c"], "p")
    steps = torch.tensor([4, 0, 99])
    found = draw(keys, steps, (11,))
    for row, step in enumerate(steps.tolist()):
        assert torch.equal(found[row], draw(keys, step, (11,))[row])


def test_keys_keep_their_parts_apart() -> None:
    ids = [("1", "x", "y"), ("0", "1x", "y"), ("1", "y", "x"), ("1", "xy", ""), ("11", "x", "y"), ("-1", "x", "y")]
    keys = {int(sample_keys(int(seed), [sample], purpose)[0]) for seed, purpose, sample in ids}
    assert len(keys) == len(ids)


def test_tie_breakers_are_uniform_permutations() -> None:
    count, samples = 4, 6000
    found = tie_breakers(sample_keys(0, [str(i) for i in range(samples)], "ties"), count)
    assert found.dtype == torch.int64
    assert torch.equal(found.sort(1).values, torch.arange(count).expand(samples, count))
    _, seen = np.unique((found * torch.tensor([64, 16, 4, 1])).sum(1).numpy(), return_counts=True)
    assert len(seen) == math.factorial(count)
    assert scipy.stats.chisquare(seen).pvalue > 1e-3
    large = tie_breakers(sample_keys(0, ["a"], "ties"), 5000)[0]
    assert torch.equal(large.sort().values, torch.arange(5000))
    assert abs(scipy.stats.spearmanr(large.numpy(), np.arange(5000)).statistic) < 5 / math.sqrt(5000)


def test_global_random_state_is_neither_read_nor_changed() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    keys = sample_keys(0, ["a"], "p")
    found = uniform(keys, 0, (5,)), normal(keys, 0, (5,)), tie_breakers(keys, 5)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    again = uniform(keys, 0, (5,)), normal(keys, 0, (5,)), tie_breakers(keys, 5)
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))


def test_the_keys_are_not_written_on() -> None:
    keys = sample_keys(0, ["a", "b"], "p")
    before = keys.clone()
    uniform(keys, 0, (3,)), normal(keys, 1, (3,)), tie_breakers(keys, 3)
    assert torch.equal(keys, before)


def test_uniform_never_reaches_one() -> None:
    # the 154,853rd number of this stream has all 24 bits set
    assert plain_bits(0, "a", "open interval", 13, 154_853)[-1] >> 40 == 2**24 - 1
    assert uniform(sample_keys(0, ["a"], "open interval"), 13, (154_853,))[0, -1] < 1
