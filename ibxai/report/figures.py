"""Heatmaps as pictures. This is the one place where a heatmap is scaled for the eye; stored maps stay raw.

Maps without negative values get a sequential colour scale (inferno, perceptually uniform), maps with both signs a
diverging one (Moreland's coolwarm) centred at zero. The limits are robust percentiles, so that a single pixel cannot
darken the rest; numbers beyond them take the end colours. An overlay lets the picture through where there is little
heat: its opacity grows with the heat. `split_at_top` shows a picture of which only the hottest share is sharp, and the
one of which all but this share is: an illustration for the eye, that no network has scored.
"""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
from matplotlib import colormaps
from PIL import Image, ImageFilter

from ibxai.store import RunStore, safe_name, write_atomically

_SEQUENTIAL, _DIVERGING = "inferno", "coolwarm"
_ROBUST = (1.0, 99.5)  # percentiles
_NEGLIGIBLE = 0.01  # negative values below this part of the largest magnitude are rounding, not a sign
_UNDEFINED_COLOUR = np.array([128, 128, 128], dtype=np.uint8)
_OUTLINES = {1: (0, 229, 255), 2: (124, 252, 0)}  # found: cyan, annotated: green; the warm scales have neither
_MOST_OPAQUE = 0.75
_BLUR = 0.045  # deviation of the blur that hides pixels, as a part of the longer side: 10 pixels of 224
_KEPT_COLOUR = 0.35  # of the photograph's own colour under the heat: enough to recognise, too little to compete


@dataclass(frozen=True)
class Scale:
    """How numbers become colours. low, high: the numbers at the two ends, NaN for a map without finite values."""

    low: float
    high: float
    signed: bool

    @property
    def colours(self) -> str:
        return _DIVERGING if self.signed else _SEQUENTIAL

    def place(self, heatmap: np.ndarray) -> np.ndarray:
        """0..1 along the scale, same shape; undefined pixels stay NaN. A constant map lies at the neutral end."""
        finite = np.where(np.isfinite(heatmap), heatmap, np.nan).astype(np.float64)
        if not self.high > self.low:
            return finite * 0
        return np.clip((finite - self.low) / (self.high - self.low), 0, 1)


def scale_of(heatmap: np.ndarray) -> Scale:
    """The colour scale of a raw map [H, W]."""
    finite = heatmap[np.isfinite(heatmap)].astype(np.float64)
    if finite.size == 0:
        return Scale(np.nan, np.nan, signed=False)
    if finite.min() == finite.max():
        return Scale(float(finite[0]), float(finite[0]), signed=False)
    largest = float(np.abs(finite).max())
    if finite.min() < -_NEGLIGIBLE * largest:
        limit = float(np.percentile(np.abs(finite), _ROBUST[1])) or largest
        return Scale(-limit, limit, signed=True)
    low, high = (float(value) for value in np.percentile(finite, _ROBUST))
    if low == high:  # a few hot pixels only: percentiles would hide them
        low, high = float(finite.min()), float(finite.max())
    return Scale(low, high, signed=False)


def map_picture(heatmap: np.ndarray) -> np.ndarray:
    """The raw map [H, W] in colours, uint8 [H, W, 3]. Undefined pixels are grey."""
    scale = scale_of(heatmap)
    place = scale.place(heatmap)
    undefined = np.isnan(place)
    colours = colormaps[scale.colours](np.where(undefined, 0, place), bytes=True)[..., :3]
    colours[undefined] = _UNDEFINED_COLOUR
    return colours


