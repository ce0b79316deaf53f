"""Integrated gradients: closed forms, the quadrature step by step in float64, captum's own call, completeness."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from networks import batch_of, noise_pictures, patch_pictures, patches_backbone, relative, small_backbone, small_net
from test_gradients import linear_backbone, rectified
from torch import Tensor

from ibxai.backbones import freeze
from ibxai.errors import UserError
from ibxai.methods import GradientXInput, IntegratedGradients
from ibxai.methods.perturbation import gaussian_blur


@pytest.mark.parametrize("steps", [1, 2, 7])
@pytest.mark.parametrize("baseline", ["constant", "blur"])
def test_a_linear_network(steps: int, baseline: str) -> None:
    """w (x - x'), with any number of steps."""
    backbone, weights = linear_backbone()
    pictures, classes = noise_pictures(3, (3, 6, 6)), [3, 0, 1]
    method = IntegratedGradients(steps=steps, baseline=baseline, sigma=1.5, value=0.25)
    found = method.fit(backbone, [], 0)(batch_of(pictures, classes))
    start = gaussian_blur(pictures, 1.5) if baseline == "blur" else torch.full_like(pictures, 0.25)
    wanted = torch.from_numpy(weights[classes]) * (pictures - start).double()
    assert relative(found.heatmap, wanted.sum(1)) < 1e-5
    torch.testing.assert_close(
        found.diagnostics["score_difference"].double(), wanted.sum((1, 2, 3)), rtol=1e-4, atol=1e-5
    )
    assert found.diagnostics["completeness_error"].max() < 1e-4


def plain_integral(picture: Tensor, start: Tensor, target: int, steps: int) -> tuple[Tensor, float]:
    """([3, H, W], score difference) in float64, one step after the other at the roots of Legendre's polynomial."""
    network = small_net().eval().double()
    roots, weights = np.polynomial.legendre.leggauss(steps)
    picture, start = picture.double(), start.double()
    total = torch.zeros_like(picture)
    for root, weight in zip(roots, weights, strict=True):
        at = (start + (root + 1) / 2 * (picture - start)).requires_grad_()
        (gradient,) = torch.autograd.grad(network(at[None])[0, target], at)
        total += weight / 2 * gradient
    with torch.no_grad():
        difference = network(picture[None])[0, target] - network(start[None])[0, target]
    return total * (picture - start), float(difference)


@pytest.mark.parametrize("channels", ["sum", "max_abs"])
def test_step_by_step_in_float64(channels: str) -> None:
    pictures, classes = noise_pictures(3), [1, 4, 2]
    method = IntegratedGradients(steps=8, value=-0.3, channels=channels)
    found = method.fit(small_backbone(max_passes=7), [], 0)(batch_of(pictures, classes))
    for i, target in enumerate(classes):
        wanted, difference = plain_integral(pictures[i], torch.full((3, 32, 32), -0.3), target, 8)
        over = wanted.sum(0) if channels == "sum" else wanted.abs().amax(0)
        assert relative(found.heatmap[i], over) < 1e-3
        error = abs(float(wanted.sum()) - difference) / abs(difference)
        assert error > 1e-3  # eight steps are few, and the figure has to say so
        assert found.diagnostics["completeness_error"][i] == pytest.approx(error, rel=0.02)
        assert found.diagnostics["score_difference"][i] == pytest.approx(difference, rel=1e-3)


def test_one_step_is_the_gradient_half_way_times_the_way() -> None:
    pictures, classes = noise_pictures(3), [1, 4, 2]
    found = IntegratedGradients(steps=1, value=0.2, tolerance=1e6).fit(small_backbone(), [], 0)
    half = ((pictures + 0.2) / 2).double().requires_grad_()
    (gradient,) = torch.autograd.grad(small_net().eval().double()(half)[range(3), classes].sum(), half)
    assert relative(found(batch_of(pictures, classes)).heatmap, (gradient * (pictures - 0.2)).sum(1)) < 1e-4


@pytest.mark.parametrize("steps", [1, 5])
def test_on_a_homogeneous_network_it_is_gradient_x_input(steps: int) -> None:
    """The gradient is the same all the way from 0."""
    backbone, batch = freeze(rectified(), (3, 6, 6)), batch_of(noise_pictures(4, (3, 6, 6)), [0, 1, 2, 3])
    found = IntegratedGradients(steps=steps).fit(backbone, [], 0)(batch)
    assert relative(found.heatmap, GradientXInput().fit(backbone, [], 0)(batch).heatmap) < 1e-5


def test_patches_share_what_they_are_worth() -> None:
    """A patch counts from half its brightness on, so on the second half of the way: 12 / 16 / 2 a pixel, 6 a patch."""
    places = [((0, 1, 2), (1, 6, 5)), ((0, 7, 0), (1, 3, 3), (0, 2, 5))]
    wanted = torch.zeros(2, 32, 32)
    for one, patches in zip(wanted, places, strict=True):
        for colour, row, column in patches:
            if colour == 0:
                one[4 * row : 4 * row + 4, 4 * column : 4 * column + 4] = 0.375
    found = IntegratedGradients().fit(patches_backbone(), [], 0)(batch_of(patch_pictures(places), [0, 0]))
    torch.testing.assert_close(found.heatmap, wanted)
    torch.testing.assert_close(found.diagnostics["score_difference"], torch.tensor([6.0, 12.0]))


@pytest.mark.parametrize("most", [2, 16, 200])
def test_against_captums_own_call(most: int) -> None:
    captum = pytest.importorskip("captum.attr")
    pictures, classes = noise_pictures(3), [1, 4, 2]
    own = captum.IntegratedGradients(small_net().eval())
    wanted = own.attribute(pictures, gaussian_blur(pictures, 2.0), target=torch.tensor(classes), n_steps=20)
    method = IntegratedGradients(steps=20, baseline="blur", sigma=2.0)
    found = method.fit(small_backbone(max_passes=most), [], 0)(batch_of(pictures, classes))
    assert relative(found.heatmap, wanted.detach().sum(1)) < 1e-4


def test_the_error_falls_with_the_steps() -> None:
    batch = batch_of(noise_pictures(4), [1, 4, 2, 0])
    errors = [
        IntegratedGradients(steps=steps).fit(small_backbone(), [], 0)(batch).diagnostics["completeness_error"].mean()
        for steps in (4, 32, 256)
    ]
    assert errors[0] > 3 * errors[1] > 9 * errors[2] > 0


def test_a_picture_that_is_the_baseline() -> None:
    found = IntegratedGradients().fit(small_backbone(), [], 0)(batch_of(torch.zeros(1, 3, 32, 32), [2]))
    assert found.heatmap.abs().max() == 0
    assert found.diagnostics["completeness_error"] == 0


def test_large_errors_are_told_and_larger_ones_end_the_run(caplog: pytest.LogCaptureFixture) -> None:
    batch = batch_of(noise_pictures(3), [1, 4, 2], ["first", "second", "third"])
    quiet = IntegratedGradients(steps=2, warn_above=1e9, tolerance=1e9)
    error = quiet.fit(small_backbone(), [], 0)(batch).diagnostics["completeness_error"]
    assert not caplog.records
    worst = int(error.argmax())
    between = float(error.sort().values[1:].mean())
    with caplog.at_level(logging.WARNING):
        IntegratedGradients(steps=2, warn_above=between).fit(small_backbone(), [], 0)(batch)
    assert f"1 of 3 rows have a completeness error above {between:g} ({batch.sample_ids[worst]}:" in caplog.text
    with pytest.raises(UserError, match=rf"^Integrated gradients of {batch.sample_ids[worst]}: .*\nRaise method.steps"):
        IntegratedGradients(steps=2, tolerance=between).fit(small_backbone(), [], 0)(batch)


def test_passes() -> None:
    backbone = small_backbone(max_passes=16)
    with backbone.counting() as passes:
        IntegratedGradients(steps=11).fit(backbone, [], 0)(batch_of(noise_pictures(3), [1, 4, 2]))
    assert dict(passes) == {"forward": 11 * 3 + 2 * 3, "backward": 11 * 3}


def test_settings_that_cannot_be() -> None:
    with pytest.raises(UserError, match=r"method.steps is 0"):
        IntegratedGradients(steps=0)
    with pytest.raises(UserError, match=r"method.baseline is 'black'"):
        IntegratedGradients(baseline="black")
    with pytest.raises(UserError, match=r"method.floor is -1"):
        IntegratedGradients(floor=-1)
