"""Occlusion: how much the score falls when a window of the picture is covered, window by window.

    A_i = mean over the windows w that hold pixel i of  S(x) - S(x with w covered)

Reference: Zeiler, Fergus, "Visualizing and Understanding Convolutional Networks", ECCV 2014, sec. 4.2, which covers a
grey square and shows the score itself. The engine is captum's `Occlusion`, which gives a pixel the mean over the
windows that hold it. Windows start every `stride` pixels from the top left; the last ones of a row or column may reach
over the border and are cut there. All colours of a window are covered together.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import captum.attr
import torch
from torch import Tensor

from ibxai.backbones import Backbone
from ibxai.errors import UserError
from ibxai.methods.perturbation import BASELINES, baseline_picture
from ibxai.methods.settings import check_choice, check_positive
from ibxai.types import SCORE_KINDS, Attribution, Attributor, Batch, ScoreKind


@dataclass(frozen=True, kw_only=True)
class Occlusion:
    """window, stride: of the square, below 1 in shares of the picture's shorter side, from 1 on in pixels.

    baseline: what covers it, "constant" (`value`, in normalised units) or "blur" (of deviation `sigma` pixels).
    score: what is explained.
    """

    window: float = 0.125
    stride: float = 0.0625
    baseline: str = "constant"
    sigma: float = 10.0
    value: float = 0.0
    score: ScoreKind = "logit"

    version: ClassVar[int] = 1
    uses_reference: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_positive(self, "window", "stride", "sigma")
        check_choice(self, "baseline", *BASELINES)
        check_choice(self, "score", *SCORE_KINDS)
        if (self.window < 1) == (self.stride < 1) and self.stride > self.window:
            raise UserError(
                f"method.stride={self.stride} is above method.window={self.window}: pixels would be left out."
            )

    def fit(
        self, backbone: Backbone, reference: Iterable[Batch], seed: int, state: Mapping[str, Tensor] | None = None
    ) -> Attributor:
        """Nothing is estimated. The result raises UserError when the window does not fit the pictures."""

        def attribute(batch: Batch) -> Attribution:
            baselines = baseline_picture(batch.inputs, self.baseline, self.sigma, self.value)
            every = torch.arange(len(batch), device=batch.inputs.device)
            pieces = [self._cover(backbone, batch, baselines, rows) for rows in every.split(backbone.max_passes)]
            return Attribution(torch.cat(pieces), "score")

        return attribute

    def _cover(self, backbone: Backbone, batch: Batch, baselines: Tensor, rows: Tensor) -> Tensor:
        """[R, H, W] of these rows. captum repeats the rows for its windows, and their numbers with them."""

        def explained(inputs: Tensor, of_rows: Tensor) -> Tensor:
            return batch.target.take(of_rows).score(backbone(inputs), self.score)

        channels = batch.inputs.shape[1]
        window, stride = self._pixels(batch.inputs)
        # every colour gets the same value, so one of them is the map
        return captum.attr.Occlusion(explained).attribute(
            batch.inputs[rows].detach(),
            sliding_window_shapes=(channels, window, window),
            strides=(channels, stride, stride),
            baselines=baselines[rows],
            additional_forward_args=(rows,),
            perturbations_per_eval=max(1, backbone.max_passes // len(rows)),
        )[:, 0]

    def _pixels(self, inputs: Tensor) -> tuple[int, int]:
        """(window, stride) in pixels of these pictures. Raises UserError when the window is larger than they are."""
        side = min(inputs.shape[-2:])
        window, stride = (max(1, round(size * side if size < 1 else size)) for size in (self.window, self.stride))
        if window > side or stride > window:
            raise UserError(
                f"method.window is {window} and method.stride {stride} pixels of pictures {list(inputs.shape[-2:])}: "
                "a window has to fit, and a stride must not be larger than a window."
            )
        return window, stride
