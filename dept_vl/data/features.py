"""Visual features of a set of images, each encoded once, in memory or memory-mapped.

The vision encoder is frozen, so the features of an image do not change.
"""

from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.data import Dataset

from dept_vl._utils.images import ImageSource, read_image
from dept_vl._utils.io import one_line
from dept_vl._utils.tensors import read_tensors
from dept_vl._utils.terminal import Count
from dept_vl.data import workers as readers
from dept_vl.models.vision import VisionEncoder

EXTRACT = "dept-vl features"


def load_pixels(vision: VisionEncoder, source: ImageSource) -> Float[Tensor, "3 height width"]:
    """Read and preprocess an image; FileNotFoundError if it is missing, ValueError if it is not usable."""
    image = read_image(source, exif=vision.exif)
    try:
        return vision.preprocess([image])[0]
    except (ValueError, MemoryError) as error:
        name = source if isinstance(source, str | Path) else "what was given"
        raise ValueError(f"{name!s} is not a usable image: {one_line(error)}") from None


class _Pixels(Dataset[tuple[Tensor, str]]):
    """Pixels of images, each with an empty message; zeros with an error message for unreadable images."""

    def __init__(self, vision: VisionEncoder, paths: Sequence[Path]) -> None:
        self.vision, self.paths = vision, paths
        self.blank = torch.zeros(vision.pixel_shape)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, str]:
        try:
            return load_pixels(self.vision, self.paths[index]), ""
        except (ValueError, FileNotFoundError) as error:
            return self.blank, str(error)


class FeatureTable:
    """Features of a set of images by file, in memory or memory-mapped.

    Args:
        sources: Tensors of shape (images, tokens, d_vision), all of one dtype, or the files to map them from.
        places: Index of the tensor and row in it, by image file.
        errors: Error message by image file, for images that could not be read.

    Raises:
        ValueError: If the tensors have different dtypes.
    """

    def __init__(
        self,
        sources: Sequence[Path | Float[Tensor, "_ tokens d_vision"]],
        places: Mapping[Path, tuple[int, int]],
        errors: Mapping[Path, str],
    ) -> None:
        self.sources, self.places, self.errors = list(sources), dict(places), errors
        self.shards = [read_shard(one) if isinstance(one, Path) else one for one in self.sources]
        dtypes = {str(shard.dtype).removeprefix("torch.") for shard in self.shards}
        if len(dtypes) != 1:
            raise ValueError(f"expected visual features of one dtype, found {', '.join(sorted(dtypes))}")
        self.dtype = dtypes.pop()
        # As bytes, since NumPy copies rows several times faster than torch, but has no bfloat16.
        self._rows = [shard.view(torch.uint8).numpy() for shard in self.shards]

    @classmethod
    def encode(
        cls,
        vision: VisionEncoder,
        paths: Sequence[Path],
        *,
        batch_size: int = 64,
        num_workers: int = 0,
        progress: bool = True,
    ) -> "FeatureTable":
        """Encode images into memory in float32; repeated images are encoded once."""
        distinct = list(dict.fromkeys(paths))
        batches = batches_of(0, len(distinct), batch_size)
        features = torch.empty(len(distinct), vision.token_count, vision.d_vision)
        errors: dict[Path, str] = {}
        for rows, encoded, messages in encode_images(vision, distinct, batches, num_workers, progress):
            features[rows.start : rows.stop] = encoded
            errors |= {distinct[row]: error for row, error in zip(rows, messages, strict=True) if error}
        return cls([features], {path: (0, row) for row, path in enumerate(distinct)}, errors)

    def with_renewed(self, vision: VisionEncoder, paths: Sequence[Path]) -> "FeatureTable":
        """Encode some images again, in the dtype of the table; ValueError if values are too large for it."""
        new = FeatureTable.encode(vision, paths, progress=False)
        shard = new.shards[0].to(self.shards[0].dtype)
        if not shard.isfinite().all():
            raise ValueError(f"features of images that have changed are too large for {self.dtype}")
        number = len(self.shards)
        places = {path: (number, row) for path, (_, row) in new.places.items()}
        errors = {path: error for path, error in self.errors.items() if path not in places} | dict(new.errors)
        return FeatureTable([*self.sources, shard], {**self.places, **places}, errors)

    @classmethod
    def joined(cls, tables: Sequence["FeatureTable"]) -> "FeatureTable":
        """Return the union of tables of one dtype."""
        sources: list[Path | Tensor] = []
        places: dict[Path, tuple[int, int]] = {}
        errors: dict[Path, str] = {}
        for table in tables:
            places |= {path: (len(sources) + shard, row) for path, (shard, row) in table.places.items()}
            errors |= table.errors
            sources += table.sources
        return cls(sources, places, errors)

    def __reduce__(self) -> tuple[Any, ...]:
        # Mapped shards are pickled by file name, so that a spawned worker maps them without copying.
        return FeatureTable, (self.sources, self.places, self.errors)

    @property
    def files(self) -> list[Path]:
        """Files that shards are mapped from."""
        return [source for source in self.sources if isinstance(source, Path)]

    def check(self, paths: Sequence[Path]) -> None:
        """Raise ValueError with the error message if one of the images could not be read."""
        for path in paths:
            if path in self.errors:
                raise ValueError(self.errors[path])

    def __call__(self, examples: Sequence[Sequence[Path]]) -> Float[Tensor, "batch images tokens d_vision"]:
        """Return the features of the images of examples, which all have the same number of images."""
        places = [self.places[path] for paths in examples for path in paths]
        features = self.shards[0].new_empty(len(places), *self.shards[0].shape[1:])
        rows = features.view(torch.uint8).numpy()
        for place, (shard, row) in enumerate(places):
            rows[place] = self._rows[shard][row]
        return features.view(len(examples), -1, *features.shape[1:])


def table_bytes(vision: VisionEncoder, image_count: int) -> int:
    """Return the memory in bytes that `FeatureTable.encode` needs for `image_count` images."""
    return image_count * vision.token_count * vision.d_vision * 4


def batches_of(start: int, stop: int, size: int) -> list[range]:
    """Return the range from `start` to `stop` in parts of `size`."""
    return [range(first, min(first + size, stop)) for first in range(start, stop, size)]


def encode_images(
    vision: VisionEncoder,
    paths: Sequence[Path],
    batches: Sequence[range],
    num_workers: int,
    progress: bool,
    processes: int = 1,
) -> Generator[tuple[range, Float[Tensor, "batch tokens d_vision"], Sequence[str]], None, None]:
    """Yield each batch with its features and an error message for each image, empty if it was read.

    With several processes, progress assumes that each has the same number of images.
    """
    device = next(vision.parameters()).device
    loader = readers.load(
        _Pixels(vision, paths),
        num_workers,
        batch_sampler=[list(batch) for batch in batches],
        pin_memory=device.type == "cuda",
    )
    total = processes * sum(map(len, batches))
    with Count("encoding images", total, show=progress) as count:
        for rows, (pixels, messages) in zip(batches, loader, strict=True):
            yield rows, vision(pixels.to(device, non_blocking=True)).cpu(), messages
            count.add(processes * len(rows))


def read_shard(path: Path) -> Float[Tensor, "images tokens d_vision"]:
    """Map a shard into memory; FileNotFoundError if it is missing, ValueError if it is damaged."""
    tensors = read_tensors(path)
    if tensors.keys() != {"features"} or tensors["features"].dim() != 3:
        raise ValueError(f"{path} is damaged: it holds no features; {EXTRACT} makes it again")
    return tensors["features"]
