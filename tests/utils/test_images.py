"""Images of every form as RGB, broken ones refused in one line, and names that stay in their folder."""

import io
import os
import random
import struct
import subprocess
import sys
import warnings
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image, features
from PIL.PngImagePlugin import PngInfo
from transformers.image_utils import load_image

from dept_vl._utils.images import check_shape, confined, is_turned, missing_files, read_image

RGB = np.random.default_rng(0).integers(0, 256, (9, 11, 3), dtype=np.uint8)
GREY = RGB[..., 0]
PICTURE = Image.fromarray(RGB)
TURNED = PICTURE.transpose(Image.Transpose.ROTATE_180)


def encoded(image: Image.Image, form: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def decoded(path: Path) -> np.ndarray[Any, Any]:
    image = read_image(path)
    assert image.mode == "RGB"
    return np.asarray(image)


def write(folder: Path, content: bytes) -> Path:
    path = folder / "image"
    path.write_bytes(content)
    return path


def as_grey(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return np.repeat(values[..., None], 3, axis=2)


def refused(path: Path) -> str:
    """The message: one line, which begins with the file; and no warning beside it."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ValueError) as caught:
            read_image(path)
    assert type(caught.value) is ValueError
    message = str(caught.value)
    assert message.startswith(f"{path} is not a readable image: ")
    assert "\n" not in message
    return message


@pytest.fixture(autouse=True)
def _no_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


# What can be read


def palette(transparency: int | bytes | None = None) -> bytes:
    image = Image.frombytes("P", (11, 9), (GREY % 4).tobytes())
    image.putpalette(bytes(range(10, 22)))
    return encoded(image, "PNG", **({} if transparency is None else {"transparency": transparency}))


PALETTE = np.arange(10, 22, dtype=np.uint8).reshape(4, 3)[GREY % 4]
ALPHA = Image.fromarray(GREY[::-1].copy())
RGBA = PICTURE.copy()
RGBA.putalpha(ALPHA)
LA = Image.fromarray(GREY)
LA.putalpha(ALPHA)
BILEVEL = GREY > 127

LOSSLESS: dict[str, tuple[bytes, np.ndarray[Any, Any]]] = {
    "rgb": (encoded(PICTURE, "PNG"), RGB),
    "grey": (encoded(Image.fromarray(GREY), "PNG"), as_grey(GREY)),
    "palette": (palette(), PALETTE),
    "palette, one colour transparent": (palette(1), PALETTE),
    "palette, each colour's transparency": (palette(bytes([0, 128, 255, 3])), PALETTE),
    # The colours beneath the transparency.
    "rgba": (encoded(RGBA, "PNG"), RGB),
    "la": (encoded(LA, "PNG"), as_grey(GREY)),
    "rgb, one colour transparent": (encoded(PICTURE, "PNG", transparency=tuple(RGB[0, 0].tolist())), RGB),
    "1-bit": (encoded(Image.fromarray(BILEVEL), "PNG"), as_grey(BILEVEL * np.uint8(255))),
    "1-bit tiff": (encoded(Image.fromarray(BILEVEL), "TIFF"), as_grey(BILEVEL * np.uint8(255))),
    "bmp": (encoded(PICTURE, "BMP"), RGB),
    "tiff": (encoded(PICTURE, "TIFF"), RGB),
    "ppm": (encoded(PICTURE, "PPM"), RGB),
    "webp": (encoded(PICTURE, "WEBP", lossless=True), RGB),
    "webp with alpha": (encoded(RGBA, "WEBP", lossless=True, exact=True), RGB),
    "animated png": (encoded(PICTURE, "PNG", save_all=True, append_images=[TURNED]), RGB),
    "animated webp": (encoded(PICTURE, "WEBP", save_all=True, append_images=[TURNED], lossless=True), RGB),
    "tiff of two pages": (encoded(PICTURE, "TIFF", save_all=True, append_images=[TURNED]), RGB),
}


@pytest.mark.parametrize("name", LOSSLESS)
def test_any_form_is_read_as_rgb(tmp_path: Path, name: str) -> None:
    content, expected = LOSSLESS[name]
    assert np.array_equal(decoded(write(tmp_path, content)), expected)


def test_first_frame_of_a_gif(tmp_path: Path) -> None:
    first, second = (picture.quantize(64) for picture in (PICTURE, TURNED))
    content = encoded(first, "GIF", save_all=True, append_images=[second])
    assert np.array_equal(decoded(write(tmp_path, content)), np.asarray(first.convert("RGB")))


def smooth() -> np.ndarray[Any, Any]:
    """What JPEG keeps well."""
    y, x = np.mgrid[0:32, 0:32]
    return np.stack([8 * x, 8 * y, 255 - 4 * (x + y)], axis=2).clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("progressive", [False, True])
def test_jpeg(tmp_path: Path, mode: str, progressive: bool) -> None:
    image = Image.fromarray(smooth()).convert(mode)
    content = encoded(image, "JPEG", quality=95, subsampling=0, progressive=progressive)
    expected = np.asarray(image.convert("RGB"))
    assert np.abs(decoded(write(tmp_path, content)).astype(int) - expected).max() < 12


def test_ycck_jpeg(tmp_path: Path) -> None:
    """Pillow writes none, but a CMYK file whose Adobe marker says that it is one is one."""
    # Luma 120, chroma 128 and 160, no black: inverted, as Adobe has it, the colour (165, 97, 120).
    stored = (120, 128, 160, 255)
    planes = [Image.new("L", (16, 16), 255 - value) for value in stored]
    content = encoded(Image.merge("CMYK", planes), "JPEG", quality=100)
    transform = content.index(b"Adobe") + 11
    assert content[transform] == 0
    ycck = content[:transform] + b"\2" + content[transform + 1 :]
    pixels = decoded(write(tmp_path, ycck)).astype(int)
    assert np.abs(pixels - (255 - 165, 255 - 97, 255 - 120)).max() <= 3


@pytest.mark.parametrize("orientation", range(10))
@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP"])
def test_exif_orientation_is_that_of_transformers(tmp_path: Path, form: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    lossless = {"WEBP": {"lossless": True}}.get(form, {})
    path = write(tmp_path, encoded(PICTURE, form, exif=exif.tobytes(), **lossless))
    assert np.array_equal(decoded(path), np.asarray(load_image(str(path))))
    assert decoded(path).shape == (RGB.shape if orientation not in (5, 6, 7, 8) else (11, 9, 3))
    assert is_turned(path) == (2 <= orientation <= 8)
    # What Pillow has opened, and its content, are read alike.
    with Image.open(path) as image:
        assert np.array_equal(np.asarray(read_image(image)), decoded(path))
    assert np.array_equal(np.asarray(read_image(path.read_bytes())), decoded(path))


@pytest.mark.parametrize("form", ["PNG", "JPEG"])
def test_pixels_as_stored(tmp_path: Path, form: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    path = write(tmp_path, encoded(PICTURE, form, exif=exif.tobytes()))
    stored = np.asarray(read_image(path, exif=False))
    assert np.array_equal(stored, decoded(write(tmp_path, encoded(PICTURE, form))))


@pytest.mark.parametrize("orientation", range(2, 9))
def test_an_image_is_turned_once_however_often_it_is_read(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    once = read_image(encoded(PICTURE, "PNG", exif=exif.tobytes()))
    assert not np.array_equal(np.asarray(once), np.asarray(PICTURE.convert("RGB")))
    np.testing.assert_array_equal(np.asarray(read_image(once)), np.asarray(once))


def test_broken_exif_is_no_fault_of_the_pixels(tmp_path: Path) -> None:
    path = write(tmp_path, encoded(PICTURE, "PNG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff"))
    assert np.array_equal(decoded(path), RGB)
    assert not is_turned(path)


# More pixels and texts than usual


def test_a_jpeg_of_up_to_twice_the_limit_is_read_at_half_its_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path, encoded(Image.fromarray(smooth()).resize((64, 48)), "JPEG", quality=95))
    whole = read_image(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 64 * 48 - 1)
    half = read_image(path)
    assert half.size == (32, 24)
    difference = np.asarray(half).astype(int) - np.asarray(whole.reduce(2))
    assert np.abs(difference).max() < 12
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 64 * 48 // 2 - 1)
    assert "exceeds limit of" in refused(path)


LARGE = """
import sys
from dept_vl._utils.images import read_image
image = read_image(sys.argv[1])
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(image.width, image.height, int(peak.split()[1]) // 1024)
"""


@pytest.mark.parametrize("kind", ["photograph", "text"])
def test_a_large_file_is_read_within_little_memory(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "large"
    if kind == "photograph":
        Image.new("RGB", (12_000, 9_000), (200, 100, 50)).save(path, "JPEG", subsampling=2)
    else:
        texts = PngInfo()
        texts.add_text("zipped", "x" * 2_000_000, zip=True)
        texts.add_text("plain", "y" * 70_000_000)
        Image.new("RGB", (640, 480)).save(path, "PNG", pnginfo=texts)
    command = [sys.executable, "-c", LARGE, str(path)]
    width, height, peak = map(int, subprocess.check_output(command, timeout=100, text=True).split())
    assert (width, height) == {"photograph": (6000, 4500), "text": (640, 480)}[kind]
    assert peak < 500  # MiB, of which the imports take some 60


@pytest.mark.parametrize(
    ("width", "height", "edge"), [(20_000, 1, 224), (1, 60_000, None), (1_000_000, 1, None), (201, 1, 8)]
)
def test_a_line_is_no_image(width: int, height: int, edge: int | None) -> None:
    with pytest.raises(ValueError, match="the longer side"):
        check_shape(width, height, edge)


def test_what_an_image_becomes_is_bounded() -> None:
    check_shape(200, 1, 224)
    check_shape(1, 200, None)
    check_shape(200, 1, 500)
    with pytest.raises(ValueError, match="after resizing"):
        check_shape(200, 1, 600)


# More than eight bits

SIXTEEN = np.random.default_rng(1).integers(0, 1 << 16, (9, 11), dtype=np.uint16)


def test_ycbcr_in_tiff_is_read_or_told_as_what_it_is(tmp_path: Path) -> None:
    image = PICTURE.convert("YCbCr")
    packed = read_image(write(tmp_path, encoded(image, "TIFF", compression="tiff_lzw")))
    assert np.abs(np.asarray(packed, int) - np.asarray(PICTURE, int)).max() <= 4
    with pytest.raises(ValueError, match="uncompressed TIFF in YCbCr"):
        read_image(write(tmp_path, encoded(image, "TIFF")))


@pytest.mark.parametrize("form", ["PNG", "TIFF"])
def test_sixteen_bits_are_scaled(tmp_path: Path, form: str) -> None:
    path = write(tmp_path, encoded(Image.fromarray(SIXTEEN), form))
    assert np.array_equal(decoded(path), as_grey((SIXTEEN >> 8).astype(np.uint8)))
    # Both ways to make sixteen bits of eight.
    for wide in (GREY.astype(np.uint16) << 8, GREY.astype(np.uint16) * 257):
        path = write(tmp_path, encoded(Image.fromarray(wide), form))
        assert np.array_equal(decoded(path), as_grey(GREY))


def test_sixteen_bits_of_big_endian_tiff(tmp_path: Path) -> None:
    little = encoded(Image.fromarray(SIXTEEN), "TIFF")
    big = encoded(Image.frombytes("I;16B", (11, 9), SIXTEEN.astype(">u2").tobytes()), "TIFF")
    assert (little[:2], big[:2]) == (b"II", b"MM")
    assert np.array_equal(decoded(write(tmp_path, big)), as_grey((SIXTEEN >> 8).astype(np.uint8)))


@pytest.mark.parametrize("form", ["PNG", "TIFF"])
def test_eight_bits_in_sixteen_stay(tmp_path: Path, form: str) -> None:
    path = write(tmp_path, encoded(Image.fromarray(GREY.astype(np.uint16)), form))
    assert np.array_equal(decoded(path), as_grey(GREY))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (GREY.astype(np.int32), GREY),
        (GREY.astype(np.int32) * 257, GREY),
        (np.array([[0, 1 << 20, 1 << 21]], dtype=np.int32), np.array([[0, 128, 255]], dtype=np.uint8)),
        (np.array([[-5, 0, 255]], dtype=np.int32), np.array([[0, 0, 255]], dtype=np.uint8)),
        (GREY.astype(np.float32), GREY),
        (GREY.astype(np.float32) / 255, GREY),
        (GREY.astype(np.float32) * 256, GREY),
        (np.array([[-1, 0, 0.5, 1]], dtype=np.float32), np.array([[0, 0, 128, 255]], dtype=np.uint8)),
        (np.zeros((2, 3), dtype=np.float32), np.zeros((2, 3), dtype=np.uint8)),
        (np.array([[np.nan, np.inf, -np.inf, 255]], dtype=np.float32), np.array([[0, 0, 0, 255]], np.uint8)),
        (np.array([[0, 5e5, 1e6]], dtype=np.float32), np.array([[0, 128, 255]], dtype=np.uint8)),
    ],
    ids=["int", "int16", "int32", "negative", "float8", "unit", "float16", "half", "black", "nan", "large"],
)
def test_wide_tiffs_are_scaled(
    tmp_path: Path, values: np.ndarray[Any, Any], expected: np.ndarray[Any, Any]
) -> None:
    """Fractions of white, 8 and 16 bits as such, and beyond them the largest value as white."""
    path = write(tmp_path, encoded(Image.fromarray(values), "TIFF"))
    assert np.array_equal(decoded(path), as_grey(expected))


# What cannot


def test_missing_file(tmp_path: Path) -> None:
    for path in (tmp_path / "gone.jpg", tmp_path / "no folder" / "gone.jpg"):
        with pytest.raises(FileNotFoundError) as caught:
            read_image(path)
        assert str(caught.value) == f"no image at {path}"


def test_broken_link_is_missing(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    with pytest.raises(FileNotFoundError, match="no image at "):
        read_image(tmp_path / "link")


def test_other_things_are_refused(tmp_path: Path) -> None:
    assert refused(write(tmp_path, b"")).endswith("the file is empty")
    assert "it is none of " in refused(write(tmp_path, b"<html>404 Not Found</html>\n"))
    refused(write(tmp_path, b"\0" * 1000))
    refused(write(tmp_path, "no image: é\n\n".encode() * 100))
    # No other copy helps here.
    for path in (tmp_path, tmp_path / "image" / "below", tmp_path / ("long" * 100)):
        assert "download" not in refused(path)


def test_short_name_is_no_excuse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that stands in Pillow's own message by chance."""
    monkeypatch.chdir(tmp_path)
    Path("a").write_bytes(LOSSLESS["bmp"][0][:40])
    assert refused(Path("a")).startswith("a is not a readable image")


def test_random_bytes_are_refused(tmp_path: Path) -> None:
    noise = random.Random(0)
    starts = [b"", b"\xff\xd8\xff\xe0", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"RIFF\x99\0\0\0WEBPVP8 ", b"BM"]
    for start in (*starts, b"II*\0\x08\0\0\0", b"P6\n", b"8BPS\0\1", b"%!PS-Adobe-3.0 EPSF-3.0\n"):
        for length in (1, 10, 300):
            refused(write(tmp_path, start + noise.randbytes(length)))


SMALL = Image.fromarray(RGB[:5, :6])
CUT = {
    "jpeg": encoded(SMALL, "JPEG", quality=60),
    "progressive": encoded(SMALL, "JPEG", quality=60, progressive=True),
    "cmyk": encoded(SMALL.convert("CMYK"), "JPEG", quality=60),
    "png": encoded(SMALL, "PNG"),
    "palette": palette(bytes([0, 128, 255, 3])),
    "sixteen": encoded(Image.fromarray(SIXTEEN[:5, :6]), "PNG"),
    "animated": encoded(SMALL, "PNG", save_all=True, append_images=[SMALL.rotate(180)]),
    "gif": encoded(SMALL.quantize(8), "GIF", save_all=True, append_images=[SMALL.rotate(180).quantize(8)]),
    "webp": encoded(SMALL, "WEBP"),
    "lossless": encoded(SMALL, "WEBP", lossless=True),
    "bmp": encoded(SMALL, "BMP"),
    "tiff": encoded(SMALL, "TIFF"),
    "float": encoded(Image.fromarray(SIXTEEN[:5, :6].astype(np.float32)), "TIFF"),
}


@pytest.mark.parametrize("name", CUT)
def test_cut_image_is_refused(tmp_path: Path, name: str) -> None:
    """But where only what follows the first frame's pixels is lost; half a picture is never given out."""
    content = CUT[name]
    whole = decoded(write(tmp_path, content))
    harmless = 0
    for length in range(0, len(content), 3):
        path = write(tmp_path, content[:length])
        try:
            cut = decoded(path)
        except ValueError:
            refused(path)
        else:
            assert np.array_equal(cut, whole)
            harmless += 1
    # The second frame, the last chunks, or a few bytes.
    trailing = {"gif": 0.6, "animated": 0.6, "png": 0.2, "palette": 0.2, "sixteen": 0.2}
    assert harmless <= 2 + trailing.get(name, 0) * len(content) / 3


@pytest.mark.parametrize("name", CUT)
def test_damaged_image_is_refused_or_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Nothing else comes out, whichever bytes are wrong."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)
    chance = random.Random(name)
    for _ in range(40):
        content = bytearray(CUT[name])
        for _ in range(chance.choice([1, 2, 5])):
            content[chance.randrange(chance.choice([40, len(content)]))] = chance.randrange(256)
        path = write(tmp_path, bytes(content))
        try:
            decoded(path)
        except ValueError:
            refused(path)


def test_a_half_avif(tmp_path: Path) -> None:
    if not features.check("avif"):
        pytest.skip("this Pillow reads no AVIF")
    content = encoded(PICTURE, "AVIF")
    refused(write(tmp_path, content[: len(content) // 2]))  # a RuntimeError


@pytest.mark.parametrize("form", ["EPS", "BLP", "PDF", "SGI"])
def test_formats_of_no_data_set_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    """Pillow would read an EPS, whatever its name, by running Ghostscript."""

    def no_program(*_: Any, **__: Any) -> None:
        raise AssertionError("a program was started")

    monkeypatch.setattr(subprocess, "check_call", no_program)
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", no_program)
    picture = PICTURE.quantize() if form == "BLP" else PICTURE
    assert "it is none of JPEG, PNG" in refused(write(tmp_path, encoded(picture, form)))


@pytest.mark.parametrize(
    "error",
    [struct.error("two\nlines"), MemoryError(), AttributeError("x"), KeyError(1), NotImplementedError("x")],
)
def test_no_error_of_a_decoder_escapes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def broken(*_: Any, **__: Any) -> Image.Image:
        raise error

    monkeypatch.setattr(Image, "open", broken)
    message = refused(write(tmp_path, b"x"))
    assert (" ".join(str(error).split()) or "MemoryError") in message


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width: int, height: int, *others: bytes) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    data = chunk(b"IDAT", zlib.compress(bytes(100)))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(others) + data + chunk(b"IEND", b"")


def gif(width: int, height: int) -> bytes:
    screen = b"GIF89a" + struct.pack("<HHBBB", width, height, 0x80, 0, 0) + b"\0\0\0\xff\xff\xff"
    return screen + b"," + struct.pack("<HHHHB", 0, 0, width, height, 0) + b"\2\2\x44\1\0;"


def bmp(width: int, height: int) -> bytes:
    header = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0)
    return b"BM" + struct.pack("<IHHI", 54, 0, 0, 54) + header


@pytest.mark.parametrize(
    "content",
    [
        png(2**31 - 1, 2**31 - 1),
        png(2**31 - 1, 1),
        gif(65_535, 65_535),
        bmp(100_000, 100_000),
        b"P6 100000 100000 255\n",
    ],
    ids=["png", "png line", "gif", "bmp", "ppm"],
)
def test_absurd_size_is_refused(tmp_path: Path, content: bytes) -> None:
    message = refused(write(tmp_path, content))
    assert "exceeds limit" in message
    assert message.endswith("If it is meant to be so large, raise PIL.Image.MAX_IMAGE_PIXELS")


@pytest.mark.parametrize("form", ["PNG", "GIF", "BMP", "WEBP", "TIFF"])
@pytest.mark.parametrize("limit", [40, 98], ids=["an error to Pillow", "a warning to Pillow"])
def test_more_pixels_than_allowed_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str, limit: int
) -> None:
    path = write(tmp_path, encoded(PICTURE, form))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    message = refused(path)
    assert "Image size (99 pixels) exceeds limit of" in message
    assert ".." not in message
    assert "download" not in message
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 99)
    assert decoded(path).shape == RGB.shape


@pytest.mark.parametrize(
    "content",
    [
        *(make(*size) for make in (png, gif, bmp) for size in ((0, 0), (0, 5), (5, 0))),
        b"P6 0 0 255\n",
        b"P6 -5 5 255\n",
        bmp(-5, 5),
        png(1000, 1000),
        gif(1000, 1000),
        bmp(1000, 1000),
    ],
)
def test_wrong_size_is_refused(tmp_path: Path, content: bytes) -> None:
    """No pixels at all, fewer than none, and more than there are data."""
    refused(write(tmp_path, content))


def test_odd_metadata_is_no_fault_of_the_pixels(tmp_path: Path) -> None:
    exif = b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<HHHII", 1, 0x0112, 2, 100_000, 90_000)
    path = write(tmp_path, encoded(PICTURE, "JPEG", exif=exif))
    assert decoded(path).shape == RGB.shape
    content = bytearray(encoded(PICTURE, "TIFF"))
    content += bytes(2)
    assert np.array_equal(decoded(write(tmp_path, bytes(content))), RGB)


# Names and folders


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "./",
        "././.",
        "/",
        "//",
        "/etc/passwd",
        "//host/share/a.jpg",
        "..",
        "../",
        "../a.jpg",
        "a/../../b.jpg",
        "a/../b.jpg",
        "a/..",
        "a/b/c/..",
        "./../a.jpg",
        ".//..//a.jpg",
        "..\\a.jpg",
        "a\\..\\..\\b.jpg",
        "\\\\host\\share\\a.jpg",
        "\\a.jpg",
        "C:\\a.jpg",
        "C:/a.jpg",
        "C:a.jpg",
        "file:///etc/passwd",
        "a.jpg:stream",
        "a\0.jpg",
        "a.jpg\0",
        "\0",
        "a\nb.jpg",
        "a.jpg\r",
        "\t/a.jpg",
        "a\x1b[2J.jpg",
    ],
)
def test_name_that_leads_elsewhere_is_refused(name: str) -> None:
    with pytest.raises(ValueError) as caught:
        confined(name, "here.json, entry 3")
    message = str(caught.value)
    assert message == f"here.json, entry 3: expected the name of an image inside its folder, found {name!r}"
    assert "\n" not in message


