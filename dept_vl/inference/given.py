"""Conversion of image arguments: files, bytes, Pillow images, arrays, tensors, rows of `datasets`."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from dept_vl._utils.embedded import data_url_bytes, is_data_url
from dept_vl._utils.images import ImageSource

CHANNELS = (1, 3, 4)
TEXTS = "OUT"
"""Kinds of NumPy arrays that hold texts or objects, as columns of a table do: several paths or images."""
KINDS = (
    "a path, the bytes of a file, an open file, a data URL, a Pillow image, an array or a tensor of shape "
    "(height, width), (height, width, channels) or (channels, height, width), or a row of datasets with "
    "bytes or path"
)


def as_images(image: Any, *, pairs: bool) -> tuple[list[tuple[ImageSource, ...]], bool]:
    """Return the images of each question, and whether there is just one question.

    Args:
        image: One image (see `as_image`) or several, as a sequence or as an array or tensor with four
            dimensions. None is a question without image, also as an element of a sequence.
        pairs: Whether the questions have two images, so that a flat sequence belongs to one question.

    Raises:
        ValueError: If an item is not an image; with several items, the message has its number.
    """
    if is_one(image):
        return [() if image is None else (as_image(image),)], True
    several = list(image)
    known: dict[int, ImageSource] = {}  # the same object becomes the same image, which is encoded once

    def converted(one: Any, number: int) -> ImageSource:
        if id(one) not in known:
            known[id(one)] = as_image(one, f"image {number} of {len(several)}")
        return known[id(one)]

    if pairs and several and all(map(is_one, several)):
        return [tuple(converted(one, number) for number, one in enumerate(several, 1))], True
    groups = [[] if one is None else [one] if is_one(one) else list(one) for one in several]
    return [tuple(converted(one, n) for one in group) for n, group in enumerate(groups, 1)], False


def is_one(given: Any) -> bool:
    """Return whether this is a single image or None, rather than several images."""
    if isinstance(given, np.ndarray | torch.Tensor):
        several = isinstance(given, np.ndarray) and given.dtype.kind in TEXTS and given.ndim > 0
        return given.ndim < 4 and not several
    single = given is None or isinstance(given, ImageSource | bytearray | memoryview | Mapping)
    return single or hasattr(given, "read") or not isinstance(given, Iterable)


def as_image(given: Any, name: str = "image") -> ImageSource:
    """Convert an image to a form that `read_image` accepts.

    Args:
        given: A path, the bytes of a file, an open file, a data URL or a Pillow image; an array or tensor
            of shape (height, width), (height, width, channels) or (channels, height, width) with 1, 3 or 4
            channels and integers from 0 to 255 or floats from 0 to 1 (if both layouts are possible, tensors
            have channels first and arrays last); or a row of `datasets`, which is a mapping with `bytes` or
            `path`, or with any of these under `image`.
        name: Name of the image, for the ValueError if `given` is none of these.
    """
    if isinstance(given, str) and is_data_url(given):
        return data_url_bytes(given, name)
    if isinstance(given, str | Path | bytes | Image.Image):
        return given
    if isinstance(given, bytearray | memoryview):
        return bytes(given)
    if isinstance(given, torch.Tensor):
        tensor = given.detach().cpu()
        # NumPy has no bfloat16.
        return _of_array((tensor.float() if tensor.is_floating_point() else tensor).numpy(), (0, 2), name)
    if isinstance(given, np.ndarray):
        return _of_array(given, (2, 0), name)
    if isinstance(given, Mapping):
        for key in ("bytes", "path", "image"):
            if given.get(key) is not None:
                return as_image(given[key], name)
    elif hasattr(given, "read"):
        if getattr(given, "seekable", bool)():
            given.seek(0)
        content = given.read()
        if isinstance(content, bytes):
            return content
        raise ValueError(f"{name}: expected a file that is opened for bytes ('rb'), found one of text")
    kind = f"a mapping with {list(given)!r:.100}" if isinstance(given, Mapping) else type(given).__name__
    raise ValueError(f"{name}: expected {KINDS}; found {kind}")


def _of_array(given: Any, channels_at: tuple[int, int], name: str) -> Image.Image:
    """Convert an array to an 8-bit Pillow image; `channels_at` has the channel axes to try, in order."""
    shape = tuple(given.shape)
    at = [place for place in channels_at if len(shape) == 3 and shape[place] in CHANNELS]
    if not (at or len(shape) == 2) or 0 in shape:
        raise ValueError(
            f"{name}: expected the shape (height, width), (height, width, channels) or (channels, height, "
            f"width) with 1, 3 or 4 channels, found {shape}"
        )
    values = np.moveaxis(given, at[0], -1) if at else given
    if values.dtype == bool or values.dtype.kind not in "uif":
        raise ValueError(f"{name}: expected whole numbers or floats, found {values.dtype}")
    low, high, most = values.min(), values.max(), 1 if values.dtype.kind == "f" else 255
    if not (low >= 0 and high <= most):  # NaN too
        raise ValueError(
            f"{name}: expected whole numbers from 0 to 255 or floats from 0 to 1, found {values.dtype} from "
            f"{low:.4g} to {high:.4g}; give the image as it was before it was normalised"
        )
    eight = np.rint(values * 255.0) if most == 1 else values
    pixels = np.ascontiguousarray(eight.astype(np.uint8))
    return Image.fromarray(pixels[..., 0] if pixels.ndim == 3 and pixels.shape[2] == 1 else pixels)
