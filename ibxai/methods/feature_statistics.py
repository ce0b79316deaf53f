"""Mean, deviation and activity of a layer over a reference split, and where on the picture its features lie."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from ibxai.backbones import Backbone
from ibxai.errors import UserError
from ibxai.store import digest, write_atomically
from ibxai.types import Batch

INPUT = "input"  # stands for the network's input where a layer's name is asked for
_MOST_PREFIX_TOKENS = 16


@dataclass(frozen=True)
class FeatureGrid:
    """How a layer's output [...] of one picture lies on the picture's plane.

    kind: "map" [C, h, w], "channels last" [h, w, C] (Swin), or "tokens" [N, D] (ViT): `prefix` tokens that belong to
    no place (class, registers), then the patches row by row. "text" [T, D] has no plane, and a T of each text's own.
    """

    kind: str
    height: int
    width: int
    prefix: int = 0

    @classmethod
    def at(cls, backbone: Backbone, layer: str) -> FeatureGrid:
        """Of a layer (name, role or INPUT). Raises UserError when it does not exist or has no place for each value."""
        shape = shape_of(backbone, layer)
        if backbone.modality != "text":
            return cls.of(shape, layer)
        if len(shape) == 2:
            return cls("text", 1, shape[0])
        raise UserError(f"A bottleneck on texts needs a layer with features a token; '{layer}' gives {list(shape)}.")

    @classmethod
    def of(cls, shape: Sequence[int], layer: str) -> FeatureGrid:
        """Raises UserError when the shape has no plane."""
        if len(shape) == 3 and shape[0] == shape[1] != shape[2]:
            return cls("channels last", shape[0], shape[1])
        if len(shape) == 3 and shape[1] * shape[2] > 1:
            return cls("map", shape[1], shape[2])
        if len(shape) == 2:
            side = math.isqrt(shape[0])
            if side > 1 and shape[0] - side**2 <= _MOST_PREFIX_TOKENS:
                return cls("tokens", side, side, shape[0] - side**2)
        raise UserError(
            f"The method needs a layer that lies on the picture, [C, h, w] or square tokens [N, D]; "
            f"'{layer}' gives {list(shape)}."
        )

    @property
    def places(self) -> tuple[int, ...]:
        """The dimensions of one picture's features that are not channels."""
        return {"map": (1, 2), "channels last": (0, 1), "tokens": (0,)}[self.kind]

    def to_map(self, values: Tensor) -> Tensor:
        """[B, ...] -> [B, C, h, w]; prefix tokens are left out."""
        if self.kind == "channels last":
            return values.permute(0, 3, 1, 2)
        if self.kind == "tokens":
            return values[:, self.prefix :].transpose(1, 2).unflatten(2, (self.height, self.width))
        return values

    def from_map(self, values: Tensor, prefix: Tensor) -> Tensor:
        """Back from [B, C, h, w]; the prefix tokens are taken from `prefix` [B, ...], which is in the layer's shape."""
        if self.kind == "channels last":
            return values.permute(0, 2, 3, 1)
        if self.kind == "tokens":
            return torch.cat([prefix[:, : self.prefix], values.flatten(2).transpose(1, 2)], dim=1)
        return values


def shape_of(backbone: Backbone, layer: str) -> tuple[int, ...]:
    """Of one sample at a layer (name, role or INPUT), without the batch."""
    return backbone.input_shape if layer == INPUT else backbone.layers[backbone.layer(layer)]


@dataclass(frozen=True)
class FeatureStatistics:
    """Of a layer's output, over a reference split; broadcastable to one picture's features.

    mean, std: a neuron each, or a channel each when `pooled`; of texts a feature each, the same at all tokens. active:
    False for neurons that are (almost) never different from zero. count: reference pictures, or tokens, behind them.
    """

    mean: Tensor
    std: Tensor
    active: Tensor
    count: int
    pooled: bool


@dataclass(frozen=True)
class _Moments:
    """Exact sums over pictures or tokens, a neuron each, float64: mean, mean squared deviation, share of non-zeros."""

    mean: Tensor
    variance: Tensor
    nonzero: Tensor
    count: int


