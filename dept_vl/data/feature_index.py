"""Index and shards of a folder of visual features. They record the images and the encoder.

Images are identified by their path relative to the data folder, since splits can have files of the same name.
"""

import errno
import hashlib
import json
import os
import zlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor
from torch.distributed.tensor import DTensor

from dept_vl._utils.checksums import checksum, note_compared, was_compared
from dept_vl._utils.embedded import embedded_bytes, is_embedded
from dept_vl._utils.errors import DamagedFileError
from dept_vl._utils.images import is_turned
from dept_vl._utils.io import read_json, write_json
from dept_vl._utils.options import check
from dept_vl._utils.printable import say
from dept_vl.data.features import EXTRACT, read_shard
from dept_vl.models.vision import VisionEncoder

INDEX_FILE = "index.json"
FORMAT_VERSION = 2
"""Version of the index. Version 1 has no image times and no checksum, and ignores the EXIF orientation."""
LOOKED_AT, LOOKERS = 1000, 16
"""Number of files that a thread stats at a time, and number of threads."""
NOWHERE = (errno.ENOENT, errno.ENAMETOOLONG, errno.ELOOP)
"""Errors of paths that lead to no file."""
VOLATILE = ("_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype")
"""Configuration fields that do not affect features."""


def fingerprint(vision: VisionEncoder) -> dict[str, str | int | bool]:
    """Return everything that features depend on; weights and configurations as 16 hexadecimal digits each.

    Unlike an adapter's fingerprint, it covers every bit of the weights, since features are stored.
    """
    weights = hashlib.sha256()
    for name, tensor in sorted(vision.weights().items()):
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor  # sharded tower
        weights.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        weights.update(tensor_bytes(whole.detach().cpu()))
    config = getattr(vision.model, "config", None)
    return {
        "weights": weights.hexdigest()[:16],
        "architecture": digest(config.to_diff_dict() if config is not None else type(vision.model).__name__),
        "preprocessing": digest(vision.processor.to_dict()),
        "vision_layer": vision.layer,
        "class_token": vision.class_token,
        "pooled_grid": vision.pooled_grid,
        "orientation": "exif" if vision.exif else "stored",
        **({} if vision.image_fit == vision.own_fit else {"image_fit": vision.image_fit}),
    }


def read_index(folder: Path) -> dict[str, Any]:
    """Read the index of a folder of features. An index of version 1 is completed to the current fields."""
    path = folder / INDEX_FILE
    if not path.is_file():
        raise FileNotFoundError(
            f"no visual features at {folder}: expected {INDEX_FILE} there; {EXTRACT} makes them, with the "
            "run's --task, --data_dir, and --backbone or --vision (or its --config)"
        )
    try:
        content = read_json(path)
    except ValueError as error:
        raise DamagedFileError(f"{error}; {EXTRACT} makes it again") from None
    # The checksum stands for everything else that this module writes; version 1 has none.
    version = content.get("format_version") if isinstance(content, dict) else FORMAT_VERSION
    # Checked first, since another version may compute the checksum differently.
    if version not in (1, FORMAT_VERSION):
        raise ValueError(
            f"{path} has format version {version!r:.60}; this dept_vl reads 1 and {FORMAT_VERSION}: make the "
            "features again in another --features_dir"
        )
    sealed = content.pop("checksum", None) if isinstance(content, dict) else None
    if version != 1 and sealed != _seal(content):
        raise DamagedFileError(
            f"{path} is damaged: its content has another checksum; {EXTRACT} makes it again"
        )
    index: dict[str, Any] = content
    if version == 1:
        index |= {"fingerprint": {**index["fingerprint"], "orientation": "stored"}, "image_times": []}
    return index


def is_first(index: Mapping[str, Any]) -> bool:
    """Return whether an index has format version 1, without image times and orientation."""
    return bool(index["format_version"] == 1)


def changed_images(index: Mapping[str, Any], rows: Mapping[Path, int]) -> list[Path]:
    """Return the images whose size or time differs from the index; missing images are not included."""
    sizes, times = index["image_bytes"], index["image_times"]
    return [
        path
        for (path, row), (size, time) in zip(rows.items(), file_stats(list(rows)), strict=True)
        if size and (size != sizes[row] or (not is_first(index) and time != times[row]))
    ]


def check_first(index: Mapping[str, Any], folder: Path, paths: Sequence[Path], *, exif: bool) -> None:
    """Print a note about features of version 1; ValueError if EXIF orientation would turn an image."""
    if not is_first(index):
        return
    say(
        f"note: the visual features at {folder} have no times of images: changes besides their size go "
        f"unnoticed; {EXTRACT} makes them again",
        error=True,
    )
    if not exif:
        return
    with ThreadPoolExecutor(LOOKERS) as pool:
        turned = [path for path, is_so in zip(paths, pool.map(is_turned, paths), strict=True) if is_so]
    if turned:
        raise ValueError(
            f"the EXIF orientation of {len(turned):,} of {len(paths):,} images turns them (first: "
            f"{turned[0]}), and the visual features at {folder} are of images as they are stored; "
            f"{EXTRACT} makes them again, or give --no_exif"
        )


def _seal(content: Any) -> str:
    return checksum(json.dumps(content, sort_keys=True).encode())


def image_keys(paths: Sequence[Path], root: Path) -> list[str]:
    """Return the names of images in an index: paths relative to the data folder, with forward slashes."""
    start = "" if root == Path() else os.path.join(root, "")
    # `Path.relative_to` would take half a second for 120,000 paths.
    return [os.fspath(path).removeprefix(start).replace(os.sep, "/") for path in paths]


