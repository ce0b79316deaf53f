"""InputIBA: the prior's information against the paper's Gaussians, both estimators, and patches at known places."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import pytest
import torch
from networks import (
    batch_of,
    noise_pictures,
    patch_pictures,
    patch_reference,
    patches_backbone,
    relative,
    small_backbone,
)
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence

from ibxai.backbones import Backbone, freeze
from ibxai.errors import UserError
from ibxai.methods import IBA, InputIBA
from ibxai.methods.bottleneck import Bottleneck, Mask, gaussian_kl
from ibxai.methods.feature_statistics import FeatureStatistics
from ibxai.methods.input_mask import (
    DirectEstimator,
    WganEstimator,
    _criticise,
    starting_logits,
    target_distribution,
)
from ibxai.types import Attribution, Batch

# --- the information against a prior


def elements() -> tuple[Tensor, Tensor, Tensor, FeatureStatistics]:
    """(I, Lambda, lambda_G, statistics), float64 [4, 5, 6, 7]"""
    generator = torch.Generator().manual_seed(0)
    picture = 3 * torch.randn(4, 5, 6, 7, dtype=torch.float64, generator=generator)
    mask = 0.999 * torch.rand(4, 5, 6, 7, dtype=torch.float64, generator=generator)
    prior = torch.rand(4, 5, 6, 7, dtype=torch.float64, generator=generator)
    mean = torch.randn(5, 1, 1, dtype=torch.float64, generator=generator)
    std = 0.2 + torch.rand(5, 1, 1, dtype=torch.float64, generator=generator)
    return picture, mask, prior, FeatureStatistics(mean, std, torch.ones(5, 1, 1, dtype=torch.bool), 100, True)


def test_the_information_is_the_kl_of_the_remarks() -> None:
    picture, mask, prior, known = elements()
    mu, sigma = known.mean, known.std
    remark1 = Normal(prior * mask * picture + (1 - prior * mask) * mu, (1 - prior * mask) * sigma)  # P(Z_I)
    remark2 = Normal(mask * picture + (1 - mask) * mu, (1 - mask) * sigma)  # P(Z_I|I)
    wanted = kl_divergence(remark2, remark1)
    found = gaussian_kl(picture, 1 - mask, known, prior)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)
    assert wanted.max() > 1
    assert (found >= -1e-12).all()
    other = kl_divergence(remark1, remark2)  # the other way round it would be another number
    assert not torch.allclose(found, other, rtol=0.1)


def test_the_information_is_proposition_3() -> None:
    picture, mask, prior, known = elements()
    found = gaussian_kl(picture, 1 - mask, known, prior)
    for place in [(0, 0, 0, 0), (1, 4, 2, 6), (3, 2, 5, 1), (2, 1, 3, 3)]:
        i, big, g = float(picture[place]), float(mask[place]), float(prior[place])
        mu, sigma = float(known.mean[place[1]]), float(known.std[place[1]])
        nats = (
            math.log((1 - g * big) / (1 - big))
            + (1 - big) ** 2 / (2 * (1 - g * big) ** 2)
            + (i - mu) ** 2 * (big - g * big) ** 2 / (2 * (1 - g * big) ** 2 * sigma**2)
            - 1 / 2
        )
        assert float(found[place]) == pytest.approx(nats, rel=1e-9)


def test_a_prior_of_nothing_is_no_prior() -> None:
    picture, mask, prior, known = elements()
    found = gaussian_kl(picture, 1 - mask, known, torch.zeros_like(prior))
    torch.testing.assert_close(found, gaussian_kl(picture, 1 - mask, known), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_what_the_prior_lets_pass_is_free(dtype: torch.dtype) -> None:
    """Exactly, in float32 too, and for masks that are all but open."""
    picture, _, prior, known = elements()
    known = dataclasses.replace(known, mean=known.mean.to(dtype), std=known.std.to(dtype))
    share = torch.sigmoid(torch.linspace(-60, 60, picture.numel(), dtype=dtype)).view_as(picture)
    assert not gaussian_kl(picture.to(dtype), share, known, torch.ones_like(prior).to(dtype)).any()


def test_a_larger_prior_leaves_less_to_pay_for() -> None:
    picture, mask, prior, known = elements()
    nats = [gaussian_kl(picture, 1 - mask, known, g * torch.ones_like(prior)) for g in (0.0, 0.3, 0.7, 0.95, 1.0)]
    for more, less in itertools.pairwise(nats):
        assert (less <= more + 1e-12).all()


def test_the_information_has_finite_gradients_at_the_ends() -> None:
    picture, _, _, known = elements()
    known = dataclasses.replace(known, mean=known.mean.float(), std=known.std.float())
    for prior in (0.0, 0.5, 1.0):
        alpha = torch.linspace(-30, 30, picture.numel()).view_as(picture).requires_grad_()
        nats = gaussian_kl(picture.float(), torch.sigmoid(-alpha), known, torch.full_like(alpha, prior))
        assert nats.isfinite().all()
        assert torch.autograd.grad(nats.sum(), alpha)[0].isfinite().all()


# --- planted truth


PLACES = [(0, 0, 0), (1, 1, 6), (2, 7, 7), (0, 4, 3), (1, 6, 0)]
KNOWN = [patch_reference(192)]
FEATURE = IBA(smoothing=0.0, steps=30, draws=4, beta=1.0)


def planted() -> Batch:
    """A patch of the target's colour, and a patch of another colour at a place that says nothing for the target."""
    elsewhere = [((colour + 1) % 3, (row + 4) % 8, (column + 4) % 8) for colour, row, column in PLACES]
    pictures = patch_pictures([[own, other] for own, other in zip(PLACES, elsewhere, strict=True)])
    return batch_of(pictures + 0.02 * noise_pictures(len(PLACES)), [colour for colour, _, _ in PLACES])


