"""What the readers of a study said: IBA-CT's Fig. 3, with the tests that it lacks.

Left, how often each method of a pair was better, or neither; right, how often its maps got each localisation score.
Whether one wins by more than chance is asked by the exact binomial test, ties left out: over cases, where a case is won
by the method that more readers preferred, since several readers' answers to one case are no independent evidence; and
of each reader alone. How far readers agree is Fleiss' kappa (Psychol. Bulletin 76(5), 1971) over what all answered:

    kappa = (P - P_e) / (1 - P_e),   P = mean over cases of the agreeing pairs of readers,   P_e = sum_j p_j^2
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import binomtest

from ibxai.errors import UserError
from ibxai.reader_study import SCORES, Key, Question
from ibxai.report.render import render
from ibxai.store import write_atomically, write_rows

TIE = "tie"
_SIDES = ("left", "right")


@dataclass(frozen=True)
class Answer:
    """A reader's answer to a question, unblinded. preferred: a run's name, or TIE; scores: run's name -> 1 to 4."""

    reader: str
    question: str
    row: str
    group: str
    pair: tuple[str, str]
    preferred: str
    scores: Mapping[str, int]


@dataclass(frozen=True)
class Preference:
    """What one reader, or all (""), prefers of a pair. won, lost, ties: of answers.

    test_won, test_n: what the exact test is about, cases of all readers together and answers of one, ties left out;
    low, high: Clopper and Pearson's 95 % interval of the share.
    """

    pair: tuple[str, str]
    reader: str
    won: int
    ties: int
    lost: int
    test_won: int
    test_n: int
    p_value: float
    low: float
    high: float


@dataclass(frozen=True)
class Agreement:
    """about: what was answered; questions: those that all readers answered."""

    about: str
    questions: int
    kappa: float


def score_reader_study(files: Sequence[Path], key_file: Path) -> Path:
    """The page reader_study.html beside the key, and reader_study.csv with every answer, unblinded.

    Raises UserError for files that are no answers, of another study, or of one reader twice.
    """
    key = read_key(key_file)
    answers = [answer for file in files for answer in read_answers(file, key)]
    readers = sorted({answer.reader for answer in answers})
    if len(readers) < len(files):
        raise UserError(f"{len(files)} files of {len(readers)} readers with answers: one file a reader is expected.")
    pairs = list(combinations(key.runs, 2))
    context = {
        "study": key.study,
        "runs": dict(zip(key.runs, key.folders, strict=True)),
        "readers": readers,
        "cases": len({answer.row for answer in answers}),
        "groups": len({answer.group for answer in answers}),
        "questions": len(key.questions),
        "answers": len(answers),
        "preferences": [preference(answers, pair, reader) for pair in pairs for reader in ("", *readers)],
        "localisation": [localisation(answers, run) for run in key.runs],
        "agreements": agreements(answers, key, readers),
        "scores": SCORES,
    }
    page = key_file.parent / "reader_study.html"
    write_rows(page.with_suffix(".csv"), [_line(answer) for answer in answers])
    write_atomically(page, render("reader_score.html", context))
    return page


def read_key(path: Path) -> Key:
    """Raises UserError when it is none."""
    told = _json(path, "the key.json that `ibxai reader-study` has written")
    try:
        questions = {name: Question(**question) for name, question in told["questions"].items()}
        return Key(told["study"], told["seed"], tuple(told["runs"]), tuple(told["folders"]), questions)
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is no key of a reader study: give the key.json beside for-readers/.") from error


def read_answers(path: Path, key: Key) -> list[Answer]:
    """The complete answers of one reader. Raises UserError when the file is of another study, or edited beyond use."""
    told = _json(path, "a file of answers, as the page saves it")
    if not isinstance(told, dict) or told.get("study") != key.study:
        found = told.get("study") if isinstance(told, dict) else None
        raise UserError(f"{path} is of the study {found}, and the key of {key.study}.")
    try:
        reader = str(told["reader"])
        if not reader:
            raise ValueError("no reader's name")
        return [
            _unblinded(reader, name, key, answer)
            for name, answer in told["answers"].items()
            if None not in (answer["left"], answer["right"])
        ]
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError(f"{path} holds an answer that the page cannot give ({error}).") from error


