"""What a run leaves on disk: round trips, names, atomic writes, and what is made of damaged files."""

from __future__ import annotations

import builtins
import errno
import io
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ibxai import store as store_module
from ibxai.errors import UserError
from ibxai.store import (
    DamagedFile,
    MetricKey,
    Row,
    RunStore,
    StoredHeatmap,
    digest,
    find_runs,
    safe_name,
    write_atomically,
)

INSERTION = MetricKey("insertion", {"step": 0.5, "higher_is_better": True})
ODD_IDS = [
    "../../x", "..", ".", "", "/", "/etc/passwd", "a/b", "a\\b", "a:b", "a b", "a\nb", "a\rb", 'a",b', "é", "e\u0301",
    "汉", "x" * 300, "x" * 301, "X", "x", "aB", "\udcff", "\udcfe", "-", "--", "a-", ".hidden", "nul\0", "%2e%2e", "@",
]  # fmt: skip


def heatmap(row_id: str, seed: int = 0, size: int = 6) -> StoredHeatmap:
    values = np.random.default_rng(seed).normal(size=(size, size + 1)).astype(np.float32)
    return StoredHeatmap(row_id, values, "bits", 3, 0.25, 1, 0.5, {"loss": np.arange(3.0), "capacity": np.float32(2)})


def rows(*ids: str) -> list[Row]:
    return [Row(f"{i}@predicted", i, "predicted", f"group {i}", n if n % 2 else None) for n, i in enumerate(ids)]


def begun(path: Path, listed: list[Row] | None = None) -> RunStore:
    store = RunStore(path)
    store.begin("seed: 0\n", {"command": "é \udcff"}, ["cat", "dög"], listed or rows("a", "b"))
    return store


