"""ChestX-ray8 in its official layout: made files with each of its traps, boxes re-derived, and the real sample."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ibxai.datasets.chestxray8 import FINDINGS, Box, ChestXRay8, box_plane, read_boxes
from ibxai.datasets.loading import load_batches
from ibxai.errors import BadSample, UserError
from ibxai.preprocessing import Preprocessing
from ibxai.targets import MultiLabel, Predicted

REAL = Path(__file__).parents[2] / "shared" / "data" / "chestxray8"
needs_real_files = pytest.mark.skipif(not REAL.is_dir(), reason=f"the real ChestX-ray8 sample is not in {REAL}")

HEADER = (
    "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,"
    "OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y]"
)
BOX_HEADER = "Image Index,Finding Label,Bbox [x,y,w,h],,,"


def dataset(root: Path, **settings) -> ChestXRay8:
    return ChestXRay8(**({"root": str(root), "name": "chestxray8", "split": "test", "reference_size": 3} | settings))


def entry(name: str, findings: str, patient: int) -> str:
    return f"{name},{findings},0,{patient},058Y,M,PA,2500,2048,0.171,0.171"


def write(root: Path, rows: list[str], train: list[str], test: list[str], boxes: list[str] | None = None) -> None:
    root.mkdir(parents=True, exist_ok=True)
    (root / "Data_Entry_2017_v2020.csv").write_text("\n".join([HEADER, *rows]) + "\n")
    (root / "train_val_list.txt").write_text("\n".join(train) + "\n")
    (root / "test_list.txt").write_text("\n".join(test))  # without a last line end, as the official one
    if boxes is not None:
        (root / "BBox_List_2017.csv").write_text("\n".join([BOX_HEADER, *boxes]) + "\n")


def picture(path: Path, size: int = 64, mode: str = "L") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    grey = Image.fromarray(np.random.default_rng(0).integers(0, 256, (size, size), dtype=np.uint8))
    grey.convert(mode).save(path)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Five pictures of four patients over two of the archives' folders, one of them not downloaded."""
    rows = [
        entry("a_000.png", "Mass|Hernia", 1),
        entry("a_001.png", "No Finding", 1),
        entry("b_000.png", "Infiltration|Nodule", 2),
        entry("c_000.png", "Effusion|Mass", 3),
        entry("d_000.png", "Hernia", 4),
        entry("absent.png", "Mass", 5),
    ]
    boxes = [
        "b_000.png,Infiltrate,512.0,256.0,256.0,128.0",
        "b_000.png,Infiltrate,0.0,0.0,16.0,16.0",
        "b_000.png,Nodule,1000.0,1000.0,24.0,24.0",
        "absent.png,Mass,1,2,3,4",
    ]
    write(tmp_path, rows, ["a_000.png", "a_001.png", "absent.png"], ["b_000.png", "c_000.png", "d_000.png"], boxes)
    for place, (name, mode) in enumerate(
        [("a_000", "RGBA"), ("a_001", "L"), ("b_000", "L"), ("c_000", "L"), ("d_000", "L")]
    ):
        picture(tmp_path / ("images_001/images" if place < 2 else "images_012/images") / f"{name}.png", mode=mode)
    return tmp_path


def test_the_table_the_lists_and_the_labels(root: Path) -> None:
    found = dataset(root)
    assert [s.sample_id for s in found.samples()] == ["b_000", "c_000", "d_000"]
    assert [s.sample_id for s in found.in_split("train")] == ["a_000", "a_001"]
    assert [s.group_id for s in found.in_split("train")] == ["patient-1"] * 2
    assert found.class_names == FINDINGS[:8]
    effusion, mass = FINDINGS.index("Effusion"), FINDINGS.index("Mass")
    a, healthy = found.in_split("train")
    assert [i for i, value in enumerate(a.values) if value] == [mass]  # Hernia is none of the 8
    assert healthy.values == (0.0,) * 8
    assert healthy.label is None
    _, c, d = found.samples()
    assert [i for i, value in enumerate(c.values) if value] == [effusion, mass]
    assert (a.label, c.label, d.label) == (mass, None, None)  # of two findings without a box none decides
    assert ("pictures", "5 of them are here, 1 are not") in found.facts()
    assert ("boxes", "3 on 1 of the pictures") in found.facts()
    assert found.reference() == found.in_split("train")


def test_fourteen_findings(root: Path) -> None:
    found = dataset(root, classes=14)
    assert len(found.class_names) == 14
    assert found.samples()[2].label == FINDINGS.index("Hernia")
    assert [i for i, v in enumerate(found.in_split("train")[0].values) if v] == [4, 13]


def test_a_finding_that_alone_has_a_box_is_the_label(root: Path) -> None:
    boxes = root / "BBox_List_2017.csv"
    boxes.write_text("\n".join(line for line in boxes.read_text().splitlines() if "Nodule" not in line))
    assert dataset(root).samples()[0].label == FINDINGS.index("Infiltration")


