"""From a picture to a network's input and back: resize, centre crop, normalise, with the regions going along."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as tvf

from ibxai.types import Picture


@dataclass(frozen=True)
class Preprocessing:
    """What a network was trained on: shorter side resized to `resize`, centre crop of `crop` pixels, (x - mean) / std.

    It belongs to the network, so it is part of the backbone's config and of a run's identity.
    """

    resize: int = 256
    crop: int = 224
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    interpolation: str = "bilinear"

    modality: ClassVar[str] = "picture"

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> Preprocessing:
        """From its settings as JSON has them, with lists for tuples."""
        given: dict[str, Any] = {n: tuple(value) if isinstance(value, list) else value for n, value in settings.items()}
        return cls(**given)

    def __call__(self, picture: Picture) -> tuple[Tensor, Mapping[str, Tensor]]:
        """(input float32 [C, crop, crop], regions [R, crop, crop], bool or float32 as they came) of one picture.

        A region that the crop cuts away entirely stays as an empty plane: the annotation exists.
        """
        mode = InterpolationMode(self.interpolation)
        image = tvf.center_crop(tvf.resize(picture.image, [self.resize], mode), [self.crop])
        pixels = torch.from_numpy(np.asarray(image, dtype=np.float32) / 255).permute(2, 0, 1)
        regions = {name: self._region(planes) for name, planes in picture.regions.items()}
        return (pixels - self._column(self.mean)) / self._column(self.std), regions

    def _region(self, planes: Tensor) -> Tensor:
        """Nearest pixels: a degree such as a severity takes no value between those that were annotated."""
        work, kept = (torch.float32, torch.float32) if planes.is_floating_point() else (torch.uint8, torch.bool)
        resized = tvf.resize(planes.to(work), [self.resize], InterpolationMode.NEAREST_EXACT)
        return tvf.center_crop(resized, [self.crop]).to(kept)

    def picture_of(self, inputs: Tensor) -> np.ndarray:
        """uint8 [..., H, W, C]: what the network saw, for people. inputs: [..., C, H, W] after normalisation."""
        pixels = inputs.detach().cpu() * self._column(self.std) + self._column(self.mean)
        return (pixels.clamp(0, 1) * 255).round().to(torch.uint8).movedim(-3, -1).numpy()

    @property
    def black(self) -> Tensor:
        """[C, 1, 1]: a black pixel, after normalisation."""
        return -self._column(self.mean) / self._column(self.std)

    @property
    def input_shape(self) -> tuple[int, int, int]:
        return len(self.mean), self.crop, self.crop

    @staticmethod
    def _column(values: tuple[float, ...]) -> Tensor:
        return torch.tensor(values, dtype=torch.float32)[:, None, None]
