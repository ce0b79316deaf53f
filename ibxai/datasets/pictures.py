"""One picture file to one RGB picture, or a reason why not.

A file from a user's folder is judged by its header before any pixel is allocated, and only common picture formats are
tried: Pillow would otherwise hand an EPS file that calls itself .JPEG to Ghostscript.

What is done with pictures that are not plain 8 bit RGB:

- transparency is put on white, the page that people see such pictures on. torchvision drops the transparency, which
  shows whatever colours lie beneath it; for pictures without transparent pixels the two agree exactly;
- 16 bit grey is scaled, 65535 to 255, where Pillow's own conversion clips; float grey is taken as 0..1;
- EXIF orientation is not applied, as in torchvision's `ImageFolder` and in ImageNet practice: boxes and lesions are
  annotated on the pixels as they are stored;
- of an animation the first frame is taken, of CMYK Pillow's conversion without colour profiles (as torchvision does).
"""

from __future__ import annotations

import stat
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from ibxai.errors import BadSample

MAX_PIXELS = 100_000_000
# Networks resize the shorter side to some hundred pixels: a strip of 1 x 100,000 would grow to 65 million pixels there.
MAX_SIDE_RATIO = 100
FORMATS = ("JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "PPM")
BACKGROUND = (255, 255, 255, 255)


def read_picture(path: Path) -> Image.Image:
    """The picture in this file as RGB, 8 bits a channel, at its stored size. Content tells the format, not the name.

    Raises `BadSample` with the reason: no such file, empty, not a picture, damaged, cut short, too large, or numbers
    that cannot be turned into colours.
    """
    check_file(path)
    try:
        with warnings.catch_warnings():
            # Pillow warns of large sizes, which are checked below, and of metadata, which are not used.
            warnings.simplefilter("ignore")
            with Image.open(path, formats=FORMATS) as image:
                check_size(image.width, image.height)
                return _rgb(image)
    except BadSample:
        raise
    except UnidentifiedImageError:
        raise BadSample("not a picture in a known format: " + ", ".join(FORMATS)) from None
    except Image.DecompressionBombError:
        raise BadSample(f"more than {MAX_PIXELS:,} pixels") from None
    except (
        Exception
    ) as error:  # a damaged file surfaces as whatever its decoder stumbles on: OSError, SyntaxError, struct.error ...
        raise BadSample(f"damaged or cut short: {error or type(error).__name__}") from error


def check_file(path: Path) -> None:
    """Raises BadSample when there is no file here, or an empty one."""
    try:
        found = path.stat()
    except OSError as error:
        raise BadSample(f"cannot be read: {error.strerror}") from error
    if not stat.S_ISREG(found.st_mode):
        raise BadSample("not a file")
    if found.st_size == 0:
        raise BadSample("the file is empty (0 bytes)")


def check_size(width: int, height: int) -> None:
    """Raises BadSample for a picture of more pixels than are read, or a strip. For use before pixels are allocated."""
    if width * height > MAX_PIXELS:
        raise BadSample(f"{width:,} x {height:,} pixels, more than the {MAX_PIXELS:,} that are read")
    if max(width, height) > MAX_SIDE_RATIO * min(width, height):
        raise BadSample(f"{width:,} x {height:,} pixels: a strip, one side more than {MAX_SIDE_RATIO} times the other")


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        return _from_float(np.asarray(image))
    if image.mode == "I" or image.mode.startswith("I;16"):
        return _from_16_bit(np.asarray(image))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        return _on_background(image)
    return image.convert("RGB")


def _on_background(image: Image.Image) -> Image.Image:
    page = Image.new("RGBA", image.size, BACKGROUND)
    return Image.alpha_composite(page, image.convert("RGBA")).convert("RGB")


def _from_16_bit(grey: np.ndarray) -> Image.Image:
    low, high = int(grey.min()), int(grey.max())
    if low < 0 or high > 65535:
        raise BadSample(f"grey values from {low} to {high}: 0 to 65535 are understood")
    return Image.fromarray(np.rint(grey / 257).astype(np.uint8)).convert("RGB")


def _from_float(grey: np.ndarray) -> Image.Image:
    if not np.isfinite(grey).all():
        raise BadSample("grey values that are not finite (NaN or infinity)")
    low, high = float(grey.min()), float(grey.max())
    if low < 0 or high > 1:
        raise BadSample(f"floating-point grey values from {low:g} to {high:g}: 0 to 1 are understood")
    return Image.fromarray(np.rint(grey * 255).astype(np.uint8)).convert("RGB")