def check_encoder(index: Mapping[str, Any], expected: Mapping[str, Any], folder: Path) -> None:
    """Raise ValueError if another encoder made the features; the message lists the differences."""
    stored = index["fingerprint"]
    if is_first(index):  # the orientation makes no difference for images that are not turned
        stored = {**stored, "orientation": expected["orientation"]}
    differing = [part for part in {**stored, **expected} if stored.get(part) != expected.get(part)]
    if differing:
        said, found = (
            ", ".join(f"{part} {value}" for part, value in {"image_fit": "the encoder's own", **one}.items())
            for one in (expected, stored)
        )
        raise ValueError(
            f"the visual features at {folder} are of another encoder, or other options of it: they differ in "
            f"{', '.join(differing)}. Expected {said}; found {found}. Take the encoder and options that made "
            "them, or another --features_dir"
        )


def write_index(folder: Path, index: Mapping[str, Any]) -> None:
    """Write the index with its checksum, atomically. The folder is created if it is missing."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / INDEX_FILE, {**index, "checksum": _seal(index)})


def file_stats(paths: Sequence[Path]) -> list[tuple[int, int]]:
    """Return the size in bytes and modification time in nanoseconds of files; zeros for missing ones."""

    def look(some: Sequence[Path]) -> list[tuple[int, int]]:
        found = []
        for path in some:
            try:
                stat = os.stat(path)
                found.append((stat.st_size, stat.st_mtime_ns))
            except NotADirectoryError:  # an image in a table: its checksum replaces the time
                found.append(_embedded_stat(path))
            except OSError as error:
                if error.errno not in NOWHERE:
                    raise
                found.append((0, 0))
        return found

    parts = [paths[start : start + LOOKED_AT] for start in range(0, len(paths), LOOKED_AT)]
    # Network disks are slow per request, but answer many at a time, hence threads.
    # A table is read by one thread, in order, to reuse decoded rows.
    with ThreadPoolExecutor(1 if paths and is_embedded(paths[0]) else LOOKERS) as pool:
        return [stat for part in pool.map(look, parts) for stat in part]


def _embedded_stat(path: Path) -> tuple[int, int]:
    try:
        content = embedded_bytes(path)
    except (FileNotFoundError, ValueError):
        return 0, 0
    return len(content), int(checksum(content)[:15], 16)


def tensor_bytes(tensor: Tensor) -> memoryview:
    """Return the memory of a tensor on the CPU."""
    array: Any = tensor.contiguous().flatten().view(torch.uint8).numpy()
    return memoryview(array)


def digest(description: Any) -> str:
    """Return 16 hexadecimal digits of a JSON-like value, ignoring the fields in `VOLATILE`."""
    if isinstance(description, dict):
        description = {key: value for key, value in description.items() if key not in VOLATILE}
    content = json.dumps(description, sort_keys=True, default=str)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def shard_name(number: int) -> str:
    """Return the file name of a shard."""
    return f"features-{number:05d}.safetensors"


def rows_of(index: Mapping[str, Any], number: int) -> slice:
    """Return the range of images in a shard."""
    per_shard = index["shard_images"]
    return slice(number * per_shard, min((number + 1) * per_shard, len(index["images"])))


def shard_content(
    features: Float[Tensor, "images tokens d_vision"],
    index: Mapping[str, Any],
    number: int,
    unreadable: Mapping[str, str],
) -> bytes:
    """Return the content of a shard file."""
    content = _description(features, index, number, unreadable)
    file: bytes = save({"features": features}, metadata={"dept_vl": json.dumps(content)})
    return file


def _description(
    features: Float[Tensor, "images tokens d_vision"],
    index: Mapping[str, Any],
    number: int,
    unreadable: Mapping[str, str],
) -> dict[str, Any]:
    """Return a shard's metadata: the encoder, names, sizes and times of the images, and a checksum."""
    made_by, rows = index["fingerprint"], rows_of(index, number)
    images = [index[part][rows] for part in ("images", "image_bytes")]
    data = tensor_bytes(features)
    if is_first(index):
        made_by = {part: value for part, value in made_by.items() if part != "orientation"}
        total: dict[str, Any] = {"crc32": zlib.crc32(data)}
    else:
        images.append(index["image_times"][rows])
        total = {"xxh3": checksum(data)}
    return {"fingerprint": made_by, "images": digest(images), **total, "unreadable": unreadable}


def unreadable_of(folder: Path, index: Mapping[str, Any], number: int) -> dict[str, str] | None:
    """Return the unreadable images of a stored shard; None if it is missing, damaged or of other images."""
    path = folder / shard_name(number)
    try:
        features = read_shard(path)
        with safe_open(path, "pt") as file:
            content = json.loads(file.metadata()["dept_vl"])
        unreadable: dict[str, str] = check(content["unreadable"], dict[str, str])
        expected = _description(features, index, number, unreadable)
    except (FileNotFoundError, ValueError, LookupError, TypeError):
        return None
    return unreadable if content == expected else None


def check_shard(index: Mapping[str, Any], number: int, folder: Path) -> None:
    """Raise DamagedFileError if a shard is damaged or does not fit the index."""
    path, rows = folder / shard_name(number), rows_of(index, number)
    expected, size = index["shard_bytes"][number], file_stats([path])[0][0]
    if size != expected:
        raise DamagedFileError(
            f"{path} is damaged: expected {expected:,} bytes, found {size:,}; {EXTRACT} makes it again"
        )
    if was_compared(path):
        return
    names = set(index["images"][rows])
    unreadable = {name: error for name, error in index["unreadable"].items() if name in names}
    if unreadable_of(folder, index, number) != unreadable:
        raise DamagedFileError(
            f"{path} is damaged or belongs to other images: its content does not match its checksum or "
            f"{INDEX_FILE}; {EXTRACT} makes it again"
        )
    note_compared(path)
