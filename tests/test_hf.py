"""Classifiers of transformers beside the library itself: special tokens, padding, places, methods, what is refused."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from test_lstm import reviews
from test_method_contract import same, state_of
from test_text_methods import NAMES, cut, quick
from texts import text_batch
from torch import Tensor

from ibxai.backbones import TextBackbone
from ibxai.backbones.hf import HF
from ibxai.catalogue import entries
from ibxai.cli import main
from ibxai.errors import BadSample, UserError
from ibxai.methods import IBA, LIME, InputIBA, IntegratedGradients
from ibxai.methods.feature_statistics import FeatureGrid
from ibxai.metrics import Insertion
from ibxai.report.words import coloured
from ibxai.store import find_runs
from ibxai.types import Batch, Method, Text

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
GOOD, BAD = 5, 6
WORDS = [*SPECIAL, "lovely", "awful", "film", "##s", "the", "<", "br", "/", ">", *(f"w{i}" for i in range(20))]
LENGTHS = (9, 4, 12, 1, 7)
SIZES = {"dim": 16, "n_heads": 2, "hidden_dim": 24, "n_layers": 4, "max_position_embeddings": 40}
LABELS = {0: "negative", 1: "positive"}


def tokenizer(**tokens: str) -> Any:
    """WordPiece with BERT's frame [CLS] ... [SEP]."""
    backend = tokenizers.Tokenizer(tokenizers.models.WordPiece({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    backend.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    frame = [("[CLS]", 2), ("[SEP]", 3)]
    backend.post_processor = tokenizers.processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=frame)
    named = {"unk_token": "[UNK]", "pad_token": "[PAD]", "mask_token": "[MASK]"} | tokens
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **named)


def model(kind: str = "DistilBert", scale: float = 15, **settings: Any) -> Any:
    """Random weights, large enough that texts differ clearly."""
    sizes = SIZES if kind == "DistilBert" else {}
    config = getattr(transformers, f"{kind}Config")(vocab_size=len(WORDS), pad_token_id=0, **(sizes | settings))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = getattr(transformers, f"{kind}ForSequenceClassification")(config).eval()
    with torch.no_grad():
        for weights in network.parameters():
            weights.mul_(scale if weights.dim() > 1 else 1)
    return network


def saved(folder: Path, network: Any, tokens: Any | None = None) -> str:
    network.save_pretrained(folder)
    (tokens or tokenizer()).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return saved(tmp_path_factory.mktemp("hf"), model(id2label=LABELS))


@pytest.fixture(scope="module")
def backbone(folder: str) -> TextBackbone:
    return HF("hf", folder, max_tokens=30).load(64)


def rows(lengths: Sequence[int] = LENGTHS, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(len(SPECIAL), len(WORDS), (length,), generator=generator) for length in lengths]


def five(backbone: TextBackbone, padding: int = 0) -> Batch:
    return text_batch(backbone, rows(), [0, 1, 1, 0, 1], padding=padding)


def reference(backbone: TextBackbone) -> list[Batch]:
    return [text_batch(backbone, rows((8, 3, 11, 6), seed=10 + i), [0] * 4) for i in range(3)]


def alone(network: Any, words: Tensor, **more: Any) -> Any:
    """What the library says of one text: numbers in, with the special tokens, and no padding."""
    with torch.no_grad():
        return network(input_ids=torch.cat([torch.tensor([2]), words, torch.tensor([3])])[None], **more)


# --- the network


def test_the_outputs_are_the_library_s(backbone: TextBackbone) -> None:
    network, batch = model(), five(backbone, padding=5)
    wanted = torch.cat([alone(network, words).logits for words in rows()])
    assert batch.valid is not None
    with torch.no_grad():
        found = backbone(batch.inputs, batch.valid)
        anything = torch.where(batch.valid[..., None], batch.inputs, torch.full_like(batch.inputs, 7.0))
        torch.testing.assert_close(backbone(anything, batch.valid), found, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert wanted.std(0).min() > 1e-2


@pytest.mark.parametrize("block", [1, 2, 4])
def test_a_block_s_words_are_the_library_s(backbone: TextBackbone, block: int) -> None:
    network, batch = model(), five(backbone, padding=3)
    head, tail = backbone.split(f"block{block}")
    with torch.no_grad():
        features = head(batch.inputs, batch.valid)
        torch.testing.assert_close(tail(features), backbone(batch.inputs, batch.valid))
    assert features.values.shape == (5, 15, 16)
    for words, found in zip(rows(), features.values, strict=True):
        hidden = alone(network, words, output_hidden_states=True).hidden_states[block]
        torch.testing.assert_close(found[: len(words)], hidden[0, 1:-1], rtol=1e-4, atol=1e-5)


def test_exchanged_words_and_no_special_token(backbone: TextBackbone) -> None:
    """The words' features of another text of the same length, behind the second block, beside the library's blocks."""
    network = model()
    first, second = rows((6, 6), seed=3)
    batch = text_batch(backbone, [first, second, rows()[2]], [0, 0, 0])
    head, tail = backbone.split("block2")
    with torch.no_grad():
        features = head(batch.inputs, batch.valid)
        exchanged = features.values.clone()
        exchanged[0] = features.values[1]
        exchanged[0, 6:] = 1e3  # where the padding and [SEP] stand
        found = tail(features.replaced(exchanged, torch.arange(3)))
        own, other = (alone(network, w, output_hidden_states=True).hidden_states[2] for w in (first, second))
        hidden = torch.cat([own[:, :1], other[:, 1:-1], own[:, -1:]], 1)
        for block in network.distilbert.transformer.layer[2:]:
            hidden = block(hidden)
        wanted = network.classifier(torch.relu(network.pre_classifier(hidden[:, 0])))
        plain = backbone(batch.inputs, batch.valid)
    torch.testing.assert_close(found[:1], wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[1:], plain[1:], rtol=1e-4, atol=1e-5)
    assert (found[0] - plain[0]).abs().max() > 1e-2


def test_layers_by_role(backbone: TextBackbone) -> None:
    assert list(backbone.layers) == ["block1", "block2", "block3", "block4"]
    assert backbone.roles == {"early": "block1", "mid": "block2", "late": "block3", "bottleneck": "block2"}
    assert FeatureGrid.at(backbone, "bottleneck").kind == "text"
    with pytest.raises(UserError, match="has no layer"):
        backbone.split("model.distilbert.transformer.layer.0")


def test_nothing_is_left_behind(backbone: TextBackbone) -> None:
    batch = five(backbone)
    before = state_of(backbone)
    with pytest.raises(RuntimeError):
        backbone(batch.inputs[..., :3], batch.valid)
    assert state_of(backbone) == before
    assert not any(part._forward_hooks for part in backbone._network.modules())


BERT = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24, "num_hidden_layers": 3}


@pytest.mark.parametrize("kind", ["Bert", "Roberta", "Electra", "DebertaV2"])
def test_kin_of_bert(tmp_path: Path, kind: str) -> None:
    relative = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]} if kind == "DebertaV2" else {}
    network = model(kind, **BERT, max_position_embeddings=40, num_labels=3, **relative)
    backbone = HF("hf", saved(tmp_path, network), max_tokens=30).load(64)
    batch = five(backbone, padding=2)
    with torch.no_grad():
        found = backbone(batch.inputs, batch.valid)
    torch.testing.assert_close(
        found, torch.cat([alone(network, words).logits for words in rows()]), rtol=1e-4, atol=1e-4
    )
    assert list(backbone.layers) == ["block1", "block2", "block3"]


