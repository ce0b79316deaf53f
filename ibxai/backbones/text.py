"""Frozen networks of texts: a backbone on embeddings, with the table that makes them from tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from ibxai.backbones.backbone import Backbone, check_finite
from ibxai.tokenisation import Tokeniser
from ibxai.types import Batch

_EXAMPLE_LENGTHS = (5, 3, 1)  # tokens of the texts that a network is traced with


class TextBackbone(Backbone):
    """A frozen network of texts: embeddings [B, T, D] and their `valid` [B, T] -> outputs [B, K].

    network: takes [B, T, D + 1], the last channel 1 at tokens and 0 in the padding. table: [V, D], the embedding of
    each token of the vocabulary; it belongs to the network, whose digest must tell one table from another.
    Otherwise as `Backbone`. Raises UserError for weights that are not finite.
    """

    preprocessing: Tokeniser  # type: ignore[assignment]

    def __init__(
        self,
        network: nn.Module,
        table: Tensor,
        preprocessing: Tokeniser,
        roles: Mapping[str, str],
        name: str,
        random_weights: bool = False,
        max_passes: int = 256,
    ) -> None:
        check_finite(network, name)
        self._table = table.detach().float().cpu()
        valid = torch.arange(max(_EXAMPLE_LENGTHS)) < torch.tensor(_EXAMPLE_LENGTHS)[:, None]
        shape = (*valid.shape, table.shape[1])
        embedded = torch.zeros(shape).uniform_(-1, 1, generator=torch.Generator().manual_seed(0))
        example = torch.cat([embedded, valid.unsqueeze(2).float()], 2)
        super().__init__(network, preprocessing, roles, name, random_weights, max_passes, example)  # type: ignore[arg-type]

    def to(self, device: torch.device | str) -> TextBackbone:
        self._table = self._table.to(device)
        super().to(device)
        return self

    @property
    def input_shape(self) -> tuple[int, ...]:
        """(T, D): the most tokens of a text, and the width of the embedding."""
        return self.preprocessing.max_tokens, self._table.shape[1]

    @property
    def unknown(self) -> Tensor:
        """[D]: the embedding of the token that stands for one that is taken away, `<unk>` or a mask token."""
        return self._table[self.preprocessing.unknown]

    def embed(self, batch: Batch) -> Batch:
        """The batch with the embeddings of its tokens as its inputs, on the table's device."""
        assert batch.tokens is not None
        batch = batch.to(self._table.device)
        return replace(batch, inputs=self._table[batch.tokens])
