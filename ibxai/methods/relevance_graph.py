"""Relevance through a whole network: each operation of its graph shares what its output is worth among its inputs.

    module or operation                                            what happens to the relevance
    convolution, linear                                            a rule of relevance_rules.py, as the composite says
    batch norm that no convolution absorbed                        epsilon rule of x -> a x + b, channel by channel
    ReLU, ReLU6, LeakyReLU, ELU, SiLU, GELU, Hardswish, dropout    stays as it is: f(x) is worth what x is worth
    max pooling                                                    goes to the largest input
    flatten, reshape, permute, cat, indexing ...                   moves along
    sum, mean, average pooling, a + b, a - b                       epsilon rule with weights 1: in proportion
    a gate (sigmoid or softmax) times a signal                     all to the signal; the gate is taken as a weight
    a constant times a signal, a signal divided by a constant      stays as it is

Nothing else is covered: a network with another operation between picture and output is refused with its name, before
any picture is explained. What only feeds a gate gets no relevance and may be anything.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from timm.layers import Conv2dSame, Sigmoid
from timm.layers.split_attn import RadixSoftmax
from torch import Tensor, fx, nn
from torch.nn import functional as F

from ibxai.errors import UserError
from ibxai.methods.relevance_rules import AffineLayer, Composite, RuleSettings, Shared, propagate, share, total

_CONVOLUTIONS = (nn.Conv2d, Conv2dSame)
_PASSING = (
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SiLU, nn.GELU, nn.Hardswish),
    *(nn.Identity, nn.Dropout, nn.Dropout2d, F.dropout, "contiguous"),
)
_MOVING = (
    *(nn.Flatten, torch.flatten, torch.reshape, "flatten", "reshape", "view"),
    *(torch.permute, torch.transpose, torch.squeeze, torch.unsqueeze, "permute", "transpose", "squeeze", "unsqueeze"),
    *(torch.cat, operator.getitem),
    *(nn.MaxPool2d, nn.AdaptiveMaxPool2d, F.max_pool2d),
)
_ADDITIONS = (operator.add, torch.add, "add", operator.sub, torch.sub, "sub")
_SUMMING = (
    *(nn.AvgPool2d, nn.AdaptiveAvgPool2d, F.avg_pool2d, F.adaptive_avg_pool2d),
    *(torch.sum, torch.mean, "sum", "mean"),
    *_ADDITIONS,
)
_PRODUCTS = (operator.mul, torch.mul, "mul")
_QUOTIENTS = (operator.truediv, torch.div, "div")
_GATES = (
    *(nn.Sigmoid, Sigmoid, nn.Hardsigmoid, nn.Softmax, RadixSoftmax),
    *(torch.sigmoid, torch.softmax, F.softmax, F.hardsigmoid, "sigmoid", "softmax"),
)
_COVERED = (
    "Covered are convolution, linear, batch norm, ReLU and its kin, dropout, pooling, reshaping, cat, sum, mean, +, -, "
    "constants and sigmoid or softmax gates."
)

Values = Mapping[fx.Node, Any]


@dataclass(frozen=True)
class _Step:
    """How one node hands its relevance on to `sources`. keeps: the nodes whose values it needs for that."""

    node: fx.Node
    sources: Sequence[fx.Node]
    share: Callable[[Values, Tensor], Shared]
    keeps: Sequence[fx.Node]


class RelevanceGraph:
    """A network's forward pass that keeps what the rules need, and the way of the relevance back to the picture.

    module: a canonical GraphModule (`Backbone.module()`), which is changed. name: the network's, for errors.
    Raises UserError when an operation is not covered.
    """

    def __init__(self, module: fx.GraphModule, name: str, composite: Composite, settings: RuleSettings) -> None:
        self._module, self._name, self._composite, self._settings = module, name, composite, settings
        self._modules = dict(module.named_modules())
        nodes = list(module.graph.nodes)
        self._picture, output = nodes[0], nodes[-1]
        self._varying = self._reached_from_the_picture(nodes)
        self._early = self._in_front_of_the_first_layer(nodes)
        self._last = output.args[0]
        self._refuse_in_place(nodes)
        self._steps = self._plan(nodes)
        self._kept = list(dict.fromkeys(node for step in self._steps for node in step.keeps))
        output.args = ((self._last, *self._kept),)
        module.graph.lint()
        module.recompile()

    def forward(self, inputs: Tensor) -> tuple[Tensor, Values]:
        """(output [B, K], the values that `backward` needs) of pictures [B, C, H, W]."""
        with torch.no_grad():
            out, *kept = self._module(inputs)
        return out, dict(zip(self._kept, kept, strict=True))

    def backward(self, values: Values, relevance: Tensor) -> tuple[Tensor, Tensor]:
        """(relevance of the pictures [B, C, H, W], absorbed float64 [B]) from the relevance of the outputs [B, K]."""
        waiting = {self._last: relevance}
        absorbed = relevance.new_zeros(len(relevance), dtype=torch.float64)
        for step in self._steps:
            shared = step.share(values, waiting.pop(step.node))
            absorbed = absorbed + shared.absorbed
            for source, part in zip(step.sources, shared.inputs, strict=True):
                waiting[source] = waiting[source] + part if source in waiting else part
        return waiting[self._picture], absorbed

    # --- which operation follows which rule

    def _plan(self, nodes: Sequence[fx.Node]) -> list[_Step]:
        """The steps from the output back to the picture."""
        if self._last not in self._varying:
            raise UserError(f"LRP cannot explain {self._name}: its output does not depend on the picture.")
        steps: list[_Step] = []
        wanted = {self._last}
        for node in reversed(nodes):
            if node in wanted and node is not self._picture:
                steps.append(self._step(node))
                wanted.update(steps[-1].sources)
        return steps

    def _step(self, node: fx.Node) -> _Step:
        kind = self._kind(node)
        if kind in _CONVOLUTIONS or kind is nn.Linear:
            return self._layer_step(node, AffineLayer.of(self._modules[str(node.target)]), self._rule(node, kind))
        if kind is nn.BatchNorm2d and node not in self._early:
            return self._layer_step(node, AffineLayer.of(_as_convolution(self._modules[str(node.target)])), "epsilon")
        if kind in _PASSING or kind is nn.BatchNorm2d:
            return _Step(node, self._sources(node), _pass_on, [])
        if kind in _MOVING:
            return _Step(node, self._sources(node), self._move(node), node.all_input_nodes)
        if kind in _SUMMING:
            return self._sum_step(node)
        if kind in (*_PRODUCTS, *_QUOTIENTS) and (signal := self._signal(node)) is not None:
            return _Step(node, [signal], self._to_the_signal(signal), [signal])
        raise self._refusal(node)

    def _layer_step(self, node: fx.Node, layer: AffineLayer, rule: str) -> _Step:
        (source,) = self._sources(node)

        def handed_on(values: Values, relevance: Tensor) -> Shared:
            return propagate(rule, layer, values[source], relevance, self._settings)

        return _Step(node, [source], handed_on, [source])

    def _sum_step(self, node: fx.Node) -> _Step:
        """Everything that adds up: linear in its sources together, but for a constant that an addition may bring."""
        sources = self._sources(node)
        if node in self._early:
            if self._kind(node) in _ADDITIONS and len(sources) == 1:
                return _Step(node, sources, _pass_on, [])  # a shift of every pixel alike is preprocessing
            if self._composite.first in ("flat", "box"):  # they give relevance to a 0, which a sum cannot hand on
                raise self._refusal(node, " in front of the first convolution")

        def shared(values: Values, relevance: Tensor) -> Shared:
            inputs = [values[source] for source in sources]
            offset = self._again(node, values, sources, [torch.zeros_like(x) for x in inputs])
            again = lambda leaves: self._again(node, values, sources, leaves)  # noqa: E731
            return share(again, inputs, offset, relevance, self._settings.epsilon)

        return _Step(node, sources, shared, node.all_input_nodes)

    def _move(self, node: fx.Node) -> Callable[[Values, Tensor], Shared]:
        """Each element of the output is one of the input's, so the relevance takes the way of the gradient."""
        sources = self._sources(node)

        def moved(values: Values, relevance: Tensor) -> Shared:
            with torch.enable_grad():
                leaves = [values[source].detach().requires_grad_() for source in sources]
                out = self._again(node, values, sources, leaves)
            return Shared(torch.autograd.grad(out, leaves, relevance), torch.zeros_like(total(relevance)))

        return moved

    def _to_the_signal(self, signal: fx.Node) -> Callable[[Values, Tensor], Shared]:
        def whole(values: Values, relevance: Tensor) -> Shared:
            return Shared([relevance.sum_to_size(values[signal].shape)], torch.zeros_like(total(relevance)))

        return whole

    def _signal(self, node: fx.Node) -> fx.Node | None:
        """The factor that the relevance goes to; None when no rule says which, or an option makes it no product."""
        if node.kwargs:
            return None
        factors = [n for n in node.args if isinstance(n, fx.Node) and n in self._varying]
        if self._kind(node) in _QUOTIENTS:
            return node.args[0] if factors == [node.args[0]] else None  # type: ignore[return-value]
        signals = [n for n in factors if len(factors) == 1 or not self._is_gate(n)]
        return signals[0] if len(signals) == 1 else None

    def _is_gate(self, node: fx.Node) -> bool:
        while self._kind(node) in (*_MOVING, *_PASSING) and len(self._sources(node)) == 1:
            (node,) = self._sources(node)
        return self._kind(node) in _GATES

    # --- the graph

    def _kind(self, node: fx.Node) -> Any:
        """The class of a module, the function itself, or a method's name. Classes exactly: a subclass may do more."""
        return type(self._modules[str(node.target)]) if node.op == "call_module" else node.target

    def _rule(self, node: fx.Node, kind: Any) -> str:
        if self._sources(node)[0] in self._early:
            return self._composite.first
        return self._composite.linear if kind is nn.Linear else self._composite.convolution

    def _sources(self, node: fx.Node) -> list[fx.Node]:
        return [n for n in node.all_input_nodes if n in self._varying]

    def _reached_from_the_picture(self, nodes: Sequence[fx.Node]) -> set[fx.Node]:
        """The nodes whose value depends on the picture's; its size and type are no value."""
        found = {self._picture}
        for node in nodes:
            if not _is_size(node) and any(n in found for n in node.all_input_nodes):
                found.add(node)
        return found

    def _in_front_of_the_first_layer(self, nodes: Sequence[fx.Node]) -> set[fx.Node]:
        """The picture, and what was made of it with no convolution or linear layer on the way."""
        found = {self._picture}
        for node in nodes:
            is_layer = self._kind(node) in (*_CONVOLUTIONS, nn.Linear)
            if node in self._varying and not is_layer and all(n in found for n in self._sources(node)):
                found.add(node)
        return found

    def _again(self, node: fx.Node, values: Values, sources: Sequence[fx.Node], leaves: Sequence[Tensor]) -> Tensor:
        """The node's output with other values of its sources."""
        known = {**{n: values[n] for n in node.all_input_nodes}, **dict(zip(sources, leaves, strict=True))}
        args, kwargs = fx.map_arg(node.args, known.__getitem__), fx.map_arg(node.kwargs, known.__getitem__)
        if node.op == "call_module":
            return self._modules[str(node.target)](*args, **kwargs)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        assert callable(node.target)
        return node.target(*args, **kwargs)

    def _refuse_in_place(self, nodes: Sequence[fx.Node]) -> None:
        """What works in place would change a value that was kept."""
        for node in nodes:
            name = getattr(node.target, "__name__", str(node.target))
            marked = node.op in ("call_function", "call_method") and name.endswith("_") and not name.startswith("_")
            if marked or node.kwargs.get("inplace"):
                raise self._refusal(node, ", in place")

    def _refusal(self, node: fx.Node, why: str = "") -> UserError:
        kind = self._kind(node)
        what = getattr(kind, "__name__", str(kind))
        where = str(node.target) if node.op == "call_module" else node.name
        return UserError(f"LRP has no rule for '{where}' ({what}{why}) of {self._name}.\n{_COVERED}")


def _pass_on(values: Values, relevance: Tensor) -> Shared:
    return Shared([relevance], torch.zeros_like(total(relevance)))


def _is_size(node: fx.Node) -> bool:
    if node.target is getattr:
        return node.args[1] in ("shape", "ndim", "dtype", "device")
    return node.op == "call_method" and node.target in ("size", "dim")


def _as_convolution(norm: nn.BatchNorm2d) -> nn.Conv2d:
    """x -> a x + b, channel by channel, in float64 until the end."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    scale = scale if norm.weight is None else scale * norm.weight.double()
    shift = -norm.running_mean.double() * scale
    shift = shift if norm.bias is None else shift + norm.bias.double()
    channels = norm.num_features
    convolution = nn.Conv2d(channels, channels, 1, groups=channels, device=norm.running_mean.device)
    convolution.weight = nn.Parameter(scale.to(norm.running_mean.dtype).view(-1, 1, 1, 1), requires_grad=False)
    convolution.bias = nn.Parameter(shift.to(norm.running_mean.dtype), requires_grad=False)
    return convolution
