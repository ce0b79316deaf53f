"""Metrics on texts: tokens become `<unk>`, lengths differ, padding never counts; beside slow re-derivations."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from networks import relative
from test_method_contract import state_of
from test_metric_contract import metric_of
from texts import BAD, GOOD, LENGTHS, evidence_backbone, neutral_rows, text_backbone, text_batch, token_rows
from torch import Tensor

from ibxai.backbones import TextBackbone
from ibxai.catalogue import entries
from ibxai.errors import UserError
from ibxai.metrics import Deletion, Insertion, SensitivityN
from ibxai.metrics.insertion import changed_counts, changed_tokens
from ibxai.metrics.sensitivity_n import token_set_sizes
from ibxai.modality import modalities
from ibxai.responses import KeptResponses
from ibxai.tokenisation import UNKNOWN_ID
from ibxai.types import Attribution, Batch, Metric

QUICK: Mapping[str, Mapping[str, Any]] = {
    "sensitivity_n": {"points": 4, "sets": 12},
    "sensitivity_n_regression": {"points": 4, "sets": 12},
    "insertion_chexplain": {"step": 3},
    "deletion_chexplain": {"step": 3},
    "insertion_input_iba": {"step": 3},
    "deletion_input_iba": {"step": 3},
}
NAMES = [
    name
    for name in entries()["metric"]
    if "text" in modalities(metric_of(name)) and not name.endswith(("igospp", "regression"))
]


def quick(name: str) -> Metric:
    return metric_of(name, **QUICK.get(name, {}))


def five(backbone: TextBackbone, padding: int = 0) -> Batch:
    return text_batch(backbone, token_rows(), [0, 1, 2, 3, 4], padding=padding)


def maps(padding: int = 0) -> Attribution:
    """Signed, with ties, and 0 in the padding."""
    values = torch.randn(5, max(LENGTHS), generator=torch.Generator().manual_seed(2)).mul(2).round() / 2
    values[torch.arange(max(LENGTHS)) >= torch.tensor(LENGTHS)[:, None]] = 0
    return Attribution(torch.nn.functional.pad(values, (0, padding)), "score")


Found = Mapping[str, Tensor]


def same(found: Found, wanted: Found, rows: Any = slice(None), tolerance: float = 1e-5) -> None:
    assert found.keys() == wanted.keys()
    for name, values in wanted.items():
        assert torch.equal(found[name].isnan(), values[rows].isnan()), name
        assert relative(found[name].nan_to_num(), values[rows].nan_to_num()) < tolerance, name


@pytest.fixture(scope="module", params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def whole(name: str) -> Found:
    backbone = text_backbone()
    return quick(name)(backbone, five(backbone), maps())


def test_the_issue_names_these() -> None:
    assert {"insertion", "deletion", "insertion_input_iba", "deletion_input_iba", "sensitivity_n"} <= set(NAMES)


def test_alone_in_a_batch_and_in_any_order(name: str, whole: Found) -> None:
    backbone = text_backbone()
    for rows in ([0], [3], [3, 1], [3, 0, 4, 1, 2]):
        same(quick(name)(backbone, five(backbone).take(rows), maps().take(rows)), whole, rows)


def test_padding_changes_nothing(name: str, whole: Found) -> None:
    backbone = text_backbone()
    same(quick(name)(backbone, five(backbone, 6), maps(6)), whole)
    heated = maps(6)  # a map that has something in the padding
    heated.heatmap[0, LENGTHS[0] :] = 9.0
    same(quick(name)(backbone, five(backbone, 6), heated), whole)
    alone = text_batch(backbone, [token_rows()[1]], [1], ["text1"])
    short = Attribution(maps().heatmap[1:2, : LENGTHS[1]], "score")
    same(quick(name)(backbone, alone, short), whole, [1])


@pytest.mark.parametrize("most", [1, 7])
def test_in_passes_of_any_size(name: str, whole: Found, most: int) -> None:
    backbone = text_backbone(most)
    same(quick(name)(backbone, five(backbone).take([0, 1, 2]), maps().take([0, 1, 2])), whole, [0, 1, 2], 1e-4)


def test_nothing_is_left_behind(name: str) -> None:
    backbone = text_backbone()
    batch, before = five(backbone), state_of(backbone)
    inputs = batch.inputs.clone()
    quick(name)(backbone, batch, maps())
    assert state_of(backbone) == before
    assert torch.equal(batch.inputs, inputs)


def test_nan_stays_with_its_row(name: str, whole: Found) -> None:
    backbone, attribution = text_backbone(), maps()
    attribution.heatmap[2, 3] = torch.nan
    found = quick(name)(backbone, five(backbone), attribution)
    assert found[next(key for key in found if key in ("auc", "value"))][2].isnan()
    kept = [0, 1, 4]
    same({key: values[kept] for key, values in found.items()}, whole, kept)


# --- beside slow re-derivations


@pytest.mark.parametrize("inserting", [True, False])
@pytest.mark.parametrize("step", [1, 3, 0.25])
def test_the_curve_token_by_token(inserting: bool, step: float) -> None:
    """In plain Python, one text and one step at a time, on token numbers: what is gone is `<unk>`."""
    backbone = text_backbone()
    batch = five(backbone)
    heatmap = torch.randn(5, max(LENGTHS), generator=torch.Generator().manual_seed(8))  # no ties
    metric = (Insertion if inserting else Deletion)(step=step)
    found = metric(backbone, batch, Attribution(heatmap, "score"))
    for i, tokens in enumerate(token_rows()):
        order = np.argsort(-heatmap[i, : len(tokens)].numpy())
        size = step * len(tokens) if step < 1 else step
        counts = sorted({min(round(k * size), len(tokens)) for k in range(100)})
        wanted = []
        for count in counts:
            gone = order[count:] if inserting else order[:count]
            shown = tokens.clone()
            shown[torch.from_numpy(gone.copy())] = UNKNOWN_ID
            one = text_batch(backbone, [shown], [i])
            with torch.no_grad():
                wanted.append(float(backbone(one.inputs, one.valid).double().softmax(1)[0, i]))
        x = np.array(counts) / len(tokens)
        curve, fraction = found["curve"][i].numpy(), found["fraction"][i].numpy()
        np.testing.assert_allclose(np.unique(fraction), x.astype(np.float32), rtol=1e-6)
        np.testing.assert_allclose(curve[np.unique(fraction, return_index=True)[1]], wanted, atol=2e-5)
        assert np.ptp(curve[fraction == 1]) == 0
        assert float(found["auc"][i]) == pytest.approx(np.trapezoid(wanted, x), abs=2e-5)


@pytest.mark.parametrize(
    ("length", "step", "wanted"),
    [
        (10, 0.5, [0, 5, 10]),
        (10, 4, [0, 4, 8, 10, 10, 10, 10]),
        (24, 4, [0, 4, 8, 12, 16, 20, 24]),
        (1, 4, [0, 1, 1, 1, 1, 1, 1]),
        (7, 100, [0, 7]),
    ],
)
def test_changed_tokens(length: int, step: float, wanted: list[int]) -> None:
    assert changed_tokens(torch.tensor([length]), step, 24)[0].tolist() == wanted


def test_changed_tokens_agree_with_pixels() -> None:
    for length, step in ((24, 0.02), (24, 0.1), (24, 5), (17, 0.25)):
        assert (
            changed_tokens(torch.tensor([length]), step, 24).unique().tolist() == changed_counts(length, step).tolist()
        )


def test_set_sizes_of_texts() -> None:
    found = token_set_sizes(torch.tensor([100, 10, 1]), 3, 0.01, 0.64)
    assert found.tolist() == [[1, 8, 64], [1, 1, 6], [1, 1, 1]]
    assert token_set_sizes(torch.tensor([100]), 3, 4, 0.64).tolist() == [[4, 16, 64]]


def test_the_sets_of_sensitivity_n() -> None:
    """Each has its size, no padding, and every token its chance; those of one draw do not overlap while there are
    tokens left."""
    backbone = text_backbone()
    metric = SensitivityN(points=3, sets=60, smallest=2, largest=0.5)
    batch = text_batch(backbone, token_rows((12, 8)), [0, 1], padding=3)
    sizes, lengths = metric._sizes(batch)
    pieces = list(metric._sets(batch, 50))
    sample, members = torch.cat([piece[0] for piece in pieces]), torch.cat([piece[1] for piece in pieces])
    assert batch.valid is not None
    for i in range(2):
        own = members[sample == i].view(60, 3, -1)
        assert (own.sum(2) == sizes[i]).all()
        assert not own[..., ~batch.valid[i]].any()
        share = own[..., batch.valid[i]].float().mean((0, 1))
        assert (share - float(sizes[i].sum()) / 3 / int(lengths[i])).abs().max() < 0.12
        if int(sizes[i].sum()) <= int(lengths[i]):
            assert own.sum(1).max() == 1


def test_sensitivity_n_of_the_exact_shares_is_one() -> None:
    """`Evidence` adds up what its tokens say: gradient x input tells exactly what taking tokens away changes."""
    backbone = evidence_backbone(strength=2.0)
    generator = torch.Generator().manual_seed(4)
    rows = [torch.randint(1, 4, (length,), generator=generator).clamp(1, 3) for length in (12, 20, 9)]
    rows = [torch.where(row == BAD, torch.tensor(GOOD), row) for row in rows]  # of one sign: no ReLU is crossed
    batch = text_batch(backbone, rows, [0, 0, 0])
    exact = torch.where(batch.tokens == GOOD, 2.0, 0.0)  # type: ignore[arg-type]
    found = SensitivityN(points=4, sets=40, smallest=0.1)(backbone, batch, Attribution(exact, "score"))
    torch.testing.assert_close(found["value"], torch.ones(3), atol=1e-4, rtol=0)
    opposite = SensitivityN(points=4, sets=40, smallest=0.1)(backbone, batch, Attribution(-exact, "score"))
    torch.testing.assert_close(opposite["value"], -torch.ones(3), atol=1e-4, rtol=0)


def test_kept_responses_are_those_of_the_network(tmp_path: Path) -> None:
    """Of texts of different lengths, read back one by one."""
    backbone = text_backbone()
    metric, batch = SensitivityN(points=3, sets=5), five(backbone)
    made = KeptResponses(tmp_path).of(metric, backbone, batch.take([0, 1, 2]))
    again = KeptResponses(tmp_path).of(metric, backbone, batch)
    torch.testing.assert_close(again[:3], made)
    torch.testing.assert_close(again, metric.responses(backbone, batch))


# --- known extremes


def test_extremes() -> None:
    """One word says all: a map that marks it, one that leaves it out, and a constant one."""
    backbone = evidence_backbone()
    rows = neutral_rows([12, 20, 8, 16])
    for row, place in zip(rows, (3, 19, 0, 7), strict=True):
        row[place] = GOOD
    batch = text_batch(backbone, rows, [0] * 4)
    perfect = (batch.tokens == GOOD).float()  # type: ignore[union-attr]

    def area(metric: Metric, heatmap: Tensor) -> float:
        return float(metric(backbone, batch, Attribution(heatmap, "score"))["auc"].mean())

    for metric in (Insertion(step=1), Deletion(step=1)):
        sign = 1 if metric.higher_is_better else -1
        best, worst = area(metric, perfect), area(metric, 1 - perfect)
        chance = area(metric, torch.zeros_like(perfect))
        assert sign * best > sign * chance > sign * worst
    assert area(Insertion(step=1), perfect) > 0.97 - 0.5 / 8
    assert area(Deletion(step=1), perfect) == pytest.approx(0.5, abs=0.04)


def test_a_coarse_grid_is_for_pictures() -> None:
    backbone = text_backbone()
    with pytest.raises(UserError, match="resolution=4 is for pictures"):
        Insertion(resolution=4)(backbone, five(backbone), maps())


def test_sizes_that_cannot_be() -> None:
    with pytest.raises(UserError, match="above 0"):
        dataclasses.replace(SensitivityN(), smallest=0.0)
