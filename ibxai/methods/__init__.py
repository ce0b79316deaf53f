"""Attribution methods: frozen dataclasses of hyper-parameters with `fit`."""

from ibxai.methods.deepshap import DeepSHAP
from ibxai.methods.gradcam import GradCAM
from ibxai.methods.gradients import Gradient, GradientXInput
from ibxai.methods.guided_backprop import GuidedBackprop, GuidedGradCAM
from ibxai.methods.iba import IBA
from ibxai.methods.input_iba import InputIBA
from ibxai.methods.integrated_gradients import IntegratedGradients
from ibxai.methods.inverse_iba import InverseIBA
from ibxai.methods.lime import LIME
from ibxai.methods.lrp import LRP
from ibxai.methods.multilayer_iba import MultilayerIBA
from ibxai.methods.occlusion import Occlusion
from ibxai.methods.random import Random

__all__ = [
    "IBA",
    "LIME",
    "LRP",
    "DeepSHAP",
    "GradCAM",
    "Gradient",
    "GradientXInput",
    "GuidedBackprop",
    "GuidedGradCAM",
    "InputIBA",
    "IntegratedGradients",
    "InverseIBA",
    "MultilayerIBA",
    "Occlusion",
    "Random",
]
