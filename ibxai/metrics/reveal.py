"""Reveal: what the network says when nothing but one region is shown, such as the letters burned into an X-ray.

iGOS++ (Khorram et al., CHIL 2021, Fig. 12) blurs X-rays until the network calls them normal, then shows the boxes of
the text alone: if that makes it say COVID-19, the text decides. Each picture is judged four times: as it is, as its
baseline, with the region alone shown in the baseline, and without the region. No heatmap takes part: it is the test
that a map which lies on the letters asks for. The paper shows examples; the shares over all pictures are ours.

What counts is the run's target: target=label asks whether the letters bring back a picture's own class,
target=classes target.ids=[2] whether they make COVID-19 of any picture, as in Fig. 12b.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache, partial
from typing import ClassVar

import torch
from torch import Tensor

from ibxai.backbones import Backbone
from ibxai.cells import Cell, Coordinates
from ibxai.errors import UserError, nearest
from ibxai.memory import with_backoff
from ibxai.methods.perturbation import BASELINES, baseline_picture
from ibxai.metrics.localisation import region_of
from ibxai.metrics.study import Task
from ibxai.types import SCORE_KINDS, Batch, Score, ScoreKind

SHOWN = ("picture", "baseline", "region alone", "without region")


@dataclass(frozen=True)
class Reveal:
    """region: what is shown alone; rows without it are left out. baseline, sigma, kernel, value: of what is shown
    elsewhere, see `methods/perturbation.py`. score: "probability", "logit" or "value" of the target.
    """

    region: str = "letters"
    baseline: str = "blur"
    sigma: float = 50.0
    kernel: int | None = 51
    value: float = 0.0
    score: ScoreKind = "probability"

    version: ClassVar[int] = 1
    uses_regions: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for setting, known in (("baseline", BASELINES), ("score", SCORE_KINDS)):
            if getattr(self, setting) not in known:
                given = getattr(self, setting)
                raise UserError(f"There is no {setting} '{given}'. {nearest(given, known)}")
        if self.sigma <= 0 or (self.kernel is not None and (self.kernel < 1 or self.kernel % 2 == 0)):
            raise UserError(f"study.sigma={self.sigma:g}, study.kernel={self.kernel}: above 0, and odd or null.")

    def check(self, task: Task) -> None:
        """Whether there is such a region, pictures alone can tell."""

    def __call__(self, task: Task) -> Iterator[Score]:
        """By what is shown: score of the target, and predicted, 1 where the target is what the network says."""
        judged = cache(partial(self._judged, task))
        for shown in SHOWN:
            place: Coordinates = {"shown": shown}
            yield from task.cells.get(place, lambda place=place: judged()[place["shown"]]).scores()  # type: ignore[misc]

    def _judged(self, task: Task) -> dict[str, Cell]:
        rows: list[str] = []
        groups: list[str] = []
        found: dict[str, dict[str, list[float]]] = {shown: {"score": [], "predicted": []} for shown in SHOWN}
        for explained in task.explained():
            batch = explained.batch
            places = region_of(batch, self.region).flatten(1).any(1).nonzero()[:, 0].tolist()
            rows += [explained.row_ids[place] for place in places]
            groups += [batch.group_ids[place] for place in places]
            if places:
                answers = partial(self.shown, task.backbone, batch.take(places))
                values = with_backoff(answers, task.backbone, "study", batch.inputs.shape[1:])
                for shown, of_shown in values.items():
                    for name, column in of_shown.items():
                        found[shown][name] += column.tolist()
        if not rows:
            raise UserError(
                f"study={task.cells.key.name}: no picture of {task.dataset.name} has a region '{self.region}'.\n"
                "Phantoms have letters when made with --letters leak; COVIDx by dataset.letters=, see docs/clinic.md."
            )
        return {shown: Cell({"shown": shown}, tuple(rows), tuple(groups), found[shown]) for shown in SHOWN}

    def shown(self, backbone: Backbone, batch: Batch) -> Mapping[str, Mapping[str, Tensor]]:
        """What is shown -> score and predicted, float [B] each."""
        region = region_of(batch, self.region).any(1, keepdim=True)
        baseline = baseline_picture(batch.inputs, self.baseline, self.sigma, self.value, self.kernel)
        alone, without = (torch.where(m, batch.inputs, baseline) for m in (region, ~region))
        target = torch.tensor(batch.target.describe(), device=batch.inputs.device)
        found = {}
        with torch.no_grad():
            for name, inputs in zip(SHOWN, (batch.inputs, baseline, alone, without), strict=True):
                out = backbone(inputs)
                predicted = (batch.target.prediction(out)[0] == target).float()
                found[name] = {"score": batch.target.score(out, self.score), "predicted": predicted}
        return found
