"""How good a trained network is on pictures that it has not seen, with 95 % intervals.

Of classes and labels, one output against the rest: accuracy, sensitivity (= recall), specificity, precision, F1, and
without a threshold the area under the ROC curve and the average precision. Of values: mean absolute and squared error,
Pearson's and Spearman's correlation. The line "all" is the mean over the outputs; its accuracy of classes is the share
of pictures whose highest output is right. A label counts as said where its probability is one half or more.

Intervals lie between the 2.5th and 97.5th percentile of 1,000 resamples of groups (patients, studies), as in
`report/statistics.py`. A resample is a weight a picture, and all of them are computed at once: scikit-learn's functions
take one weighting at a time, which for ten classes and 10,000 pictures is minutes; the tests hold these to them. Where
something is undefined, such as the sensitivity to a label that nobody has, there is NaN.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ibxai.report.statistics import times_drawn
from ibxai.targets import AnswerKind

RESAMPLES = 1_000
ALL = "all"
_AT_ONCE = 4_000_000  # weights that are held at once: 32 MB


@dataclass(frozen=True)
class Score:
    """One number of the test report. output: its name, or "all". low, high: 95 % interval; NaN with one group."""

    output: str
    metric: str
    value: float
    low: float
    high: float


def performance(
    outputs: np.ndarray, answers: np.ndarray, groups: Sequence[str], names: Sequence[str], kind: AnswerKind
) -> list[Score]:
    """outputs: [N, K], logits or values; answers: int [N] of "class", [N, K] of the others; groups: [N]; names: [K]."""
    outputs = np.asarray(outputs, dtype=np.float64)
    member = np.unique(np.asarray(groups, dtype=str), return_inverse=True)[1]
    whole = _measured(np.ones((1, len(outputs))), outputs, answers, kind)
    resampled: dict[tuple[int, str], list[np.ndarray]] = {}
    for weights in _resamples(member):
        for key, values in _measured(weights, outputs, answers, kind).items():
            resampled.setdefault(key, []).append(values)
    scores = []
    for (output, metric), value in whole.items():
        drawn = np.concatenate(resampled.get((output, metric), [np.full(1, np.nan)]))
        drawn = drawn[np.isfinite(drawn)]
        low, high = np.percentile(drawn, [2.5, 97.5]) if drawn.size else (np.nan, np.nan)
        scores.append(Score(names[output] if output >= 0 else ALL, metric, float(value[0]), float(low), float(high)))
    return scores


def table(scores: Sequence[Score]) -> list[str]:
    """The lines for a terminal: the mean over outputs with its intervals, and below each output's numbers."""
    outputs, metrics = (list(dict.fromkeys(getattr(s, name) for s in scores)) for name in ("output", "metric"))
    found = {(s.output, s.metric): s for s in scores}
    first = max(len(name) for name in (*outputs, ALL)) + 2
    width = max(len(metric) for metric in metrics) + 2
    lines = ["".join([" " * first, *(f"{metric:>{width}}" for metric in metrics)])]
    for output in outputs:
        own = [found.get((output, metric)) for metric in metrics]
        lines.append(f"{output:{first}}" + "".join(f"{s.value:{width}.3f}" if s else " " * width for s in own))
        if output == outputs[0]:
            intervals = [f"{s.low:.3f}-{s.high:.3f}" if s else "" for s in own]
            lines.append(f"{'95 %':{first}}" + "".join(f"{text:>{width}}" for text in intervals))
    return lines


