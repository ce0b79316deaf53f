"""Tables, run pages and the leaderboard, from stores with known values; the pages also in a real browser."""

import base64
import io
import json
import os
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from ibxai.report import runs, write_leaderboard, write_report
from ibxai.report.board_figures import insertion_deletion_pairs
from ibxai.report.columns import Cell, Column, _widest
from ibxai.report.leaderboard import COMPARISONS_COLUMNS, Table, make_tables
from ibxai.report.tables import SUMMARY_COLUMNS, metrics_table, read_summary, summary_table
from ibxai.store import MetricKey, Row, RunStore, StoredHeatmap, safe_name

INSERTION = MetricKey("insertion", {"steps": 4, "higher_is_better": True})
DELETION = MetricKey("deletion", {"steps": 4, "higher_is_better": False})
TOLD = {
    "command": "ibxai run dataset=sample method=iba 'metric=[insertion]'",
    "method": "iba",
    "dataset": "sample",
    "backbone": "tiny",
    "weights": "trained",
    "finished": "2025-11-20T22:41:32+00:00",
}
NAMES = ["cat", "dog", "ship"]


def make_rows(samples: Sequence[str], groups: Sequence[str] | None = None) -> list[Row]:
    groups = groups or samples
    return [
        Row(f"{sample}@predicted", sample, "predicted", group, 0) for sample, group in zip(samples, groups, strict=True)
    ]


def make_run(
    outputs: Path,
    rows: Sequence[Row],
    told: Mapping[str, Any] = TOLD,
    names: list[str] | None = NAMES,
    run_id: str = "0123456789ab",
) -> RunStore:
    store = RunStore(outputs / "sample" / "tiny" / str(told.get("method", "iba")) / run_id)
    store.begin("seed: 0\n", told, names, rows)
    return store


def add_heatmaps(store: RunStore, rows: Sequence[Row], prediction: int = 0, unit: str = "bits") -> None:
    for number, row in enumerate(rows):
        heatmap = np.random.default_rng(number).random((48, 48)).astype(np.float32)
        store.write_heatmap(
            StoredHeatmap(row.row_id, heatmap, unit, 0, 0.25, prediction, 0.75, {"capacity": heatmap.sum()})
        )
        pixels = np.random.default_rng(number).integers(0, 256, (48, 48, 3), dtype=np.uint8)
        store.write_picture(row.row_id, pixels)


def add_scores(store: RunStore, metric: MetricKey, rows: Sequence[Row], auc: Sequence[float]) -> None:
    fraction = np.tile(np.linspace(0, 1, 5), (len(rows), 1))
    values = {"auc": np.array(auc), "fraction": fraction, "curve": fraction * np.nan_to_num(auc)[:, None]}
    store.write_scores(metric, [row.row_id for row in rows], values)


def finished_run(outputs: Path, samples: Sequence[str] = ("a", "b", "c"), **told: Any) -> RunStore:
    rows = make_rows(samples)
    store = make_run(outputs, rows, {**TOLD, **told})
    add_heatmaps(store, rows)
    add_scores(store, INSERTION, rows, np.linspace(0.5, 0.7, len(rows)).tolist())
    add_scores(store, DELETION, rows, np.linspace(0.1, 0.2, len(rows)).tolist())
    return store


