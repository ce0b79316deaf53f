"""Where Quantus 0.6 means the same, it says the same; where it does not, the difference is pinned down here.

docs/metrics.md tells of both. Pictures have one channel where Quantus perturbs: it takes pixels a channel at a time.
"""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from networks import batch_of, fixed_seed, noise_pictures
from torch import Tensor, nn

from ibxai.backbones import Backbone, freeze
from ibxai.metrics import BoxShare, Deletion, EffectiveHeatRatio, PointingGame, SensitivityN
from ibxai.types import Attribution, Batch

quantus = pytest.importorskip("quantus")
pytestmark = pytest.mark.filterwarnings("ignore")

SIDE, ROWS = 16, 4
QUIET: dict[str, Any] = {"normalise": False, "abs": False, "disable_warnings": True, "return_aggregate": False}


def network() -> nn.Module:
    with fixed_seed(1):
        made = nn.Sequential(
            nn.Conv2d(1, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 6, 3, 2, 1), nn.ReLU(),
            nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(96, 3),
        )  # fmt: skip
    made[-1].weight.data.mul_(8)
    return made.eval().requires_grad_(False)


PICTURES = noise_pictures(ROWS, (1, SIDE, SIDE))
CLASSES = [0, 2, 1, 0]
MAPS = noise_pictures(ROWS, (1, SIDE, SIDE), 6)[:, 0]


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return freeze(network(), (1, SIDE, SIDE), name="small")


def boxes() -> Tensor:
    planes = torch.zeros(ROWS, 1, SIDE, SIDE, dtype=torch.bool)
    for row, (top, left, bottom, right) in enumerate([(2, 3, 9, 9), (0, 0, 4, 4), (8, 8, 15, 14), (5, 1, 7, 15)]):
        planes[row, 0, top:bottom, left:right] = True
    return planes


def annotated(planes: Tensor) -> Batch:
    return dataclasses.replace(batch_of(PICTURES, CLASSES), regions={"target": planes})


def theirs(metric: Any, heatmap: Tensor = MAPS, planes: Tensor | None = None, rows: int = ROWS, **settings: Any) -> Any:
    """What Quantus says; it draws from numpy's global generator."""
    state = np.random.get_state()
    np.random.seed(0)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return metric(
                model=network(),
                x_batch=PICTURES[:rows].numpy(),
                y_batch=np.array(CLASSES[:rows]),
                a_batch=heatmap[:rows, None].numpy(),
                s_batch=None if planes is None else planes[:rows].numpy(),
                device="cpu",
                **settings,
            )
    finally:
        np.random.set_state(state)


def ours(metric: Any, backbone: Backbone, heatmap: Tensor = MAPS, planes: Tensor | None = None) -> Tensor:
    batch = annotated(boxes() if planes is None else planes)
    return metric(backbone, batch, Attribution(heatmap, "score"))["value"]


# --- the same


def test_pointing_game_without_ties(backbone: Backbone) -> None:
    shown = MAPS.clone()
    shown[1, 2, 2] = 9
    shown[2, 10, 10] = 9
    found = ours(PointingGame(tolerance=0), backbone, shown)
    assert found.tolist() == [float(hit) for hit in theirs(quantus.PointingGame(**QUIET), shown, boxes())]
    assert set(found.tolist()) == {0.0, 1.0}


def test_relevance_rank_accuracy_is_bbox(backbone: Backbone) -> None:
    wanted = theirs(quantus.RelevanceRankAccuracy(**QUIET), planes=boxes())
    np.testing.assert_allclose(ours(BoxShare(largest=1.0), backbone), wanted, rtol=1e-6)
    assert np.std(wanted) > 0.02


def test_top_k_intersection_is_bbox_where_k_is_the_boxs_area(backbone: Backbone) -> None:
    planes = boxes()[:1].expand(ROWS, -1, -1, -1)
    wanted = theirs(quantus.TopKIntersection(k=int(planes[0].sum()), **QUIET), planes=planes)
    np.testing.assert_allclose(ours(BoxShare(largest=1.0), backbone, planes=planes), wanted, rtol=1e-6)


def test_attribution_localisation_is_the_heat_share_of_all_pixels(backbone: Backbone) -> None:
    """EHR of the two thresholds 0 and maximum, the second of which is the maximum's own pixel."""
    metric = EffectiveHeatRatio(quantiles=2, floor=None, ratio="heat_share", largest=1.0)
    shown = MAPS.clone()
    shown[:, 0, 15] = 9  # outside every box: the second threshold gives 0
    wanted = theirs(quantus.AttributionLocalisation(positive_attributions=True, **QUIET), shown, boxes())
    np.testing.assert_allclose(2 * ours(metric, backbone, shown), wanted, rtol=1e-5)


def test_pixel_flipping_is_the_curve_of_deletion_without_its_start(backbone: Backbone) -> None:
    wanted = theirs(quantus.PixelFlipping(features_in_step=32, perturb_baseline=0.0, **QUIET), softmax=True)
    found = Deletion(step=32, baseline="constant")(backbone, annotated(boxes()), Attribution(MAPS, "score"))["curve"]
    np.testing.assert_allclose(found[:, 1:], wanted, rtol=1e-4, atol=1e-6)


