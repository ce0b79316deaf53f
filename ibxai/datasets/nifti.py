"""One NIfTI volume, right way up, slice by slice.

A volume's axes may run any way; its affine says which. Here all are turned to the same order first (nibabel's RAS+:
first index to the patient's right, second to the front, third to the head), and an axial slice is then drawn as a
radiologist sees it: front at the top, the patient's right on the left. The header is judged before a voxel is
allocated.
"""

from __future__ import annotations

import functools
import gzip
import math
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from ibxai.datasets.pictures import check_file
from ibxai.errors import BadSample, UserError

MAX_VOXELS = 200_000_000  # three times the largest chest CT of MosMed; 0.8 GB as float32
MAX_HEADER = 16_000_000  # bytes before the voxels; extensions hold at most a study's DICOM header
ENDINGS = (".nii.gz", ".nii")
_KEPT = 2  # the slices of a study come one after the other: their volume is unpacked once


def require_nifti() -> None:
    """Raises UserError when the reader is not installed."""
    try:
        import nibabel  # noqa: F401
    except ImportError as error:
        raise UserError("Reading NIfTI needs nibabel, which is not installed: pip install 'ibxai[medical]'") from error


def axial_slices(path: Path) -> int:
    """How many axial slices the volume has, from its header alone. Raises `BadSample`."""
    image = _header(path)
    return int(image.shape[_axis_to_the_head(image)])


@functools.lru_cache(maxsize=_KEPT)
def read_volume(path: Path) -> np.ndarray:
    """float32 [slices, H, W], read-only, from the feet to the head, each slice as a radiologist sees it.

    Raises `BadSample` with the reason: no NIfTI, damaged, too large, not three axes, values that are no numbers.
    """
    import nibabel

    kind = type(_header(path))
    try:
        with gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb") as file:
            image = nibabel.as_closest_canonical(kind.from_stream(file))
            values = np.asarray(image.dataobj, dtype=np.float32)
            file.read(1)  # only at its end does gzip compare its checksum
    except (OSError, ValueError, EOFError, zlib.error) as error:
        text = " ".join(str(error).split())
        raise BadSample(f"damaged or cut short: {text or type(error).__name__}") from error
    volume = values.reshape(values.shape[:3])[::-1, ::-1].transpose(2, 1, 0)
    if not np.isfinite(volume).all():
        raise BadSample("values that are not finite (NaN or infinity)")
    volume.flags.writeable = False
    return volume


def _header(path: Path) -> Any:
    import nibabel

    check_file(path)
    try:
        with nibabel.imageglobals.LoggingOutputSuppressor():  # of headers that break the standard without harm
            _check_before_the_voxels(path)
            image: Any = nibabel.load(path)
        shape, kind = image.shape, image.get_data_dtype()
    except Exception as error:  # a damaged header surfaces as whatever its reader stumbles on
        text = " ".join(str(error).split())
        raise BadSample(f"not a NIfTI file, or damaged: {text[:200] or type(error).__name__}") from error
    if len(shape) < 3 or math.prod(shape) != math.prod(shape[:3]):
        raise BadSample(f"its axes are {shape}: one volume of three axes is expected")
    if min(shape[:3]) < 1 or math.prod(shape) > MAX_VOXELS:
        raise BadSample(f"{' x '.join(map(str, shape))} voxels: 1 to {MAX_VOXELS:,} are read")
    if kind.kind not in "iuf":
        raise BadSample(f"its voxels are {kind}: real numbers are expected")
    if not np.isfinite(image.affine).all() or np.linalg.matrix_rank(image.affine[:3, :3]) < 3:
        raise BadSample("its affine does not say which way its axes run")
    return image


class _Bounded:
    """A file of which only so much is read: a header's extensions may claim gigabytes, and gzip may give them."""

    def __init__(self, file: Any, left: int) -> None:
        self._file, self._left = file, left
        self.tell, self.seek = file.tell, file.seek

    def read(self, size: int = -1) -> bytes:
        self._left -= size
        if size < 0 or self._left < 0:
            raise ValueError("its header claims more than is read of one")
        content: bytes = self._file.read(size)
        return content


def _check_before_the_voxels(path: Path) -> None:
    """Raises ValueError when the header and what follows it are larger than any header is."""
    import nibabel

    with nibabel.openers.Opener(str(path)) as file:
        is_second = file.read(4) in (b"\x1c\x02\x00\x00", b"\x00\x00\x02\x1c")  # NIfTI-2: 540 bytes, in either order
        file.seek(0)
        kind = nibabel.Nifti2Header if is_second else nibabel.Nifti1Header
        header = kind.from_fileobj(_Bounded(file, MAX_HEADER))
    if header.get_data_offset() > MAX_HEADER:
        raise ValueError("its header claims more than is read of one")


def _axis_to_the_head(image: Any) -> int:
    import nibabel

    return int(np.flatnonzero(nibabel.io_orientation(image.affine)[:, 0] == 2)[0])