class Page(HTMLParser):
    """What a page holds: its tags with attributes, and its visible text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.text = re.sub(r"\s+", " ", self.text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1][0] not in ("style", "script"):
            self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


# tables


def test_metrics_csv_is_long_in_dataset_order_with_undefined_values_kept(tmp_path: Path) -> None:
    rows = make_rows(["z", "a", "m"])
    store = make_run(tmp_path, rows)
    add_scores(store, INSERTION, [rows[2]], [0.25])  # batches come in any order
    add_scores(store, INSERTION, rows[:2], [0.5, np.nan])
    box = {"value": np.array([2.5, 1.5]), "hits": np.array([4, 3])}
    store.write_scores(MetricKey("box", {}), [rows[2].row_id, rows[0].row_id], box)
    write_report(store)
    assert (store.path / "metrics.csv").read_text() == (
        "sample,target,method,metric,value\n"
        "z,predicted,iba,box,1.5\n"
        "z,predicted,iba,box_hits,3.0\n"
        "z,predicted,iba,insertion,0.5\n"
        "a,predicted,iba,insertion,nan\n"
        "m,predicted,iba,box,2.5\n"
        "m,predicted,iba,box_hits,4.0\n"
        "m,predicted,iba,insertion,0.25\n"
    )
    pd.testing.assert_frame_equal(pd.read_csv(store.path / "metrics.csv"), metrics_table(store))


def test_summary_counts_rows_groups_and_undefined_values(tmp_path: Path) -> None:
    rows = make_rows(["a", "b", "c", "d", "e"], ["p", "p", "q", "q", "r"])
    store = make_run(tmp_path, rows)
    add_scores(store, INSERTION, rows, [0.1, 0.2, 0.6, 0.7, np.inf])
    add_scores(store, DELETION, rows[:2], [0.1, 0.2])
    table = summary_table(store).set_index("metric")
    assert list(table.index) == ["deletion", "insertion"]
    line = table.loc["insertion"]
    assert (line["mean"], line["n"], line["undefined"], line["groups"]) == (pytest.approx(0.4), 4, 1, 2)
    # two groups, so three means can come: 0.15, 0.4 and 0.65
    assert (line["low"], line["high"]) == (pytest.approx(0.15), pytest.approx(0.65))
    assert table.loc["deletion", ["low", "high"]].isna().all()
    assert (table.loc["deletion", "n"], table.loc["deletion", "groups"]) == (2, 1)
    assert table["better"].to_dict() == {"insertion": "higher", "deletion": "lower"}


def test_two_settings_of_one_metric_keep_two_names(tmp_path: Path) -> None:
    rows = make_rows(["a", "b"])
    store = make_run(tmp_path, rows)
    other = MetricKey("insertion", {"steps": 8, "higher_is_better": True})
    add_scores(store, INSERTION, rows, [0.1, 0.3])
    add_scores(store, other, rows, [0.5, 0.7])
    means = summary_table(store).set_index("metric")["mean"]
    assert means.to_dict() == {INSERTION.folder: pytest.approx(0.2), other.folder: pytest.approx(0.6)}
    text = Page(write_report(store)).text
    assert "steps = 4" in text
    assert "steps = 8" in text


def test_a_metrics_direction_is_about_its_main_value(tmp_path: Path) -> None:
    rows = make_rows(["a"])
    store = make_run(tmp_path, rows)
    settings = {"higher_is_better": True}
    store.write_scores(MetricKey("x", settings), [rows[0].row_id], {"auc": np.ones(1), "passes": np.ones(1)})
    store.write_scores(MetricKey("y", settings), [rows[0].row_id], {"iou": np.ones(1)})
    assert summary_table(store).set_index("metric")["better"].to_dict() == {
        "x": "higher",
        "x_passes": "",
        "y_iou": "higher",
    }


def test_scores_of_unknown_rows_and_damaged_files_are_left_out(tmp_path: Path) -> None:
    rows = make_rows(["a", "b"])
    store = make_run(tmp_path, rows)
    add_scores(store, INSERTION, [rows[0], *make_rows(["stranger"])], [0.5, 0.9])
    (store.path / "scores" / INSERTION.folder / "cut.npz").write_bytes(b"PK\x03\x04")
    assert metrics_table(store)["value"].tolist() == [0.5]


def test_summary_is_read_back_as_written_and_not_when_a_score_is_newer(tmp_path: Path) -> None:
    told = {**TOLD, "method": "NA"}
    rows = make_rows(["a", "b", "c"])
    store = make_run(tmp_path, rows, told)
    add_scores(store, INSERTION, rows, [1 / 3, 0.1, np.nan])
    write_report(store)
    later = (store.path / "summary.csv").stat().st_mtime + 10
    os.utime(store.path / "summary.csv", (later, later))
    read = read_summary(store)
    assert read is not None
    pd.testing.assert_frame_equal(read, summary_table(store), check_dtype=False)
    add_scores(store, DELETION, rows, [0, 0, 0])
    score = next((store.path / "scores" / DELETION.folder).glob("*.npz"))
    os.utime(score, (later + 10, later + 10))
    assert read_summary(store) is None


# a run's page


def test_page_says_what_was_run_and_what_came_of_it(tmp_path: Path) -> None:
    store = finished_run(tmp_path, reference="104 crops, drawn with seed 0", notes=["Statistics are pooled."])
    store.write_skipped({"broken.png": "cut short"})
    page = Page(write_report(store))
    for said in (
        "sample · tiny · iba", "3 rows", "insertion AUC 0.600", "deletion AUC 0.150", "↓ lower is better", "broken.png",
        "cut short", "Statistics are pooled.", "104 crops", TOLD["command"], "seed: 0", "bits/pixel", "capacity",
        "fewer than 20 groups",
    ):  # fmt: skip
        assert said in page.text, said
    assert page.text.count("The network predicts something else") == 0
    assert len(page.all("article")) == 3
    assert len([i for i in page.all("img") if i.get("src")]) == 3 * (3 + 4)  # picture, overlay, map; top 6 and 12 %
    assert all(i.get("alt") for i in page.all("img") if i.get("src"))
    assert "Random weights" not in page.text
    assert "Not finished" not in page.text


def test_page_says_when_another_class_is_predicted_and_when_the_label_differs(tmp_path: Path) -> None:
    rows = make_rows(["a"])
    store = make_run(tmp_path, rows)
    add_heatmaps(store, rows, prediction=2)
    text = Page(write_report(store)).text
    assert "Evidence for cat (25.0" in text
    assert "The network predicts something else: ship (75.0" in text
    assert "The dataset's label is cat: the prediction is wrong." in text


def test_page_warns_of_random_weights_unfinished_runs_and_rows_without_scores(tmp_path: Path) -> None:
    rows = make_rows(["a", "b", "c"])
    store = make_run(tmp_path, rows, {**TOLD, "weights": "random weights", "finished": None})
    add_heatmaps(store, rows[:2])
    add_scores(store, INSERTION, rows[:1], [0.5])
    text = Page(write_report(store)).text
    assert "Random weights." in text
    assert "Not finished. 2 of 3 heatmaps are there." in text
    assert "insertion: 1 of 2 rows" in text
    assert "no interval: one group" in text


def test_page_of_a_part_of_a_dataset_says_so(tmp_path: Path) -> None:
    rows = make_rows(["a", "b", "c"])
    store = make_run(tmp_path, rows)
    add_heatmaps(store, rows[:1])
    assert "1 of 3 rows have a heatmap" in Page(write_report(store)).text


@pytest.mark.parametrize("told", [{}, {"notes": None, "passes": None, "versions": None, "seconds": None}])
def test_page_of_a_run_with_nothing_in_it(tmp_path: Path, told: dict[str, Any]) -> None:
    store = make_run(tmp_path, make_rows(["a", "b"]), told, names=None)
    text = Page(write_report(store)).text
    assert "No row has been scored yet." in text
    assert "No row with a picture or a text has been computed yet." in text
    assert "sample · tiny · iba" in text  # from the folder
    assert (store.path / "metrics.csv").read_text() == "sample,target,method,metric,value\n"
    assert (store.path / "summary.csv").read_text() == ",".join(SUMMARY_COLUMNS) + "\n"


def test_scores_without_curves_and_damaged_rows_do_not_stop_the_page(tmp_path: Path) -> None:
    rows = make_rows(["a", "b", "c"])
    store = make_run(tmp_path, rows, names=None)
    add_heatmaps(store, rows, unit="score")
    (store.path / "heatmaps" / f"{safe_name(rows[0].row_id)}.npz").write_bytes(b"cut")
    (store.path / "pictures" / f"{safe_name(rows[1].row_id)}.png").write_bytes(b"cut")
    store.write_scores(MetricKey("box", {}), [rows[2].row_id], {"value": np.array([np.nan])})
    page = Page(write_report(store))
    assert [a["aria-labelledby"] for a in page.all("article")] == ["card-1"]
    assert "class 0" in page.text
    assert "1 undefined" in page.text


@pytest.mark.parametrize(("groups", "banded"), [(["p", "p", "p"], False), (["p", "p", "q"], True)])
def test_mean_curves_have_a_band_where_there_is_more_than_one_group(
    tmp_path: Path, groups: list[str], banded: bool
) -> None:
    rows = make_rows(["a", "b", "c"], groups)
    store = make_run(tmp_path, rows)
    add_scores(store, INSERTION, rows, [0.2, 0.3, 0.9])
    page = Page(write_report(store))
    assert bool(page.all("polygon")) == banded
    assert ("The bands are" in page.text) == banded


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    evil = ["<script>alert(1)</script>", '"><img src=x onerror=alert(2)>', "{{ 7 * 7 }}", "../../etc", "a" * 300]
    rows = make_rows(evil)
    told = dict.fromkeys(("method", "dataset", "backbone", "weights", "command", "device", "reference"), evil[0])
    store = RunStore(tmp_path / "d" / "b" / "m" / "x")
    told |= {"notes": evil, "versions": {evil[0]: evil[1]}, "passes": {evil[1]: evil[0]}, "identity": {"a": evil[0]}}
    store.begin(f"name: {evil[0]}", told, evil, rows)
    add_heatmaps(store, rows, prediction=1)
    add_scores(store, INSERTION, rows, [0.5] * len(rows))
    store.write_scores(MetricKey("box", {}), [rows[0].row_id], {evil[1]: np.ones(1)})
    store.write_skipped(dict.fromkeys(evil, evil[1]))
    for page in (Page(write_report(store)), Page(write_leaderboard(tmp_path))):
        assert len(page.all("script")) == 1
        assert not [a for _, attributes in page.tags for a in attributes if a.startswith("on")]
        assert "alert(1)" not in re.sub(r"&lt;script&gt;alert\(1\)", "", page.source)
        assert "{{ 7 * 7 }}" in page.source or "Leaderboard" in page.source
    written = list((store.path / "overlays").iterdir())
    assert len(written) == len(evil)
    assert all(path.suffix == ".png" for path in written)


def assert_self_contained(page: Page) -> None:
    assert not page.all("link") + page.all("iframe") + page.all("base")
    assert not [a for a in page.all("script") if "src" in a]
    for _, attributes in page.tags:
        assert (attributes.get("src") or "data:").startswith("data:")
        assert not re.match(r"[a-z]+:|/", attributes.get("href") or "")
    style = page.source.split("<style>")[1].split("</style>")[0]
    assert "url(" not in style
    assert "@import" not in style


def test_pages_load_nothing_from_elsewhere_and_say_so_to_the_browser(tmp_path: Path) -> None:
    store = finished_run(tmp_path)
    for page in (Page(write_report(store)), Page(write_leaderboard(tmp_path))):
        assert_self_contained(page)
        [policy] = [a["content"] for a in page.all("meta") if a.get("http-equiv")]
        assert policy is not None
        assert policy.startswith("default-src 'none'; img-src data:;")


def test_overlays_have_full_size_and_large_pages_stay_small(tmp_path: Path) -> None:
    rows = make_rows([f"s{i}" for i in range(20)])
    store = make_run(tmp_path, rows)
    y, x = np.mgrid[0:512, 0:512] / 512
    for number, row in enumerate(rows):
        heatmap = np.exp(-((x - 0.5) ** 2 + (y - number / 20) ** 2) * 8).astype(np.float32)
        pixels = np.stack([255 * x, 255 * y, 128 + 100 * np.sin(40 * x * y)], axis=2).astype(np.uint8)
        store.write_heatmap(StoredHeatmap(row.row_id, heatmap, "bits", 0, 0.5, 0, 0.5))
        store.write_picture(row.row_id, pixels)
    page = Page(write_report(store))
    assert len(page.source) < 5_000_000
    for attributes in page.all("img")[:3]:
        content = base64.b64decode(str(attributes["src"]).split(",")[1])
        assert Image.open(io.BytesIO(content)).size == (384, 384)
    with Image.open(store.path / "overlays" / f"{safe_name(rows[3].row_id)}.png") as written:
        assert written.size == (512, 512)


def test_only_shown_rows_have_their_heatmaps_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = make_rows([f"s{i}" for i in range(60)])
    store = make_run(tmp_path, rows)
    add_heatmaps(store, rows[:30])
    for row in rows[30:]:
        store.write_heatmap(StoredHeatmap(row.row_id, np.zeros((4, 4), np.float32), "bits", 0, 0.5, 0, 0.5))
    add_scores(store, INSERTION, rows, [0.5] * 60)
    read: list[str] = []
    original = RunStore.read_heatmap

    def counted(self: RunStore, row_id: str) -> StoredHeatmap:
        read.append(row_id)
        return original(self, row_id)

    monkeypatch.setattr(RunStore, "read_heatmap", counted)
    page = Page(write_report(store))
    assert read == [row.row_id for row in rows[:24]]
    assert "The first 24 rows of 60" in page.text


# the leaderboard


def scored_run(
    outputs: Path, method: str, auc: Sequence[float], samples: Sequence[str] | None = None, **told: Any
) -> RunStore:
    rows = make_rows(samples or [f"s{i}" for i in range(len(auc))])
    store = make_run(outputs, rows, {**TOLD, "method": method, **told}, run_id=f"{method}-1")
    add_scores(store, INSERTION, rows, auc)
    add_scores(store, DELETION, rows, auc)
    return store


def spread(mean: float, by: float, n: int = 30) -> list[float]:
    return (mean + by * np.linspace(-1, 1, n)).tolist()


def read_tables(outputs: Path) -> list[Table]:
    return make_tables([run for run in runs.read_runs(outputs) if isinstance(run, runs.Run)])


def read_column(outputs: Path, metric: str) -> tuple[Table, Column]:
    [table] = read_tables(outputs)
    [column] = [column for column in table.columns if column.name == metric]
    return table, column


def read_marks(outputs: Path, metric: str) -> dict[str, str]:
    table, column = read_column(outputs, metric)
    return {
        name: (cell.mark if cell.compared else "not compared") if cell else "absent"
        for name, cell in zip(table.names, column.cells, strict=True)
    }


def test_a_clear_winner_is_best_and_the_direction_is_the_metrics(tmp_path: Path) -> None:
    scored_run(tmp_path, "a", spread(0.7, 0.1))
    scored_run(tmp_path, "b", spread(0.4, 0.1))
    assert read_marks(tmp_path, "insertion") == {"a": "best", "b": ""}
    assert read_marks(tmp_path, "deletion") == {"a": "", "b": "best"}


def test_a_small_but_steady_difference_is_found_and_a_large_but_unsteady_one_is_a_tie(tmp_path: Path) -> None:
    wide = spread(0.7, 0.2)
    scored_run(tmp_path, "steady", wide)
    scored_run(tmp_path, "just-below", [value - 0.01 for value in wide])  # the intervals of the means overlap
    scored_run(tmp_path, "unsteady", [value - 0.01 + (-1) ** i * 0.01 * i for i, value in enumerate(wide)])
    scored_run(tmp_path, "low", [value - 0.4 for value in wide])
    assert read_marks(tmp_path, "insertion") == {"just-below": "", "low": "", "steady": "tie", "unsteady": "tie"}
    assert read_marks(tmp_path, "deletion") == {"just-below": "", "low": "best", "steady": "", "unsteady": ""}
    page = Page(write_leaderboard(tmp_path))
    marks = [str(a["class"]) for a in page.all("span") if str(a.get("class")).startswith("mark ")]
    assert sorted(marks) == ["mark best"] * 2 + ["mark tie"] * 3  # one of each is the legend's
    assert "tied: steady, unsteady" in page.text
    assert "<b>0.7" not in page.source  # the largest number is not printed larger


def test_too_few_pictures_to_tell_methods_apart_mark_nothing_and_say_so(tmp_path: Path) -> None:
    for place, method in enumerate("abcd"):
        scored_run(tmp_path, method, spread(0.9 - 0.2 * place, 0.05, 5))
    assert set(read_marks(tmp_path, "insertion").values()) == {""}  # 6 pairs x 2 / 2^5 is more than 5 %
    text = Page(write_leaderboard(tmp_path)).text
    assert "Too few groups to tell 4 methods apart." in text
    assert "too few groups to show a difference" in text


def test_nothing_is_marked_without_a_direction_or_with_one_method(tmp_path: Path) -> None:
    store = scored_run(tmp_path, "a", spread(0.7, 0.1))
    assert read_marks(tmp_path, "insertion") == {"a": ""}
    other = scored_run(tmp_path, "b", spread(0.2, 0.1))
    for run in (store, other):
        run.write_scores(MetricKey("plain", {}), ["s0@predicted", "s1@predicted"], {"value": np.array([0.1, 0.2])})
    assert read_marks(tmp_path, "plain") == {"a": "", "b": ""}


def test_other_rows_unfinished_runs_and_other_settings_are_shown_and_not_compared(tmp_path: Path) -> None:
    scored_run(tmp_path, "a", spread(0.5, 0.1))
    scored_run(tmp_path, "b", spread(0.4, 0.1))
    scored_run(tmp_path, "few", spread(0.9, 0.1, 5))
    scored_run(tmp_path, "others", spread(0.9, 0.1, 30), samples=["s0", *(f"t{i}" for i in range(29))])
    scored_run(tmp_path, "going", spread(0.9, 0.1), finished=None)
    told = read_marks(tmp_path, "insertion")
    # two sets of 30 rows: the one that more finished runs share is compared
    assert told == {"a": "best", "b": "", **dict.fromkeys(("few", "others", "going"), "not compared")}
    text = Page(write_leaderboard(tmp_path)).text
    assert "Not all runs are compared." in text
    assert "Not compared: few, going, others." in text
    assert "n = 5 rows" in text
    assert "not finished" in text
    assert set(pd.read_csv(tmp_path / "comparisons.csv")["a"]) == {"a"}


def test_runs_on_other_parts_of_the_rows_are_compared_on_what_they_share(tmp_path: Path) -> None:
    rows = [f"s{i}" for i in range(30)]
    scored_run(tmp_path, "a", spread(0.5, 0.1), rows)
    scored_run(tmp_path, "b", spread(0.4, 0.1, 20), rows[:20])
    scored_run(tmp_path, "c", [np.nan, *spread(0.3, 0.1, 29)], rows)
    write_leaderboard(tmp_path)
    table = pd.read_csv(tmp_path / "comparisons.csv").query("metric == 'insertion'").set_index(["a", "b"])
    assert table[["n", "left_out", "groups"]].T.to_dict("list") == {
        ("a", "b"): [20, 10, 20], ("a", "c"): [29, 1, 29], ("b", "c"): [19, 11, 19]
    }  # fmt: skip
    assert table.loc[("a", "b"), "difference"] == pytest.approx(np.mean(spread(0.5, 0.1)[:20]) - 0.4)
    text = Page(write_leaderboard(tmp_path)).text
    assert "Not all runs have values for the same rows." in text
    assert "n = 19 rows in 19 groups, where all 3 methods have a value (11 rows left out)" in text
    assert "n = 29 rows, 1 undefined" in text


@pytest.mark.parametrize("rows", ["xxy", "yyx"])
def test_of_equally_large_sets_of_rows_the_most_shared_is_compared(rows: str) -> None:
    cells = [Cell(0.5, 0.4, 0.6, n=30, undefined=0, groups=30, rows=name) for name in rows]
    assert _widest(cells) == rows[0]
    larger = Cell(0.5, 0.4, 0.6, n=29, undefined=2, groups=29, rows="larger")
    assert _widest([*cells, larger]) == "larger"


def test_settings_and_weights_are_never_mixed(tmp_path: Path) -> None:
    scored_run(tmp_path, "a", spread(0.5, 0.1))
    rows = make_rows([f"s{i}" for i in range(30)])
    other = make_run(tmp_path, rows, {**TOLD, "method": "b"})
    add_scores(other, MetricKey("insertion", {"steps": 9, "higher_is_better": True}), rows, spread(0.4, 0.1))
    scored_run(tmp_path, "c", spread(0.1, 0.1), weights="random weights")
    page = Page(write_leaderboard(tmp_path))
    assert len([a for a in page.all("table") if a.get("class") == "board"]) == 2
    assert "steps = 4" in page.text
    assert "steps = 9" in page.text
    assert "Random weights." in page.text
    assert "mark best" not in page.source.split("<section")[1]


def test_runs_that_differ_in_more_than_the_method_say_in_what(tmp_path: Path) -> None:
    scored_run(tmp_path, "a", spread(0.5, 0.1), identity={"method": {"name": "a"}, "seed": 0, "target": "label"})
    scored_run(tmp_path, "b", spread(0.4, 0.1), identity={"method": {"name": "b"}, "seed": 1, "target": "label"})
    assert "These runs differ in more than the method: seed." in Page(write_leaderboard(tmp_path)).text


def test_runs_without_a_common_row_are_tables_of_their_own(tmp_path: Path) -> None:
    """Also when a third run joins two of them; each set is judged by itself."""
    for method, mean, rows in (
        ("a", 0.7, range(30)), ("b", 0.4, range(30)), ("a2", 0.3, range(30, 60)), ("b2", 0.6, range(30, 60)),
    ):  # fmt: skip
        scored_run(tmp_path, method, spread(mean, 0.1), [f"picture-{i}" for i in rows])
    tables = read_tables(tmp_path)
    assert [(table.names, table.rows) for table in tables] == [(["a", "b"], 30), (["a2", "b2"], 30)]
    marks = [[cell.mark for cell in column.cells if cell] for table in tables for column in table.columns]
    assert marks.count(["best", ""]) == marks.count(["", "best"]) == 2
    scored_run(tmp_path, "joining", spread(0.5, 0.1), [f"picture-{i}" for i in range(15, 45)])
    [table] = read_tables(tmp_path)
    assert (sorted(table.names), table.rows) == (["a", "a2", "b", "b2", "joining"], 60)


def test_leaderboard_csv_and_links(tmp_path: Path) -> None:
    store = scored_run(tmp_path, "a b", [0.25, 0.25, 0.25, np.nan])
    store.write_skipped({"x": "y"})
    write_report(store)
    page = Page(write_leaderboard(tmp_path))
    table = pd.read_csv(tmp_path / "leaderboard.csv")
    line = table[table["metric"] == "insertion"].iloc[0].to_dict()
    assert {
        "dataset": "sample", "backbone": "tiny", "method": "a b", "run": "a b-1", "mean": 0.25, "low": 0.25,
        "high": 0.25, "n": 3, "undefined": 1, "skipped": 1, "finished": True, "better": "higher",
    }.items() <= line.items()  # fmt: skip
    assert [a["href"] for a in page.all("a")] == ["sample/tiny/a%20b/a%20b-1/report.html"]
    assert (tmp_path / "sample/tiny/a b/a b-1/report.html").exists()


def test_damaged_runs_are_listed_and_do_not_stop_the_others(tmp_path: Path) -> None:
    scored_run(tmp_path, "good", spread(0.5, 0.1))
    for method, name, content in (
        ("torn", "provenance.json", "{"),
        ("listed", "provenance.json", "[1]"),
        ("rowless", "samples.csv", "nothing\n1\n"),
    ):
        (scored_run(tmp_path, method, spread(0.5, 0.1)).path / name).write_text(content)
    settings = scored_run(tmp_path, "unset", spread(0.5, 0.1)).path / "scores" / INSERTION.folder / "settings.json"
    settings.write_text("")
    text = Page(write_leaderboard(tmp_path)).text
    assert "1 run in 1 table" in text
    for method in ("torn", "listed", "rowless", "unset"):
        assert re.search(f"sample/tiny/{method}/{method}-1 ?Cannot be read", text), method


def test_leaderboard_of_an_empty_folder(tmp_path: Path) -> None:
    assert "No run has scores yet." in Page(write_leaderboard(tmp_path)).text
    assert (tmp_path / "leaderboard.csv").read_text().startswith("dataset,backbone,method,run,metric,mean,low,high,n,")


def test_a_fresh_summary_is_used_and_a_stale_one_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = scored_run(tmp_path, "a", spread(0.5, 0.1))
    write_leaderboard(tmp_path)
    later = (store.path / "summary.csv").stat().st_mtime + 10
    os.utime(store.path / "summary.csv", (later, later))
    before = (tmp_path / "report.html").read_bytes()
    monkeypatch.setattr(runs, "read_run_scores", lambda store: pytest.fail("scores were read again"))
    write_leaderboard(tmp_path)
    assert (tmp_path / "report.html").read_bytes() == before
    monkeypatch.undo()
    (store.path / "summary.csv").write_text("another,table\n1,2\n")
    write_leaderboard(tmp_path)
    assert pd.read_csv(tmp_path / "leaderboard.csv")["mean"].tolist() == pytest.approx([0.5, 0.5])


# the leaderboard's statistics and figures


def noisy_runs(outputs: Path, methods: Sequence[str], n: int = 30, **told: Any) -> None:
    generator = np.random.default_rng(0)
    picture = generator.normal(0.5, 0.1, n)
    for place, method in enumerate(methods):
        scored_run(outputs, method, (picture - 0.04 * place + generator.normal(0, 0.02, n)).tolist(), **told)


def figure_titles(page: Page) -> list[str]:
    return re.findall(r'class="figure-title">([^<]*)<', page.source)


def test_comparisons_csv_holds_every_pair_of_every_metric(tmp_path: Path) -> None:
    noisy_runs(tmp_path, "abcd")
    write_leaderboard(tmp_path)
    table = pd.read_csv(tmp_path / "comparisons.csv")
    assert list(table.columns) == COMPARISONS_COLUMNS
    assert table.groupby("metric").size().to_dict() == {"deletion": 6, "insertion": 6}
    line = table[table.metric == "insertion"].iloc[0]
    a, b = (read_column(tmp_path, "insertion")[0].runs[place].values["insertion"] for place in (0, 1))
    differences = np.array([a[row] - b[row] for row in a])
    assert (line["a"], line["b"], line["run_a"], line["run_b"]) == ("a", "b", "a-1", "b-1")
    assert (line["dataset"], line["backbone"], line["target"], line["better"]) == (
        "sample", "tiny", "predicted", "higher"
    )  # fmt: skip
    assert line["difference"] == pytest.approx(differences.mean())
    assert line["low"] < differences.mean() < line["high"]
    assert (line["n"], line["groups"], line["zeros"], line["left_out"]) == (30, 30, 0, 0)
    assert line["effect_size"] > 0.9
    assert line["p"] < line["p_holm"] < 0.05


def test_average_ranks_and_marks_stand_in_the_page_and_the_table(tmp_path: Path) -> None:
    for place, method in enumerate("abc"):
        scored_run(tmp_path, method, spread(0.7 - 0.1 * place, 0.05))  # a wins on every picture, c loses
    text = Page(write_leaderboard(tmp_path)).text
    table = pd.read_csv(tmp_path / "leaderboard.csv", keep_default_na=False).set_index(["metric", "method"])
    assert table.loc["insertion", "rank"].to_dict() == {"a": 1, "b": 2, "c": 3}
    assert table.loc["deletion", "rank"].to_dict() == {"a": 3, "b": 2, "c": 1}
    assert table.loc["insertion", "mark"].to_dict() == {"a": "best", "b": "", "c": ""}
    assert set(table["blocks"]) == {30}
    assert "insertion: average ranks over 30 groups" in text
    assert "χ²(2) = 60" in text  # N (k - 1), the largest there is
    assert "3 of 3 pairs differ" in text


def test_with_two_methods_there_are_pairs_and_no_ranks(tmp_path: Path) -> None:
    noisy_runs(tmp_path, "ab")
    page = Page(write_leaderboard(tmp_path))
    assert not [title for title in figure_titles(page) if "average ranks" in title]
    assert "1 of 1 pair differ" in page.text
    assert set(pd.read_csv(tmp_path / "leaderboard.csv")["blocks"]) == {0}


def test_pairs_on_the_page_are_coloured_by_the_metrics_direction(tmp_path: Path) -> None:
    scored_run(tmp_path, "a", spread(0.7, 0.1))
    scored_run(tmp_path, "b", spread(0.5, 0.1))
    page = Page(write_leaderboard(tmp_path))
    deletion, insertion = page.source.split('class="matrix"')[1:]
    assert 'class="better" title="b minus a: \N{MINUS SIGN}0.200' in deletion
    assert 'class="better" title="a minus b: 0.200' in insertion


def test_other_targets_are_other_tables(tmp_path: Path) -> None:
    noisy_runs(tmp_path, "ab")
    rows = [Row(f"s{i}@{c}", f"s{i}", str(c), f"s{i}", None) for i in range(30) for c in (281, 285)]
    store = make_run(tmp_path, rows, {**TOLD, "method": "c"}, run_id="c-1")
    add_scores(store, INSERTION, rows, np.linspace(0.1, 0.9, 60).tolist())
    tables = read_tables(tmp_path)
    assert [(table.target, table.names) for table in tables] == [("281, 285", ["c"]), ("predicted", ["a", "b"])]
    assert "target: 281, 285" in Page(write_leaderboard(tmp_path)).text


def test_runs_of_one_method_are_called_by_what_sets_them_apart(tmp_path: Path) -> None:
    def begin(run_id: str, method: Mapping[str, Any], seed: int) -> None:
        told = {**TOLD, "method": "iba", "identity": {"method": method, "seed": seed}}
        store = make_run(tmp_path, make_rows(["x", "y"]), told, run_id=run_id)
        add_scores(store, INSERTION, make_rows(["x", "y"]), [0.1, 0.2])

    begin("1", {"beta": 5, "steps": 10}, 0)
    begin("2", {"beta": 10, "steps": 10}, 0)
    begin("3", {"beta": 10, "steps": 10, "a_setting": "with a value that is too long for any label"}, 0)
    begin("4", {"beta": 10, "steps": 10, "a_very_long_name_of_a_setting": "and a value"}, 0)
    scored_run(tmp_path, "random", [0.1, 0.2], ["x", "y"])
    [table] = read_tables(tmp_path)
    assert table.names == ["iba (beta = 5)", "iba (beta = 10)", "iba (3)", "iba (10, and a value)", "random"]


def test_insertion_is_paired_with_the_deletion_of_its_name_and_settings(tmp_path: Path) -> None:
    keys = [
        MetricKey(name, {"step": step, "higher_is_better": name.startswith("insertion")})
        for name in ("insertion", "deletion", "insertion_chexplain", "deletion_chexplain")
        for step in ((1, 2) if "_" not in name else (7,))
    ]
    keys += [MetricKey("insertion_alone", {"higher_is_better": True}), MetricKey("ehr", {"higher_is_better": True})]
    for method in "ab":
        rows = make_rows([f"s{i}" for i in range(9)])
        store = make_run(tmp_path, rows, {**TOLD, "method": method}, run_id=method)
        for key in keys:
            add_scores(store, key, rows, spread(0.5, 0.1, 9))
    [table] = read_tables(tmp_path)
    pairs = insertion_deletion_pairs(table.columns)
    told = [(i.key.name, i.key.settings["step"], d.key.name, d.key.settings["step"]) for i, d in pairs]
    assert sorted(told) == [
        ("insertion", 1, "deletion", 1), ("insertion", 2, "deletion", 2),
        ("insertion_chexplain", 7, "deletion_chexplain", 7),
    ]  # fmt: skip
    page = Page(write_leaderboard(tmp_path))
    assert len([a for a in page.all("svg") if a.get("class") == "chart points"]) == 3
    assert "↖ better" in page.text


def test_a_few_methods_share_a_chart_and_many_have_a_panel_each(tmp_path: Path) -> None:
    for count, panels in ((1, 0), (4, 0), (5, 5)):
        outputs = tmp_path / str(count)
        noisy_runs(outputs, "abcde"[:count])
        source = write_leaderboard(outputs).read_text()
        assert source.count('class="panel-name"') == 2 * panels  # of insertion and deletion
        assert (": mean curves" in source) == (count > 1)
        assert source.count('class="line line-context"') == 2 * panels * (count - 1)
    names = re.findall(r'class="panel-name">([^<]*)<', source)
    assert names == [*"edcba", *"abcde"]  # best first: deletion, then insertion


def test_curves_csv_holds_the_mean_curves_point_by_point(tmp_path: Path) -> None:
    rows = make_rows(["a", "b", "c"])
    store = make_run(tmp_path, rows)
    key = MetricKey("sensitivity_n", {"higher_is_better": True})
    curve = np.array([[0.1, 0.2, 0.3], [0.3, np.nan, 0.5], [np.nan, np.nan, np.nan]])
    fraction = np.tile([1e-4, 1e-2, 0.5], (3, 1))
    store.write_scores(
        key, [r.row_id for r in rows], {"value": np.array([0.2, 0.4, np.nan]), "curve": curve, "fraction": fraction}
    )
    text = Page(write_report(store)).text
    table = pd.read_csv(store.path / "curves.csv")
    assert table["fraction"].tolist() == pytest.approx([1e-4, 1e-2, 0.5])
    assert table["mean"].tolist() == pytest.approx([0.2, 0.2, 0.4])
    assert table["n"].tolist() == [2, 1, 2]
    assert np.isnan(table["low"][1])
    assert "Mean over n = 1 to 2 rows, up to 2 more undefined." in text
    assert "10⁻⁴" in text
    assert "n, as a fraction of the pixels" in text
    assert summary_table(store)["curves"].tolist() == [2]


def test_charts_say_what_their_axes_mean(tmp_path: Path) -> None:
    rows = make_rows(["a", "b"])
    store = make_run(tmp_path, rows)
    of_a_regression = {"score": "value", "change": True, "higher_is_better": True}
    add_scores(store, MetricKey("deletion_regression", of_a_regression), rows, [0.4, 0.5])
    add_scores(store, MetricKey("insertion", {"score": "probability", "higher_is_better": True}), rows, [0.4, 0.5])
    add_scores(store, MetricKey("iou_best", {"higher_is_better": True}), rows, [0.4, 0.5])
    text = Page(write_report(store)).text
    for said in (
        "fraction of pixels deleted", "change of the value of the target", "fraction of pixels inserted",
        "probability of the target", "Insertion should rise early", "whatever its direction",
        "threshold, as a fraction of the maximum",
    ):  # fmt: skip
        assert said in text, said
    assert "Deletion should fall early" not in text  # of a change, that would be wrong


def test_without_curves_there_is_no_file_of_them(tmp_path: Path) -> None:
    store = finished_run(tmp_path)
    write_report(store)
    assert (store.path / "curves.csv").exists()
    shutil.rmtree(store.path / "scores")
    store.write_scores(MetricKey("box", {}), ["a@predicted"], {"value": np.ones(1)})
    write_report(store)
    assert not (store.path / "curves.csv").exists()


def test_curves_without_a_defined_value_do_not_make_tables_stale(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = make_rows(["a", "b"])
    store = make_run(tmp_path, rows)
    nothing = np.full((2, 3), np.nan)
    values = {"auc": nothing[:, 0], "curve": nothing, "fraction": np.tile([0, 0.5, 1], (2, 1))}
    store.write_scores(INSERTION, [row.row_id for row in rows], values)
    write_report(store)
    later = (store.path / "summary.csv").stat().st_mtime + 10
    os.utime(store.path / "summary.csv", (later, later))
    monkeypatch.setattr(runs, "read_run_scores", lambda store: pytest.fail("scores were read again"))
    assert "2 undefined" in Page(write_leaderboard(tmp_path)).text


@pytest.mark.parametrize("name", ["curves.csv", "metrics.csv"])
def test_tables_that_are_missing_or_of_other_rows_are_made_again(tmp_path: Path, name: str) -> None:
    store = finished_run(tmp_path)
    write_leaderboard(tmp_path)
    later = (store.path / "summary.csv").stat().st_mtime + 10
    before = (store.path / name).read_bytes()
    for content in (None, before.replace(b"a,predicted", b"stranger,predicted") if name == "metrics.csv" else b"x\n"):
        os.utime(store.path / "summary.csv", (later, later))
        (store.path / name).unlink()
        if content is not None:
            (store.path / name).write_bytes(content)
        write_leaderboard(tmp_path)
        assert (store.path / name).read_bytes() == before


def test_top_pixels_are_shown_on_the_page_and_not_where_a_map_gives_no_order(tmp_path: Path) -> None:
    rows = make_rows(["a", "b"])
    store = make_run(tmp_path, rows)
    add_heatmaps(store, rows)
    flat = np.full((48, 48), 0.5, dtype=np.float32)
    store.write_heatmap(StoredHeatmap(rows[1].row_id, flat, "bits", 0, 0.25, 0, 0.75))
    page = Page(write_report(store))
    assert [a["alt"] for a in page.all("img") if "hottest" in str(a.get("alt"))] == [
        "a, only the hottest 6 % of its pixels sharp", "a without the hottest 6 % of its pixels",
        "a, only the hottest 12 % of its pixels sharp", "a without the hottest 12 % of its pixels",
    ]  # fmt: skip
    assert "no network has scored these pictures" in page.text


# in a browser

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed: no page is looked at")


def browse(profile: Path, page: Path, *options: str) -> subprocess.CompletedProcess[str]:
    assert CHROMIUM is not None
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars",
        f"--user-data-dir={profile}", "--enable-logging=stderr", "--virtual-time-budget=3000", *options, page.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    # the browser's own pages speak too: of a slow network, where the machine is slow
    complaints = [line for line in done.stderr.splitlines() if "CONSOLE" in line and "source: chrome://" not in line]
    assert not complaints, complaints
    return done


@needs_chromium
def test_a_browser_shows_the_page_without_a_complaint(tmp_path: Path) -> None:
    page = write_report(finished_run(tmp_path / "outputs"))
    shot = tmp_path / "shot.png"
    done = browse(tmp_path / "profile", page, "--window-size=1400,1600", f"--screenshot={shot}", "--dump-dom")
    assert "can-enlarge" in done.stdout  # the page's policy lets its own script run
    with Image.open(shot) as image:
        pixels = np.asarray(image.convert("RGB"))
    assert pixels.shape == (1600, 1400, 3)
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 500


PROBE = """<!doctype html><body><script>
const pages = %s, widths = [360, 1400], found = [];
for (const page of pages) for (const width of widths) {
  const frame = document.createElement("iframe");
  frame.style.width = width + "px";
  frame.style.height = "900px";
  frame.onload = () => {
    const inside = frame.contentDocument, images = [...inside.images].filter(i => i.getAttribute("src"));
    found.push({
      width, wide: inside.documentElement.scrollWidth,
      images: images.length, broken: images.filter(i => !i.naturalWidth).length,
      outside: [...inside.querySelectorAll("main *")].filter(e => !e.closest(".scroll, pre, svg, dialog")
        && e.getBoundingClientRect().right > width + 1).length,
    });
    document.body.dataset.found = JSON.stringify(found);
  };
  frame.srcdoc = page;
  document.body.append(frame);
}
</script></body>"""


@needs_chromium
def test_pages_fit_a_phone_and_a_screen_and_every_picture_loads(tmp_path: Path) -> None:
    samples = ["a", "a-very-long-identifier_" * 8, "c" * 200]
    store = finished_run(tmp_path / "outputs", samples, command="ibxai run " + "x" * 300, weights="w" * 120)
    store.write_scores(MetricKey("a_metric_with_a_long_name", {}), ["a@predicted"], {"another_long_value": np.ones(1)})
    long_names = [f"{name}_with_a_name_that_is_rather_long" for name in "abcdef"]
    noisy_runs(tmp_path / "many", [*long_names, *"ghijkl"])
    pages = [write_report(store).read_text(), write_leaderboard(tmp_path / "outputs").read_text()]
    pages.append(write_leaderboard(tmp_path / "many").read_text().replace("<details", "<details open"))
    probe = tmp_path / "probe.html"
    probe.write_text(PROBE % json.dumps(pages).replace("</", "<\\/").replace("<!--", "<\\!--"))
    dom = browse(tmp_path / "profile", probe, "--window-size=1500,1000", "--dump-dom").stdout
    found = re.search(r'data-found="([^"]*)"', dom)
    assert found is not None
    seen = json.loads(found[1].replace("&quot;", '"'))
    assert len(seen) == 6
    assert sorted(page["images"] for page in seen) == [0, 0, 0, 0, 21, 21]
    for page in seen:
        assert page["broken"] == 0
        assert page["wide"] <= page["width"], page
        assert page["outside"] == 0, page