def overlay(picture: np.ndarray, heatmap: np.ndarray) -> np.ndarray:
    """The heat over a calmed picture, uint8 [H, W, 3]. Undefined pixels and constant maps add no heat.

    picture: uint8 [H, W, 3]; heatmap: [H, W], raw. Raises ValueError when the sizes differ.
    """
    if picture.shape[:2] != heatmap.shape:
        raise ValueError(f"a picture of {picture.shape[:2]} pixels cannot carry a heatmap of {heatmap.shape}")
    scale = scale_of(heatmap)
    place = np.nan_to_num(scale.place(heatmap), nan=0.5 if scale.signed else 0.0)
    strength = np.abs(2 * place - 1) if scale.signed else place
    if scale.signed:  # weak heat is transparent already; the scale's pale middle would only veil the picture
        place = 0.5 + np.sign(place - 0.5) * (0.25 + 0.25 * strength)
    opacity = _MOST_OPAQUE * strength[..., None] ** 0.75
    grey = (picture @ np.array([0.299, 0.587, 0.114]))[..., None]
    calm = _KEPT_COLOUR * picture + (1 - _KEPT_COLOUR) * grey
    heat = colormaps[scale.colours](place)[..., :3] * 255
    return np.rint((1 - opacity) * calm + opacity * heat).astype(np.uint8)


def outlined(pixels: np.ndarray, outline: np.ndarray) -> np.ndarray:
    """The picture uint8 [H, W, 3] with the borders of `types.DrawsOutlines`, uint8 [H, W], in their colours."""
    drawn = pixels.copy()
    for kind, colour in _OUTLINES.items():
        drawn[outline == kind] = colour
    return drawn


def split_at_top(picture: np.ndarray, heatmap: np.ndarray, share: float) -> tuple[np.ndarray, np.ndarray] | None:
    """The picture with its hottest pixels alone, and without them, what is hidden being blurred; uint8 [H, W, 3] each.

    picture: uint8 [H, W, 3]; heatmap: [H, W], raw; share: of the pixels, 0..1. Of equal values at the limit, a fixed
    random choice is taken. None where the map gives no order: it is constant or holds undefined values.
    """
    if not np.isfinite(heatmap).all() or heatmap.min() == heatmap.max():
        return None
    top = _top_pixels(heatmap.ravel(), round(share * heatmap.size)).reshape(heatmap.shape)[..., None]
    blur = ImageFilter.GaussianBlur(_BLUR * max(heatmap.shape))
    hidden = np.asarray(Image.fromarray(picture).filter(blur))
    return np.where(top, picture, hidden), np.where(top, hidden, picture)


def _top_pixels(values: np.ndarray, count: int) -> np.ndarray:
    """bool [P]: the `count` largest of values [P]."""
    if count == 0:
        return np.zeros(values.size, dtype=bool)
    limit = np.partition(values, -count)[-count]
    top = values > limit
    level = np.random.default_rng(0).permutation(np.flatnonzero(values == limit))
    top[level[: count - int(top.sum())]] = True
    return top


def colour_bar(name: str) -> str:
    """A CSS gradient of a scale's colours, left = low."""
    stops = colormaps[name](np.linspace(0, 1, 17), bytes=True)[:, :3]
    return f"linear-gradient(to right, {', '.join('#' + bytes(stop).hex() for stop in stops)})"


def colour_bars() -> dict[str, str]:
    """Scale name -> CSS gradient, for the page's style sheet."""
    return {name: colour_bar(name) for name in (_SEQUENTIAL, _DIVERGING)}


def write_overlay(store: RunStore, row_id: str, pixels: np.ndarray) -> None:
    """pixels uint8 [H, W, 3] -> overlays/<row>.png."""
    write_atomically(store.path / "overlays" / f"{safe_name(row_id)}.png", encoded(pixels, "png"))


def encoded(pixels: np.ndarray, kind: str) -> bytes:
    """uint8 [H, W, 3] as a file: "png" keeps every colour, "jpeg" (quality 90, full chroma) suits photographs."""
    buffer = io.BytesIO()
    settings = {} if kind == "png" else {"quality": 90, "subsampling": 0}
    Image.fromarray(pixels).save(buffer, kind, **settings)
    return buffer.getvalue()
