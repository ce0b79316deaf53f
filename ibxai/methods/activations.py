"""Exchanging the activations of a network's copy, for methods that change what goes back through them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from torch import nn
from torch.nn.modules import batchnorm, conv, dropout, pooling

Kind = TypeVar("Kind", bound=nn.Module)

_AFFINE = (
    *(conv._ConvNd, nn.Linear, batchnorm._BatchNorm, nn.Identity, nn.Flatten, dropout._DropoutNd),
    *(pooling._AvgPoolNd, pooling._AdaptiveAvgPoolNd),
)


def exchange(network: nn.Module, kinds: tuple[type[nn.Module], ...], rule: Callable[[nn.Module], Kind]) -> list[Kind]:
    """Put rule(part) in the place of every part of these kinds; the new parts, in the network's order."""
    new = []
    for path, part in list(network.named_modules()):
        if isinstance(part, kinds):
            parent, _, name = path.rpartition(".")
            new.append(rule(part))
            setattr(network.get_submodule(parent), name, new[-1])
    return new


def other_kinds(network: nn.Module, known: tuple[type[nn.Module], ...]) -> list[type[nn.Module]]:
    """The kinds of layers without parts of their own that are neither affine nor of these, by name."""
    leaves = (part for part in network.modules() if not any(True for _ in part.children()))
    kinds = {type(part) for part in leaves if not isinstance(part, _AFFINE + known)}
    return sorted(kinds, key=lambda kind: kind.__name__)
