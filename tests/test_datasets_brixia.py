"""BrixIA in both of its official layouts, DICOM in every form that X-rays come in, the six regions, and real files."""

from __future__ import annotations

import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ibxai.datasets.brixia import BrixIA, cohen_rows, hospital_rows
from ibxai.datasets.dicom import read_grey, read_xray
from ibxai.datasets.loading import load_batches, sample_table_digest
from ibxai.datasets.lungs import six_regions
from ibxai.errors import BadSample, UserError
from ibxai.preprocessing import Preprocessing
from ibxai.targets import MultiLabel, Regression

pydicom = pytest.importorskip("pydicom")
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset  # noqa: E402
from pydicom.uid import (  # noqa: E402
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLSLossless,
    RLELossless,
)

REAL = Path(__file__).parents[2] / "shared" / "data" / "brixia"
REAL_CT = REAL.parent / "mosmed" / "other_ct_not_mosmed"
needs_real_files = pytest.mark.skipif(not REAL.is_dir(), reason=f"the real BrixIA files are not in {REAL}")
needs_real_ct = pytest.mark.skipif(not REAL_CT.is_dir(), reason=f"the real CT slices are not in {REAL_CT}")

BOM = "\ufeff"
HEADER = (
    "Filename;StudyDate;Modality;Columns;Rows;Manufacturer;PhotometricInterpretation;BrixiaScore;BrixiaScoreGlobal;"
    "ConsensusTestset;Subject;StudyId;Sex;AgeAtStudyDateFiveYear"
)
ANNOTATIONS = "filename," + ",".join(f"{r}-{c}" for r in "SJ" for c in (*"ABCDEF", "Global"))


# ---- DICOM


def ramp() -> np.ndarray:
    """Every 12-bit value once, from 0."""
    return np.arange(4096, dtype=np.uint16).reshape(64, 64)


def save(
    path: Path, pixels: np.ndarray, syntax: str = ExplicitVRLittleEndian, kind: str = "MONOCHROME2", **more
) -> Path:
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = "1.2.840.10008.5.1.4.1.1.1", "1.2.3"
    meta.TransferSyntaxUID = ExplicitVRLittleEndian if syntax not in (ImplicitVRLittleEndian,) else syntax
    file = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    file.SOPClassUID, file.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    file.Rows, file.Columns = pixels.shape
    file.SamplesPerPixel, file.PhotometricInterpretation = 1, kind
    file.BitsAllocated, file.BitsStored, file.HighBit = 16, 12, 11
    file.PixelRepresentation = int(pixels.dtype.kind == "i")
    if file.PixelRepresentation:
        file.BitsStored, file.HighBit = 16, 15
    file.PixelData = pixels.tobytes()
    for name, value in more.items():
        setattr(file, name, value)
    if syntax in (RLELossless, JPEG2000Lossless, JPEGLSLossless):
        file.compress(syntax, encoding_plugin="pylibjpeg")
    path.parent.mkdir(parents=True, exist_ok=True)
    file.save_as(path, enforce_file_format=True)
    return path


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian, RLELossless, JPEG2000Lossless])
def test_transfer_syntaxes_give_the_same_numbers(tmp_path: Path, syntax: str) -> None:
    path = save(tmp_path / "a.dcm", ramp(), syntax)
    assert pydicom.dcmread(path).file_meta.TransferSyntaxUID == syntax
    found = read_grey(path)
    np.testing.assert_array_equal(found.values, ramp())
    np.testing.assert_allclose(found.shown, ramp() / 4095, atol=1e-6)


def test_monochrome1_is_turned_round(tmp_path: Path) -> None:
    plain = read_grey(save(tmp_path / "a.dcm", ramp())).shown
    inverted = read_grey(save(tmp_path / "b.dcm", 4095 - ramp(), kind="MONOCHROME1")).shown
    np.testing.assert_allclose(inverted, plain, atol=1e-6)
    assert inverted[0, 0] == 0  # the same picture: dark stays dark


