"""Mask: a smooth mask of low weight that takes the target's score away, found by gradient descent.

    min over M of  f(Phi(I, I~, M)) + lambda1 mean(1 - M) + lambda2 TV(M)        (iGOS++, Eq. 1; f at M, no intervals)

Reference: Fong, Vedaldi, "Interpretable Explanations of Black Boxes by Meaningful Perturbation", ICCV 2017, Eq. 3 with
Adam, and iGOS++'s comparison with it. Differently from the former the mask starts open everywhere, masked pictures get
noise instead of a jittered mask, and the rate falls to 0.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

from ibxai.backbones import Backbone
from ibxai.methods.mask_objective import Term
from ibxai.methods.mask_search import Adam, Descent, MaskSettings
from ibxai.types import Attributor, Batch


@dataclass(frozen=True, kw_only=True)
class Mask(MaskSettings):
    """All settings are those of `MaskSettings`; iterations are network passes, forward and backward."""

    iterations: int = 300

    def fit(
        self, backbone: Backbone, reference: Iterable[Batch], seed: int, state: Mapping[str, Tensor] | None = None
    ) -> Attributor:
        """Nothing is estimated, but the mean picture where it is the baseline. Diagnostics: see `IGOSpp.fit`."""
        descent = Descent(self.iterations, 1, 1, self.tolerance, Adam(self.learning_rate, together=False))
        return self.attributor(backbone, reference, seed, (Term(0, inserts=False, noisy=True),), descent)
