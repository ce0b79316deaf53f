"""Files made to do harm: small ones that unpack to gigabytes, and headers that promise more than the file holds.

Pickles in weights are in test_zoo.py, in CIFAR-10's files in test_datasets_small_pictures.py, in a run's own folder in
test_store.py; pictures with lying headers in test_datasets_pictures.py; links that leave a folder of one's own pictures
in test_folder_dataset.py.
"""

from __future__ import annotations

import gzip
import struct
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from ibxai.datasets.dicom import read_xray
from ibxai.datasets.nifti import axial_slices, read_volume
from ibxai.errors import BadSample

nibabel = pytest.importorskip("nibabel")
pydicom = pytest.importorskip("pydicom")

BOMB = 128 * 2**20  # bytes that a few hundred kilobytes unpack to
MOST = 24 * 2**20  # bytes that may be taken for them


def taken(work: Callable[[], object]) -> int:
    """The most bytes that Python held at once beside what it had before."""
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def refused(work: Callable[[], object]) -> Callable[[], None]:
    def tried() -> None:
        with pytest.raises(BadSample):
            work()

    return tried


def volume(path: Path, change: Callable[[bytearray], None] = lambda _: None, behind: int = 0) -> Path:
    """A NIfTI file of 2 x 3 x 4 voxels whose header was changed, with so many zeros behind."""
    image = nibabel.Nifti1Image(np.ones((2, 3, 4), np.float32), np.eye(4))
    content = bytearray(image.to_bytes())
    change(content)
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(content)
        for _ in range(behind // 2**20):
            file.write(bytes(2**20))
    return path


def test_a_gzip_bomb_behind_a_good_volume(tmp_path: Path) -> None:
    path = volume(tmp_path / "a.nii.gz", behind=BOMB)
    assert path.stat().st_size < BOMB / 100
    assert taken(lambda: read_volume(path)) < MOST
    assert taken(lambda: axial_slices(path)) < MOST


def test_a_nifti_header_that_promises_an_enormous_extension(tmp_path: Path) -> None:
    def promise(content: bytearray) -> None:
        struct.pack_into("<f", content, 108, 2.0**30)  # where the voxels begin
        content[348] = 1  # extensions follow
        struct.pack_into("<ii", content, 352, 2**30, 4)

    path = volume(tmp_path / "a.nii.gz", promise, behind=BOMB)
    assert taken(refused(lambda: axial_slices(path))) < MOST
    assert taken(refused(lambda: read_volume(path))) < MOST


@pytest.mark.parametrize("shape", [(32767, 32767, 32767), (-1, 3, 4), (0, 3, 4), (2, 3, 30000)])
def test_a_nifti_header_that_lies_about_its_size(tmp_path: Path, shape: tuple[int, int, int]) -> None:
    path = volume(tmp_path / "a.nii.gz", lambda content: struct.pack_into("<hhhh", content, 40, 3, *shape))
    assert taken(refused(lambda: read_volume(path))) < MOST


def xray(path: Path, syntax: str, **changes: int) -> Path:
    meta = pydicom.dataset.FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = "1.2.840.10008.5.1.4.1.1.1", "1.2.3"
    meta.TransferSyntaxUID = syntax
    picture = pydicom.Dataset()
    picture.file_meta = meta
    picture.SOPClassUID, picture.SOPInstanceUID = "1.2.840.10008.5.1.4.1.1.1", "1.2.3"
    picture.Rows, picture.Columns, picture.SamplesPerPixel = 4, 4, 1
    picture.BitsAllocated, picture.BitsStored, picture.HighBit, picture.PixelRepresentation = 8, 8, 7, 0
    picture.PhotometricInterpretation = "MONOCHROME2"
    picture.PixelData = bytes(range(16))
    for name, value in changes.items():
        setattr(picture, name, value)
    picture.save_as(path, enforce_file_format=True)
    return path


def test_a_deflated_dicom_bomb(tmp_path: Path) -> None:
    """The one transfer syntax in which the whole file is compressed, its header too."""
    path = xray(tmp_path / "a.dcm", "1.2.840.10008.1.2.1.99")
    content = path.read_bytes()
    unpacked = pydicom.dcmread(path)
    assert unpacked.Rows == 4
    start = 132 + 12 + unpacked.file_meta.FileMetaInformationGroupLength
    whole = zlib.decompressobj(-zlib.MAX_WBITS).decompress(content[start:])
    bomb = zlib.compressobj(1, zlib.DEFLATED, -zlib.MAX_WBITS)
    private = struct.pack("<HH2sHI", 0x7FE1, 0x0010, b"OB", 0, BOMB) + bytes(BOMB)
    path.write_bytes(content[:start] + bomb.compress(whole + private) + bomb.flush())
    assert path.stat().st_size < BOMB / 50
    assert taken(refused(lambda: read_xray(path))) < MOST


@pytest.mark.parametrize("changes", [{"Rows": 65535, "Columns": 65535}, {"Rows": 9000, "Columns": 9000}, {"Rows": 0}])
def test_a_dicom_header_that_lies_about_its_size(tmp_path: Path, changes: dict[str, int]) -> None:
    path = xray(tmp_path / "a.dcm", "1.2.840.10008.1.2.1", **changes)
    assert taken(refused(lambda: read_xray(path))) < MOST


def test_the_files_are_good_without_the_harm(tmp_path: Path) -> None:
    assert read_volume(volume(tmp_path / "a.nii.gz")).shape == (4, 3, 2)
    assert read_xray(xray(tmp_path / "a.dcm", "1.2.840.10008.1.2.1")).size == (4, 4)
