"""The 1,000 classes of ILSVRC 2012: WordNet ids and short names, from the libraries that ship them.

The index of a class is the place of its WordNet id in sorted order, as in torchvision, timm and Keras. (The
development kit of ILSVRC counts 1 to 1,000 in an order of its own.)
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from types import MappingProxyType

from timm.data import ImageNetInfo
from torchvision.models import ResNet50_Weights


@cache
def wnids() -> tuple[str, ...]:
    """The 1,000 WordNet ids ("n01440764" ...), class 0 first."""
    return tuple(ImageNetInfo("imagenet-1k").label_names())


@cache
def class_index() -> Mapping[str, int]:
    """WordNet id to class index."""
    return MappingProxyType({wnid: index for index, wnid in enumerate(wnids())})


@cache
def class_names() -> tuple[str, ...]:
    """One short English name a class, all different, class 0 first."""
    return tuple(ResNet50_Weights.IMAGENET1K_V1.meta["categories"])
