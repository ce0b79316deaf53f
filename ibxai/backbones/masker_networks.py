"""The small networks of a Boolean masker, read from the notation in which its paper writes them.

    C(k,s,d) convolution   T(k,s,d) transposed convolution   Cs, Ts: the same with "same" padding, else "valid"
    Resize(n)   Pad(n)   Shape(hxw)   Avg   FC(d)   a -> b: first a, then b       (Zhmoginov et al., appendix C.1)

k is the kernel, s the stride, d the channels. Each layer with weights but a network's last is followed by a
nonlinearity. A text is one part or two, `[...] -> [...]`, the second with another nonlinearity (the masking network).

Reference: Zhmoginov, Fischer, Sandler, "Information-Bottleneck Approach to Salient Region Discovery", 2019.

What the appendix leaves out is settled here: `Resize` is bilinear, the slope of leaky ReLU is 0.2 and "same" padding is
laid out as TensorFlow does. Masking network and classifier have batch normalisation before each nonlinearity; networks
as thin as these hardly learn without it (MNIST anomalies, 3,000 steps of 64 whole pictures: 82 % right without, 91 %
with). Layers that the data decide are added and not in the text: Avg -> FC(classes) behind the classifier, FC(2 latent)
behind the encoder. A map that ends at another size than the picture's is resized to it, so one text serves pictures of
any size.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from ibxai.errors import UserError

_LAYER = re.compile(r"(Cs?|Ts?|FC|Resize|Pad|Shape|Avg)(?:\(([\dx, ]*)\))?")
_NUMBERS = {"C": 3, "Cs": 3, "T": 3, "Ts": 3, "FC": 1, "Resize": 1, "Pad": 1, "Shape": 2, "Avg": 0}
_WEIGHTED = ("C", "Cs", "T", "Ts", "FC")

_relu6: Callable[[], nn.Module] = nn.ReLU6
_leaky: Callable[[], nn.Module] = partial(nn.LeakyReLU, 0.2)


def masking_network(text: str, shape: Sequence[int]) -> nn.Module:
    """Pictures [B, *shape] -> logits of rho [B, 1, H, W]. Raises UserError, as the others, for a text that is wrong."""
    layers, found = _built("masker", text, shape, (_relu6, _leaky), normalised=True)
    return _planes("masker", layers, found, (1, *shape[1:]))


def classifier(text: str, shape: Sequence[int], classes: int) -> nn.Module:
    """Pictures [B, *shape] -> logits [B, classes]."""
    layers, found = _built("classifier", text, shape, (_relu6,), normalised=True)
    pooled = [nn.AdaptiveAvgPool2d(1), nn.Flatten()] if len(found) == 3 else []
    return nn.Sequential(*layers, *pooled, nn.Linear(found[0], classes))


def encoder(text: str, shape: Sequence[int], outputs: int) -> nn.Module:
    """Pictures [B, *shape] -> [B, outputs]."""
    layers, found = _built("encoder", text, shape, (_leaky,))
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(math.prod(found), outputs))


def decoder(text: str, inputs: int, shape: Sequence[int]) -> nn.Module:
    """Codes [B, inputs] -> planes [B, *shape]; planes that the text has beyond these are left out."""
    layers, found = _built("decoder", text, (inputs,), (_leaky,))
    return _planes("decoder", layers, found, shape)


class _Planes(nn.Module):
    """The first planes of a map, at a picture's size."""

    def __init__(self, shape: Sequence[int]) -> None:
        super().__init__()
        self.count, self.size = shape[0], tuple(shape[1:])

    def forward(self, x: Tensor) -> Tensor:
        planes = x[:, : self.count]
        return planes if planes.shape[2:] == self.size else _resized(planes, self.size)


class _Resize(nn.Module):
    def __init__(self, side: int) -> None:
        super().__init__()
        self.size = (side, side)

    def forward(self, x: Tensor) -> Tensor:
        return _resized(x, self.size)


def _resized(x: Tensor, size: Sequence[int]) -> Tensor:
    return nn.functional.interpolate(x, size=tuple(size), mode="bilinear", align_corners=False)