def level(heatmap: Tensor, row: int, column: int) -> float:
    """The mean over a cell."""
    return float(heatmap[4 * (row % 8) : 4 * (row % 8) + 4, 4 * (column % 8) : 4 * (column % 8) + 4].mean())


@pytest.fixture(scope="module")
def explained() -> Attribution:
    settings = InputIBA(feature=FEATURE, steps=30, smoothing=0.0, beta=3.0)
    return settings.fit(patches_backbone(), KNOWN, 0)(planted())


def test_the_patch_is_found(explained: Attribution) -> None:
    assert explained.unit == "mask"
    assert explained.heatmap.min() >= 0
    assert explained.heatmap.max() <= 1
    for heatmap, (_, row, column) in zip(explained.heatmap, PLACES, strict=True):
        levels = torch.nn.functional.avg_pool2d(heatmap[None], 4)[0]
        assert divmod(int(levels.argmax()), 8) == (row, column)
        rest = (float(levels.sum()) - float(levels[row, column])) / 63
        assert level(heatmap, row, column) > 3 * rest
        assert level(heatmap, row, column) > 1.5 * level(heatmap, row + 4, column + 4)


@pytest.mark.parametrize("estimator", ["direct", "none"])
def test_the_prior_finds_the_patch(estimator: str) -> None:
    settings = InputIBA(feature=FEATURE, estimator=estimator, output="prior")  # type: ignore[arg-type]
    found = settings.fit(patches_backbone(), KNOWN, 0)(planted())
    assert found.unit == "mask"
    for heatmap, (_, row, column) in zip(found.heatmap, PLACES, strict=True):
        levels = torch.nn.functional.avg_pool2d(heatmap[None], 4)[0]
        assert divmod(int(levels.argmax()), 8) == (row, column)
        assert level(heatmap, row, column) > 1.2 * level(heatmap, row + 4, column + 4)


def test_a_constant_prior_is_a_half_everywhere() -> None:
    settings = InputIBA(feature=FEATURE, estimator="constant", output="prior")
    assert torch.equal(settings.fit(patches_backbone(), KNOWN, 0)(planted()).heatmap, torch.full((5, 32, 32), 0.5))
    masks = [
        dataclasses.replace(settings, estimator=e, output="mask", steps=12, learning_rate=1.0).fit(
            patches_backbone(), KNOWN, 0
        )(planted())
        for e in ("constant", "none")
    ]
    assert relative(masks[0].heatmap, masks[1].heatmap) > 1e-3  # the prior is used


def test_the_target_matters() -> None:
    """Two patches, two targets: the mask is where the explained colour is."""
    pictures = patch_pictures([[(0, 1, 1), (1, 6, 5)]] * 2)
    batch = batch_of(pictures, [0, 1], ["a", "b"])
    settings = InputIBA(feature=FEATURE, steps=30, smoothing=0.0, beta=3.0)
    found = settings.fit(patches_backbone(), KNOWN, 0)(batch).heatmap
    assert level(found[0], 1, 1) > 1.5 * level(found[0], 6, 5)
    assert level(found[1], 6, 5) > 1.5 * level(found[1], 1, 1)


