"""One DICOM file to numbers: stored values, rescaled, and as the grey picture that a reader of X-rays sees.

PS3.3 of the standard, C.7.6.3 (pixels), C.11.1 (rescale), C.11.2 (window). The header is judged before any pixel is
allocated. Compressed files are decoded by pylibjpeg's plugins, which `pip install ibxai[medical]` brings along.

- MONOCHROME1 counts from white to black, so it is inverted at the end: bone is bright whatever the file says. Half of
  the X-rays of BrixIA are of that kind.
- Several windows: the first one. No window: the whole range of the values.
- Padding (Pixel Padding Value) is black and does not count for the range.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from ibxai.datasets.pictures import check_file, check_size
from ibxai.errors import BadSample, UserError

if TYPE_CHECKING:
    from pydicom.dataset import FileDataset

MAX_BYTES = 500_000_000
NEEDS = "Reading DICOM needs pydicom and pylibjpeg, which are not installed: pip install 'ibxai[medical]'"
_DEFLATED = "1.2.840.10008.1.2.1.99"
_GREY = ("MONOCHROME1", "MONOCHROME2")


@dataclass(frozen=True)
class Grey:
    """A DICOM picture. values: float32 [H, W] after rescaling (of a CT: Hounsfield units). padding: bool [H, W].

    shown: float32 [H, W] in 0..1, windowed, bright = dense.
    """

    values: np.ndarray
    padding: np.ndarray
    shown: np.ndarray


def require_dicom() -> None:
    """Raises UserError when the readers are not installed."""
    try:
        import pydicom  # noqa: F401
    except ImportError as error:
        raise UserError(NEEDS) from error


def read_xray(path: Path) -> Image.Image:
    """The picture in RGB, three equal channels. Raises `BadSample`."""
    shown = read_grey(path).shown
    return Image.fromarray(np.rint(shown * 255).astype(np.uint8)).convert("RGB")


def read_grey(path: Path) -> Grey:
    """Raises `BadSample` with the reason: no DICOM, damaged, too large, in colour, several frames, no decoder."""
    import pydicom

    check_file(path)
    if path.stat().st_size > MAX_BYTES:
        raise BadSample(f"{path.stat().st_size:,} bytes, more than the {MAX_BYTES:,} that are read")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of values that break the standard in ways that do not matter here
            _check_syntax(path)
            header = pydicom.dcmread(path, stop_before_pixels=True)
            _check_header(header)
            return _grey(pydicom.dcmread(path))
    except BadSample:
        raise
    except pydicom.errors.InvalidDicomError:
        raise BadSample("not a DICOM file") from None
    except Exception as error:  # a damaged file surfaces as whatever its decoder stumbles on
        text = " ".join(str(error).split())
        if "missing required dependencies" in text or "missing dependencies" in text:
            raise BadSample(
                f"compressed, and its decoder is not installed: pip install 'ibxai[medical]' ({text[:120]})"
            ) from error
        raise BadSample(f"damaged or cut short: {text[:200] or type(error).__name__}") from error


def _check_syntax(path: Path) -> None:
    """In one syntax all of the file is deflated, its header too: a megabyte may unpack to gigabytes before any look."""
    import pydicom

    if pydicom.filereader.read_file_meta_info(path).get("TransferSyntaxUID") == _DEFLATED:
        raise BadSample("deflated as a whole, which is not read: its size is known only when it is unpacked")


def _check_header(header: FileDataset) -> None:
    rows, columns = int(header.get("Rows") or 0), int(header.get("Columns") or 0)
    if not rows or not columns:
        raise BadSample("its header gives no rows and columns: it holds no picture")
    check_size(columns, rows)
    frames, samples = int(header.get("NumberOfFrames") or 1), int(header.get("SamplesPerPixel") or 1)
    if frames != 1 or samples != 1:
        raise BadSample(f"{frames} frames of {samples} samples a pixel: one grey frame is expected")
    kind = str(header.get("PhotometricInterpretation", ""))
    if kind not in _GREY:
        raise BadSample(f"its photometric interpretation is {kind or 'not given'}: {' or '.join(_GREY)} is expected")


def _grey(file: FileDataset) -> Grey:
    stored = file.pixel_array
    if stored.shape != (file.Rows, file.Columns):
        raise BadSample(f"its pixels are {stored.shape}, and its header says {(file.Rows, file.Columns)}")
    padding = _padding(file, stored)
    slope, intercept = float(file.get("RescaleSlope", 1) or 1), float(file.get("RescaleIntercept", 0) or 0)
    values = stored.astype(np.float32) * slope + intercept
    shown = _windowed(file, values, padding)
    if not np.isfinite(shown).all():
        raise BadSample("its rescale or its window makes values that are not finite (NaN or infinity)")
    if file.PhotometricInterpretation == "MONOCHROME1":
        shown = 1 - shown
    return Grey(values, padding, np.where(padding, 0, shown).astype(np.float32))


def _padding(file: FileDataset, stored: np.ndarray) -> np.ndarray:
    first = file.get("PixelPaddingValue")
    if first is None:
        return np.zeros(stored.shape, dtype=bool)
    last = file.get("PixelPaddingRangeLimit", first)
    low, high = sorted((int(first), int(last)))
    padding = (stored >= low) & (stored <= high)
    return np.zeros_like(padding) if padding.all() else padding


def _windowed(file: FileDataset, values: np.ndarray, padding: np.ndarray) -> np.ndarray:
    """0..1, before MONOCHROME1 is inverted."""
    if "VOILUTSequence" in file:
        from pydicom.pixels import apply_voi

        bits = int(file.VOILUTSequence[0].LUTDescriptor[2])
        return np.clip(apply_voi(values.astype(np.int32), file) / (2.0**bits - 1), 0, 1)
    centre, width = _first(file.get("WindowCenter")), _first(file.get("WindowWidth"))
    if centre is None or width is None:
        counted = values[~padding]
        low, high = float(counted.min()), float(counted.max())
        return np.clip((values - low) / max(high - low, 1e-6), 0, 1)
    function = str(file.get("VOILUTFunction", "LINEAR") or "LINEAR")
    if function == "SIGMOID":
        return 1 / (1 + np.exp(-4 * (values - centre) / max(width, 1e-6)))
    if function == "LINEAR":  # C.11.2.1.2.1: a window of width w holds w values, from its lowest to its highest
        centre, width = centre - 0.5, width - 1
    if width <= 0:
        return (values > centre).astype(np.float32)
    return np.clip((values - centre) / width + 0.5, 0, 1)


def _first(value: Any) -> float | None:
    if value is None or value == "":
        return None
    try:
        return float(value)
    except TypeError:
        return float(value[0]) if len(value) else None
