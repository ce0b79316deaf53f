"""Boolean masker: a network that says for any picture of a dataset which pixels its class can be told from.

    min over rho, f, g of   beta I(I.M; I) - I(I.M'; C)            M ~ Bernoulli(rho(I)), pixel by pixel     (Eq. 2)
    the map of a picture i is rho(i), the chance of each pixel to be visible

It is trained once, for a whole dataset, and then explains a picture in one forward of a small network. Of what the
objective is made: `masker_objective.py` (Eqs. 7, 8), `masker_model.py` (Eqs. 4, 11, 13), networks in the paper's
notation: `backbones/masker_networks.py`; how it is trained and judged: `masker_training.py`.

Reference: Zhmoginov, Fischer, Sandler, "Information-Bottleneck Approach to Salient Region Discovery", 2019.

Differently from the other methods here the map says what tells the *class* and does not depend on the row's target. As
published it does not look at the backbone either: it learns the dataset's labels with a classifier of its own. Our
additions: the frozen backbone in the classifier's place (`classifier=backbone`), and a masker that is fitted in the run
to the backbone's own answers on the reference split (`weights=reference`; a study, which may have changed the network,
always does so).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self, get_args

import torch
from torch import Tensor

from ibxai.backbones import Backbone
from ibxai.backbones.checkpoints import chosen
from ibxai.backbones.training import Recipe
from ibxai.errors import UserError
from ibxai.methods.masker_model import MaskerModel, Networks, Objective
from ibxai.methods.masker_objective import Control
from ibxai.methods.masker_training import MaskerLearner, given, new_model, taught_by
from ibxai.methods.settings import check_choice
from ibxai.types import Attribution, Attributor, Batch

if TYPE_CHECKING:
    from ibxai.train import Splits, TrainPlan

ClassifierName = Literal["own", "backbone"]
REFERENCE = "reference"
_ROWS = 64  # of the given network at once, in a training


@dataclass(frozen=True, kw_only=True)
class BooleanMasker:
    """weights: "trained" (the newest of `ibxai train` for this dataset), "reference" (fitted in the run), or a trained
    one's file. classifier: "own", trained with the masker, or "backbone", the frozen network. networks, objective,
    control, training: see `Networks`, `Objective`, `Control` and `Recipe`.
    """

    name: str
    weights: str
    classifier: ClassifierName
    networks: Networks
    objective: Objective
    control: Control
    training: Recipe

    version: ClassVar[int] = 3  # 1: rho could be 0 and 1; 2: what was shut did not open again
    architecture_settings: ClassVar[tuple[str, ...]] = ("classifier", "networks", "objective", "control")

    def __post_init__(self) -> None:
        check_choice(self, "classifier", *get_args(ClassifierName))

    @property
    def uses_reference(self) -> bool:
        return self.weights == REFERENCE

    def learner(self, plan: TrainPlan, splits: Splits) -> MaskerLearner:
        """What `ibxai train` trains. Raises UserError when the network that is to be explained is not there."""
        spec: Any = plan.backbone
        if self.classifier == "own":
            return MaskerLearner(self, spec.learner(plan, splits).spec.preprocessing, None, plan, splits)
        if (checkpoint := chosen(spec, plan.dataset, plan.answers, plan.outputs)) is not None:
            spec = spec.with_learnt(str(checkpoint.weights), checkpoint.described["learnt"])
        backbone = spec.load(_ROWS).to(plan.device)
        return MaskerLearner(self, backbone.preprocessing, backbone, plan, splits)

    def with_learnt(self, weights: str, learnt: Mapping[str, Any]) -> Self:
        """This method as a trained masker is known: by the digest of its weights."""
        return replace(self, weights=weights)

    def fit(
        self, backbone: Backbone, reference: Iterable[Batch], seed: int, state: Mapping[str, Tensor] | None = None
    ) -> Attributor:
        """state: of a trained masker; without one it is trained here, on the reference pictures. Diagnostics, [B]:
        `rho`, the mean of the map.
        """
        state = taught_by(self, backbone, reference, seed) if state is None else state
        model = new_model(self, backbone.preprocessing, backbone.outputs, seed, given(self, backbone))
        try:
            model.load_state_dict(state)
        except RuntimeError as error:
            shape = list(backbone.preprocessing.input_shape)
            raise UserError(
                f"The masker's weights do not fit pictures {shape} and {backbone.outputs} classes.\n"
                f"Train one for this backbone: ibxai train method={self.name} dataset=... backbone=..."
            ) from error
        model = model.to(backbone.device).eval().requires_grad_(False)
        return lambda batch: _attributed(model, batch, backbone.max_passes)


def _attributed(model: MaskerModel, batch: Batch, rows: int) -> Attribution:
    with torch.no_grad():
        rho = torch.cat([model.logits(part).sigmoid()[:, 0] for part in batch.inputs.split(rows)])
    return Attribution(rho, "mask", {"rho": rho.mean((1, 2))})
