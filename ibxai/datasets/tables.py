"""Text tables as medical datasets publish them: read as text, so that leading zeros survive, whatever the separator.

Excel has left its marks on them: a byte-order mark, `;` for `,`, Windows line ends, and rows with fewer cells than the
header. A cell that is not there reads as "".
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

from ibxai.errors import UserError

MAX_BYTES = 200_000_000
_SEPARATORS = ",;\t"


def read_table(path: Path, columns: Sequence[str]) -> Sequence[Mapping[str, str]]:
    """The rows, column -> cell, of a table with a header. columns: those that must be there; others come along.

    Raises `UserError` when the file cannot be read or lacks a column.
    """
    header, *rows = read_rows(path) or [[]]
    missing = [column for column in columns if column not in header]
    if missing:
        raise UserError(
            f"{path} has no column {missing[0]!r}; its header is {', '.join(filter(None, header))[:200]!r}.\n"
            "Put the official file there, as it was downloaded."
        )
    return [dict(zip(header, [*row, *[""] * len(header)], strict=False)) for row in rows]


def read_rows(path: Path) -> list[list[str]]:
    """All lines that are not empty, as stripped cells; the separator is the commonest one of the first line."""
    lines = read_lines(path)
    separator = max(_SEPARATORS, key=lines[0].count) if lines else ","
    try:
        return [[cell.strip() for cell in row] for row in csv.reader(lines, delimiter=separator)]
    except csv.Error as error:
        raise UserError(f"{path} is no table: {error}.") from error


def read_lines(path: Path) -> list[str]:
    """The lines that are not blank, without a byte-order mark and line ends. Raises `UserError`."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise UserError(f"{path} has {path.stat().st_size:,} bytes, more than the {MAX_BYTES:,} that are read.")
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}.") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is no text in UTF-8: {error.reason}.") from error
    return [line for line in text.splitlines() if line.strip()]
