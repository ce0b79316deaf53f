"""What a metric makes of a signed map before it judges it: a stated setting, since stored maps stay raw and signed.

    positive  max(map, 0): evidence against the target counts as none
    abs       |map|: evidence for and against the target counts alike
    none      the map as it is

Papers differ and seldom say which they use. The setting is part of a metric's identity, so of every row of results.
"""

from __future__ import annotations

from typing import Literal, get_args

from torch import Tensor

from ibxai.errors import UserError, nearest

Sign = Literal["positive", "abs", "none"]
SIGNS: tuple[str, ...] = get_args(Sign)


def check_sign(sign: str) -> None:
    """Raises UserError for a word that is none of `SIGNS`."""
    if sign not in SIGNS:
        raise UserError(f"There is no sign '{sign}'. {nearest(sign, SIGNS)}")


def with_sign(heatmap: Tensor, sign: Sign) -> Tensor:
    """[B, H, W], NaN kept. See the module."""
    if sign == "positive":
        return heatmap.clamp_min(0)
    return heatmap.abs() if sign == "abs" else heatmap


def undefined(heatmap: Tensor) -> Tensor:
    """bool [B]: rows whose map [B, H, W] holds NaN, which no metric can judge."""
    return heatmap.isnan().flatten(1).any(1)