def test_rescale_comes_before_the_window(tmp_path: Path) -> None:
    """Of the standard, C.11.2.1.2.1: ((x - (c - 0.5)) / (w - 1) + 0.5), cut to 0..1, of the rescaled x."""
    settings = {"RescaleSlope": "2", "RescaleIntercept": "-1024", "WindowCenter": "100", "WindowWidth": "1000"}
    found = read_grey(save(tmp_path / "a.dcm", ramp(), **settings))
    values = 2.0 * ramp() - 1024
    np.testing.assert_array_equal(found.values, values)
    np.testing.assert_allclose(found.shown, np.clip((values - 99.5) / 999 + 0.5, 0, 1), atol=1e-6)
    exact = read_grey(save(tmp_path / "b.dcm", ramp(), **settings, VOILUTFunction="LINEAR_EXACT")).shown
    np.testing.assert_allclose(exact, np.clip((values - 100) / 1000 + 0.5, 0, 1), atol=1e-6)
    sigmoid = read_grey(save(tmp_path / "c.dcm", ramp(), **settings, VOILUTFunction="SIGMOID")).shown
    np.testing.assert_allclose(sigmoid, 1 / (1 + np.exp(-4 * (values - 100) / 1000)), atol=1e-6)


def test_of_several_windows_the_first(tmp_path: Path) -> None:
    both = read_grey(save(tmp_path / "a.dcm", ramp(), WindowCenter=["2000", "100"], WindowWidth=["500", "50"])).shown
    one = read_grey(save(tmp_path / "b.dcm", ramp(), WindowCenter="2000", WindowWidth="500")).shown
    np.testing.assert_array_equal(both, one)
    assert 0.1 < float(((one > 0) & (one < 1)).mean()) < 0.13  # 499 of 4,096 values


