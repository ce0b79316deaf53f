"""Checks that the settings of several methods share."""

from __future__ import annotations

from ibxai.errors import UserError


def check_positive(settings: object, *names: str, part: str = "method") -> None:
    """Raises UserError for a setting that is not above 0."""
    for name in names:
        if not getattr(settings, name) > 0:
            raise UserError(f"{part}.{name} is {getattr(settings, name)}: it must be above 0.")


def check_not_negative(settings: object, *names: str, part: str = "method") -> None:
    """Raises UserError for a setting below 0, or no number."""
    for name in names:
        if not getattr(settings, name) >= 0:
            raise UserError(f"{part}.{name} is {getattr(settings, name)}: it must not be negative.")


def check_choice(settings: object, name: str, *known: str) -> None:
    """Raises UserError for a setting that is none of the known words."""
    if (found := getattr(settings, name)) not in known:
        raise UserError(f"method.{name} is '{found}': {', '.join(known[:-1])} or {known[-1]} is expected.")
