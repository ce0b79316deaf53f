"""Letters burned in: found where they were drawn, painted over, nothing else changed; and a cleaning that goes on."""

from __future__ import annotations

import csv
import hashlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from ibxai.cli import main
from ibxai.datasets import letters
from ibxai.datasets.covidx import CleanedCOVIDx, COVIDx
from ibxai.datasets.letters import Finder, Letters, clean, letter_finder, merged, paint_over
from ibxai.datasets.pictures import read_picture
from ibxai.datasets.sample import SampleDataset
from ibxai.errors import UserError

REAL = Path(__file__).parents[2] / "shared" / "data" / "covidx"
needs_real_files = pytest.mark.skipif(not REAL.is_dir(), reason=f"the real COVIDx files are not in {REAL}")


@pytest.fixture(scope="module")
def find() -> Finder:
    return letter_finder()


def chest(width: int = 600, height: int = 480, seed: int = 0) -> Image.Image:
    """Something smooth with noise: two dark ellipses on grey."""
    y, x = np.mgrid[:height, :width]
    grey = 150.0 - 60 * (y / height)
    for centre in (0.3, 0.7):
        grey -= 60 * (((x / width - centre) / 0.16) ** 2 + ((y / height - 0.5) / 0.35) ** 2 < 1)
    noise = np.random.default_rng(seed).normal(0, 3, grey.shape)
    return Image.fromarray(np.clip(grey + noise, 0, 255).astype(np.uint8))


def lettered(text: str, place: tuple[int, int], size: int = 28) -> tuple[Image.Image, tuple[float, ...]]:
    """A chest with white letters, and the box of their ink."""
    picture = chest()
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(size)
    pen.text(place, text, fill=255, font=font)
    return picture, pen.textbbox(place, text, font=font)


@pytest.mark.parametrize(
    ("text", "place", "size"), [("R", (20, 15), 28), ("L", (30, 400), 44), ("AP ERECT", (130, 8), 28)]
)
def test_letters_are_found_where_they_were_drawn(find: Finder, text: str, place: tuple[int, int], size: int) -> None:
    picture, (left, top, right, bottom) = lettered(text, place, size)
    (own,) = find(picture.convert("RGB"))
    a, b, c, d = own.corners
    assert a <= left
    assert b <= top
    assert c >= right
    assert d >= bottom
    assert (c - a) * (d - b) < 5 * (right - left) * (bottom - top)
    assert 0.4 <= own.score <= 1
    after = np.asarray(paint_over(picture, [own]))
    assert after[int(top) : int(bottom), int(left) : int(right)].max() < 200  # the letters were 255


