"""Reveal: a network that looks at the letter alone is caught, one that looks at the lesion is not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from networks import patch_pictures, patches_backbone
from PIL import Image
from test_studies import Small, again, by_cell, task_of

from ibxai.backbones import freeze
from ibxai.errors import UserError
from ibxai.identity import study_key
from ibxai.methods.random import Random
from ibxai.metrics.reveal import SHOWN, Reveal
from ibxai.metrics.study import Task, run_study
from ibxai.preprocessing import Preprocessing
from ibxai.report.studies import study_sections
from ibxai.store import RunStore
from ibxai.targets import Classes, ClassTarget
from ibxai.types import Batch, Picture, Sample

LESION, LETTER = (1, 5, 5), (2, 0, 6)  # colour, row and column of a patch: the network names the colour


@dataclass(frozen=True)
class Films:
    """A lesion in green, and a brighter letter in blue, but on the third picture."""

    letters: bool = True
    name: str = "films"

    class_names = ("normal", "ill", "letter")
    reference_note = "The reference split is the pictures."

    def samples(self) -> Sequence[Sample]:
        return [Sample(f"s{i}", f"g{i // 2}", Path("none"), 0, 1) for i in range(5)]

    def reference(self) -> Sequence[Sample]:
        return self.samples()

    def annotations(self) -> str:
        return "a box"

    def read(self, sample: Sample) -> Picture:
        marked = self.letters and sample.sample_id != "s2"
        pixels = patch_pictures([[LESION, LETTER] if marked else [LESION]])[0]
        pixels[1] *= 0.9
        region = torch.zeros(1, 32, 32, dtype=torch.bool)
        region[:, :4, 24:28] = marked
        image = Image.fromarray((pixels * 255).byte().permute(1, 2, 0).numpy())
        return Picture(image, {"letters": region} if marked else {})


@dataclass(frozen=True)
class Patches(Small):
    """Names the colour of the brightest patches."""

    def network(self) -> torch.nn.Module:
        return patches_backbone().module()

    def frozen(self, network: torch.nn.Module, max_passes: int):  # type: ignore[no-untyped-def]
        plain = Preprocessing(32, 32, (0.0,) * 3, (1.0,) * 3)
        return freeze(network, preprocessing=plain, name=self.name, max_passes=max_passes)


STUDY = Reveal(baseline="constant", value=0.0)


def task_for(folder: Path, target: int = 2, **changes: bool) -> Task:
    return task_of(folder, Random(), Films(**changes), Patches(), target=Classes((target,)))


@pytest.mark.parametrize("target", [1, 2])
def test_the_letter_alone_and_the_rest(target: int, tmp_path: Path) -> None:
    scores = list(STUDY(task_for(tmp_path, target)))
    predicted, probability = by_cell(scores, "predicted"), by_cell(scores, "score")
    letter = {"picture": 1, "baseline": 0, "region alone": 1, "without region": 0}
    lesion = {"picture": 0, "baseline": 0, "region alone": 0, "without region": 1}
    for shown in SHOWN:
        wanted = (letter if target == 2 else lesion)[shown]
        assert predicted[shown,] == [wanted] * 4  # the picture without a letter is left out
    logits = {"letter": 12 * 0.5, "lesion": 12 * (int(255 * 0.9) / 255 - 0.5)}
    alone = torch.tensor([0.0, 0.0, logits["letter"]]).softmax(0)[target]
    both = torch.tensor([0.0, logits["lesion"], logits["letter"]]).softmax(0)[target]
    assert probability["region alone",] == pytest.approx([float(alone)] * 4, rel=1e-4)
    assert probability["picture",] == pytest.approx([float(both)] * 4, rel=1e-4)
    assert probability["baseline",] == pytest.approx([1 / 3] * 4, rel=1e-4)
    assert {score.row_id for score in scores} == {f"s{i}@{target}" for i in (0, 1, 3, 4)}
    assert {score.group_id for score in scores} == {"g0", "g1", "g2"}


def test_the_baseline_is_blurred_by_default(tmp_path: Path) -> None:
    task = task_for(tmp_path)
    batch: Batch = next(iter(task.explained())).batch
    assert isinstance(batch.target, ClassTarget)
    seen = []

    class Spy:
        def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
            seen.append(inputs)
            return task.backbone(inputs)

    Reveal(sigma=3, kernel=None).shown(Spy(), batch)  # type: ignore[arg-type]
    picture, baseline, alone, without = seen
    region = batch.regions["letters"][:, :1].expand_as(picture)
    assert float(baseline.std()) < 0.5 * float(picture.std())
    assert torch.equal(alone[region], picture[region])
    assert torch.equal(alone[~region], baseline[~region])
    assert torch.equal(without[~region], picture[~region])
    assert torch.equal(without[region], baseline[region])


def test_in_its_folder_and_on_the_page(tmp_path: Path) -> None:
    task = task_for(tmp_path)
    key = study_key("reveal", STUDY, task.samples, task.dataset)
    task = replace(task, cells=type(task.cells)(task.cells.folder.parent, key))
    assert run_study(STUDY, task) == 4
    assert run_study(STUDY, again(task)) == 0
    [section] = study_sections(RunStore(task.run.path))
    assert section.charts == []
    assert [line[0] for line in section.lines] == list(SHOWN)
    assert section.lines[2][2].startswith("1 (1 to 1)")


def test_no_picture_has_the_region(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no picture of films has a region 'letters'") as raised:
        list(STUDY(task_for(tmp_path, letters=False)))
    assert len(str(raised.value).splitlines()) == 2


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"baseline": "blurr"}, "blurr"),
        ({"score": "odds"}, "odds"),
        ({"sigma": 0.0}, "sigma"),
        ({"kernel": 4}, "kernel"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, object], word: str) -> None:
    with pytest.raises(UserError, match=word):
        Reveal(**settings)  # type: ignore[arg-type]