def test_boxes_belong_to_their_finding_and_both_spellings_are_one(root: Path) -> None:
    found = dataset(root)
    regions = found.read(found.samples()[0]).regions
    assert set(regions) == {"target@3", "target@5"}  # Infiltration, spelt Infiltrate in the file, and Nodule
    wide, small = regions["target@3"]
    assert wide.nonzero().min(0).values.tolist() == [16, 32]  # 64 pixels stand for 1024
    assert wide.nonzero().max(0).values.tolist() == [23, 47]
    assert int(small.sum()) == 1
    assert not found.read(found.samples()[1]).regions


def test_a_row_is_judged_by_the_boxes_of_what_it_explains(root: Path) -> None:
    found = dataset(root)
    prepare = Preprocessing(64, 64, (0.0,) * 3, (1.0,) * 3)

    def areas(spec) -> list[list[int]]:
        work = [(sample, tuple(range(len(spec.names())))) for sample in found.samples()]
        (loaded,) = load_batches(found, work, spec, prepare, 16, 0)
        assert loaded.batch is not None
        return loaded.batch.regions["target"].sum((2, 3)).tolist()

    several = MultiLabel((5, 3, 0))
    by_hand = [[int(p.sum()) for p in found.read(found.samples()[0]).regions[f"target@{c}"]] for c in (5, 3)]
    assert areas(several)[:2] == [[*by_hand[0], 0], by_hand[1]]
    assert areas(several)[2:] == [[0, 0]] * 7


def test_what_the_network_predicts_is_judged_by_the_boxes_of_the_label(root: Path) -> None:
    boxes = root / "BBox_List_2017.csv"
    boxes.write_text("\n".join(line for line in boxes.read_text().splitlines() if "Nodule" not in line))
    found = dataset(root)
    prepare = Preprocessing(64, 64, (0.0,) * 3, (1.0,) * 3)
    for spec in (Predicted(), MultiLabel("predicted")):
        (loaded,) = load_batches(found, [(found.samples()[0], (0,))], spec, prepare, 4, 0)
        assert loaded.batch is not None
        assert loaded.batch.regions["target"].sum((2, 3)).tolist() == [[16 * 8, 1]]


def test_an_rgba_picture_is_the_same_as_its_grey_one(root: Path) -> None:
    found = dataset(root)
    rgba, grey = (np.asarray(found.read(s).image) for s in found.in_split("train"))
    assert rgba.shape == (64, 64, 3)
    np.testing.assert_array_equal(rgba, grey)  # the same noise, alpha 255


@pytest.mark.parametrize("size", [64, 100, 1024])
def test_box_planes_agree_with_a_slow_derivation(size: int) -> None:
    """A pixel is of the box when its centre, in the coordinates of 1024 x 1024, is at least x and less than x + w."""
    draw = np.random.default_rng(3)
    for _ in range(5 if size > 100 else 30):
        x, y = draw.uniform(-20, 990, 2)
        w, h = draw.uniform(25, 400, 2)
        found = box_plane(Box("Mass", (x, y, w, h)), size, size).numpy()
        centres = (np.arange(size) + 0.5) * 1024 / size
        inside_x, inside_y = (centres >= x) & (centres < x + w), (centres >= y) & (centres < y + h)
        assert found.any()
        np.testing.assert_array_equal(found, inside_y[:, None] & inside_x[None])


def test_a_box_outside_makes_a_bad_sample() -> None:
    with pytest.raises(BadSample, match="covers no pixel"):
        box_plane(Box("Mass", (1100.0, 5.0, 20.0, 20.0)), 64, 64)


@pytest.mark.parametrize(
    "line", ["a.png,Mass,1,2,3", "a.png,Mass,1,2,nan,4", "a.png,Mass,1,2,0,4", "a.png,Mass,x,2,3,4"]
)
def test_a_line_that_is_no_box(tmp_path: Path, line: str) -> None:
    path = tmp_path / "BBox_List_2017.csv"
    path.write_text(f"{BOX_HEADER}\na.png,Mass,1,2,3,4,,,\n{line}\n")
    with pytest.raises(UserError, match="line 3"):
        read_boxes(path)
    path.write_text(f"{BOX_HEADER}\na.png,Mass,1,2,3,4,,,\n")  # 9 cells, as some editors save it
    assert read_boxes(path) == {"a.png": (Box("Mass", (1.0, 2.0, 3.0, 4.0)),)}


def test_a_patient_in_both_splits_is_refused(root: Path) -> None:
    with (root / "test_list.txt").open("a") as file:
        file.write("\na_001.png\n")
    (root / "train_val_list.txt").write_text("a_000.png\n")
    with pytest.raises(UserError, match=r"patient-1 .*train and in the test split"):
        dataset(root).samples()


