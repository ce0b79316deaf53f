"""The completeness error: worked by hand, its floor, and what ends a run."""

from __future__ import annotations

import pytest
import torch

from ibxai.errors import UserError
from ibxai.methods.completeness import check_complete, completeness_error


def test_worked_by_hand() -> None:
    attributions = torch.tensor([[[[3.0, -1.0]]], [[[2.0, 2.0]]], [[[0.0, 0.0]]], [[[1.0, -1.0]]]])
    found = completeness_error(attributions, torch.tensor([2.0, -8.0, 0.0, 0.001]), 0.01)
    # 2 = 2; 4 instead of -8, a miss of 12 in 8; nothing of nothing; a miss of 0.001, and the floor is 1 % of 2
    torch.testing.assert_close(found, torch.tensor([0.0, 1.5, 0.0, 0.05]))


def test_without_a_floor_a_small_difference_counts_as_it_is() -> None:
    found = completeness_error(torch.tensor([[1.0, -1.0]]), torch.tensor([0.001]), 0.0)
    torch.testing.assert_close(found, torch.tensor([1.0]))


def test_the_sum_of_many_pixels_is_not_rounded() -> None:
    """A sum in float32 would lose the last of 16 million pixels, and more."""
    values = torch.ones(1, 1 << 24)
    values[0, 0] = 3
    assert completeness_error(values, torch.tensor([float((1 << 24) + 2)]), 0.0) == 0


@pytest.mark.parametrize("bad", [0.3, float("nan"), float("inf")])
def test_the_worst_sample_is_named(bad: float) -> None:
    error = torch.tensor([0.01, bad, 0.2])
    with pytest.raises(UserError, match=r"^Some method of b: .* by \S+ of it, more than method.tolerance=0.25.\nDo it"):
        check_complete(error, ("a", "b", "c"), 0.25, "Some method", "Do it.")


def test_at_the_tolerance_nothing_happens() -> None:
    check_complete(torch.tensor([0.25, 0.0]), ("a", "b"), 0.25, "Some method", "Do it.")
