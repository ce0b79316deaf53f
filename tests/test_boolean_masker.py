"""Boolean masker: its terms against slow float64 re-derivations and limits, the notation, beta, a planted patch."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as lightning
import numpy as np
import pandas as pd
import pytest
import safetensors.torch
import torch
from networks import noise_pictures, patch_pictures, patches_backbone, small_backbone
from omegaconf import OmegaConf
from test_train import plan_of
from test_training import TINY as BLOCKS_NETWORK
from test_training import Blocks
from torch import Tensor, nn

from ibxai import pipeline, train
from ibxai.backbones.masker_networks import classifier, decoder, encoder, masking_network
from ibxai.backbones.training import InMemory, Recipe, collated
from ibxai.catalogue import entries
from ibxai.config import build
from ibxai.errors import UserError
from ibxai.methods.boolean_masker import BooleanMasker
from ibxai.methods.masker_loop import MaskerLearning
from ibxai.methods.masker_model import MaskerModel, Networks, Objective
from ibxai.methods.masker_objective import (
    Control,
    boolean_mask,
    held,
    latent_nats,
    mask_nats,
    pixel_nats,
    relaxed_mask,
    straight_through,
    weighted_gradient,
    with_rectangles,
)
from ibxai.methods.masker_training import criteria
from ibxai.preprocessing import Preprocessing
from ibxai.targets import ClassTarget, Predicted
from ibxai.types import Batch

NAMES = [name for name in entries()["method"] if name.startswith("boolean_masker")]
SIZES = {
    "boolean_masker": 28,
    "boolean_masker_anchors": 32,
    "boolean_masker_cifar10": 32,
    "boolean_masker_digits": 56,
    "boolean_masker_svhn": 128,
}
PAPERS = {  # where the default has others of ours
    "boolean_masker": Networks(
        masker="[C(1,1,4) -> C(3,2,4) -> C(1,1,8) -> C(3,2,8)] "
        "-> [Resize(12) -> C(1,1,16) -> Pad(1) -> Resize(28) -> C(1,1,16) -> C(1,1,1)]",
        classifier="C(1,1,4) -> C(3,2,4) -> C(1,1,8) -> C(3,2,8) -> C(1,1,16) -> C(3,2,16) -> Avg",
        encoder="C(3,2,16) -> C(3,2,16) -> C(3,1,16)",
        decoder="FC(24) -> FC(49) -> Shape(7x7) -> Ts(3,2,16) -> Ts(3,1,16) -> Ts(3,2,16) -> C(1,1,2)",
        channels=1,
        latent=16,
    ),
    "boolean_masker_cifar10": Networks(
        masker="[C(1,1,8) -> C(3,2,16) -> C(1,1,16) -> C(3,2,32)] -> [Cs(3,1,16) -> Resize(10) -> Cs(3,1,16) "
        "-> Resize(16) -> Cs(3,1,8) -> Resize(32) -> Cs(3,1,8) -> C(1,1,1)]",
        classifier="C(1,1,8) -> C(3,2,16) -> C(1,1,16) -> C(3,2,32) -> C(1,1,32) -> C(3,2,48) -> C(1,1,48) -> Avg",
        encoder="C(3,2,8) -> C(3,2,8) -> C(3,2,16) -> C(3,1,16)",
        decoder="FC(64) -> FC(128) -> Shape(8x8) -> Ts(3,2,16) -> Ts(3,1,16) -> Ts(3,2,16) -> Ts(3,1,4)",
        channels=3,
        latent=16,
    ),
}
TINY = Networks(
    masker="[Cs(3,1,4)] -> [C(1,1,4) -> C(1,1,1)]",
    classifier="Cs(4,4,8) -> C(1,1,8)",
    encoder="Cs(4,4,8) -> Cs(3,2,8)",
    decoder="FC(16) -> Shape(4x4) -> Ts(3,2,8) -> Ts(3,2,8) -> C(1,1,4)",
    channels=3,
    latent=4,
)
OBJECTIVE = Objective("bottleneck", 0.5, 0.5, 0, (0.2, 0.5), 0.9, 1.0)
QUICK = Recipe(epochs=4, batch_size=3, learning_rate=0.01, weight_decay=0.0)
CONTROL = Control(
    kind="stop", target=12.0, beta=0.01, rate=0.01, tolerance=0.05, along=1.0, warmup=0.2, tuning=0.0, ramp=0.0
)


def masker_of(name: str, **changed: Any) -> BooleanMasker:
    node = OmegaConf.to_container(OmegaConf.create(entries()["method"][name].text), resolve=True)
    assert isinstance(node, dict)
    made = build({**node, **changed}, "method")
    assert isinstance(made, BooleanMasker)
    return made


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).clamp(1e-9, 1 - 1e-9)


# the terms


def test_nats_of_a_masked_picture_pixel_by_pixel() -> None:
    """Eq. 7, one pixel after the other, its negative sign first."""
    mask, pixels, means = drawn(2, 1, 3, 4).round(), drawn(2, 3, 3, 4, seed=1), drawn(2, 3, 3, 4, seed=2)
    r, sigma = drawn(2, 1, 3, 4, seed=3), 0.3
    found = mask_nats(mask, r.logit()) + pixel_nats(pixels, means, mask, sigma)
    for row in range(2):
        wanted = 0.0
        for y, x in itertools.product(range(3), range(4)):
            m, chance = float(mask[row, 0, y, x]), float(r[row, 0, y, x])
            distance = sum(float(pixels[row, c, y, x] - means[row, c, y, x]) ** 2 for c in range(3)) / (2 * sigma**2)
            wanted += -(1 - m) * math.log(1 - chance) - m * (math.log(chance) - distance)
        assert float(found[row]) == pytest.approx(wanted, rel=1e-12)


def test_nats_of_the_latent_are_the_divergence_of_two_gaussians() -> None:
    mean, log_variance = drawn(3, 5) * 4 - 2, drawn(3, 5, seed=1) * 4 - 2
    one = torch.distributions.Normal(mean, (0.5 * log_variance).exp())
    wanted = torch.distributions.kl_divergence(one, torch.distributions.Normal(0.0, 1.0)).sum(1)
    assert torch.allclose(latent_nats(mean, log_variance), wanted, rtol=1e-12)
    assert torch.equal(latent_nats(torch.zeros(2, 3), torch.zeros(2, 3)), torch.zeros(2))


def test_the_sampled_entropy_is_the_entropy_on_average() -> None:
    """Eq. 8 drawn many times is Eq. 6; of a fair coin both are ln 2 a pixel, of a sure mask nothing."""
    rho = drawn(1, 1, 3, 3)
    logits = rho.logit().expand(20_000, -1, -1, -1)
    mask = boolean_mask(logits, drawn(20_000, 1, 3, 3, seed=5))
    exact = float(-(rho * rho.log() + (1 - rho) * (1 - rho).log()).sum())
    sampled = mask_nats(mask, logits)
    assert float(sampled.mean()) == pytest.approx(exact, abs=5 * float(sampled.std()) / math.sqrt(20_000))
    assert float(mask_nats(torch.ones(1, 1, 2, 2), torch.zeros(1, 1, 2, 2))) == pytest.approx(4 * math.log(2))
    assert float(mask_nats(torch.ones(1, 1, 2, 2), torch.full((1, 1, 2, 2), 30.0))) == pytest.approx(0, abs=1e-6)


def test_a_mask_is_boolean_and_open_as_often_as_rho_says() -> None:
    rho = torch.tensor([0.1, 0.5, 0.93], dtype=torch.float64)
    mask = boolean_mask(rho.logit().expand(20_000, 3), drawn(20_000, 3, seed=2))
    assert set(mask.unique().tolist()) == {0.0, 1.0}
    assert (mask.mean(0) - rho).abs().max() < 5 * 0.5 / math.sqrt(20_000)


def test_the_relaxed_mask_is_a_logistic_of_a_logistic_draw() -> None:
    logits, chances, temperature = drawn(4, 1, 2, 2).logit().requires_grad_(), drawn(4, 1, 2, 2, seed=1), 0.7
    mask = relaxed_mask(logits, chances, temperature)
    wanted = 1 / (1 + torch.exp(-(logits + torch.log(chances) - torch.log(1 - chances)) / temperature))
    assert torch.allclose(mask, wanted, rtol=1e-10)
    assert torch.equal(mask.detach().round(), boolean_mask(logits.detach(), chances))
    cold = relaxed_mask(logits, chances, 1e-4)
    assert torch.allclose(cold, boolean_mask(logits, chances), atol=1e-6)


def test_what_flows_back_to_a_mask_reaches_shut_pixels_too() -> None:
    """Near rho = 1/2 it is the slope of rho; where the relaxed mask has none left it is as steep."""
    logits = torch.tensor([-8.0, 0.0, 0.001, 8.0], dtype=torch.float64, requires_grad=True)
    mask, slope = boolean_mask(logits, torch.full((4,), 0.5)), torch.tensor([3.0, -2.0, 1.0, 4.0], dtype=torch.float64)
    through = straight_through(mask, logits)
    assert torch.equal(through, mask)
    (found,) = torch.autograd.grad((slope * through).sum(), logits)
    assert torch.allclose(found, slope / 4, rtol=1e-12)
    (of_rho,) = torch.autograd.grad((slope * logits.sigmoid()).sum(), logits)
    assert torch.allclose(found[1:3], of_rho[1:3], rtol=1e-6)
    assert (of_rho[[0, 3]].abs() < 0.002 * found[[0, 3]].abs()).all()


def test_held_logits_can_come_back_and_go_no_further() -> None:
    logits = torch.tensor([-9.0, -9.0, 0.5, 0.5, 9.0, 9.0], requires_grad=True)
    slope = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0, -1.0])  # descent moves against it
    out = held(logits, 8.0)
    out.backward(slope)
    assert out.tolist() == [-8.0, -8.0, 0.5, 0.5, 8.0, 8.0]
    assert logits.grad is not None
    assert logits.grad.tolist() == [0.0, -1.0, 1.0, -1.0, 1.0, 0.0]


def test_a_weighted_gradient() -> None:
    mask = drawn(4, 1, 2, 2).requires_grad_()
    weighted = weighted_gradient(mask, 0.3)
    assert torch.equal(weighted, mask)
    (found,) = torch.autograd.grad((weighted**2).sum(), mask)
    assert torch.allclose(found, 0.3 * 2 * mask, rtol=1e-12)


def test_rectangles_open_the_mask_and_never_close_it() -> None:
    mask = drawn(300, 1, 20, 40).round()
    more = with_rectangles(mask, drawn(300, 2, 4, seed=1), (0.2, 0.5))
    assert (more >= mask).all()
    one = with_rectangles(torch.zeros(300, 1, 20, 40), drawn(300, 1, 4, seed=1), (0.2, 0.5))[:, 0]
    heights, widths = one.amax(2).sum(1), one.amax(1).sum(1)
    assert torch.equal(one.sum((1, 2)), heights * widths)  # a rectangle
    assert 3 <= heights.min() <= 5
    assert 9 <= heights.max() <= 11
    assert 7 <= widths.min() <= 10
    assert 18 <= widths.max() <= 21
    assert one.amax(0).mean() > 0.95  # they come everywhere
    whole = with_rectangles(mask, drawn(300, 1, 4, seed=1), (1.0, 1.0))
    assert (whole == 1).all()


# the control of beta


def test_stopping_beta() -> None:
    control = replace(CONTROL, target=12, beta=0.02)
    assert control.next_beta(0.5, 12.1) == 0.02
    assert control.next_beta(0.5, 11.9) == 0


def test_adapting_beta_finds_the_weight_that_keeps_the_target() -> None:
    """A loss that falls with beta, 30 / (1 + beta / .05): 12 nats are reached at beta = .075."""
    control, beta = replace(CONTROL, kind="adapt", target=12, beta=0.001, rate=0.02, tolerance=0.02), 0.001
    for _ in range(600):
        beta = control.next_beta(beta, 30 / (1 + beta / 0.05))
    assert 30 / (1 + beta / 0.05) == pytest.approx(12, rel=0.03)
    for _ in range(2000):
        beta = control.next_beta(beta, 1.0)
    assert 0 < beta < 1e-5


def test_beta_rises_behind_the_warmup() -> None:
    control = replace(CONTROL, warmup=0.5, ramp=0.2)
    assert [control.risen(p) for p in (0.5, 0.6, 0.7, 0.9)] == pytest.approx([0, 0.5, 1, 1])
    assert replace(CONTROL, warmup=0.5, ramp=0.0).risen(0.5) == 1


# the networks' notation


@pytest.mark.parametrize("side", [17, 28])
def test_layers_have_the_sizes_of_the_notation(side: int) -> None:
    def area(text: str) -> int:
        linear = [part for part in encoder(text, (1, side, side), 3).modules() if isinstance(part, nn.Linear)]
        return linear[-1].in_features

    valid, same = (side - 3) // 2 + 1, math.ceil(side / 2)
    assert area("C(3,2,1)") == valid**2
    assert area("Cs(3,2,1)") == same**2
    assert area("Cs(3,1,1)") == side**2
    assert area("C(3,2,1) -> Ts(3,2,1)") == (2 * valid) ** 2
    assert area("C(3,2,1) -> Ts(3,1,1)") == valid**2
    assert area("C(3,2,1) -> T(3,2,1)") == ((valid - 1) * 2 + 3) ** 2
    assert area("Resize(12) -> Pad(1)") == 14**2
    assert area("C(1,1,5) -> Avg") == 5
    assert area("FC(98) -> Shape(7x7)") == 98


def test_same_padding_is_laid_out_as_tensorflow_does() -> None:
    """Of 6 pixels with stride 2 the odd one is added at the end: the first output sees pixels 0 to 2."""
    network = encoder("Cs(3,2,1)", (1, 6, 6), 9)
    conv = next(m for m in network.modules() if isinstance(m, nn.Conv2d))
    with torch.no_grad():
        conv.weight.fill_(1.0)
        conv.bias.zero_()  # type: ignore[union-attr]
    picture = torch.arange(36.0).view(1, 1, 6, 6)
    found = nn.Sequential(*list(network.children())[:2])(picture)[0, 0]
    padded = np.zeros((7, 7))
    padded[:6, :6] = picture[0, 0]
    wanted = [[padded[2 * i : 2 * i + 3, 2 * j : 2 * j + 3].sum() for j in range(3)] for i in range(3)]
    assert torch.equal(found, torch.tensor(wanted, dtype=torch.float32))


def test_nonlinearities_follow_every_layer_but_the_last() -> None:
    network = masking_network("[C(1,1,2) -> C(3,2,2)] -> [Resize(9) -> C(1,1,2) -> C(1,1,1)]", (1, 9, 9))
    kinds = [type(m).__name__ for m in network.children() if not type(m).__name__.startswith("_")]
    hidden = [["Conv2d", "BatchNorm2d", kind] for kind in ("ReLU6", "ReLU6", "LeakyReLU")]
    assert kinds == [*itertools.chain(*hidden), "Conv2d"]
    assert network(torch.zeros(2, 1, 9, 9)).shape == (2, 1, 9, 9)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("C(3,2)", "'C(3,2)' is no layer"),
        ("D(3,2,4)", "'D(3,2,4)' is no layer"),
        ("C(3,0,4)", "is no layer"),
        ("C(3,1,4) ->", "'' is no layer"),
        ("C(9,1,4)", "C(9,1,4) cannot follow [1, 8, 8]"),
        ("FC(7) -> Shape(2x2)", "Shape(2x2) cannot follow [7]"),
        ("FC(7) -> C(1,1,2)", "cannot follow [7]"),
        ("C(1,1,2) -> FC(3)", "ends in [3]: a map of 1 planes is expected"),
        ("[C(1,1,2)] -> [C(1,1,2)] -> [C(1,1,1)]", "has 3 parts: at most 2"),
    ],
)
def test_a_text_that_is_wrong_says_where(text: str, said: str) -> None:
    with pytest.raises(UserError) as error:
        masking_network(text, (1, 8, 8))
    assert said in str(error.value)
    assert "method.networks.masker" in str(error.value)
    assert len(str(error.value).splitlines()) <= 2


def without_last(network: nn.Module) -> nn.Module:
    """Without the part that brings a map to the picture's size."""
    return nn.Sequential(*list(network.children())[:-1])