def test_the_output_is_the_prior_without_a_third_step() -> None:
    settings = InputIBA(feature=FEATURE, output="prior", direct=DirectEstimator(steps=3))
    backbone = patches_backbone()
    attribute = settings.fit(backbone, KNOWN, 0)
    with backbone.counting() as passes:
        found = attribute(planted())
    assert "forward" not in passes  # step 3 runs the whole network
    assert set(found.diagnostics) == {"feature_capacity", "distance_curve"}
    other = dataclasses.replace(settings, steps=7, beta=1.0, draws=1).fit(patches_backbone(), KNOWN, 0)(planted())
    assert torch.equal(other.heatmap, found.heatmap)
    masked = dataclasses.replace(settings, output="mask", steps=2, draws=1).fit(backbone, KNOWN, 0)
    with backbone.counting() as passes:
        assert relative(masked(planted()).heatmap, found.heatmap) > 0.05
    assert passes["forward"] == 5 * 2


def test_what_the_prior_lets_pass_is_not_paid_for_in_step_3() -> None:
    """At a price where nothing is worth its full information, the evidence that the prior holds is still there."""
    backbone, batch = patches_backbone(), planted()
    _, at_input = parts(backbone)
    at_input = dataclasses.replace(at_input, price=200 / 3072)
    everything = torch.ones_like(batch.inputs)
    free, paid = at_input.find(batch, everything), at_input.find(batch)
    assert not free.information.any()
    assert (free.target_loss[:, -1] < 0.1).all()
    assert (paid.target_loss[:, -1] > 0.5).all()


def test_the_first_step_is_iba(explained: Attribution) -> None:
    alone = FEATURE.fit(patches_backbone(), KNOWN, 0)(planted())
    assert relative(explained.diagnostics["feature_capacity"], alone.diagnostics["capacity"]) < 1e-5


# --- the estimators


def parts(backbone: Backbone, feature: IBA = FEATURE, known: list[Batch] = KNOWN) -> tuple[Bottleneck, Bottleneck]:
    """(bottleneck of step 1, bottleneck of step 3) as `fit` makes them."""
    seen = []

    class Noting(DirectEstimator):
        def estimate(self, *args: Any) -> tuple[Tensor, Tensor]:
            seen.append(args)
            return super().estimate(*args)

    attribute = InputIBA(feature=feature, direct=Noting(steps=1), output="prior").fit(backbone, known, 0)
    attribute(batch_of(noise_pictures(1), [0]))
    return seen[0][0], seen[0][1]


def latent_of(feature: Bottleneck, batch: Batch, alpha: Tensor) -> Mask:
    """A mask of step 1 with these logits."""
    nothing = torch.zeros(len(batch), 0)
    return Mask(feature.split.head(batch.inputs).values, alpha, torch.zeros_like(alpha), nothing, nothing)


class Seen(nn.Module):
    """Its layer "seen" is the picture itself, so that the mask which induces a bottleneck there is the bottleneck's."""

    def __init__(self) -> None:
        super().__init__()
        self.seen, self.fc = nn.Conv2d(3, 3, 1, bias=False), nn.Linear(3, 3)
        with torch.no_grad():
            self.seen.weight.copy_(torch.eye(3)[:, :, None, None])

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.seen(x).mean((2, 3)))


def test_the_direct_estimator_finds_the_mask_that_induces_the_bottleneck() -> None:
    """Each colour has a share of its own, and no start but the same for all of them."""
    backbone = freeze(Seen(), (3, 32, 32), {"bottleneck": "seen"}, name="seen")
    known = [batch_of(noise_pictures(20, seed=5), [0] * 20)]
    feature, at_input = parts(backbone, IBA(smoothing=0.0, steps=1, draws=1), known)
    batch = batch_of(3 + noise_pictures(3), [0, 1, 2])  # far from the mean, so that a share shows
    wanted = torch.tensor([0.9, 0.5, 0.1])[:, None, None].expand(3, 3, 32, 32).clone()
    wanted[1] = wanted[1].flip(0)
    wanted[2, :, :16] = 0.7
    estimator = DirectEstimator(steps=60, draws=16, smoothing=0.0, learning_rate=0.3)
    found, curve = estimator.estimate(feature, at_input, batch, latent_of(feature, batch, torch.logit(wanted)), 60)
    assert curve.shape == (3, 60)
    assert (curve[:, -1] < 0.1 * curve[:, 0]).all()
    assert ((found - wanted).abs() < 0.1).float().mean() > 0.95
    assert ((found - wanted).abs().mean((2, 3)) < 0.1).all()