def _planes(name: str, layers: list[nn.Module], found: Sequence[int], shape: Sequence[int]) -> nn.Module:
    if len(found) != 3 or found[0] < shape[0]:
        raise UserError(f"method.networks.{name} ends in {list(found)}: a map of {shape[0]} planes is expected.")
    while layers and isinstance(layers[-1], nn.ReLU6 | nn.LeakyReLU | nn.BatchNorm2d):
        del layers[-1]
    return nn.Sequential(*layers, _Planes(shape))


def _built(
    name: str,
    text: str,
    shape: Sequence[int],
    nonlinearities: Sequence[Callable[[], nn.Module]],
    normalised: bool = False,
) -> tuple[list[nn.Module], tuple[int, ...]]:
    """The layers for items of this shape, each weighted one with its nonlinearity, and the shape behind the last."""
    parts = re.findall(r"\[([^]]*)]", text) or [text]
    if len(parts) > len(nonlinearities):
        raise UserError(f"method.networks.{name} has {len(parts)} parts: at most {len(nonlinearities)} are expected.")
    layers: list[nn.Module] = []
    example = torch.zeros(1, *shape)
    for part, nonlinearity in zip(parts, nonlinearities, strict=False):
        for written in part.split("->"):
            kind, numbers = _read(name, written.strip())
            try:
                added = _layer(kind, numbers, example.shape[1:])
                with torch.no_grad():
                    for layer in added:
                        example = layer(example)
            except (RuntimeError, IndexError) as error:
                before = list(example.shape[1:])
                raise UserError(f"method.networks.{name}: {written.strip()} cannot follow {before}.") from error
            layers += added
            if kind in _WEIGHTED:
                layers += [
                    *([nn.BatchNorm2d(example.shape[1])] if normalised and example.dim() == 4 else []),
                    nonlinearity(),
                ]
    return layers, tuple(example.shape[1:])


def _read(name: str, written: str) -> tuple[str, list[int]]:
    found = _LAYER.fullmatch(written)
    numbers = [int(n) for n in re.findall(r"\d+", found[2] or "")] if found else []
    if found is None or len(numbers) != _NUMBERS[found[1]] or (found[1] != "Pad" and 0 in numbers):
        raise UserError(
            f"method.networks.{name}: '{written}' is no layer.\n"
            "C(k,s,d), Cs, T, Ts, FC(d), Resize(n), Pad(n), Shape(hxw) and Avg are, joined by ->."
        )
    return found[1], numbers


def _layer(kind: str, numbers: Sequence[int], shape: Sequence[int]) -> list[nn.Module]:
    """The modules of one layer for items of this shape."""
    if kind in ("C", "Cs"):
        kernel, stride, channels = numbers
        padding = [nn.ZeroPad2d(_same(shape, kernel, stride))] if kind == "Cs" else []
        return [*padding, nn.Conv2d(shape[0], channels, kernel, stride)]
    if kind in ("T", "Ts"):
        kernel, stride, channels = numbers
        cut = math.ceil(max(kernel - stride, 0) / 2) if kind == "Ts" else 0
        more = 2 * cut - kernel + stride if kind == "Ts" else 0  # so that the output is `stride` times as large
        return [nn.ConvTranspose2d(shape[0], channels, kernel, stride, padding=cut, output_padding=more)]
    if kind == "FC":
        return [nn.Flatten(), nn.Linear(math.prod(shape), numbers[0])]
    if kind == "Shape":
        return [nn.Unflatten(1, (math.prod(shape) // math.prod(numbers), *numbers))]
    if kind == "Avg":
        return [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return [_Resize(numbers[0]) if kind == "Resize" else nn.ZeroPad2d(numbers[0])]


def _same(shape: Sequence[int], kernel: int, stride: int) -> tuple[int, int, int, int]:
    """(left, right, top, bottom): what TensorFlow pads, the odd pixel at the end."""
    height, width = (max((math.ceil(n / stride) - 1) * stride + kernel - n, 0) for n in shape[1:])
    return width // 2, width - width // 2, height // 2, height - height // 2
