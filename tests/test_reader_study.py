"""Reader studies: the page is blind and balanced, and keeps what is clicked in a browser; scores are known by hand."""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from statsmodels.stats.inter_rater import fleiss_kappa as reference_kappa
from test_report import CHROMIUM, Page, needs_chromium

from ibxai.cli import main
from ibxai.errors import UserError
from ibxai.reader_score import Answer, fleiss_kappa, preference, read_key, score_reader_study
from ibxai.reader_study import Key, make_reader_study
from ibxai.store import Row, RunStore, StoredHeatmap

GROUPS = 6


def run_of(outputs: Path, method: str, run_id: str, rows: int = 12, **changes: Any) -> RunStore:
    """Two slices a study, the label that of the study; the map of a method is hot on its side."""
    table = [Row(f"s{i}@1", f"s{i}", "1", f"g{i // 2}", (i // 2) % 3) for i in range(rows)]
    store = RunStore(outputs / "scans" / "net" / method / run_id)
    store.begin("seed: 0\n", {"method": method, "dataset": "scans"}, ["healthy", "ill"], table)
    for number, row in enumerate(table):
        pixels = np.random.default_rng(number + changes.get("shift", 0)).integers(0, 256, (24, 24, 3), dtype=np.uint8)
        heatmap = np.zeros((24, 24), dtype=np.float32) - (method == "gradcam")
        heatmap[4:9, slice(2, 9) if method == "iba" else slice(15, 22)] = 1 + number
        if number not in changes.get("unseen", ()):
            store.write_picture(row.row_id, pixels)
        target = 0 if number in changes.get("other", ()) else 1
        store.write_heatmap(StoredHeatmap(row.row_id, heatmap, "bits", target, 0.5, 1, 0.5))
    return store


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    return [run_of(tmp_path / "outputs", *who).path for who in (("iba", "aaaa1111bbbb"), ("gradcam", "cccc2222dddd"))]


def study_of(runs: Sequence[Path], to: Path, cases: int = 6, seed: int = 0) -> tuple[Path, Key]:
    made = make_reader_study(runs, to, cases, seed)
    return made.page, read_key(made.key)


def test_the_page_is_blind(runs: list[Path], tmp_path: Path) -> None:
    page, key = study_of(runs, tmp_path / "to")
    assert page.parent != tmp_path / "to"
    assert [path.name for path in page.parent.iterdir()] == [page.name]  # the key is not handed out with it
    text = re.sub(r"data:image/jpeg;base64,[A-Za-z0-9+/=]+", "", page.read_text())
    names = ("iba", "gradcam", "aaaa1111bbbb", "cccc2222dddd", "outputs", str(tmp_path), "bits")
    for told in (*names, *(f"s{i}@" for i in range(12))):
        assert told not in text.replace("ibxai", ""), told
    assert key.runs == ("iba", "gradcam")
    seen = Page(page)
    assert len(seen.all("article")) == 6
    images = [str(image["src"]) for image in seen.all("img") if image.get("src")]
    assert len(images) == 18
    assert all(source.startswith("data:image/jpeg") for source in images)
    assert not {"link", "iframe", "object"} & {tag for tag, _ in seen.tags}
    assert {str(told["src"])[:5] for _, told in seen.tags if "src" in told} == {"data:"}


def test_order_and_sides_are_drawn_and_balanced(runs: list[Path], tmp_path: Path) -> None:
    keys = [study_of(runs, tmp_path / str(n), 12, seed)[1] for n, seed in enumerate((0, 0, 1))]
    assert keys[0] == keys[1]
    assert (tmp_path / "0" / "key.json").read_bytes() == (tmp_path / "1" / "key.json").read_bytes()
    orders = [[question.row for question in key.questions.values()] for key in keys]
    assert sorted(orders[0]) == sorted(orders[2])
    assert orders[0] != orders[2] != sorted(orders[0])
    assert keys[0].study != keys[2].study
    for key in keys:
        assert [question.left for question in key.questions.values()].count(0) == 6
        assert all({question.left, question.right} == {0, 1} for question in key.questions.values())
    sides = [{question.row: question.left for question in key.questions.values()} for key in keys]
    assert sides[0] != sides[2]


def test_the_maps_are_on_the_sides_that_the_key_says(runs: list[Path], tmp_path: Path) -> None:
    """A map of iba is hot on the left, one of grad on the right; the negative rest of grad is not shown in blue."""
    import base64
    import io

    from PIL import Image

    page, key = study_of(runs, tmp_path / "to", 6)
    images = [str(image["src"]) for image in Page(page).all("img")]
    for number, question in enumerate(key.questions.values()):
        picture, *maps = (
            np.asarray(Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2])))).astype(float)
            for source in images[3 * number : 3 * number + 3]
        )
        for heat, run in zip(maps, (question.left, question.right), strict=True):
            warm = (heat[..., 0] - heat[..., 2])[5:8]
            left, right = warm[:, 3:8].mean(), warm[:, 16:21].mean()
            assert (left > right) == (key.runs[run] == "iba")
        assert picture.shape == (24, 24, 3)


