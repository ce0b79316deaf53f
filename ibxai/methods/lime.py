"""LIME: what a linear model says of the network around one picture, its variables being superpixels kept or covered.

    xi = argmin_g  sum_z pi(z) (S(z) - g(z))^2 + ridge |c|^2,   g(z) = a + sum_s c_s z_s,   pi(z) = exp(-D(z)^2 / 2 w^2)

with D the cosine distance between z and "everything kept"; the map is c_s at the pixels of superpixel s. Reference:
Ribeiro, Singh, Guestrin, "Why Should I Trust You?", KDD 2016, Eqs. 1-2, and their code, whose kernel carries the 2, and
which sets the settings' defaults. Of texts a variable is a word of the vocabulary, wherever it stands, as in the
official code; what is taken away becomes `<unk>`, so that the others keep their places.

Differently from the official code superpixels are SLIC's (quickshift's number is hard to foresee), no superpixels are
selected before the fit, and all pictures of a batch are fitted in one solve, in float64. The first draw keeps
everything, as there. Superpixels are found on a CPU, one picture after the other: the rest is batched.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from skimage.segmentation import slic
from torch import Tensor

from ibxai.backbones import Backbone, TextBackbone
from ibxai.draws import sample_keys, uniform
from ibxai.errors import UserError
from ibxai.methods.perturbation import BASELINES, baseline_picture
from ibxai.methods.settings import check_choice, check_not_negative, check_positive
from ibxai.types import SCORE_KINDS, Attribution, Attributor, Batch, ScoreKind

MEAN_COLOUR = "mean"
_TINY = 1e-30


@dataclass(frozen=True, kw_only=True)
class LIME:
    """segments, compactness, segment_blur: of SLIC; it finds about as many superpixels as it is asked for.

    samples: network passes a row. keep: the chance of a superpixel or word to be kept. kernel_width: w. ridge: the
    penalty. baseline: what covers a superpixel, "mean" (its mean colour), "blur" (of deviation `sigma` pixels) or
    "constant" (`value`, in normalised units); a word always becomes `<unk>`. score: what is explained.
    """

    segments: int = 50
    compactness: float = 10.0
    segment_blur: float = 1.0
    samples: int = 1000
    keep: float = 0.5
    kernel_width: float = 0.25
    ridge: float = 1.0
    baseline: str = MEAN_COLOUR
    sigma: float = 10.0
    value: float = 0.0
    score: ScoreKind = "probability"

    version: ClassVar[int] = 1
    uses_reference: ClassVar[bool] = False
    modalities: ClassVar[tuple[str, ...]] = ("picture", "text")

    def __post_init__(self) -> None:
        check_positive(self, "segments", "compactness", "kernel_width", "ridge", "sigma")
        check_not_negative(self, "segment_blur")
        check_choice(self, "baseline", MEAN_COLOUR, *BASELINES)
        check_choice(self, "score", *SCORE_KINDS)
        if self.samples < 2:
            raise UserError(f"method.samples is {self.samples}: a fit needs 2 or more.")
        if not 0 < self.keep < 1:
            raise UserError(f"method.keep is {self.keep}: a chance above 0 and below 1 is expected.")

    def fit(
        self, backbone: Backbone, reference: Iterable[Batch], seed: int, state: Mapping[str, Tensor] | None = None
    ) -> Attributor:
        """Nothing is estimated. The map's diagnostics, [B] each: `r2`, the share of the weighted variance of the scores
        that the linear model explains; `segments`, the number of superpixels or words."""

        def attribute(batch: Batch) -> Attribution:
            segments = self._segments(backbone, batch)
            counts = segments.flatten(1).amax(1) + 1
            kept = self._draw(batch, counts, seed)
            scores = self._scores(backbone, batch, segments, kept)
            coefficients, r2 = weighted_ridge(kept, scores, kernel(kept, counts, self.kernel_width), self.ridge)
            heatmap = coefficients.gather(1, segments.flatten(1).clamp_min(0)).view(segments.shape)
            if batch.valid is not None:
                heatmap = heatmap * batch.valid
            return Attribution(heatmap.float(), "score", {"r2": r2.float(), "segments": counts.float()})

        return attribute

    def _segments(self, backbone: Backbone, batch: Batch) -> Tensor:
        """int64 [B, H, W] or [B, T]: the superpixel or word of each place, numbered from 0; -1 in the padding."""
        if batch.tokens is not None and batch.valid is not None:
            return different_words(batch.tokens, batch.valid)
        return superpixels(backbone, batch.inputs, self.segments, self.compactness, self.segment_blur)

    def _draw(self, batch: Batch, counts: Tensor, seed: int) -> Tensor:
        """bool [B, samples, S]: what is kept; the first draw keeps all, and no draw what a picture lacks."""
        rows, most = len(batch), int(counts.max())
        keys = sample_keys(seed, batch.sample_ids, "superpixels", counts.device).repeat_interleave(self.samples)
        steps = torch.arange(self.samples, device=counts.device).repeat(rows)
        kept = uniform(keys, steps, (most,)).view(rows, self.samples, most) < self.keep
        kept[:, 0] = True
        return kept & (torch.arange(most, device=counts.device) < counts[:, None])[:, None]

    def _scores(self, backbone: Backbone, batch: Batch, segments: Tensor, kept: Tensor) -> Tensor:
        """[B, samples]: the target's score of the samples with the other superpixels or words covered."""
        covered = self._covered(backbone, batch, segments)
        flat, scores = segments.flatten(1).clamp_min(0), []
        with torch.no_grad():
            for rows in torch.arange(kept.shape[0] * kept.shape[1], device=kept.device).split(backbone.max_passes):
                sample = rows // kept.shape[1]
                shown = batch.over_inputs(kept.flatten(0, 1)[rows].gather(1, flat[sample]))
                inputs = torch.where(shown, batch.inputs[sample], covered[sample])
                scores.append(batch.scores(backbone, inputs, sample, self.score))
        return torch.cat(scores).view(kept.shape[:2])

    def _covered(self, backbone: Backbone, batch: Batch, segments: Tensor) -> Tensor:
        """The inputs with every superpixel or word covered."""
        if isinstance(backbone, TextBackbone):
            return backbone.unknown.expand_as(batch.inputs)
        if self.baseline == MEAN_COLOUR:
            return mean_colours(batch.inputs, segments)
        return baseline_picture(batch.inputs, self.baseline, self.sigma, self.value)