def distance_of(feature: Bottleneck, at_input: Bottleneck, batch: Batch, alpha: Tensor, mask: Tensor) -> Tensor:
    """[B]: W^2 between f(Z_G) and Z* from 200 draws of torch's own noise, in float64."""
    wanted_mean, wanted_std = target_distribution(feature, latent_of(feature, batch, alpha))
    noise = torch.randn(200, *batch.inputs.shape, generator=torch.Generator().manual_seed(5))
    eps = at_input.statistics.mean + at_input.statistics.std * noise
    masked = (mask * batch.inputs + (1 - mask) * eps).flatten(0, 1)
    latents = feature.split.head(masked).values.unflatten(0, (200, len(batch))).double()
    mean, spread = latents.mean(0) - wanted_mean, latents.std(0) - wanted_std
    return ((mean**2 + spread**2) / feature.statistics.std**2).flatten(1).mean(1)


def test_the_direct_estimators_distance_falls_behind_a_whole_network() -> None:
    backbone, batch = small_backbone(), batch_of(noise_pictures(4), [0, 1, 2, 3])
    known = [batch_of(noise_pictures(40, seed=5), [0] * 40)]
    feature, at_input = parts(backbone, IBA(layer="stage3", smoothing=0.0, steps=10, draws=4, beta=1.0), known)
    alpha = feature.find(batch).alpha
    estimator = DirectEstimator(steps=25, draws=8, smoothing=0.0)
    found, curve = estimator.estimate(feature, at_input, batch, latent_of(feature, batch, alpha), 25)
    assert found.shape == batch.inputs.shape
    assert found.min() >= 0
    assert found.max() <= 1
    assert (curve[:, -1] < 0.75 * curve[:, 0]).all()
    # not only by its own account, and the account itself is right up to what 8 draws leave open
    start, nothing = estimator.estimate(feature, at_input, batch, latent_of(feature, batch, alpha), 0)
    assert nothing.shape == (4, 0)
    before = distance_of(feature, at_input, batch, alpha, start)
    after = distance_of(feature, at_input, batch, alpha, found)
    assert (after < 0.75 * before).all()
    assert relative(curve[:, 0], before) < 0.3


def test_none_is_the_feature_mask_itself() -> None:
    settings = InputIBA(feature=FEATURE, estimator="none", output="prior", direct=DirectEstimator(smoothing=0.0))
    found = settings.fit(patches_backbone(), KNOWN, 0)(planted())
    assert "distance_curve" not in found.diagnostics  # no step was taken
    feature, _ = parts(patches_backbone())
    cells = torch.sigmoid(feature.find(planted()).alpha).mean(1)
    assert found.heatmap.min() >= 0.05 - 1e-6
    assert found.heatmap.max() <= 0.95 + 1e-6
    for heatmap, mask in zip(found.heatmap, cells, strict=True):
        row, column = divmod(int(mask.argmax()), 8)
        assert level(heatmap, row, column) > 0.5
        # of two cells the one that passes more is never the darker by much
        levels = torch.nn.functional.avg_pool2d(heatmap[None], 4)[0]
        assert torch.corrcoef(torch.stack([levels.flatten(), mask.flatten()]))[0, 1] > 0.8


def test_the_start_is_even_over_colours_and_within_reach() -> None:
    feature, _ = parts(patches_backbone())
    alpha = noise_pictures(5, (3, 8, 8), seed=3)
    alpha[4] = 5.0  # a mask that is the same everywhere
    start = torch.sigmoid(starting_logits(feature, planted(), latent_of(feature, planted(), alpha)))
    assert start.shape == (5, 3, 32, 32)
    assert start.isfinite().all()
    assert torch.equal(start[:, 0], start[:, 1])
    assert torch.equal(start[:, 0], start[:, 2])
    assert start.amin((1, 2, 3))[:4].tolist() == pytest.approx([0.05] * 4, abs=1e-5)
    assert start.amax((1, 2, 3))[:4].max() <= 0.95 + 1e-5


