"""IMDB's folders as they are unpacked, tokens with their places in the text, the vocabulary and its limits."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path

import pytest
import torch

from ibxai.cli import main
from ibxai.datasets.imdb import IMDB
from ibxai.datasets.loading import load_batches, sample_table_digest
from ibxai.errors import BadSample, UserError
from ibxai.targets import Label
from ibxai.tokenisation import PAD_ID, UNKNOWN_ID, Tokenisation, vocabulary_of, words
from ibxai.types import Text

REVIEWS = {
    "train/neg/0_2.txt": "Bad, bad film.<br /><br />I left.",
    "train/neg/1_4.txt": "Not good at all...",
    "train/pos/0_9.txt": "A good film: <i>really</i> good!",
    "train/pos/2_10.txt": "Caf\u00e9 scenes, good fun.",
    "test/neg/0_1.txt": "It isn\u2019t good.",
    "test/pos/0_10.txt": "Na\u00efve? No: good.",
    "test/pos/10_7.txt": "good",
}


def write(root: Path, reviews: dict[str, str] | None = None) -> Path:
    for name, text in (REVIEWS if reviews is None else reviews).items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode())
    return root


def imdb(root: Path, split: str = "test") -> IMDB:
    return IMDB(str(root), "imdb", split, 3)  # type: ignore[arg-type]


# --- the dataset


def test_the_samples(tmp_path: Path) -> None:
    dataset = imdb(write(tmp_path))
    found = {sample.sample_id: sample.label for sample in dataset.samples()}
    assert found == {"test-0_1-neg": 0, "test-0_10-pos": 1, "test-10_7-pos": 1}
    assert list(found) == sorted(found)
    assert len(dataset.in_split("train")) == 4
    assert len(dataset.reference()) == 3
    assert {sample.sample_id for sample in dataset.reference()} < {s.sample_id for s in dataset.in_split("train")}
    assert list(dataset.class_names) == ["negative", "positive"]
    for sample in dataset.samples():
        _, stem, kind = sample.sample_id.split("-")
        assert dataset.read(sample).text == REVIEWS[f"test/{kind}/{stem}.txt"]
        assert sample.size == len(REVIEWS[f"test/{kind}/{stem}.txt"].encode())
    assert [s.sample_id for s in imdb(tmp_path, "train").samples()] == [s.sample_id for s in dataset.in_split("train")]


def test_the_first_samples_are_of_both_kinds(tmp_path: Path) -> None:
    reviews = {
        f"{split}/{kind}/{i}_5.txt": "x" for split in ("train", "test") for kind in ("neg", "pos") for i in range(9)
    }
    assert [sample.label for sample in imdb(write(tmp_path, reviews)).samples()][:6] == [0, 1] * 3


def test_the_digest_is_of_the_bytes(tmp_path: Path) -> None:
    first, second = imdb(write(tmp_path / "one")), imdb(write(tmp_path / "two"))
    assert sample_table_digest(first.samples()) == sample_table_digest(second.samples())  # where it lies does not count
    write(tmp_path / "two", {"test/pos/10_7.txt": "gooD"})  # as many bytes
    assert sample_table_digest(first.samples()) != sample_table_digest(imdb(tmp_path / "two").samples())


def test_the_folder_above_and_strangers(tmp_path: Path) -> None:
    write(tmp_path / "aclImdb")
    write(tmp_path / "aclImdb", {"test/pos/readme.txt": "x", "test/pos/._0_10.txt": "x", "train/unsup/0_0.txt": "x"})
    assert len(imdb(tmp_path).samples()) == 3
    assert len(imdb(tmp_path).in_split("train")) == 4


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda root: None, "does not exist"),
        (lambda root: root.mkdir(), "no folder train/neg, train/pos, test/neg, test/pos"),
        (lambda root: write(root, {"train/pos/0_9.txt": "x"}), "no folder train/neg, test/neg, test/pos"),
        (lambda root: write(root, {"aclImdb_v1.tar.gz": "x"}), "packed: tar xzf aclImdb_v1.tar.gz"),
        (lambda root: root.write_text("x"), "is a file, not a folder"),
        (
            lambda root: write(root, {f"{s}/{k}/a.txt": "x" for s in ("train", "test") for k in ("pos", "neg")}),
            "hold no file named <id>_<rating>.txt",
        ),
    ],
)
def test_what_is_not_there(make: object, says: str, tmp_path: Path) -> None:
    make(tmp_path / "root")  # type: ignore[operator]
    with pytest.raises(UserError) as error:
        imdb(tmp_path / "root").samples()
    assert says in str(error.value)
    assert "aclImdb_v1.tar.gz from" in str(error.value)
    assert len(str(error.value).splitlines()) == 2


def test_reviews_that_cannot_be_used(tmp_path: Path) -> None:
    root = write(tmp_path)
    (root / "test/pos/3_9.txt").write_bytes(b"\xff\xfe")
    (root / "test/pos/4_9.txt").write_bytes(b" <br /> ")
    (root / "test/pos/5_9.txt").symlink_to(root / "nowhere")
    dataset = imdb(root)
    tokenisation = Tokenisation(vocabulary_of(REVIEWS.values(), 1), 50)
    work = [(sample, (0,)) for sample in dataset.samples()]
    skipped: dict[str, str] = {}
    kept: list[str] = []
    for loaded in load_batches(dataset, work, Label(), tokenisation, 2, 0):
        skipped |= loaded.skipped
        kept += loaded.row_ids
    assert len(kept) == 3
    assert "UTF-8" in skipped["test-3_9-pos"]
    assert skipped["test-4_9-pos"] == "the text holds no word"
    assert "No such file" in skipped["test-5_9-pos"]


def test_data_check(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = write(tmp_path)
    assert main(["data", "check", "dataset=imdb", f"dataset.root={root}"]) == 0
    told = capsys.readouterr().out
    assert "7 of 7 samples, 0 with a problem" in told
    assert "positive 4, negative 3" in told
    assert "pixels" not in told
    (root / "test/pos/4_9.txt").write_bytes(b" <br /> ")
    assert main(["data", "check", "dataset=imdb", f"dataset.root={root}"]) == 3
    assert "4_9.txt: the text holds no word" in capsys.readouterr().out


# --- tokens


def test_words() -> None:
    text = "It isn\u2019t \u201cgood\u201d, B-movie!<br /><br />\u0130stanbul 2\u00bd <3 \U0001f600"
    found = words(text)
    assert [token for token, _, _ in found][:6] == ["it", "isn't", "\u201c", "good", "\u201d", ","]
    assert "br" not in [token for token, _, _ in found]
    assert [text[start:end] for _, start, end in found][6:9] == ["B-movie", "!", "\u0130stanbul"]
    assert [token for token, _, _ in found][-3:] == ["<", "3", "\U0001f600"]


def test_every_character_is_in_one_token_or_between() -> None:
    """On texts thrown together at random: places rise, do not overlap, and hold no blank."""
    draw = random.Random(0)
    alphabet = [
        "a",
        "B",
        "\u00e9",
        "'",
        "\u2019",
        "-",
        " ",
        "\n",
        ".",
        "<br />",
        "\U0001f3ac",
        "\u0130",
        "_",
        "9",
    ]
    for _ in range(200):
        text = "".join(draw.choices(alphabet, k=30))
        behind = 0
        for token, start, end in words(text):
            assert behind <= start < end
            assert token
            assert not any(character.isspace() for character in text[start:end])
            behind = end
        left = "".join(text[a:b] for a, b in _gaps(text))
        assert not any(c.isalnum() for c in left.replace("<br />", ""))


def _gaps(text: str) -> list[tuple[int, int]]:
    edges = [0, *(edge for _, start, end in words(text) for edge in (start, end)), len(text)]
    return list(zip(edges[::2], edges[1::2], strict=True))


def test_the_vocabulary() -> None:
    texts = ["b a a c", "a b", "c d"]
    assert vocabulary_of(texts, 1) == ("<pad>", "<unk>", "a", "b", "c", "d")
    assert vocabulary_of(reversed(texts), 2) == ("<pad>", "<unk>", "a", "b", "c")
    assert vocabulary_of(texts, 3) == ("<pad>", "<unk>", "a")


def test_tokenisation() -> None:
    tokenisation = Tokenisation(("<pad>", "<unk>", "good", "film", "."), 4)
    text = Text("Good <br /> FILM, good. More")
    tokens, regions = tokenisation(text)
    assert tokens.tolist() == [2, 3, UNKNOWN_ID, 2]
    assert tokens.dtype == torch.long
    assert regions == {}
    spans = tokenisation.spans(text)
    assert [text.text[start:end] for start, end in spans] == ["Good", "FILM", ",", "good"]
    with pytest.raises(BadSample, match="no word"):
        tokenisation(Text(" <br />\n"))


def test_the_identity_of_a_tokenisation_is_short() -> None:
    one, other = (Tokenisation(("<pad>", "<unk>", word), 9) for word in ("a", "b"))
    assert dataclasses.asdict(one).keys() == {"max_tokens", "digest"}
    assert one.digest != other.digest
    assert one == Tokenisation(("<pad>", "<unk>", "a"), 9) != Tokenisation(("<pad>", "<unk>", "a"), 8)


@pytest.mark.parametrize(
    ("vocabulary", "most", "says"), [(("a", "b"), 3, "begins with <pad>"), (("<pad>", "<unk>"), 0, "1 or")]
)
def test_tokenisations_that_cannot_be(vocabulary: tuple[str, ...], most: int, says: str) -> None:
    with pytest.raises(UserError, match=says):
        Tokenisation(vocabulary, most)


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_of_different_lengths(tmp_path: Path, workers: int) -> None:
    dataset = imdb(write(tmp_path))
    tokenisation = Tokenisation(vocabulary_of((REVIEWS[n] for n in REVIEWS if n.startswith("train")), 1), 4)
    work = [(sample, (0,)) for sample in dataset.samples()]
    (loaded,) = load_batches(dataset, work, Label(), tokenisation, 8, workers)
    batch = loaded.batch
    assert batch is not None
    assert batch.tokens is not None
    assert batch.valid is not None
    assert batch.tokens.shape == (3, 4)
    assert batch.valid.tolist() == [[True] * 4, [True] * 4, [True, False, False, False]]
    assert (batch.tokens[~batch.valid] == PAD_ID).all()
    assert [text.text for text in loaded.texts] == [dataset.read(sample).text for sample, _ in work]
    taken = batch.take([2, 0])
    assert taken.valid is not None
    assert taken.valid.sum(1).tolist() == [1, 4]
    assert taken.places == (4,)


SHARED = Path(__file__).parents[2] / "shared" / "data" / "imdb" / "aclImdb_small.tar.gz"


@pytest.mark.skipif(not SHARED.is_file(), reason="needs ../shared/data/imdb")
def test_real_reviews(tmp_path: Path) -> None:
    import tarfile

    with tarfile.open(SHARED) as packed:
        chosen = [m for m in packed.getmembers() if m.isfile() and "/test/" in m.name][::20]
        packed.extractall(tmp_path, chosen, filter="data")
    (tmp_path / "aclImdb/train/pos").mkdir(parents=True)
    (tmp_path / "aclImdb/train/neg").mkdir(parents=True)
    dataset = imdb(tmp_path)
    samples = dataset.samples()
    assert len(samples) == len(chosen) == 125
    assert {sample.label for sample in samples} == {0, 1}
    texts = [dataset.read(sample) for sample in samples]
    assert sum("<br />" in text.text for text in texts) > 50
    assert any(not text.text.isascii() for text in texts)
    vocabulary = vocabulary_of((text.text for text in texts), 2)
    tokenisation = Tokenisation(vocabulary, 10_000)
    for text in texts:
        tokens, _ = tokenisation(text)
        spans = tokenisation.spans(text)
        assert len(tokens) == len(spans) > 10
        for number, (start, end) in zip(tokens.tolist(), spans, strict=True):
            word = text.text[start:end].lower().replace("\u2019", "'")
            assert number == UNKNOWN_ID or vocabulary[number] == word