def different_words(tokens: Tensor, valid: Tensor) -> Tensor:
    """int64 [B, T]: each text's different tokens numbered from 0, in the vocabulary's order; -1 in the padding."""
    ordered, order = tokens.masked_fill(~valid, -1).sort(1)
    new = ordered.diff(dim=1, prepend=torch.full_like(ordered[:, :1], -1)) > 0
    return torch.empty_like(order).scatter_(1, order, new.cumsum(1) - 1)


def superpixels(backbone: Backbone, inputs: Tensor, count: int, compactness: float, blur: float) -> Tensor:
    """int64 [B, H, W]: the superpixel of each pixel, numbered from 0. inputs: [B, C, H, W], normalised.

    SLIC (Achanta et al., TPAMI 2012) on the picture as people see it, in CIELAB where it has three colours.
    """
    pictures = backbone.preprocessing.picture_of(inputs)
    found = [
        slic(
            picture,
            n_segments=count,
            compactness=compactness,
            sigma=blur,
            start_label=0,
            convert2lab=picture.shape[-1] == 3,
            channel_axis=-1,
        )
        for picture in pictures
    ]
    return torch.from_numpy(np.stack(found)).long().to(inputs.device)


def mean_colours(inputs: Tensor, segments: Tensor) -> Tensor:
    """[B, C, H, W]: each pixel in the mean colour of its superpixel."""
    places = segments.flatten(1)[:, None].expand(-1, inputs.shape[1], -1)
    sums = inputs.new_zeros(*inputs.shape[:2], int(places.max()) + 1)
    means = sums.scatter_reduce(2, places, inputs.flatten(2), "mean", include_self=False)
    return means.gather(2, places).view_as(inputs)


def kernel(kept: Tensor, counts: Tensor, width: float) -> Tensor:
    """float64 [B, N]: weights of draws [B, N, S]. The cosine of k superpixels kept to all S is sqrt(k / S)."""
    distance = 1 - (kept.sum(2).double() / counts[:, None]).sqrt()
    return (-(distance**2) / (2 * width**2)).exp()


def weighted_ridge(draws: Tensor, values: Tensor, weights: Tensor, penalty: float) -> tuple[Tensor, Tensor]:
    """(coefficients [B, S], weighted R^2 [B]), float64, of a linear fit of values [B, N] to draws [B, N, S] each.

    minimises sum_n w_n (y_n - a - c z_n)^2 + penalty |c|^2; the intercept a is not penalised. A variable that is
    always 0 gets the coefficient 0.
    """
    z, y, w = draws.double(), values.double(), (weights / weights.sum(1, keepdim=True)).double()
    z = z - (w[:, :, None] * z).sum(1, keepdim=True)
    y = y - (w * y).sum(1, keepdim=True)
    scaled = w[:, :, None] * z
    penalties = penalty / weights.double().sum(1)[:, None, None] * torch.eye(z.shape[2], dtype=z.dtype, device=z.device)
    normal = scaled.mT @ z + penalties
    coefficients = torch.linalg.solve(normal, (scaled.mT @ y[:, :, None]))[:, :, 0]
    left = (w * (y - (z @ coefficients[:, :, None])[:, :, 0]) ** 2).sum(1)
    return coefficients, 1 - left / (w * y**2).sum(1).clamp_min(_TINY)
