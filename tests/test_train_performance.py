"""The test report against scikit-learn and scipy, with and without weights; and the losses against plain sums."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn import metrics

from ibxai.backbones import performance as module
from ibxai.backbones.losses import BCE, MSE, USUAL, CrossEntropy, WeightedBCE
from ibxai.backbones.performance import ALL, performance, table


def draws(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def found(*arguments: object) -> dict[tuple[str, str], module.Score]:
    return {(score.output, score.metric): score for score in performance(*arguments)}  # type: ignore[arg-type]


def test_one_output_is_as_scikit_learn_has_it_also_with_weights() -> None:
    random = draws()
    true = random.random(60) < 0.3
    score = np.round(random.normal(size=60) + true, 1)  # with ties
    said = score > 0.5
    weights = random.integers(0, 4, (3, 60)).astype(float)
    of_each = module._of_one(weights, true, said, score)
    for row, weight in enumerate(weights):
        wanted = {
            "accuracy": metrics.accuracy_score(true, said, sample_weight=weight),
            "sensitivity": metrics.recall_score(true, said, sample_weight=weight),
            "specificity": metrics.recall_score(~true, ~said, sample_weight=weight),
            "precision": metrics.precision_score(true, said, sample_weight=weight),
            "f1": metrics.f1_score(true, said, sample_weight=weight),
            "roc_auc": metrics.roc_auc_score(true, score, sample_weight=weight),
            "average_precision": metrics.average_precision_score(true, score, sample_weight=weight),
        }
        assert {name: values[row] for name, values in of_each.items()} == pytest.approx(wanted)


def test_values_are_as_scipy_has_them_in_a_resample() -> None:
    random = draws(1)
    answer = random.integers(0, 6, 40).astype(float)  # with ties
    value = np.round(answer + random.normal(size=40), 1)
    weights = random.integers(0, 3, (2, 40))
    of_each = module._of_values(weights.astype(float), value, answer)
    for row, weight in enumerate(weights):
        drawn, right = np.repeat(value, weight), np.repeat(answer, weight)
        wanted = {
            "mae": metrics.mean_absolute_error(right, drawn),
            "mse": metrics.mean_squared_error(right, drawn),
            "pearson": stats.pearsonr(drawn, right)[0],
            "spearman": stats.spearmanr(drawn, right)[0],
        }
        assert {name: values[row] for name, values in of_each.items()} == pytest.approx(wanted)


def test_classes_all_and_each() -> None:
    random = draws(2)
    answers = random.integers(0, 3, 90)
    outputs = random.normal(size=(90, 3)) + 1.5 * np.eye(3)[answers]
    scores = found(outputs, answers, [str(i) for i in range(90)], ["a", "b", "c"], "class")
    assert scores[ALL, "accuracy"].value == pytest.approx(metrics.accuracy_score(answers, outputs.argmax(1)))
    assert scores[ALL, "f1"].value == pytest.approx(metrics.f1_score(answers, outputs.argmax(1), average="macro"))
    chance = torch.from_numpy(outputs).softmax(1).numpy()
    area = metrics.roc_auc_score(answers, chance, multi_class="ovr", average="macro")
    assert scores[ALL, "roc_auc"].value == pytest.approx(area)
    assert scores["b", "sensitivity"].value == pytest.approx((outputs.argmax(1) == 1)[answers == 1].mean())
    assert all(score.low <= score.value <= score.high for score in scores.values())


def test_known_extremes() -> None:
    labels = np.array([[1, 0], [0, 0], [1, 0], [0, 0]], dtype=float)
    scores = found(8 * labels - 4, labels, list("abcd"), ["seen", "never"], "labels")
    for metric in ("accuracy", "sensitivity", "specificity", "precision", "f1", "roc_auc", "average_precision"):
        assert scores["seen", metric].value == 1
    for metric in ("sensitivity", "precision", "roc_auc", "average_precision"):  # nobody has it
        assert math.isnan(scores["never", metric].value)
        assert scores[ALL, metric].value == 1  # the mean is over those that are defined
    assert scores["never", "specificity"].value == 1
    worst = found(4 - 8 * labels[:, :1], labels[:, :1], list("abcd"), ["seen"], "labels")
    assert worst["seen", "roc_auc"].value == worst["seen", "accuracy"].value == 0
    assert (ALL, "accuracy") not in worst


def test_groups_are_resampled_and_not_pictures() -> None:
    """100 pictures of two patients are no more evidence than two."""
    answers = np.array([[float(i % 2)] for i in range(100)])
    outputs = np.where(np.arange(100) < 50, 1, -1)[:, None] * (2 * answers - 1)  # one patient all right, one all wrong
    of_two = found(outputs, answers, ["a"] * 50 + ["b"] * 50, ["x"], "labels")["x", "accuracy"]
    assert (of_two.low, of_two.value, of_two.high) == (0, 0.5, 1)
    alone = found(outputs, answers, [str(i) for i in range(100)], ["x"], "labels")["x", "accuracy"]
    low, high = stats.binom(100, 0.5).ppf([0.025, 0.975]) / 100
    assert (alone.low, alone.high) == pytest.approx((low, high), abs=0.02)
    assert math.isnan(found(outputs, answers, ["a"] * 100, ["x"], "labels")["x", "accuracy"].low)


def test_the_table_has_every_number() -> None:
    scores = performance(np.eye(3), np.arange(3), list("abc"), ["cat", "dog", "owl"], "class")
    lines = table(scores)
    assert [line.split()[0] for line in lines] == ["accuracy", "all", "95", "cat", "dog", "owl"]
    assert lines[1].split()[1:] == ["1.000"] * 7
    assert len({len(line) for line in lines}) == 1


# losses


def test_weighted_bce_is_equation_8() -> None:
    random = torch.Generator().manual_seed(0)
    outputs = torch.randn(20, 3, generator=random)
    answers = (torch.rand(20, 3, generator=random) < torch.tensor([0.1, 0.5, 0.8])).float()
    wanted = 0.0
    for k in range(3):
        present = sum(float(answer) for answer in answers[:, k])
        beta = (20 - present) / present
        for i in range(20):
            p, y = 1 / (1 + math.exp(-float(outputs[i, k]))), float(answers[i, k])
            wanted -= (beta * y * math.log(p) + (1 - y) * math.log(1 - p)) / 60
    assert float(WeightedBCE().make(answers)(outputs, answers)) == pytest.approx(wanted, rel=1e-5)


def test_a_label_that_all_have_or_none_weighs_one() -> None:
    answers = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    outputs = torch.randn(2, 2, generator=torch.Generator().manual_seed(1))
    assert torch.equal(WeightedBCE().make(answers)(outputs, answers), BCE().make(answers)(outputs, answers))


def test_the_usual_losses() -> None:
    assert {kind: type(loss) for kind, loss in USUAL.items()} == {
        "class": CrossEntropy, "labels": WeightedBCE, "values": MSE,
    }  # fmt: skip
    assert all(loss.answers == kind for kind, loss in USUAL.items())
    uniform = CrossEntropy().make(torch.zeros(1))(torch.zeros(4, 5), torch.arange(4))
    assert float(uniform) == pytest.approx(math.log(5))
    assert float(MSE().make(torch.zeros(1))(torch.tensor([[1.0, 3.0]]), torch.zeros(1, 2))) == 5
