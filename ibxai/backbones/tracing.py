"""A network as a graph in canonical form: cut anywhere, batch norm folded, no activation shared or in place.

A bottleneck optimises on the part of the network behind its layer alone, so a network is traced once with torch.fx
and cut at the layer. The trace is put in a canonical form that every method can rely on: each batch norm is folded
into the convolution it directly follows (the same function, fewer kernels), each activation is a module of its own
and never works in place (a reused or in-place ReLU breaks DeepLIFT, guided backpropagation, LRP
and any mask on the tensor it overwrites).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_weights

_ACTIVATIONS = (
    nn.ReLU,
    nn.ReLU6,
    nn.SiLU,
    nn.GELU,
    nn.Hardswish,
    nn.Hardsigmoid,
    nn.ELU,
    nn.LeakyReLU,
    nn.Sigmoid,
)
_FUNCTIONAL: dict[object, type[nn.Module]] = {
    F.relu: nn.ReLU,
    torch.relu: nn.ReLU,
    torch.relu_: nn.ReLU,
    F.relu6: nn.ReLU6,
    "relu": nn.ReLU,
}
_FUNCTIONAL |= {"relu_": nn.ReLU, F.silu: nn.SiLU, F.gelu: nn.GELU}


class Untraceable(Exception):
    """torch.fx cannot express this network, or not faithfully; the reason is the message."""


class _NamingTracer(fx.Tracer):
    """Keeps, for every module that was called, the node of its output. A module without children is a leaf."""

    def __init__(self) -> None:
        super().__init__()
        self.outputs: dict[str, fx.Node] = {}

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        # batch norm with a built-in activation (timm) has children, and must stay in one piece to be folded
        return isinstance(m, nn.BatchNorm2d) or not any(True for _ in m.children())

    def call_module(self, m, forward, args, kwargs):  # type: ignore[no-untyped-def]  # torch.fx's own signature
        out = super().call_module(m, forward, args, kwargs)
        if isinstance(out, fx.Proxy):
            self.outputs[self.path_of_module(m)] = out.node
        return out


class Trace:
    """A canonical graph of a frozen network, and the node behind each layer's name.

    module: the network as a GraphModule. shapes: layer name -> shape of its output for one picture, batch left out.
    folded: convolution -> the batch norm that is folded into it; the convolution alone is no layer any more.
    """

    def __init__(self, network: nn.Module, example: Tensor, expected: Tensor) -> None:
        """network: in eval mode, frozen; it is copied. expected: its output for example. Raises Untraceable."""
        network = copy.deepcopy(network)
        tracer = _NamingTracer()
        try:
            graph = tracer.trace(network)
            self.module = fx.GraphModule(network, graph)
            with torch.no_grad():
                _settle_defaults(graph)
                _separate_activations(self.module)
                folded = _fold_batch_norms(self.module)
                self.module.recompile()
                ShapeProp(self.module).propagate(example)
                worst = (self.module(example) - expected).abs().max()
        except Untraceable:
            raise
        except Exception as error:  # torch.fx raises whatever the network's own code raises on proxies
            raise Untraceable(f"{type(error).__name__}: {error}".splitlines()[0]) from error
        if not worst <= 1e-4 * expected.abs().max():
            raise Untraceable(f"the traced network's output differs by {worst:.2g}")
        # a container that ends in a folded convolution has lost its own output too
        gone = {tracer.outputs[path]: norm for path, norm in folded.items()}
        self.folded = {path: gone[node] for path, node in tracer.outputs.items() if node in gone}
        self.nodes = {
            path: node
            for path, node in tracer.outputs.items()
            if path and node not in gone and _is_tensor(node) and _rows(node) == len(example)
        }
        self.shapes = {path: tuple(node.meta["tensor_meta"].shape[1:]) for path, node in self.nodes.items()}

    def cut(self, layer: str) -> tuple[fx.GraphModule, fx.GraphModule]:
        """(head, tail): head(x) -> [features, *bypass], tail(features, *bypass) -> output.

        bypass are the tensors that reach the output past the layer, when it lies inside a residual block.
        Raises Untraceable when something other than a tensor would have to pass, as its size would be the head's.
        """
        node, output = self.nodes[layer], _output_of(self.module.graph)
        behind = _descendants(node)
        if output not in behind and output is not node:
            raise Untraceable(f"the output does not depend on {layer}")
        bypass = [
            n
            for n in self.module.graph.nodes
            if n not in behind and n is not node and _depends_on_input(n) and any(u in behind for u in n.users)
        ]
        if not all(_is_tensor(n) for n in bypass):
            raise Untraceable(f"a size computed before {layer} is used behind it")
        source = next(n for n in self.module.graph.nodes if n.op == "placeholder")
        head = _subgraph(self.module, [source], [node, *bypass], as_tuple=True)
        tail = _subgraph(self.module, [node, *bypass], [output], as_tuple=False)
        return head, tail

    def extractor(self, layers: Sequence[str]) -> fx.GraphModule:
        """x -> a tuple of the layers' outputs; nothing behind the last of them is computed."""
        source = next(n for n in self.module.graph.nodes if n.op == "placeholder")
        return _subgraph(self.module, [source], [self.nodes[name] for name in layers], as_tuple=True)


def _is_tensor(node: fx.Node) -> bool:
    return hasattr(node.meta.get("tensor_meta"), "shape")


def _rows(node: fx.Node) -> int:
    """Windowed attention folds places into the batch: such a layer has no row of its own for a picture."""
    shape = node.meta["tensor_meta"].shape
    return shape[0] if len(shape) > 1 else 0


