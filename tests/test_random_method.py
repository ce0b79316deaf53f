"""Random: a function of (seed, sample), uniform, and of nothing else."""

from __future__ import annotations

import scipy.stats
import torch
from networks import batch_of, noise_pictures, small_backbone

from ibxai.methods import Random
from ibxai.types import Attributor


def attributor(seed: int = 0) -> Attributor:
    return Random().fit(small_backbone(), [], seed)


def test_uniform_and_of_the_pictures_size() -> None:
    found = attributor()(batch_of(noise_pictures(4, (3, 60, 50)), [0, 1, 2, 3]))
    assert found.unit == "score"
    assert found.heatmap.shape == (4, 60, 50)
    assert found.heatmap.dtype == torch.float32
    for one in found.heatmap:
        assert scipy.stats.kstest(one.flatten().numpy(), "uniform").pvalue > 1e-3
    table = found.heatmap.flatten(1).double()
    assert (torch.corrcoef(table) - torch.eye(4, dtype=torch.float64)).abs().max() < 5 / 3000**0.5


def test_the_map_belongs_to_the_sample_and_the_seed_alone() -> None:
    pictures = noise_pictures(3)
    whole = attributor()(batch_of(pictures, [0, 1, 2], ["a", "b", "c"])).heatmap
    other = attributor()(batch_of(pictures * 2 + 1, [4, 4, 4], ["c", "x", "a"])).heatmap
    assert torch.equal(other[0], whole[2])
    assert torch.equal(other[2], whole[0])
    assert not torch.equal(other[1], whole[1])
    assert not torch.equal(attributor(1)(batch_of(pictures, [0, 1, 2], ["a", "b", "c"])).heatmap[0], whole[0])


def test_no_pass_and_no_reference() -> None:
    backbone = small_backbone()

    def explode():  # the reference split is not even looked at
        raise AssertionError
        yield

    with backbone.counting() as passes:
        Random().fit(backbone, explode(), 0)(batch_of(noise_pictures(2), [0, 1]))
    assert dict(passes) == {}
    assert not Random.uses_reference