@pytest.mark.parametrize("name", [*NAMES, *(f"{name}, paper" for name in PAPERS)])
def test_the_networks_have_the_shapes_they_need(name: str) -> None:
    """At the paper's sizes no map has to be resized at the end, so the text has been read as it was meant."""
    name, _, paper = name.partition(", ")
    networks, side = PAPERS[name] if paper else masker_of(name).networks, SIZES[name]
    shape = (networks.channels, side, side)
    with_mask = (networks.channels + 1, side, side)
    masker, decoding = masking_network(networks.masker, shape), decoder(networks.decoder, networks.latent, with_mask)
    assert without_last(masker)(torch.zeros(2, *shape)).shape == (2, 1, side, side)
    assert without_last(decoding)(torch.zeros(2, networks.latent)).shape[2:] == (side, side)
    assert encoder(networks.encoder, with_mask, 8)(torch.zeros(2, *with_mask)).shape == (2, 8)
    assert classifier(networks.classifier, with_mask, 7)(torch.zeros(2, *with_mask)).shape == (2, 7)


# the model


@dataclass(frozen=True)
class Case:
    inputs: Tensor
    labels: Tensor
    preprocessing: Preprocessing


@pytest.fixture
def case() -> Case:
    preprocessing = Preprocessing(16, 16, (0.5, 0.4, 0.3), (0.25, 0.2, 0.5))
    return Case(noise_pictures(6, (3, 16, 16)) / 4, torch.tensor([0, 1, 2, 0, 1, 2]), preprocessing)


