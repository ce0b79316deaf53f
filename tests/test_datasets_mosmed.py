"""MosMed in its official layout: orientation, window, split and masks on made volumes, lungs with a known truth, and
the real masks and CT slices.
"""

from __future__ import annotations

import gzip
import struct
from collections import Counter
from itertools import permutations, product
from pathlib import Path

import numpy as np
import pytest
import torch

from ibxai.datasets.loading import load_batches, sample_table_digest
from ibxai.datasets.lungs import closed_slice, threshold_lungs
from ibxai.datasets.mosmed import MosMed
from ibxai.datasets.nifti import axial_slices, read_volume
from ibxai.errors import BadSample, UserError
from ibxai.preprocessing import Preprocessing
from ibxai.targets import Label

nibabel = pytest.importorskip("nibabel")

REAL = Path(__file__).parents[2] / "shared" / "data" / "mosmed"
needs_real_files = pytest.mark.skipif(not REAL.is_dir(), reason=f"the real MosMed masks are not in {REAL}")

LAS = np.diag([-0.7, 0.7, 8.0, 1.0])  # as all the real files: the first axis runs to the patient's left


def dataset(root: Path, **settings) -> MosMed:
    plain = {"root": str(root), "name": "mosmed", "split": "test", "reference_size": 5, "slices": (0.0, 1.0)}
    return MosMed(**(plain | settings))


def save(path: Path, voxels: np.ndarray, affine: np.ndarray = LAS) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(voxels.astype(np.int16), affine), path)


def archive(root: Path, counts: dict[str, int], shape: tuple[int, int, int] = (8, 8, 5)) -> None:
    number = 0
    for category, count in counts.items():
        for _ in range(count):
            number += 1
            save(root / f"studies/{category}/study_{number:04d}.nii.gz", np.full(shape, -1000))


# ---- orientation


def turned(volume: np.ndarray, axes: tuple[int, ...], flips: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """A volume [right, front, head] with its axes in another order and direction, and the affine that says so."""
    stored = volume.transpose(axes)
    affine = np.zeros((4, 4))
    affine[3, 3] = 1
    for place, (axis, sign) in enumerate(zip(axes, flips, strict=True)):
        affine[axis, place] = sign
        if sign < 0:
            stored = np.flip(stored, place)
    return stored, affine


@pytest.mark.parametrize("axes", [*permutations(range(3))])
def test_every_orientation_gives_the_same_slices(tmp_path: Path, axes: tuple[int, ...]) -> None:
    """Pixel by pixel: row r, column c of slice k shows the r-th from the front, the c-th from the patient's right."""
    volume = np.random.default_rng(0).integers(-1000, 1000, (4, 5, 3))  # to the right, to the front, to the head
    right, front, head = volume.shape
    wanted = np.array(
        [[[volume[right - 1 - c, front - 1 - r, k] for c in range(right)] for r in range(front)] for k in range(head)]
    )
    for number, flips in enumerate(product((1, -1), repeat=3)):
        path = tmp_path / f"{number}.nii.gz"
        save(path, *turned(volume, axes, flips))
        np.testing.assert_array_equal(read_volume(path), wanted)
        assert axial_slices(path) == head


def header(shape: tuple[int, ...], code: int = 4, slope: float = 0.0, intercept: float = 0.0) -> bytes:
    """348 bytes of a NIfTI header that claims this shape and data type, and no voxels."""
    made = bytearray(352)
    struct.pack_into("<i", made, 0, 348)
    struct.pack_into("<8h", made, 40, len(shape), *shape, *[1] * (7 - len(shape)))
    struct.pack_into("<hh", made, 70, code, {4: 16, 128: 24, 32: 64}[code])
    struct.pack_into("<3f", made, 108, 352.0, slope, intercept)
    made[344:348] = b"n+1\0"
    return bytes(made)


def test_slope_and_intercept_of_the_header_count(tmp_path: Path) -> None:
    stored = np.arange(24, dtype="<i2")
    (tmp_path / "a.nii").write_bytes(header((2, 3, 4), slope=2.0, intercept=-1024.0) + stored.tobytes())
    assert sorted(read_volume(tmp_path / "a.nii").ravel().tolist()) == [2.0 * value - 1024 for value in range(24)]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "empty"),
        (b"nonsense" * 100, "not a NIfTI file"),
        (header((32000, 32000, 32000)), "voxels"),  # refused before 60 TB are allocated
        (header((512, 512, 40)), "cut short"),
        (header((4, 4)), "three axes"),
        (header((4, 4, 4, 7)), "three axes"),
        (header((4, 4, 4), 128), "real numbers"),
        (header((4, 4, 4), 32), "real numbers"),
    ],
)
def test_bad_volumes_are_bad_samples(tmp_path: Path, content: bytes, says: str) -> None:
    archive(tmp_path, {"CT-0": 2, "CT-1": 2})
    path = tmp_path / "studies/CT-1/study_0003.nii.gz"
    path.write_bytes(gzip.compress(content) if content else b"")
    found = dataset(tmp_path)
    samples = [s for s in (*found.in_split("train"), *found.samples()) if s.group_id == "study_0003"]
    assert samples  # it is listed, so that its reason is
    with pytest.raises(BadSample, match=says) as error:
        found.read(samples[0])
    assert "\n" not in str(error.value)


