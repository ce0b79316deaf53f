"""From a text to a network's tokens and back to its characters: words in order, a vocabulary, a length limit.

A token is a word (with its apostrophe or hyphen inside: "isn't"), a number or one punctuation mark, in lower case.
HTML tags, such as the `<br />` of IMDB's reviews, are no tokens. Every token keeps the place of its characters in the
text as it stands in the file, so that a map over tokens can be shown on what the author wrote.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import InitVar, dataclass, field
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from ibxai.errors import BadSample, UserError
from ibxai.types import Text

PAD, UNKNOWN = "<pad>", "<unk>"
PAD_ID, UNKNOWN_ID = 0, 1
_TAG_OR_TOKEN = re.compile(r"</?[a-zA-Z]{1,10}\s*/?>|(?P<token>\w+(?:['\u2019-]\w+)*|[^\w\s])")


def words(text: str) -> list[tuple[str, int, int]]:
    """(token, start, end) of every token: text[start:end] in lower case, whatever lower case does to its length."""
    found = (match for match in _TAG_OR_TOKEN.finditer(text) if match["token"])
    return [(match["token"].lower().replace("\u2019", "'"), *match.span()) for match in found]


def vocabulary_of(texts: Iterable[str], min_count: int) -> tuple[str, ...]:
    """`<pad>`, `<unk>`, then all tokens that come at least `min_count` times, the commonest first.

    Equal counts are ordered by the token, so the same texts give the same vocabulary in any order.
    """
    counts = Counter(token for text in texts for token, _, _ in words(text))
    kept = [(-count, token) for token, count in counts.items() if count >= min_count]
    return (PAD, UNKNOWN, *(token for _, token in sorted(kept)))


class Tokeniser(Protocol):
    """What turns a text into a network's tokens. A frozen dataclass whose settings stand in a run's identity.

    max_tokens: the first of a text that are read. unknown: the token that stands for one that is taken away.
    """

    modality: ClassVar[str]

    @property
    def max_tokens(self) -> int: ...
    @property
    def unknown(self) -> int: ...
    def __call__(self, text: Text) -> tuple[Tensor, Mapping[str, Tensor]]:
        """(token numbers, long [T], no regions) of one text. Raises BadSample when it holds no token."""
        ...

    def spans(self, text: Text) -> list[tuple[int, int]]:
        """Where each token's characters stand in the text: (start, end), in order, none twice."""
        ...


@dataclass(frozen=True)
class Tokenisation:
    """What a network of texts was trained on: a vocabulary and the first `max_tokens` tokens of a text.

    vocabulary: the tokens by number, `<pad>` and `<unk>` first; a run's identity holds their `digest`.
    Raises UserError for a vocabulary that does not begin so.
    """

    vocabulary: InitVar[Sequence[str]]
    max_tokens: int
    digest: str = field(init=False)

    modality: ClassVar[str] = "text"
    unknown: ClassVar[int] = UNKNOWN_ID

    def __post_init__(self, vocabulary: Sequence[str]) -> None:
        if tuple(vocabulary[:2]) != (PAD, UNKNOWN):
            raise UserError(f"A vocabulary begins with {PAD} and {UNKNOWN}; this one with {list(vocabulary[:2])}.")
        if self.max_tokens < 1:
            raise UserError(f"backbone.max_tokens is {self.max_tokens}: give 1 or more.")
        numbers = {token: number for number, token in enumerate(vocabulary)}
        object.__setattr__(self, "_numbers", numbers)
        object.__setattr__(self, "digest", hashlib.sha256("\n".join(vocabulary).encode()).hexdigest()[:16])

    def __call__(self, text: Text) -> tuple[Tensor, Mapping[str, Tensor]]:
        """(token numbers, long [T], no regions) of one text. Raises BadSample when it holds no token."""
        numbers: Mapping[str, int] = self._numbers  # type: ignore[attr-defined]  # made in __post_init__
        found = [numbers.get(token, UNKNOWN_ID) for token, _, _ in words(text.text)[: self.max_tokens]]
        if not found:
            raise BadSample("the text holds no word")
        return torch.tensor(found), {}

    def spans(self, text: Text) -> list[tuple[int, int]]:
        """Where each token's characters stand in the text: (start, end), one a token."""
        return [(start, end) for _, start, end in words(text.text)[: self.max_tokens]]