def model_of(case: Case, **changed: Any) -> MaskerModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return MaskerModel(TINY, replace(OBJECTIVE, **changed), case.preprocessing, 3)


def test_pixels_are_from_0_to_1_again(case: Case) -> None:
    pixels = drawn(2, 3, 16, 16).float()
    mean, std = (torch.tensor(v)[:, None, None] for v in (case.preprocessing.mean, case.preprocessing.std))
    model = model_of(case)
    assert torch.allclose(model.pixels((pixels - mean) / std), pixels, atol=1e-6)
    grey = MaskerModel(replace(TINY, channels=1), OBJECTIVE, case.preprocessing, 3)
    assert torch.allclose(grey.pixels((pixels - mean) / std), pixels.mean(1, keepdim=True), atol=1e-6)


@pytest.mark.parametrize("name", ["bottleneck", "ceb", "conditional"])
def test_what_the_mask_hides_reaches_neither_classifier_nor_autoencoder(case: Case, name: str) -> None:
    model = model_of(case, name=name)
    mask = torch.zeros(6, 1, 16, 16)
    mask[:, :, 4:9, 3:12] = 1
    other = torch.where(mask.bool(), case.inputs, torch.randn_like(case.inputs))
    assert torch.equal(model.says(case.inputs, mask), model.says(other, mask))
    if name != "conditional":  # its third autoencoder describes the whole picture
        found = []
        for inputs in (case.inputs, other):
            torch.manual_seed(3)
            found.append(model.compressed(model.pixels(inputs), mask, case.labels, 0.5)[0])
        assert torch.allclose(found[0], found[1])


