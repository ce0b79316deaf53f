"""`ibxai data check`: what it says of good, partial, broken and missing datasets, and its exit codes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ibxai.cli import main

KINDS = ("empty", "text", "cut", "header", "folder", "link", "svg", "zip", "huge", "strip")


def covidx(root: Path, good: int, broken: int) -> list[str]:
    """A COVIDx of noise; returns the names of the files that no reader can use, of ten kinds."""
    pixels = np.random.default_rng(0).integers(0, 256, (24, 24), dtype=np.uint8)
    folder = root / "data/test"
    folder.mkdir(parents=True)
    (root / "data/train").mkdir()
    (root / "labels").mkdir()
    bad = [f"bad{n:03d}.png" for n in range(broken)]
    names = [f"good{n:03d}.png" for n in range(good)] + bad
    for name in names[:good]:
        Image.fromarray(pixels).save(folder / name)
    whole = (folder / names[0]).read_bytes()
    for place, name in enumerate(bad):
        spoil(folder / name, KINDS[place % len(KINDS)], whole)
    (root / "labels/test_COVIDx4.txt").write_text("".join(f"p{name} {name} normal\n" for name in names))
    (root / "labels/train_COVIDx4.txt").write_text("t t.png pneumonia rsna\n")
    return bad


def spoil(path: Path, kind: str, whole: bytes) -> None:
    if kind == "folder":
        path.mkdir()
    elif kind == "link":
        path.symlink_to(path.parent / "nothing")
    elif kind == "strip":
        Image.new("L", (9000, 1)).save(path)
    else:
        contents = {
            "empty": b"", "text": b"hello " * 99, "cut": whole[: len(whole) // 2], "header": whole[:20],
            "svg": b"<svg xmlns='http://www.w3.org/2000/svg'/>", "zip": b"PK\x03\x04" + bytes(99),
            "huge": whole[:16] + b"\0\1\0\0" * 2 + whole[24:],
        }  # fmt: skip
        path.write_bytes(contents[kind])


def check(root: Path, *more: str) -> int:
    return main(["data", "check", "dataset=covidx", f"dataset.root={root}", *more])


def test_a_good_dataset(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    covidx(tmp_path, 6, 0)
    assert check(tmp_path) == 0
    said = capsys.readouterr().out
    assert "  split train  0 samples\n" in said
    assert "  split test   6 samples\n" in said
    assert "1 X-rays, of which 0 are here" in said  # the train list
    assert "normal 6" in said
    assert "24 x 24 (6)" in said
    assert "6 of 6 samples, 0 with a problem" in said
    assert "problem  " not in said
    assert len(said.splitlines()) < 15


def test_a_hundred_broken_files_among_good_ones(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing is lost, each is counted, the first ten are named, and the good ones are read."""
    bad = covidx(tmp_path, 30, 100)
    assert check(tmp_path, "--all") == 3
    said = capsys.readouterr().out
    assert "130 of 130 samples, 100 with a problem" in said
    assert "24 x 24 (30)" in said
    named = [line for line in said.splitlines() if line.startswith("  problem")]
    assert len(named) == 11
    assert [Path(line.split()[1].rstrip(":")).name for line in named[:10]] == bad[:10]
    assert "90 more" in named[10]
    assert "Traceback" not in said
    assert "unexpected" not in said


def test_only_some_are_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    covidx(tmp_path, 20, 0)
    assert check(tmp_path, "--read", "5") == 0
    assert "5 of 20 samples" in capsys.readouterr().out
    assert check(tmp_path, "--read", "-1") == 2


def test_mistakes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def says(*arguments: str) -> str:
        assert main(["data", *arguments]) == 2
        said = capsys.readouterr()
        assert not said.out
        assert 1 <= len(said.err.strip().splitlines()) <= 2
        return said.err

    assert "dataset.root is not set" in says("check", "dataset=mosmed")
    assert "does not exist" in says("check", "dataset=mosmed", f"dataset.root={tmp_path}/nowhere")
    assert "CT-0" in says("check", "dataset=mosmed", f"dataset.root={tmp_path}")
    assert "mosmed" in says("check", "dataset=mosmad")
    assert "only dataset=" in says("check", "dataset=sample", "seed=3")
    assert "chest" in says("check", "dataset=chestxray8", f"dataset.root={tmp_path}", "dataset.clases=14").lower()
    assert "one of 8, 14" in says("check", "dataset=chestxray8", f"dataset.root={tmp_path}", "dataset.classes=9")
    assert "phantom" in says("phantom")


def test_any_dataset_can_be_checked(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "check", "dataset=sample"]) == 0
    said = capsys.readouterr().out
    assert "7 samples" in said
    assert "tabby 1" in said


def test_a_dataset_of_the_users_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "dataset").mkdir()
    (tmp_path / "dataset/mine.yaml").write_text(
        "# Mine\nname: mine\n_target_: ibxai.datasets.covidx.COVIDx\nroot: ???\nsplit: test\nreference_size: 5\n"
    )
    covidx(tmp_path / "files", 2, 0)
    arguments = ["data", "check", "--config-dir", str(tmp_path), "dataset=mine", f"dataset.root={tmp_path}/files"]
    assert main(arguments) == 0
    assert capsys.readouterr().out.startswith("mine\n")
