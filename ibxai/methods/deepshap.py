"""DeepSHAP: each pixel's share of the difference of the score to reference pictures, sent back layer by layer.

    m = (f(z) - f(z')) / (z - z')   at every activation, instead of its gradient       (DeepLIFT, sec. 3.5.2, Rescale)
    phi_i = mean over references x' of (x_i - x'_i) m_i,   sum of phi = S(x) - mean S(x')      (SHAP, sec. 4.2)

Max pooling takes the difference to where the larger of the two maxima was. References: Shrikumar, Greenside, Kundaje,
"Learning Important Features Through Propagating Activation Differences", ICML 2017; Lundberg, Lee, "A Unified Approach
to Interpreting Model Predictions", NeurIPS 2017.

Why not through captum: its `DeepLift` and `DeepLiftShap` (0.9) are wrong where a ReLU is directly followed by a max
pooling, as in VGG, ResNet and DenseNet (the ReLU keeps the gradient from before the pooling's rule; the sum misses the
difference by half of it and more), with overlapping pooling windows, and with ReLU6; and they run reference and
picture, 2 B K rows, forward and backward at once. Here an activation's multiplier is its slope in the graph, so no
hooks are needed, a reference is run forward only, and rows are cut to max_passes. Exact for ReLU, ReLU6, max pooling
and whatever is affine in between; any other network fails the check on a reference picture in `fit`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ibxai.backbones import Backbone
from ibxai.draws import sample_keys, uniform
from ibxai.errors import UserError
from ibxai.methods.activations import exchange, other_kinds
from ibxai.methods.completeness import check_complete, completeness_error
from ibxai.methods.gradients import CHANNELS, Channels, over_channels
from ibxai.methods.settings import check_choice, check_not_negative, check_positive
from ibxai.types import Attribution, Attributor, Batch, ScoreKind

log = logging.getLogger(__name__)

_KNOWN = (nn.ReLU, nn.ReLU6, nn.MaxPool2d)
_PROBES = 2
_SCORE: ScoreKind = "logit"  # a softmax behind it is no layer with a rule of its own


@dataclass(frozen=True, kw_only=True)
class DeepSHAP:
    """baselines: reference pictures, drawn by the seed from the reference split. channels: see `over_channels`.

    tolerance: the completeness error that ends a run; of networks with a rule for every layer it is rounding, 1e-4 at
    most. floor: see `completeness_error`. The logit is explained.
    """

    baselines: int = 10
    channels: Channels = "sum"
    tolerance: float = 0.01
    floor: float = 0.001

    version: ClassVar[int] = 1

    def __post_init__(self) -> None:
        check_positive(self, "baselines", "tolerance")
        check_not_negative(self, "floor")
        check_choice(self, "channels", *CHANNELS)

    def fit(
        self, backbone: Backbone, reference: Iterable[Batch], seed: int, state: Mapping[str, Tensor] | None = None
    ) -> Attributor:
        """Draws the baselines, and explains two reference pictures to see whether every layer has a rule.

        Raises UserError when there is no reference picture, or a layer has no rule.
        """
        baselines, probe = draw_baselines(reference, self.baselines, seed)
        baselines, probe = baselines.to(backbone.device), probe.to(backbone.device)
        network = _Compared(backbone)

        def attribute(batch: Batch) -> Attribution:
            values, score, difference = network.shares(batch, baselines, backbone.max_passes)
            error = completeness_error(values, difference, self.floor)
            advice = f"It knows ReLU, ReLU6 and max pooling; {backbone.name} also has {network.unknown}."
            check_complete(error, batch.sample_ids, self.tolerance, "DeepSHAP", advice)
            diagnostics = {"score": score, "score_difference": difference, "completeness_error": error}
            return Attribution(over_channels(values, self.channels), "score", diagnostics)

        attribute(probe.bound(backbone))
        return attribute


def draw_baselines(reference: Iterable[Batch], count: int, seed: int) -> tuple[Tensor, Batch]:
    """(inputs [count, C, H, W], a few reference rows to try a method on), with fewer pictures all of them.

    A picture is drawn by a number of its own, so neither the size of the batches nor their order matters. Raises
    UserError when there is no picture at all.
    """
    numbers, pictures, probe, seen = torch.empty(0), torch.empty(0), None, 0
    for batch in reference:
        own = uniform(sample_keys(seed, batch.sample_ids, "baselines", batch.inputs.device), 0, ())
        numbers, order = torch.cat([numbers.to(own), own]).sort(stable=True)
        pictures = torch.cat([pictures, batch.inputs])[order[:count]] if seen else batch.inputs[order[:count]]
        numbers = numbers[:count]
        probe = batch.take(range(min(len(batch), _PROBES))) if probe is None else probe
        seen += len(batch)
    if probe is None:
        raise UserError("DeepSHAP takes its baselines from the reference split, which is empty.")
    if seen < count:
        log.warning("method.baselines=%d, and there are only %d reference pictures: all are taken.", count, seen)
    return pictures, probe


class _Comparison:
    """rows [R]: which of the recorded references each row is compared with; None while references are recorded."""

    rows: Tensor | None = None


class _Slope(nn.Module):
    """An activation whose gradient is its multiplier between a row and its reference.

    recorded: what each call saw of the references, in order: a network may call one pooling more than once.
    """

    def __init__(self, comparison: _Comparison) -> None:
        super().__init__()
        self.comparison = comparison
        self.recorded: list[tuple[Tensor, ...]] = []

    def forward(self, inputs: Tensor) -> Tensor:
        with torch.no_grad():
            own = self.run(inputs)
        if self.comparison.rows is None:
            self.recorded.append(own)
            return own[0]
        with torch.no_grad():
            reference = tuple(tensor[self.comparison.rows] for tensor in self.recorded.pop(0))
            places, slope = self.multiplier(own, reference)
        moved = inputs if places is None else inputs.flatten(2).gather(2, places.flatten(2)).view_as(places)
        return own[0] + slope * (moved - moved.detach())  # the activation's value, with this slope

    def run(self, inputs: Tensor) -> tuple[Tensor, ...]:
        """(output, and what `multiplier` wants to know)."""
        raise NotImplementedError

    def multiplier(self, own: tuple[Tensor, ...], reference: tuple[Tensor, ...]) -> tuple[Tensor | None, Tensor]:
        """(the places of the inputs that the slope belongs to, None for each its own; the slope)."""
        raise NotImplementedError


class _Rectifier(_Slope):
    """ReLU, or with a ceiling of 6 ReLU6; where the input does not differ at all, its gradient."""

    def __init__(self, comparison: _Comparison, ceiling: float) -> None:
        super().__init__(comparison)
        self.ceiling = ceiling

    def run(self, inputs: Tensor) -> tuple[Tensor, ...]:
        return inputs.clamp(0, self.ceiling), inputs

    def multiplier(self, own: tuple[Tensor, ...], reference: tuple[Tensor, ...]) -> tuple[Tensor | None, Tensor]:
        (out, inputs), (before_out, before) = own, reference
        change = inputs - before
        gradient = ((inputs > 0) & (inputs < self.ceiling)).to(inputs)
        return None, torch.where(change == 0, gradient, (out - before_out) / change)


class _MaxPool(_Slope):
    """The whole difference of two maxima goes to where the larger was; the slope is between 0 and 1."""

    def __init__(self, comparison: _Comparison, pool: nn.MaxPool2d) -> None:
        super().__init__(comparison)
        self.pool = pool

    def run(self, inputs: Tensor) -> tuple[Tensor, ...]:
        pool = self.pool
        out, places = F.max_pool2d_with_indices(
            inputs, _two(pool.kernel_size), _two(pool.stride), _two(pool.padding), _two(pool.dilation), pool.ceil_mode
        )
        return out, places, inputs

    def multiplier(self, own: tuple[Tensor, ...], reference: tuple[Tensor, ...]) -> tuple[Tensor | None, Tensor]:
        (out, places, inputs), (before_out, before_places, before) = own, reference
        places = torch.where(out >= before_out, places, before_places)
        change = (inputs - before).flatten(2).gather(2, places.flatten(2)).view_as(places)
        return places, torch.where(change == 0, 1.0, (out - before_out) / change)


def _two(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else size


class _Compared:
    """A copy of a network in which every activation's gradient is its multiplier.

    unknown: what it has besides affine layers and activations with a rule, for an error.
    """

    def __init__(self, backbone: Backbone) -> None:
        self.comparison = _Comparison()
        self.network = backbone.module()
        self.unknown = ", ".join(kind.__name__ for kind in other_kinds(self.network, _KNOWN)) or "what is no module"
        self.slopes = exchange(self.network, _KNOWN, self._with_slope)

    def _with_slope(self, part: nn.Module) -> _Slope:
        if isinstance(part, nn.MaxPool2d):
            return _MaxPool(self.comparison, part)
        return _Rectifier(self.comparison, 6.0 if isinstance(part, nn.ReLU6) else torch.inf)

    def shares(self, batch: Batch, baselines: Tensor, most: int) -> tuple[Tensor, Tensor, Tensor]:
        """(shares [B, C, H, W], score [B], score minus the baselines' mean score [B]), `most` rows at once."""
        count, target = len(baselines), batch.target
        shares = torch.zeros_like(batch.inputs)
        score, difference = shares.new_zeros(len(batch)), shares.new_zeros(len(batch))
        try:
            # all pictures against the first baseline, then the second ...: few baselines a pass
            for pairs in torch.arange(len(batch) * count, device=shares.device).split(most):
                sample, which = pairs % len(batch), pairs // len(batch)
                distinct, place = which.unique(return_inverse=True)
                with torch.no_grad():
                    self.comparison.rows = None
                    before = target.take(sample).score(self.network(baselines[distinct])[place], _SCORE)
                    self.comparison.rows = place
                with torch.enable_grad():
                    inputs = batch.inputs[sample].detach().requires_grad_()
                    after = target.take(sample).score(self.network(inputs), _SCORE)
                    (multiplier,) = torch.autograd.grad(after.sum(), inputs)
                with torch.no_grad():
                    shares.index_add_(0, sample, multiplier * (inputs - baselines[which]) / count)
                    difference.index_add_(0, sample, (after - before) / count)
                    score[sample] = after
        finally:
            for slope in self.slopes:
                slope.recorded.clear()
        return shares, score, difference