@pytest.mark.parametrize("name", ["bottleneck", "ceb", "conditional"])
def test_beta_weighs_what_reaches_the_masking_network_alone(case: Case, name: str) -> None:
    """With the same draws the autoencoder's gradient is the same whatever beta; the mask's is beta times that of 1."""
    model = model_of(case, name=name)

    def gradients(beta: float) -> tuple[Tensor, Tensor]:
        torch.manual_seed(1)
        mask = torch.full((6, 1, 16, 16), 0.5, requires_grad=True)
        nats, _ = model.compressed(model.pixels(case.inputs), mask, case.labels, beta)
        of_mask, of_encoder = torch.autograd.grad(nats.sum(), (mask, next(model.autoencoder.encoder.parameters())))
        return of_mask, of_encoder

    of_mask, of_encoder = gradients(1.0)
    assert of_mask.abs().max() > 0
    weighted, same = gradients(0.3)
    assert torch.allclose(weighted, 0.3 * of_mask, rtol=1e-4, atol=1e-6)
    assert torch.allclose(same, of_encoder, rtol=1e-4, atol=1e-6)
    assert gradients(0.0)[0].abs().max() == 0


def test_only_the_class_autoencoder_feels_the_class(case: Case) -> None:
    mask = torch.ones(6, 1, 16, 16)
    for name, feels in (("bottleneck", False), ("ceb", True)):
        model, found = model_of(case, name=name), []
        for labels in (case.labels, case.labels.roll(1)):
            torch.manual_seed(3)
            found.append(model.compressed(model.pixels(case.inputs), mask, labels, 1.0)[0])
        assert torch.equal(found[0], found[1]) != feels


