"""Reading of image files, including large numbers of files and damaged ones."""

import errno
import math
import os
import warnings
from collections.abc import Iterable
from io import BytesIO
from pathlib import Path, PurePosixPath
from threading import Lock
from typing import Any

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from dept_vl._utils.embedded import embedded_bytes, is_embedded
from dept_vl._utils.io import one_line
from dept_vl._utils.printable import printable

SIXTEEN_BIT_MODES = ("I", "I;16", "I;16B", "I;16L", "I;16N", "F")
"""Pillow's modes of grey images with more than eight bits. Pillow's own conversion would clip them."""

Image.init()  # registers what this Pillow reads; AVIF is not in all of them
FORMATS = tuple(
    form
    for form in ("JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP", "PPM", "JPEG2000", "AVIF")
    if form in Image.OPEN
)
"""Supported formats, recognised by content. Pillow has 30 more, some of which run other programs (Ghostscript
for EPS)."""

JPEG_QUALITY = 95
FULL_CHROMA = 0
"""Pillow's code for 4:4:4 chroma in written images. Halved chroma would blur the colours of small shapes."""

ORIENTATION = ExifTags.Base.Orientation
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""Transformation that makes an image upright, by EXIF orientation."""
TIFF_COLOURS, TIFF_COMPRESSION, TIFF_YCBCR = 262, 259, 6
"""Tags of TIFF, and the value of the first for YCbCr."""
STRIP_ROWS = 256
"""Number of rows of a 16-bit image converted at a time."""
EXIF_BYTES = 1 << 16
"""Number of bytes at the start of a file to search for its orientation."""
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
PNG_TEXTS = (b"tEXt", b"zTXt", b"iTXt")

LARGEST_RATIO = 200
"""Maximum ratio of the longer to the shorter side of an image. Photographs stay below it, and encoders that
resize the shorter side to 224 would make 44,800 of the longer one."""
LARGEST_RESIZED = 1 << 26
"""Maximum number of pixels of a resized image: 192 MiB in RGB."""

ImageSource = str | Path | bytes | Image.Image
"""An image file, the content of one, or an image opened by Pillow."""


def read_image(source: ImageSource, *, exif: bool = True) -> Image.Image:
    """Read an image as RGB, also from grey, palette, CMYK and 16-bit images. Animations give the first frame.

    Transparency is dropped, so hidden colours become visible. A JPEG with more than
    `PIL.Image.MAX_IMAGE_PIXELS` pixels, up to twice as many, is decoded at half its size or less.

    Args:
        source: Image to read.
        exif: Whether to turn and mirror the image by its EXIF orientation, as
            `transformers.image_utils.load_image` does. Otherwise pixels are as stored, except that Pillow
            always turns TIFF files.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If it is not a complete image in one of `FORMATS`, or too large to be safe.
        OSError: If the process has too many open files, or a network disk is gone.
    """
    try:
        if isinstance(source, str | Path) and is_embedded(source):
            return read_image(embedded_bytes(source), exif=exif)
        if isinstance(source, Image.Image):
            return _upright(source, exif)
        if (len(source) if isinstance(source, bytes) else Path(source).stat().st_size) == 0:
            raise EOFError("the file is empty")
        try:
            return _read(BytesIO(source) if isinstance(source, bytes) else Path(source), exif)
        except ValueError:
            # Pillow rejects text chunks over a megabyte, which do not affect the pixels.
            content = source if isinstance(source, bytes) else _png_content(Path(source))
            if not content.startswith(PNG_SIGNATURE):
                raise
            return _read(BytesIO(_without_texts(content)), exif)
    except FileNotFoundError:
        raise FileNotFoundError(f"no image at {_called(source)}") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(
            f"{_called(source)} is not a readable image: {one_line(error)} If it is meant to be so large, "
            "raise PIL.Image.MAX_IMAGE_PIXELS"
        ) from None
    # Pillow's decoders raise almost anything on damaged bytes.
    except Exception as error:
        # The image itself is fine, and must not be skipped because of this.
        if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE, errno.ESTALE):
            raise
        # Pillow's message would contain the address of an object.
        unknown = isinstance(error, UnidentifiedImageError)
        problem = f"it is none of {', '.join(FORMATS)}" if unknown else one_line(error)
        raise ValueError(f"{_called(source)} is not a readable image: {problem}") from None


class _Quiet:
    """Hides Pillow's warnings in `with` statements of several threads at once.

    These share one change of the filters. If each changed them, the last would leave its own behind.
    """

    def __init__(self) -> None:
        self.lock, self.inside = Lock(), 0

    def __enter__(self) -> None:
        with self.lock:
            if not self.inside:
                self.usual = warnings.catch_warnings()
                self.usual.__enter__()
                warnings.filterwarnings("ignore", module="PIL[.]")
            self.inside += 1

    def __exit__(self, *exception: object) -> None:
        with self.lock:
            self.inside -= 1
            if not self.inside:
                self.usual.__exit__(None, None, None)


_quiet = _Quiet()


def _read(file: Path | BytesIO, exif: bool) -> Image.Image:
    # Warnings about odd metadata do not concern the pixels; sizes are checked below.
    with _quiet, Image.open(file, formats=FORMATS) as image:
        if _is_plain_ycbcr(image):
            raise ValueError("it is an uncompressed TIFF in YCbCr, which is not read; save it in RGB")
        limit, pixels = Image.MAX_IMAGE_PIXELS, math.prod(image.size)
        if limit is not None and pixels > limit:
            # The JPEG decoder can shrink while decoding; others would need memory for the full size.
            image.draft(None, (image.width // 2, image.height // 2))
            if math.prod(image.size) > limit:
                raise Image.DecompressionBombWarning(
                    f"Image size ({pixels} pixels) exceeds limit of {limit} pixels."
                )
        image.load()
        return _upright(image, exif)


def _is_plain_ycbcr(image: Image.Image) -> bool:
    """Return whether this is a file that Pillow takes for four bytes a pixel, and so for a truncated one."""
    tags = getattr(image, "tag_v2", {})
    return tags.get(TIFF_COLOURS) == TIFF_YCBCR and tags.get(TIFF_COMPRESSION, 1) == 1


def _upright(image: Image.Image, exif: bool) -> Image.Image:
    """Return an image in RGB, turned by its EXIF orientation if `exif`."""
    rgb = to_rgb(image)
    turn = TURNS.get(orientation_of(image)) if exif else None
    if turn is None:
        return rgb
    turned = rgb.transpose(turn)
    turned.info.clear()  # otherwise reading it again would turn it again
    return turned


def orientation_of(image: Image.Image) -> int:
    """Return the EXIF orientation of a loaded image; 1 (upright) if it has none."""
    try:
        value = image.getexif().get(ORIENTATION, 1)
    except Exception:  # odd metadata does not concern the pixels
        return 1
    return value if isinstance(value, int) else 1


def is_turned(path: Path) -> bool:
    """Return whether the EXIF orientation of an image file turns it; False if it is not an image."""
    try:
        with path.open("rb") as file:
            start = file.read(EXIF_BYTES)
            # Most photographs in data sets have no EXIF and need no decoder.
            if start.startswith(b"\xff\xd8") and b"Exif" not in start and b"tiff:Orientation" not in start:
                return False
        with _quiet, Image.open(path, formats=FORMATS) as image:
            if image.format == "PNG":  # its EXIF may come after the pixels
                image.load()
            return orientation_of(image) in TURNS and image.format != "TIFF"
    except Exception:  # `read_image` reports what is wrong
        return False


def check_shape(width: int, height: int, shortest_edge: int | None) -> None:
    """Check the size of an image before processing it.

    `shortest_edge` is the size in pixels that the shorter side is resized to; None if both sides are resized.
    Raises ValueError if the image is too elongated, or too large after resizing.
    """
    short, long = sorted((width, height))
    if short < 1 or long > LARGEST_RATIO * short:
        raise ValueError(
            f"expected the longer side to be at most {LARGEST_RATIO} times the shorter, found "
            f"{width:,} x {height:,} pixels"
        )
    if shortest_edge is not None and shortest_edge**2 * long > LARGEST_RESIZED * short:
        raise ValueError(
            f"expected at most {LARGEST_RESIZED:,} pixels after resizing the shorter side to "
            f"{shortest_edge}, found {width:,} x {height:,} pixels"
        )


def _png_content(path: Path) -> bytes:
    """Return the content of a PNG file; empty for another file."""
    with path.open("rb") as file:
        start = file.read(len(PNG_SIGNATURE))
        return start + file.read() if start == PNG_SIGNATURE else b""


def _without_texts(png: bytes) -> bytes:
    kept, place = [PNG_SIGNATURE], len(PNG_SIGNATURE)
    while place + 12 <= len(png):
        end = place + 12 + int.from_bytes(png[place : place + 4])
        if png[place + 4 : place + 8] not in PNG_TEXTS:
            kept.append(png[place:end])
        place = end
    return b"".join(kept)


def _called(source: ImageSource) -> str:
    """Return the name of an image for messages."""
    if isinstance(source, bytes):
        return f"what was given ({len(source):,} bytes)"
    return printable(source) if isinstance(source, str | Path) else "what was given"


def to_rgb(image: Image.Image) -> Image.Image:
    """Return an image of any Pillow mode in RGB. More than eight bits are scaled, not clipped."""
    return (_eight_bits(image) if image.mode in SIXTEEN_BIT_MODES else image).convert("RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    stored = np.asarray(image)
    # In strips, since the whole image in double precision would take eight times the memory.
    strips = [slice(row, row + STRIP_ROWS) for row in range(0, len(stored), STRIP_ROWS)]
    largest = max(_finite(stored[strip]).max() for strip in strips)
    pixels = np.empty(stored.shape, np.uint8)
    for strip in strips:
        values = _finite(stored[strip])
        if image.mode == "F" and largest <= 1:
            values = values * 255  # fractions of white
        elif largest > 0xFFFF:
            values = values * (255 / largest)
        elif largest > 0xFF:
            values = values // 256  # the upper of two bytes; 8-bit values kept in a wider mode stay
        pixels[strip] = np.clip(np.rint(values), 0, 255)
    return Image.fromarray(pixels)


def _finite(values: np.ndarray[Any, np.dtype[Any]]) -> np.ndarray[Any, np.dtype[np.float64]]:
    return np.nan_to_num(np.asarray(values, dtype=np.float64), nan=0, posinf=0, neginf=0)


def confined(name: str, what: str) -> str:
    """Return a path from a data file, after checking that it stays inside its folder.

    Raises ValueError if it is empty, absolute, contains `..`, a backslash, a colon or control characters.
    """
    path = PurePosixPath(name)
    if (
        not path.name
        or path.is_absolute()
        or ".." in path.parts
        or "\\" in name
        or ":" in name
        or min(name) < " "
    ):
        raise ValueError(f"{what}: expected the name of an image inside its folder, found {name!r:.60}")
    return name


def missing_files(paths: Iterable[Path]) -> list[Path]:
    """Return the files that do not exist, from one listing of each folder."""
    listings: dict[str, set[str]] = {}
    missing = []
    for path in paths:
        folder, name = os.path.split(path)  # creating a Path for each folder would take most of the time
        if folder not in listings:
            here = folder or "."
            listings[folder] = set(os.listdir(here)) if os.path.isdir(here) else set()
        if name not in listings[folder] and not is_embedded(path):
            missing.append(path)
    return missing
