"""Completeness: attributions that claim to share a difference of scores out among the pixels must sum to it.

    sum over pixels of A = S(x) - S(baseline)          (Sundararajan, Taly, Yan, ICML 2017, Proposition 1; DeepLIFT's
                                                        "summation to delta", Shrikumar et al., ICML 2017, Eq. 1)

What is missing is the error of the method on that picture: of the quadrature, or of a layer without a rule.
"""

from __future__ import annotations

from torch import Tensor

from ibxai.errors import UserError

_TINY = 1e-30


def completeness_error(attributions: Tensor, difference: Tensor, floor: float) -> Tensor:
    """[B]: |sum of attributions [B, ...] - difference [B]|, relative to |difference|.

    floor: where the two scores are nearly the same, this share of the sum of |attributions| stands for the difference.
    """
    values = attributions.flatten(1).double()
    scale = difference.double().abs().maximum(floor * values.abs().sum(1)).clamp_min(_TINY)
    return ((values.sum(1) - difference.double()).abs() / scale).float()


def check_complete(error: Tensor, sample_ids: tuple[str, ...], tolerance: float, method: str, advice: str) -> None:
    """Raises UserError, with the worst sample, when an error [B] is above the tolerance, or not a number."""
    worst = int(error.nan_to_num(nan=float("inf")).argmax())
    if not error[worst] <= tolerance:
        raise UserError(
            f"{method} of {sample_ids[worst]}: its sum misses the scores' difference by {error[worst]:.2g} of it, "
            f"more than method.tolerance={tolerance:g}.\n{advice}"
        )