def test_a_lookup_table_for_display(tmp_path: Path) -> None:
    table = Dataset()
    table.LUTDescriptor, table.LUTData = [4096, 0, 12], (np.arange(4096) // 16 * 16)[::-1].astype("<u2").tobytes()
    found = read_grey(save(tmp_path / "a.dcm", ramp(), VOILUTSequence=[table])).shown
    np.testing.assert_allclose(found, ((4095 - ramp()) // 16 * 16) / 4095, atol=1e-6)


@pytest.mark.parametrize("kind", ["MONOCHROME1", "MONOCHROME2"])
def test_padding_is_black_and_does_not_count_for_the_range(tmp_path: Path, kind: str) -> None:
    pixels = ramp().astype(np.int16) - 500
    pixels[0] = -2000
    found = read_grey(save(tmp_path / "a.dcm", pixels, kind=kind, PixelPaddingValue=-2000))
    assert found.padding[0].all()
    assert not found.padding[1:].any()
    assert (found.shown[0] == 0).all()
    inside = found.shown[1:] if kind == "MONOCHROME2" else 1 - found.shown[1:]
    np.testing.assert_allclose(inside, (ramp()[1:] - 64) / (4095 - 64), atol=1e-6)


def test_the_picture_is_grey_in_three_channels(tmp_path: Path) -> None:
    image = read_xray(save(tmp_path / "a.dcm", ramp()))
    assert image.mode == "RGB"
    wanted = np.rint(ramp() / 4095 * 255).astype(np.uint8)
    np.testing.assert_array_equal(np.asarray(image), np.stack([wanted] * 3, axis=-1))
    flat = np.asarray(read_xray(save(tmp_path / "b.dcm", np.full((8, 8), 7, np.uint16))))
    assert (flat == 0).all()  # a constant picture has no range: no NaN


def test_bad_files_are_bad_samples(tmp_path: Path) -> None:
    def reason(path: Path) -> str:
        with pytest.raises(BadSample) as found:
            read_xray(path)
        assert "\n" not in str(found.value)
        return str(found.value)

    (tmp_path / "empty.dcm").touch()
    assert "empty" in reason(tmp_path / "empty.dcm")
    (tmp_path / "text.dcm").write_text("hello " * 100)
    assert "not a DICOM file" in reason(tmp_path / "text.dcm")
    assert "cannot be read" in reason(tmp_path / "absent.dcm")
    whole = save(tmp_path / "whole.dcm", ramp()).read_bytes()
    (tmp_path / "cut.dcm").write_bytes(whole[: len(whole) // 2])
    assert "cut short" in reason(tmp_path / "cut.dcm")
    assert "pixels, more than" in reason(save(tmp_path / "huge.dcm", ramp(), Rows=60000, Columns=60000))
    assert "no rows" in reason(save(tmp_path / "none.dcm", ramp(), Rows=0))
    assert "strip" in reason(save(tmp_path / "strip.dcm", ramp(), Rows=1, Columns=4096))
    assert "frames" in reason(save(tmp_path / "film.dcm", ramp(), NumberOfFrames=3, Rows=16))
    assert "samples a pixel" in reason(save(tmp_path / "colour.dcm", ramp(), SamplesPerPixel=3, PlanarConfiguration=0))
    assert "PALETTE" in reason(save(tmp_path / "palette.dcm", ramp(), kind="PALETTE COLOR"))
    assert "cut short" in reason(save(tmp_path / "short.dcm", ramp(), Rows=200, Columns=100))


def test_a_header_is_judged_before_pixels_are_allocated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path / "huge.dcm", ramp(), Rows=60000, Columns=60000)
    monkeypatch.setattr(FileDataset, "pixel_array", property(lambda _: pytest.fail("pixels were asked for")))
    with pytest.raises(BadSample, match="more than"):
        read_xray(path)


def test_a_missing_decoder_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pydicom.pixels.decoders import JPEG2000LosslessDecoder

    path = save(tmp_path / "a.dcm", ramp(), JPEG2000Lossless)
    monkeypatch.setattr(JPEG2000LosslessDecoder, "_available", {})
    with pytest.raises(BadSample, match=r"pip install 'ibxai\[medical\]'"):
        read_xray(path)


def test_missing_readers_are_said_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hospital(tmp_path)
    monkeypatch.setitem(sys.modules, "pydicom", None)
    with pytest.raises(UserError, match=r"pip install 'ibxai\[medical\]'"):
        dataset(tmp_path).samples()


# ---- tables and splits


def dataset(root: Path, **settings) -> BrixIA:
    return BrixIA(**({"root": str(root), "name": "brixia", "split": "test", "reference_size": 10} | settings))


def hospital(root: Path, folder: str = "dicom_clean") -> None:
    """Seven X-rays of five patients; c is of a test patient and not in the test set, g is not downloaded."""
    lines = [
        ("a", "000001", 1, "P1"), ("b", "123321", 0, "P2"), ("c", "000000", 0, "P1"), ("d", "333333", 0, "P3"),
        ("e", "012301", 1, "P4"), ("f", "100000", 0, "P5"), ("g", "000000", 0, "P5"),
    ]  # fmt: skip
    rows = [
        f"{name}.dcm;20200403;CR;64;64;X;MONOCHROME1;{score};{sum(map(int, score))};{test};{patient};A0;M;11"
        for name, score, test, patient in lines
    ]
    root.mkdir(parents=True, exist_ok=True)
    (root / "metadata_global_v2.csv").write_bytes((BOM + "\r\n".join([HEADER, *rows]) + "\r\n").encode())
    for name, *_ in lines[:-1]:
        save(root / folder / f"{name}.dcm", ramp(), kind="MONOCHROME1")


def test_the_hospitals_table_is_read_as_text(tmp_path: Path) -> None:
    """Separated by ';', with a byte-order mark, Windows line ends, and scores whose zeros count."""
    hospital(tmp_path)
    rows = hospital_rows(tmp_path / "metadata_global_v2.csv")
    assert rows["a.dcm"].scores == (0, 0, 0, 0, 0, 1)
    assert rows["f.dcm"].scores == (1, 0, 0, 0, 0, 0)
    assert [name for name, row in rows.items() if row.consensus] == ["a.dcm", "e.dcm"]


@pytest.mark.parametrize("folder", ["dicom_clean", "dicom", "."])
def test_patients_of_the_consensus_set_do_not_train(tmp_path: Path, folder: str) -> None:
    hospital(tmp_path, folder)
    found = dataset(tmp_path)
    assert [s.sample_id for s in found.samples()] == ["a.dcm", "e.dcm"]
    assert [s.sample_id for s in found.in_split("train")] == ["b.dcm", "d.dcm", "f.dcm"]  # and not c
    assert [s.values for s in found.in_split("train")] == [(12.0,), (18.0,), (1.0,)]
    assert ("pictures", "6 of them are here, 1 are not") in found.facts()
    assert ("left out", "1 X-rays: of patients of the test set, and not in it") in found.facts()
    image = np.asarray(found.read(found.samples()[0]).image)
    np.testing.assert_array_equal(image[..., 0], np.rint((1 - ramp() / 4095) * 255).astype(np.uint8))


def test_what_the_outputs_are(tmp_path: Path) -> None:
    hospital(tmp_path)
    regions, presence = dataset(tmp_path, outputs="regions"), dataset(tmp_path, outputs="presence")
    assert regions.samples()[1].values == (0, 1, 2, 3, 0, 1)
    assert len(regions.class_names) == 6
    assert [s.values for s in presence.samples()] == [(0, 0, 1), (1, 1, 1)]  # score 3, score 2, score 0 or 1
    assert dataset(tmp_path).class_names == ("global score",)


def cohen(root: Path, rows: list[str] | None = None) -> None:
    names = ["immagine 2.png", "a.b.c.JPG", "covid.jpeg", "rgba.png"]
    rows = rows or [f"{name},3,2,1,0,0,0,6,1,1,1,1,1,1,6" for name in names]
    (root / "data/public-cohen-subset").mkdir(parents=True, exist_ok=True)
    (root / "data/public-annotations.csv").write_bytes((BOM + "\r\n".join([ANNOTATIONS, *rows])).encode())
    colours = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    for name in names:
        path = root / "data/public-cohen-subset" / name
        image = Image.fromarray(colours)
        (image.convert("RGBA") if name == "rgba.png" else image).save(path, "png" if name.endswith("png") else "jpeg")


def test_the_cohen_subset(tmp_path: Path) -> None:
    cohen(tmp_path)
    found = dataset(tmp_path, subset="cohen")
    both = {s.sample_id: s for s in (*found.in_split("train"), *found.samples())}
    assert set(both) == {"immagine 2.png", "a.b.c.JPG", "covid.jpeg", "rgba.png"}
    assert both["a.b.c.JPG"].values == (6.0,)
    junior = dataset(tmp_path / "data", subset="cohen", outputs="regions", reader="junior")
    assert all(s.values == (1,) * 6 for s in junior.samples())
    for sample in both.values():
        image = np.asarray(found.read(sample).image)
        assert (image == image[..., :1]).all()  # an X-ray has no colours


@pytest.mark.parametrize("score", ["1", "00001", "0000001", "000004", "", "00000x"])
def test_a_table_that_a_spreadsheet_has_saved(tmp_path: Path, score: str) -> None:
    hospital(tmp_path)
    path = tmp_path / "metadata_global_v2.csv"
    path.write_text(path.read_text(encoding="utf-8").replace(";123321;", f";{score};"), encoding="utf-8")
    with pytest.raises(UserError, match="leading zeros"):
        dataset(tmp_path).samples()


def test_what_is_missing_is_said_in_two_lines(tmp_path: Path) -> None:
    def says(folder: Path, **settings) -> str:
        with pytest.raises(UserError) as found:
            dataset(folder, **settings).samples()
        first, second = str(found.value).splitlines()
        assert "brixia.github.io" in second
        return first

    assert "does not exist" in says(tmp_path / "nowhere")
    assert "metadata_global_v2.csv" in says(tmp_path)
    assert "public-annotations.csv" in says(tmp_path, subset="cohen")
    hospital(tmp_path / "h")
    for path in (tmp_path / "h/dicom_clean").iterdir():
        path.unlink()
    assert "none of the 7 X-rays" in says(tmp_path / "h")


# ---- six regions


def test_each_lung_in_three_parts() -> None:
    mask = np.zeros((40, 50), bool)
    mask[3:33, 5:20] = True  # on the left of the picture: the patient's right lung
    mask[10:22, 30:45] = True
    parts = six_regions(mask)
    spans = [(np.flatnonzero(p.any(1))[[0, -1]].tolist(), np.flatnonzero(p.any(0))[[0, -1]].tolist()) for p in parts]
    assert spans == [
        ([3, 12], [5, 19]), ([13, 22], [5, 19]), ([23, 32], [5, 19]),
        ([10, 13], [30, 44]), ([14, 17], [30, 44]), ([18, 21], [30, 44]),
    ]  # fmt: skip
    np.testing.assert_array_equal(parts.sum(0), mask)  # every pixel in one


def test_lungs_that_hang_together_and_stray_pieces() -> None:
    mask = np.zeros((30, 60), bool)
    mask[0:30, 5:25] = True
    mask[0:30, 33:58] = True
    mask[10:12, 25:33] = True  # joined at the hilum
    parts = six_regions(mask)
    assert parts[:3].any(0)[:, :25].sum() == 600
    assert parts[3:].any(0)[:, 33:].sum() == 750
    np.testing.assert_array_equal(parts.sum(0), mask)
    mask[10:12, 25:33] = False
    mask[29, 59] = mask[0, 0] = True  # specks go to the nearer lung
    parts = six_regions(mask)
    assert parts[0][0, 0]
    assert parts[5][29, 59]


@pytest.mark.parametrize("columns", [slice(0, 0), slice(5, 6)])
def test_a_mask_without_two_lungs(columns: slice) -> None:
    mask = np.zeros((30, 60), bool)
    mask[3:20, columns] = True
    with pytest.raises(BadSample, match="mask"):
        six_regions(mask)


def many(root: Path, count: int = 23) -> Path:
    """Pictures x0.png ..., two of each patient but for the last; returns the collection's table, which names no one's
    last picture.
    """
    (root / "data/public-cohen-subset").mkdir(parents=True)
    names = [f"x{i}.png" for i in range(count)]
    lines = [f"{name},3,2,1,0,0,0,6,1,1,1,1,1,1,6" for name in names]
    (root / "data/public-annotations.csv").write_text("\n".join([ANNOTATIONS, *lines]))
    for name in names:
        Image.new("L", (8, 8)).save(root / "data/public-cohen-subset" / name)
    table = root / "metadata.csv"
    table.write_text("\n".join(["patientid,offset,filename", *(f"p{i // 2},0,x{i}.png" for i in range(count - 1))]))
    return table


def test_folds_of_patients(tmp_path: Path) -> None:
    """Every picture is in the test split of one fold, beside all others of its patient, and trains the other folds."""
    common = {"subset": "cohen", "patients": str(many(tmp_path))}
    folds = [dataset(tmp_path, fold=fold, **common) for fold in range(5)]
    tests = [[s.sample_id for s in fold.samples()] for fold in folds]
    assert sorted(name for test in tests for name in test) == sorted(f"x{i}.png" for i in range(23))
    assert [len({s.group_id for s in fold.samples()}) for fold in folds] == [3, 3, 2, 2, 2]  # of 12 patients
    for fold, test in zip(folds, tests, strict=True):
        assert {s.sample_id for s in fold.in_split("train")} == {f"x{i}.png" for i in range(23)} - set(test)
        for s in (*fold.samples(), *fold.in_split("train")):
            number = int(s.sample_id[1:-4])
            assert s.group_id == (f"p{number // 2}" if number < 22 else "x22.png")
        assert ("patients", "12, a picture without one being its own") in fold.facts()
    again = dataset(tmp_path, fold=0, split_seed=1, **common)
    assert {s.sample_id for s in again.samples()} != set(tests[0])
    halves = [{s.group_id for s in dataset(tmp_path, fold=fold, folds=2, **common).samples()} for fold in range(2)]
    assert [len(half) for half in halves] == [6, 6]
    assert len({sample_table_digest(fold.samples()) for fold in folds}) == 5


def test_without_the_collections_table_nothing_is_said_of_patients(tmp_path: Path) -> None:
    many(tmp_path)
    found = dataset(tmp_path, subset="cohen", fold=4)
    assert all(s.group_id == s.sample_id for s in found.samples())
    assert any("pictures of one may part" in told for _, told in found.facts())


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"fold": 5}, "dataset.fold=5: of 5 folds, 0 to 4"),
        ({"fold": -1}, "0 to 4 is expected"),
        ({"fold": 0, "subset": "hospital"}, "dataset.subset=cohen"),
        ({"patients": "x.csv", "subset": "hospital"}, "dataset.subset=cohen"),
    ],
)
def test_folds_that_cannot_be(tmp_path: Path, settings: dict[str, object], said: str) -> None:
    with pytest.raises(UserError, match=said):
        dataset(tmp_path, **({"subset": "cohen"} | settings))


