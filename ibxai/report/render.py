"""From templates to one self-contained HTML file: everything escaped, nothing loaded from anywhere."""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from ibxai.report.figures import colour_bars, encoded

UNDEFINED = "\N{EN DASH}"
_THIN = "\N{NARROW NO-BREAK SPACE}"
_MINUS = "\N{MINUS SIGN}"


def render(template: str, context: Mapping[str, Any], script: str = "page.js") -> bytes:
    """The page as UTF-8. Ids that are no valid Unicode are shown with "?" where they are not. script: what it runs."""
    environment = Environment(
        loader=PackageLoader("ibxai.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number, "count": count, "percent": percent, "moment": moment}
    environment.filters |= {"duration": duration, "p_value": p_value, "breakable": breakable, "span": span}
    code = _source(environment, script)
    page = environment.get_template(template).render(
        **context,
        style=_source(environment, "page.css"),
        script=code,
        # the browser itself keeps the promise: no request leaves the page, no script but this one runs
        script_digest=base64.b64encode(hashlib.sha256(code.encode()).digest()).decode(),
        colour_bars=colour_bars(),
    )
    return page.encode("utf-8", "replace")


def _source(environment: Environment, name: str) -> Markup:
    assert environment.loader is not None
    return Markup(environment.loader.get_source(environment, name)[0])


def image_uri(pixels: Any, kind: str) -> str:
    """uint8 [H, W, 3] as a data URI. kind: "png" or "jpeg"."""
    return f"data:image/{kind};base64,{base64.b64encode(encoded(pixels, kind)).decode()}"


def number(value: float) -> str:
    """Three or four digits that matter; a dash for an undefined number."""
    if not math.isfinite(value):
        return UNDEFINED if math.isnan(value) else ("∞" if value > 0 else _MINUS + "∞")
    size, value = abs(value), value + 0.0  # no minus before a zero
    if float(value).is_integer():
        return f"{value:,.0f}".replace("-", _MINUS)
    if size < 0.001:
        text = f"{value:.1e}".replace("e-0", "e-")
    else:
        places = 3 if size < 10 else 2 if size < 100 else 1 if size < 1000 else 0
        text = f"{value:,.{places}f}"
    return text.replace("-", _MINUS)


def ends(low: float, high: float) -> tuple[str, str]:
    """The two ends of a colour scale, in digits that fit the larger one."""
    small, large = sorted((low, high), key=abs)
    negligible = abs(small) < 0.005 * abs(large)
    return ("0" if negligible and low == small else number(low)), (
        "0" if negligible and high == small else number(high)
    )


def count(value: int, one: str = "", many: str = "") -> str:
    """5000 -> "5,000"; with a noun in both numbers, "1 row" or "5,000 rows"."""
    noun = one if value == 1 else (many or one + "s")
    return f"{value:,} {noun}" if one else f"{value:,}"


def span(values: Iterable[int], one: str) -> str:
    """ "5 rows", or "3 to 5 rows" where the values differ."""
    known = sorted(set(values))
    if len(known) < 2:
        return count(int(known[0]) if known else 0, one)
    return f"{known[0]:,} to {count(int(known[-1]), one)}"


def breakable(name: str) -> Markup:
    """A name that a narrow column may break after an underscore."""
    return escape(name).replace("_", Markup("_<wbr>"))


def fixed(value: float, places: int) -> str:
    """A difference with its sign and so many decimal places; zero has no sign."""
    if not math.isfinite(value):
        return number(value)
    text = f"{value:+,.{places}f}"
    return text.replace("-", _MINUS) if float(text.replace(",", "")) else text[1:]


def p_value(p: float) -> str:
    """ "= 0.012" or "< 0.001"; "is undefined"."""
    if math.isnan(p):
        return "is undefined"
    return f"<{_THIN}0.001" if p < 0.001 else f"={_THIN}{p:.3f}"


def enumerated(names: Sequence[str]) -> str:
    """ "a", "a and b", "a, b and c"."""
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def percent(probability: float) -> str:
    if not math.isfinite(probability):
        return UNDEFINED
    if 0 < probability < 0.001:
        return f"<{_THIN}0.1{_THIN}%"
    return f"{100 * probability:.1f}{_THIN}%"


def moment(iso: str | None) -> str:
    """An ISO time to the minute, as it stands where it cannot be read."""
    try:
        return datetime.fromisoformat(str(iso)).strftime("%d %B %Y, %H:%M").lstrip("0")
    except ValueError:
        return str(iso)


def duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"