def test_faithfulness_correlation_is_sensitivity_n_at_one_n(backbone: Backbone) -> None:
    """Other draws, so equal to what 400 and 400 sets leave open."""
    out = PICTURES.clone().requires_grad_()
    network()(out)[torch.arange(ROWS), torch.tensor(CLASSES)].sum().backward()
    assert out.grad is not None
    shown = (PICTURES * out.grad)[:, 0] + 0.02 * MAPS
    metric = quantus.FaithfulnessCorrelation(nr_runs=400, subset_size=26, perturb_baseline=0.0, **QUIET)
    wanted = np.array(theirs(metric, shown, softmax=False))
    found = ours(SensitivityN(points=1, smallest=26, sets=400), backbone, shown).numpy()
    assert np.ptp(wanted) > 0.1
    spread = np.sqrt(2 / 400) * (1 - wanted**2)
    assert (abs(found - wanted) < 4 * spread).all()


# --- not the same


def test_their_sensitivity_n_is_another_thing() -> None:
    """Of the exact shares of a linear network, the correlation that Ancona et al. define is 1 at every n.

    Quantus deletes cumulatively in the map's order, compares the sum of each step's own pixels with the change of all
    steps so far, and correlates over the pictures of the first batch: not over random sets, not within a picture.
    """
    linear = nn.Sequential(nn.Flatten(), nn.Linear(SIDE * SIDE, 3, bias=False))
    shares = (PICTURES[:, 0].flatten(1) * linear[1].weight[CLASSES].detach()).view(ROWS, SIDE, SIDE)
    frozen = freeze(linear, (1, SIDE, SIDE), name="linear")
    assert (ours(SensitivityN(sets=30, points=5), frozen, shares) > 0.9999).all()
    found = quantus.SensitivityN(features_in_step=32, perturb_baseline=0.0, **QUIET)(
        model=linear.eval(),
        x_batch=PICTURES.numpy(),
        y_batch=np.array(CLASSES),
        a_batch=shares[:, None].numpy(),
        device="cpu",
        softmax=False,
    )
    assert len(found) == 6  # one a step, none a picture
    assert found[0] == pytest.approx(1)  # where "so far" is one step
    assert min(found) < 0.9
    with pytest.raises(ValueError, match="length at least 2"):  # and one picture alone has no value
        theirs(quantus.SensitivityN(features_in_step=32, perturb_baseline=0.0, **QUIET), rows=1)


def test_their_pointing_game_counts_an_empty_region_as_a_hit(backbone: Backbone) -> None:
    """NaN is written into an array of booleans, where it is True."""
    planes = boxes()
    planes[1] = False
    assert theirs(quantus.PointingGame(**QUIET), planes=planes)[1]
    assert ours(PointingGame(tolerance=0), backbone, planes=planes)[1].isnan()


def test_their_pointing_game_gives_a_constant_map_the_full_score(backbone: Backbone) -> None:
    shown = torch.arange(1.0, ROWS + 1)[:, None, None].expand(ROWS, SIDE, SIDE)  # a batch of one constant is refused
    assert all(theirs(quantus.PointingGame(**QUIET), shown, boxes()))
    share = boxes().sum((1, 2, 3)) / SIDE**2
    np.testing.assert_allclose(ours(PointingGame(tolerance=0), backbone, shown), share, rtol=1e-6)


def test_their_ties_are_broken_by_position(backbone: Backbone) -> None:
    """A constant map finds a box in the top left corner, and none elsewhere."""
    planes = torch.zeros(ROWS, 1, SIDE, SIDE, dtype=torch.bool)
    planes[:2, :, :2] = True
    planes[2:, :, -2:] = True
    shown = torch.arange(1.0, ROWS + 1)[:, None, None].expand(ROWS, SIDE, SIDE)  # a batch of one constant is refused
    assert np.ptp(theirs(quantus.RelevanceRankAccuracy(**QUIET), shown, planes)) > 0.9
    assert (ours(BoxShare(), backbone, shown, planes) < 0.5).all()


def test_their_areas_need_an_older_numpy() -> None:
    metric = quantus.PixelFlipping(features_in_step=32, perturb_baseline=0.0, return_auc_per_sample=True, **QUIET)
    if hasattr(np, "trapz"):
        assert len(theirs(metric)) == ROWS
    else:
        with pytest.raises(AttributeError, match="trapz"):
            theirs(metric)


def test_their_weighted_localisation_divides_by_the_wrong_area() -> None:
    """It slices the batch where it means the shape: the area is that of all but two pictures."""
    quiet = {**QUIET, "positive_attributions": True}
    plain = np.array(theirs(quantus.AttributionLocalisation(**quiet), planes=boxes()))
    weighted = np.array(theirs(quantus.AttributionLocalisation(weighted=True, **quiet), planes=boxes()))
    area = boxes().sum((1, 2, 3)).numpy()
    np.testing.assert_allclose(weighted / plain, area / ((ROWS - 2) * SIDE**2), rtol=1e-6)


def test_their_normalisation_feels_the_neighbours() -> None:
    """By the maximum of the whole batch."""
    alone = quantus.normalise_func.normalise_by_max(MAPS[:1].numpy())
    beside = quantus.normalise_func.normalise_by_max(torch.cat([MAPS[:1], 10 * MAPS[1:]]).numpy())[:1]
    assert abs(alone).max() == pytest.approx(1)
    assert abs(beside).max() < 0.5