def test_a_table_of_something_else_names_no_patients(tmp_path: Path) -> None:
    many(tmp_path).write_text("file;patient\nx0.png;p0")
    with pytest.raises(UserError, match="has no column 'filename'"):
        dataset(tmp_path, subset="cohen", patients=str(tmp_path / "metadata.csv")).samples()


def with_masks(root: Path) -> Path:
    """Masks that are PNG whatever their name says, one with a third value, one at the size before a re-encoding."""
    cohen(root)
    folder = root / "lung_masks"
    folder.mkdir()
    grey = np.zeros((120, 160), np.uint8)
    grey[20:110, 20:70] = grey[20:110, 90:140] = 255
    grey[0:4, 0:4] = 90
    for name in ("immagine 2.png", "a.b.c.JPG", "covid.jpeg"):
        Image.fromarray(grey).save(folder / name, "png")
    return folder


def test_severity_lungs_and_the_detectors_regions(tmp_path: Path) -> None:
    folder = with_masks(tmp_path)
    found = dataset(tmp_path, subset="cohen", outputs="presence", lungs=str(folder))
    pictures = {s.sample_id: found.read(s) for s in (*found.in_split("train"), *found.samples())}
    assert not pictures["rgba.png"].regions  # it has no mask
    for name in ("immagine 2.png", "a.b.c.JPG", "covid.jpeg"):
        regions = pictures[name].regions
        lungs = torch.zeros(60, 80, dtype=torch.bool)
        lungs[10:55, 10:35] = lungs[10:55, 45:70] = True
        assert torch.equal(regions["lungs"], lungs[None])
        wanted = torch.zeros(60, 80)
        wanted[10:25, 10:35], wanted[25:40, 10:35], wanted[40:55, 10:35] = 3, 2, 1  # A, B, C; D to F are 0
        assert regions["severity"].dtype == torch.float32
        assert torch.equal(regions["severity"].sum(0), wanted)
        assert torch.equal(regions["target@0"][0], wanted == 3)
        assert torch.equal(regions["target@1"][0], wanted == 2)
        assert torch.equal(regions["target@2"][0], lungs & (wanted < 2))
    assert ("lung masks", "for 3 of the pictures") in found.facts()


