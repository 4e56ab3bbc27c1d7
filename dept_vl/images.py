"""Image files, read with care: they come by the hundred thousand, and some are broken."""

import warnings
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image

SIXTEEN_BIT_MODES = ("I", "I;16", "I;16B", "I;16L", "I;16N", "F")
"""Pillow's modes of grey images with more than eight bits, which its own conversion would clip."""


def read_image(path: Path) -> Image.Image:
    """Read an image as RGB: grey, palette, CMYK and 16-bit images too, of an animation the first frame.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no whole image, or so large that it may be meant to fill the memory.
    """
    try:
        if path.stat().st_size == 0:
            raise ValueError(f"{path} is no readable image: the file is empty; download it again")
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            # What Pillow says of odd metadata is no fault of the pixels.
            warnings.simplefilter("ignore", UserWarning)
            with Image.open(path) as image:
                image.load()
                return _rgb(image)
    except FileNotFoundError:
        raise FileNotFoundError(f"no image at {path}") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(
            f"{path} is no readable image: {error}. If it is meant to be so large, raise "
            "PIL.Image.MAX_IMAGE_PIXELS"
        ) from None
    # Pillow's decoders raise almost anything on damaged bytes.
    except (
        OSError,
        SyntaxError,
        ValueError,
        EOFError,
        IndexError,
        TypeError,
        OverflowError,
        KeyError,
    ) as error:
        if isinstance(error, ValueError) and str(path) in str(error):
            raise
        raise ValueError(f"{path} is no readable image: {error}; download it again") from None


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode in SIXTEEN_BIT_MODES:
        values = np.asarray(image, dtype=np.float32)
        # The upper of two bytes where there are two; 8-bit values kept in a wider mode stay.
        scale = 256.0 if values.size and values.max() > 255 else 1.0
        return Image.fromarray(np.clip(values / scale, 0, 255).astype(np.uint8)).convert("RGB")
    return image.convert("RGB")


def confined(name: str, what: str) -> str:
    """A path from a data file, which must stay inside the folder it is looked up in.

    Args:
        name: The relative path, with forward slashes.
        what: Where it was found, for the message.

    Raises:
        ValueError: If it is empty, absolute, or goes up.
    """
    path = PurePosixPath(name)
    if (
        not path.name
        or path.is_absolute()
        or ".." in path.parts
        or "\\" in name
        or "\0" in name
        or ":" in name
    ):
        raise ValueError(f"{what}: expected the name of an image inside its folder, found {name!r}")
    return name


def missing_files(paths: Iterable[Path]) -> list[Path]:
    """Those that are not there, found by one listing of each folder rather than a look at each file."""
    listings: dict[Path, set[str]] = {}
    missing = []
    for path in paths:
        folder = path.parent
        if folder not in listings:
            listings[folder] = {entry.name for entry in folder.iterdir()} if folder.is_dir() else set()
        if path.name not in listings[folder]:
            missing.append(path)
    return missing
