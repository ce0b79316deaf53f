"""Random: independent uniform numbers, the floor that every method must beat."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ibxai.backbones import Backbone
from ibxai.draws import sample_keys, uniform
from ibxai.types import Attribution, Attributor, Batch


@dataclass(frozen=True)
class Random:
    """Every pixel or token uniform in (0, 1), drawn for the sample and the seed."""

    version: ClassVar[int] = 1
    modalities: ClassVar[tuple[str, ...]] = ("picture", "text")
    uses_reference: ClassVar[bool] = False

    def fit(
        self, backbone: Backbone, reference: Iterable[Batch], seed: int, state: Mapping[str, Tensor] | None = None
    ) -> Attributor:
        """Nothing is estimated."""

        def attribute(batch: Batch) -> Attribution:
            keys = sample_keys(seed, batch.sample_ids, "random map", batch.inputs.device)
            drawn = uniform(keys, 0, batch.places)
            return Attribution(drawn if batch.valid is None else drawn * batch.valid, "score")

        return attribute