# --- tokens


def test_tokens_and_their_places(backbone: TextBackbone) -> None:
    text = Text("The films:  na\u00efve<br />LOVELY")
    tokens, _ = backbone.preprocessing(text)
    assert [WORDS[number] for number in tokens] == [
        "the",
        "film",
        "##s",
        "[UNK]",
        "[UNK]",
        "<",
        "br",
        "/",
        ">",
        "lovely",
    ]
    pieces = [text.text[start:end] for start, end in backbone.preprocessing.spans(text)]
    assert pieces == ["The", "film", "s", ":", "na\u00efve", "<", "br", "/", ">", "LOVELY"]


def test_what_stands_for_a_word_taken_away(backbone: TextBackbone, tmp_path: Path) -> None:
    table = model().distilbert.embeddings.word_embeddings.weight
    assert torch.equal(backbone.unknown, table[WORDS.index("[MASK]")])
    plain = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer().backend_tokenizer, unk_token="[UNK]")
    other = HF("hf", saved(tmp_path, model(), plain), max_tokens=30).load(64)
    assert torch.equal(other.unknown, table[WORDS.index("[UNK]")])
    assert other.preprocessing != backbone.preprocessing


def test_a_limit_and_no_word(folder: str) -> None:
    tokens = HF("hf", folder, max_tokens=4).load(64).preprocessing
    text = Text("the film " * 9)
    assert tokens(text)[0].tolist() == [WORDS.index("the"), WORDS.index("film")] * 2
    assert tokens.spans(text) == [(0, 3), (4, 8), (9, 12), (13, 17)]
    with pytest.raises(BadSample, match="no word"):
        tokens(Text(" \n"))


