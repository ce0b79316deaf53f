"""Metrics: frozen dataclasses that judge finished heatmaps, one value a sample."""

from ibxai.metrics.insertion import Deletion, Insertion

__all__ = ["Deletion", "Insertion"]