def test_worker_processes_read_the_same(tmp_path: Path) -> None:
    """Also where a dataset that has been looked at is pickled on the way to them."""
    found = dataset(tmp_path, subset="cohen", lungs=str(with_masks(tmp_path)), outputs="presence")
    before = [found.read(sample) for sample in found.samples()]
    copy = pickle.loads(pickle.dumps(found))
    for sample, picture in zip(found.samples(), before, strict=True):
        again = copy.read(sample)
        assert again.image.tobytes() == picture.image.tobytes()
        assert again.regions.keys() == picture.regions.keys()
        assert all(torch.equal(again.regions[name], plane) for name, plane in picture.regions.items())


def test_severity_arrives_as_a_degree(tmp_path: Path) -> None:
    """Through the preprocessing and the batch, where it was cut to yes and no once."""
    folder = with_masks(tmp_path)
    found = dataset(tmp_path, subset="cohen", lungs=str(folder))
    samples = sorted((*found.in_split("train"), *found.samples()), key=lambda s: s.sample_id)
    prepare = Preprocessing(30, 30, (0.0,) * 3, (1.0,) * 3)
    (loaded,) = load_batches(found, [(s, (0,)) for s in samples], Regression("mse", 0), prepare, 8, 0)
    assert loaded.batch is not None
    severity = loaded.batch.regions["severity"]
    assert severity.dtype == torch.float32
    assert loaded.batch.regions["lungs"].dtype == torch.bool
    for row, sample in enumerate(samples):
        values = severity[row].sum(0).unique().tolist()
        assert values == ([0.0] if sample.sample_id == "rgba.png" else [0.0, 1.0, 2.0, 3.0])
    assert loaded.batch.target.labels.tolist() == [6.0] * 4  # type: ignore[attr-defined]
    presence = dataset(tmp_path, subset="cohen", lungs=str(folder), outputs="presence")
    (loaded,) = load_batches(presence, [(samples[0], (0, 1))], MultiLabel((0, 2)), prepare, 8, 0)
    assert loaded.batch is not None
    three, low = loaded.batch.regions["target"][:, 0]
    assert torch.equal(three, severity[0].sum(0) == 3)
    assert int((three & low).sum()) == 0
    assert int(low.sum()) > int(three.sum())


