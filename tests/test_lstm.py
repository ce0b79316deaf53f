"""The LSTM beside a slow re-derivation in float64; padding, training from nothing, checkpoints, and what is refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
import yaml
from test_imdb import write
from texts import LENGTHS, MOST, WORDS, small_lstm, text_backbone, text_batch, token_rows
from torch import Tensor, nn

from ibxai.backbones import TextBackbone
from ibxai.backbones.lstm import LSTM, LSTMClassifier, OnTokens
from ibxai.catalogue import entries
from ibxai.cli import main
from ibxai.errors import UserError
from ibxai.store import find_runs
from ibxai.tokenisation import UNKNOWN_ID, Tokenisation

QUICK = [
    "device=cpu",
    "backbone.layers.late=lstm2",
    "backbone.layers.bottleneck=lstm2",
    "backbone.embedding=6",
    "backbone.hidden=6",
    "backbone.depth=2",
    "backbone.min_count=1",
]


def by_hand(network: LSTMClassifier, tokens: Tensor) -> Tensor:
    """The gates of Hochreiter and Schmidhuber token by token, then the mean over the tokens."""
    sequence = [network.embedding.weight[number].double() for number in tokens.tolist()]
    for layer in (network.get_submodule("lstm1"), network.get_submodule("lstm2")):
        weights = {name: value.double() for name, value in layer.named_parameters()}
        hidden = cell = torch.zeros(8, dtype=torch.float64)
        out = []
        for value in sequence:
            gates = weights["weight_ih_l0"] @ value + weights["bias_ih_l0"]
            gates = gates + weights["weight_hh_l0"] @ hidden + weights["bias_hh_l0"]
            entry, forget, new, leave = gates.chunk(4)
            cell = torch.sigmoid(forget) * cell + torch.sigmoid(entry) * torch.tanh(new)
            hidden = torch.sigmoid(leave) * torch.tanh(cell)
            out.append(hidden)
        sequence = out
    mean = torch.stack(sequence).mean(0)
    return network.classifier.weight.double() @ mean + network.classifier.bias.double()


def test_the_outputs_by_hand() -> None:
    backbone, network = text_backbone(), small_lstm()
    batch = text_batch(backbone, token_rows(), [0] * 5, padding=4)
    with torch.no_grad():
        found = backbone(batch.inputs, batch.valid)
        wanted = torch.stack([by_hand(network, row) for row in token_rows()])
    torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-5)
    assert wanted.std(0).min() > 1e-2


@pytest.mark.parametrize("layer", ["lstm1", "lstm2", "bottleneck"])
def test_the_parts_make_the_whole(layer: str) -> None:
    backbone = text_backbone()
    assert backbone._trace is not None, "the tail of the LSTM can be run alone"
    batch = text_batch(backbone, token_rows(), [0] * 5)
    head, tail = backbone.split(layer)
    with torch.no_grad():
        features = head(batch.inputs, batch.valid)
        assert features.values.shape == (5, max(LENGTHS), 8)
        torch.testing.assert_close(tail(features), backbone(batch.inputs, batch.valid))
        torch.testing.assert_close(backbone.features(batch.inputs, [layer], batch.valid)[layer], features.values)


def test_the_digest_knows_the_embedding() -> None:
    network = small_lstm()
    before = text_backbone(network=network).digest
    with torch.no_grad():
        network.embedding.weight[7, 0] += 1
    assert text_backbone(network=network).digest != before


def test_weights_that_are_not_finite() -> None:
    network = small_lstm()
    with torch.no_grad():
        network.embedding.weight[3] = torch.nan
    with pytest.raises(UserError, match="not finite: embedding"):
        text_backbone(network=network)


def test_training_reads_token_numbers() -> None:
    """In eval mode as the frozen network; in training a share of the tokens is `<unk>`, and never the padding."""
    network = OnTokens(small_lstm(), 0.5).eval()
    rows = token_rows()
    tokens = nn.utils.rnn.pad_sequence(rows, True, 0)
    with torch.no_grad():
        wanted = torch.stack([by_hand(network.classifier, row) for row in rows])
        torch.testing.assert_close(network(tokens).double(), wanted, rtol=1e-4, atol=1e-5)
        longer = nn.functional.pad(tokens, (0, 9))
        torch.testing.assert_close(network(longer), network(tokens))
    seen: list[Tensor] = []
    network.train().classifier.embedding.register_forward_hook(lambda module, args, out: seen.append(args[0]))
    torch.manual_seed(0)
    for _ in range(40):
        network(tokens)
    hidden = torch.stack(seen) == UNKNOWN_ID
    assert not hidden[:, tokens == 0].any()
    assert abs(hidden[:, tokens != 0].float().mean() - 0.5) < 0.05


@pytest.mark.parametrize(
    "settings", [{"depth": 0}, {"embedding": 0}, {"dropout": 1.0}, {"unknown_share": -0.1}, {"min_count": 0}]
)
def test_settings_that_cannot_be(settings: dict[str, float]) -> None:
    with pytest.raises(UserError):
        LSTM(**settings)  # type: ignore[arg-type]


def test_every_field_stands_in_the_yaml() -> None:
    settings = yaml.safe_load(entries()["backbone"]["lstm"].text)
    assert settings.keys() - {"_target_"} == {f.name for f in dataclasses.fields(LSTM)}


def test_without_a_training_there_is_no_vocabulary() -> None:
    with pytest.raises(UserError, match="ibxai train dataset=imdb backbone=lstm") as error:
        LSTM().load(8)
    assert len(str(error.value).splitlines()) == 2


def test_a_layer_for_a_bottleneck_has_features_a_token() -> None:
    from ibxai.methods.feature_statistics import FeatureGrid

    with pytest.raises(UserError, match="features a token; 'classifier' gives \\[5\\]"):
        FeatureGrid.at(text_backbone(), "classifier")


# --- from the command line


def reviews(root: Path, count: int = 40) -> Path:
    """Good and bad films: one word says which."""
    generator = torch.Generator().manual_seed(0)
    found = {}
    for split in ("train", "test"):
        for kind, word in (("neg", "awful"), ("pos", "lovely")):
            for i in range(count if split == "train" else 6):
                plain = [f"w{n}" for n in torch.randint(0, 9, (5,), generator=generator).tolist()]
                plain.insert(i % 5, word)
                found[f"{split}/{kind}/{i}_5.txt"] = "<br />".join(plain) + f" {kind}{split}{i}"
    return write(root, found)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a training, and of a run that found it unasked."""
    folder = tmp_path_factory.mktemp("texts")
    root = reviews(folder / "aclImdb")
    common = [f"dataset.root={root}", f"outputs={folder / 'outputs'}", *QUICK]
    recipe = ["backbone.dropout=0", "epochs=12", "batch_size=16", "learning_rate=0.05", "patience=12"]
    assert main(["train", "dataset=imdb", *common, *recipe]) == 0
    metrics = "metric=[insertion,deletion,sensitivity_n]"
    quick = ["metric.sensitivity_n.sets=8", "metric.sensitivity_n.points=2", "method.feature.steps=3", "method.steps=8"]
    chosen = ["method=input_iba_text", "method.direct.steps=3", metrics, *quick, "pictures=5"]
    assert main(["run", "dataset=imdb", *common, *chosen]) == 0
    return folder


