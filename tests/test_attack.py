"""MI-FGSM: against a plain re-derivation in float64, inside its ball, row by row; and as part of a run's identity."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from networks import batch_of, noise_pictures, relative, small_backbone, small_net
from test_method_contract import state_of
from test_study_runs import plan, weights  # noqa: F401  # fixtures
from torch import Tensor, nn

from ibxai.attacks import MIFGSM
from ibxai.backbones import Backbone, freeze
from ibxai.errors import UserError
from ibxai.metrics import Insertion, SensitivityN
from ibxai.metrics.randomization import ParameterRandomization
from ibxai.pipeline import Plan, run
from ibxai.preprocessing import Preprocessing
from ibxai.report import write_leaderboard
from ibxai.report.runs import read_runs, run_labels
from ibxai.store import RunStore
from ibxai.targets import MultiLabel
from ibxai.types import Batch

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)


def backbone(max_passes: int = 256) -> Backbone:
    return freeze(small_net(), preprocessing=Preprocessing(32, 32, MEAN, STD), name="small", max_passes=max_passes)


def columns(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    mean, std = (torch.tensor(values, dtype=dtype)[:, None, None] for values in (MEAN, STD))
    return mean, std


def five() -> Batch:
    """Colours from 0 to 1, some of them at the ends."""
    colours = (noise_pictures(5) / 4 + 0.5).clamp(0, 1)
    mean, std = columns()
    return batch_of((colours - mean) / std, [0] * 5)


def plain(network: nn.Module, picture: Tensor, attack: MIFGSM) -> Tensor:
    """Eq. 6 and 7 for one picture [C, H, W] of normalised colours, in float64, with one loop more than needed."""
    mean, std = columns(torch.float64)
    start = picture.double() * std + mean
    predicted = int(network(picture.double()[None]).argmax())
    x, g = start.clone(), torch.zeros_like(start)
    for _ in range(attack.steps):
        leaf = x.clone().requires_grad_()
        log_probability = network(((leaf - mean) / std)[None]).log_softmax(1)[0]
        loss = -log_probability[predicted] if attack.target is None else log_probability[attack.target]
        loss.backward()
        assert leaf.grad is not None
        g = attack.momentum * g + leaf.grad / leaf.grad.abs().sum()
        for channel in range(3):
            eps, own = attack.eps / 255, start[channel]
            moved = x[channel] + eps / attack.steps * torch.sign(g[channel])
            x[channel] = torch.minimum(torch.maximum(moved, own - eps), own + eps).clamp(0, 1)
    return (x - mean) / std


@pytest.mark.parametrize("attack", [MIFGSM(eps=8, steps=4), MIFGSM(eps=3, steps=3, momentum=0.5, target=2)])
def test_as_the_paper_has_it(attack: MIFGSM) -> None:
    network, batch = small_net().double().eval(), five()
    found = attack.perturb(backbone(), batch).inputs
    wanted = torch.stack([plain(network, picture, attack) for picture in batch.inputs])
    # where the gradient is 0 but for rounding its sign is anybody's guess
    assert float(((found - wanted).abs() > 1e-4).double().mean()) < 0.002


@pytest.mark.parametrize("target", [None, 3])
def test_it_stays_in_its_ball_and_is_no_noise(target: int | None) -> None:
    attack, network, batch = MIFGSM(eps=10, target=target), backbone(), five()
    attacked = attack.perturb(network, batch)
    mean, std = columns()
    before, after = (part.inputs * std + mean for part in (batch, attacked))
    assert float((after - before).abs().max()) <= 10 / 255 + 1e-6
    assert float((after - before).abs().max()) > 9.9 / 255
    assert -1e-6 <= float(after.min()) <= float(after.max()) <= 1 + 1e-6
    with torch.no_grad():
        own, now = network(batch.inputs).log_softmax(1), network(attacked.inputs).log_softmax(1)
        random = torch.where(noise_pictures(5, seed=9) > 0, 10, -10) / 255
        chance = network(((before + random).clamp(0, 1) - mean) / std).log_softmax(1)
    if target is None:
        rows = torch.arange(5), own.argmax(1)
        assert (own[rows] - now[rows] > 10 * (own[rows] - chance[rows]).abs()).all()
    else:
        assert (now[:, target] - own[:, target] > 10 * (chance[:, target] - own[:, target]).abs()).all()
    assert attacked.sample_ids == batch.sample_ids
    assert attacked.target is batch.target


def test_rows_do_not_feel_each_other() -> None:
    attack, batch = MIFGSM(steps=3), five()
    whole = attack.perturb(backbone(), batch).inputs
    for rows in ([0], [4], [3, 1], [2, 0, 1, 4, 3]):
        assert relative(attack.perturb(backbone(), batch.take(rows)).inputs, whole[rows]) < 1e-4
    assert relative(attack.perturb(backbone(max_passes=4), batch).inputs, whole) < 1e-4


def test_nothing_is_left_behind() -> None:
    network, batch = small_backbone(), five()
    before, inputs = state_of(network), batch.inputs.clone()
    with torch.no_grad():
        attacked = MIFGSM(steps=2).perturb(network, batch)
        assert not torch.is_grad_enabled()
    assert state_of(network) == before
    assert torch.equal(batch.inputs, inputs)
    assert not batch.inputs.requires_grad
    assert not attacked.inputs.requires_grad


def test_a_network_without_a_slope_is_left_alone() -> None:
    class Deaf(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 2)
            nn.init.zeros_(self.layer.weight)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x.mean((2, 3)))

    batch = batch_of(noise_pictures(2).clamp(0, 1), [0, 0])
    assert relative(MIFGSM().perturb(freeze(Deaf(), (3, 32, 32)), batch).inputs, batch.inputs) < 1e-6


@pytest.mark.parametrize("settings", [{"eps": 0.0}, {"eps": 300.0}, {"steps": 0}, {"momentum": -1.0}])
def test_settings_that_cannot_be(settings: dict[str, float]) -> None:
    with pytest.raises(UserError, match=rf"attack\.{next(iter(settings))}="):
        MIFGSM(**settings)  # type: ignore[arg-type]


def test_a_class_that_is_none() -> None:
    with pytest.raises(UserError, match="classes are 0 to 4"):
        MIFGSM(target=5).perturb(small_backbone(), five())


# in a run


def attacked(plan: Plan) -> Plan:  # noqa: F811
    return replace(plan, study=None, study_name="", attack=MIFGSM(eps=40, steps=4), attack_name="mi_fgsm")


def test_a_run_explains_and_judges_the_adversarial_inputs(plan: Plan) -> None:  # noqa: F811
    judged = {"insertion": Insertion(step=0.25), "sensitivity_n": SensitivityN(points=3, sets=5)}
    clean = run(replace(plan, study=None, study_name="", metrics=judged))
    outcome = run(replace(attacked(plan), metrics=judged))
    assert outcome.folder != clean.folder
    stores = [RunStore(done.folder) for done in (clean, outcome)]
    told = [store.provenance() for store in stores]
    assert "attack" not in told[0]["identity"]
    assert told[1]["identity"]["attack"]["eps"] == 40
    assert any("Adversarial inputs" in note for note in told[1]["notes"])
    assert "Adversarial inputs" in outcome.report.read_text()
    rows = [row.row_id for row in stores[0].rows()]
    before, after = ([store.read_heatmap(row_id) for row_id in rows] for store in stores)
    assert any(one.prediction != other.prediction for one, other in zip(before, after, strict=True))
    pictures = [store.read_picture(rows[0]) for store in stores]
    assert pictures[0] is not None
    assert pictures[1] is not None
    difference = np.abs(pictures[0].astype(int) - pictures[1].astype(int))
    assert 0 < difference.max() <= 41
    for key in stores[0].metrics():  # the curve ends at what the network says of the whole picture that was judged
        if key.name == "insertion":
            scores = stores[1].read_scores(key)
            for stored in after:
                assert scores[stored.row_id]["curve"][-1] == pytest.approx(stored.target_probability, abs=1e-4)
    cache = clean.folder.parent.parent / "cache"
    assert len(list(cache.glob("responses-*"))) == 2  # what the network says of clean pictures is not taken for it
    assert run(replace(attacked(plan), metrics=judged)).new_heatmaps == 0


def test_the_leaderboard_tells_them_apart(plan: Plan) -> None:  # noqa: F811
    for asked in (replace(plan, study=None, study_name=""), attacked(plan)):
        run(replace(asked, metrics={"insertion": Insertion(step=0.5)}))
    labels = run_labels(list(read_runs(plan.outputs)))  # type: ignore[misc]  # none is damaged
    assert sorted(labels) == ["gradcam (attack = MIFGSM)", "gradcam (attack = none)"]
    assert "attack = MIFGSM" in write_leaderboard(plan.outputs).read_text()


def test_what_an_attack_is_not_for(plan: Plan) -> None:  # noqa: F811
    for changed, says in [
        ({"target": MultiLabel((0,))}, "names one class"),
        ({"study": ParameterRandomization(), "study_name": "parameter_randomization"}, "without an attack"),
    ]:
        with pytest.raises(UserError, match=says):
            run(replace(attacked(plan), **changed))
        assert not plan.outputs.exists()