def estimate_statistics(
    backbone: Backbone,
    layers: Sequence[str],
    reference: Iterable[Batch],
    min_reference: int,
    min_std: float,
    active_share: float,
) -> dict[str, FeatureStatistics]:
    """Statistics of several layers (names, roles or INPUT) in one pass over the reference batches, or from the cache.

    With fewer than `min_reference` pictures a deviation a neuron would be noise, so they are pooled over a channel's
    places; those of INPUT always are. Deviations are floored at `min_std`; a neuron counts as active when it differs
    from zero in more than `active_share` of the pictures (of pictures and places, when pooled). Raises UserError
    without reference.

    A reference with a `cache` folder and a `digest` (the pipeline's) keeps the moments there, by content: network,
    layer, preprocessing and pictures.
    """
    grids = {name: FeatureGrid.at(backbone, name) for name in layers}  # before the reference is gone through
    moments = _cached(backbone, layers, reference)
    missing = [layer for layer in layers if layer not in moments]
    if missing:
        found = _stream(backbone, missing, reference)
        _keep(backbone, found, reference)
        moments |= found
    statistics = {}
    for layer in layers:
        enough = grids[layer].kind == "text" or (moments[layer].count >= min_reference and layer != INPUT)
        statistics[layer] = _settled(moments[layer], grids[layer], backbone.device, not enough, min_std, active_share)
    return statistics


def _stream(backbone: Backbone, layers: Sequence[str], reference: Iterable[Batch]) -> dict[str, _Moments]:
    """Welford's rule, a batch at a time, in float64."""
    moments: dict[str, _Moments] = {}
    inside = [layer for layer in layers if layer != INPUT]
    for batch in reference:
        if not len(batch):
            continue
        batch = backbone.embed(batch.to(backbone.device))
        with torch.no_grad():
            features = backbone.features(batch.inputs, inside, batch.valid) if inside else {}
        features[INPUT] = batch.inputs
        for layer in layers:
            # of texts each token counts, and the padding does not
            values = (features[layer] if batch.valid is None else features[layer][batch.valid]).double().cpu()
            mean = values.mean(0)
            new = _Moments(mean, ((values - mean) ** 2).mean(0), (values != 0).double().mean(0), len(values))
            moments[layer] = _merged(moments[layer], new) if layer in moments else new
    if not moments:
        raise UserError("The reference split is empty: a bottleneck needs pictures to estimate feature statistics on.")
    return moments


def _merged(a: _Moments, b: _Moments) -> _Moments:
    count = a.count + b.count
    shift, share = b.mean - a.mean, b.count / count
    return _Moments(
        mean=a.mean + shift * share,
        variance=a.variance * (1 - share) + b.variance * share + shift**2 * share * (1 - share),
        nonzero=a.nonzero * (1 - share) + b.nonzero * share,
        count=count,
    )


def _settled(
    moments: _Moments,
    grid: FeatureGrid,
    device: torch.device,
    pooled: bool,
    min_std: float,
    active_share: float,
) -> FeatureStatistics:
    mean, variance, share = moments.mean, moments.variance, moments.nonzero
    if pooled:
        centre = mean.mean(grid.places, keepdim=True)
        variance = (variance + (mean - centre) ** 2).mean(grid.places, keepdim=True)
        mean, share = centre, share.mean(grid.places, keepdim=True)
    std = variance.sqrt().clamp_min(min_std)
    return FeatureStatistics(
        mean.float().to(device), std.float().to(device), (share > active_share).to(device), moments.count, pooled
    )


def _cache_file(backbone: Backbone, layer: str, reference: Iterable[Batch]) -> Path | None:
    folder: Path | None = getattr(reference, "cache", None)
    if folder is None:
        return None
    key = {
        "weights": backbone.digest,
        "layer": INPUT if layer == INPUT else backbone.layer(layer),
        "preprocessing": dataclasses.asdict(backbone.preprocessing),
        "reference": reference.digest,  # type: ignore[attr-defined]  # it comes with the cache
    }
    return folder / f"moments-{digest(key)}.safetensors"


def _cached(backbone: Backbone, layers: Sequence[str], reference: Iterable[Batch]) -> dict[str, _Moments]:
    found = {}
    for layer in layers:
        path = _cache_file(backbone, layer, reference)
        if path is None or not path.exists():
            continue
        try:
            tensors = safetensors.torch.load_file(path)
            found[layer] = _Moments(
                tensors["mean"], tensors["variance"], tensors["nonzero"], int(tensors["count"].item())
            )
        except (OSError, KeyError, safetensors.SafetensorError):
            path.unlink(missing_ok=True)  # cut short or not ours: estimated again
    return found


def _keep(backbone: Backbone, moments: Mapping[str, _Moments], reference: Iterable[Batch]) -> None:
    for layer, m in moments.items():
        path = _cache_file(backbone, layer, reference)
        if path is not None:
            tensors = {"mean": m.mean, "variance": m.variance, "nonzero": m.nonzero, "count": torch.tensor(m.count)}
            content = safetensors.torch.save({name: tensor.contiguous() for name, tensor in tensors.items()})
            write_atomically(path, content)