def _resamples(member: np.ndarray) -> Iterator[np.ndarray]:
    """[R, N] each: how often every picture stands in a resample of the groups. None with fewer than two groups."""
    groups = int(member.max()) + 1
    generator, chunk = np.random.default_rng(0), max(1, _AT_ONCE // len(member))
    for start in range(0, RESAMPLES if groups > 1 else 0, chunk):
        yield times_drawn(generator, min(chunk, RESAMPLES - start), groups)[:, member]


def _measured(
    weights: np.ndarray, outputs: np.ndarray, answers: np.ndarray, kind: AnswerKind
) -> Mapping[tuple[int, str], np.ndarray]:
    """(output, or -1 for all; metric) -> [R], the whole first. weights: [R, N]."""
    count = outputs.shape[1]
    with np.errstate(divide="ignore", invalid="ignore"):
        if kind == "values":
            of_each = [_of_values(weights, outputs[:, k], answers[:, k]) for k in range(count)]
        else:
            highest = outputs.argmax(1)
            said = highest[:, None] == np.arange(count) if kind == "class" else outputs >= 0
            true = answers[:, None] == np.arange(count) if kind == "class" else answers > 0.5
            scores = _softmax(outputs) if kind == "class" else outputs
            of_each = [_of_one(weights, true[:, k], said[:, k], scores[:, k]) for k in range(count)]
        found = {(k, metric): values for k in range(count) for metric, values in of_each[k].items()}
        if count == 1:
            return found
        means = {(-1, metric): _mean([of_one[metric] for of_one in of_each]) for metric in of_each[0]}
        if kind == "class":
            means[-1, "accuracy"] = weights @ (highest == answers) / weights.sum(1)
    return means | found


def _mean(of_each: Sequence[np.ndarray]) -> np.ndarray:
    """[R]: over the outputs where it is defined."""
    stacked = np.stack(of_each)
    defined = np.isfinite(stacked)
    return np.where(defined, stacked, 0).sum(0) / defined.sum(0)


def _softmax(outputs: np.ndarray) -> np.ndarray:
    powers = np.exp(outputs - outputs.max(1, keepdims=True))
    return powers / powers.sum(1, keepdims=True)


def _of_one(weights: np.ndarray, true: np.ndarray, said: np.ndarray, score: np.ndarray) -> dict[str, np.ndarray]:
    """One output against the rest, [R] each. true, said: bool [N]; score: [N]."""
    hits, misses = weights @ (true & said), weights @ (true & ~said)
    alarms, passes = weights @ (~true & said), weights @ (~true & ~said)
    return {
        "accuracy": (hits + passes) / weights.sum(1),
        "sensitivity": hits / (hits + misses),
        "specificity": passes / (passes + alarms),
        "precision": hits / (hits + alarms),
        "f1": 2 * hits / (2 * hits + misses + alarms),
        **_without_threshold(weights, true, score),
    }


def _without_threshold(weights: np.ndarray, true: np.ndarray, score: np.ndarray) -> dict[str, np.ndarray]:
    """ROC AUC: the share of (present, absent) pairs in the right order, equal scores half. Average precision: precision
    at each score, weighted by the presences found there.
    """
    present, absent = (_by_score(weights * of, score) for of in (true, ~true))
    below = absent.cumsum(1) - absent
    pairs = (present * (below + absent / 2)).sum(1)
    found, shown = (part[:, ::-1].cumsum(1)[:, ::-1] for part in (present, present + absent))
    precision = np.divide(found, shown, out=np.zeros_like(found), where=shown > 0)
    total = present.sum(1)
    return {
        "roc_auc": pairs / (total * absent.sum(1)),
        "average_precision": (present * precision).sum(1) / total,
    }


def _by_score(weights: np.ndarray, score: np.ndarray) -> np.ndarray:
    """[R, distinct scores]: the weights of the pictures with each score, the lowest first."""
    order = np.argsort(score, kind="stable")
    starts = np.flatnonzero(np.diff(score[order], prepend=-np.inf))
    return np.add.reduceat(weights[:, order], starts, axis=1)


def _of_values(weights: np.ndarray, value: np.ndarray, answer: np.ndarray) -> dict[str, np.ndarray]:
    """One real output, [R] each."""
    total, error = weights.sum(1), value - answer
    return {
        "mae": weights @ np.abs(error) / total,
        "mse": weights @ error**2 / total,
        "pearson": _correlation(weights, value[None], answer[None]),
        "spearman": _correlation(weights, _ranks(weights, value), _ranks(weights, answer)),
    }


def _correlation(weights: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """[R]: Pearson's, of a and b [R or 1, N]."""
    total = weights.sum(1, keepdims=True)
    a, b = (x - (weights * x).sum(1, keepdims=True) / total for x in (a, b))
    products = [(weights * x * y).sum(1) for x, y in ((a, b), (a, a), (b, b))]
    return products[0] / np.sqrt(products[1] * products[2])


def _ranks(weights: np.ndarray, values: np.ndarray) -> np.ndarray:
    """[R, N]: the mean rank of each value among the values as often as they were drawn."""
    place = np.unique(values, return_inverse=True)[1]
    drawn = _by_score(weights, values)
    return (drawn.cumsum(1) - drawn + (drawn + 1) / 2)[:, place]