def _output_of(graph: fx.Graph) -> fx.Node:
    (result,) = next(n for n in graph.nodes if n.op == "output").args
    if not isinstance(result, fx.Node):
        raise Untraceable("the network returns several outputs; wrap it to return one tensor [B, K]")
    return result


def _descendants(node: fx.Node) -> set[fx.Node]:
    found: set[fx.Node] = set()
    waiting = [node]
    while waiting:
        for user in waiting.pop().users:
            if user not in found:
                found.add(user)
                waiting.append(user)
    return found


def _depends_on_input(node: fx.Node) -> bool:
    waiting, seen = [node], {node}
    while waiting:
        current = waiting.pop()
        if current.op == "placeholder":
            return True
        new = [n for n in current.all_input_nodes if n not in seen]
        seen.update(new)
        waiting.extend(new)
    return False


def _subgraph(
    module: fx.GraphModule, inputs: Sequence[fx.Node], outputs: Sequence[fx.Node], as_tuple: bool
) -> fx.GraphModule:
    graph = fx.Graph()
    copied: dict[fx.Node, fx.Node] = {node: graph.placeholder(node.name) for node in inputs}
    needed, waiting = set(outputs), list(outputs)
    while waiting:
        current = waiting.pop()
        if current not in copied:
            new = [n for n in current.all_input_nodes if n not in needed]
            needed.update(new)
            waiting.extend(new)
    for node in module.graph.nodes:  # in the order of execution
        if node in needed and node not in copied:
            copied[node] = graph.node_copy(node, lambda n: copied[n])
    result = tuple(copied[n] for n in outputs)
    graph.output(result if as_tuple else result[0])
    return fx.GraphModule(module, graph)


def _settle_defaults(graph: fx.Graph) -> None:
    """Optional arguments of `forward` become their default values: a backbone has one input."""
    for extra in [n for n in graph.nodes if n.op == "placeholder"][1:]:
        if not extra.args:
            raise Untraceable(f"its forward needs a second argument, {extra.target}")
        default = extra.args[0]
        for user in list(extra.users):
            settle = lambda n, extra=extra, default=default: default if n is extra else n  # noqa: E731
            user.args, user.kwargs = fx.map_arg(user.args, settle), fx.map_arg(user.kwargs, settle)
        graph.erase_node(extra)


def _separate_activations(module: fx.GraphModule) -> None:
    modules = dict(module.named_modules())
    seen: set[str] = set()
    for node in list(module.graph.nodes):
        if node.op == "call_module":
            target = str(node.target)
            if isinstance(modules[target], _ACTIVATIONS) and target in seen:
                node.target = _free_name(module, target)
                _set_submodule(module, str(node.target), copy.deepcopy(modules[target]))
            seen.add(target)
        elif node.op in ("call_function", "call_method") and node.target in _FUNCTIONAL:
            _replace_functional(module, node)


def _replace_functional(module: fx.GraphModule, node: fx.Node) -> None:
    """F.relu(x, inplace=True) and its kin become a module; the node stays, so layer names keep pointing at it."""
    kind = _FUNCTIONAL[node.target]
    options: dict[str, Any] = {k: v for k, v in node.kwargs.items() if k == "approximate"}
    name = _free_name(module, f"{kind.__name__.lower()}")
    module.add_submodule(name, kind(**options))
    first = node.args[0] if node.args else node.kwargs["input"]
    node.op, node.target, node.args, node.kwargs = "call_module", name, (first,), {}


def _fold_batch_norms(module: fx.GraphModule) -> dict[str, str]:
    folded: dict[str, str] = {}
    modules = dict(module.named_modules())
    calls: dict[str, int] = {}
    for node in module.graph.nodes:
        if node.op == "call_module":
            calls[str(node.target)] = calls.get(str(node.target), 0) + 1
    for node in module.graph.nodes:
        if node.op != "call_module" or not isinstance(norm := modules[str(node.target)], nn.BatchNorm2d):
            continue
        (before,) = node.all_input_nodes
        if before.op != "call_module" or not isinstance(conv := modules[str(before.target)], nn.Conv2d):
            continue
        reused = calls[str(before.target)] > 1 or calls[str(node.target)] > 1
        if reused or len(before.users) > 1 or norm.running_mean is None:
            continue
        _fold(conv, norm)
        _set_submodule(module, str(node.target), _activation_of(norm))
        folded[str(before.target)] = str(node.target)
    return folded


def _fold(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> None:
    assert norm.running_mean is not None
    assert norm.running_var is not None
    weight, bias = fuse_conv_bn_weights(
        conv.weight.double(),
        None if conv.bias is None else conv.bias.double(),
        norm.running_mean.double(),
        norm.running_var.double(),
        norm.eps,
        None if norm.weight is None else norm.weight.double(),
        None if norm.bias is None else norm.bias.double(),
    )
    conv.weight = nn.Parameter(weight.to(conv.weight.dtype), requires_grad=False)
    conv.bias = nn.Parameter(bias.to(conv.weight.dtype), requires_grad=False)


def _activation_of(norm: nn.BatchNorm2d) -> nn.Module:
    """What is left of a batch norm when its affine part is folded: timm's carry an activation of their own."""
    activation = getattr(norm, "act", None)
    return activation if isinstance(activation, nn.Module) else nn.Identity()


def _set_submodule(module: nn.Module, path: str, new: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(module.get_submodule(parent), name, new)


def _free_name(module: nn.Module, path: str) -> str:
    taken = dict(module.named_modules())
    count = 1
    while f"{path}_{count}" in taken:
        count += 1
    return f"{path}_{count}"
