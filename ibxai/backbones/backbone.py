"""A frozen network with named layers, cut where a method asks.

    backbone = freeze(network, input_shape=(3, 224, 224), layers={"bottleneck": "layer3"})
    head, tail = backbone.split("bottleneck")
    tail(head(x)) == backbone(x)

`tail` alone is what a bottleneck optimises on. Freezing copies the network: the caller's stays as it was. Nothing is
left behind by a pass: no hook, no gradient, no mode.
"""

from __future__ import annotations

import copy
import hashlib
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ibxai.backbones.tracing import Trace, Untraceable
from ibxai.errors import UserError, nearest
from ibxai.preprocessing import Preprocessing
from ibxai.types import Batch

log = logging.getLogger(__name__)

_ROWS = 4
_EXAMPLES = 3  # rows of the pictures that a network is traced with


@dataclass(frozen=True)
class Features:
    """A layer's output [B, ...], and what reaches the network's output past the layer (`bypass`, [B, ...] each)."""

    values: Tensor
    bypass: tuple[Tensor, ...] = ()

    def replaced(self, values: Tensor, rows: Tensor) -> Features:
        """The same pictures with other values at the layer: row i of `values` belongs to picture rows[i]."""
        return Features(values, tuple(tensor[rows] for tensor in self.bypass))


class Split(NamedTuple):
    """The two parts of a network: head(x) or, of texts, head(x, valid) -> Features, tail(Features or its values) ->
    output [B, K].
    """

    head: Callable[..., Features]
    tail: Callable[[Features | Tensor], Tensor]


