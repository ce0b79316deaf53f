"""iGOS++ and I-GOS: the smallest smooth mask that takes the evidence away, and that brings it back, by itself.

    min over Mx, My of  f_IG(Mx) + h_IG(My) + f_IG(Mx My) + h_IG(Mx My) + g(Mx My)                      (Eq. 4)

with f_IG the deletion score, h_IG minus the insertion score, both averaged on the way to the baseline or the picture,
and g the regulariser: see `mask_objective.py`. The heatmap is 1 - Mx My, enlarged: what is hidden by the mask. I-GOS is
the deletion alone, min over M of f_IG(M) + g(M), with TV instead of BTV.

References: Khorram, Lawson, Li, "iGOS++: Integrated Gradient Optimized Saliency by Bilateral Perturbations", CHIL 2021;
Qi, Khorram, Li, "Visualizing Deep Networks by Optimizing with Integrated Gradients" (I-GOS), AAAI 2020.

What this code does differently, and why: masks move by scaled steps on half of the IG intervals at a time, instead of
a line search on all of them; `step=armijo` is the paper's. Noise is drawn once for a sample, a step and an interval,
so a line search compares like with like: the official code draws afresh at every trial, and adds noise to the terms of
the product too.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from ibxai.backbones import Backbone
from ibxai.methods.mask_objective import Smoothness, Term
from ibxai.methods.mask_search import IntegratedSettings
from ibxai.methods.settings import check_choice
from ibxai.types import Attributor, Batch

# the objectives of the ablation (Table 3); Mx is plane 0, My plane 1, their product None
OBJECTIVES: Mapping[str, tuple[Term, ...]] = {
    "bilateral": (
        Term(0, inserts=False, noisy=True),
        Term(1, inserts=True, noisy=True),
        Term(None, inserts=False, noisy=False),
        Term(None, inserts=True, noisy=False),
    ),
    "deletion": (Term(0, inserts=False, noisy=True),),
    "insertion": (Term(0, inserts=True, noisy=True),),
    "naive": (Term(0, inserts=False, noisy=True), Term(0, inserts=True, noisy=True)),
}
OUTPUTS: Mapping[str, int | None] = {"product": None, "deletion": 0, "insertion": 1}


@dataclass(frozen=True, kw_only=True)
class IGOSpp(IntegratedSettings):
    """objective: "bilateral" is Eq. 4; of one mask: "deletion", "insertion", and "naive", their sum.

    output: which mask is the map (Table 5): "product" Mx My, "deletion" Mx, "insertion" My; a lone mask is the product.
    """

    smoothness: Smoothness = "btv"
    objective: Literal["bilateral", "deletion", "insertion", "naive"] = "bilateral"
    output: Literal["product", "deletion", "insertion"] = "product"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self, "objective", *OBJECTIVES)
        check_choice(self, "output", *(OUTPUTS if self.objective == "bilateral" else ["product"] * 2))

    def fit(
        self, backbone: Backbone, reference: Iterable[Batch], seed: int, state: Mapping[str, Tensor] | None = None
    ) -> Attributor:
        """Nothing is estimated, but the mean picture where it is the baseline.

        Diagnostics: `value_curve` [B, iterations], the objective before each step; `combined_loss` [B], deletion minus
        insertion score under the map's mask (Table 7); `steps`, `passes` [B]: steps taken, network rows run for them.
        """
        descent = self.descent(at_the_mask=False)
        return self.attributor(backbone, reference, seed, OBJECTIVES[self.objective], descent, OUTPUTS[self.output])


@dataclass(frozen=True, kw_only=True)
class IGOS(IntegratedSettings):
    """I-GOS, as the paper compares with it; armijo compares values at the mask itself."""

    armijo_start: float = 8.0

    def fit(
        self, backbone: Backbone, reference: Iterable[Batch], seed: int, state: Mapping[str, Tensor] | None = None
    ) -> Attributor:
        """As of `IGOSpp`."""
        return self.attributor(backbone, reference, seed, OBJECTIVES["deletion"], self.descent(at_the_mask=True))