def test_cases_are_of_all_labels_and_of_other_studies(runs: list[Path], tmp_path: Path) -> None:
    for seed in range(4):
        _, key = study_of(runs, tmp_path / str(seed), 6, seed)
        asked = list(key.questions.values())
        assert len({question.group for question in asked}) == GROUPS
        labels = [int(question.group[1:]) % 3 for question in asked]
        assert {labels.count(label) for label in range(3)} == {2}


def test_three_runs_make_three_pairs(runs: list[Path], tmp_path: Path) -> None:
    third = run_of(tmp_path / "outputs", "iba", "eeee3333ffff").path
    _, key = study_of([*runs, third], tmp_path / "to", 4)
    assert key.runs == ("iba (aaaa1111bbbb)", "gradcam", "iba (eeee3333ffff)")
    pairs = [tuple(sorted((question.left, question.right))) for question in key.questions.values()]
    assert {pair: pairs.count(pair) for pair in pairs} == {(0, 1): 4, (0, 2): 4, (1, 2): 4}


def test_rows_that_cannot_be_compared_are_left_out(tmp_path: Path) -> None:
    first = run_of(tmp_path, "iba", "a", unseen=(0, 1))
    second = run_of(tmp_path, "gradcam", "b", other=(2, 3))
    (second.path / "heatmaps" / "s4@1.npz").write_bytes(b"cut short")
    (second.path / "heatmaps" / "s5@1.npz").unlink()
    _, key = study_of([first.path, second.path], tmp_path / "to", 6)
    assert {question.row for question in key.questions.values()} == {f"s{i}@1" for i in range(6, 12)}
    with pytest.raises(UserError, match=r"--cases 7: of 6 rows") as raised:
        make_reader_study([first.path, second.path], tmp_path / "to", 7, 0)
    assert "pictures=N" in str(raised.value)


