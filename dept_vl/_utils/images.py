"""Image files, read with care: they come by the hundred thousand, and some are broken."""

import errno
import os
import warnings
from collections.abc import Iterable
from io import BytesIO
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image, UnidentifiedImageError

from dept_vl._utils.io import one_line

SIXTEEN_BIT_MODES = ("I", "I;16", "I;16B", "I;16L", "I;16N", "F")
"""Pillow's modes of grey images with more than eight bits, which its own conversion would clip."""

Image.init()  # registers what this Pillow reads; AVIF is not in all of them
FORMATS = tuple(
    form
    for form in ("JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP", "PPM", "JPEG2000", "AVIF")
    if form in Image.OPEN
)
"""What is read, whatever a file is called. Pillow knows 30 more, and runs other programs for some of them
(Ghostscript for EPS)."""

JPEG_QUALITY = 95
FULL_CHROMA = 0
"""Of images that are written. Pillow's code for 4:4:4: halved chroma would bleed colours of small shapes."""

ImageSource = str | Path | bytes | Image.Image
"""An image file, its content, or an image that Pillow has opened."""


def read_image(source: ImageSource) -> Image.Image:
    """Read an image as RGB: grey, palette, CMYK and 16-bit images too, of an animation the first frame.

    The pixels are as stored: transparency is dropped, and no rotation noted beside them is made.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no whole image of one of `FORMATS`, or so large that it may be meant to fill
            the memory.
        OSError: If the process may open no more files, or a network disk is gone.
    """
    try:
        if isinstance(source, Image.Image):
            return to_rgb(source)
        file = BytesIO(source) if isinstance(source, bytes) else Path(source)
        if (len(source) if isinstance(source, bytes) else Path(source).stat().st_size) == 0:
            raise EOFError("the file is empty")
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            # What Pillow says of odd metadata is no fault of the pixels.
            warnings.simplefilter("ignore", UserWarning)
            with Image.open(file, formats=FORMATS) as image:
                image.load()
                return to_rgb(image)
    except FileNotFoundError:
        raise FileNotFoundError(f"no image at {source!s}") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(
            f"{_called(source)} is no readable image: {one_line(error)} If it is meant to be so large, raise "
            "PIL.Image.MAX_IMAGE_PIXELS"
        ) from None
    # Pillow's decoders raise almost anything on damaged bytes.
    except Exception as error:
        # Nothing is wrong with the image, and it must not be left out for this.
        if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE, errno.ESTALE):
            raise
        # Pillow would name the object in memory.
        unknown = isinstance(error, UnidentifiedImageError)
        problem = f"it is none of {', '.join(FORMATS)}" if unknown else one_line(error)
        again = "download it again" if isinstance(source, str | Path) else "take another copy"
        # What the system refuses, such as a folder, is not cured by another copy.
        advice = "" if isinstance(error, OSError) and error.errno else f"; {again}"
        raise ValueError(f"{_called(source)} is no readable image: {problem}{advice}") from None


def _called(source: ImageSource) -> str:
    """Name of an image in messages."""
    if isinstance(source, bytes):
        return f"what was given ({len(source):,} bytes)"
    return f"{source!s}" if isinstance(source, str | Path) else "what was given"


def to_rgb(image: Image.Image) -> Image.Image:
    """An image of any of Pillow's modes in RGB; more than eight bits are scaled, not clipped."""
    return (_eight_bits(image) if image.mode in SIXTEEN_BIT_MODES else image).convert("RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    values = np.nan_to_num(np.asarray(image, dtype=np.float64), nan=0, posinf=0, neginf=0)
    largest = values.max()
    if image.mode == "F" and largest <= 1:
        values = values * 255  # fractions of white
    elif largest > 0xFFFF:
        values = values * (255 / largest)
    elif largest > 0xFF:
        values = values // 256  # the upper of two bytes; 8-bit values kept in a wider mode stay
    return Image.fromarray(np.clip(np.rint(values), 0, 255).astype(np.uint8))


def confined(name: str, what: str) -> str:
    """A path from a data file, which must stay inside the folder it is looked up in.

    Args:
        name: The relative path, with forward slashes.
        what: Where it was found, for the message.

    Raises:
        ValueError: If it is empty, absolute, goes up, or has characters of other systems' paths or none
            of any name's: backslash, colon, control characters.
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
    """Those that are not there, found by one listing of each folder rather than a look at each file."""
    listings: dict[str, set[str]] = {}
    missing = []
    for path in paths:
        folder, name = os.path.split(path)  # a Path of each folder would take most of the time
        if folder not in listings:
            here = folder or "."
            listings[folder] = set(os.listdir(here)) if os.path.isdir(here) else set()
        if name not in listings[folder]:
            missing.append(path)
    return missing