def test_the_conditional_objective_is_the_sum_of_eq_11(case: Case) -> None:
    """A mask autoencoder and a picture autoencoder that say nothing cost what closed forms say."""
    model = model_of(case, name="conditional")
    for part in (model.of_mask, model.of_picture):
        for weights in part.parameters():
            weights.data.zero_()
    mask = drawn(6, 1, 16, 16).float().round()
    pixels = model.pixels(case.inputs)
    _, others = model.compressed(pixels, mask, case.labels, 1.0)
    wanted = 256 * math.log(2) + (pixels**2).flatten(1).sum(1) / (2 * 0.5**2)  # chances of one half, means of 0
    assert torch.allclose(others, wanted, rtol=1e-5)


def test_a_given_network_is_asked_for_the_answers_and_sees_the_mean_colour(case: Case) -> None:
    seen: list[Tensor] = []

    def network(inputs: Tensor) -> Tensor:
        seen.append(inputs)
        return inputs.mean((2, 3))

    model = MaskerModel(TINY, OBJECTIVE, case.preprocessing, 3, network)
    mask = torch.zeros(6, 1, 16, 16)
    model.says(case.inputs, mask)
    assert (seen[-1] == 0).all()
    assert torch.equal(model.answers(case.inputs, case.labels), case.inputs.mean((2, 3)).argmax(1))
    assert torch.equal(model_of(case).answers(case.inputs, case.labels), case.labels)


