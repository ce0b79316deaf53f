"""Pictures and texts: every part says what it is for, and parts that do not fit each other are refused before a run.

A dataset and a backbone have one `modality`, "picture" where they say nothing; methods, metrics and studies name all
that they work on in `modalities`, ("picture",) where they say nothing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any

from ibxai.catalogue import entries
from ibxai.errors import UserError

if TYPE_CHECKING:
    from ibxai.pipeline import Plan

_PICTURE = "picture"


def check_modalities(plan: Plan) -> None:
    """Raises UserError, with the names that would fit, when a part is not for what the dataset holds."""
    check_reads(plan.backbone, plan.dataset)
    held, name = modality(plan.dataset), plan.dataset.name
    study = {} if plan.study is None else {plan.study_name: plan.study}
    attack = {} if plan.attack is None else {plan.attack_name: plan.attack}
    chosen: Mapping[str, Mapping[str, Any]] = {
        "method": {plan.method_name: plan.method}, "metric": plan.metrics, "study": study, "attack": attack
    }  # fmt: skip
    for group, parts in chosen.items():
        for part_name, part in parts.items():
            if held not in modalities(part):
                fits = _fitting(group, held)
                told = f"For {held}s: {group}={', '.join(fits)}." if fits else f"There is no {group} for {held}s."
                raise UserError(f"{group}={part_name} is not for {held}s, and dataset={name} holds {held}s.\n{told}")


def check_reads(backbone: Any, dataset: Any) -> None:
    """Raises UserError when a network reads something else than the dataset holds."""
    held = modality(dataset)
    if modality(backbone) != held:
        raise UserError(
            f"backbone={backbone.name} reads {modality(backbone)}s, and dataset={dataset.name} holds {held}s.\n"
            f"For {held}s: backbone={', '.join(_fitting('backbone', held))}."
        )


def modality(part: Any) -> str:
    """What a dataset holds or a backbone reads."""
    return getattr(part, "modality", _PICTURE)


def modalities(part: Any) -> tuple[str, ...]:
    """What a method, a metric or a study works on."""
    return getattr(part, "modalities", (_PICTURE,))


def _fitting(group: str, held: str) -> list[str]:
    """The names of a group whose classes are for this."""
    targets = {name: re.search(r"_target_: *(\S+)", entry.text) for name, entry in entries()[group].items()}
    classes = {name: resolve_name(found[1]) for name, found in targets.items() if found}
    if group == "backbone":
        return [name for name, cls in classes.items() if modality(cls) == held]
    return [name for name, cls in classes.items() if held in modalities(cls)]
