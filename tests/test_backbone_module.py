"""`Backbone.module`: a canonical copy that a method may take apart."""

from __future__ import annotations

import pytest
import timm
import torch
from networks import noise_pictures, relative, small_backbone, small_net
from torch import Tensor, nn

from ibxai.backbones import freeze
from ibxai.errors import UserError


def test_it_computes_the_same_and_is_a_copy() -> None:
    backbone, pictures = small_backbone(), noise_pictures(3)
    module = backbone.module()
    with torch.no_grad():
        wanted = small_net().eval()(pictures)
        assert relative(module(pictures), wanted) < 1e-5
        for part in module.modules():
            if isinstance(part, nn.Conv2d | nn.Linear):
                part.weight.zero_()
        assert relative(backbone(pictures), wanted) < 1e-5
        assert relative(backbone.module()(pictures), wanted) < 1e-5


@pytest.mark.parametrize("make", [small_net, lambda: timm.create_model("tf_efficientnet_lite0")])
def test_every_activation_is_called_once_and_no_norm_is_left(make) -> None:
    module = freeze(make(), (3, 32, 32)).module()
    calls: list[nn.Module] = []
    for part in module.modules():
        assert not isinstance(part, nn.BatchNorm2d)
        if isinstance(part, nn.ReLU | nn.ReLU6):
            assert not part.inplace
            part.register_forward_hook(lambda part, *_: calls.append(part))
    module(noise_pictures(1))
    assert len(calls) == len(set(calls)) == sum(isinstance(p, nn.ReLU | nn.ReLU6) for p in module.modules()) >= 5


def test_its_passes_are_counted_with_the_backbones() -> None:
    backbone = small_backbone()
    module = backbone.module()
    with backbone.counting() as passes:
        with torch.no_grad():
            module(noise_pictures(2))
        module(noise_pictures(3).requires_grad_())
    assert dict(passes) == {"forward": 5, "backward": 3}
    module(noise_pictures(1))
    assert passes["forward"] == 5


def test_a_network_that_cannot_be_traced_has_none() -> None:
    class Undecided(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(12, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x.flatten(1)) if x.sum() > 0 else -self.fc(x.flatten(1))

    backbone = freeze(Undecided(), (3, 2, 2), name="undecided")
    with pytest.raises(UserError, match="undecided cannot be traced"):
        backbone.module()
