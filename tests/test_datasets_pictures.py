"""Each kind of odd picture comes out in the right colours; each kind of bad one is refused with a reason."""

from __future__ import annotations

import os
import struct
import time
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ibxai.datasets.pictures import MAX_PIXELS, read_picture
from ibxai.errors import BadSample


def png(width: int, height: int) -> bytes:
    """A PNG whose header says this size, with a few pixels' worth of data behind it."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(b"\x00" * 100)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def colours(path: Path) -> np.ndarray:
    picture = read_picture(path)
    assert picture.mode == "RGB"
    return np.asarray(picture).astype(int)


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def test_plain_rgb_is_unchanged(tmp_path: Path) -> None:
    pixels = noise(9, 7, 3)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    np.testing.assert_array_equal(colours(tmp_path / "a.png"), pixels)


def test_grey_becomes_three_equal_channels(tmp_path: Path) -> None:
    pixels = noise(9, 7)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    np.testing.assert_array_equal(colours(tmp_path / "a.png"), np.stack([pixels] * 3, axis=-1))


def test_one_bit_is_black_and_white(tmp_path: Path) -> None:
    bits = noise(16, 16) > 127
    Image.fromarray(bits).save(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as stored:
        assert stored.mode == "1"
    np.testing.assert_array_equal(colours(tmp_path / "a.png"), np.stack([bits * 255] * 3, axis=-1))


def test_palette_gives_the_palettes_colours(tmp_path: Path) -> None:
    picture = Image.new("P", (4, 4), 1)
    picture.putpalette([0, 0, 0, 10, 200, 30])
    picture.save(tmp_path / "a.png")
    assert (colours(tmp_path / "a.png") == (10, 200, 30)).all()


def test_palette_with_a_transparent_entry_is_put_on_white(tmp_path: Path) -> None:
    picture = Image.new("P", (4, 4), 1)
    picture.putpixel((0, 0), 0)
    picture.putpalette([9, 9, 9, 10, 200, 30])
    picture.save(tmp_path / "a.png", transparency=0)
    seen = colours(tmp_path / "a.png")
    assert tuple(seen[0, 0]) == (255, 255, 255)
    assert tuple(seen[1, 1]) == (10, 200, 30)


def test_transparency_is_put_on_white_and_opaque_pixels_are_unchanged(tmp_path: Path) -> None:
    pixels = np.zeros((1, 3, 4), dtype=np.uint8)
    pixels[0, :, :3] = (200, 100, 0)
    pixels[0, :, 3] = (255, 0, 51)  # opaque, transparent, a fifth
    Image.fromarray(pixels).save(tmp_path / "a.png")
    seen = colours(tmp_path / "a.png")
    np.testing.assert_array_equal(seen[0, :2], [(200, 100, 0), (255, 255, 255)])
    np.testing.assert_allclose(seen[0, 2], (244, 224, 204), atol=1)


def test_grey_with_transparency_is_put_on_white(tmp_path: Path) -> None:
    Image.fromarray(np.array([[[80, 255], [80, 0]]], dtype=np.uint8), "LA").save(tmp_path / "a.png")
    np.testing.assert_array_equal(colours(tmp_path / "a.png")[0], [(80, 80, 80), (255, 255, 255)])


@pytest.mark.parametrize("name", ["a.jpg", "a.tiff"])  # Pillow writes the JPEG inverted, as Adobe does, the TIFF not
def test_cmyk_keeps_its_colours(tmp_path: Path, name: str) -> None:
    picture = Image.new("CMYK", (48, 16))
    for place, ink in enumerate([(0, 255, 255, 0), (255, 0, 255, 0), (0, 0, 0, 0)]):
        picture.paste(ink, (16 * place, 0, 16 * place + 16, 16))
    picture.save(tmp_path / name)
    seen = colours(tmp_path / name)[8, [8, 24, 40]]
    np.testing.assert_allclose(seen, [(255, 0, 0), (0, 255, 0), (255, 255, 255)], atol=12)


@pytest.mark.parametrize("name", ["a.png", "a.tiff"])
def test_16_bit_grey_is_scaled_not_clipped(tmp_path: Path, name: str) -> None:
    levels = np.arange(256, dtype=np.uint16)
    Image.fromarray((levels * 257).reshape(16, 16)).save(tmp_path / name)
    np.testing.assert_array_equal(colours(tmp_path / name)[..., 0].ravel(), levels)


def test_16_bit_values_are_rounded_to_the_nearest(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0, 128, 129, 32768, 65535]], dtype=np.uint16)).save(tmp_path / "a.png")
    assert colours(tmp_path / "a.png")[0, :, 1].tolist() == [0, 0, 1, 128, 255]


def test_32_bit_integers_count_as_16_bit_or_are_refused(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0, 65535]], dtype=np.int32)).save(tmp_path / "a.tiff")
    assert colours(tmp_path / "a.tiff")[0, :, 0].tolist() == [0, 255]
    Image.fromarray(np.array([[0, 65536]], dtype=np.int32)).save(tmp_path / "b.tiff")
    with pytest.raises(BadSample, match="65536"):
        read_picture(tmp_path / "b.tiff")


def test_float_grey_is_taken_as_0_to_1(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0, 0.5, 1]], dtype=np.float32)).save(tmp_path / "a.tiff")
    assert colours(tmp_path / "a.tiff")[0, :, 0].tolist() == [0, 128, 255]


@pytest.mark.parametrize(("value", "reason"), [(np.nan, "not finite"), (np.inf, "not finite"), (1.5, "0 to 1")])
def test_float_grey_without_a_meaning_is_refused(tmp_path: Path, value: float, reason: str) -> None:
    Image.fromarray(np.array([[0, value]], dtype=np.float32)).save(tmp_path / "a.tiff")
    with pytest.raises(BadSample, match=reason):
        read_picture(tmp_path / "a.tiff")


def test_a_png_called_jpeg_is_read(tmp_path: Path) -> None:
    Image.fromarray(noise(5, 6, 3)).save(tmp_path / "n.JPEG", format="PNG")
    np.testing.assert_array_equal(colours(tmp_path / "n.JPEG"), noise(5, 6, 3))


def test_orientation_is_not_applied(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # "turn by 90 degrees to show"
    Image.new("RGB", (30, 20)).save(tmp_path / "a.jpg", exif=exif)
    assert read_picture(tmp_path / "a.jpg").size == (30, 20)


def test_the_first_frame_of_an_animation(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert (colours(tmp_path / "a.gif") == (255, 0, 0)).all()


def cut_jpeg() -> bytes:
    from io import BytesIO

    whole = BytesIO()
    Image.fromarray(noise(64, 64, 3)).save(whole, format="JPEG")
    return whole.getvalue()[: len(whole.getvalue()) // 2]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty"),
        (b"this is a text file\n", "not a picture"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n", "not a picture"),
        (cut_jpeg(), "cut short"),
        (cut_jpeg()[:20], "cut short|not a picture"),
        (png(64, 64), "cut short"),
        (png(50_000, 50_000), "more than 100,000,000 pixels"),
        (png(10_001, 10_000), "10,001 x 10,000 pixels"),
        (png(1, 101), "strip"),
        (png(0, 5), "cut short|not a picture"),
    ],
    ids=["empty", "text", "eps", "cut", "header only", "few pixels", "bomb", "just too large", "strip", "no width"],
)
def test_bad_files_are_refused_with_a_reason(tmp_path: Path, content: bytes, reason: str) -> None:
    (tmp_path / "bad.JPEG").write_bytes(content)
    with pytest.raises(BadSample, match=reason) as found:
        read_picture(tmp_path / "bad.JPEG")
    assert "\n" not in str(found.value)


def test_a_huge_header_is_refused_quickly_and_quietly(tmp_path: Path) -> None:
    (tmp_path / "bomb.png").write_bytes(png(50_000, 50_000))
    (tmp_path / "large.png").write_bytes(png(9_600, 9_600))  # Pillow would warn; we would read it, were it whole
    assert MAX_PIXELS > 9_600 * 9_600
    started = time.perf_counter()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        with pytest.raises(BadSample):
            read_picture(tmp_path / "bomb.png")
        assert time.perf_counter() - started < 0.5
        with pytest.raises(BadSample, match="cut short"):
            read_picture(tmp_path / "large.png")
    assert not seen


def test_what_is_not_a_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    for name, reason in (("pipe.jpg", "not a file"), ("", "not a file"), ("absent.jpg", "No such file")):
        with pytest.raises(BadSample, match=reason):
            read_picture(tmp_path / name)
