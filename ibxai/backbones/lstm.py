"""A recurrent classifier of texts, trained here: InputIBA's network for IMDB, four LSTM layers on word embeddings.

    e_t = E[token t],  h^l = LSTM_l(h^(l-1)),  out = W (mean over tokens of h^L) + b

Zhang et al., "Fine-Grained Neural Network Explanation ..." (InputIBA), NeurIPS 2021, sec. 4.1, with LSTM cells of
Hochreiter and Schmidhuber, 1997. The paper leaves out how the classifier reads the sequence, and its code reads the
last hidden state past the features that its bottleneck masks, so that the mask changes nothing. Here the classifier
reads the masked sequence itself, as a mean over the tokens that are there. Layers run forward in time, so padding,
which comes last, cannot reach a token, and the mean leaves it out.

In training a share of the tokens becomes `<unk>`: insertion and deletion show the network texts with many of them, and
thousands of reviews are few for an embedding. The vocabulary is the train split's, and travels with the weights.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from ibxai.backbones.learner import Learnt, PictureLearner
from ibxai.backbones.performance import Score, performance
from ibxai.backbones.text import TextBackbone
from ibxai.backbones.training import InMemory, Recipe, labelled_pictures, outputs_of
from ibxai.backbones.zoo import RANDOM_SEED, load_strictly, state_from_file
from ibxai.errors import BadSample, UserError
from ibxai.tokenisation import PAD_ID, UNKNOWN_ID, Tokenisation, vocabulary_of
from ibxai.types import Dataset, Sample, Text

if TYPE_CHECKING:
    from ibxai.backbones.learner import Learner
    from ibxai.train import Splits, TrainPlan

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LSTM:
    """weights: "none", where a training starts, or the file that one has left. embedding, hidden: features a token, of
    the table and of each layer. depth: recurrent layers. dropout: before each layer and the classifier.
    unknown_share: of the tokens, hidden in training. max_tokens: the first of a text that are read. min_count: a token
    that comes less often in the train split is `<unk>`. training: how `ibxai train` trains it. layers: role -> layer.
    vocabulary: what a training has found, and its checkpoint brings.
    """

    name: str = "lstm"
    weights: str = "none"
    classes: int = 2
    embedding: int = 64
    hidden: int = 64
    depth: int = 4
    dropout: float = 0.3
    unknown_share: float = 0.2
    max_tokens: int = 256
    min_count: int = 5
    training: Recipe = field(default_factory=lambda: Recipe(epochs=6, batch_size=64, learning_rate=0.005))
    layers: dict[str, str] = field(default_factory=dict)
    vocabulary: tuple[str, ...] = ()

    architecture_settings: ClassVar[tuple[str, ...]] = ("embedding", "hidden", "depth")
    modality: ClassVar[str] = "text"

    def __post_init__(self) -> None:
        if min(self.embedding, self.hidden, self.depth, self.min_count) < 1:
            raise UserError("backbone.embedding, hidden, depth and min_count: 1 or more are expected.")
        if not (0 <= self.dropout < 1 and 0 <= self.unknown_share < 1):
            raise UserError("backbone.dropout and backbone.unknown_share: shares from 0 to below 1 are expected.")

    @property
    def preprocessing(self) -> Tokenisation:
        """Raises UserError before a training has found the vocabulary."""
        if not self.vocabulary:
            raise UserError(
                f"backbone={self.name} has no vocabulary: it comes with the weights that a training leaves.\n"
                f"Train one: ibxai train dataset=imdb backbone={self.name}, then leave backbone.weights out."
            )
        return Tokenisation(self.vocabulary, self.max_tokens)

    def load(self, max_passes: int) -> TextBackbone:
        """The frozen network. Raises UserError when the weights or a layer are not there."""
        tokenisation, network = self.preprocessing, self.fresh(RANDOM_SEED)
        load_strictly(network, state_from_file(Path(self.weights).expanduser()), self.weights)
        log.info("%s reads the first %d tokens of a text, %d words", self.name, self.max_tokens, len(self.vocabulary))
        return TextBackbone(network, network.embedding.weight, tokenisation, self.layers, self.name, False, max_passes)

    def fresh(self, seed: int) -> LSTMClassifier:
        """The network before training, its weights drawn from this seed."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            sizes = len(self.vocabulary), self.embedding, self.hidden, self.depth
            return LSTMClassifier(*sizes, self.dropout, self.classes)

    def with_learnt(self, weights: str, learnt: Mapping[str, Any]) -> LSTM:
        """This network with the weights, the outputs and the vocabulary of a checkpoint."""
        known = {**learnt, "vocabulary": tuple(learnt["vocabulary"])}
        return replace(self, weights=weights, **known)

    def learner(self, plan: TrainPlan, splits: Splits) -> Learner:
        """What `ibxai train` trains: this network, with the vocabulary of the train split."""
        if self.weights != "none":
            raise UserError(
                f"backbone.weights={self.weights}: the training of {self.name} starts from new weights, none."
            )
        vocabulary = vocabulary_of(_texts(plan.dataset, splits.train), self.min_count)
        spec = replace(self, classes=len(plan.class_names), vocabulary=vocabulary)
        log.info("vocabulary: %d tokens come %d times or more in the train split", len(vocabulary), self.min_count)
        return TextLearner(spec, OnTokens(spec.fresh(plan.seed), self.unknown_share), plan, splits)