def test_without_masks_what_needs_lungs_stops(tmp_path: Path) -> None:
    cohen(tmp_path)
    found = dataset(tmp_path, subset="cohen")
    assert not found.read(found.samples()[0]).regions
    with pytest.raises(UserError, match=r"need lung masks, and dataset\.lungs is not set"):
        found.annotations()
    with pytest.raises(UserError, match=r"dataset\.lungs"):
        dataset(tmp_path, subset="cohen", lungs=str(tmp_path / "nowhere")).samples()


def test_the_masks_of_another_picture_are_refused(tmp_path: Path) -> None:
    folder = with_masks(tmp_path)
    found = dataset(tmp_path, subset="cohen", lungs=str(folder))
    samples = {s.sample_id: s for s in (*found.in_split("train"), *found.samples())}
    Image.new("L", (160, 160)).save(folder / "covid.jpeg", "png")
    with pytest.raises(BadSample, match="160 x 160"):
        found.read(samples["covid.jpeg"])
    (folder / "a.b.c.JPG").write_bytes(b"broken")
    with pytest.raises(BadSample, match=r"lung mask a\.b\.c\.JPG"):
        found.read(samples["a.b.c.JPG"])
    Image.new("L", (160, 120)).save(folder / "immagine 2.png")
    with pytest.raises(BadSample, match="mask is empty"):
        found.read(samples["immagine 2.png"])


