"""One card a shown sample: its picture or text with its heatmap, what was explained, what its hottest pixels show, its
scores.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from ibxai.report.curves import Chart, CurveSet
from ibxai.report.figures import Scale, map_picture, outlined, overlay, scale_of, split_at_top, write_overlay
from ibxai.report.render import ends, image_uri
from ibxai.report.tables import MetricScores
from ibxai.report.words import Piece, coloured
from ibxai.store import DamagedFile, Row, RunStore, StoredHeatmap

MOST_CARDS = 24
_MOST_PIXELS_SHOWN = 384  # longer side on the page; overlays/*.png keep the full size
_TOP_SHARES = (0.06, 0.12)  # of the pixels, as in the figures of iGOS++ (Khorram et al., CHIL 2021)
_MOST_PIXELS_SPLIT = 224
_UNITS = {"bits": "bits/pixel", "score": "score", "relevance": "relevance", "mask": "mask, 1 = keep"}


@dataclass(frozen=True)
class TopPixels:
    """A picture with the hottest share of its pixels alone, and without it: data URIs, made for the eye."""

    share: float
    kept: str
    removed: str


@dataclass(frozen=True, kw_only=True)
class Card:
    """What a card shows. Pictures are data URIs, "" of a text, which has pieces instead; minimum, maximum and total are
    of the raw map's finite values.
    """

    row: Row
    picture: str = ""
    overlay: str = ""
    outlined: bool = False
    map: str = ""
    tops: list[TopPixels] = field(default_factory=list)
    pieces: list[Piece] = field(default_factory=list)
    scale: Scale
    ends: tuple[str, str]
    unit: str
    minimum: float
    maximum: float
    total: float | None  # bits alone add up to something: the capacity
    undefined_pixels: int
    target: str
    target_probability: float
    regressed: float | None  # the explained value, where the network gives a number and no class
    prediction: str
    prediction_probability: float
    explains_prediction: bool
    label: str | None
    misclassified: bool
    charts: list[Chart]
    values: list[tuple[str, float]]
    diagnostics: list[tuple[str, float]]


def make_cards(store: RunStore, scores: Sequence[MetricScores], curves: Sequence[CurveSet]) -> list[Card]:
    """Cards of the first rows that have a picture and a heatmap, at most 24; writes their overlays/*.png too."""
    names, rows = store.class_names(), store.rows()
    finished = store.finished(row.row_id for row in rows)
    cards: list[Card] = []
    for row in rows:
        if len(cards) == MOST_CARDS:
            break
        if row.row_id not in finished:
            continue
        try:
            words, picture = store.read_words(row.row_id), store.read_picture(row.row_id)
            if words is None and picture is None:
                continue
            stored = store.read_heatmap(row.row_id)
            if words is not None:
                looks: dict[str, Any] = {"pieces": coloured(*words, stored.heatmap)}
            else:
                assert picture is not None
                looks = _pictures(store, row, picture, stored.heatmap)
            cards.append(_card(row, looks, stored, names, scores, curves))
        except (DamagedFile, UnidentifiedImageError, OSError, ValueError):
            continue  # the next run makes the file again
    return cards


def _pictures(store: RunStore, row: Row, picture: np.ndarray, heatmap: np.ndarray) -> dict[str, Any]:
    """What a card shows of a picture and its map; writes the overlay."""
    heat, outline = overlay(picture, heatmap), store.read_outline(row.row_id)
    if outline is not None and outline.shape == heatmap.shape:
        heat = outlined(heat, outline)
    write_overlay(store, row.row_id, heat)
    return {
        "picture": image_uri(_shown(picture), "jpeg"),
        "overlay": image_uri(_shown(heat), "jpeg"),
        "outlined": outline is not None,
        "map": image_uri(_shown(map_picture(heatmap)), "png"),
        "tops": _top_pixels(picture, heatmap),
    }


def _card(
    row: Row,
    looks: Mapping[str, Any],
    stored: StoredHeatmap,
    names: list[str] | None,
    scores: Sequence[MetricScores],
    curves: Sequence[CurveSet],
) -> Card:
    scale = scale_of(stored.heatmap)
    finite = stored.heatmap[np.isfinite(stored.heatmap)].astype(np.float64)
    regressed = stored.target_value if np.isnan(stored.target_probability) else None
    return Card(
        row=row,
        **looks,
        scale=scale,
        ends=ends(scale.low, scale.high),
        unit=_UNITS.get(stored.unit, stored.unit) if stored.heatmap.ndim == 2 else stored.unit,
        minimum=float(finite.min()) if finite.size else np.nan,
        maximum=float(finite.max()) if finite.size else np.nan,
        total=float(finite.sum()) if stored.unit == "bits" and finite.size else None,
        undefined_pixels=stored.heatmap.size - finite.size,
        target=class_name(stored.target, names),
        target_probability=stored.target_probability,
        regressed=regressed,
        prediction=class_name(stored.prediction, names),
        prediction_probability=stored.prediction_probability,
        explains_prediction=stored.target == stored.prediction,
        label=None if row.label is None else class_name(row.label, names),
        misclassified=regressed is None and row.label is not None and row.label != stored.prediction,
        charts=[chart for curve_set in curves if (chart := curve_set.row_chart(row)) is not None],
        values=_values_of(row, scores),
        diagnostics=[(name, float(value)) for name, value in stored.diagnostics.items() if np.ndim(value) == 0],
    )


def _top_pixels(picture: np.ndarray, heatmap: np.ndarray) -> list[TopPixels]:
    """Empty where the map gives no order."""
    tops = []
    for share in _TOP_SHARES:
        split = split_at_top(picture, heatmap, share)
        if split is not None:
            kept, removed = (image_uri(_shown(part, _MOST_PIXELS_SPLIT), "jpeg") for part in split)
            tops.append(TopPixels(share, kept, removed))
    return tops


def class_name(index: int, names: list[str] | None) -> str:
    return names[index] if names and 0 <= index < len(names) else f"class {index}"


def _values_of(row: Row, scores: Sequence[MetricScores]) -> list[tuple[str, float]]:
    return [
        (metric.value_label(name), float(values[metric.place[row.row_id]]))
        for metric in scores
        if row.row_id in metric.place
        for name, values in metric.values.items()
    ]


def _shown(pixels: np.ndarray, most: int = _MOST_PIXELS_SHOWN) -> np.ndarray:
    """The picture at the size of the page."""
    image = Image.fromarray(pixels)
    image.thumbnail((most, most), Image.Resampling.LANCZOS)
    return np.asarray(image)
