"""Frozen networks with named layers."""

from ibxai.backbones.backbone import Backbone, Features, Split, freeze

__all__ = ["Backbone", "Features", "Split", "freeze"]