def files_below(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


# names


def test_safe_names_stay_in_their_folder_and_are_distinct_everywhere(tmp_path: Path) -> None:
    names = [safe_name(i) for i in ODD_IDS]
    assert len({name.lower() for name in names}) == len(ODD_IDS), "case twins meet on a Mac"
    for name in names:
        assert Path(name).name == name
        assert name not in (".", "..")
        assert len(f"{name}.npz".encode()) <= 120
        assert name.isascii()
        (tmp_path / f"{name}.npz").write_text("x")
    assert len(files_below(tmp_path)) == len(ODD_IDS)


def test_plain_ids_are_their_own_names_and_no_others_take_them() -> None:
    for plain in ("ILSVRC2012_val_00000001@predicted".lower(), "astronaut@281", "1-2-3.png", "0", "x" * 100):
        assert safe_name(plain) == plain
    for odd in ("a b", "A", "x" * 101):
        made = safe_name(odd)
        assert safe_name(made.lower()) not in (made, made.lower()), "an id that looks like a made name would take it"


def test_safe_names_never_change() -> None:
    # a run is resumed by these names: another rule would compute everything again
    assert safe_name("ILSVRC2012_val_00000001@predicted") == "ILSVRC2012_val_00000001-predicted-f3ff0a8e3f8d"
    assert safe_name("../../x") == "x-9cdf6a50100a"
    assert digest({"b": 1, "a": [1.5, "é"]}) == "b3aa7c2c75e6"


# round trips


def test_heatmaps_come_back_as_they_were(tmp_path: Path) -> None:
    store = RunStore(tmp_path)
    for place, row_id in enumerate(ODD_IDS):
        if "\0" in row_id:
            continue
        store.write_heatmap(heatmap(row_id, place))
        again, before = store.read_heatmap(row_id), heatmap(row_id, place)
        np.testing.assert_array_equal(again.heatmap, before.heatmap)
        assert again.heatmap.dtype == np.float32
        assert (again.row_id, again.unit, again.target, again.prediction) == (row_id, "bits", 3, 1)
        assert (again.target_probability, again.prediction_probability) == (0.25, 0.5)
        assert again.diagnostics.keys() == {"loss", "capacity"}
        np.testing.assert_array_equal(again.diagnostics["loss"], [0, 1, 2])
    assert store.finished([*ODD_IDS, "never"]) == {i for i in ODD_IDS if "\0" not in i}


def test_heatmaps_keep_what_cannot_be_shown(tmp_path: Path) -> None:
    values = np.array([[np.nan, np.inf], [-np.inf, 1e-38]], dtype=np.float32)
    RunStore(tmp_path).write_heatmap(StoredHeatmap("x", values, "score", 0, 0.0, 0, 0.0))
    np.testing.assert_array_equal(RunStore(tmp_path).read_heatmap("x").heatmap, values)


def test_what_begin_writes_is_read_again(tmp_path: Path) -> None:
    listed = [row for i in ODD_IDS if "\0" not in i for row in rows(i)]
    store = begun(tmp_path / "run", listed)
    again = RunStore(tmp_path / "run")
    assert again.rows() == listed
    assert again.config() == "seed: 0\n"
    assert again.provenance() == {"command": "é \udcff"}
    assert again.class_names() == ["cat", "dög"]
    assert again.skipped() == {}
    reasons = {"a": 'damaged, "cut" short\nsecond line', "é\udcff": "x"}
    store.write_skipped(reasons)
    assert again.skipped() == reasons
    names = ["config.yaml", "provenance.json", "classes.json", "samples.csv", "skipped.csv"]
    names += [f"skipped/{safe_name(sample)}.json" for sample in reasons]
    assert files_below(tmp_path) == sorted(f"run/{name}" for name in names)


def test_rows_keep_the_order_they_were_given_in(tmp_path: Path) -> None:
    listed = rows("b", "a", "10", "9", "Z")
    begun(tmp_path, listed)
    assert [row.sample_id for row in RunStore(tmp_path).rows()] == ["b", "a", "10", "9", "Z"]
    begun(tmp_path, rows("other"))
    assert RunStore(tmp_path).rows() == listed, "samples.csv is of the dataset, which the folder's name stands for"


def test_pictures(tmp_path: Path) -> None:
    store, pixels = RunStore(tmp_path), np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    assert store.read_picture("../a") is None
    store.write_picture("../a", pixels)
    np.testing.assert_array_equal(store.read_picture("../a"), pixels)
    path = next((tmp_path / "pictures").iterdir())
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(DamagedFile):
        store.read_picture("../a")


# scores


def test_scores_of_all_batches_are_merged(tmp_path: Path) -> None:
    store = RunStore(tmp_path)
    store.write_scores(INSERTION, ["c", "a"], {"auc": np.array([3.0, 1.0]), "curve": np.array([[3, 3], [1, 1]])})
    store.write_scores(INSERTION, ["b\udcff"], {"auc": np.array([2.0]), "curve": np.array([[2, 2, 2]])})
    found = store.read_scores(INSERTION)
    assert {row: float(values["auc"]) for row, values in found.items()} == {"c": 3.0, "a": 1.0, "b\udcff": 2.0}
    assert {row: values["curve"].tolist() for row, values in found.items()} == {
        "c": [3, 3], "a": [1, 1], "b\udcff": [2, 2, 2]
    }  # fmt: skip
    assert store.metrics() == [INSERTION]
    other = MetricKey("insertion", {**INSERTION.settings, "step": 0.25})
    assert store.read_scores(other) == {}
    store.write_scores(other, ["a"], {"auc": np.array([9.0])})
    assert float(store.read_scores(INSERTION)["a"]["auc"]) == 1.0
    assert len(store.metrics()) == 2


def test_settings_name_the_folder_of_scores_whatever_their_order() -> None:
    assert MetricKey("m", {"a": 1, "b": 2}).folder == MetricKey("m", {"b": 2, "a": 1}).folder
    assert MetricKey("m", {"a": 1}).folder != MetricKey("m", {"a": 2}).folder
    assert MetricKey("m", {"a": 1}).folder != MetricKey("n", {"a": 1}).folder


# damaged files


def cut(content: bytes) -> bytes:
    return content[: len(content) // 2]


def flipped(content: bytes) -> bytes:
    """One byte wrong in the middle of the compressed numbers."""
    middle = len(content) // 3
    return content[:middle] + bytes([content[middle] ^ 0xFF]) + content[middle + 1 :]


def of_another_kind(content: bytes) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.arange(3))
    return buffer.getvalue()


def without_entries(content: bytes) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, something=np.arange(3))
    return buffer.getvalue()


