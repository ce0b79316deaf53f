"""Severity: from the heatmaps of a whole scan to its grade, CT-0 to CT-4, by the share of the lung that is hot.

    share = hot lung pixels / lung pixels, over all slices of the study
    CT-1 up to 25 % of the lung, CT-2 up to 50 %, CT-3 up to 75 %, CT-4 above       (IBA-CT, Table 1)

Demir et al., "Information Bottleneck Attribution for Visual Explanations of Diagnosis and Prognosis", MLMI 2021,
promise a severity from heatmaps cut to the lungs, and say neither what is hot nor what came of it. A heatmap has no
natural border. One threshold serves all slices: the quantile `level` of what the method shows in the lungs of the
healthy studies of the train split, which suits maps of any unit; or a number in the map's unit (bits a pixel of a
bottleneck). Something is hot in a healthy lung too then, hence a least share for CT-1; the rule has it at 0.

What a map's values mean from one slice to the next is the method's affair. Bits are what the network needs to say the
class, and of a lung that is ill all over it needs few, so that heat falls with the grade; scale=slice then makes every
slice's maximum 1, and loses how much one slice has more than another.

The calibrated grade takes no bounds for granted: the train split's grades as a rising function of the share (isotonic
regression), rounded. Threshold and calibration see the train split alone, and no study is in both.

Of each slice a thousand of its lung's values are kept, evenly through their order: from them any threshold's share
follows to 0.05 %, and neither the train split's heatmaps have to be stored nor all of its pixels held in memory.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import ClassVar, Literal

import numpy as np
import torch
from scipy.stats import rankdata
from sklearn.isotonic import IsotonicRegression
from torch import Tensor

from ibxai.cells import Cell, Coordinates
from ibxai.datasets.loading import load_batches, sample_table_digest
from ibxai.datasets.splits import order
from ibxai.errors import UserError
from ibxai.identity import annotations_digest
from ibxai.memory import with_backoff
from ibxai.metrics.localisation import region_of
from ibxai.metrics.normalisation import undefined, with_sign
from ibxai.metrics.study import Task
from ibxai.types import Attributor, Batch, Sample, Score

ALL, SHARE, RULE, CALIBRATED = "all", "hot share", "rule", "calibrated"
_KEPT = 1000  # values of a slice
_PIECE = 256  # slices of the train split whose values share a file
_RESAMPLES = 10_000


@dataclass(frozen=True)
class Severity:
    """rule: of the threshold, "healthy" (the quantile `level` of the lung pixels of the train split's healthy studies)
    or "absolute" (`level` in the map's unit); what is above it is hot. cuts: the shares above which a study is CT-1,
    CT-2, CT-3, CT-4. scale: "none", or "slice": each map is divided by its maximum first. train_studies: how many
    studies of the train split are explained for threshold and calibration, chosen by a hash; null: all; 0: none, and no
    calibrated grade.
    """

    rule: Literal["healthy", "absolute"] = "healthy"
    level: float = 0.99
    cuts: tuple[float, ...] = (0.02, 0.25, 0.5, 0.75)
    scale: Literal["none", "slice"] = "none"
    train_studies: int | None = None

    version: ClassVar[int] = 1
    uses_regions: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.scale not in ("none", "slice"):
            raise UserError(f"study.scale is '{self.scale}': none or slice is expected.")
        if list(self.cuts) != sorted(set(self.cuts)) or not self.cuts or not 0 <= self.cuts[0] <= self.cuts[-1] < 1:
            raise UserError(f"study.cuts is {list(self.cuts)}: rising shares of the lung, 0 to 1, are expected.")
        if self.rule == "healthy" and not 0 <= self.level <= 1:
            raise UserError(f"study.level is {self.level:g}: a quantile, 0 to 1, is expected with study.rule=healthy.")
        if self.train_studies is not None and self.train_studies < (self.rule == "healthy"):
            raise UserError(f"study.train_studies is {self.train_studies}: study.rule={self.rule} needs more.")

    def check(self, task: Task) -> None:
        """Raises UserError without grades, lungs or a train split, and unless one class is explained in all slices."""
        study, dataset = task.cells.key.name, task.dataset
        if not hasattr(dataset, "grades"):
            raise UserError(f"study={study} needs studies with a grade, such as those of mosmed and phantom_ct.")
        if getattr(dataset, "lungs", None) == "none":
            raise UserError(f"study={study} counts lung pixels: choose dataset.lungs=threshold.")
        names = task.target.names()
        if len(names) != 1 or not names[0].isdecimal():
            raise UserError(
                f"study={study} compares the evidence for one class, ill or not: explain one, target=classes "
                "target.ids=[1]."
            )
        if self.train_studies != 0:
            self._train_samples(task)

    def __call__(self, task: Task) -> Iterator[Score]:
        """hot_share of every study, by grade with heat_a_pixel and both grades; accuracy and quadratic kappa of the
        rule's and the calibrated grades; Spearman's correlation of the share with the true grade.
        """
        data = _Data(self, task)
        for grading in (SHARE, RULE, *([CALIBRATED] if self.train_studies != 0 else [])):
            place: Coordinates = {"studies": ALL, "grading": grading}
            yield from task.cells.get(place, partial(data.graded, place)).scores()
        for grade in sorted({data.grades[sample.group_id] for sample in task.samples}):
            place = {"studies": f"CT-{grade}", "grading": ""}
            yield from task.cells.get(place, partial(data.of_grade, place, grade)).scores()

    def _train_samples(self, task: Task) -> Sequence[Sample]:
        samples = task.train_split(None)
        studies = sorted({sample.group_id for sample in samples}, key=lambda study: order("severity", study))
        chosen = set(studies[: self.train_studies])
        return [sample for sample in samples if sample.group_id in chosen]


@dataclass(frozen=True)
class Scans:
    """Slices, reduced to what thresholds need. values: [N, 1000] of their lungs, rising; pixels: [N], lung pixels;
    heat: [N], summed over the lung; highest: [N], of the whole map; studies: of each slice.
    """

    values: np.ndarray
    pixels: np.ndarray
    heat: np.ndarray
    highest: np.ndarray
    studies: tuple[str, ...]

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The studies in which lung was seen, sorted."""
        return tuple(sorted({study for study, count in zip(self.studies, self.pixels, strict=True) if count}))

    def scaled(self) -> Scans:
        """Every map divided by its maximum; one without a positive value stays."""
        over = np.where(self.highest > 0, self.highest, 1)
        return replace(self, values=self.values / over[:, None], heat=self.heat / over, highest=self.highest / over)

    def shares(self, threshold: float) -> np.ndarray:
        """[S]: of each study in `names`, the share of its lung that is above the threshold."""
        return self._summed((self.values > threshold).mean(1) * self.pixels) / self._summed(self.pixels)

    def heat_a_pixel(self) -> np.ndarray:
        """[S], in the map's unit."""
        return self._summed(self.heat) / self._summed(self.pixels)

    def quantile(self, level: float, studies: set[str]) -> float:
        """The value that a share `level` of the lung pixels of these studies does not exceed."""
        chosen = np.array([study in studies for study in self.studies], dtype=bool)
        values = self.values[chosen].ravel()
        rising = values.argsort()
        mass = np.repeat(self.pixels[chosen], self.values.shape[1])[rising].cumsum()
        return float(values[rising][np.searchsorted(mass, level * mass[-1])])

    def _summed(self, of_slices: np.ndarray) -> np.ndarray:
        place = {study: number for number, study in enumerate(self.names)}
        seen = [place.get(study, len(place)) for study in self.studies]  # one without lung goes to the end
        return np.bincount(seen, weights=of_slices, minlength=len(place))[: len(place)]


def reduced(heatmap: Tensor, lungs: Tensor) -> Tensor:
    """float64 [B, 1003]: of maps [B, H, W] and lungs bool [B, H, W] what `Scans` keeps: values, pixels, heat, highest.

    A map that holds NaN counts as a slice without lung. What speaks against the target counts as 0.
    """
    heat = with_sign(heatmap.nan_to_num(), "positive").double().flatten(1)
    inside = (lungs & ~undefined(heatmap)[:, None, None]).flatten(1)
    pixels = inside.sum(1, keepdim=True)
    rising = heat.masked_fill(~inside, torch.inf).sort(1).values  # what is no lung goes to the end
    places = (torch.arange(_KEPT, device=heat.device) + 0.5) / _KEPT * pixels
    values = rising.gather(1, places.long()).masked_fill(pixels == 0, 0)
    return torch.cat([values, pixels, (heat * inside).sum(1, keepdim=True), heat.amax(1, keepdim=True)], 1)


@dataclass(frozen=True)
class _Data:
    """Both splits, reduced; nothing is read before a cell asks for it."""

    study: Severity
    task: Task

    @cached_property
    def grades(self) -> Mapping[str, int]:
        grades: Mapping[str, int] = self.task.dataset.grades()  # type: ignore[attr-defined]  # `check` has looked
        return grades

    @cached_property
    def test(self) -> Scans:
        found: list[np.ndarray] = []
        studies: list[str] = []
        for explained in self.task.explained():
            found.append(reduced(explained.heatmaps, _lungs(explained.batch)).cpu().numpy())
            studies += explained.batch.group_ids
        return self._scans(found, studies)

    @cached_property
    def train(self) -> Scans:
        """Explained now, by the method as it was fitted for the run; kept beside the study, some hundred to a file."""
        task, samples = self.task, self.study._train_samples(self.task)
        told = f"{self.study.version} {annotations_digest(task.dataset)}"
        attributors: list[Attributor] = []  # fitted when the first file is missing

        def made(piece: Sequence[Sample]) -> np.ndarray:
            if not attributors:
                attributors.append(task.attributor())
            found = {sample.sample_id: np.zeros(_KEPT + 3) for sample in piece}  # without lung, if it cannot be read
            work, preprocessing = [(sample, (0,)) for sample in piece], task.backbone.preprocessing
            for loaded in load_batches(task.dataset, work, task.target, preprocessing, task.batch_size, task.workers):
                if loaded.batch is not None:
                    values = with_backoff(
                        partial(explained, loaded.batch), task.backbone, "method", loaded.batch.inputs.shape[1:]
                    )
                    found |= dict(zip(loaded.batch.sample_ids, values, strict=True))
            return np.stack(list(found.values()))

        def explained(batch: Batch) -> np.ndarray:
            batch = batch.to(task.device).bound(task.backbone)
            return reduced(attributors[0](batch).heatmap, _lungs(batch)).cpu().numpy()

        pieces = [samples[start : start + _PIECE] for start in range(0, len(samples), _PIECE)]
        names = [hashlib.sha256(f"{told} {sample_table_digest(piece)}".encode()).hexdigest() for piece in pieces]
        found = [
            task.cells.kept(f"lung-values-{name[:12]}", partial(made, piece))
            for name, piece in zip(names, pieces, strict=True)
        ]
        return self._scans(found, [sample.group_id for sample in samples])

    def _scans(self, found: Sequence[np.ndarray], studies: Sequence[str]) -> Scans:
        whole = np.concatenate([np.zeros((0, _KEPT + 3)), *found])
        pixels, heat, highest = whole[:, _KEPT:].T
        scans = Scans(whole[:, :_KEPT], pixels, heat, highest, tuple(studies))
        return scans.scaled() if self.study.scale == "slice" else scans

    @cached_property
    def threshold(self) -> float:
        """In the map's unit. Raises UserError when no healthy study is there to say."""
        if self.study.rule == "absolute":
            return self.study.level
        healthy = {study for study in self.train.names if self.grades[study] == 0}
        if not healthy:
            raise UserError("study.rule=healthy needs a CT-0 study in the train split: raise study.train_studies.")
        return self.train.quantile(self.study.level, healthy)

    @cached_property
    def shares(self) -> np.ndarray:
        return self.test.shares(self.threshold)

    def truth(self, scans: Scans) -> np.ndarray:
        return np.array([self.grades[study] for study in scans.names])

    def predicted(self, grading: str) -> np.ndarray:
        """[S]: the grade of each test study."""
        if grading == RULE:
            return np.searchsorted(self.study.cuts, self.shares)
        fitted = IsotonicRegression(out_of_bounds="clip")
        fitted.fit(self.train.shares(self.threshold), self.truth(self.train))
        return np.rint(fitted.predict(self.shares)).astype(int)

    def graded(self, place: Coordinates) -> Cell:
        """How a grading does on all test studies."""
        names, truth = self.test.names, self.truth(self.test)
        if place["grading"] == SHARE:
            low, high = interval(spearman, self.shares, truth)
            totals = {"spearman": float(spearman(self.shares, truth)), "threshold": self.threshold}
            values = {"hot_share": self.shares.tolist()}
            return Cell(place, names, names, values, totals, {"spearman": (low, high)})
        predicted = self.predicted(str(place["grading"]))
        totals = {"quadratic_kappa": float(quadratic_kappa(predicted, truth))}
        values = {"accuracy": (predicted == truth).astype(float).tolist()}
        return Cell(
            place, names, names, values, totals, {"quadratic_kappa": interval(quadratic_kappa, predicted, truth)}
        )

    def of_grade(self, place: Coordinates, grade: int) -> Cell:
        """What the test studies of one true grade look like; of CT-0 all heat is false."""
        chosen = self.truth(self.test) == grade
        names = tuple(np.array(self.test.names, dtype=object)[chosen])
        columns = {"hot_share": self.shares, "heat_a_pixel": self.test.heat_a_pixel()}
        for grading in (RULE, CALIBRATED) if self.study.train_studies != 0 else (RULE,):
            columns[f"{grading}_grade"] = self.predicted(grading).astype(float)
        return Cell(place, names, names, {name: column[chosen].tolist() for name, column in columns.items()})


def _lungs(batch: Batch) -> Tensor:
    return region_of(batch, "lungs").any(1)


def quadratic_kappa(predicted: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """[...]: Cohen's kappa with quadratic weights (Cohen 1968) of grades [..., S]; NaN where all grades are the same.

    1 - E (p - t)^2 / E (p - t')^2, where t' is the grade of any other study.
    """
    p, t = np.asarray(predicted, dtype=float), np.asarray(truth, dtype=float)
    chance = (p**2).mean(-1) + (t**2).mean(-1) - 2 * p.mean(-1) * t.mean(-1)
    with np.errstate(invalid="ignore"):
        return 1 - ((p - t) ** 2).mean(-1) / np.where(chance > 0, chance, np.nan)


def spearman(shares: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """[...]: the correlation of the ranks of [..., S], equal values sharing theirs; NaN where either is constant."""
    one, other = (rankdata(values, axis=-1) for values in (shares, truth))
    one, other = one - one.mean(-1, keepdims=True), other - other.mean(-1, keepdims=True)
    with np.errstate(invalid="ignore"):
        return (one * other).sum(-1) / np.sqrt((one**2).sum(-1) * (other**2).sum(-1))


def interval(statistic: Callable[..., np.ndarray], *columns: np.ndarray) -> tuple[float, float]:
    """95 % percentile bootstrap interval over studies, [S] each; resamples in which it is undefined are left out."""
    studies = len(columns[0])
    if studies < 2:
        return np.nan, np.nan
    drawn = np.random.default_rng(0).integers(studies, size=(_RESAMPLES, studies))
    found = statistic(*(column[drawn] for column in columns))
    if np.isnan(found).all():
        return np.nan, np.nan
    low, high = np.nanpercentile(found, [2.5, 97.5])
    return float(low), float(high)
