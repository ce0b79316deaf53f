"""Attribution methods: frozen dataclasses of hyper-parameters with `fit`."""

from ibxai.methods.deepshap import DeepSHAP
from ibxai.methods.extremal_perturbation import ExtremalPerturbation
from ibxai.methods.gradcam import GradCAM
from ibxai.methods.gradients import Gradient, GradientXInput
from ibxai.methods.guided_backprop import GuidedBackprop, GuidedGradCAM
from ibxai.methods.iba import IBA
from ibxai.methods.igospp import IGOS, IGOSpp
from ibxai.methods.input_iba import InputIBA
from ibxai.methods.integrated_gradients import IntegratedGradients
from ibxai.methods.inverse_iba import InverseIBA
from ibxai.methods.lime import LIME
from ibxai.methods.lrp import LRP
from ibxai.methods.mask import Mask
from ibxai.methods.multilayer_iba import MultilayerIBA
from ibxai.methods.occlusion import Occlusion
from ibxai.methods.random import Random
from ibxai.methods.rise import RISE

__all__ = [
    "IBA",
    "IGOS",
    "LIME",
    "LRP",
    "RISE",
    "DeepSHAP",
    "ExtremalPerturbation",
    "GradCAM",
    "Gradient",
    "GradientXInput",
    "GuidedBackprop",
    "GuidedGradCAM",
    "IGOSpp",
    "InputIBA",
    "IntegratedGradients",
    "InverseIBA",
    "Mask",
    "MultilayerIBA",
    "Occlusion",
    "Random",
]