@pytest.mark.parametrize(
    "name",
    [
        "a.jpg",
        "2405722",
        "train2014/COCO_train2014_000000000009.jpg",
        "./a.jpg",
        "a//b.jpg",
        "a/./b.jpg",
        "42/",
        ".hidden",
        "...",
        "..a/b..",
        "a..jpg",
        "%2e%2e",
        "~/a.jpg",
        "~root",
        "$HOME",
        "é 漢字.jpg",
        " a b.jpg ",
        "\u2024\u2024/a.jpg",
    ],
)
def test_name_inside_is_kept(tmp_path: Path, name: str) -> None:
    """As it is, for nothing is expanded; what it names lies in the folder."""
    assert confined(name, "here") == name
    assert (tmp_path / name).resolve().is_relative_to(tmp_path.resolve())
    assert (tmp_path / name).resolve() != tmp_path.resolve()


def test_missing_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    there = [tmp_path / "one" / "a.jpg", tmp_path / "two" / "é b.jpg", tmp_path / "c.jpg"]
    for path in there:
        path.touch()
    gone = [
        tmp_path / "two" / "a.jpg",
        tmp_path / "no folder" / "a.jpg",
        tmp_path / "c.jpg" / "below a file.jpg",
        tmp_path / "one" / "a.JPG2",
    ]
    assert missing_files([]) == []
    assert missing_files(iter(there)) == []
    assert missing_files(gone) == gone
    assert missing_files([gone[0], *there, gone[1], gone[0]]) == [gone[0], gone[1], gone[0]]
    # Without a folder in front it is the working folder.
    monkeypatch.chdir(tmp_path)
    assert missing_files([Path("c.jpg"), Path("one/a.jpg"), Path("d.jpg")]) == [Path("d.jpg")]


def test_missing_files_lists_each_folder_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listed: list[Any] = []
    for name in ("listdir", "scandir"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda path=".", real=real: (listed.append(path), real(path))[1])
    (tmp_path / "one").mkdir()
    missing = missing_files(
        tmp_path / folder / f"{number}.jpg" for number in range(50) for folder in ("one", "")
    )
    assert len(missing) == 100
    assert len(listed) == 2


def test_threads_leave_the_filters_of_warnings(monkeypatch: pytest.MonkeyPatch) -> None:
    """One thread ends while another reads; what hides Pillow's warnings goes with the last."""
    content, places = encoded(PICTURE, "PNG"), count()
    inside, first_ended = (Event(), Event()), Event()
    real = Image.open

    def opened(*arguments: Any, **options: Any) -> Any:
        place = next(places)
        inside[place].set()
        (inside[1] if place == 0 else first_ended).wait(10)
        return real(*arguments, **options)

    monkeypatch.setattr(Image, "open", opened)
    before = list(warnings.filters)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(read_image, content)
        inside[0].wait(10)
        second = pool.submit(read_image, content)
        first.result(10)
        first_ended.set()
        second.result(10)
    assert list(warnings.filters) == before