def test_what_is_missing_is_said_in_two_lines(tmp_path: Path, root: Path) -> None:
    def says(folder: Path) -> str:
        with pytest.raises(UserError) as found:
            dataset(folder).samples()
        first, second = str(found.value).splitlines()
        assert "nihcc.app.box.com" in second
        assert "dataset.root" in second
        return first

    assert "does not exist" in says(tmp_path / "nowhere")
    assert "is a file" in says(root / "test_list.txt")
    (tmp_path / "empty").mkdir()
    assert "Data_Entry_2017_v2020.csv" in says(tmp_path / "empty")
    write(tmp_path / "none", [entry("x.png", "Mass", 1)], ["x.png"], [])
    assert "no picture" in says(tmp_path / "none")
    (root / "train_val_list.txt").unlink()
    assert "train_val_list.txt" in says(root)


def test_without_the_boxes_file_metrics_that_need_it_stop(root: Path) -> None:
    digest = dataset(root).annotations()
    assert len(digest) == 64
    path = root / "BBox_List_2017.csv"
    path.write_text(path.read_text().replace("512.0", "500.0"))
    assert dataset(root).annotations() != digest
    path.unlink()
    assert len(dataset(root).samples()) == 3
    with pytest.raises(UserError, match="BBox_List_2017"):
        dataset(root).annotations()


def test_an_unknown_finding_and_a_broken_table(root: Path) -> None:
    table = root / "Data_Entry_2017_v2020.csv"
    text = table.read_text()
    table.write_text(text.replace("Mass|Hernia", "Mass|Toothache"))
    with pytest.raises(UserError, match="Toothache"):
        dataset(root).samples()
    table.write_text(text.replace("Patient ID", "Person"))
    with pytest.raises(UserError, match="no column 'Patient ID'"):
        dataset(root).samples()
    table.write_bytes(b"\xff\xfe\x00\x00" * 10)
    with pytest.raises(UserError, match="UTF-8"):
        dataset(root).samples()


def test_bad_pictures_are_bad_samples(root: Path) -> None:
    path = root / "images_012/images/c_000.png"
    path.write_bytes(path.read_bytes()[:200])
    found = dataset(root)
    with pytest.raises(BadSample, match="cut short"):
        found.read(found.samples()[1])
    assert found.read(found.samples()[0]).image.size == (64, 64)


# ---- the real sample


@needs_real_files
def test_the_real_sample() -> None:
    found = dataset(REAL, classes=14, reference_size=1000)
    train, test = found.in_split("train"), found.in_split("test")
    assert (len(train), len(test)) == (75, 25)
    assert not {s.group_id for s in train} & {s.group_id for s in test}
    counts = dict(zip(FINDINGS, np.sum([s.values for s in (*train, *test)], axis=0).tolist(), strict=True))
    stated = {  # of the README that lies beside the files
        "Atelectasis": 11, "Cardiomegaly": 10, "Effusion": 11, "Infiltration": 10, "Mass": 10, "Nodule": 10,
        "Pneumonia": 10, "Pneumothorax": 10, "Consolidation": 6, "Edema": 5, "Emphysema": 5, "Fibrosis": 9, "Hernia": 5,
        "Pleural_Thickening": 7,
    }  # fmt: skip
    assert counts == stated
    assert sum(sum(s.values) == 0 for s in (*train, *test)) == 20
    boxed = {s.sample_id: found.read(s).regions for s in test}
    assert sum(map(bool, boxed.values())) == 12  # every picture with a box is in the test list
    assert boxed["00026911_000"].keys() == {"target@3"}  # one of the 123 boxes called Infiltrate


@needs_real_files
def test_the_real_boxes_file_has_984_boxes() -> None:
    boxes = read_boxes(REAL / "BBox_List_2017.csv")
    assert sum(map(len, boxes.values())) == 984
    assert len(boxes) == 880
    assert {box.finding for own in boxes.values() for box in own} == set(FINDINGS[:8])
    assert sum(box.finding == "Infiltration" for own in boxes.values() for box in own) == 123


@needs_real_files
@pytest.mark.parametrize("name", ["00000100", "00001369", "00002578", "00004934", "00005224", "00005813"])
def test_the_real_rgba_pictures(name: str) -> None:
    """Alpha is 255 everywhere and R = G = B: what comes out is the red channel, three times."""
    found = dataset(REAL)
    sample = next(s for s in (*found.in_split("train"), *found.samples()) if s.sample_id == f"{name}_000")
    with Image.open(sample.source) as stored:
        assert stored.mode == "RGBA"
        red = np.asarray(stored)[..., 0]
    np.testing.assert_array_equal(np.asarray(found.read(sample).image), np.stack([red] * 3, axis=-1))