def _unblinded(reader: str, name: str, key: Key, answer: Mapping[str, Any]) -> Answer:
    question = key.questions[name]
    places = {"left": question.left, "right": question.right}
    scores = {key.runs[places[side]]: answer[side] for side in _SIDES}
    if not all(score in SCORES for score in scores.values()):
        raise ValueError(f"{name}: scores {list(scores.values())}")
    preferred = TIE if answer["choice"] == TIE else key.runs[places[answer["choice"]]]
    first, second = (key.runs[run] for run in sorted(places.values()))
    return Answer(reader, name, question.row, question.group, (first, second), preferred, scores)


def _json(path: Path, what: str) -> Any:
    try:
        return json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}.") from error
    except ValueError as error:
        raise UserError(f"{path} is not {what}.") from error


def preference(answers: Sequence[Answer], pair: tuple[str, str], reader: str) -> Preference:
    """reader: "" for all of them, tested over cases by their majority."""
    own = [answer for answer in answers if answer.pair == pair and reader in ("", answer.reader)]
    count = Counter(answer.preferred for answer in own)
    votes: Counter[str] = Counter()
    for answer in own:
        votes[answer.row] += {pair[0]: 1, pair[1]: -1}.get(answer.preferred, 0)
    won, decided = sum(vote > 0 for vote in votes.values()), sum(vote != 0 for vote in votes.values())
    p_value = low = high = math.nan
    if decided:
        test = binomtest(won, decided)
        ends = test.proportion_ci()
        p_value, low, high = float(test.pvalue), float(ends.low), float(ends.high)
    return Preference(pair, reader, count[pair[0]], count[TIE], count[pair[1]], won, decided, p_value, low, high)


def localisation(answers: Sequence[Answer], run: str) -> dict[str, Any]:
    """How often the maps of a run got each score. With more than two runs a map is scored once a pair."""
    scores = [answer.scores[run] for answer in answers if run in answer.scores]
    return {
        "run": run,
        "counts": [scores.count(score) for score in SCORES],
        "mean": float(np.mean(scores)) if scores else math.nan,
    }


def agreements(answers: Sequence[Answer], key: Key, readers: Sequence[str]) -> list[Agreement]:
    """Of the preference (better, worse, tie), and of each run's scores."""
    of_question = {name: [a for a in answers if a.question == name] for name in key.questions}
    whole = [given for given in of_question.values() if len(given) == len(readers)]
    preferred = [[[a.pair[0], a.pair[1], TIE].index(a.preferred) for a in given] for given in whole]
    found = [Agreement("which is better", len(whole), fleiss_kappa(preferred, 3))]
    for run in key.runs:
        scored = [[a.scores[run] - 1 for a in given] for given in whole if run in given[0].scores]
        found.append(Agreement(f"score of {run}", len(scored), fleiss_kappa(scored, len(SCORES))))
    return found


def fleiss_kappa(ratings: Sequence[Sequence[int]], categories: int) -> float:
    """ratings: a list of the readers' categories, 0 to categories - 1, for every question, all of one length.

    1 is agreement on everything, 0 what chance gives; NaN with one reader, and where all answers are the same.
    """
    if not ratings or len(ratings[0]) < 2:
        return math.nan
    counts = np.array([np.bincount(given, minlength=categories) for given in ratings], dtype=float)
    readers = counts[0].sum()
    agreed = ((counts**2).sum(1) - readers) / (readers * (readers - 1))
    chance = float(((counts.sum(0) / counts.sum()) ** 2).sum())
    return float((agreed.mean() - chance) / (1 - chance)) if chance < 1 else math.nan


def _line(answer: Answer) -> dict[str, object]:
    """A line of reader_study.csv."""
    first, second = answer.pair
    return {
        "reader": answer.reader,
        "row": answer.row,
        "group": answer.group,
        "first": first,
        "second": second,
        "preferred": answer.preferred,
        "score_first": answer.scores[first],
        "score_second": answer.scores[second],
    }
