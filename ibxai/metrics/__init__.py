"""Metrics: frozen dataclasses that judge finished heatmaps, one value a sample."""

from ibxai.metrics.confidence import ConfidenceDrop, PixelRatio
from ibxai.metrics.insertion import Deletion, Insertion
from ibxai.metrics.lesions import Lesions
from ibxai.metrics.localisation import BoxShare, EffectiveHeatRatio, IoU, PointingGame
from ibxai.metrics.pearson import SeverityCorrelation
from ibxai.metrics.sensitivity_n import SensitivityN

__all__ = [
    "BoxShare",
    "ConfidenceDrop",
    "Deletion",
    "EffectiveHeatRatio",
    "Insertion",
    "IoU",
    "Lesions",
    "PixelRatio",
    "PointingGame",
    "SensitivityN",
    "SeverityCorrelation",
]