def test_bytes_of_one_character_are_shown_once(tmp_path: Path) -> None:
    """A byte-level tokenizer cuts an emoji into four tokens, which all say that they stand at it."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(tokenizers.models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="!")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("test_hf.WORDS", alphabet)
        network = model()
    tokens = HF("hf", saved(tmp_path, network, fast), max_tokens=30).load(8).preprocessing
    text = Text("a\U0001f3acb \u00e9.")
    spans = tokens.spans(text)
    assert len(spans) == len(tokens(text)[0]) == 10
    assert "".join(piece.text for piece in coloured(text.text, spans, np.ones(10))) == text.text


# --- methods


@pytest.mark.parametrize("name", NAMES)
def test_methods(backbone: TextBackbone, name: str) -> None:
    """A map is finite, 0 in the padding, and a text's own: neither neighbours nor padding nor their order change it."""
    attribute = quick(name).fit(backbone, reference(backbone), 0)
    whole = attribute(five(backbone))
    valid = five(backbone).valid
    assert valid is not None
    assert whole.heatmap.isfinite().all()
    assert not whole.heatmap[~valid].any()
    assert (whole.heatmap[valid] != 0).float().mean() > 0.5
    same(cut(attribute(five(backbone, padding=7)), max(LENGTHS)), whole, 1e-3)
    same(attribute(five(backbone).take([3, 0, 4, 1, 2])), whole.take([3, 0, 4, 1, 2]), 1e-3)
    same(attribute(text_batch(backbone, [rows()[1]], [1], ["text1"])), cut(whole.take([1]), 4), 1e-3)


def test_names() -> None:
    asked = {"gradient", "gradient_x_input", "integrated_gradients_text", "iba_text", "inverse_iba", "input_iba_text"}
    assert asked | {"lime", "random"} <= set(NAMES)


def planted(count: int, seed: int) -> tuple[list[Tensor], list[int], list[int]]:
    """(texts, labels, places): words that say nothing, and one that says the label; in every third text, none does."""
    texts = [row.clamp_min(14) for row in rows([5 + i % 8 for i in range(count)], seed)]
    labels, places = [i % 3 for i in range(count)], [(5 * i) % len(text) for i, text in enumerate(texts)]
    for text, label, place in zip(texts, labels, places, strict=True):
        if label < 2:
            text[place] = (BAD, GOOD)[label]
    return texts, labels, places


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> TextBackbone:
    """A DistilBERT that has learnt what one word says, in texts with masked words among them."""
    network, generator = model(scale=4, n_layers=2, num_labels=3), torch.Generator().manual_seed(0)
    optimiser = torch.optim.Adam(network.parameters(), lr=3e-3)
    for step in range(150):
        texts, labels, places = planted(33, step)
        hidden = [torch.rand(len(text), generator=generator) < 0.3 for text in texts]
        for text, away, place in zip(texts, hidden, places, strict=True):
            text[away & (torch.arange(len(text)) != place)] = WORDS.index("[MASK]")
        framed = [torch.tensor([2, *text.tolist(), 3]) for text in texts]
        ids = torch.nn.utils.rnn.pad_sequence(framed, True)
        out = network(input_ids=ids, attention_mask=(ids != 0).long()).logits
        optimiser.zero_grad()
        torch.nn.functional.cross_entropy(out, torch.tensor(labels)).backward()
        optimiser.step()
    return HF("hf", saved(tmp_path_factory.mktemp("taught"), network), max_tokens=30).load(64)