def pickled(content: bytes) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, row=np.array([Exploding()], dtype=object), heatmap=np.zeros(1))
    return buffer.getvalue()


class Exploding:
    def __reduce__(self) -> Any:
        return (builtins.exec, ("raise SystemExit('a pickle was loaded')",))


DAMAGES = [cut, flipped, of_another_kind, without_entries, pickled, lambda _: b"", lambda _: b"x", lambda _: bytes(99)]


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_heatmaps_are_known(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    store = RunStore(tmp_path)
    store.write_heatmap(heatmap("a", size=40))
    path = tmp_path / "heatmaps" / "a.npz"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DamagedFile, match=r"a\.npz"):
        store.read_heatmap("a")
    store.forget_heatmap("a")
    store.forget_heatmap("a")
    assert store.finished(["a"]) == set()


def test_a_heatmap_of_another_row_is_no_answer(tmp_path: Path) -> None:
    store = RunStore(tmp_path)
    store.write_heatmap(heatmap("a"))
    os.rename(tmp_path / "heatmaps" / "a.npz", tmp_path / "heatmaps" / "b.npz")
    with pytest.raises(DamagedFile, match="holds the row a"):
        store.read_heatmap("b")
    with pytest.raises(DamagedFile, match="not there"):
        store.read_heatmap("a")


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_scores_are_removed_and_told(
    tmp_path: Path, damage: Callable[[bytes], bytes], caplog: pytest.LogCaptureFixture
) -> None:
    store = RunStore(tmp_path)
    store.write_scores(INSERTION, ["a"], {"auc": np.array([1.0]), "curve": np.random.default_rng(0).random((1, 99))})
    store.write_scores(INSERTION, ["b"], {"auc": np.array([2.0])})
    path = next(p for p in (tmp_path / "scores").glob("*/*.npz") if p.stat().st_size > 700)
    path.write_bytes(damage(path.read_bytes()))
    with caplog.at_level(logging.WARNING, "ibxai"):
        assert store.read_scores(INSERTION).keys() == {"b"}
    assert path.name in caplog.text
    assert not path.exists()
    assert store.read_scores(INSERTION).keys() == {"b"}


def test_a_file_that_cannot_be_opened_just_now_is_not_thrown_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ "Too many open files" says nothing about the file."""
    store = RunStore(tmp_path)
    store.write_heatmap(heatmap("a"))
    store.write_scores(INSERTION, ["a"], {"auc": np.array([1.0])})
    before = files_below(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", raising(errno.EMFILE))
        patch.setattr(io, "open", raising(errno.EMFILE))
        with pytest.raises(UserError, match="Too many open files"):
            store.read_scores(INSERTION)
        with pytest.raises(UserError, match="Too many open files"):
            store.read_heatmap("a")
    assert files_below(tmp_path) == before
    assert store.read_scores(INSERTION).keys() == {"a"}


def raising(number: int) -> Callable[..., Any]:
    def refuse(*_: object, **__: object) -> Any:
        raise OSError(number, os.strerror(number))

    return refuse


# atomic writes


def test_a_kill_between_write_and_rename_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = begun(tmp_path)
    store.write_heatmap(heatmap("a", 1))

    class Killed(BaseException):
        pass

    def kill(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", kill)
        patch.setattr(os, "replace", kill)
        patch.setattr(Path, "unlink", lambda *_, **__: None)  # a killed process cleans nothing up
        for row_id in ("a", "b"):
            with pytest.raises(Killed):
                store.write_heatmap(heatmap(row_id, 2))
        with pytest.raises(Killed):
            store.write_scores(INSERTION, ["a"], {"auc": np.array([1.0])})
    left = list(tmp_path.rglob("*.tmp"))
    assert len(left) == 3, "the content is written beside the file first, not into it"
    again = RunStore(tmp_path)
    assert again.finished(["a", "b"]) == {"a"}
    np.testing.assert_array_equal(again.read_heatmap("a").heatmap, heatmap("a", 1).heatmap)
    assert again.read_scores(INSERTION) == {}
    assert again.metrics() == []


def test_content_is_synced_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    happened: list[str] = []
    sync, replace = os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda handle: (happened.append("fsync"), sync(handle))[1])
    monkeypatch.setattr(Path, "replace", lambda *a: (happened.append("replace"), replace(*a))[1])
    write_atomically(tmp_path / "x", b"content")
    assert happened == ["fsync", "replace"]
    assert (tmp_path / "x").read_bytes() == b"content"


def test_two_processes_of_one_number_do_not_share_a_temporary_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two containers on one folder: each of them is process 1."""
    used: list[str] = []
    replace = Path.replace
    monkeypatch.setattr(Path, "replace", lambda path, to: (used.append(path.name), replace(path, to))[1])
    for _ in range(2):
        write_atomically(tmp_path / "x", b"content")
    assert used[0] != used[1]
    write_atomically(tmp_path / ("n" * 250), b"content")  # a name that would be too long with an ending behind it


