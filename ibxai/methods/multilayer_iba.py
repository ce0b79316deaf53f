"""Multi-layer IBA: a bottleneck at several layers, each by itself, and what their maps agree on.

    T(IBA_L1) and T(IBA_L2) and ... and T(IBA_LL)                                                     (CheXplain, Eq. 7)

Early layers are crisp and overestimate information, late ones are coarse and right; together they are both.

Reference: Khakzar et al. (CheXplain), MICCAI 2021, sec. 2.3. The optimisations are independent: each has its own layer,
noise and tail, none sees another's mask. Three ways to combine: "sum" adds the maps divided by their L2 norms and
thresholds nothing (the default: on photographs a fixed threshold loses most of the insertion score); "intersection" is
Eq. 7, each map binarised by Otsu's rule or by a fixed value of the L2-normalised map (the official code: 0.006), times
the sum inside, so that the pixels kept still have an order.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ibxai.backbones import Backbone
from ibxai.errors import UserError
from ibxai.methods.iba import BottleneckSettings, diagnostics_of
from ibxai.methods.settings import check_choice
from ibxai.thresholds import otsu
from ibxai.types import Attribution, Attributor, Batch


@dataclass(frozen=True, kw_only=True)
class MultilayerIBA(BottleneckSettings):
    """The settings of IBA, for several `layers` (names or roles).

    combine: "sum" or "intersection". threshold: of the intersection, "otsu" or a value of the L2-normalised map.
    """

    layers: tuple[str, ...] = ("early", "mid", "late")
    combine: Literal["sum", "intersection"] = "sum"
    threshold: Literal["otsu"] | float = "otsu"

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(set(self.layers)) < len(self.layers):
            raise UserError(f"method.layers is {list(self.layers)}: each layer counts once.")
        if not self.layers:
            raise UserError("method.layers is empty: name at least one layer or role.")
        check_choice(self, "combine", "sum", "intersection")
        if self.threshold != "otsu" and not isinstance(self.threshold, float | int):
            raise UserError(f"method.threshold is '{self.threshold}': otsu or a number is expected.")

    def fit(
        self, backbone: Backbone, reference: Iterable[Batch], seed: int, state: Mapping[str, Tensor] | None = None
    ) -> Attributor:
        """Statistics of all layers from one pass over the reference. Raises UserError as IBA does."""
        bottlenecks = self.bottlenecks(backbone, self.layers, self.statistics(backbone, self.layers, reference), seed)

        def attribute(batch: Batch) -> Attribution:
            size = (batch.inputs.shape[-2], batch.inputs.shape[-1])
            masks = [(bottleneck, bottleneck.find(batch)) for bottleneck in bottlenecks]
            maps = torch.stack([normalised(bottleneck.map_of(mask, size)) for bottleneck, mask in masks])
            capacities = {
                f"capacity_{bottleneck.purpose}": diagnostics_of(mask)["capacity"] for bottleneck, mask in masks
            }
            return Attribution(self.combined(maps), "score", capacities)

        return attribute

    def combined(self, maps: Tensor) -> Tensor:
        """[B, H, W] from the L2-normalised maps [L, B, H, W]."""
        total = maps.sum(0)
        if self.combine == "sum":
            return total
        return total * self.binary(maps).all(0)

    def binary(self, maps: Tensor) -> Tensor:
        """bool [L, B, H, W]: T of Eq. 7."""
        if self.threshold != "otsu":
            return maps > float(self.threshold)
        return maps > otsu(maps.flatten(0, 1)).view(*maps.shape[:2], 1, 1)


def normalised(maps: Tensor) -> Tensor:
    """[B, H, W], each divided by its L2 norm; an empty map stays empty."""
    norm = maps.flatten(1).norm(dim=1).clamp_min(torch.finfo(maps.dtype).tiny)
    return maps / norm[:, None, None]
