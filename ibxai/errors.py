"""Errors a person can act on: what was found, what was expected, what to do."""

import textwrap
from collections.abc import Iterable
from difflib import get_close_matches

_LIST_WIDTH = 140  # characters


class UserError(Exception):
    """A mistake of the user's (a name, a path, a setting): one or two lines, no traceback, exit code 2."""


class BadSample(Exception):
    """One sample cannot be used. The run skips it, lists it in `skipped.csv` with this reason and goes on."""


def nearest(name: str, known: Iterable[str], most: int = 3) -> str:
    """The known names that `name` may have been meant for, as the end of an error line.

    With no near name it lists the known ones, as many as a line holds.
    """
    options = sorted(known)
    near = get_close_matches(name.lower(), options, n=most, cutoff=0.5)
    near += [o for o in options if name and name.lower() in o.lower() and o not in near][: most - len(near)]
    if near:
        return "Did you mean " + " or ".join(near) + "?"
    if not options:
        return "There are none."
    listed = textwrap.shorten(", ".join(options), _LIST_WIDTH, placeholder=" ...")
    return f"There are: {listed}."