def test_left_over_temporary_files_are_ignored_and_cleared_when_old(tmp_path: Path) -> None:
    store = begun(tmp_path)
    store.write_heatmap(heatmap("a"))
    young, old = tmp_path / "heatmaps" / ".b.npz.1.tmp", tmp_path / "heatmaps" / ".c.npz.2.tmp"
    for path in (young, old):
        path.write_bytes(b"half")
    os.utime(old, (time.time() - 7200,) * 2)
    assert store.finished(["a", "b", "c"]) == {"a"}
    begun(tmp_path)
    assert young.exists(), "another process may be writing it"
    assert not old.exists()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EDQUOT])
@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_is_two_lines_and_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, call: str
) -> None:
    store = begun(tmp_path)
    store.write_heatmap(heatmap("a", 1))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with monkeypatch.context() as patch:
        patch.setattr(os if call == "fsync" else Path, call, raising(number))
        for row_id in ("a", "b"):
            with pytest.raises(UserError) as error:
                store.write_heatmap(heatmap(row_id, 2))
            assert len(str(error.value).splitlines()) == 2
            assert os.strerror(number) in str(error.value)
            assert str(tmp_path) in str(error.value)
    after = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert after == before, "no temporary file is left to fill the disk further"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="/dev/full is Linux's")
def test_a_really_full_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module.secrets, "token_hex", lambda _: "x")
    (tmp_path / ".a.x.tmp").symlink_to("/dev/full")
    with pytest.raises(UserError, match="No space left on device"):
        write_atomically(tmp_path / "a", bytes(1_000_000))
    assert files_below(tmp_path) == []


@pytest.mark.parametrize("place", ["file", "file/deeper/still", "/proc/no/such", "link"])
def test_places_that_cannot_hold_a_run(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "link").symlink_to(tmp_path / "link")
    store = RunStore(tmp_path / place / "run")
    if place != "link":
        assert store.finished(["a"]) == set()
        assert store.read_scores(INSERTION) == {}
    with pytest.raises(UserError) as error:
        begun(tmp_path / place / "run")
    assert len(str(error.value).splitlines()) == 2
    assert files_below(tmp_path) == ["file"]


# a run's beginning and end


def test_discard_undoes_a_beginning_and_nothing_else(tmp_path: Path) -> None:
    begun(tmp_path / "outputs/data/net/method/run").discard()
    assert list(tmp_path.iterdir()) == []

    (tmp_path / "outputs").mkdir()
    begun(tmp_path / "outputs/data/net/method/run").discard()
    assert list(tmp_path.iterdir()) == [tmp_path / "outputs"], "the user's own folder stays"

    kept = begun(tmp_path / "outputs/data/net/method/run")
    begun(tmp_path / "outputs/data/net/method/other").discard()
    assert kept.provenance()
    begun(tmp_path / "outputs/data/net/method/run").discard()
    assert kept.provenance(), "it was there before"

    finished = begun(tmp_path / "outputs/data/net/method/third")
    finished.write_heatmap(heatmap("a"))
    finished.discard()
    assert finished.finished(["a"]) == {"a"}


