"""Attribution methods: frozen dataclasses of hyper-parameters with `fit`."""

from ibxai.methods.gradcam import GradCAM
from ibxai.methods.iba import IBA
from ibxai.methods.random import Random

__all__ = ["IBA", "GradCAM", "Random"]
