"""Errors a person can act on: what was found, what was expected, what to do."""

from collections.abc import Iterable
from difflib import get_close_matches


class UserError(Exception):
    """A mistake of the user's (a name, a path, a setting): one or two lines, no traceback, exit code 2."""


class BadSample(Exception):
    """One sample cannot be used. The run skips it, lists it in `skipped.csv` with this reason and goes on."""


def nearest(name: str, known: Iterable[str], most: int = 3) -> str:
    """The known names that `name` may have been meant for, as the end of an error line.

    With no near name it lists all the known ones, up to twenty.
    """
    options = sorted(known)
    near = get_close_matches(name.lower(), options, n=most, cutoff=0.5)
    near += [o for o in options if name and name.lower() in o.lower() and o not in near][: most - len(near)]
    if near:
        return "Did you mean " + " or ".join(near) + "?"
    if not options:
        return "There are none."
    listed = ", ".join(options[:20]) + (", ..." if len(options) > 20 else "")
    return f"There are: {listed}."