def test_the_target_distribution_is_iba_bottleneck() -> None:
    """Z* = lambda R + (1 - lambda) eps; neurons that are never active are silent."""
    feature, _ = parts(patches_backbone())
    active = feature.statistics.active.clone()
    active[..., 0, 0] = False
    known = dataclasses.replace(feature.statistics, active=active)
    feature = dataclasses.replace(feature, statistics=known)
    alpha = noise_pictures(5, (3, 8, 8), seed=3)
    mean, std = target_distribution(feature, latent_of(feature, planted(), alpha))
    lam, cells = torch.sigmoid(alpha.double()), feature.split.head(planted().inputs).values.double()
    torch.testing.assert_close(mean.double(), (lam * cells + (1 - lam) * known.mean) * active, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(std.double(), (1 - lam) * known.std * active, rtol=1e-4, atol=1e-5)


WGAN = WganEstimator(steps=3, generator_updates=2, critic_updates=2, samples=20, batch=8, width=4)


@pytest.fixture(scope="module")
def critics() -> tuple[Batch, Attribution]:
    settings = InputIBA(feature=IBA(steps=3, draws=2, smoothing=0.0), estimator="wgan", wgan=WGAN, output="prior")
    batch = batch_of(noise_pictures(4), [0, 1, 2, 3])
    return batch, settings.fit(small_backbone(), [batch_of(noise_pictures(10, seed=5), [0] * 10)], 0)(batch)


@pytest.mark.parametrize("rows", [[0], [1], [2], [3], [3, 1]])
def test_critics_together_are_critics_alone(rows: list[int], critics: tuple[Batch, Attribution]) -> None:
    batch, whole = critics
    settings = InputIBA(feature=IBA(steps=3, draws=2, smoothing=0.0), estimator="wgan", wgan=WGAN, output="prior")
    known = [batch_of(noise_pictures(10, seed=5), [0] * 10)]
    found = settings.fit(small_backbone(), known, 0)(batch.take(rows))
    assert relative(found.heatmap, whole.heatmap[rows]) < 1e-4
    curve = whole.diagnostics["distance_curve"]
    assert curve.shape == (4, 3)
    # differences of nearly equal means over the latents, so that their own rounding is larger
    assert relative(found.diagnostics["distance_curve"], curve[rows]) < 1e-3
    assert whole.heatmap.isfinite().all()
    for i in range(3):
        assert relative(whole.heatmap[i], whole.heatmap[i + 1]) > 1e-2


def test_the_generator_learns_from_the_critic(critics: tuple[Batch, Attribution]) -> None:
    """From another start than the mask's own, and every part of the generator has a say."""
    batch, whole = critics
    known = [batch_of(noise_pictures(10, seed=5), [0] * 10)]
    for change in ({"mask_rate": 0.0}, {"mean_rate": 0.0}, {"std_rate": 0.0}, {"critic_rate": 1e-3}, {"clip": 0.1}):
        wgan = dataclasses.replace(WGAN, **change)
        settings = InputIBA(feature=IBA(steps=3, draws=2, smoothing=0.0), estimator="wgan", wgan=wgan, output="prior")
        found = settings.fit(small_backbone(), known, 0)(batch)
        same_curve = relative(found.diagnostics["distance_curve"], whole.diagnostics["distance_curve"]) < 1e-5
        assert not same_curve, change


def critics_curve(**rates: float) -> Tensor:
    """The critic's distance, [5, 15] from round to round."""
    wgan = WganEstimator(
        steps=15, generator_updates=1, critic_updates=3, samples=64, batch=16, width=4,
        critic_rate=1e-3, clip=0.1, **rates,
    )  # fmt: skip
    settings = InputIBA(feature=FEATURE, estimator="wgan", wgan=wgan, output="prior")
    return settings.fit(patches_backbone(), KNOWN, 0)(planted()).diagnostics["distance_curve"]


def test_a_critic_tells_the_distributions_apart_and_a_generator_gives_in() -> None:
    """Against a generator that stands still a critic's distance grows; one that moves makes it smaller."""
    still = critics_curve(mask_rate=0.0, mean_rate=0.0, std_rate=0.0)
    assert (still[:, -3:].mean(1) > still[:, :3].mean(1)).all()
    assert (still[:, -3:] > 0).all()
    moving = critics_curve(mask_rate=0.003, mean_rate=0.1, std_rate=0.05)
    assert (moving[:, -3:].mean(1) < 0.8 * still[:, -3:].mean(1)).all()


def test_the_critic_is_three_convolutions_and_two_layers() -> None:
    """Stacked under vmap as in torch's own modules one by one, whose batch norm sees one picture's latents."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(4, 3, 4, 4), (8, 4, 4, 4), (4, 8, 3, 3), (256, 16), (1, 256)]
    weights = [torch.randn(2, *shape, generator=generator) for shape in shapes]
    latents = torch.randn(2, 6, 3, 8, 8, generator=generator) + 2
    found = _criticise(weights, latents)
    assert found.shape == (2, 6)
    for i in range(2):
        critic = nn.Sequential(
            nn.Conv2d(3, 4, 4, 2, 1, bias=False), nn.BatchNorm2d(4), nn.LeakyReLU(0.2),
            nn.Conv2d(4, 8, 4, 2, 1, bias=False), nn.BatchNorm2d(8), nn.LeakyReLU(0.2),
            nn.Conv2d(8, 4, 3, 1, 1, bias=False), nn.BatchNorm2d(4), nn.LeakyReLU(0.2),
            nn.Flatten(), nn.Linear(16, 256, bias=False), nn.LeakyReLU(0.2), nn.Linear(256, 1, bias=False),
        ).train()  # fmt: skip
        layers = [part for part in critic if isinstance(part, nn.Conv2d | nn.Linear)]
        with torch.no_grad():
            for layer, stacked in zip(layers, weights, strict=True):
                layer.weight.copy_(stacked[i])
            assert relative(found[i], critic(latents[i])[:, 0]) < 1e-4


def test_no_more_rows_at_once_than_allowed() -> None:
    """With the estimators' own passes too, and the same result."""
    batch = batch_of(noise_pictures(3), [0, 1, 2])
    known = [batch_of(noise_pictures(10, seed=5), [0] * 10)]
    for estimator in ("direct", "wgan"):
        settings = InputIBA(
            feature=IBA(steps=3, draws=2, smoothing=0.0),
            estimator=estimator,  # type: ignore[arg-type]
            direct=DirectEstimator(steps=3),
            wgan=WGAN,
            output="prior",
        )
        wanted = settings.fit(small_backbone(), known, 0)(batch).heatmap
        few = small_backbone(max_passes=5)
        assert relative(settings.fit(few, known, 0)(batch).heatmap, wanted) < 1e-3


# --- settings


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"estimator": "gan"}, "estimator is 'gan': direct, wgan, none or constant"),
        ({"output": "heatmap"}, "output is 'heatmap': mask or prior"),
        ({"steps": 0}, "steps is 0"),
        ({"draws": 0}, "draws is 0"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0"),
        ({"beta": -1.0}, "beta is -1.0"),
        ({"smoothing": -0.5}, "smoothing is -0.5"),
    ],
)
def test_settings_that_cannot_be(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        InputIBA(**change)


def test_layers_that_cannot_be() -> None:
    with pytest.raises(UserError, match="no layer 'stage7'"):
        InputIBA(feature=IBA(layer="stage7")).fit(small_backbone(), KNOWN, 0)
    with pytest.raises(UserError, match=r"'fc' gives \[5\]"):
        InputIBA(feature=IBA(layer="fc")).fit(small_backbone(), KNOWN, 0)


@pytest.mark.parametrize(
    "make",
    [
        lambda: DirectEstimator(draws=1),  # a deviation of one draw is NaN, and so is the map
        lambda: DirectEstimator(draws=0),
        lambda: DirectEstimator(steps=-1),
        lambda: DirectEstimator(learning_rate=0.0),
        lambda: DirectEstimator(smoothing=-1.0),
        lambda: WganEstimator(critic_updates=0),
        lambda: WganEstimator(samples=0),
        lambda: WganEstimator(batch=0),
    ],
)
def test_estimators_that_cannot_be(make: Any) -> None:
    with pytest.raises(UserError):
        InputIBA(direct=made) if isinstance(made := make(), DirectEstimator) else InputIBA(wgan=made)


def test_a_layer_too_small_for_the_critic_is_told() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 8, 16), nn.Flatten(), nn.Linear(16, 3))
    backbone = freeze(network, (3, 32, 32), {"bottleneck": "0"})
    settings = InputIBA(feature=IBA(steps=1, draws=1), estimator="wgan", wgan=WGAN, output="prior")
    with pytest.raises(UserError):
        settings.fit(backbone, KNOWN, 0)(planted())
