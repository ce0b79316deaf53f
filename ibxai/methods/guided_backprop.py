"""Guided backpropagation: the gradient, of which every rectifier lets only positive parts back; and with Grad-CAM.

    R^l = (f^l > 0) * (R^{l+1} > 0) * R^{l+1}               (Springenberg et al., ICLR workshop 2015, sec. 3.4)
    Guided Grad-CAM = guided backpropagation * upscaled Grad-CAM                      (Selvaraju et al., ICCV 2017)

f^l is a ReLU's input and R^{l+1} what comes back to its output. ReLU6, which the paper does not have, lets nothing
back where it is saturated either, as its gradient. Gates (sigmoid, softmax), pooling and products pass the plain
gradient. The rule is not defined for other activations, and a network that has one is refused by name: common codes
give its plain gradient and say nothing, with ReLU6 too.

Not through captum, whose `GuidedBackprop` knows `nn.ReLU` alone. Guided backpropagation hardly depends on the
network's weights or on the class (Adebayo et al., "Sanity Checks for Saliency Maps", NeurIPS 2018).
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import timm.layers
from torch import Tensor, fx, nn
from torch.nn.modules import pooling

from ibxai.backbones import Backbone
from ibxai.errors import UserError
from ibxai.methods.activations import exchange, other_kinds
from ibxai.methods.gradcam import GradCAM
from ibxai.methods.gradients import CHANNELS, Channels, input_gradient, over_channels
from ibxai.methods.settings import check_choice
from ibxai.types import SCORE_KINDS, Attribution, Attributor, Batch, ScoreKind

log = logging.getLogger(__name__)

_RECTIFIERS = (nn.ReLU, nn.ReLU6)
_GATES = (
    nn.Sigmoid,
    nn.Hardsigmoid,
    nn.Softmax,
    nn.Softmax2d,
    nn.LogSoftmax,
    timm.layers.Sigmoid,
    timm.layers.HardSigmoid,
)
_POOLINGS = (pooling._MaxPoolNd, pooling._AdaptiveMaxPoolNd)
_HOMES = ("torch.nn.modules.activation", "timm.layers.activations")  # where modules are activations
# Activations that a network may call without a module; those that tracing makes modules of need no name here.
_FUNCTIONS = (
    *("elu", "elu_", "celu", "celu_", "selu", "selu_", "leaky_relu", "leaky_relu_", "rrelu", "rrelu_", "prelu"),
    *("hardswish", "hardtanh", "hardtanh_", "mish", "softplus", "softsign", "glu", "logsigmoid", "threshold"),
    *("tanh", "tanh_", "tanhshrink", "softshrink", "hardshrink", "clamp", "clamp_", "clamp_min", "clamp_min_"),
    *("clip", "maximum", "where"),
)


@dataclass(frozen=True, kw_only=True)
class GuidedBackprop:
    """channels: see `over_channels`. score: what is differentiated."""

    channels: Channels = "max_abs"
    score: ScoreKind = "logit"

    version: ClassVar[int] = 1
    uses_reference: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_choice(self, "channels", *CHANNELS)
        check_choice(self, "score", *SCORE_KINDS)

    def fit(
        self, backbone: Backbone, reference: Iterable[Batch], seed: int, state: Mapping[str, Tensor] | None = None
    ) -> Attributor:
        """Nothing is estimated. Raises UserError when the network has an activation without a rule."""
        network = guided(backbone)

        def attribute(batch: Batch) -> Attribution:
            values, score = input_gradient(network, batch, self.score, backbone.max_passes)
            return Attribution(over_channels(values, self.channels), "score", {"score": score})

        return attribute


@dataclass(frozen=True, kw_only=True)
class GuidedGradCAM:
    """layer, relu: of Grad-CAM. channels: of guided backpropagation, see `over_channels`. Both explain the logit."""

    layer: str = "gradcam"
    relu: bool = True
    channels: Channels = "max_abs"

    version: ClassVar[int] = 1
    uses_reference: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_choice(self, "channels", *CHANNELS)

    def fit(
        self, backbone: Backbone, reference: Iterable[Batch], seed: int, state: Mapping[str, Tensor] | None = None
    ) -> Attributor:
        """Nothing is estimated. Raises UserError as `GradCAM.fit` and `GuidedBackprop.fit` do."""
        coarse = GradCAM(self.layer, self.relu).fit(backbone, reference, seed)
        fine = GuidedBackprop(channels=self.channels).fit(backbone, reference, seed)

        def attribute(batch: Batch) -> Attribution:
            where, what = coarse(batch), fine(batch)
            return Attribution(where.heatmap * what.heatmap, "score", what.diagnostics)

        return attribute


class _Guided(nn.Module):
    """A rectifier that lets only the positive part of a gradient back, and of that what its own gradient does."""

    def __init__(self, rectifier: nn.Module) -> None:
        super().__init__()
        self.rectifier = rectifier

    def forward(self, inputs: Tensor) -> Tensor:
        out: Tensor = self.rectifier(inputs)
        if out.requires_grad:
            # on the tensor, where the gradients of all that use it have been summed; it goes when the graph goes
            out.register_hook(lambda gradient: gradient.clamp_min(0))
        return out


def guided(backbone: Backbone) -> nn.Module:
    """A copy of the network with guided rectifiers. Raises UserError when it has activations without a rule."""
    network = backbone.module()
    others = other_kinds(network, _RECTIFIERS + _GATES + _POOLINGS)
    unknown = {kind.__name__ for kind in others if kind.__module__.startswith(_HOMES)} | _called(network)
    if unknown:
        raise UserError(
            f"Guided backpropagation knows ReLU and ReLU6; {backbone.name} has {', '.join(sorted(unknown))}.\n"
            "The plain gradient is method=gradient."
        )
    if others:
        names = ", ".join(kind.__name__ for kind in others)
        log.warning("guided backpropagation passes the plain gradient through %s of %s", names, backbone.name)
    exchange(network, _RECTIFIERS, _Guided)
    return network


def _called(network: nn.Module) -> set[str]:
    """The activations that are called without a module."""
    assert isinstance(network, fx.GraphModule)
    calls = (node.target for node in network.graph.nodes if node.op in ("call_function", "call_method"))
    return {getattr(call, "__name__", str(call)) for call in calls}.intersection(_FUNCTIONS)