class Backbone:
    """A frozen network. Build one with `freeze`, or by name with `backbone=` on the command line.

    layers: the sizes of every named layer's output for one picture, without the batch.
    roles: the layers that methods ask for by role ("gradcam", "bottleneck", "early", "mid", "late").
    digest: hash of the weights. random_weights: True when nothing was trained.
    max_passes: the most network rows run at once; methods and metrics cut their work to it.
    class_names: what the network itself calls its outputs, None where it does not say.
    rows_that_fit: (who works, values of an input) -> the smaller number that memory has left them (`memory.py`).

    A network of texts takes embeddings [B, T, D] and, beside them, `valid` bool [B, T], which the network itself finds
    as a last channel, 1 at tokens and 0 in the padding.
    """

    def __init__(
        self,
        network: nn.Module,
        preprocessing: Preprocessing,
        roles: Mapping[str, str],
        name: str,
        random_weights: bool,
        max_passes: int,
        example: Tensor | None = None,
    ) -> None:
        """example: inputs to trace the network with; random pictures when None."""
        self.name, self.roles, self.preprocessing = name, dict(roles), preprocessing
        self.random_weights, self.max_passes = random_weights, max_passes
        self.class_names: Sequence[str] | None = None
        self.rows_that_fit: dict[tuple[str, int], int] = {}
        self.digest = weights_digest(network)
        if example is None:
            shape = (_EXAMPLES, *preprocessing.input_shape)
            example = torch.zeros(shape).uniform_(-1, 1, generator=torch.Generator().manual_seed(0))
        self._plain = _frozen(network)  # for layers that the graph cannot be cut at
        expected = self._checked_output(example)
        self.outputs = expected.shape[1]
        self._trace: Trace | None
        try:
            self._trace = Trace(self._plain, example, expected)
            self._network: nn.Module = self._trace.module.eval()
            self.layers = self._trace.shapes
        except Untraceable as reason:
            log.warning("%s cannot be cut at a layer (%s): every pass runs the whole network", name, reason)
            self._trace, self._network = None, self._plain
            self.layers = _layer_shapes(self._plain, example)
        for part in self._network.modules():
            if isinstance(part, nn.Conv2d):
                part.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._counter: Counter[str] | None = None
        self._cuts: dict[str, tuple[nn.Module, nn.Module]] = {}
        self._extractors: dict[tuple[str, ...], nn.Module] = {}
        for role, layer in self.roles.items():
            if layer not in self.layers:
                raise UserError(f"The layer of role '{role}': {self._unknown_layer(layer)}")

    def to(self, device: torch.device | str) -> Backbone:
        """Move the weights; the cuts share them."""
        self._network.to(device)
        self._cuts.clear()
        self._extractors.clear()
        return self

    @property
    def device(self) -> torch.device:
        return next(self._network.parameters()).device

    def _checked_output(self, example: Tensor) -> Tensor:
        """What the network says of the example, [B, K]."""
        with torch.no_grad():
            out = self._plain(example)
        if not isinstance(out, Tensor) or out.dim() != 2 or len(out) != len(example):
            found = list(out.shape) if isinstance(out, Tensor) else f"a {type(out).__name__}"
            raise UserError(
                f"{self.name} returns {found} for pictures {list(example.shape)}: wrap it to return one tensor [B, K]."
            )
        return out

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Of one picture, (C, H, W)."""
        return self.preprocessing.input_shape

    def embed(self, batch: Batch) -> Batch:
        """What the network takes in the place of what was loaded; pictures are it already."""
        return batch

    @property
    def modality(self) -> str:
        """What the network reads: "picture" or "text"."""
        return self.preprocessing.modality

    def __call__(self, inputs: Tensor, valid: Tensor | None = None) -> Tensor:
        """Logits or values [B, K] of inputs [B, C, H, W], or of texts [B, T, D] with their `valid` [B, T]."""
        self._count("forward", inputs)
        return self._in_pieces(lambda rows: (self._network(rows),), _with_valid(inputs, valid))[0]

    def layer(self, name: str) -> str:
        """The layer a role or a name stands for. Raises UserError with the nearest names."""
        found = self.roles.get(name, name)
        if found not in self.layers:
            raise UserError(self._unknown_layer(name))
        return found

    def split(self, layer: str) -> Split:
        """Cut behind a layer (name or role). Of a network that cannot be traced, tail runs all of it, with a hook."""
        layer = self.layer(layer)
        if self._trace is not None and layer not in self._cuts:
            try:
                self._cuts[layer] = self._trace.cut(layer)
            except Untraceable as reason:
                log.warning("%s cannot be cut behind %s (%s): passes run the whole network", self.name, layer, reason)
        if layer not in self._cuts:
            return self._hooked_split(layer)
        head, tail = self._cuts[layer]

        def run_head(inputs: Tensor, valid: Tensor | None = None) -> Features:
            self._count("head forward", inputs)
            values, *bypass = self._in_pieces(head, _with_valid(inputs, valid))
            return Features(values, tuple(bypass))

        def run_tail(features: Features | Tensor) -> Tensor:
            features = features if isinstance(features, Features) else Features(features)
            self._count("tail forward", features.values)
            padded = _whole_rows(features.values)
            return tail(padded, *(_whole_rows(tensor) for tensor in features.bypass))[: len(features.values)]

        return Split(run_head, run_tail)

    def module(self) -> nn.Module:
        """A copy of the network in canonical form, for a method that hooks or exchanges its modules.

        pictures [B, C, H, W] -> outputs [B, K]: a torch.fx.GraphModule on the backbone's device, frozen, in which batch
        norms are folded and every activation is a module of its own, called once and never in place. The copy is the
        caller's; its passes are counted with the backbone's. Raises UserError when the network cannot be traced, since
        what is no module of its own cannot be hooked.
        """
        if self._trace is None:
            raise UserError(
                f"{self.name} cannot be traced with torch.fx, so its activations cannot be told apart.\n"
                "Choose a method that needs no access to them, such as gradient or integrated_gradients."
            )
        network = copy.deepcopy(self._network)
        network.register_forward_hook(lambda _, inputs, __: self._count("forward", inputs[0]))
        return network

    def features(self, inputs: Tensor, layers: Sequence[str], valid: Tensor | None = None) -> dict[str, Tensor]:
        """The outputs of several layers (names or roles) in one forward, nothing behind the last of them."""
        names, inputs = [self.layer(name) for name in layers], _with_valid(inputs, valid)
        if self._trace is not None:
            self._count("head forward", inputs)
            if (key := tuple(names)) not in self._extractors:
                self._extractors[key] = self._trace.extractor(names)
            return dict(zip(layers, self._in_pieces(self._extractors[key], inputs), strict=True))
        return self._hooked_features(inputs, layers, names)

    def _hooked_features(self, inputs: Tensor, layers: Sequence[str], names: Sequence[str]) -> dict[str, Tensor]:
        self._count("forward", inputs)
        seen: dict[str, Tensor] = {}
        network = self._plain.to(inputs.device)
        with _hooks(network, {name: _keep(seen, name) for name in names}):
            network(inputs)
        return {layer: seen[name] for layer, name in zip(layers, names, strict=True)}

    @contextmanager
    def counting(self) -> Iterator[Counter[str]]:
        """Counts picture passes while open: "forward", "head forward", "tail forward", "tail backward" ..."""
        before, self._counter = self._counter, Counter()
        try:
            yield self._counter
        finally:
            if before is not None:
                before.update(self._counter)
            self._counter = before

    def _in_pieces(self, run: Callable[[Tensor], Sequence[Tensor]], inputs: Tensor) -> list[Tensor]:
        """The outputs of run, [B, ...] each, with at most max_passes rows at once and whole tiles of rows."""
        pieces = []
        for rows in inputs.split(self.max_passes):
            pieces.append([tensor[: len(rows)] for tensor in run(_whole_rows(_channels_last(rows)))])
        return [parts[0] if len(parts) == 1 else torch.cat(parts) for parts in zip(*pieces, strict=True)]

    def _count(self, part: str, rows: Tensor) -> None:
        if self._counter is not None:
            self._counter[part] += len(rows)
            if torch.is_grad_enabled() and rows.requires_grad:
                self._counter[part.replace("forward", "backward")] += len(rows)

    def _hooked_split(self, layer: str) -> Split:
        def head(inputs: Tensor, valid: Tensor | None = None) -> Features:
            inputs = _with_valid(inputs, valid)
            return Features(self._hooked_features(inputs, [layer], [layer])[layer], (inputs,))

        def tail(features: Features | Tensor) -> Tensor:
            if not isinstance(features, Features):
                raise TypeError("this network cannot be cut: give tail the Features that head returned")
            self._count("tail forward", features.values)
            network = self._plain.to(features.values.device)
            with _hooks(network, {layer: lambda *_: features.values}):
                return network(features.bypass[0])

        return Split(head, tail)

    def _unknown_layer(self, name: str) -> str:
        folded = self._trace.folded if self._trace is not None else {}
        if name in folded:
            return f"{self.name}: '{name}' is folded into the batch norm that follows it; take '{folded[name]}'."
        near = nearest(name, [*self.layers, *self.roles], most=5)
        if not near.startswith("Did you mean"):
            outer = [layer for layer in self.layers if layer.count(".") <= 1]
            near = f"Roles: {', '.join(self.roles) or 'none'}. Layers: {', '.join(outer[:10])} ..."
        return f"{self.name} has no layer '{name}'. {near}"


def freeze(
    network: nn.Module,
    input_shape: tuple[int, int, int] = (3, 224, 224),
    layers: Mapping[str, str] | None = None,
    preprocessing: Preprocessing | None = None,
    name: str = "network",
    random_weights: bool = False,
    max_passes: int = 256,
) -> Backbone:
    """A backbone from any module that maps pictures [B, C, H, W] to outputs [B, K].

    network: copied, put in eval mode, frozen; the original is left as it is.
    input_shape: (C, H, W) of its inputs; left out of account when `preprocessing` is given.
    layers: role -> layer name, for methods that ask by role. Raises UserError when a layer does not exist or a
    weight is not finite.
    """
    for path, module in network.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is None:
            raise UserError(
                f"{name}: {path} keeps no running statistics, so pictures of a batch would feel each other."
            )
    if preprocessing is None and input_shape[1] != input_shape[2]:
        raise UserError(f"input_shape is {input_shape}: pictures have to be square.")
    check_finite(network, name)
    if preprocessing is None:
        channels, height, _ = input_shape
        preprocessing = Preprocessing(resize=height, crop=height, mean=(0.0,) * channels, std=(1.0,) * channels)
    return Backbone(network, preprocessing, layers or {}, name, random_weights, max_passes)


def check_finite(network: nn.Module, name: str) -> None:
    """Raises UserError for a weight that is NaN or infinite."""
    for path, tensor in network.state_dict().items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise UserError(f"The weights of {name} are not finite: {path} holds NaN or infinity.")


def _frozen(network: nn.Module) -> nn.Module:
    """A copy in eval mode, without gradients, and with no activation that writes on its input."""
    network = copy.deepcopy(network).float().cpu().eval().requires_grad_(False)
    for part in network.modules():
        if hasattr(part, "inplace"):
            setattr(part, "inplace", False)  # noqa: B010  # most modules have no such attribute
    return network


def _with_valid(inputs: Tensor, valid: Tensor | None) -> Tensor:
    """Inputs [B, T, D] of texts with their last channel, [B, T, D + 1]; pictures as they are."""
    return inputs if valid is None else torch.cat([inputs, valid.unsqueeze(2).to(inputs)], 2)


def _channels_last(inputs: Tensor) -> Tensor:
    return inputs.contiguous(memory_format=torch.channels_last) if inputs.dim() == 4 else inputs


def _whole_rows(values: Tensor) -> Tensor:
    """Rows padded to a multiple of `_ROWS` by repeating the last one.

    Matrix products treat the rows left over from their tile with another kernel, whose rounding an optimised mask
    amplifies a thousand times; with whole tiles a picture's result does not depend on how many it runs with.
    """
    missing = -len(values) % _ROWS
    return torch.cat([values, values[-1:].expand(missing, *values.shape[1:])]) if missing else values


def weights_digest(network: nn.Module) -> str:
    hasher = hashlib.sha256(type(network).__qualname__.encode())
    for path, tensor in network.state_dict().items():
        hasher.update(f"{path} {tensor.dtype} {tuple(tensor.shape)}".encode())
        hasher.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return hasher.hexdigest()[:16]


def _layer_shapes(network: nn.Module, example: Tensor) -> dict[str, tuple[int, ...]]:
    seen: dict[str, Tensor] = {}
    names = [name for name, _ in network.named_modules() if name]
    with torch.no_grad(), _hooks(network, {name: _keep(seen, name) for name in names}):
        network(example)
    return {name: tuple(seen[name].shape[1:]) for name in names if name in seen}


def _keep(seen: dict[str, Tensor], name: str) -> Callable[..., None]:
    def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: object) -> None:
        if isinstance(output, Tensor):
            seen[name] = output

    return hook


@contextmanager
def _hooks(network: nn.Module, hooks: Mapping[str, Callable[..., Tensor | None]]) -> Iterator[None]:
    """Forward hooks by module name, gone when the block is left, however it is left."""
    modules = dict(network.named_modules())
    handles = [modules[name].register_forward_hook(hook) for name, hook in hooks.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
