"""How iGOS++, I-GOS and Mask find their masks: the settings that they share, and the steps of the descent.

    armijo   M <- clamp(M - alpha TG), alpha from `armijo_start` down by `armijo_shrink` until
             F(M - alpha TG) - F(M) <= -alpha control |TG|^2             (iGOS++, Eq. 8; F over the IG intervals)
    fixed    M <- clamp(M - fixed_step TG)                               (iGOS++, Table 3, "fix step size")
    adam     a step of Adam, its rate falling to 0 in a line; every cell moves by about the rate
    scaled   Adam with one second moment for all cells of a picture: ours, and the default

Every picture has masks, a step size and an end of its own; all run in one batch, and those that have ended leave it.

Why scaled: a line search spends most of the passes on finding a step size, one candidate after the other. A step that
is divided by the gradient's size over the picture needs none, and can take half of the IG intervals, the other half
the next time. Adam divides each cell by a size of its own: cells of little and of much evidence move alike, and the
map no longer says which came first, which is what insertion and deletion ask.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from ibxai.backbones import Backbone
from ibxai.errors import UserError
from ibxai.methods.mask_objective import Problem, Regulariser, Smoothness, Term, upsampled
from ibxai.methods.perturbation import PerturbationSettings
from ibxai.methods.settings import check_choice, check_not_negative, check_positive
from ibxai.types import Attribution, Attributor, Batch

StepRule = Literal["scaled", "adam", "armijo", "fixed"]
_FULL_SIZE = 224  # cells a side from which the paper takes a lambda1 of 10
_FIRST, _SECOND, _EPSILON = 0.9, 0.999, 1e-8  # Adam's own constants (Kingma and Ba, ICLR 2015)


@dataclass(frozen=True, kw_only=True)
class MaskSettings(PerturbationSettings):
    """What the methods with an optimised mask share.

    resolution: cells a side of the masks, None for the picture's pixels. iterations: of the descent. lambda1, lambda2,
    smoothness, beta, btv_sigma: see `Regulariser`; a lambda1 of None is 10 from 224 cells a side on, else 1.
    noise: deviation on masked pictures, in normalised units. learning_rate: of scaled and adam, at the start.
    tolerance: a picture is done when no cell of its masks moves further in a step; below 0 never.
    """

    resolution: int | None = 28
    iterations: int = 15
    lambda1: float | None = None
    lambda2: float = 20.0
    smoothness: Smoothness = "tv"
    beta: float = 2.0
    btv_sigma: float = 0.01
    noise: float = 0.2
    learning_rate: float = 0.1
    tolerance: float = -1.0

    version: ClassVar[int] = 2  # 1: lambda1 pulled at cells that are 1, too

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "iterations", "beta", "btv_sigma", "learning_rate")
        check_not_negative(self, "lambda2", "noise")
        check_choice(self, "smoothness", "btv", "tv")
        if self.lambda1 is not None:
            check_not_negative(self, "lambda1")
        if self.resolution is not None:
            check_positive(self, "resolution")

    def attributor(
        self,
        backbone: Backbone,
        reference: Iterable[Batch],
        seed: int,
        terms: tuple[Term, ...],
        descent: Descent,
        output: int | None = None,
    ) -> Attributor:
        """Explains by masks found for these terms. output: the mask that is the map, None for the product of all.

        Raises UserError when the mean of the reference split is the baseline, and the split is empty.
        """
        baselines = self.baselines(reference, seed)

        def attribute(batch: Batch) -> Attribution:
            size = (batch.inputs.shape[-2], batch.inputs.shape[-1])
            cells = size if self.resolution is None else (self.resolution, self.resolution)
            regulariser = self._regulariser(cells)
            problem = Problem.of(
                backbone, batch, baselines(batch), terms, regulariser, self.score, descent.ig_steps, self.noise, seed
            )
            planes = 1 + max(term.plane or 0 for term in terms)
            found = descent.search(problem, torch.ones(len(batch), planes, *cells, device=batch.inputs.device))
            mask = found.masks.prod(1) if output is None else found.masks[:, output]
            diagnostics = {
                "value_curve": found.values,
                "combined_loss": combined_loss(problem, mask),
                "steps": found.steps,
                "passes": found.passes,
            }
            return Attribution((1 - upsampled(mask[:, None], size))[:, 0], "mask", diagnostics)

        return attribute

    def _regulariser(self, cells: tuple[int, int]) -> Regulariser:
        standard = 10.0 if min(cells) >= _FULL_SIZE else 1.0
        lambda1 = standard if self.lambda1 is None else self.lambda1
        return Regulariser(lambda1, self.lambda2, self.smoothness, self.beta, self.btv_sigma)


@dataclass(frozen=True, kw_only=True)
class IntegratedSettings(MaskSettings):
    """What iGOS++ and I-GOS share besides.

    ig_steps: S. step: how masks move, see above. intervals: how many of the S scaled and adam take at a step, in turn;
    the others take all. armijo_start, armijo_shrink, armijo_smallest: step sizes that are tried; where none is accepted
    the masks stay. armijo_control: beta of Eq. 8. fixed_step: alpha of "fixed".
    """

    ig_steps: int = 20
    step: StepRule = "scaled"
    learning_rate: float = 0.05
    intervals: int = 10
    armijo_start: float = 1000.0
    armijo_shrink: float = 0.2
    armijo_control: float = 1e-4
    armijo_smallest: float = 1e-5
    fixed_step: float = 5.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "ig_steps", "intervals", "armijo_start", "armijo_smallest", "fixed_step")
        check_not_negative(self, "armijo_control")
        check_choice(self, "step", *get_args(StepRule))
        if not 0 < self.armijo_shrink < 1:
            raise UserError(f"method.armijo_shrink is {self.armijo_shrink}: above 0 and below 1 is expected.")
        if self.ig_steps % self.intervals:
            raise UserError(
                f"method.intervals is {self.intervals}: it must divide method.ig_steps={self.ig_steps}, so that each "
                "has its turn."
            )

    def descent(self, at_the_mask: bool) -> Descent:
        """at_the_mask: armijo compares values at M itself, as I-GOS does, instead of over the IG intervals."""
        if self.step in ("scaled", "adam"):
            rule = Adam(self.learning_rate, together=self.step == "scaled")
            return Descent(self.iterations, self.ig_steps, self.intervals, self.tolerance, rule)
        tried = (self.armijo_start, self.armijo_shrink, self.armijo_control, self.armijo_smallest)
        papers = Armijo(*tried, at_the_mask) if self.step == "armijo" else self.fixed_step
        return Descent(self.iterations, self.ig_steps, self.ig_steps, -1.0, papers)  # through all iterations


@dataclass(frozen=True)
class Armijo:
    """Step sizes from start down to smallest, times shrink each; control: the share of the promised decrease."""

    start: float
    shrink: float
    control: float
    smallest: float
    at_the_mask: bool

    def move(
        self, problem: Problem, masks: Tensor, value: Tensor, slope: Tensor, intervals: Tensor, step: int
    ) -> tuple[Tensor, Tensor]:
        """(masks, network passes [N]) behind the first step size that Eq. 8 accepts, of each picture its own."""
        value, tested = value.clone(), intervals
        passes = torch.zeros(len(masks), device=masks.device)
        if self.at_the_mask:
            tested = intervals[-1:]
            value = problem.value(masks, tested, step)
            passes += len(problem.terms)
        moved, waiting = masks.clone(), torch.arange(len(masks), device=masks.device)
        asked, alpha = self.control * (slope**2).flatten(1).sum(1), self.start
        while len(waiting) and alpha >= self.smallest:
            tried = (masks[waiting] - alpha * slope[waiting]).clamp(0, 1)
            change = problem.of_rows(waiting).value(tried, tested, step) - value[waiting]
            passes[waiting] += len(problem.terms) * len(tested)
            accepted = change <= -alpha * asked[waiting]
            moved[waiting[accepted]] = tried[accepted]
            waiting, alpha = waiting[~accepted], alpha * self.shrink
        return moved, passes


@dataclass(frozen=True)
class Adam:
    """Adam at a rate that falls to 0. together: all cells of a picture share one second moment."""

    rate: float
    together: bool


class Moments:
    """What Adam keeps of masks that may leave the batch: `rows` are those that move."""

    def __init__(self, masks: Tensor, together: bool) -> None:
        self.together, self.steps = together, 0
        self.mean, self.square = torch.zeros_like(masks), torch.zeros_like(masks)

    def move(self, masks: Tensor, slope: Tensor, rows: Tensor, rate: float) -> Tensor:
        """The masks [N, ...] of these rows after a step at this rate. Call it once a step."""
        self.steps += 1
        power = slope**2
        if self.together:
            power = power.flatten(1).mean(1).view(-1, 1, 1, 1).expand_as(slope)
        self.mean[rows] = mean = torch.lerp(slope, self.mean[rows], _FIRST)
        self.square[rows] = square = torch.lerp(power, self.square[rows], _SECOND)
        spread = (square / (1 - _SECOND**self.steps)).sqrt() + _EPSILON
        return (masks - rate * (mean / (1 - _FIRST**self.steps)) / spread).clamp(0, 1)


@dataclass(frozen=True)
class Found:
    """masks [B, planes, h, w]; values [B, iterations], the objective before each step, on the intervals of that step,
    the last one for those left out; steps [B] taken; passes [B], forward, of which a gradient's go backward too."""

    masks: Tensor
    values: Tensor
    steps: Tensor
    passes: Tensor


