"""Phantoms: that the official readers read them, that their truth is true, and that a killed command goes on."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from ibxai.cli import main
from ibxai.datasets import phantom_cxr
from ibxai.datasets.brixia import BrixIA
from ibxai.datasets.chestxray8 import FINDINGS, ChestXRay8
from ibxai.datasets.lungs import closed_slice, six_regions, threshold_lungs
from ibxai.datasets.mosmed import MosMed
from ibxai.datasets.nifti import read_volume
from ibxai.datasets.phantom_anatomy import Body, Lesion, Waves, _Grid
from ibxai.datasets.phantom_ct import PhantomCT
from ibxai.datasets.phantom_cxr import PhantomCXR, brixia_score
from ibxai.datasets.phantoms import Recipe, make_phantoms, read_letters
from ibxai.datasets.tables import read_table
from ibxai.errors import UserError

nibabel = pytest.importorskip("nibabel")
pytest.importorskip("pydicom")

SIZE = 64


@pytest.fixture(scope="module")
def ct(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("phantoms") / "ct"
    assert make_phantoms(Recipe("phantom_ct", 3, SIZE, "leak"), folder, 20) == 20
    return folder


@pytest.fixture(scope="module")
def cxr(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("phantoms") / "cxr"
    make_phantoms(Recipe("phantom_cxr", 3, 96, "random"), folder, 15)
    return folder


def read_ct(root: Path, split: str = "test", **more) -> PhantomCT:
    return PhantomCT(root=str(root), name="phantom_ct", split=split, reference_size=5, **more)


def read_cxr(root: Path, split: str = "test", **more) -> PhantomCXR:
    return PhantomCXR(root=str(root), name="phantom_cxr", split=split, reference_size=5, **more)


def unmarked(root: Path, folder: Path) -> Path:
    """The same files without phantom.json, as only a test would have them."""
    folder.mkdir()
    for path in root.iterdir():
        if path.name != "phantom.json":
            (folder / path.name).symlink_to(path)
    return folder


# ---- the body


def body(**more) -> Body:
    return Body.drawn(0, "somebody", **more)


def test_waves_are_the_sum_of_their_plane_waves() -> None:
    waves = Waves.drawn(0, "a", "test", 20.0)
    z, y, x = np.array([-3.0, 50.0]), np.array([1.0, 2.0, 70.0]), np.array([-9.0, 0.5, 4.0, 33.0])
    slow = np.zeros((2, 3, 4))
    for (kz, ky, kx), phase in zip(waves.numbers, waves.phases, strict=True):
        for i, j, k in np.ndindex(slow.shape):
            slow[i, j, k] += np.cos(kz * z[i] + ky * y[j] + kx * x[k] + phase)
    np.testing.assert_allclose(waves(z, y, x), slow * np.sqrt(2 / len(waves.phases)), atol=1e-4)
    many = waves(np.arange(0, 600, 19.0), np.arange(0, 600, 19.0), np.arange(0, 600, 19.0))
    assert abs(many.mean()) < 0.05
    assert 0.9 < many.std() < 1.1


def test_a_block_does_not_depend_on_how_the_body_is_cut() -> None:
    ill = body().with_disease([Lesion("consolidation", (-60.0, 30.0, 90.0), 25.0)], 0.03)
    z, across = np.arange(0.0, 200.0, 20.0), np.arange(-150.0, 150.0, 6.0)
    whole = ill.block(z, across, across)
    for start in (0, 4, 7):
        part = ill.block(z[start : start + 3], across, across)
        np.testing.assert_allclose(part.hu, whole.hu[start : start + 3], atol=0.5)
        np.testing.assert_array_equal(part.kinds, whole.kinds[start : start + 3])


@pytest.mark.parametrize("share", [0.01, 0.3, 0.8])
def test_lesions_fill_the_share_that_is_asked_for(share: float) -> None:
    """The level is found on a grid of 7 mm; counted on one four times as fine across, the share is the same."""
    lesions = [Lesion("ground glass", (70.0, 30.0, 80.0), 25.0), Lesion("consolidation", (-70.0, 30.0, 50.0), 20.0)]
    ill = body().with_disease(lesions, share)
    found = ill.block(np.arange(-60.0, 260.0, 6.0), *[np.arange(-150.0, 150.0, 1.7)] * 2)
    assert not (found.kinds > 0)[~found.lungs].any()
    assert (found.kinds > 0).sum() / found.lungs.sum() == pytest.approx(share, rel=0.03, abs=0.003)


def test_lesions_are_where_they_were_put_and_dense() -> None:
    centre = (75.0, 20.0, 90.0)
    well, ill = body(), body().with_disease([Lesion("consolidation", centre, 20.0)], 0.01)
    z, across = np.arange(30.0, 150.0, 6.0), np.arange(-150.0, 150.0, 3.0)
    one, two = well.block(z, across, across), ill.block(z, across, across)
    changed = one.hu != two.hu
    assert changed.any()
    assert not changed[two.kinds == 0].any()  # nothing else in the body moves
    places = np.argwhere(two.kinds > 0)
    middle = [axis[index] for axis, index in zip((z, across, across), places.mean(0).round().astype(int), strict=True)]
    assert np.linalg.norm(np.array(middle) - centre[::-1]) < 12
    assert (two.hu - one.hu)[two.kinds > 0].mean() > 300


def test_a_tube_is_a_capsule() -> None:
    somebody = body()
    grid = _Grid(somebody, *(np.arange(-20.0, 21.0, 4.0),) * 3)
    start, end = np.array([-8.0, 3.0, 0.0]), np.array([10.0, -5.0, 6.0])
    box, inside = grid.tube(start, end, 6.0, 2.0)
    checked = 0
    for place in np.ndindex(inside.shape):
        k, j, i = (axis[part][index] for axis, part, index in zip(grid.axes, box, place, strict=True))
        point = np.array([i - somebody.tilt * (k - 100), j, k])
        along = np.linspace(0, 1, 2001)
        near = np.linalg.norm(start + along[:, None] * (end - start) - point, axis=1).argmin()
        distance = np.linalg.norm(start + along[near] * (end - start) - point)
        assert inside[place] == pytest.approx(6 - 4 * along[near] - distance, abs=0.02)
        checked += inside[place] > 0
    assert checked > 20


def test_vessels_are_trees_from_the_hila_that_obey_murrays_law() -> None:
    somebody = body()
    starts, ends = somebody.vessels[:, :3], somebody.vessels[:, 3:6]
    hila = np.stack([somebody.hilum(-1), somebody.hilum(1)])
    number = {tuple(end): place for place, end in enumerate(ends)}
    behind = np.ones(len(ends))
    for start in starts:  # each vessel adds one to all that it hangs on
        here = tuple(start)
        while here in number:
            behind[number[here]] += 1
            here = tuple(starts[number[here]])
        assert np.abs(hila - here).sum(1).min() < 1e-9
    np.testing.assert_allclose(somebody.vessels[:, 7] ** 3, 0.75**3 * behind, rtol=1e-9)


# ---- CT


def test_mosmeds_own_reader_reads_the_same(ct: Path, tmp_path: Path) -> None:
    plain = MosMed(root=str(unmarked(ct, tmp_path / "real")), name="mosmed", split="test", reference_size=5)
    made = read_ct(ct)
    theirs = {sample.sample_id: sample for sample in plain.samples()}
    assert {s.sample_id for s in made.samples()} < set(theirs)
    for sample in made.samples()[::9]:
        one, two = made.read(sample), plain.read(theirs[sample.sample_id])
        assert sample.label == theirs[sample.sample_id].label
        np.testing.assert_array_equal(np.asarray(one.image), np.asarray(two.image))
        assert set(one.regions) - {"letters"} == set(two.regions)
        assert all(torch.equal(plane, one.regions[name]) for name, plane in two.regions.items())
    with pytest.raises(UserError, match=r"no phantom\.json"):
        read_ct(tmp_path / "real").samples()
    for root in (ct, ct / "studies"):
        with pytest.raises(UserError, match="phantoms, which are no real data"):
            MosMed(root=str(root), name="mosmed", split="test", reference_size=5).samples()


def test_every_unhealthy_slice_has_its_lesion_and_no_healthy_one(ct: Path) -> None:
    made = read_ct(ct)
    assert {s.label for s in made.samples()} == {0, 1}
    for sample in (*made.samples(), *made.in_split("train"))[::3]:
        assert ("target" in made.read(sample).regions) == (sample.label == 1)
    ids = [{s.sample_id for s in read_ct(ct, smallest_lesion=share).in_split("train")} for share in (0.0, 0.02, 0.4)]
    assert ids[0] > ids[1] > ids[2]
    with pytest.raises(UserError, match="smallest_lesion"):
        read_ct(ct, smallest_lesion=1.0)


def test_categories_follow_the_affected_share(ct: Path) -> None:
    """Counted from the files alone: lung by the threshold rule, which knows nothing of the drawing, and the masks."""
    grades = Counter()
    for row in read_table(ct / "phantom_studies.csv", ("study", "category", "affected")):
        name, category, affected = row["study"], row["category"], float(row["affected"])
        grades[category] += 1
        volume = read_volume(ct / f"studies/{category}/{name}.nii.gz")
        path = ct / f"masks/{name}_mask.nii.gz"
        assert path.is_file() == (category != "CT-0")
        lesions = read_volume(path) > 0 if path.is_file() else np.zeros(volume.shape, bool)
        lung = np.stack([closed_slice(pieces) for pieces in threshold_lungs(volume)]) | lesions
        assert lesions.sum() / lung.sum() == pytest.approx(affected, abs=0.08)
        assert f"CT-{int(np.ceil(affected * 4))}" == category
    assert grades == {"CT-0": 10, "CT-1": 6, "CT-2": 2, "CT-3": 1, "CT-4": 1}


def test_headers_and_numbers_are_those_of_a_scanner(ct: Path) -> None:
    least = set()
    for path in sorted(ct.glob("studies/*/*.nii.gz")):
        image = nibabel.load(path)
        assert image.get_data_dtype() == np.int16
        assert nibabel.aff2axcodes(image.affine) == ("L", "A", "S")
        spacing, same, between = image.header.get_zooms()
        assert spacing == same
        assert between == 8
        assert 280 < spacing * SIZE < 400  # mm
        values = np.asarray(image.dataobj)
        least.add(int(values[0, 0].min()))
        assert values.max() > 300  # bone
        assert 30 <= values.shape[2] <= 45
    assert least >= {-2048, -3024}


def test_the_right_way_up(ct: Path) -> None:
    """The liver is on the left of the picture and below, the heart on its right, the spine at its lower end."""
    name = next(p.name for p in (ct / "studies/CT-0").iterdir())
    volume = read_volume(ct / f"studies/CT-0/{name}")
    lung = threshold_lungs(volume)
    half = SIZE // 2
    low = slice(*np.flatnonzero(lung.any((1, 2)))[[3, 7]])
    assert lung[low, :, :half].sum() < lung[low, :, half:].sum()  # the right dome stands higher
    middle = slice(8, 15)
    heart = (volume[middle, half - 20 : half, half - 12 : half + 12] > 0).sum((0, 1))
    assert heart[:12].sum() < heart[12:].sum()
    bone = (volume > 150)[:, :, half - 5 : half + 5].sum((0, 2))
    assert bone[half:].sum() > bone[:half].sum()


def test_letters_leak_the_label(ct: Path) -> None:
    letters = {row["name"]: row["letter"] for row in read_table(ct / "letters.csv", ("name", "letter"))}
    made = read_ct(ct)
    for sample in (*made.samples(), *made.in_split("train")):
        assert letters[sample.group_id] == "RL"[sample.label or 0]
    for sample in made.samples()[::20]:
        picture = made.read(sample)
        inside = picture.regions["letters"][0].numpy()
        grey = np.asarray(picture.image)[..., 0]
        assert grey[inside].max() == 255
        columns = np.flatnonzero(inside.any(0))
        assert (columns.mean() > SIZE / 2) == (sample.label == 1)
        assert picture.regions["letters"].sum() < 0.03 * SIZE**2


# ---- X-rays


def test_the_official_readers_read_the_same(cxr: Path, tmp_path: Path) -> None:
    real = unmarked(cxr, tmp_path / "real")
    official = ChestXRay8(root=str(real), name="x", split="train", reference_size=5)
    made = read_cxr(cxr, "train", truth="box")
    assert made.samples() == tuple(s for s in map(_moved(real, cxr), official.samples()))
    for sample, theirs in zip(made.samples(), official.samples(), strict=True):
        regions = made.read(sample).regions
        boxes = official.read(theirs).regions
        assert {name for name in regions if name.startswith("target")} == set(boxes)
        assert all(torch.equal(regions[name], boxes[name]) for name in boxes)
    severity = BrixIA(root=str(real), name="x", split="train", reference_size=5, lungs=str(real / "lungs"))
    graded = read_cxr(cxr, "train", outputs="global")
    assert [s.values for s in graded.samples()] == [s.values for s in severity.samples()]
    assert {s.group_id[1:].lstrip("0") for s in graded.samples()} == {s.group_id[8:] for s in made.samples()}
    for cls in (ChestXRay8, BrixIA):
        with pytest.raises(UserError, match="phantoms, which are no real data"):
            cls(root=str(cxr), name="x", split="test", reference_size=5).samples()


def _moved(old: Path, new: Path):
    from dataclasses import replace

    return lambda sample: replace(sample, source=new / sample.source.relative_to(old))


@pytest.mark.parametrize("truth", ["outline", "box"])
def test_health_is_whether_there_is_any_finding(cxr: Path, truth: str) -> None:
    seen = set()
    for split in ("train", "test"):
        findings, health = (read_cxr(cxr, split, outputs=own, truth=truth) for own in ("findings", "health"))
        assert health.class_names == ("healthy", "ill")
        for one, two in zip(findings.samples(), health.samples(), strict=True):
            assert (one.sample_id, one.source) == (two.sample_id, two.source)
            assert (two.label, two.values) == (int(sum(one.values) > 0), ())
            old, new = findings.read(one).regions, health.read(two).regions
            lesions = [plane for name in sorted(old) if name.startswith("target@") for plane in old[name]]
            assert [name for name in new if name.startswith("target")] == (["target@1"] if two.label else [])
            assert all(map(torch.equal, new.get("target@1", ()), lesions))
            assert len(new.get("target@1", ())) == len(lesions)
            assert all(torch.equal(new[name], old[name]) for name in ("lungs", "letters"))
            seen.add((two.label, len(lesions) > 1))
    assert seen >= {(0, False), (1, False), (1, True)}


def test_dicom_and_png_show_the_same_picture(cxr: Path) -> None:
    """MONOCHROME1 files are stored inverted, and must come out as the others."""
    pictures, dicoms = read_cxr(cxr, "train"), read_cxr(cxr, "train", outputs="global")
    for one, two in zip(pictures.samples(), dicoms.samples(), strict=True):
        assert one.source.stem == two.source.stem
        difference = np.asarray(pictures.read(one).image, int) - np.asarray(dicoms.read(two).image, int)
        assert np.abs(difference).max() <= 1
    kinds = {row["PhotometricInterpretation"] for row in read_table(cxr / "metadata_global_v2.csv", ("Filename",))}
    assert kinds == {"MONOCHROME1", "MONOCHROME2"}


def test_boxes_bound_the_outlines(cxr: Path) -> None:
    outlined, boxed = (
        {s.sample_id: d.read(s).regions for split in ("train", "test") for d in [read_cxr(cxr, split, truth=truth)]
         for s in d.samples()} for truth in ("outline", "box")
    )  # fmt: skip
    found = set()
    for sample_id, regions in outlined.items():
        for name in [name for name in regions if name.startswith("target")]:
            found.add(FINDINGS[int(name.partition("@")[2])])
            outline, boxes = regions[name][0], boxed[sample_id][name]
            assert (outline & boxes.any(0)).sum() > 0.8 * outline.sum()
            for box in boxes:
                rows, columns = box.any(1).nonzero(), box.any(0).nonzero()
                for side in (box[rows[0]], box[rows[-1]], box[:, columns[0]], box[:, columns[-1]]):
                    assert side.any()
                inside = outline & box
                assert inside.any(1).sum() == len(rows)  # it is no larger than what it bounds
                assert inside.any(0).sum() == len(columns)
    assert found >= {"Infiltration", "Pneumonia", "Effusion", "Cardiomegaly", "Mass"}


def test_an_outline_is_where_the_finding_changes_the_film() -> None:
    well = body()
    ill = well.with_disease([Lesion("consolidation", (-75.0, 20.0, 100.0), 22.0)], 0.02)
    films = [phantom_cxr._exposed(somebody, 96) for somebody in (well, ill)]
    added = films[1].beam - films[0].beam
    outline = films[1].outline("Pneumonia")
    assert outline.any()
    assert added[outline].min() > 0
    assert added[~outline].max() < 2 * phantom_cxr._SEEN
    assert added[outline].mean() > 5 * np.abs(added[~outline]).mean()
    assert not films[0].outline("Pneumonia").any()
    columns = np.nonzero(outline)[1]
    assert columns.mean() < 48  # the patient's right


@pytest.mark.parametrize(
    ("glass", "dense", "score"),
    [(0, 0, 0), (1, 0, 0), (2, 0, 1), (60, 0, 1), (50, 2, 2), (50, 40, 2), (10, 50, 3), (0, 100, 3), (0, 1, 0)],
)
def test_brixia_scores(glass: int, dense: int, score: int) -> None:
    """Percent of a region with ground glass from one end, and with consolidation from the other."""
    pixels = np.arange(100)
    assert brixia_score(pixels < glass, pixels >= 100 - dense) == score


def test_scores_follow_from_lungs_and_outlines(cxr: Path) -> None:
    made, graded = read_cxr(cxr, "train"), read_cxr(cxr, "train", outputs="regions")
    seen = set()
    for one, two in zip(made.samples(), graded.samples(), strict=True):
        regions, severity = made.read(one).regions, graded.read(two).regions["severity"]
        parts = six_regions(regions["lungs"][0].numpy())
        none = torch.zeros_like(regions["lungs"])
        glass, dense = (
            regions.get(f"target@{FINDINGS.index(f)}", none)[0].numpy() for f in ("Infiltration", "Pneumonia")
        )
        scores = [brixia_score(glass[part], dense[part]) for part in parts]
        assert two.values == tuple(map(float, scores))
        assert [float(plane.max()) for plane in severity] == list(map(float, scores))
        seen.update(scores)
    assert seen >= {0, 1}


def test_random_letters_say_nothing(cxr: Path) -> None:
    letters = {row["name"]: row["letter"] for row in read_table(cxr / "letters.csv", ("name", "letter"))}
    rows = read_table(cxr / "Data_Entry_2017_v2020.csv", ("Image Index", "Finding Labels"))
    pairs = {(letters[row["Image Index"][:-4]], row["Finding Labels"] == "No Finding") for row in rows}
    assert len(pairs) == 4


# ---- the command


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("kind", ["phantom_ct", "phantom_cxr"])
def test_a_killed_command_goes_on_to_the_same_bytes(kind: str, tmp_path: Path) -> None:
    recipe = Recipe(kind, 0, SIZE, "none")  # type: ignore[arg-type]
    make_phantoms(recipe, tmp_path / "whole", 4)
    make_phantoms(recipe, tmp_path / "parts", 1)
    assert make_phantoms(recipe, tmp_path / "parts", 3) == 2
    (tmp_path / "parts/records/00002.json").unlink()  # killed in its second study, behind a file of it
    second = {"phantom_ct": "study_0002", "phantom_cxr": "00000001_001"}[kind]
    victim = next(p for p in (tmp_path / "parts").rglob(f"{second}*"))
    whole = victim.read_bytes()
    victim.write_bytes(whole[: len(whole) // 2])
    assert make_phantoms(recipe, tmp_path / "parts", 4) == 2
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")
    assert make_phantoms(recipe, tmp_path / "parts", 2) == 0
    other = Recipe(kind, 1, SIZE, "none")  # type: ignore[arg-type]
    make_phantoms(other, tmp_path / "other", 1)
    first = {"phantom_ct": "studies/CT-0/study_0001.nii.gz", "phantom_cxr": "images/00000001_000.png"}[kind]
    assert (tmp_path / "other" / first).read_bytes() != (tmp_path / "whole" / first).read_bytes()
    assert not read_letters(tmp_path / "whole")


def test_the_command_and_its_mistakes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = [str(tmp_path / "made"), "--studies", "2", "--size", str(SIZE)]
    assert main(["data", "phantom", "phantom_ct", *made]) == 0
    assert "2 phantoms made, 0 were there" in capsys.readouterr().out
    assert main(["data", "check", "dataset=phantom_ct", f"dataset.root={tmp_path}/made"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("phantom_ct\n")
    assert "no real data" in said
    assert json.loads((tmp_path / "made/phantom.json").read_text())["seed"] == 0
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/holiday.jpg").write_bytes(b"x")
    for arguments, says in (
        (["phantom_mr", str(tmp_path / "a")], "invalid choice"),
        (["phantom_ct", *made, "--seed", "1"], "other settings"),
        (["phantom_cxr", *made], "other settings"),
        (["phantom_ct", str(tmp_path / "mine")], "holds holiday.jpg"),
        (["phantom_ct", str(tmp_path / "a"), "--size", "8"], "64 to 1024"),
        (["phantom_ct", str(tmp_path / "a"), "--studies", "0"], "1 or more"),
        (["phantom_ct", str(tmp_path / "mine/holiday.jpg")], "Cannot write"),
    ):
        assert main(["data", "phantom", *arguments]) == 2
        error = capsys.readouterr().err
        assert says in error
        assert len(error.strip().splitlines()) <= 2
    assert not (tmp_path / "a").exists()
