"""The page of a run on texts: every word in its place and colour, and nothing of a review becomes HTML."""

from __future__ import annotations

import re
from html import unescape
from pathlib import Path

import numpy as np
import pytest

from ibxai.report.leaderboard import write_leaderboard
from ibxai.report.page import write_report
from ibxai.report.words import Piece, coloured, levels_of
from ibxai.store import DamagedFile, MetricKey, Row, RunStore, StoredHeatmap
from ibxai.tokenisation import words

TEXT = "A <b>good</b> film.<br /><br />I <script>alert(1)</script> love it! The rest was not read."
SPANS = [(start, end) for _, start, end in words(TEXT)][:12]


def store_of(folder: Path, heatmap: np.ndarray, method: str = "iba") -> RunStore:
    store = RunStore(folder / "imdb" / "lstm" / method / "abc")
    rows = [Row(f"r{i}@predicted", f"r{i}", "predicted", f"r{i}", 1) for i in range(2)]
    provenance = {"method": method, "dataset": "imdb", "backbone": "lstm", "finished": "2026-01-02T03:04:05+00:00"}
    store.begin("a: 1\n", provenance, ["negative", "positive"], rows)
    for row in rows:
        store.write_words(row.row_id, TEXT, SPANS)
        store.write_heatmap(StoredHeatmap(row.row_id, heatmap, "mask", 1, 0.9, 1, 0.9, {"capacity": np.array(3.0)}))
    key = MetricKey("insertion", {"score": "probability", "higher_is_better": True})
    curve, fraction = np.array([[0.1, 0.6, 0.9], [0.2, 0.3, 0.9]]), np.array([[0, 0.5, 1], [0, 0.3, 1]])
    store.write_scores(key, [row.row_id for row in rows], {"auc": curve.mean(1), "curve": curve, "fraction": fraction})
    return store


# --- pieces


def test_the_pieces_are_the_text() -> None:
    pieces = coloured(TEXT, SPANS, np.linspace(0, 1, len(SPANS)))
    assert "".join(piece.text for piece in pieces) == TEXT.replace("<br /><br />", "\n\n")
    assert [piece.text for piece in pieces if piece.value] == [TEXT[start:end] for start, end in SPANS]
    assert [piece.unread for piece in pieces] == [False] * (len(pieces) - 1) + [True]


def test_colours_follow_the_values() -> None:
    """More heat, more colour; of signed maps red for the target and blue against it."""

    def opacities(values: list[float]) -> list[tuple[str, float]]:
        spans = [(2 * i, 2 * i + 1) for i in range(len(values))]
        tokens = [p for p in coloured("a " * len(values), spans, np.array(values)) if p.value]
        found = [re.fullmatch(r"rgb\((\d+) \d+ (\d+) / ([\d.]+)\)", piece.colour) for piece in tokens]
        return [("red" if int(m[1]) > int(m[2]) else "blue", float(m[3])) for m in found if m]

    rising = opacities([0.0, 0.25, 0.5, 0.75, 1.0])
    assert [strength for _, strength in rising] == sorted(strength for _, strength in rising)
    assert rising[0][1] == 0 < rising[-1][1]
    assert {colour for colour, _ in rising} == {"red"}
    signed = opacities([-2.0, -1.0, 0.0, 1.0, 2.0])
    assert [colour for colour, strength in signed if strength] == ["blue", "blue", "red", "red"]
    assert signed[0][1] == signed[-1][1] > signed[1][1] == signed[3][1] > signed[2][1] == 0


@pytest.mark.parametrize(
    ("values", "wanted"),
    [
        ([0.0, 0.32, 0.34, 0.65, 0.67, 1.0], [0, 0, 1, 1, 2, 2]),  # InputIBA's Table 1
        ([5.0, 10.0, 7.0], [0, 2, 1]),
        ([-3.0, -1.0, 0.0, 1.0, 3.0], [0, 0, 0, 1, 2]),  # what speaks against the target reaches none
        ([2.0, 2.0], [0, 0]),
        ([np.nan, 0.0, 1.0], [0, 0, 2]),
        ([np.nan], [0]),
        ([-2.0, -1.0], [0, 0]),
    ],
)
def test_the_two_thresholds(values: list[float], wanted: list[int]) -> None:
    assert levels_of(np.array(values)).tolist() == wanted


def test_undefined_values_have_no_colour() -> None:
    first, _, second = coloured("a b", [(0, 1), (2, 3)], np.array([np.nan, 1.0]))
    assert first == Piece("a", "", 0, "undefined")
    assert second.colour


def test_as_many_values_as_tokens() -> None:
    with pytest.raises(ValueError, match="zip"):
        coloured("a b", [(0, 1), (2, 3)], np.zeros(3))


# --- the store


def test_texts_are_kept_as_they_are(tmp_path: Path) -> None:
    store = RunStore(tmp_path)
    text = "na\u00efve \U0001f3ac \udcff\r\n<br />"
    assert store.read_words("a") is None
    store.write_words("a", text, [(0, 5)])
    assert store.read_words("a") == (text, [(0, 5)])
    next((tmp_path / "texts").iterdir()).write_text("{")
    with pytest.raises(DamagedFile):
        store.read_words("a")


# --- the page


def test_the_page(tmp_path: Path) -> None:
    heatmap = np.linspace(0, 1, len(SPANS), dtype=np.float32)
    page = write_report(store_of(tmp_path, heatmap)).read_text()
    assert page.count('class="review"') == 2
    shown = page.split('class="review"')[1].split("</div>")[0].partition(">")[2]
    assert unescape(re.sub(r"<[^>]*>", "", shown)) == TEXT.replace("<br /><br />", "\n\n")
    marks = re.findall(r'<mark class="level-(\d)" style="background: ([^"]*)" title="([^"]*)">([^<]*)</mark>', shown)
    assert [unescape(word) for *_, word in marks] == [TEXT[start:end] for start, end in SPANS]
    assert [float(value) for _, _, value, _ in marks] == pytest.approx(heatmap, abs=5e-3)
    assert "<script>alert" not in page
    assert "The rest was not read." in re.search(r'<span class="unread">([^<]*)</span>', shown)[1]  # type: ignore[index]
    assert "thin from 0.33, thick from 0.66" in page
    assert "What its hottest pixels show" not in page
    assert "fraction of words inserted" in page
    assert "pixels" not in page.partition('id="samples"')[0].partition("<main>")[2]
    assert page.count("<svg") >= 3  # the mean curve, and each text's own


def test_the_leaderboard_counts_words(tmp_path: Path) -> None:
    for method, values in (("iba", np.linspace(0, 1, len(SPANS))), ("lime", np.linspace(1, 0, len(SPANS)))):
        write_report(store_of(tmp_path, values.astype(np.float32), method))
    page = write_leaderboard(tmp_path).read_text()
    assert "fraction of words inserted" in page
    assert "without the first words" not in page  # of deletion, which nobody has
    assert "the first words alone carry the evidence" in page
    assert "pixel" not in page.partition("<main>")[2]


def test_a_damaged_text_leaves_its_card_out(tmp_path: Path) -> None:
    store = store_of(tmp_path, np.linspace(0, 1, len(SPANS), dtype=np.float32))
    store.write_words("r0@predicted", TEXT, SPANS[:3])
    assert write_report(store).read_text().count('class="review"') == 1