def test_a_training_leaves_its_vocabulary(trained: Path) -> None:
    (path,) = (trained / "outputs").glob("imdb/lstm/training/*/weights.json")
    told = json.loads(path.read_text())
    vocabulary = told["learnt"]["vocabulary"]
    assert vocabulary[:2] == ["<pad>", "<unk>"]
    assert {"awful", "lovely", "w0"} <= set(vocabulary)
    assert not any("test" in word for word in vocabulary), "the test split has no part in it"
    accuracy = next(score for score in told["test"] if score["metric"] == "accuracy")
    assert accuracy["value"] == 1.0


def test_a_run_finds_it_and_keeps_maps_without_padding(trained: Path) -> None:
    (store,) = find_runs(trained / "outputs")
    rows = store.rows()
    assert len(rows) == 12
    for row in rows:
        stored = store.read_heatmap(row.row_id)
        assert stored.heatmap.shape == (7,)
        assert stored.prediction == row.label
    assert {metric.name for metric in store.metrics()} == {"insertion", "deletion", "sensitivity_n"}
    shown = [store.read_words(row.row_id) for row in rows]
    assert sum(words is not None for words in shown) == 5
    text, spans = next(words for words in shown if words is not None)
    assert len(spans) == 7
    assert "<br />" in text
    identity = store.provenance()["identity"]
    assert set(identity["preprocessing"]) == {"max_tokens", "digest"}


