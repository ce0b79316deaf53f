"""Reader studies: experts compare the heatmaps of finished runs without knowing which method made them, and score them.

As in IBA-CT (Demir et al., "Information Bottleneck Attribution for Visual Explanations of Diagnosis and Prognosis",
MLMI 2021, sec. 5 and Fig. 3): of a pair of maps over the same picture in the same window, which locates better, or
neither; then how well each locates, from 1 (satisfactory) to 4 (not at all). What is known of it is known from the
store alone.

Cases are drawn by the seed: of every label alike, as the paper takes scans of every severity, and of another study or
patient each as long as there are any. With more than two runs, every pair is asked for. The seed also draws the order
and the sides; each run of a pair is on the left in half of its cases. Maps are shown by what speaks for the target, in
one colour scale from each map's own least to its largest value: two colours for two signs would tell the method.

    <to>/for-readers/reader-study-<id>.html   the page: one file, no network, no name of a method
    <to>/key.json                             which map is whose: it stays with who runs the study

The page keeps the answers in the browser until they are saved as a file, `answers-<reader>-<id>.json`.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from PIL import UnidentifiedImageError

from ibxai.datasets.splits import order
from ibxai.errors import UserError
from ibxai.report.cards import class_name
from ibxai.report.figures import overlay
from ibxai.report.render import image_uri, render
from ibxai.report.tables import method_name
from ibxai.store import DamagedFile, Row, RunStore, StoredHeatmap, digest, write_atomically

SCORES = {1: "satisfactory", 2: "partial", 3: "poor", 4: "none or unacceptable"}  # of the localisation, as in the paper


@dataclass(frozen=True)
class Question:
    """One pair of maps. left, right: places of the runs in the key."""

    row: str
    group: str
    left: int
    right: int


@dataclass(frozen=True)
class Key:
    """What unblinds a study. runs: their names; questions: number on the page -> question."""

    study: str
    seed: int
    runs: tuple[str, ...]
    folders: tuple[str, ...]
    questions: dict[str, Question]


@dataclass(frozen=True)
class Made:
    page: Path
    key: Path
    cases: int
    questions: int


def make_reader_study(folders: Sequence[Path], to: Path | None, cases: int, seed: int) -> Made:
    """The page and its key. to: a folder, None for one beside the runs' datasets, named by the study.

    Raises UserError when the runs do not show the same pictures, and when fewer than `cases` have been kept.
    """
    stores = [_opened(folder) for folder in folders]
    if len({store.path.resolve() for store in stores}) < max(len(stores), 2):
        raise UserError(f"{len(stores)} runs: two or more are expected, each once.")
    chosen = _chosen(stores, cases, seed)
    questions = _questions(chosen, len(stores), seed)
    named = [store.path.resolve().name for store in stores]
    study = digest([named, seed, [asdict(question) for question in questions.values()]])
    key = Key(study, seed, _names(stores), tuple(str(store.path) for store in stores), questions)
    to = stores[0].path.resolve().parents[3] / f"reader-study-{study}" if to is None else to
    page = to / "for-readers" / f"reader-study-{study}.html"
    shown = [_shown(number, question, stores) for number, question in questions.items()]
    context = {"study": study, "questions": shown, "scores": SCORES}
    write_atomically(to / "key.json", json.dumps(asdict(key), indent=1).encode())
    write_atomically(page, render("reader_study.html", context, "reader_study.js"))
    return Made(page, to / "key.json", len(chosen), len(questions))


def _opened(folder: Path) -> RunStore:
    store = RunStore(folder)
    if not (folder / "provenance.json").is_file():
        raise UserError(f"{folder} is no run: give folders like outputs/<dataset>/<backbone>/<method>/<identity>.")
    return store


def _names(stores: Sequence[RunStore]) -> tuple[str, ...]:
    """The methods; where one comes twice, with the run's id."""
    methods = [method_name(store) for store in stores]
    often = Counter(methods)
    return tuple(
        method if often[method] == 1 else f"{method} ({store.path.resolve().name})"
        for method, store in zip(methods, stores, strict=True)
    )


def _chosen(stores: Sequence[RunStore], cases: int, seed: int) -> list[Row]:
    """Rows that all runs have a map and a picture of, and in which they explain the same output."""
    rows = stores[0].rows()
    shared = set.intersection(*(store.finished(row.row_id for row in rows) for store in stores))
    drawn = sorted((row for row in rows if row.row_id in shared), key=lambda row: order(seed, row.row_id))
    usable = [row for row in drawn if _comparable(row.row_id, stores)]
    if cases < 1 or len(usable) < cases:
        raise UserError(
            f"--cases {cases}: of {len(usable)} rows all these runs have a map and a picture for the same output.\n"
            "A run keeps the pictures of its first rows: `ibxai run ... pictures=N` on a new outputs folder keeps more."
        )
    return _spread(_spread(usable, lambda row: row.label), lambda row: row.group_id)[:cases]


def _comparable(row_id: str, stores: Sequence[RunStore]) -> bool:
    """Whether it can be shown. Raises UserError when the runs saw another picture under this name."""
    try:
        pictures = [store.read_picture(row_id) for store in stores]
        targets = {store.read_heatmap(row_id).target for store in stores}
    except (DamagedFile, UnidentifiedImageError):
        return False  # the next run makes the file again
    if any(picture is None for picture in pictures):
        return False
    if any(not np.array_equal(picture, pictures[0]) for picture in pictures[1:]):  # type: ignore[arg-type]
        raise UserError(
            f"The runs do not show the same picture of {row_id}: they differ in the dataset, its window or the size.\n"
            "Readers would tell them apart: give runs on the same pictures."
        )
    return len(targets) == 1


def _spread(rows: Sequence[Row], kind: Callable[[Row], object]) -> list[Row]:
    """The first row of every kind, then the second of every kind, and so on; otherwise in their order."""
    often: Counter[object] = Counter()
    placed = []
    for row in rows:
        often[kind(row)] += 1
        placed.append((often[kind(row)], row))
    return [row for _, row in sorted(placed, key=lambda pair: pair[0])]


def _questions(rows: Sequence[Row], runs: int, seed: int) -> dict[str, Question]:
    asked = []
    for pair in combinations(range(runs), 2):
        mixed = sorted(rows, key=lambda row: order(seed, f"side {pair} {row.row_id}"))
        for number, row in enumerate(mixed):
            left, right = pair[:: 1 if number % 2 else -1]
            asked.append(Question(row.row_id, row.group_id, left, right))
    asked.sort(key=lambda question: order(seed, f"order {question}"))
    return {f"q{number}": question for number, question in enumerate(asked, start=1)}


def _shown(number: str, question: Question, stores: Sequence[RunStore]) -> dict[str, Any]:
    """What the page shows of a question: nothing that names a run."""
    picture = stores[0].read_picture(question.row)
    assert picture is not None  # looked at before
    maps = [stores[run].read_heatmap(question.row) for run in (question.left, question.right)]
    return {
        "id": number,
        "target": class_name(maps[0].target, stores[0].class_names()),
        "picture": image_uri(picture, "jpeg"),
        "left": _overlaid(picture, maps[0]),
        "right": _overlaid(picture, maps[1]),
    }


def _overlaid(picture: np.ndarray, stored: StoredHeatmap) -> str:
    return image_uri(overlay(picture, np.maximum(np.nan_to_num(stored.heatmap), 0)), "jpeg")