@pytest.mark.parametrize(
    "method",
    [
        InputIBA(feature=IBA(beta=1.0), estimator="constant", beta=5.0, learning_rate=0.5, steps=20, draws=4),
        IBA(beta=1.0),
        LIME(samples=200),
        IntegratedGradients(),
    ],
    ids=lambda method: type(method).__name__,
)
def test_the_planted_word_is_first(taught: TextBackbone, method: Method) -> None:
    texts, labels, places = ([part[i] for i in range(30) if i % 3 < 2] for part in planted(30, 999))
    batch = text_batch(taught, texts, labels)
    with torch.no_grad():
        assert taught(batch.inputs, batch.valid).argmax(1).tolist() == labels
    known, _, _ = planted(24, 998)
    attribution = method.fit(taught, [text_batch(taught, known, [0] * 24)], 0)(batch)
    hits = sum(a == b for a, b in zip(attribution.heatmap.argmax(1).tolist(), places, strict=True))
    assert hits >= 18
    insertion = Insertion(step=1, score="probability")(taught, batch, attribution)
    assert insertion["auc"].mean() > 0.85


# --- from the command line, and what is refused


def test_a_run(folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ["dataset=imdb", f"dataset.root={reviews(tmp_path / 'aclImdb')}", "backbone=hf", "device=cpu"]
    common += ["backbone.max_tokens=30", f"outputs={tmp_path / 'outputs'}", "method=gradient", "limit=4"]
    assert main(["run", *common, f"backbone.weights={folder}", "backbone.name=tiny"]) == 0
    (store,) = find_runs(tmp_path / "outputs")
    assert store.path.parent.parent.name == "tiny"
    assert store.class_names() == ["negative", "positive"]
    assert set(store.provenance()["identity"]["preprocessing"]) == {"max_tokens", "unknown", "digest"}
    assert store.path.joinpath("report.html").read_text().count('class="review"') == 4
    capsys.readouterr()
    other = saved(tmp_path / "other", model(id2label={0: "POSITIVE", 1: "NEGATIVE"}))
    assert main(["run", *common, f"backbone.weights={other}"]) == 2
    assert "outputs are POSITIVE, NEGATIVE" in capsys.readouterr().err
    assert main(["run", *common]) == 2
    told = capsys.readouterr().err
    assert "backbone.weights=trained cannot be loaded" in told or "no trained" in told


def pickled(folder: Path) -> None:
    saved(folder, model())
    (folder / "model.safetensors").unlink()
    torch.save(model().state_dict(), folder / "pytorch_model.bin")


def with_code(folder: Path) -> None:
    saved(folder, model())
    config = folder / "config.json"
    code = '{"auto_map": {"AutoConfig": "own.C", "AutoModelForSequenceClassification": "own.M"}, "model_type": "own",'
    config.write_text(config.read_text().replace('"model_type": "distilbert",', "").replace("{", code, 1))
    (folder / "own.py").write_text("raise SystemExit('code of a stranger')")


def slow(folder: Path) -> None:
    saved(folder, model())
    (folder / "tokenizer.json").unlink()


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda folder: None, "cannot be loaded"),
        (pickled, "cannot be loaded"),
        (with_code, "cannot be loaded"),
        (slow, "cannot be loaded"),
        (lambda folder: saved(folder, model().distilbert), "lacks classifier.bias, classifier.weight"),
        (lambda folder: saved(folder, model(max_position_embeddings=20)), "reads 1 to 18 tokens"),
        (lambda folder: saved(folder, model("GPT2", n_embd=16, n_layer=2, n_head=2)), "answers otherwise when"),
        (lambda folder: saved(folder, model("T5", d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2)), "takes no"),
    ],
    ids=["no folder", "pickle", "code", "slow", "no head", "too long", "decoder", "encoder-decoder"],
)
def test_what_is_refused(tmp_path: Path, make: Callable[[Path], Any], said: str) -> None:
    make(tmp_path / "model")
    with pytest.raises(UserError, match=said) as error:
        HF("hf", str(tmp_path / "model"), max_tokens=30).load(64)
    assert len(str(error.value).splitlines()) <= 2


def test_a_name_on_the_hub_is_not_fetched_unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []

    def refuse(source: str, **settings: Any) -> None:
        asked.append(settings)
        raise OSError("not in the cache")

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", refuse)
    for download in (False, True):
        with pytest.raises(UserError, match=r"backbone\.download=true fetches it"):
            HF("hf", "someone/network", download=download).load(64)
    assert [settings["local_files_only"] for settings in asked] == [True, False]
    assert not any(settings["trust_remote_code"] for settings in asked)


def test_every_field_stands_in_the_yaml() -> None:
    settings = yaml.safe_load(entries()["backbone"]["hf"].text)
    assert settings.keys() - {"_target_"} == {f.name for f in dataclasses.fields(HF)}
