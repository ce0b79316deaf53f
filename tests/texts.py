"""Small networks of texts with known answers, and the batches they are shown; shared by the tests."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from networks import fixed_seed
from torch import Tensor, nn

from ibxai.backbones import TextBackbone
from ibxai.backbones.lstm import LSTMClassifier
from ibxai.targets import ClassTarget
from ibxai.tokenisation import PAD_ID, Tokenisation
from ibxai.types import Batch

WORDS = ("<pad>", "<unk>", *(f"word{i}" for i in range(2, 40)))
ROLES = {"early": "lstm1", "mid": "lstm1", "late": "lstm2", "bottleneck": "lstm2"}
MOST = 24  # tokens
LENGTHS = (9, 4, 12, 1, 7)


def small_lstm(seed: int = 0, classes: int = 5) -> LSTMClassifier:
    with fixed_seed(seed):
        network = LSTMClassifier(len(WORDS), 6, 8, 2, 0.3, classes)
    with torch.no_grad():
        for name, weights in network.named_parameters():
            weights.mul_(8 if name.startswith("classifier") else 2)  # classes that differ clearly
    return network


def text_backbone(max_passes: int = 256, network: LSTMClassifier | None = None) -> TextBackbone:
    network = network or small_lstm()
    return TextBackbone(network, network.embedding.weight, Tokenisation(WORDS, MOST), ROLES, "lstm", False, max_passes)


def token_rows(lengths: Sequence[int] = LENGTHS, seed: int = 0) -> list[Tensor]:
    """Long [T] each, other tokens than `<pad>` and `<unk>`."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(2, len(WORDS), (length,), generator=generator) for length in lengths]


def text_batch(
    backbone: TextBackbone,
    rows: Sequence[Tensor],
    classes: Sequence[int],
    ids: Sequence[str] | None = None,
    padding: int = 0,
) -> Batch:
    """padding: more of it than the longest text asks for."""
    tokens = torch.nn.utils.rnn.pad_sequence(list(rows), True, PAD_ID)
    tokens = torch.nn.functional.pad(tokens, (0, padding), value=PAD_ID)
    valid = torch.arange(tokens.shape[1]) < torch.tensor([len(row) for row in rows])[:, None]
    names = tuple(ids or (f"text{i}" for i in range(len(rows))))
    return backbone.embed(Batch(tokens, ClassTarget(torch.tensor(classes)), names, tokens=tokens, valid=valid))


class Evidence(nn.Module):
    """Classes 0 and 1 are shown by the first number of an embedding, whose sign says which; nothing else counts.

    `cells` is what each token says, [T, 2]; the logits are `strength` times the sum over the tokens.
    """

    def __init__(self, width: int, strength: float = 8.0) -> None:
        super().__init__()
        self.cells = nn.Linear(width, 2, bias=False)
        self.relu = nn.ReLU()
        self.strength = strength
        with torch.no_grad():
            self.cells.weight.zero_()
            self.cells.weight[:, 0] = torch.tensor([1.0, -1.0])

    def forward(self, inputs: Tensor) -> Tensor:
        values, valid = inputs[..., :-1], inputs[..., -1:]
        return self.strength * (self.relu(self.cells(values)) * valid).sum(1)


GOOD, BAD = 2, 3  # the tokens that speak for class 0 and for class 1


def evidence_backbone(max_passes: int = 256, strength: float = 8.0) -> TextBackbone:
    """Of all words only GOOD and BAD say something; `<unk>` says nothing."""
    table = 0.3 * torch.randn(len(WORDS), 6, generator=torch.Generator().manual_seed(3))
    table[:, 0] = 0
    table[GOOD, 0], table[BAD, 0] = 1.0, -1.0
    table[PAD_ID] = 0
    network = Evidence(6, strength)
    roles = {"bottleneck": "cells", "late": "cells"}
    return TextBackbone(network, table, Tokenisation(WORDS, MOST), roles, "evidence", False, max_passes)


def neutral_rows(lengths: Sequence[int], seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(4, len(WORDS), (length,), generator=generator) for length in lengths]
