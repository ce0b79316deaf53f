"""`folder`: the table's rules, boxes and masks pixel by pixel, every kind of file, and paths that try to leave."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ibxai.cli import main
from ibxai.datasets.folder import Folder
from ibxai.datasets.loading import load_batches
from ibxai.errors import BadSample, UserError
from ibxai.preprocessing import Preprocessing
from ibxai.targets import Label

HEADER = "path,target,group,split,slice,x,y,width,height,mask\n"


def dataset(root: Path, **settings) -> Folder:
    return Folder(**({"root": str(root), "name": "mine", "split": "test", "reference_size": 5} | settings))


def picture(path: Path, width: int = 12, height: int = 8, grey: int = 100) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (width, height), grey).save(path)


def table(root: Path, lines: str, header: str = HEADER) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    (root / "samples.csv").write_text(header + lines)
    return root


def both(found: Folder) -> dict:
    return {s.sample_id: s for split in ("train", "test") for s in found.in_split(split)}


# ---- targets


def test_classes_are_the_names_of_the_table_in_order(tmp_path: Path) -> None:
    for name in "abc":
        picture(tmp_path / f"in/{name}.png")
    table(tmp_path, "in/a.png,cat,,test\nin/b.png,ant,,test\nin/c.png,cat,,train\n")
    found = dataset(tmp_path)
    assert found.class_names == ("ant", "cat")
    assert [(s.sample_id, s.label) for s in found.samples()] == [("in/a.png", 1), ("in/b.png", 0)]
    assert [s.sample_id for s in found.in_split("train")] == ["in/c.png"]
    assert both(found)["in/a.png"].size == (tmp_path / "in/a.png").stat().st_size
    other = dataset(tmp_path, classes=("cat", "dog", "ant"))
    assert [s.label for s in other.samples()] == [0, 2]
    with pytest.raises(UserError, match="'ant' is none of"):
        dataset(tmp_path, classes=("cat", "dog")).samples()


def test_labels_of_all_lines_of_a_picture_count(tmp_path: Path) -> None:
    for name in "abc":
        picture(tmp_path / f"{name}.png")
    lines = "a.png,wet|cold,,test,,1,1,2,2\na.png,dark,,test,,5,5,2,2\nb.png,,,test\nc.png,dark,,train\n"
    found = dataset(table(tmp_path, lines), targets="labels")
    assert found.class_names == ("cold", "dark", "wet")
    samples = both(found)
    assert samples["a.png"].values == (1.0, 1.0, 1.0)
    assert samples["b.png"].values == (0.0, 0.0, 0.0)
    assert (samples["c.png"].values, samples["c.png"].label) == ((0.0, 1.0, 0.0), 1)
    assert samples["a.png"].label is None
    regions = found.read(samples["a.png"]).regions  # a box belongs to what its line names
    assert set(regions) == {"target@0", "target@1", "target@2"}
    assert torch.equal(regions["target@0"], regions["target@2"])
    assert regions["target@1"][0].nonzero().tolist() == [[5, 5], [5, 6], [6, 5], [6, 6]]


def test_values_are_numbers(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    found = dataset(table(tmp_path, "a.png,-2.5e1,,test\n"), targets="value")
    assert found.samples()[0].values == (-25.0,)
    assert found.class_names == ("value",)
    for wrong in ("high", "nan", "inf", ""):
        with pytest.raises(UserError, match="a number is expected"):
            dataset(table(tmp_path, f"a.png,{wrong},,test\n"), targets="value").samples()


def test_many_classes_are_taken_for_numbers(tmp_path: Path) -> None:
    table(tmp_path, "".join(f"{n}.png,{n}.5,,test\n" for n in range(1001)))
    with pytest.raises(UserError, match="targets=value"):
        dataset(tmp_path).samples()


# ---- splits


def test_groups_never_part(tmp_path: Path) -> None:
    picture(tmp_path / "0.png")
    lines = "".join(f"{n}.png,{'ill' if n % 2 else 'well'},patient {n // 4}\n" for n in range(80))
    found = dataset(table(tmp_path, lines))
    groups = [{s.group_id for s in found.in_split(split)} for split in ("train", "test")]
    assert not groups[0] & groups[1]
    assert len(groups[0]) == 14  # 70 % of 20
    assert len(both(found)) == 80
    assert [s.sample_id for s in dataset(tmp_path, split_seed=1).samples()] != [s.sample_id for s in found.samples()]
    leaking = "a.png,x,one,train\n0.png,x,one,test\n"
    with pytest.raises(UserError, match="train and in the test split"):
        dataset(table(tmp_path, leaking)).samples()
    with pytest.raises(UserError, match="line 3: no split"):
        dataset(table(tmp_path, "a.png,x,,train\n0.png,x\n")).samples()


# ---- regions


def test_a_box_holds_the_pixels_whose_centre_it_holds(tmp_path: Path) -> None:
    picture(tmp_path / "a.png", 12, 8)
    found = dataset(table(tmp_path, "a.png,cat,,test,,2.4,1.6,3.2,2.0\na.png,cat,,test,,0,0,1,1\n"))
    planes = found.read(found.samples()[0]).regions["target@0"]
    slow = torch.zeros(2, 8, 12, dtype=torch.bool)
    for plane, (x, y, w, h) in zip(slow, ((2.4, 1.6, 3.2, 2.0), (0, 0, 1, 1)), strict=True):
        for row in range(8):
            for column in range(12):
                plane[row, column] = x <= column + 0.5 < x + w and y <= row + 0.5 < y + h
    assert torch.equal(planes, slow)
    digests = {found.annotations()}
    table(tmp_path, "a.png,cat,,test,,2.4,1.6,3.2,2.1\n")
    digests.add(dataset(tmp_path).annotations())
    assert len(digests) == 2
    outside = dataset(table(tmp_path, "a.png,cat,,test,,40,1,3,3\n"))
    with pytest.raises(BadSample, match="covers no pixel"):
        outside.read(outside.samples()[0])


def test_a_mask_is_white_where_the_evidence_lies(tmp_path: Path) -> None:
    picture(tmp_path / "a.png", 4, 3)
    Image.fromarray(np.array([[0, 255, 0, 0], [0, 200, 127, 128], [0, 0, 0, 0]], np.uint8)).save(tmp_path / "m.png")
    found = dataset(table(tmp_path, "a.png,cat,,test,,,,,,m.png\n"))
    plane = found.read(found.samples()[0]).regions["target@0"]
    assert plane.dtype == torch.bool
    assert plane[0].nonzero().tolist() == [[0, 1], [1, 1], [1, 3]]
    digest = found.annotations()
    picture(tmp_path / "m.png", 5, 3)
    assert dataset(tmp_path).annotations() != digest
    with pytest.raises(BadSample, match="5 x 3, it is 4 x 3"):
        found.read(found.samples()[0])
    (tmp_path / "m.png").unlink()
    with pytest.raises(BadSample, match=r"its mask m\.png"):
        found.read(found.samples()[0])


def test_a_region_goes_to_the_rows_that_explain_it(tmp_path: Path) -> None:
    picture(tmp_path / "a.png", 8, 8)
    picture(tmp_path / "b.png", 8, 8)
    found = dataset(table(tmp_path, "a.png,cat,,test,,2,2,3,3\nb.png,ant,,test\n"))
    work = [(sample, (0,)) for sample in found.samples()]
    (loaded,) = load_batches(found, work, Label(), Preprocessing(8, 8, (0.0,) * 3, (1.0,) * 3), 4, 0)
    assert loaded.batch is not None
    assert loaded.batch.regions["target"].sum((1, 2, 3)).tolist() == [9, 0]


# ---- volumes and DICOM


def test_slices_of_a_volume(tmp_path: Path) -> None:
    nibabel = pytest.importorskip("nibabel")
    volume = np.arange(2 * 3 * 4, dtype=np.int16).reshape(2, 3, 4)  # to the right, to the front, to the head
    nibabel.save(nibabel.Nifti1Image(volume, np.eye(4)), tmp_path / "v.nii.gz")
    nibabel.save(nibabel.Nifti1Image((volume == 14).astype(np.uint8), np.eye(4)), tmp_path / "m.nii.gz")
    lines = "v.nii.gz,ill,p,test,2,,,,,m.nii.gz\nv.nii.gz,ill,p,test,0\nv.nii.gz,ill,p,test,9\n"
    found = dataset(table(tmp_path, lines), level=12.0, width=8.0)
    samples = both(found)
    assert list(samples) == ["v.nii.gz_slice_000", "v.nii.gz_slice_002", "v.nii.gz_slice_009"]
    image = found.read(samples["v.nii.gz_slice_002"])
    values = volume[::-1, ::-1, 2].T  # front at the top, the patient's right on the left
    shown = np.rint(np.clip((values - 12) / 8 + 0.5, 0, 1) * 255)
    np.testing.assert_array_equal(np.asarray(image.image)[..., 1], shown)
    np.testing.assert_array_equal(image.regions["target@0"][0].numpy(), values == 14)
    with pytest.raises(BadSample, match="4 slices, and number 9"):
        found.read(samples["v.nii.gz_slice_009"])
    plain = dataset(tmp_path)
    whole = np.rint(values / 23 * 255)
    np.testing.assert_array_equal(np.asarray(plain.read(samples["v.nii.gz_slice_002"]).image)[..., 0], whole)
    assert plain.samples()[0].decoding != found.samples()[0].decoding
    for lines, says in (
        ("v.nii.gz,ill,,test\n", "number of its axial slice"),
        ("a.png,ill,,test,3\n", "no NIfTI volume"),
        ("v.nii.gz,ill,,test,-1\n", "number of its axial slice"),
        ("a.png,ill,,test,,,,,,m.nii.gz\n", "a picture is expected"),
    ):
        with pytest.raises(UserError, match=says):
            dataset(table(tmp_path, lines)).samples()


def test_dicom_in_its_own_window_or_in_yours(tmp_path: Path) -> None:
    pytest.importorskip("pydicom")
    from ibxai.datasets.phantom_cxr import _dicom

    ramp = np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)
    (tmp_path / "a.dcm").write_bytes(_dicom("a", 1, ramp, "MONOCHROME2"))
    found = dataset(table(tmp_path, "a.dcm,ill,,test\n"))
    own = np.asarray(found.read(found.samples()[0]).image)[..., 0].astype(int)
    assert np.abs(own - ramp * 255).max() <= 1
    mine = dataset(tmp_path, level=1000.0, width=500.0)
    shown = np.asarray(mine.read(mine.samples()[0]).image)[..., 0]
    stored = np.rint(ramp * 4095)
    np.testing.assert_array_equal(shown, np.rint(np.clip((stored - 1000) / 500 + 0.5, 0, 1) * 255))


# ---- safety, and mistakes


def test_no_path_leaves_the_folder(tmp_path: Path) -> None:
    picture(tmp_path / "secret.png")
    root = tmp_path / "root"
    picture(root / "in/a.png")
    (root / "link.png").symlink_to(tmp_path / "secret.png")
    (root / "away").symlink_to(tmp_path)
    (root / "loop").symlink_to(root / "loop")
    (root / "inner.png").symlink_to(root / "in/a.png")
    outside = ("../secret.png", str(tmp_path / "secret.png"), "in/../../secret.png", "link.png", "away/secret.png")
    for path in (*outside, "/etc/passwd", "loop", "a\0b", str(root / "in/a.png")):
        for line in (f"{path},x,,test\n", f"in/a.png,x,,test,,,,,,{path}\n"):
            with pytest.raises(UserError, match=r"is not inside|cannot be read|is no table") as error:
                dataset(table(root, line)).samples()
            assert len(str(error.value).splitlines()) <= 2
    with pytest.raises(UserError, match="not inside"):
        dataset(root, table="../samples.csv").samples()
    found = dataset(table(root, "inner.png,x,,test\n"))
    assert found.read(found.samples()[0]).image.size == (12, 8)


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        ("", "no line below its header"),
        (",cat,,test\n", "line 2: no path"),
        ("a.png,,,test\n", "line 2: no target"),
        ("a.png,cat,,val\n", "train or test is expected"),
        ("a.png,cat,,test,,1,2,3\n", "is no box"),
        ("a.png,cat,,test,,1,2,0,3\n", "is no box"),
        ("a.png,cat,,test,,1,2,nan,3\n", "is no box"),
        ("a.png,cat,,test,,a,2,3,3\n", "is no box"),
        ("a.png,cat,,test\na.png,dog,,test\n", "line 3: a.png has another target"),
        ("a.png,cat,p,test\na.png,cat,q,test\n", "another target, group or split"),
        ("b.png,cat,,test\n", "none of the 1 pictures"),
    ],
)
def test_mistakes_in_the_table_are_named(tmp_path: Path, lines: str, says: str) -> None:
    picture(tmp_path / "a.png")
    with pytest.raises(UserError, match=says) as error:
        dataset(table(tmp_path, lines)).samples()
    assert len(str(error.value).splitlines()) <= 2


def test_mistakes_around_the_table(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there is no samples\.csv"):
        dataset(tmp_path).samples()
    picture(tmp_path / "a.png")
    with pytest.raises(UserError, match="no column 'target'"):
        dataset(table(tmp_path, "a.png,cat\n", "path,label\n")).samples()
    with pytest.raises(UserError, match="a column 'bbox'"):
        dataset(table(tmp_path, "a.png,cat,1\n", "path,target,bbox\n")).samples()
    for wrong in ({"level": 1.0}, {"width": 1.0}, {"level": 1.0, "width": 0.0}):
        with pytest.raises(UserError, match=r"dataset\.level"):
            dataset(tmp_path, **wrong)


def test_the_tables_of_excel_are_read(tmp_path: Path) -> None:
    picture(tmp_path / "été.png")
    (tmp_path / "samples.csv").write_bytes("\ufeffpath;target\r\nété.png;Straße\r\n".encode())
    found = dataset(tmp_path)
    assert found.class_names == ("Straße",)
    assert list(both(found)) == ["été.png"]


def test_data_check_lists_what_cannot_be_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in "abcd":
        picture(tmp_path / f"{name}.png")
    (tmp_path / "d.png").write_bytes(b"no picture")
    table(tmp_path, "".join(f"{name}.png,x,,{'test' if name > 'b' else 'train'}\n" for name in "abcde"))
    assert main(["data", "check", "dataset=folder", f"dataset.root={tmp_path}"]) == 3
    said = capsys.readouterr().out
    assert "4 of them are here, 1 are not" in said
    assert "5 of 5 samples, 2 with a problem" in said
    problems = [line for line in said.splitlines() if line.startswith("  problem")]
    assert [Path(line.split()[1].rstrip(":")).name for line in problems] == ["d.png", "e.png"]
