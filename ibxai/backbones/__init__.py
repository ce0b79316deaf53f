"""Frozen networks with named layers."""

from ibxai.backbones.backbone import Backbone, Features, Split, freeze
from ibxai.backbones.text import TextBackbone

__all__ = ["Backbone", "Features", "Split", "TextBackbone", "freeze"]