def test_a_mask_of_another_ending_belongs_to_a_dicom_file_alone(tmp_path: Path) -> None:
    cohen(tmp_path / "c", ["covid.jpeg,3,2,1,0,0,0,6,1,1,1,1,1,1,6", "rgba.png,3,2,1,0,0,0,6,1,1,1,1,1,1,6"])
    hospital(tmp_path / "h")
    masks = tmp_path / "masks"
    masks.mkdir()
    for name in ("covid.png", "a.png", "b.jpg"):
        grey = np.zeros((64, 64), np.uint8)
        grey[10:50, 5:25] = grey[10:50, 35:60] = 255
        Image.fromarray(grey).save(masks / name, "png")
    assert ("lung masks", "for 0 of the pictures") in dataset(tmp_path / "c", subset="cohen", lungs=str(masks)).facts()
    found = dataset(tmp_path / "h", lungs=str(masks), outputs="regions")
    assert ("lung masks", "for 2 of the pictures") in found.facts()
    severity = found.read(found.samples()[0]).regions["severity"]  # of a, 000001
    assert severity.amax((1, 2)).tolist() == [0, 0, 0, 0, 0, 1]


def test_annotations_count_scores_and_masks(tmp_path: Path) -> None:
    folder = with_masks(tmp_path)
    digests = [dataset(tmp_path, subset="cohen", lungs=str(folder), split=s).annotations() for s in ("train", "test")]
    digests.append(dataset(tmp_path, subset="cohen", lungs=str(folder), outputs="presence").annotations())
    digests.append(dataset(tmp_path, subset="cohen", lungs=str(folder), reader="junior").annotations())
    assert len(set(digests)) == 4
    before = dataset(tmp_path, subset="cohen", lungs=str(folder)).annotations()
    for path in folder.iterdir():  # another mask in a file of the same size
        path.write_bytes(path.read_bytes()[:-1] + b"x")
    assert dataset(tmp_path, subset="cohen", lungs=str(folder)).annotations() != before


