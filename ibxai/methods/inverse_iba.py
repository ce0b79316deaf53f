"""Inverse IBA: the smallest part of a layer that has to be drowned in noise for the evidence to be gone, all of it.

    Z = lambda eps + (1 - lambda) R       min over alpha of  L = -L_CE(Phi(Z), y) + beta L_I      (CheXplain, Eqs. 5-6)

IBA finds a sufficient region and may leave redundant evidence unmarked; here every region with predictive information
has to go. L_I counts lambda, which blocks, as if it were signal: intended, as the literal I(X; Z) of Eq. 5 would be
smallest with noise everywhere. The map is in bits of blocked signal.

Reference: Khakzar et al., "Explaining COVID-19 and Thoracic Pathology Model Predictions by Identifying Informative
Input Features" (CheXplain), MICCAI 2021, sec. 2.1. What this code does differently: -L_CE = ln p has no lower bound and
runs away (with the official code the explained probability reached 0.000 at beta 10), so by default -ln(1 - p) is
minimised, the cross-entropy of "not this class", which ends at 0; `bound: none` is the published form.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ibxai.errors import UserError, nearest
from ibxai.methods.iba import IBA
from ibxai.targets import BOUNDS, Bound
from ibxai.types import Target


@dataclass(frozen=True, kw_only=True)
class InverseIBA(IBA):
    """The settings of IBA, another beta, and `bound`: how the objective is kept from running away (`targets.Bound`)."""

    beta: float = 30.0
    bound: Bound = "complement"

    inverse: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bound not in BOUNDS:
            raise UserError(f"There is no bound '{self.bound}'. {nearest(self.bound, BOUNDS)}")

    def target_loss(self) -> Callable[[Target, Tensor], Tensor]:
        return lambda target, out: target.removal_loss(out, self.bound)