def test_a_score_belongs_to_its_box(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a threshold between two scores the box of the lower one goes, wherever the boxes lie."""
    picture = chest()
    pen = ImageDraw.Draw(picture)
    for text, place, size in (("AP", (300, 10), 24), ("L", (30, 60), 20), ("MOBILE", (400, 430), 30)):
        pen.text(place, text, fill=255, font=ImageFont.load_default(size))
    monkeypatch.setattr(letters, "SIDES", (480,))
    monkeypatch.setattr(letters, "THRESHOLD", 0.2)
    every = letter_finder()(picture.convert("RGB"))
    low, *others = sorted(own.score for own in every)
    assert len(others) >= 2
    monkeypatch.setattr(letters, "THRESHOLD", (low + others[0]) / 2)
    assert letter_finder()(picture.convert("RGB")) == [own for own in every if own.score > low]


def test_there_are_no_letters_where_none_were_drawn(find: Finder) -> None:
    for seed in range(2):
        assert find(chest(seed=seed).convert("RGB")) == []


@needs_real_files
@pytest.mark.parametrize(
    "name",
    [
        "COVID-00020.jpg",
        "COVID-00036.jpg",
        "klebsiella-pneumonia-1.jpg",
        "1-s2.0-S1684118220300682-main.pdf-003-b2.png",
    ],
)
def test_a_lone_letter_of_a_real_picture(find: Finder, name: str) -> None:
    """Boxes drawn by hand: all of each is covered, by a box of not too much more."""
    with (REAL / "burned_in_letters.csv").open() as file:
        (row,) = [row for row in csv.DictReader(file) if row["filename"] == name]
    left, top, right, bottom = (int(row[side]) for side in ("xmin", "ymin", "xmax", "ymax"))
    found = find(read_picture(REAL / "data" / row["split"] / name))
    covering = [
        (c - a) * (d - b)
        for a, b, c, d in (own.corners for own in found)
        if a <= left and b <= top and c >= right and d >= bottom
    ]
    assert covering
    assert min(covering) < 6 * (right - left) * (bottom - top)


def test_painting_over_goes_on_with_the_surroundings_and_changes_nothing_else() -> None:
    ramp = np.tile(np.arange(100, 200, dtype=np.uint8), (80, 1))
    spoilt = ramp.copy()
    spoilt[30:50, 40:60] = 255
    for pixels, shape in ((spoilt, (80, 100)), (np.stack([spoilt] * 3, -1), (80, 100, 3))):
        after = np.asarray(paint_over(Image.fromarray(pixels), [Letters((40, 30, 60, 50), 1.0)]))
        assert after.shape == shape
        grey = after if after.ndim == 2 else after[..., 0]
        changed = grey != ramp
        changed[30:50, 40:60] = False
        assert not changed.any()
        assert np.abs(grey[30:50, 40:60].astype(int) - ramp[30:50, 40:60]).max() <= 10  # half of what the ramp rises


def test_boxes_that_overlap_become_one() -> None:
    one, inside, beside = Letters((0, 0, 10, 10), 0.6), Letters((2, 2, 8, 12), 0.9), Letters((9, 0, 20, 10), 0.5)
    assert merged([one, beside]) == [one, beside]  # a tenth of it
    assert merged([one, inside]) == [Letters((0, 0, 10, 12), 0.9)]  # 48 of 60 pixels
    assert merged([one, beside, Letters((0, 0, 20, 10), 0.7)]) == [Letters((0, 0, 20, 10), 0.7)]
    assert merged([]) == []


def test_a_box_of_a_large_part_of_the_picture_is_no_letter(find: Finder) -> None:
    page = Image.new("L", (200, 160), 40)
    ImageDraw.Draw(page).text((40, 20), "R", fill=255, font=ImageFont.load_default(130))
    assert all(
        (c - a) * (d - b) <= 0.05 * 200 * 160 for a, b, c, d in (own.corners for own in find(page.convert("RGB")))
    )


# the cleaning of a folder, with a detector that finds white


def white(picture: Image.Image) -> list[Letters]:
    rows, columns = np.nonzero(np.asarray(picture)[..., 0] == 255)
    if not len(rows):
        return []
    return [Letters((columns.min(), rows.min(), columns.max() + 1, rows.max() + 1), 0.75)]


def spot(path: Path, kind: str, at: int | None) -> None:
    pixels = np.random.default_rng(len(path.name)).integers(20, 90, (40, 50), dtype=np.uint8)
    if at is not None:
        pixels[10:16, at : at + 6] = 255
    Image.fromarray(pixels).save(path, kind)


@pytest.fixture
def covidx(tmp_path: Path) -> COVIDx:
    """Five pictures, two with white spots, and one file that is no picture."""
    root = tmp_path / "covidx"
    for split in ("train", "test"):
        (root / "data" / split).mkdir(parents=True)
    (root / "labels").mkdir()
    train, test = root / "data/train", root / "data/test"
    spot(train / "a.png", "png", 5)
    spot(train / "b.jpg", "jpeg", None)
    spot(train / "c.jpg", "png", 30)  # PNG behind a name of JPEG
    (train / "d.png").write_bytes(b"no picture")
    spot(test / "e.png", "png", None)
    (root / "labels/train_COVIDx4.txt").write_text("".join(f"{n} {n}.png normal\n" for n in "ad"))
    with (root / "labels/train_COVIDx4.txt").open("a") as file:
        file.write("b b.jpg normal\nc c.jpg pneumonia\n")
    (root / "labels/test_COVIDx4.txt").write_text("e e.png COVID-19\n")
    (root / "README").write_bytes(b"")
    return COVIDx(str(root), "covidx", "test", 10)


def contents(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.fixture
def _white(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(letters, "letter_finder", lambda: white)


@pytest.mark.usefixtures("_white")
def test_a_dataset_without_its_letters(covidx: COVIDx, tmp_path: Path) -> None:
    before, to = contents(covidx.folder), tmp_path / "clean"
    done = clean(covidx, to)
    assert contents(covidx.folder) == before
    assert (done.pictures, done.painted, done.letters) == (5, 2, 2)
    assert list(done.unread) == ["data/train/d.png"]
    assert "not a picture" in done.unread["data/train/d.png"]
    after = contents(to)
    assert {name for name in before if after[name] != before[name]} == {"data/train/a.png", "data/train/c.jpg"}
    assert set(after) - set(before) == {
        *("cleaned.csv", "cleaning.json"),
        *(name for name in after if name.startswith("before_after/")),
    }
    assert sum(name.startswith("before_after/") for name in after) == 2
    with (to / "cleaned.csv").open() as file:
        rows = {row["file"]: row for row in csv.DictReader(file)}
    assert set(rows) == {name for name in before if name.startswith("data/")}
    assert rows["data/train/a.png"]["boxes"] == "5 10 11 16"
    assert rows["data/train/a.png"]["scores"] == "0.75"
    assert rows["data/test/e.png"]["done"] == "no letters found"
    for name, at in (("a.png", 5), ("c.jpg", 30)):
        old, new = (np.asarray(read_picture(folder / "data/train" / name)) for folder in (covidx.folder, to))
        assert new.max() < 128
        same = (old == new).all(-1)
        same[10:16, at : at + 6] = True
        assert same.all()
    cleaned = CleanedCOVIDx(str(to), "covidx_clean", "test", 10)
    assert [s.label for s in cleaned.in_split("train")] == [s.label for s in covidx.in_split("train")]
    assert ("letters", "boxes of them on 2 of the X-rays") in cleaned.facts()
    with pytest.raises(UserError, match=r"no cleaned\.csv(.|\n)*data clean"):
        CleanedCOVIDx(covidx.root, "covidx_clean", "test", 10).samples()


def test_a_cleaning_that_was_stopped_goes_on(covidx: COVIDx, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Image.Image] = []

    def stops(picture: Image.Image) -> list[Letters]:
        seen.append(picture)
        if len(seen) == 3:
            raise KeyboardInterrupt
        return white(picture)

    monkeypatch.setattr(letters, "letter_finder", lambda: stops)
    with pytest.raises(KeyboardInterrupt):
        clean(covidx, tmp_path / "stopped")
    with pytest.raises(UserError, match=r"train_COVIDx4\.txt"):  # not finished, so no dataset
        CleanedCOVIDx(str(tmp_path / "stopped"), "covidx_clean", "test", 10).samples()
    with (tmp_path / "stopped/cleaned.csv").open("a") as file:
        file.write('data/train/c.jpg,12,"5 10')  # a line that a kill has cut short
    clean(covidx, tmp_path / "stopped")
    assert len(seen) == 5  # d.png is not read: two before, one that was stopped, and two left
    monkeypatch.setattr(letters, "letter_finder", lambda: white)
    clean(covidx, tmp_path / "undisturbed")
    assert contents(tmp_path / "stopped") == contents(tmp_path / "undisturbed")
    spot(covidx.folder / "data/test/e.png", "png", 20)  # another file under the old name
    assert clean(covidx, tmp_path / "stopped").painted == 3


@pytest.mark.usefixtures("_white")
def test_what_cannot_be_cleaned(covidx: COVIDx, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for to in (covidx.folder, covidx.folder / "clean", covidx.folder.parent):
        with pytest.raises(UserError, match="lie in each other"):
            clean(covidx, to)
    clean(covidx, tmp_path / "clean")
    monkeypatch.setattr(letters, "RADIUS", 9)
    with pytest.raises(UserError, match="other settings"):
        clean(covidx, tmp_path / "clean")
    (tmp_path / "used").mkdir()
    (tmp_path / "used/thesis.tex").write_text("")
    with pytest.raises(UserError, match="has files in it"):
        clean(covidx, tmp_path / "used")
    with pytest.raises(UserError, match="one by one in folders"):
        clean(SampleDataset(), tmp_path / "new")


@pytest.mark.usefixtures("_white")
def test_before_and_after_of_the_first(covidx: COVIDx, tmp_path: Path) -> None:
    clean(covidx, tmp_path / "clean", shown=1)
    (path,) = (tmp_path / "clean/before_after").iterdir()
    page = np.asarray(Image.open(path)).astype(int)
    assert page.shape == (512, 2 * 640, 3)
    red = (page[..., 0] - page[..., 1] > 150).nonzero()[1]
    assert len(red)
    assert red.max() < 640  # on the first of the two


def test_without_the_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "rapidocr", None)
    with pytest.raises(UserError, match=r"ibxai\[cleaning\]"):
        letter_finder()


def test_the_command(covidx: COVIDx, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture, _ = lettered("R", (20, 15))
    picture.save(covidx.folder / "data/test/e.png")
    arguments = ["data", "clean", "dataset=covidx", f"dataset.root={covidx.root}", "--to", str(tmp_path / "clean")]
    assert main(arguments) == 3  # d.png is no picture
    said = capsys.readouterr().out
    assert "5 pictures" in said
    assert "data/train/d.png: not read" in said
    assert np.asarray(Image.open(tmp_path / "clean/data/test/e.png")).max() < 200
    assert main(["data", "clean", "dataset=covidx", f"dataset.root={covidx.root}"]) == 2
    assert "--to" in capsys.readouterr().err