def test_another_metric_uses_the_maps_that_are_there(trained: Path) -> None:
    common = [f"dataset.root={trained / 'aclImdb'}", f"outputs={trained / 'outputs'}", *QUICK]
    settings = ["method.feature.steps=3", "method.steps=8", "method.direct.steps=3"]
    command = ["run", "dataset=imdb", *common, "method=input_iba_text", *settings, "pictures=5", "metric=[insertion]"]
    assert main(command) == 0
    (store,) = find_runs(trained / "outputs")
    before = {path.name: path.stat().st_mtime_ns for path in (store.path / "heatmaps").iterdir()}
    assert main([*command[:-1], "metric=[deletion_input_iba]", "batch_size=1"]) == 0  # a metric is judged anew, no map
    assert {path.name: path.stat().st_mtime_ns for path in (store.path / "heatmaps").iterdir()} == before
    assert "deletion_input_iba" in {metric.name for metric in store.metrics()}


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (
            ["method=gradcam"],
            "method=gradcam is not for texts, and dataset=imdb holds texts.\nFor texts: method=gradient",
        ),
        (["metric=[bbox]"], "metric=bbox is not for texts"),
        (
            ["backbone=small_cnn"],
            "backbone=small_cnn reads pictures, and dataset=imdb holds texts.\nFor texts: backbone=hf, lstm.",
        ),
        (["dataset=sample", "backbone=lstm"], "backbone=lstm reads texts, and dataset=sample holds pictures."),
        (["study=parameter_randomization"], "There is no study for texts."),
    ],
)
def test_parts_that_do_not_fit(
    overrides: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [] if "dataset=sample" in overrides else ["dataset=imdb", f"dataset.root={tmp_path}"]
    assert main(["run", *given, *overrides, f"outputs={tmp_path / 'out'}"]) == 2
    error = capsys.readouterr().err
    assert says in error
    assert len(error.strip().splitlines()) <= 2
    assert not (tmp_path / "out").exists()


def test_a_training_of_what_does_not_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "dataset=imdb", f"dataset.root={tmp_path}", "backbone=small_cnn"]) == 2
    assert "backbone=small_cnn reads pictures, and dataset=imdb holds texts." in capsys.readouterr().err


def test_the_example_of_a_backbone() -> None:
    """What a user writes to explain a network of their own."""

    class BagOfWords(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Linear(6, 3)

        def forward(self, inputs: Tensor) -> Tensor:
            return (self.words(inputs[..., :-1]) * inputs[..., -1:]).sum(1)

    table = torch.randn(len(WORDS), 6, generator=torch.Generator().manual_seed(0))
    backbone = TextBackbone(BagOfWords(), table, Tokenisation(WORDS, MOST), {}, "bag")
    batch = text_batch(backbone, token_rows(), [0, 1, 2, 0, 1])
    from ibxai.methods import IntegratedGradients

    found = IntegratedGradients().fit(backbone, [], 0)(batch)
    assert found.heatmap.shape == (5, max(LENGTHS))