def test_the_first_masks_are_as_open_as_asked(case: Case) -> None:
    rho = model_of(case).logits(case.inputs).sigmoid().detach()
    assert float(rho.mean()) == pytest.approx(0.9, abs=0.03)


def test_masks_that_do_not_look_at_the_picture(case: Case) -> None:
    """Every second picture whole; of the others a share whose square is uniform, two thirds on average."""
    model, seen = model_of(case), []
    model.says = lambda inputs, mask: seen.append(mask)  # type: ignore[method-assign, func-returns-value, assignment, return-value]
    model.behind_any(torch.zeros(4000, 3, 16, 16))
    assert set(seen[0].unique().tolist()) == {0.0, 1.0}
    shares = seen[0].mean((1, 2, 3))
    assert (shares[::2] == 1).all()
    assert float(shares[1::2].mean()) == pytest.approx(2 / 3, abs=0.03)
    assert float((shares[1::2] < 0.5).float().mean()) == pytest.approx(1 / 4, abs=0.04)


def changed_by(case: Case, control: Control) -> list[set[str]]:
    """The networks that changed in each of four epochs, with "statistics" for those of the classifier's batch norm."""
    model = model_of(case)
    kept = [{name: tensor.clone() for name, tensor in model.state_dict().items()}]

    class Keeping(lightning.Callback):
        def on_train_epoch_end(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
            kept.append({name: tensor.clone() for name, tensor in model.state_dict().items()})

    pictures: Any = InMemory(case.inputs, case.labels)
    trainer = lightning.Trainer(
        max_epochs=4,
        accelerator="cpu",
        callbacks=[Keeping()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    loader = torch.utils.data.DataLoader(pictures, 3, collate_fn=collated)
    trainer.fit(MaskerLearning(model, QUICK, control, seed=0), loader)
    found = []
    for before, after in itertools.pairwise(kept):
        names = [name for name in after if not torch.equal(before[name], after[name])]
        own = {name.split(".")[0] for name in names if "running" not in name and "batches" not in name}
        statistics = any("running" in name for name in names if name.startswith("classifier"))
        found.append(own | ({"statistics"} if statistics else set()))
    return found


def test_who_learns_when(case: Case) -> None:
    alone, mask, both = {"classifier", "statistics"}, {"masker", "autoencoder"}, {"classifier", "masker", "autoencoder"}
    control = replace(CONTROL, warmup=0.25)
    assert changed_by(case, control) == [alone, both, both, both]
    apart = replace(control, along=0.0, tuning=0.25)
    assert changed_by(case, apart) == [alone, mask, mask, {"classifier", "autoencoder"}]


def test_how_fast_the_classifier_learns_along(case: Case) -> None:
    """A share of the others' learning rate while the mask is learnt, all of it before and after."""
    module = MaskerLearning(model_of(case), QUICK, replace(CONTROL, along=0.25, warmup=0.4, tuning=0.2), seed=0)
    module._trainer = SimpleNamespace(estimated_stepping_batches=100)  # type: ignore[assignment]
    found = module.configure_optimizers()
    mask, classifier = found["optimizer"].param_groups
    assert {id(p) for p in classifier["params"]} == {id(p) for p in module.model.classifier.parameters()}  # type: ignore[union-attr]
    assert len(mask["params"]) + len(classifier["params"]) == len(list(module.model.parameters()))
    of_mask, of_classifier = found["lr_scheduler"]["scheduler"].lr_lambdas
    shares = [of_classifier(step) / of_mask(step) for step in (10, 39, 42, 60, 79, 85)]
    assert shares == pytest.approx([1, 1, 0.25, 0.25, 0.25, 1])


# the method


def planted(count: int, seed: int) -> tuple[Batch, Tensor]:
    """Noise with one 4 x 4 patch, whose colour is the class that the network of patches names; where it is."""
    rng = np.random.default_rng(seed)
    places = [[(int(c), int(y), int(x))] for c, y, x in rng.integers(0, [3, 8, 8], (count, 3))]
    patches = patch_pictures(places)
    noise = torch.from_numpy(rng.normal(0, 0.3, patches.shape)).float()
    ids = tuple(f"planted-{seed}-{i}" for i in range(count))
    return Batch(patches + noise, ClassTarget.predicted(count), ids), patches.amax(1) > 0


def planted_masker() -> BooleanMasker:
    networks = replace(TINY, decoder="FC(64) -> Shape(8x8) -> Ts(4,4,8) -> C(1,1,4)")
    control = replace(CONTROL, target=8.0, beta=0.003)
    training = Recipe(epochs=30, batch_size=32, learning_rate=0.01, weight_decay=0.0)
    return replace(
        masker_of("boolean_masker", weights="reference"),
        networks=networks,
        objective=replace(OBJECTIVE, sigma=0.35),
        control=control,
        training=training,
        classifier="backbone",
    )


def test_a_planted_patch_is_found() -> None:
    """By a masker that is fitted to the network's own answers, in a few hundred steps."""
    backbone = patches_backbone()
    reference, _ = planted(384, seed=1)
    attribute = planted_masker().fit(backbone, [reference], seed=0)
    batch, inside = planted(40, seed=2)
    found = attribute(batch.bound(backbone))
    assert found.unit == "mask"
    rho = found.heatmap
    assert float(rho[inside].mean()) > 5 * float(rho[~inside].mean())
    assert float(rho.mean()) < 0.2
    first = rho.flatten(1).argmax(1)
    assert float(inside.flatten(1).gather(1, first[:, None]).float().mean()) > 0.9
    assert torch.allclose(found.diagnostics["rho"], rho.mean((1, 2)))


def test_a_state_is_taken_and_must_fit() -> None:
    backbone, method = small_backbone(), masker_of("boolean_masker")
    model = MaskerModel(method.networks, method.objective, backbone.preprocessing, backbone.outputs).eval()
    batch = Batch(noise_pictures(3), ClassTarget.predicted(3), ("a", "b", "c"))
    found = method.fit(backbone, [], 0, model.state_dict())(batch)
    with torch.no_grad():
        assert torch.allclose(found.heatmap, model.logits(batch.inputs).sigmoid()[:, 0], atol=1e-6)
    few = MaskerModel(method.networks, method.objective, backbone.preprocessing, backbone.outputs - 1)
    with pytest.raises(UserError, match="do not fit"):
        method.fit(backbone, [], 0, few.state_dict())


@pytest.mark.parametrize(
    ("group", "changed"),
    [
        ("control", {"kind": "brake"}),
        ("control", {"warmup": 1.0}),
        ("control", {"warmup": 0.5, "tuning": 0.5}),
        ("control", {"target": 0}),
        ("objective", {"name": "other"}),
        ("objective", {"sides": [0.5, 0.2]}),
        ("objective", {"initial_rho": 1.0}),
        ("objective", {"sigma": 0}),
        ("networks", {"channels": 2}),
        ("networks", {"latent": 0}),
    ],
)
def test_settings_that_cannot_be(group: str, changed: dict[str, Any]) -> None:
    method = masker_of("boolean_masker")
    settings = dataclasses.asdict(getattr(method, group)) | changed
    settings = {key: list(value) if isinstance(value, tuple) else value for key, value in settings.items()}
    with pytest.raises(UserError, match=f"method.*{next(iter(changed))}"):
        masker_of("boolean_masker", **{group: settings})


def test_where_a_run_finds_its_masker(tmp_path: Path) -> None:
    assert masker_of("boolean_masker", weights="reference").uses_reference
    method = masker_of("boolean_masker")
    assert not method.uses_reference
    assert method.with_learnt("abc", {}).weights == "abc"


# `ibxai train` and `ibxai run`


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a masker has been trained on pictures of blocks."""
    folder = tmp_path_factory.mktemp("outputs")
    train.run(plan_of(folder, method=quick_masker(), given={}))
    return folder


def quick_masker(**changed: Any) -> BooleanMasker:
    training = Recipe(epochs=6, batch_size=12, learning_rate=0.01, weight_decay=0.0)
    return replace(
        masker_of("boolean_masker"),
        networks=TINY,
        objective=OBJECTIVE,
        training=training,
        **{"control": CONTROL, **changed},
    )


def test_a_training_reports_the_papers_criteria(outputs: Path) -> None:
    (weights,) = outputs.glob("blocks/boolean_masker/training/*/weights.safetensors")
    scores = {score["metric"]: score for score in json.loads((weights.parent / "test.json").read_bytes())}
    for name in ("accuracy", "accuracy_unmasked", "agreement", "rho"):
        assert 0 <= scores[name]["low"] <= scores[name]["value"] <= scores[name]["high"] <= 1
    assert scores["autoencoder_nats"]["value"] > 0
    assert scores["autoencoder_target"]["value"] == 12
    assert "rho_inside" not in scores  # the blocks have no regions
    curves = pd.read_csv(weights.parent / "curves.csv")
    assert list(curves["epoch"]) == [1, 2, 3, 4, 5, 6]
    logged = [f"validation_{name}" for name in ("cross_entropy", "accuracy", "autoencoder", "rho")]
    assert curves[logged].notna().all().all()
    warm = curves["validation_loss"] > 1e4
    assert list(warm) == [True, False, False, False, False, False]  # of the first quarter, none is kept


def test_the_masker_that_is_used_is_the_trained_one(outputs: Path) -> None:
    (weights,) = outputs.glob("blocks/boolean_masker/training/*/weights.safetensors")
    plan = run_plan(outputs, quick_masker())
    state = pipeline._with_state(plan)
    assert state.state is not None
    kept = safetensors.torch.load_file(weights)
    assert all(torch.equal(tensor, kept[name]) for name, tensor in state.state.items())
    by_file = pipeline._with_state(run_plan(outputs, quick_masker(weights=str(weights))))
    assert by_file.method == state.method  # known by its digest, wherever it lies
    assert pipeline._with_state(run_plan(outputs, quick_masker(weights="reference"))).state is None


def test_a_masker_that_is_not_there(outputs: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="ibxai train method=boolean_masker dataset=blocks"):
        pipeline._with_state(run_plan(tmp_path, quick_masker()))
    other = quick_masker(control=replace(CONTROL, target=13.0))
    with pytest.raises(UserError, match="another architecture"):
        pipeline._with_state(run_plan(outputs, other))
    with pytest.raises(UserError, match=r"method.weights=x.pt is nothing"):
        pipeline._with_state(run_plan(outputs, quick_masker(weights="x.pt")))


def test_what_the_criteria_count() -> None:
    """A masker that is open, a classifier that is always right, and a region of which rho is known."""
    preprocessing = Preprocessing(16, 16, (0.0,) * 3, (1.0,) * 3)
    region = torch.zeros(4, 1, 16, 16, dtype=torch.bool)
    region[:2, :, :4, :4] = True
    labels = torch.tensor([0, 1, 2, 0])
    inputs = torch.nn.functional.one_hot(labels, 3)[:, :, None, None].expand(-1, -1, 16, 16).float()
    model = MaskerModel(TINY, OBJECTIVE, preprocessing, 3, lambda x: x.mean((2, 3)))
    chances = torch.full((16, 16), 0.25)
    chances[:4, :4] = 0.75
    model.logits = lambda x: chances.logit().expand(len(x), 1, -1, -1)  # type: ignore[method-assign]
    batch = Batch(inputs, ClassTarget(labels), tuple("abcd"), regions={"target": region})
    found = criteria(model, lambda x: 1 - x.mean((2, 3)), batch, labels, seed=0)
    assert (found["accuracy"] == 1).all()
    assert (found["accuracy_unmasked"] == 0).all()
    assert (found["agreement"] == 1).all()
    assert torch.allclose(found["rho_inside"][:2], torch.tensor(0.75))
    assert torch.allclose(found["rho_outside"][:2], torch.tensor(0.25))
    assert found["rho_inside"][2:].isnan().all()
    assert found["rho_outside"][2:].isnan().all()
    assert torch.allclose(found["rho"], torch.tensor((16 * 0.75 + 240 * 0.25) / 256))


def run_plan(outputs: Path, method: BooleanMasker) -> pipeline.Plan:
    return pipeline.Plan(
        dataset=Blocks(train=60, test=12),
        backbone=BLOCKS_NETWORK,
        method=method,
        method_name="boolean_masker",
        metrics={},
        target=Predicted(),
        settings={"method": {"weights": method.weights}},
        seed=0,
        device="cpu",
        batch_size=4,
        max_passes=None,
        workers=0,
        limit=None,
        pictures=0,
        outputs=outputs,
        command="ibxai run",
    )
