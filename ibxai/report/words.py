"""A text with its words coloured by a map over its tokens: the one place where such a map is scaled for the eye.

Two readings at once. The background is continuous, on the page's colour scale (`figures.py`). The line under a word has
the two thresholds of InputIBA's Table 1, on the map stretched to 0..1: thin from 0.33, thick from 0.66.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ibxai.report.figures import Scale, scale_of

THRESHOLDS = (0.33, 0.66)
_FOR, _AGAINST = (217, 72, 24), (58, 101, 200)  # as the ends of the diverging scale: red for the target, blue against
_MOST_OPAQUE = 0.8
_BREAKS = re.compile(r"(?:<br\s*/?>\s*)+", re.IGNORECASE)
_NO_VALUE = "undefined"


@dataclass(frozen=True)
class Piece:
    """A part of a text. colour: CSS, "" for what is no token. level: thresholds that it reaches, 0 to 2. value: the
    raw one, for people. unread: behind the last token that the network has read.
    """

    text: str
    colour: str = ""
    level: int = 0
    value: str = ""
    unread: bool = False


def coloured(text: str, spans: Sequence[tuple[int, int]], heatmap: np.ndarray) -> list[Piece]:
    """The whole text in pieces, in order. heatmap: [T], raw, one value a span (start, end) of characters.

    Raises ValueError when there are not as many spans as values.
    """
    scale, levels = scale_of(heatmap), levels_of(heatmap)
    pieces, behind = [], 0
    for (start, end), value, level in zip(spans, heatmap.tolist(), levels.tolist(), strict=True):
        if start > behind:
            pieces.append(Piece(_between(text[behind:start])))
        shown = f"{value:.3g}" if np.isfinite(value) else _NO_VALUE
        pieces.append(Piece(text[start:end], _colour(scale, value), level, shown))
        behind = end
    if behind < len(text):
        pieces.append(Piece(_between(text[behind:]), unread=True))
    return pieces


def levels_of(heatmap: np.ndarray) -> np.ndarray:
    """int [T]: how many of the two thresholds a value reaches, on the map from its lowest (signed maps: from 0) to its
    highest value; 0 for undefined values and constant maps.
    """
    finite = heatmap[np.isfinite(heatmap)]
    low = max(float(finite.min()), 0.0) if finite.size else 0.0
    width = float(finite.max()) - low if finite.size else 0.0
    if width <= 0:
        return np.zeros(heatmap.shape, dtype=int)
    place = np.nan_to_num((heatmap - low) / width, nan=0.0)
    return np.sum([place >= threshold for threshold in THRESHOLDS], axis=0)


def _colour(scale: Scale, value: float) -> str:
    place = float(scale.place(np.array([value]))[0])
    if np.isnan(place):
        return ""
    strength = abs(2 * place - 1) if scale.signed else place
    red, green, blue = _AGAINST if scale.signed and place < 0.5 else _FOR
    return f"rgb({red} {green} {blue} / {_MOST_OPAQUE * strength:.2f})"


def _between(text: str) -> str:
    """What stands between tokens: line breaks instead of HTML's."""
    return _BREAKS.sub("\n\n", text)
