"""Reviews whose only evidence is one inserted word: which methods put it first?

    python scripts/planted_word.py /data/aclImdb

Real reviews, cut to 60 tokens, get labels by chance, and at a place drawn by chance one of two words that no review
holds, which says the label. An LSTM of four layers learns it from some of them. Of the others those are explained whose
answer is right and is lost without the word: a network may know one label by what is not there, and then nothing is to
be found. A method has found the word when every other token has a lower value. Chance is one in 61.
"""

from __future__ import annotations

import argparse
import hashlib
import time
from pathlib import Path

import torch
import yaml
from torch import Tensor

from ibxai.backbones import TextBackbone
from ibxai.backbones.lstm import LSTM, OnTokens
from ibxai.backbones.training import InMemory, Recipe, train
from ibxai.config import build
from ibxai.datasets.imdb import IMDB
from ibxai.memory import keep_freed_memory
from ibxai.targets import ClassTarget
from ibxai.tokenisation import UNKNOWN_ID, Tokenisation, vocabulary_of
from ibxai.types import Batch

CONF = Path(__file__).parent.parent / "conf" / "method"
METHODS = (
    "input_iba_text",
    "iba_text",
    "inverse_iba",
    "lime",
    "integrated_gradients_text",
    "gradient_x_input",
    "gradient",
    "random",
)
SIGNS = ("qqpositive", "qqnegative")
LENGTH = 60
RECIPE = Recipe(epochs=6, batch_size=64, learning_rate=0.005)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", help="the unpacked folder aclImdb")
    parser.add_argument("--train", type=int, default=1500, help="reviews that the network learns from")
    parser.add_argument("--test", type=int, default=120, help="reviews of which those are explained")
    options = parser.parse_args()
    keep_freed_memory()
    dataset = IMDB(options.root, "imdb", "train", 100)
    samples = dataset.in_split("train")[: options.train + options.test]
    texts = [dataset.read(sample) for sample in samples]
    vocabulary = (*vocabulary_of((text.text for text in texts[: options.train]), 3), *SIGNS)
    tokens, labels, places = planted([Tokenisation(vocabulary, LENGTH)(text)[0] for text in texts], len(vocabulary))
    spec = LSTM(layers={"bottleneck": "lstm4"}, vocabulary=vocabulary, max_tokens=LENGTH + 1)
    learns = InMemory(tokens[: options.train], labels[: options.train])
    network = train(OnTokens(spec.fresh(0), spec.unknown_share), learns, RECIPE, 0).classifier
    backbone = TextBackbone(network, network.embedding.weight, spec.preprocessing, spec.layers, "lstm", False, 128)
    known = batch_of(backbone, tokens[:100], labels[:100])
    others = batch_of(backbone, tokens[options.train :], labels[options.train :])
    place = places[options.train :, None]
    without = torch.where(torch.arange(tokens.shape[1]) == place, UNKNOWN_ID, others.tokens)  # type: ignore[arg-type]
    right, still = (right_ones(backbone, tokens, labels[options.train :]) for tokens in (others.tokens, without))
    explained = (right & ~still).nonzero()[:, 0]
    shown, place = others.take(explained), place[explained]
    print(f"accuracy {right.float().mean():.3f}, without the word {still.float().mean():.3f}: {len(shown)} explained\n")
    print("| method | the word is first | its share of the positive heat | CPU s a review |\n|---|---:|---:|---:|")
    for name in METHODS:
        started = time.process_time()
        heatmap = method_of(name).fit(backbone, [known], 0)(shown).heatmap
        seconds = (time.process_time() - started) / len(heatmap)
        first = (heatmap.scatter(1, place, -torch.inf).amax(1) < heatmap.gather(1, place)[:, 0]).float().mean()
        heat = heatmap.clamp_min(0)
        share = (heat.gather(1, place)[:, 0] / heat.sum(1).clamp_min(1e-12)).mean()
        print(f"| {name} | {first:.0%} | {share:.0%} | {seconds:.2f} |", flush=True)


def planted(rows: list[Tensor], words: int) -> tuple[Tensor, Tensor, Tensor]:
    """(tokens [N, T], labels [N], the inserted word's places [N]); the vocabulary ends in the two signs."""
    tokens, labels, places = [], [], []
    for number, row in enumerate(rows):
        draw = int.from_bytes(hashlib.sha256(str(number).encode()).digest()[:4], "little")
        label, place = draw % 2, (draw >> 1) % (len(row) + 1)
        tokens.append(torch.cat([row[:place], torch.tensor([words - 2 + label]), row[place:]]))
        labels.append(label)
        places.append(place)
    return torch.nn.utils.rnn.pad_sequence(tokens, True), torch.tensor(labels), torch.tensor(places)


def right_ones(backbone: TextBackbone, tokens: Tensor | None, labels: Tensor) -> Tensor:
    """bool [N]: where the network says the label."""
    assert tokens is not None
    batch = batch_of(backbone, tokens, labels)
    with torch.no_grad():
        return backbone(batch.inputs, batch.valid).argmax(1) == labels


def batch_of(backbone: TextBackbone, tokens: Tensor, labels: Tensor) -> Batch:
    ids = tuple(f"review{i}" for i in range(len(tokens)))
    return backbone.embed(Batch(tokens, ClassTarget(labels), ids, tokens=tokens, valid=tokens != 0))


def method_of(name: str):  # type: ignore[no-untyped-def]  # whatever the YAML describes
    return build(yaml.safe_load((CONF / f"{name}.yaml").read_text()), "method")


if __name__ == "__main__":
    main()
