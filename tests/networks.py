"""Small networks with known answers, and the batches they are shown; shared by the tests."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from ibxai.backbones import Backbone, freeze
from ibxai.targets import ClassTarget
from ibxai.types import Batch

DEVICE = os.environ.get("IBXAI_TEST_DEVICE", "cpu")  # scripts/gpu_check.py
ROLES = {"early": "stage1", "mid": "stage2", "late": "stage3", "bottleneck": "stage2", "gradcam": "stage3"}


@contextmanager
def fixed_seed(seed: int = 0) -> Iterator[None]:
    """Modules made inside draw their weights from this seed; the global state is as before afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def shake_norms(network: nn.Module, seed: int = 0) -> nn.Module:
    """Statistics and affine parameters of every batch norm as training leaves them: not the identity."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for part in network.modules():
            if isinstance(part, nn.BatchNorm2d):
                part.weight.uniform_(0.5, 1.5, generator=generator)
                part.bias.normal_(0, 0.2, generator=generator)
                if part.running_mean is not None and part.running_var is not None:
                    part.running_mean.normal_(0, 0.2, generator=generator)
                    part.running_var.uniform_(0.5, 1.5, generator=generator)
    return network


class Block(nn.Module):
    """A residual block as torchvision writes it: one in-place ReLU used twice, the sum in place."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += self.downsample(x)
        return self.relu(out)


class SmallNet(nn.Module):
    """A residual network for 32 x 32 pictures: stage1 [8, 32, 32], stage2 [12, 16, 16], stage3 [16, 8, 8]."""

    def __init__(self, classes: int = 5) -> None:
        super().__init__()
        self.stage1 = nn.Sequential(nn.Conv2d(3, 8, 3, 1, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        self.stage2 = Block(8, 12, 2)
        self.stage3 = Block(12, 16, 2)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(16, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.pool(self.stage3(self.stage2(self.stage1(x)))).flatten(1))


def small_net(seed: int = 0) -> nn.Module:
    with fixed_seed(seed):
        network = shake_norms(SmallNet(), seed)
    network.get_submodule("fc").weight.data.mul_(30)  # classes that differ clearly, and feel noise
    return network


def small_backbone(max_passes: int = 256, seed: int = 0) -> Backbone:
    return freeze(small_net(seed), (3, 32, 32), ROLES, name="small", max_passes=max_passes).to(DEVICE)


def noise_pictures(count: int, shape: Sequence[int] = (3, 32, 32), seed: int = 0) -> Tensor:
    """Pictures [count, *shape] with structure at several scales."""
    generator = torch.Generator().manual_seed(1000 + seed)
    channels, height, width = shape
    coarse = torch.randn(count, channels, math.ceil(height / 4), math.ceil(width / 4), generator=generator)
    fine = torch.randn(count, channels, height, width, generator=generator)
    return coarse.repeat_interleave(4, 2).repeat_interleave(4, 3)[..., :height, :width] + 0.3 * fine


def batch_of(inputs: Tensor, classes: Sequence[int], ids: Sequence[str] | None = None) -> Batch:
    names = tuple(ids or (f"sample{i}" for i in range(len(inputs))))
    return Batch(inputs, ClassTarget(torch.tensor(classes)), names, names).to(DEVICE)


class Patches(nn.Module):
    """Classes 0, 1, 2 are shown by a bright patch in colour 0, 1, 2, wherever it is; nothing else counts.

    `cells` is the mean brightness of each colour in cells of 4 x 4 pixels, [3, h/4, w/4]; the logit of class c is
    `strength` times the sum over the cells of what exceeds one half. No evidence: all classes alike.
    """

    def __init__(self, strength: float = 12.0) -> None:
        super().__init__()
        self.cells = nn.Conv2d(3, 3, 4, 4, groups=3)
        self.excess = nn.Conv2d(3, 3, 1, groups=3)
        self.relu = nn.ReLU()
        with torch.no_grad():
            self.cells.weight.fill_(1 / 16)
            self.cells.bias.zero_()
            self.excess.weight.fill_(1.0)
            self.excess.bias.fill_(-0.5)
        self.strength = strength

    def forward(self, x: Tensor) -> Tensor:
        return self.strength * self.relu(self.excess(self.cells(x))).sum((2, 3))


def patch_pictures(patches: Sequence[Sequence[tuple[int, int, int]]], size: int = 32) -> Tensor:
    """Dark pictures [B, 3, size, size] with bright 4 x 4 patches: (colour, cell row, cell column) a patch."""
    pictures = torch.zeros(len(patches), 3, size, size)
    for picture, of_one in zip(pictures, patches, strict=True):
        for colour, row, column in of_one:
            picture[colour, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] = 1
    return pictures


def patch_reference(count: int, size: int = 32) -> Batch:
    """A reference split for `Patches`: one patch a picture, at every place and colour in turn, on faint noise."""
    cells = size // 4
    places = [[(i % 3, (i // 3) % cells, (i // 3 // cells + 3 * i) % cells)] for i in range(count)]
    faint = 0.02 * noise_pictures(count, (3, size, size), seed=7)
    return batch_of(patch_pictures(places, size) + faint, [i % 3 for i in range(count)])


def patches_backbone(max_passes: int = 256) -> Backbone:
    return freeze(
        Patches(), (3, 32, 32), {"bottleneck": "cells", "gradcam": "cells"}, name="patches", max_passes=max_passes
    )


def bilinear(cells: np.ndarray, height: int, width: int) -> np.ndarray:
    """[h, w] -> [height, width], pixel centres aligned, borders held: one pixel at a time."""
    rows, columns = cells.shape
    out = np.zeros((height, width))
    for i in range(height):
        y = min(max((i + 0.5) * rows / height - 0.5, 0), rows - 1)
        top, below = int(y), min(int(y) + 1, rows - 1)
        for j in range(width):
            x = min(max((j + 0.5) * columns / width - 0.5, 0), columns - 1)
            left, right = int(x), min(int(x) + 1, columns - 1)
            upper = cells[top, left] * (1 - (x - left)) + cells[top, right] * (x - left)
            lower = cells[below, left] * (1 - (x - left)) + cells[below, right] * (x - left)
            out[i, j] = upper * (1 - (y - top)) + lower * (y - top)
    return out


def relative(found: Tensor, wanted: Tensor) -> float:
    """The largest difference, relative to the largest wanted value."""
    found, wanted = found.detach().double(), wanted.detach().double()
    return float((found - wanted).abs().max() / wanted.abs().max().clamp_min(1e-30))


def record(network: nn.Module, names: Sequence[str], inputs: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """(outputs of these modules, output of the network) by hooks that copy at once, before anything works in place."""
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: object, output: Tensor) -> None:
            seen[name] = output.detach().clone()

        return hook

    handles = [network.get_submodule(name).register_forward_hook(keep(name)) for name in names]
    with torch.no_grad():
        out = network(inputs)
    for handle in handles:
        handle.remove()
    return seen, out


def replacing(network: nn.Module, name: str, values: Tensor, inputs: Tensor) -> Tensor:
    """The network's output when this module is made to return `values`."""
    handle = network.get_submodule(name).register_forward_hook(lambda *_: values.clone())
    try:
        return network(inputs)
    finally:
        handle.remove()
