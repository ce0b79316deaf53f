"""Grad-CAM: closed forms, captum as an outsider's opinion, and patches at known places."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torchvision
from networks import (
    batch_of,
    bilinear,
    fixed_seed,
    noise_pictures,
    patch_pictures,
    patches_backbone,
    relative,
    shake_norms,
    small_backbone,
)
from torch import Tensor, nn
from torch.nn import functional as F

from ibxai.backbones import freeze
from ibxai.errors import UserError
from ibxai.methods import GradCAM


class Cam(nn.Module):
    """A network that CAM was made for: convolution, global average pooling, linear."""

    def __init__(self, stride: int = 4) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 5, stride, 2)
        self.relu = nn.ReLU()
        self.fc = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.relu(self.conv(x)).mean((2, 3)))


def plain_cam(network: Cam, picture: Tensor, target: int, relu: bool) -> np.ndarray:
    """sum_k w_k A^k / (h w) in float64, cell by cell, then made as large as the picture."""
    with torch.no_grad():
        maps = F.relu(F.conv2d(picture[None].double(), network.conv.weight.double(), network.conv.bias.double(), 4, 2))[
            0
        ].numpy()
    weights = network.fc.weight.detach().double().numpy()[target]
    channels, height, width = maps.shape
    cam = np.zeros((height, width))
    for i in range(height):
        for j in range(width):
            cam[i, j] = sum(weights[k] * maps[k, i, j] for k in range(channels)) / (height * width)
            if relu:
                cam[i, j] = max(cam[i, j], 0)
    return bilinear(cam, *picture.shape[1:])


@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("size", [(20, 20)])
def test_it_is_cam_where_cam_is_defined(relu: bool, size: tuple[int, int]) -> None:
    with fixed_seed(3):
        network = Cam()
    backbone = freeze(network, (3, *size), {"gradcam": "relu"})
    pictures = noise_pictures(5, (3, *size))
    classes = [0, 1, 2, 3, 1]
    found = GradCAM(relu=relu).fit(backbone, [], 0)(batch_of(pictures, classes))
    wanted = np.stack([plain_cam(network, p, c, relu) for p, c in zip(pictures, classes, strict=True)])
    assert (wanted.min() < -1e-3) != relu
    assert (wanted == 0).any() == relu
    assert relative(found.heatmap, torch.from_numpy(wanted)) < 1e-5
    with torch.no_grad():
        logits = network(pictures)[range(5), classes]
    torch.testing.assert_close(found.diagnostics["score"], logits, rtol=1e-5, atol=1e-6)
    assert found.unit == "score"


def test_a_picture_that_is_not_square() -> None:
    with fixed_seed(3):
        network = Cam()
    picture = noise_pictures(1, (3, 12, 28))
    found = GradCAM("relu").fit(freeze(network, (3, 12, 12)), [], 0)(batch_of(picture, [2]))
    assert relative(found.heatmap[0], torch.from_numpy(plain_cam(network, picture[0], 2, True))) < 1e-5


@pytest.mark.parametrize("layer", ["layer4", "layer3", "layer2.0.bn2"])
@pytest.mark.parametrize("relu", [True, False])
def test_against_captum(layer: str, relu: bool) -> None:
    captum = pytest.importorskip("captum.attr")
    with fixed_seed(3):
        network = shake_norms(torchvision.models.resnet18(num_classes=10)).eval()
    for part in network.modules():  # captum's hooks fail on a layer that is then changed in place
        if isinstance(part, nn.ReLU):
            part.inplace = False
    pictures, classes = noise_pictures(3, (3, 64, 64)), torch.tensor([1, 7, 4])
    cam = captum.LayerGradCam(network, network.get_submodule(layer))
    wanted = cam.attribute(pictures, target=classes, relu_attributions=relu).detach()
    wanted = captum.LayerAttribution.interpolate(wanted, (64, 64), "bilinear")[:, 0]
    found = GradCAM(layer, relu).fit(freeze(network, (3, 64, 64)), [], 0)(batch_of(pictures, classes.tolist()))
    assert wanted.abs().max() > 0
    assert relative(found.heatmap, wanted) < 1e-4


def test_patches_at_known_places_and_the_class_matters() -> None:
    """Red and green patches in one picture: each class sees its own."""
    places = [((0, 1, 2), (1, 6, 5)), ((0, 7, 0), (1, 3, 3)), ((0, 4, 4), (1, 0, 7))]
    pictures = patch_pictures(places)
    attribute = GradCAM().fit(patches_backbone(), [], 0)
    for colour in (0, 1):
        found = attribute(batch_of(pictures, [colour] * 3)).heatmap
        for heatmap, patches in zip(found, places, strict=True):
            _, row, column = patches[colour]
            peak = int(heatmap.argmax())
            assert (peak // 32 // 4, peak % 32 // 4) == (row, column)
            _, row, column = patches[1 - colour]
            assert heatmap[4 * row + 2, 4 * column + 2] == 0


def test_no_gradient_is_computed_in_front_of_the_layer() -> None:
    backbone = small_backbone()
    with backbone.counting() as passes:
        GradCAM().fit(backbone, [], 0)(batch_of(noise_pictures(4), [0, 1, 2, 3]))
    assert dict(passes) == {"head forward": 4, "tail forward": 4, "tail backward": 4}


class Tokens(nn.Module):
    """A class token and 4 x 4 patches; the outputs are linear in all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 5, 8, 8)
        self.token = nn.Parameter(torch.randn(1, 1, 5))
        self.norm = nn.Identity()
        self.fc = nn.Linear(17 * 5, 3)

    def forward(self, x: Tensor) -> Tensor:
        tokens = torch.cat([self.token.repeat(x.shape[0], 1, 1), self.patches(x).flatten(2).transpose(1, 2)], 1)
        return self.fc(self.norm(tokens).flatten(1))


def test_tokens_are_laid_on_their_grid_without_the_class_token() -> None:
    with fixed_seed(3):
        network = Tokens()
    backbone, pictures = freeze(network, (3, 32, 32)), noise_pictures(2)
    found = GradCAM("norm", relu=False).fit(backbone, [], 0)(batch_of(pictures, [2, 1])).heatmap
    for picture, target, heatmap in zip(pictures, [2, 1], found, strict=True):
        weights = network.fc.weight[target].view(17, 5).detach().double().numpy()
        patches = network.patches(picture[None])[0].detach().double().numpy()
        cells = np.zeros((4, 4))
        for k in range(5):
            mean = sum(weights[1 + place, k] for place in range(16)) / 16
            cells += mean * patches[k]
        assert relative(heatmap, torch.from_numpy(bilinear(cells, 32, 32))) < 1e-5


def test_layers_that_cannot_be() -> None:
    with pytest.raises(UserError, match=r"needs a layer that lies on the picture, .*; 'fc' gives \[5\]"):
        GradCAM("fc").fit(small_backbone(), [], 0)
    with pytest.raises(UserError, match="no layer 'stage7'"):
        GradCAM("stage7").fit(small_backbone(), [], 0)
