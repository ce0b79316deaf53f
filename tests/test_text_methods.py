"""Methods on texts: the contract that holds on pictures, padding that never counts, closed forms and planted words."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from networks import relative
from test_method_contract import BLIND, method_of, same, state_of
from texts import (
    BAD,
    GOOD,
    LENGTHS,
    evidence_backbone,
    neutral_rows,
    small_lstm,
    text_backbone,
    text_batch,
    token_rows,
)

from ibxai.backbones import TextBackbone
from ibxai.catalogue import entries
from ibxai.errors import UserError
from ibxai.methods import IBA, LIME, Gradient, GradientXInput, InputIBA, IntegratedGradients
from ibxai.methods.bottleneck import feature_noise
from ibxai.methods.feature_statistics import INPUT, estimate_statistics
from ibxai.methods.input_mask import WganEstimator, _read
from ibxai.methods.lime import different_words
from ibxai.modality import modalities
from ibxai.types import Attribution, Attributor, Batch, Method

QUICK: Mapping[str, Mapping[str, Any]] = {
    "input_iba_text": {"steps": 6, "draws": 3, "learning_rate": 1.0},
    "lime": {"samples": 64},
    "integrated_gradients_text": {"steps": 20},
}
ALL = [name for name in entries()["method"] if "text" in modalities(method_of(name))]
NAMES = [name for name in ALL if f"{name}_text" not in ALL]  # of the same class, with the settings of texts


def quick(name: str) -> Method:
    return dataclasses.replace(method_of(name), **QUICK.get(name, {}))  # type: ignore[type-var]


def reference(backbone: TextBackbone) -> list[Batch]:
    return [text_batch(backbone, token_rows((8, 3, 11, 6), seed=10 + i), [0] * 4) for i in range(3)]


def five(backbone: TextBackbone, padding: int = 0) -> Batch:
    return text_batch(backbone, token_rows(), [0, 1, 2, 3, 4], padding=padding)


@dataclass
class Fitted:
    name: str
    backbone: TextBackbone
    attribute: Attributor
    whole: Attribution


@pytest.fixture(scope="module", params=NAMES)
def fitted(request: pytest.FixtureRequest) -> Fitted:
    backbone = text_backbone()
    attribute = quick(request.param).fit(backbone, reference(backbone), 0)
    return Fitted(request.param, backbone, attribute, attribute(five(backbone)))


def cut(attribution: Attribution, length: int) -> Attribution:
    """The map without its last places, which hold no attribution."""
    assert not attribution.heatmap[:, length:].any()
    return Attribution(attribution.heatmap[:, :length], attribution.unit, attribution.diagnostics)


def test_the_issue_names_these() -> None:
    assert {"gradient", "iba", "input_iba", "integrated_gradients", "lime", "random"} <= set(ALL)
    assert not {"gradcam", "occlusion", "igospp", "multilayer_iba"} & set(ALL)


def test_the_heatmap(fitted: Fitted) -> None:
    heatmap = fitted.whole.heatmap
    assert heatmap.shape == (5, max(LENGTHS))
    assert heatmap.dtype == torch.float32
    assert heatmap.isfinite().all()
    assert not heatmap.requires_grad
    valid = five(fitted.backbone).valid
    assert valid is not None
    assert not heatmap[~valid].any()
    for i, j in itertools.combinations(range(5), 2):
        least = min(LENGTHS[i], LENGTHS[j])
        assert relative(heatmap[i, :least], heatmap[j, :least]) > 1e-3


def test_alone_in_a_batch_and_in_any_order(fitted: Fitted) -> None:
    for rows in ([3], [1, 3], [3, 0, 4, 1, 2]):
        same(fitted.attribute(five(fitted.backbone).take(rows)), fitted.whole.take(rows))


@pytest.mark.parametrize("padding", [7])
def test_more_padding_changes_nothing(fitted: Fitted, padding: int) -> None:
    same(cut(fitted.attribute(five(fitted.backbone, padding)), max(LENGTHS)), fitted.whole)


def test_less_padding_changes_nothing(fitted: Fitted) -> None:
    """A text of 4 tokens in a batch of its own, without any."""
    alone = text_batch(fitted.backbone, [token_rows()[1]], [1], ["text1"])
    same(fitted.attribute(alone), cut(fitted.whole.take([1]), 4))


def test_the_same_again_and_fitted_again(fitted: Fitted) -> None:
    same(fitted.attribute(five(fitted.backbone)), fitted.whole, 1e-7)
    backbone = text_backbone()
    torch.manual_seed(99)  # must not matter
    same(quick(fitted.name).fit(backbone, reference(backbone), 0)(five(backbone)), fitted.whole, 1e-6)


@pytest.mark.parametrize("most", [1, 7])
def test_in_passes_of_any_size(fitted: Fitted, most: int) -> None:
    backbone = text_backbone(most)
    found = quick(fitted.name).fit(backbone, reference(backbone), 0)(five(backbone).take([0, 1, 2]))
    same(found, fitted.whole.take([0, 1, 2]), 3e-3 if fitted.name.startswith("input_iba") else 1e-4)


def test_several_targets_of_one_text(fitted: Fitted) -> None:
    rows = text_batch(fitted.backbone, [token_rows()[0]] * 4, [3, 1, 1, 0], ["text0"] * 4)
    found = fitted.attribute(rows)
    assert relative(found.heatmap[2], found.heatmap[1]) < 1e-4
    if fitted.name not in BLIND:
        assert relative(found.heatmap[0], found.heatmap[1]) > 1e-3


def test_nothing_is_left_behind(fitted: Fitted) -> None:
    backbone = text_backbone()
    batch = five(backbone)
    inputs, before = batch.inputs.clone(), state_of(backbone)
    quick(fitted.name).fit(backbone, reference(backbone), 0)(batch)
    assert state_of(backbone) == before
    assert torch.equal(batch.inputs, inputs)
    assert not batch.inputs.requires_grad


# --- closed forms


def test_gradient_x_input_of_a_linear_network_is_its_share() -> None:
    backbone = evidence_backbone(strength=3.0)
    batch = text_batch(backbone, [torch.tensor([7, GOOD, 9, GOOD]), torch.tensor([BAD, 5])], [0, 1])
    found = GradientXInput(score="logit").fit(backbone, [], 0)(batch).heatmap
    torch.testing.assert_close(found, torch.tensor([[0.0, 3, 0, 3], [3, 0, 0, 0]]))
    sensitivity = Gradient(channels="sum_abs").fit(backbone, [], 0)(batch).heatmap
    assert sensitivity[0].tolist() == [0, 3, 0, 3]


def test_integrated_gradients_share_the_score_out() -> None:
    backbone = text_backbone()
    batch = five(backbone)
    found = IntegratedGradients(steps=200).fit(backbone, [], 0)(batch)
    with torch.no_grad():
        zero = torch.zeros_like(batch.inputs)
        full, empty = (backbone(x, batch.valid).double() for x in (batch.inputs, zero))
    rows = torch.arange(5)
    wanted = full[rows, rows] - empty[rows, rows]
    torch.testing.assert_close(found.heatmap.double().sum(1), wanted, rtol=1e-3, atol=1e-4)


def test_a_blur_of_a_text_is_refused() -> None:
    with pytest.raises(UserError, match="of texts choose"):
        IntegratedGradients(baseline="blur").fit(text_backbone(), [], 0)


def test_different_words() -> None:
    tokens = torch.tensor([[7, 3, 7, 9], [5, 5, 0, 0], [2, 0, 0, 0]])
    valid = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]]).bool()
    assert different_words(tokens, valid).tolist() == [[1, 0, 1, 2], [0, 0, -1, -1], [0, -1, -1, -1]]


def test_lime_of_a_linear_network_is_its_weights() -> None:
    """A word that comes twice is one variable, worth both."""
    backbone = evidence_backbone(strength=2.0)
    batch = text_batch(backbone, [torch.tensor([GOOD, 7, 9, GOOD, 11]), torch.tensor([8, BAD])], [0, 1])
    method = LIME(samples=400, ridge=1e-9, score="logit")
    found = method.fit(backbone, [], 0)(batch)
    torch.testing.assert_close(found.heatmap, torch.tensor([[4.0, 0, 0, 4, 0], [0, 2, 0, 0, 0]]), atol=1e-4, rtol=1e-4)
    assert found.diagnostics["segments"].tolist() == [4, 2]
    torch.testing.assert_close(found.diagnostics["r2"], torch.ones(2))


def test_statistics_of_texts_count_tokens_and_no_padding() -> None:
    backbone = text_backbone()
    batches = reference(backbone)
    found = estimate_statistics(backbone, ["bottleneck", INPUT], batches, 100, 0.0, 0.01)
    with torch.no_grad():
        network = small_lstm().eval()
        rows = [row for i in range(3) for row in token_rows((8, 3, 11, 6), seed=10 + i)]
        embedded = [network.embedding(row).double() for row in rows]
        double = network.double()
        latents = [double.lstm2(double.lstm1(one[None]))[0] for one in embedded]  # type: ignore[operator]
    for name, values in (("bottleneck", torch.cat(latents)), (INPUT, torch.cat(embedded))):
        torch.testing.assert_close(found[name].mean.double(), values.mean(0), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(found[name].std.double(), values.std(0, correction=0), atol=1e-5, rtol=1e-4)
        assert found[name].count == 3 * (8 + 3 + 11 + 6)
        assert not found[name].pooled


@pytest.mark.parametrize("beta_per", ["neuron", "pixel"])
def test_the_price_of_a_nat(beta_per: Any) -> None:
    """The search with a price so high that nothing else counts closes every mask; at no price it stays open."""
    backbone = text_backbone()
    settings: dict[str, Any] = {"learning_rate": 1.0, "steps": 30, "beta_per": beta_per}
    batch = five(backbone)
    valid = batch.valid
    assert valid is not None
    closed = IBA(beta=1e6, **settings).fit(backbone, reference(backbone), 0)(batch)
    opened = IBA(beta=0.0, **settings).fit(backbone, reference(backbone), 0)(batch)
    assert closed.heatmap.max() < 1e-3 * opened.heatmap[valid].min().clamp_min(0.1)
    torch.testing.assert_close(closed.heatmap.sum(1), closed.diagnostics["capacity"])
    torch.testing.assert_close(opened.heatmap.sum(1), opened.diagnostics["capacity"])


def test_a_step_of_iba_by_hand() -> None:
    """One step of Adam moves a logit by its rate, against the sign of the gradient of loss + beta x mean KL.

    Re-derived in float64, text by text, with the same noise.
    """
    backbone = text_backbone()
    batch, rate, beta, draws = five(backbone), 0.5, 15.0, 3
    reference_ = reference(backbone)
    method = IBA(beta=beta, learning_rate=rate, steps=1, draws=draws, initial_alpha=1.0)
    found = method.fit(backbone, reference_, 0)(batch)
    stats = estimate_statistics(backbone, ["bottleneck"], reference_, 100, 0.01, 0.01)["bottleneck"]
    network = small_lstm().double().eval()
    from ibxai.draws import sample_keys

    for i, tokens in enumerate(token_rows()):
        with torch.no_grad():
            features = network.lstm2(network.lstm1(network.embedding(tokens)[None]))[0]  # type: ignore[operator]
        keys = sample_keys(0, [f"text{i}"], "bottleneck lstm2")
        mean, std = stats.mean.double(), stats.std.double()
        alpha = torch.full_like(features, 1.0).requires_grad_()
        share = torch.sigmoid(alpha)
        loss = torch.zeros((), dtype=torch.float64)
        for draw in range(draws):
            noise = feature_noise(keys, torch.tensor([draw]), features.shape, True)[0].double()
            z = share * features + (1 - share) * (mean + std * noise)
            out = network.classifier(z.mean(0))
            loss = loss + torch.nn.functional.cross_entropy(out[None], torch.tensor([i])) / draws
        t = share * (features - mean) / std
        nats = 0.5 * ((1 - share) ** 2 + t**2 - 1) - (1 - share).log()
        (loss + beta * nats.mean()).backward()
        assert alpha.grad is not None
        gradient = alpha.grad
        moved = 1.0 - rate * gradient / (gradient.abs() + 1e-8)
        share = torch.sigmoid(moved)
        t = share * (features - mean) / std
        bits = ((0.5 * ((1 - share) ** 2 + t**2 - 1) - (1 - share).log()).sum(1) / math.log(2)).detach()
        torch.testing.assert_close(found.heatmap[i, : len(tokens)].double(), bits, rtol=2e-3, atol=2e-3)
        curve = found.diagnostics["target_loss_curve"][i, 0].double()
        torch.testing.assert_close(curve, loss.detach(), rtol=1e-4, atol=1e-5)


def test_the_classifier_reads_the_masked_sequence() -> None:
    """lambda = 0 everywhere changes the output; what is put into the padding does not."""
    backbone = text_backbone()
    batch = five(backbone)
    assert batch.valid is not None
    head, tail = backbone.split("bottleneck")
    with torch.no_grad():
        features = head(batch.inputs, batch.valid)
        out = backbone(batch.inputs, batch.valid)
        assert relative(tail(features), out) < 1e-5
        rows = torch.arange(5)
        noise = torch.randn(features.values.shape, generator=torch.Generator().manual_seed(0))
        assert (tail(features.replaced(noise, rows)) - out).abs().min(1).values.max() > 0.1
        padded = torch.where(batch.valid[..., None], features.values, 1e3 * noise)
        assert relative(tail(features.replaced(padded, rows)), out) < 1e-5
        inputs = torch.where(batch.valid[..., None], batch.inputs, torch.full_like(batch.inputs, 7.0))
        assert relative(backbone(inputs, batch.valid), out) < 1e-5


def test_the_noise_of_a_token_does_not_depend_on_the_padding() -> None:
    keys, steps = torch.tensor([5, -9]), torch.tensor([0, 3])
    short, long = (feature_noise(keys, steps, torch.Size([length, 6]), True) for length in (4, 9))
    assert torch.equal(long[:, :4], short)
    values = feature_noise(keys, steps, torch.Size([4000, 6]), True).double()
    assert values.mean().abs() < 0.02
    assert abs(values.std() - 1) < 0.02
    assert torch.corrcoef(values.flatten(0, 1).T).sub(torch.eye(6)).abs().max() < 0.05


def test_the_recurrent_critic() -> None:
    """Beside a loop in float64 over texts, latents and tokens."""
    generator = torch.Generator().manual_seed(0)
    inward, recurrent, last = (torch.randn(2, *shape, generator=generator) for shape in ((3, 4), (4, 4), (4,)))
    latents, valid = torch.randn(2, 5, 6, 3, generator=generator), torch.arange(6) < torch.tensor([[6], [2]])
    found = _read(valid, [inward, recurrent, last], latents)
    for text, draw in itertools.product(range(2), range(5)):
        state, said = torch.zeros(4, dtype=torch.float64), []
        for token in range(int(valid[text].sum())):
            arriving = latents[text, draw, token].double() @ inward[text].double()
            state = torch.tanh(arriving + state @ recurrent[text].double())
            said.append(state @ last[text].double())
        torch.testing.assert_close(found[text, draw].double(), torch.stack(said).mean(), rtol=1e-4, atol=1e-4)


def test_wgan_on_texts_does_not_feel_padding_or_neighbours() -> None:
    backbone = text_backbone()
    wgan = WganEstimator(steps=3, samples=20, batch=6, width=8)

    def method(settings: WganEstimator) -> InputIBA:
        return InputIBA(estimator="wgan", wgan=settings, output="prior")

    attribute = method(wgan).fit(backbone, reference(backbone), 0)
    whole = attribute(five(backbone))
    same(cut(attribute(five(backbone, 3)), max(LENGTHS)), whole, 1e-3)
    same(attribute(five(backbone).take([2, 0])), whole.take([2, 0]), 1e-3)
    assert whole.diagnostics["distance_curve"].shape == (5, 3)
    still = dataclasses.replace(wgan, critic_rate=0.0, mask_rate=0.0, mean_rate=0.0, std_rate=0.0)
    started = method(still).fit(backbone, reference(backbone), 0)(five(backbone))
    assert relative(started.heatmap, whole.heatmap) > 1e-3  # it learns something


# --- planted truth


@pytest.mark.parametrize(
    "method",
    [
        IBA(beta=0.5),  # a word that says so much costs more than it is worth at 10
        InputIBA(feature=IBA(beta=0.5), beta=5.0, learning_rate=0.5, steps=20, draws=4),
        LIME(samples=300),
        IntegratedGradients(),
        GradientXInput(),
    ],
    ids=lambda method: type(method).__name__,
)
def test_the_planted_word_is_first(method: Method) -> None:
    """Twenty texts of words that say nothing, and one that says all. Chance would find two; one number in six of the
    word's embedding says it, so that a mean over the masks of all six may miss one.
    """
    backbone = evidence_backbone()
    rows = neutral_rows([5 + i % 8 for i in range(20)])
    places = [(3 * i) % len(row) for i, row in enumerate(rows)]
    for row, place, word in zip(rows, places, itertools.cycle([GOOD, BAD]), strict=False):
        row[place] = word
    batch = text_batch(backbone, rows, [i % 2 for i in range(20)])
    around = neutral_rows([12] * 12, seed=5)
    for i, row in enumerate(around):
        row[i] = (GOOD, BAD)[i % 2]
    known = [text_batch(backbone, around, [0] * 12)]
    found = method.fit(backbone, known, 0)(batch).heatmap
    hits = sum(a == b for a, b in zip(found.argmax(1).tolist(), places, strict=True))
    assert hits >= (18 if isinstance(method, InputIBA) else 20)