def test_a_volume_cut_short_and_one_with_nan(tmp_path: Path) -> None:
    save(tmp_path / "a.nii.gz", np.random.default_rng(0).integers(-1000, 1000, (32, 32, 8)))
    content = (tmp_path / "a.nii.gz").read_bytes()
    (tmp_path / "b.nii.gz").write_bytes(content[: len(content) // 2])
    with pytest.raises(BadSample, match="cut short"):
        read_volume(tmp_path / "b.nii.gz")
    nibabel.save(nibabel.Nifti1Image(np.full((3, 3, 3), np.nan, np.float32), LAS), tmp_path / "c.nii.gz")
    with pytest.raises(BadSample, match="not finite"):
        read_volume(tmp_path / "c.nii.gz")


# ---- samples, labels, splits


def test_slices_of_a_study_are_never_parted(tmp_path: Path) -> None:
    archive(tmp_path, {"CT-0": 20, "CT-1": 31, "CT-2": 10, "CT-3": 4, "CT-4": 2})
    found = dataset(tmp_path)
    train, test = found.in_split("train"), found.samples()
    studies = [{s.group_id for s in split} for split in (train, test)]
    assert not studies[0] & studies[1]
    assert len(train) + len(test) == 67 * 5
    kinds = Counter(Path(s.source).parent.name for s in train[::5])
    assert kinds == {"CT-0": 14, "CT-1": 22, "CT-2": 7, "CT-3": 3, "CT-4": 1}  # 70 % of each category
    for sample in (*train, *test):
        assert sample.label == (0 if sample.source.parent.name == "CT-0" else 1)
    assert [s.sample_id for s in test] == sorted(s.sample_id for s in test)


def test_the_split_follows_its_seed_and_share_alone(tmp_path: Path) -> None:
    archive(tmp_path, {"CT-0": 12, "CT-1": 12})
    ids = [[s.sample_id for s in dataset(tmp_path, split_seed=seed).samples()] for seed in (0, 0, 1)]
    assert ids[0] == ids[1] != ids[2]
    assert len(dataset(tmp_path, train_share=0.5).samples()) == 12 * 5
    (tmp_path / "moved").mkdir()
    (tmp_path / "studies").rename(tmp_path / "moved/studies")
    assert [s.sample_id for s in dataset(tmp_path / "moved").samples()] == ids[0]
    for share in (0.0, 1.0):
        with pytest.raises(UserError, match="train_share"):
            dataset(tmp_path / "moved", train_share=share).samples()


def test_which_slices_are_taken(tmp_path: Path) -> None:
    archive(tmp_path, {"CT-0": 2, "CT-1": 2}, (4, 4, 10))

    def numbers(**settings) -> list[str]:
        found = dataset(tmp_path, **settings)
        return [s.sample_id[-3:] for s in found.samples() if s.group_id == found.samples()[0].group_id]

    assert numbers(slices=(0.2, 0.8)) == ["002", "003", "004", "005", "006", "007"]
    assert numbers(slices=(0.2, 0.8), every=4) == ["002", "006"]
    assert numbers(slices=(0.5, 0.51)) == ["005"]  # never none
    for wrong in ({"slices": (0.8, 0.2)}, {"slices": (-0.1, 1.0)}, {"every": 0}, {"width": 0.0}):
        with pytest.raises(UserError, match=r"dataset\."):
            dataset(tmp_path, **wrong)


def test_the_window_and_the_backgrounds_outside_the_circle(tmp_path: Path) -> None:
    """-2048 and -3024 are what scanners write outside their circle: black, as air is."""
    voxels = np.zeros((2, 3, 1))
    voxels[:, :, 0] = [[-3024, -2048, -1350], [-600, 150, 3000]]
    save(tmp_path / "studies/CT-0/study_0001.nii.gz", voxels)
    save(tmp_path / "studies/CT-0/study_0002.nii.gz", voxels)
    found = dataset(tmp_path, lungs="none")
    grey = np.asarray(found.read(found.samples()[0]).image)
    assert grey.shape == (3, 2, 3)
    assert sorted(grey[..., 0].ravel().tolist()) == [0, 0, 0, 128, 255, 255]
    # a window changes the pixels, so it changes what names the run and the statistics
    others = [dataset(tmp_path), dataset(tmp_path, level=40.0), dataset(tmp_path, width=400.0)]
    assert len({sample_table_digest(d.samples()) for d in others}) == 3
    brain = np.asarray(dataset(tmp_path, level=0.0, width=6048.0, lungs="none").read(found.samples()[0]).image)
    assert len(np.unique(brain)) == 6


def test_lesions_are_a_region_of_the_studies_that_have_a_mask(tmp_path: Path) -> None:
    archive(tmp_path, {"CT-0": 2, "CT-1": 2}, (8, 6, 3))
    lesion = np.zeros((8, 6, 3))
    lesion[1, 4, 2] = 1  # second from the patient's right, second from the front, in the uppermost slice
    save(tmp_path / "masks/study_0003_mask.nii.gz", lesion)
    found = dataset(tmp_path, lungs="none")
    regions = {s.sample_id: found.read(s).regions for s in (*found.in_split("train"), *found.samples())}
    assert [name for name, own in regions.items() if own] == ["study_0003_slice_002"]
    plane = regions["study_0003_slice_002"]["target"]
    assert plane.shape == (1, 6, 8)
    assert plane.dtype == torch.bool
    assert plane[0].nonzero().tolist() == [[1, 1]]
    assert ("masks", "1 of 50 lesion masks") in found.facts()
    digest = dataset(tmp_path).annotations()
    (tmp_path / "masks/study_0003_mask.nii.gz").unlink()
    assert (dataset(tmp_path).annotations() != digest) == any(s.group_id == "study_0003" for s in found.samples())


def test_worker_processes_read_the_same(tmp_path: Path) -> None:
    volume, _ = phantom(64)
    for number in (1, 2):
        save(tmp_path / f"studies/CT-1/study_000{number}.nii.gz", np.flip(volume, 1).transpose(2, 1, 0))
        save(tmp_path / f"masks/study_000{number}_mask.nii.gz", np.ones((64, 64, 6)))
    found = dataset(tmp_path)
    work = [(sample, (0,)) for sample in found.samples()]
    prepare = Preprocessing(32, 32, (0.0,) * 3, (1.0,) * 3)
    alone, together = (list(load_batches(found, work, Label(), prepare, 4, workers)) for workers in (0, 2))
    assert [loaded.row_ids for loaded in alone] == [loaded.row_ids for loaded in together]
    for one, two in zip(alone, together, strict=True):
        assert one.batch is not None
        assert two.batch is not None
        assert torch.equal(one.batch.inputs, two.batch.inputs)
        assert set(one.batch.regions) == {"lungs", "target"}
        assert all(torch.equal(one.batch.regions[name], two.batch.regions[name]) for name in one.batch.regions)


def test_a_mask_of_another_shape_makes_a_bad_sample(tmp_path: Path) -> None:
    archive(tmp_path, {"CT-1": 2})
    for number in (1, 2):
        save(tmp_path / f"masks/study_000{number}_mask.nii.gz", np.zeros((8, 8, 4)))
    found = dataset(tmp_path)
    with pytest.raises(BadSample, match="mask"):
        found.read(found.samples()[0])


@pytest.mark.parametrize("inside", ["", "COVID19_1110/", "studies"])
def test_any_level_of_the_archive_is_the_root(tmp_path: Path, inside: str) -> None:
    top = tmp_path / inside if inside.endswith("/") else tmp_path
    archive(top, {"CT-1": 2})
    save(top / "masks/study_0001_mask.nii.gz", np.ones((8, 8, 5)))
    root = tmp_path / "studies" if inside == "studies" else tmp_path
    assert ("masks", "1 of 50 lesion masks") in dataset(root).facts()


def test_what_is_missing_is_said_in_two_lines(tmp_path: Path) -> None:
    for folder, says in ((tmp_path / "nowhere", "does not exist"), (tmp_path, "CT-0 ... CT-4")):
        with pytest.raises(UserError) as found:
            dataset(folder).samples()
        first, second = str(found.value).splitlines()
        assert says in first
        assert "mosmed.ai" in second
    (tmp_path / "studies/CT-0").mkdir(parents=True)
    with pytest.raises(UserError, match=r"study_\*"):
        dataset(tmp_path).samples()


# ---- lungs


def phantom(size: int = 160) -> tuple[np.ndarray, np.ndarray]:
    """(HU [6, size, size], the lungs) of a body on a table, with vessels, lesions, trachea and bowel gas."""
    z, y, x = np.mgrid[:6, :size, :size].astype(float)
    y, x = (y - size / 2) / size, (x - size / 2) / size

    def ellipse(cx: float, cy: float, rx: float, ry: float) -> np.ndarray:
        return ((x - cx) / rx) ** 2 + ((y - cy) / ry) ** 2 < 1

    volume = np.full(x.shape, -1000.0)
    volume[ellipse(0, 0, 0.42, 0.33)] = 30
    lungs = ellipse(-0.2, 0, 0.13, 0.24) | ellipse(0.2, 0, 0.13, 0.24)
    volume[lungs] = -850
    for cx, cy in ((-0.2, 0.05), (0.17, -0.05), (0.23, 0.1)):
        volume[ellipse(cx, cy, 0.012, 0.012)] = 40  # vessels
    volume[ellipse(-0.2, -0.1, 0.05, 0.05)] = -500  # ground glass
    volume[ellipse(0.2, -0.1, 0.02, 0.02) & (z > 2)] = 20  # consolidation inside
    volume[ellipse(0, -0.05, 0.02, 0.02)] = -1000  # trachea
    volume[ellipse(0, 0.2, 0.04, 0.03) & (z < 1)] = -900  # bowel gas
    volume[(np.abs(y - 0.36) < 0.008) & (np.abs(x) < 0.3)] = 100  # the table
    return volume, lungs


@pytest.mark.parametrize("outside", [-2048.0, -3024.0, -1000.0])
def test_the_threshold_rule_finds_the_lungs(outside: float) -> None:
    volume, lungs = phantom()
    row, column = np.mgrid[:160, :160]
    volume[:, np.hypot(row - 80, column - 80) > 79] = outside
    found = np.stack([closed_slice(piece) for piece in threshold_lungs(volume)])
    overlap = (found & lungs).sum() / (found | lungs).sum()
    assert overlap > 0.97
    assert found[volume == 40].all()  # vessels
    assert found[volume == -500].all()
    assert found[volume == 20].all()  # a dense lesion that lung surrounds
    middle = np.abs(column - 80) < 8
    assert not found[:, middle].any()  # neither trachea nor bowel


def test_lungs_become_a_region(tmp_path: Path) -> None:
    volume, lungs = phantom()
    stored = np.flip(volume, 1).transpose(2, 1, 0)  # as LAS: from the patient's right, from the back, from the feet
    for number in (1, 2):
        save(tmp_path / f"studies/CT-0/study_000{number}.nii.gz", stored)
    found = dataset(tmp_path)
    sample = found.samples()[3]
    plane = found.read(sample).regions["lungs"][0].numpy()
    assert (plane & lungs[3]).sum() / (plane | lungs[3]).sum() > 0.97
    assert "lungs" not in dataset(tmp_path, lungs="none").read(sample).regions
    assert dataset(tmp_path).annotations() != dataset(tmp_path, lungs="none").annotations()


def test_without_lung_there_is_no_region() -> None:
    assert not threshold_lungs(np.full((2, 16, 16), 30.0)).any()
    assert not threshold_lungs(np.full((2, 16, 16), -1000.0)).any()


# ---- real files


@needs_real_files
def test_the_real_masks_right_way_up() -> None:
    """All are stored L, A, S: by plain indexing, the columns stay and the rows turn round."""
    paths = sorted((REAL / "masks").glob("*.nii.gz"))
    assert len(paths) == 50
    for path in paths[::10]:
        image = nibabel.load(path)
        assert nibabel.aff2axcodes(image.affine) == ("L", "A", "S")
        stored = np.asarray(image.dataobj)
        volume = read_volume(path)
        assert len(volume) == axial_slices(path) == stored.shape[2]
        assert set(np.unique(volume)) <= {0.0, 1.0}
        for number in range(0, len(volume), 7):
            np.testing.assert_array_equal(volume[number], stored[:, ::-1, number].T)


@needs_real_files
def test_real_masks_belong_to_studies_of_the_archive(tmp_path: Path) -> None:
    """A made study of the real size beside the real mask of that name: its lesions come out at their slices."""
    real = REAL / "masks/study_0255_mask.nii.gz"
    stored = np.asarray(nibabel.load(real).dataobj)
    for number in (255, 256):
        save(tmp_path / f"studies/CT-1/study_0{number}.nii.gz", np.zeros(stored.shape), nibabel.load(real).affine)
    (tmp_path / "masks").mkdir()
    (tmp_path / "masks" / real.name).symlink_to(real)
    found = dataset(tmp_path, lungs="none")
    of_study = [s for s in (*found.in_split("train"), *found.samples()) if s.group_id == "study_0255"]
    areas = [int(found.read(s).regions["target"].sum()) if found.read(s).regions else 0 for s in of_study]
    assert areas == stored.sum((0, 1)).tolist()
    assert sum(areas) > 0


@needs_real_files
@pytest.mark.parametrize("name", ["0.dcm", "1.dcm"])
def test_lungs_in_a_real_ct_slice(name: str) -> None:
    """Without lesions and with -2048 outside the circle: most of what is darker than -700 HU inside the body."""
    pytest.importorskip("pydicom")
    from ibxai.datasets.dicom import read_grey

    values = read_grey(REAL / "other_ct_not_mosmed/lidc_lungmask_dicom" / name).values
    assert values.min() == -2048
    lungs = closed_slice(threshold_lungs(values[None])[0])
    assert 0.15 < lungs.mean() < 0.25
    body = np.zeros_like(lungs)
    body[150:400, 80:430] = True  # the chest, seen on the picture
    aired = body & (values < -700) & (values > -1000)
    assert (lungs & aired).sum() / aired.sum() > 0.97
    assert not (lungs & (values < -1100)).any()