def _texts(dataset: Dataset, samples: Sequence[Sample]) -> Iterator[str]:
    """Those that can be read; the others are said where they are left out of the training."""
    for sample in samples:
        with suppress(BadSample):
            content = dataset.read(sample)
            assert isinstance(content, Text)
            yield content.text


@dataclass(frozen=True)
class TextLearner(PictureLearner):
    """A network of texts that learns the dataset's answers from token numbers."""

    network: OnTokens

    def identity(self) -> Mapping[str, Any]:
        return {**super().identity(), "dropout": self.spec.dropout, "unknown_share": self.spec.unknown_share}

    def examples(self, samples: Sequence[Sample]) -> InMemory:
        plan, tokenisation = self.plan, self.spec.preprocessing
        # all in one batch, which is padded to its longest text
        texts = labelled_pictures(plan.dataset, samples, tokenisation, len(samples), plan.workers, plan.answers)
        long = int(((texts.inputs != PAD_ID).sum(1) == tokenisation.max_tokens).sum())
        log.info("%d texts, of which %d have %d tokens or more", len(texts), long, tokenisation.max_tokens)
        return texts

    def finish(self, state: Mapping[str, Tensor]) -> Learnt:
        learnt = super().finish(state)
        brought = {name: getattr(self.spec, name) for name in ("classes", "max_tokens", "min_count", "vocabulary")}
        return Learnt(self.network.classifier.state_dict(), {**learnt.described, "learnt": brought}, learnt.scores)

    def _tested(self, network: nn.Module) -> list[Score]:
        plan, texts = self.plan, self.examples(self.splits.test)
        outputs = outputs_of(network, texts.inputs, plan.device).numpy()
        return performance(outputs, texts.answers.numpy(), texts.group_ids, plan.class_names, plan.answers)


class LSTMLayer(nn.LSTM):
    """[B, T, D] -> [B, T, H]. Without cuDNN where the network is frozen: its LSTM has no gradient in eval mode."""

    def forward(self, values: Tensor) -> Tensor:
        with torch.backends.cudnn.flags(enabled=self.training):
            return super().forward(values)[0]  # type: ignore[has-type]  # torch overloads it; the outputs come first


class LSTMClassifier(nn.Module):
    """Embeddings with a last channel that is 1 at tokens and 0 in the padding, [B, T, D + 1] -> outputs [B, K]."""

    def __init__(self, words: int, embedding: int, hidden: int, layers: int, dropout: float, classes: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(words, embedding, padding_idx=PAD_ID)
        self.dropout = nn.Dropout(dropout)
        for number in range(1, layers + 1):
            self.add_module(f"lstm{number}", LSTMLayer(embedding if number == 1 else hidden, hidden, batch_first=True))
        self.depth = layers
        self.classifier = nn.Linear(hidden, classes)

    def forward(self, inputs: Tensor) -> Tensor:
        values, valid = inputs[..., :-1], inputs[..., -1:]
        for number in range(1, self.depth + 1):
            values = self.get_submodule(f"lstm{number}")(self.dropout(values))
        mean = (values * valid).sum(1) / valid.sum(1)
        return self.classifier(self.dropout(mean))


class OnTokens(nn.Module):
    """The classifier as it is trained: token numbers, long [B, T], `<pad>` at the end -> outputs [B, K]."""

    def __init__(self, classifier: LSTMClassifier, unknown_share: float) -> None:
        super().__init__()
        self.classifier, self.unknown_share = classifier, unknown_share

    def forward(self, tokens: Tensor) -> Tensor:
        valid = tokens != PAD_ID
        tokens, valid = (part[:, : int(valid.sum(1).max())] for part in (tokens, valid))
        if self.training:
            hidden = torch.rand(tokens.shape, device=tokens.device) < self.unknown_share
            tokens = tokens.masked_fill(hidden & valid, UNKNOWN_ID)
        embedded = self.classifier.embedding(tokens)
        return self.classifier(torch.cat([embedded, valid.unsqueeze(2).to(embedded)], 2))