def test_mistakes(runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = run_of(tmp_path / "outputs", "lrp", "f", shift=1).path
    for arguments, says in [
        ([str(runs[0])], "two or more are expected"),
        ([str(runs[0]), str(runs[0])], "each once"),
        ([str(runs[0]), str(tmp_path)], "is no run"),
        ([str(runs[0]), str(other)], "do not show the same picture"),
        ([*map(str, runs), "--cases", "0"], "--cases 0"),
        (["score", "x.json"], "--key"),
        (["score", "x.json", "--key", str(tmp_path / "none.json")], "cannot be read"),
    ]:
        assert main(["reader-study", *arguments]) == 2, arguments
        out, err = capsys.readouterr()
        assert says in err
        assert len(err.splitlines()) <= 2
        assert out == ""


# in a browser


class Browser:
    """Chromium's DevTools over two pipes: what a person does, on the page as it is."""

    def __init__(self, profile: Path, downloads: Path) -> None:
        assert CHROMIUM is not None
        there, self._write = os.pipe()
        self._read, back = os.pipe()
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--window-size=1300,1000"]
        command = [CHROMIUM, *flags, "--remote-debugging-pipe", f"--user-data-dir={profile}", "about:blank"]
        shell = f"exec {shlex.join(command)} 3<&{there} 4>&{back}"
        self.process = subprocess.Popen(
            ["bash", "-c", shell], pass_fds=(there, back), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        os.close(there)
        os.close(back)
        self._number, self._buffer, self.complaints, self._session = 0, b"", [], ""  # type: ignore[var-annotated]
        [page] = [t for t in self.ask("Target.getTargets")["targetInfos"] if t["type"] == "page"]
        attached = self.ask("Target.attachToTarget", targetId=page["targetId"], flatten=True)
        self.ask("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(downloads))
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.ask(f"{domain}.enable")

    def ask(self, method: str, **params: Any) -> dict[str, Any]:
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        message |= {"sessionId": self._session} if self._session else {}
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self._buffer:
                more = os.read(self._read, 65536)
                assert more, "Chromium has gone"
                self._buffer += more
            line, _, self._buffer = self._buffer.partition(b"\0")
            told = json.loads(line)
            if told.get("method") in ("Log.entryAdded", "Runtime.exceptionThrown"):
                self.complaints.append(told["params"])
            if told.get("method") == "Page.javascriptDialogOpening":
                self._number += 1
                accept = {"id": self._number, "method": "Page.handleJavaScriptDialog", "params": {"accept": True}}
                os.write(self._write, json.dumps({**accept, "sessionId": self._session}).encode() + b"\0")
            if told.get("id") == message["id"]:
                assert "result" in told, told
                return told["result"]

    def run(self, code: str) -> Any:
        """The value of a JavaScript expression on the page."""
        return self.ask("Runtime.evaluate", expression=code, returnByValue=True)["result"].get("value")

    def until(self, code: str) -> None:
        end = time.monotonic() + 30
        while not self.run(code):
            assert time.monotonic() < end, f"never: {code}"
            time.sleep(0.05)

    def open(self, page: Path) -> None:
        self.ask("Page.navigate", url=page.as_uri())
        self.until("location.protocol == 'file:' && document.readyState == 'complete'")

    def click(self, selector: str) -> None:
        """With the mouse, at the middle of what is seen of it."""
        place = f"document.querySelector({json.dumps(selector)})"
        self.run(f"{place}.scrollIntoView({{block: 'center'}})")
        x, y = self.run(f"(b => [b.x + b.width / 2, b.y + b.height / 2])({place}.getBoundingClientRect())")
        for kind in ("mousePressed", "mouseReleased"):
            self.ask("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def kill(self) -> None:
        with suppress(AssertionError, OSError):
            self.ask("Browser.close")
        self.process.wait(30)
        os.close(self._read)
        os.close(self._write)


@contextmanager
def browser(folder: Path) -> Iterator[Browser]:
    opened = Browser(folder / "profile", folder)
    try:
        yield opened
    finally:
        opened.kill()


@needs_chromium
def test_clicking_through_it(runs: list[Path], tmp_path: Path) -> None:
    page, key = study_of(runs, tmp_path / "to", 3)
    given = [("left", 1, 4), ("tie", 2, 2), ("right", 3, 1)]
    with browser(tmp_path) as seen:
        seen.open(page)
        assert seen.run("document.querySelectorAll('.question:not([hidden])').length") == 1
        assert seen.run("[...document.images].filter(i => i.getAttribute('src')).every(i => i.naturalWidth == 24)")
        assert seen.run("document.querySelector('#q1 .score').disabled")
        seen.click("#reader")
        seen.ask("Input.insertText", text="Dr. A")
        for number, (choice, left, right) in enumerate(given[:2], start=1):
            seen.click(f"[name=q{number}-choice][value={choice}]")
            seen.click(f"[name=q{number}-left][value='{left}']")
            seen.click(f"[name=q{number}-right][value='{right}']")
            seen.click("#next")
        assert seen.run("document.querySelector('.question:not([hidden])').id") == "q3"
        assert seen.run("document.getElementById('progress').value") == "2 of 3 answered"
        seen.ask("Page.reload")
        seen.until("document.readyState == 'complete' && document.getElementById('reader')?.value == 'Dr. A'")
        assert seen.run("document.querySelector('.question:not([hidden])').id") == "q3"  # the first without an answer
        assert seen.run("document.querySelector('[name=q1-right]:checked').value") == "4"
        seen.click("#save")
        assert "without an answer to page 3" in seen.run("document.getElementById('said').textContent")
        choice, left, right = given[2]
        seen.click(f"[name=q3-choice][value={choice}]")
        seen.click(f"[name=q3-left][value='{left}']")
        seen.click(f"[name=q3-right][value='{right}']")
        assert seen.run("document.getElementById('next').disabled")
        for old in tmp_path.glob("answers-*.json"):
            old.unlink()
        seen.click("#save")
        saved = tmp_path / f"answers-Dr-A-{key.study}.json"
        end = time.monotonic() + 30
        while not saved.exists() or not saved.read_bytes():
            assert time.monotonic() < end
            time.sleep(0.05)
        assert seen.complaints == []
        seen.click("#afresh")  # and yes to "Have they been saved?"
        seen.until("document.getElementById('reader').value == ''")
        assert seen.run("document.querySelectorAll(':checked').length") == 0
    told = json.loads(saved.read_text())
    assert (told["study"], told["reader"]) == (key.study, "Dr. A")
    assert told["answers"] == {
        f"q{n}": {"choice": c, "left": x, "right": y} for n, (c, x, y) in enumerate(given, start=1)
    }
    assert main(["reader-study", "score", str(saved), "--key", str(tmp_path / "to" / "key.json")]) == 0
    lines = pd.read_csv(tmp_path / "to" / "reader_study.csv")
    question = key.questions["q1"]
    [line] = lines[lines["row"] == question.row].to_dict("records")
    assert line["preferred"] == key.runs[question.left]
    assert line["score_first" if question.left == 0 else "score_second"] == 1


# what was said


def answer(reader: str, row: int, preferred: str, scores: tuple[int, int] = (1, 2)) -> Answer:
    pair = ("iba", "gradcam")
    return Answer(reader, f"q{row}", f"s{row}", f"g{row}", pair, preferred, dict(zip(pair, scores, strict=True)))


def test_all_readers_are_tested_over_cases() -> None:
    """Eight cases: six go to iba by two readers of three, one to grad, one is undecided."""
    given = [answer(reader, row, "iba") for row in range(6) for reader in "AB"]
    given += [answer("C", row, "gradcam") for row in range(6)]
    given += [answer(reader, 6, "gradcam") for reader in "ABC"]
    given += [answer("A", 7, "iba"), answer("B", 7, "gradcam"), answer("C", 7, "tie")]
    found = preference(given, ("iba", "gradcam"), "")
    assert (found.won, found.ties, found.lost) == (13, 1, 10)
    assert (found.test_won, found.test_n) == (6, 7)
    assert found.p_value == pytest.approx(2 * (7 + 1) / 2**7)  # P(6) + P(7) of 7, on both sides
    assert found.low == pytest.approx(0.4213, abs=1e-3)  # Clopper and Pearson's tables for 6 of 7
    assert found.high == pytest.approx(0.9964, abs=1e-3)
    alone = preference(given, ("iba", "gradcam"), "A")
    assert (alone.test_won, alone.test_n, alone.p_value) == (7, 8, pytest.approx(2 * 9 / 2**8))
    nobody = preference([answer("A", 0, "tie")], ("iba", "gradcam"), "")
    assert (nobody.test_n, nobody.ties) == (0, 1)
    assert math.isnan(nobody.p_value)


def test_fleiss_kappa() -> None:
    """Fleiss' own example is in statsmodels' terms a table of counts; 1 and the known least value by hand."""
    draws = np.random.default_rng(0)
    ratings = [[int(draws.choice([row % 4, draws.integers(4)])) for _ in range(5)] for row in range(30)]
    counts = np.array([np.bincount(given, minlength=4) for given in ratings])
    assert fleiss_kappa(ratings, 4) == pytest.approx(reference_kappa(counts))
    assert fleiss_kappa([[0, 0], [1, 1], [2, 2]], 3) == pytest.approx(1)
    assert fleiss_kappa([[0, 1], [1, 0]], 2) == pytest.approx(-1)
    assert math.isnan(fleiss_kappa([[0, 0], [0, 0]], 2))
    assert math.isnan(fleiss_kappa([[0], [1]], 2))
    assert math.isnan(fleiss_kappa([], 2))


def saved(folder: Path, key: Key, who: str, prefers: str, **changes: Any) -> Path:
    """A reader who always prefers one run, and gives it 1 and the other 3."""
    answers = {}
    for name, question in key.questions.items():
        first = key.runs[question.left] == prefers
        answers[name] = {
            "choice": "left" if first else "right", "left": 1 if first else 3, "right": 3 if first else 1
        }  # fmt: skip
    told = {"study": key.study, "reader": who, "started": "", "saved": "", "answers": answers, **changes}
    path = folder / f"answers-{who}.json"
    path.write_text(json.dumps(told))
    return path


def test_the_results(runs: list[Path], tmp_path: Path) -> None:
    _, key = study_of(runs, tmp_path / "to", 6)
    files = [saved(tmp_path, key, reader, "iba") for reader in ("A", "B", "C<b>")]
    page = score_reader_study(files, tmp_path / "to" / "key.json")
    lines = pd.read_csv(page.with_suffix(".csv"))
    assert len(lines) == 18
    assert set(lines["preferred"]) == {"iba"}
    assert set(lines["score_first"]) == {1}
    assert set(lines["score_second"]) == {3}
    seen = Page(page)
    assert "6 of 6 cases" in seen.text
    assert "0.031" in seen.text  # 2 / 2^6
    assert "C<b>" in seen.text
    assert '<span class="first" style="flex: 18">18</span>' in seen.source
    assert '<span class="score-0" style="flex: 18">18</span>' in seen.source
    divided = [*files[:2], saved(tmp_path, key, "D", "gradcam")]
    text = Page(score_reader_study(divided, tmp_path / "to" / "key.json")).text
    assert "−0.500" in text  # noqa: RUF001  # P = 1/3 on each question, P_e = 4/9 + 1/9: kappa = -1/2
    one = Page(score_reader_study(files[:1], tmp_path / "to" / "key.json"))
    assert "1 reader" in one.text


def test_incomplete_answers_are_left_out(runs: list[Path], tmp_path: Path) -> None:
    _, key = study_of(runs, tmp_path / "to", 3)
    half = {"q1": {"choice": "tie", "left": 2, "right": None}, "q2": {"choice": "tie", "left": 2, "right": 2}}
    page = score_reader_study([saved(tmp_path, key, "A", "iba", answers=half)], tmp_path / "to" / "key.json")
    assert len(pd.read_csv(page.with_suffix(".csv"))) == 1
    assert "1 of 3 answers" in Page(page).text


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"study": "other"}, "of the study other"),
        ({"answers": {"q9": {"choice": "tie", "left": 1, "right": 1}}}, "the page cannot give"),
        ({"answers": {"q1": {"choice": "up", "left": 1, "right": 1}}}, "the page cannot give"),
        ({"answers": {"q1": {"choice": "tie", "left": 9, "right": 1}}}, "the page cannot give"),
        ({"answers": [1]}, "the page cannot give"),
        ({"reader": ""}, "the page cannot give"),
    ],
)
def test_files_that_are_no_answers(changes: dict[str, Any], says: str, runs: list[Path], tmp_path: Path) -> None:
    _, key = study_of(runs, tmp_path / "to", 3)
    with pytest.raises(UserError, match=says) as raised:
        score_reader_study([saved(tmp_path, key, "A", "iba", **changes)], tmp_path / "to" / "key.json")
    assert len(str(raised.value).splitlines()) <= 2


def test_one_file_a_reader(runs: list[Path], tmp_path: Path) -> None:
    _, key = study_of(runs, tmp_path / "to", 3)
    file = saved(tmp_path, key, "A", "iba")
    with pytest.raises(UserError, match="one file a reader"):
        score_reader_study([file, file], tmp_path / "to" / "key.json")
    with pytest.raises(UserError, match="no key"):
        score_reader_study([file], file)
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(UserError, match="is not"):
        score_reader_study([tmp_path / "broken.json"], tmp_path / "to" / "key.json")
    assert replace(key) == key
