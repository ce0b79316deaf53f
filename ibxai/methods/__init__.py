"""Attribution methods: frozen dataclasses of hyper-parameters with `fit`."""

from ibxai.methods.gradcam import GradCAM
from ibxai.methods.iba import IBA
from ibxai.methods.input_iba import InputIBA
from ibxai.methods.inverse_iba import InverseIBA
from ibxai.methods.multilayer_iba import MultilayerIBA
from ibxai.methods.random import Random

__all__ = ["IBA", "GradCAM", "InputIBA", "InverseIBA", "MultilayerIBA", "Random"]
