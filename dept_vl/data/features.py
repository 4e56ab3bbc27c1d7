"""Visual features of a set of images, each encoded once: a table of them in memory, or mapped into it.

The tower is frozen, so an image's features never change.
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
    """Read and preprocess one image; raise FileNotFoundError without one, ValueError if it is not usable."""
    image = read_image(source, exif=vision.exif)
    try:
        return vision.preprocess([image])[0]
    except (ValueError, MemoryError) as error:
        name = source if isinstance(source, str | Path) else "what was given"
        raise ValueError(f"{name!s} is no usable image: {one_line(error)}") from None


class _Pixels(Dataset[tuple[Tensor, str]]):
    """Pixels with an empty message, or zeros with what is wrong with the file."""

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
    """Features of a set of images, in memory or mapped into it, looked up by file.

    Args:
        shards: (images, tokens, d_vision) each, all of one dtype.
        places: Shard and row in it of each file.
        errors: What is wrong with the files that could not be read.
        files: What the first shards are mapped from; the others are in memory.

    Raises:
        ValueError: If the shards are of several dtypes.
    """

    def __init__(
        self,
        shards: Sequence[Float[Tensor, "_ tokens d_vision"]],
        places: Mapping[Path, tuple[int, int]],
        errors: Mapping[Path, str],
        files: Sequence[Path] = (),
    ) -> None:
        self.shards, self.places, self.errors, self.files = list(shards), dict(places), errors, tuple(files)
        dtypes = {str(shard.dtype).removeprefix("torch.") for shard in self.shards}
        if len(dtypes) != 1:
            raise ValueError(f"expected visual features of one dtype, found {', '.join(sorted(dtypes))}")
        self.dtype = dtypes.pop()
        # Bytes: NumPy copies rows several times faster than torch does, and knows no bfloat16.
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
        """Encode images into memory, in float32, each once however often it is named.

        Args:
            vision: The frozen encoder.
            paths: The images.
            batch_size: Images encoded at a time.
            num_workers: Processes that read and preprocess images; 0 uses this one.
            progress: Print how far it is.
        """
        distinct = list(dict.fromkeys(paths))
        batches = batches_of(0, len(distinct), batch_size)
        features = torch.empty(len(distinct), vision.token_count, vision.d_vision)
        errors: dict[Path, str] = {}
        for rows, encoded, messages in encode_images(vision, distinct, batches, num_workers, progress):
            features[rows.start : rows.stop] = encoded
            errors |= {distinct[row]: error for row, error in zip(rows, messages, strict=True) if error}
        return cls([features], {path: (0, row) for row, path in enumerate(distinct)}, errors)

    @classmethod
    def map(
        cls,
        files: Sequence[Path],
        places: Mapping[Path, tuple[int, int]],
        errors: Mapping[Path, str],
        renewed: Sequence[Float[Tensor, "_ tokens d_vision"]] = (),
    ) -> "FeatureTable":
        """Map shards into memory, in front of others that are there."""
        return cls([*map(read_shard, files), *renewed], places, errors, files)

    def with_renewed(self, vision: VisionEncoder, paths: Sequence[Path]) -> "FeatureTable":
        """Encode some images again, in the dtype of the others; raise ValueError if that is too small."""
        new = FeatureTable.encode(vision, paths, progress=False)
        shard = new.shards[0].to(self.shards[0].dtype)
        if not shard.isfinite().all():
            raise ValueError(f"features of images that have changed are too large for {self.dtype}")
        number = len(self.shards)
        places = {path: (number, row) for path, (_, row) in new.places.items()}
        errors = {path: error for path, error in self.errors.items() if path not in places} | dict(new.errors)
        renewed = [*self.shards[len(self.files) :], shard]
        return FeatureTable.map(self.files, {**self.places, **places}, errors, renewed)

    @classmethod
    def joined(cls, tables: Sequence["FeatureTable"]) -> "FeatureTable":
        """Join several mapped tables of one dtype."""
        places: dict[Path, tuple[int, int]] = {}
        errors: dict[Path, str] = {}
        files = [file for table in tables for file in table.files]
        renewed: list[Tensor] = []
        mapped = 0
        for table in tables:
            own = len(table.files)
            for path, (shard, row) in table.places.items():
                behind = len(files) + len(renewed) + shard - own
                places[path] = (mapped + shard if shard < own else behind, row)
            errors |= table.errors
            mapped += own
            renewed += table.shards[own:]
        return cls.map(files, places, errors, renewed)

    def __reduce__(self) -> tuple[Any, ...]:
        # By name where there is one, so that a spawned worker maps the files and copies nothing.
        if self.files:
            renewed = self.shards[len(self.files) :]
            return FeatureTable.map, (self.files, self.places, self.errors, renewed)
        return FeatureTable, (self.shards, self.places, self.errors)

    def check(self, paths: Sequence[Path]) -> None:
        """Raise ValueError if one of the images could not be read, with what is wrong with the first."""
        for path in paths:
            if path in self.errors:
                raise ValueError(self.errors[path])

    def __call__(self, examples: Sequence[Sequence[Path]]) -> Float[Tensor, "batch images tokens d_vision"]:
        """Return features of the images of some examples, each of which has as many."""
        places = [self.places[path] for paths in examples for path in paths]
        features = self.shards[0].new_empty(len(places), *self.shards[0].shape[1:])
        rows = features.view(torch.uint8).numpy()
        for place, (shard, row) in enumerate(places):
            rows[place] = self._rows[shard][row]
        return features.view(len(examples), -1, *features.shape[1:])


def table_bytes(vision: VisionEncoder, image_count: int) -> int:
    """Return memory that `FeatureTable.encode` takes for so many images."""
    return image_count * vision.token_count * vision.d_vision * 4


def batches_of(start: int, stop: int, size: int) -> list[range]:
    """Return the numbers from start to stop, so many at a time."""
    return [range(first, min(first + size, stop)) for first in range(start, stop, size)]


def encode_images(
    vision: VisionEncoder,
    paths: Sequence[Path],
    batches: Sequence[range],
    num_workers: int,
    progress: bool,
    processes: int = 1,
) -> Generator[tuple[range, Float[Tensor, "batch tokens d_vision"], Sequence[str]], None, None]:
    """Yield the batches, each with its features and, for every image, what is wrong with it or nothing.

    Of several processes with as many batches each, the count is that of all.
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
    """Map a shard into memory; raise FileNotFoundError without one, ValueError if it is damaged."""
    tensors = read_tensors(path)
    if tensors.keys() != {"features"} or tensors["features"].dim() != 3:
        raise ValueError(f"{path} is damaged: it holds no features; {EXTRACT} makes it again")
    return tensors["features"]