# ---- real files


@needs_real_files
def test_the_real_tables() -> None:
    rows = hospital_rows(REAL / "metadata_global_v2.csv")
    assert len(rows) == 4695
    assert sum(row.consensus for row in rows.values()) == 150
    patients = {row.group for row in rows.values() if row.consensus}
    assert sum(row.group in patients and not row.consensus for row in rows.values()) == 264
    assert rows["15626316918619298757.dcm"].scores == (0, 0, 0, 0, 0, 1)
    assert len(cohen_rows(REAL / "data/public-annotations.csv", "senior")) == 192


@needs_real_files
def test_the_real_cohen_subset() -> None:
    found = dataset(REAL, subset="cohen", lungs=str(REAL / "lung_masks"))
    samples = (*found.in_split("train"), *found.samples())
    assert len(samples) == 183
    assert ("lung masks", "for 147 of the pictures") in found.facts()
    for sample in samples[::12]:
        picture = found.read(sample)
        assert picture.image.mode == "RGB"
        if picture.regions:
            assert 0.1 < float(picture.regions["lungs"].float().mean()) < 0.7
            scores = picture.regions["severity"].amax((1, 2))
            assert float(scores.sum()) == sample.values[0]


@needs_real_files
def test_the_made_dicoms_show_the_same_picture_both_ways() -> None:
    """Pairs of MONOCHROME2 and MONOCHROME1; explicit, implicit, RLE, and a narrower window."""
    paths = sorted((REAL / "made_dicom").glob("*.dcm"))
    for first, second in zip(paths[::2], paths[1::2], strict=True):
        one, two = (np.asarray(read_xray(path)).astype(int)[..., 0] for path in (first, second))
        assert one.shape == two.shape
        assert abs(one - two).max() <= 1, first.name
        assert one.std() > 20


@needs_real_ct
@pytest.mark.parametrize(
    ("name", "lowest"),
    [
        ("covid19_ny_sbu_axial_dicom/A002304_19001231-076.dcm", -3024),
        ("covid19_ny_sbu_axial_dicom/A046441_19010101-23.dcm", -2048),
        ("lidc_lungmask_dicom/0.dcm", -2048),
    ],
)
def test_hounsfield_units_of_real_ct_slices(name: str, lowest: int) -> None:
    found = read_grey(REAL_CT / name)
    assert found.values.min() == lowest
    assert found.values.shape == (512, 512)
    assert found.shown.min() >= 0
    assert found.shown.max() <= 1
    assert found.shown[0, 0] < 0.02  # outside the circle