def test_a_page_is_the_last_word_only_when_it_was_written_last(tmp_path: Path) -> None:
    store = RunStore(tmp_path / "run")
    assert not store.is_reported()
    store = begun(tmp_path / "run")
    assert not store.is_reported()
    store.write_text("report.html", "x")
    assert not store.is_reported(), "it was stopped"
    store.write_provenance({"finished": "today"})
    store.write_text("report.html", "x")
    now = time.time()
    os.utime(tmp_path / "run/provenance.json", (now - 10, now - 10))
    assert store.is_reported()
    os.utime(tmp_path / "run/report.html", (now - 20, now - 20))
    assert not store.is_reported()


def test_sessions_are_read_in_the_order_of_their_start_without_damaged_ones(tmp_path: Path) -> None:
    store = RunStore(tmp_path)
    assert store.sessions() == []
    told = {"command": "ibxai run", "device": "cpu", "notes": ["pooled"], "started": "1"}
    store.write_session("2", {**told, "started": "2"})
    store.write_session("1", told)
    (tmp_path / "sessions" / "0.json").write_text("{")
    (tmp_path / "sessions" / "3.json").write_text("[1]")
    (tmp_path / "sessions" / "4.json").write_text("{}")
    assert store.sessions() == [told, {**told, "started": "2"}]


def test_skipped_samples_of_two_processes_are_put_together_in_the_order_of_the_dataset(tmp_path: Path) -> None:
    one, other = begun(tmp_path, rows("a", "b", "c")), RunStore(tmp_path)
    one.write_skipped({"c": "x"}, tried=["a", "c"])
    other.write_skipped({"b": "y"}, tried=["b"])
    assert list(one.skipped().items()) == [("b", "y"), ("c", "x")]
    assert (tmp_path / "skipped.csv").read_text() == "sample,reason\nb,y\nc,x\n"
    one.write_skipped({}, tried=["a", "c"])
    assert one.skipped() == {"b": "y"}, "c is well again"
    assert (tmp_path / "skipped.csv").read_text() == "sample,reason\nb,y\n"


def test_a_heatmap_that_was_cut_short_is_not_finished(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Also where nobody would read it: its scores are all there."""
    store = RunStore(tmp_path)
    for row_id in ("a", "b", "c"):
        store.write_heatmap(heatmap(row_id))
    for name, kept in (("a", 600), ("b", 5)):
        path = tmp_path / "heatmaps" / f"{name}.npz"
        path.write_bytes(path.read_bytes()[:kept])
    with caplog.at_level(logging.WARNING, "ibxai"):
        assert store.finished(["a", "b", "c", "d"]) == {"c"}
    assert "a.npz" in caplog.text
    assert "b.npz" in caplog.text


def test_discard_leaves_a_folder_in_which_another_process_has_begun(tmp_path: Path) -> None:
    told = {"command": "ibxai run", "device": "cpu", "notes": [], "started": "1"}
    one, other = begun(tmp_path / "run"), begun(tmp_path / "run")
    one.write_session("1", told)
    other.write_session("2", told)
    one.discard()
    assert other.rows(), "its table is still there"


def test_find_runs(tmp_path: Path) -> None:
    for name in ("d/b/m/2", "d/b/m/1", "c/b/m/3"):
        begun(tmp_path / name)
    (tmp_path / "d/b/m/unfinished").mkdir()
    (tmp_path / "provenance.json").write_text("{}")
    assert [run.path.relative_to(tmp_path).as_posix() for run in find_runs(tmp_path)] == [
        "c/b/m/3", "d/b/m/1", "d/b/m/2"
    ]  # fmt: skip
    assert find_runs(tmp_path / "nowhere") == []
