"""A run cut into parts, for any number of processes and machines: `shard=2/4` is the second of four.

Every n-th sample belongs to a shard, so that hard and easy ones, which datasets keep together, are shared out. All
shards of a run write into its one folder: no two of them write the same file, and none reads before it writes.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from ibxai.errors import UserError

Item = TypeVar("Item")
_FORM = re.compile(r"(\d{1,6})/(\d{1,6})")


@dataclass(frozen=True)
class Shard:
    """number: 1 to count."""

    number: int
    count: int

    def part(self, items: Sequence[Item]) -> Sequence[Item]:
        return items[self.number - 1 :: self.count]

    def has(self, place: int) -> bool:
        """Whether the item at this place, from 0 on, belongs to it."""
        return place % self.count == self.number - 1

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"


def parse_shard(text: str | None) -> Shard | None:
    """None of None: the whole run. Raises UserError."""
    if text is None:
        return None
    match = _FORM.fullmatch(text)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise UserError(f"shard={text}: i/n is expected, the i-th of n parts, such as 1/4, 2/4, 3/4 and 4/4.")
    return Shard(int(match[1]), int(match[2]))