@dataclass(frozen=True)
class Descent:
    """rule: Armijo's, Adam's, or a fixed alpha. The others: see `MaskSettings` and `IntegratedSettings`."""

    iterations: int
    ig_steps: int
    intervals: int
    tolerance: float
    rule: Armijo | Adam | float

    def search(self, problem: Problem, masks: Tensor) -> Found:
        """Descend from these masks [B, planes, h, w], of a whole batch, until every picture has ended."""
        steps, passes = (torch.zeros(len(masks), device=masks.device) for _ in range(2))
        values = masks.new_zeros(len(masks), self.iterations)
        moments = Moments(masks, isinstance(self.rule, Adam) and self.rule.together)
        active = torch.arange(len(masks), device=masks.device)
        for step in range(self.iterations):
            some, own, intervals = problem.of_rows(active), masks[active], self.intervals_at(step)
            value, slope = some.gradient(own, intervals, step)
            passes[active] += len(problem.terms) * len(intervals)
            if isinstance(self.rule, Armijo):
                moved, tried = self.rule.move(some, own, value, slope, intervals, step)
                passes[active] += tried
            elif isinstance(self.rule, Adam):
                moved = moments.move(own, slope, active, self.rule.rate * (1 - step / self.iterations))
            else:
                moved = (own - self.rule * slope).clamp(0, 1)
            masks = masks.index_copy(0, active, moved)
            values[active, step:] = value[:, None]
            steps[active] += 1
            active = active[(moved - own).abs().flatten(1).amax(1) > self.tolerance]
            if len(active) == 0:
                break
        return Found(masks, values, steps, passes)

    def intervals_at(self, step: int) -> Tensor:
        """long: which of 1 ... S count at this step, evenly spaced; after S / intervals steps each had its turn."""
        stride = self.ig_steps // self.intervals
        return torch.arange(1, self.intervals + 1) * stride - step % stride


def combined_loss(problem: Problem, mask: Tensor) -> Tensor:
    """[B]: f(Phi(I, I~, M)) - f(Phi(I, I~, 1 - M)) of masks [B, h, w], without noise (iGOS++, Table 7)."""
    both = Problem.of(
        problem.backbone,
        problem.batch,
        problem.baselines,
        (Term(0, inserts=False, noisy=False), Term(0, inserts=True, noisy=False)),
        Regulariser(0.0, 0.0, "tv", 1.0, 1.0),
        problem.score,
        ig_steps=1,
        noise=0.0,
        seed=0,
    )
    return both.value(mask[:, None], torch.ones(1, dtype=torch.long), 0)
