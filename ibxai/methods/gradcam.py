"""Grad-CAM: the last convolution's channels, weighted by the mean gradient of the target's score, and summed.

    L = ReLU(sum_k a_k A^k),   a_k = mean over positions of d score / d A^k      (Selvaraju et al., ICCV 2017, Eqs. 1-2)

Differently from common implementations the map is not scaled to 0..1, and nothing but the network's tail is run for
the gradient. Tokens of a vision transformer are laid on its grid of patches, those of no place (class, registers) left
out. Where such a network reads its class token alone, the patches behind the last attention have no say, and their map
is zero: the layer has to stand before it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from ibxai.backbones import Backbone
from ibxai.methods.feature_statistics import FeatureGrid
from ibxai.types import Attribution, Attributor, Batch


@dataclass(frozen=True)
class GradCAM:
    """layer: a layer's name or role, its output [C, h, w], [h, w, C] or square tokens [N, D].
    relu: cut negative evidence off, as the paper does.
    """

    layer: str = "gradcam"
    relu: bool = True

    version: ClassVar[int] = 1
    uses_reference: ClassVar[bool] = False

    def fit(
        self, backbone: Backbone, reference: Iterable[Batch], seed: int, state: Mapping[str, Tensor] | None = None
    ) -> Attributor:
        """Nothing is estimated. Raises UserError when the layer does not exist or has no spatial map."""
        grid = FeatureGrid.of(backbone.layers[backbone.layer(self.layer)], self.layer)
        head, tail = backbone.split(self.layer)

        def attribute(batch: Batch) -> Attribution:
            with torch.no_grad():
                features = head(batch.inputs)
            values = features.values.requires_grad_()
            every = torch.arange(len(batch), device=values.device)
            score = batch.target.score(tail(features.replaced(values, every)), "logit")
            (gradient,) = torch.autograd.grad(score.sum(), values)
            with torch.no_grad():
                weights = grid.to_map(gradient).mean((2, 3), keepdim=True)
                cam = (weights * grid.to_map(values)).sum(1, keepdim=True)
                cam = cam.relu() if self.relu else cam
                size = batch.inputs.shape[-2:]
                heatmap = F.interpolate(cam, size=size, mode="bilinear", align_corners=False)[:, 0]
            return Attribution(heatmap, "score", {"score": score.detach()})

        return attribute
