"""One NIfTI volume, right way up, slice by slice.

A volume's axes may run any way; its affine says which. Here all are turned to the same order first (nibabel's RAS+:
first index to the patient's right, second to the front, third to the head), and an axial slice is then drawn as a
radiologist sees it: front at the top, the patient's right on the left. The header is judged before a voxel is
allocated.
"""

from __future__ import annotations

import functools
import math
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from ibxai.datasets.pictures import check_file
from ibxai.errors import BadSample, UserError

MAX_VOXELS = 200_000_000  # three times the largest chest CT of MosMed; 0.8 GB as float32
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

    image = _header(path)
    try:
        values = np.asarray(nibabel.as_closest_canonical(image).dataobj, dtype=np.float32)
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
    return image


def _axis_to_the_head(image: Any) -> int:
    import nibabel

    return int(np.flatnonzero(nibabel.io_orientation(image.affine)[:, 0] == 2)[0])
