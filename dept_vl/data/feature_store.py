"""Visual features in files that every run maps into memory.

    index.json                    what they are, of which images, and whether all are there
    features-00000.safetensors    of the first images, (images, tokens, d_vision)
    features-00001.safetensors    of the next

A shard is written whole or not at all and says itself what it holds, so that a stopped extraction can be
resumed. The index has its own file, `feature_index`.
"""

import json
import zlib
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from jaxtyping import Float
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from dept_vl._utils.images import confined
from dept_vl._utils.io import write_atomically
from dept_vl._utils.options import check
from dept_vl.config import Precision
from dept_vl.data.feature_index import (
    FORMAT_VERSION,
    INDEX_FILE,
    check_encoder,
    digest,
    file_size,
    fingerprint,
    image_keys,
    read_index,
    tensor_bytes,
    write_index,
)
from dept_vl.data.features import EXTRACT, FeatureTable, batches_of, encode_images, read_shard
from dept_vl.models.vision import VisionEncoder

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
LOOKED_AT = 100
"""Images that are compared in size with those that were encoded, before their features are used."""


def write_features(
    vision: VisionEncoder,
    root: Path,
    paths: Sequence[Path],
    folder: Path,
    accelerator: Accelerator,
    *,
    dtype: Precision = "float16",
    shard_images: int = 1024,
    batch_size: int = 64,
    num_workers: int = 0,
    skip_unreadable: bool = False,
) -> int:
    """Encode images into a folder, every process its share of the shards; what is there already stays.

    A folder that was left unfinished is gone on with; further images are added to a finished one. Shards
    that are damaged, or of whose images one has another size by now, are made again. The files are the same
    on any number of processes.

    Args:
        vision: The frozen encoder, on the device of this process.
        root: The data folder; images are known by their paths below it.
        paths: The images.
        folder: Where the features go.
        accelerator: Of the processes.
        dtype: What features are stored in.
        shard_images: Images in a file; a folder that is gone on with keeps its own.
        batch_size: Images encoded at a time.
        num_workers: Processes that read and preprocess images; 0 uses this one.
        skip_unreadable: Note what is wrong with images that cannot be read, rather than stop.

    Returns:
        How many images were encoded, over all processes.

    Raises:
        ValueError: If the folder holds features of another encoder, an image cannot be read that may not be
            skipped, or a feature is too large for the dtype.
        FileNotFoundError: If images that are in the folder already are not in the data folder any more.
        OSError: If a file cannot be written; what was written before is untouched.
    """
    made_by = {**fingerprint(vision), "dtype": dtype}
    index = _plan(vision, root, paths, folder, made_by, shard_images)
    images, per_shard = index["images"], index["shard_images"]
    shards = range(accelerator.process_index, -(-len(images) // per_shard), accelerator.num_processes)
    of = {n: slice(n * per_shard, min((n + 1) * per_shard, len(images))) for n in shards}
    contents = {n: _identity(index, of[n]) for n in shards}
    stored = {n: _unreadable_of(folder / shard_name(n), contents[n]) for n in shards}
    unreadable = {n: errors for n, errors in stored.items() if errors is not None}
    todo = [n for n in shards if n not in unreadable or (unreadable[n] and not skip_unreadable)]
    if not any(gather_object([bool(todo) or index["shard_bytes"] is None])):
        return 0
    index["shard_bytes"] = None  # until all are there
    if accelerator.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        write_index(folder, index)
    accelerator.wait_for_everyone()
    files = [root / image for image in images]
    # None goes over the end of a shard, so that what is encoded together depends on no process.
    batches = [batch for n in todo for batch in batches_of(of[n].start, of[n].stop, batch_size)]
    encoded = encode_images(vision, files, batches, num_workers, accelerator.is_main_process)
    for n in todo:
        parts, unreadable[n] = [], {}
        for rows, features, messages in islice(encoded, -(-len(images[of[n]]) // batch_size)):
            errors = {images[row]: error for row, error in zip(rows, messages, strict=True) if error}
            if errors and not skip_unreadable:
                raise ValueError(f"{next(iter(errors.values()))}. --on_bad_image skip goes on without it")
            unreadable[n] |= errors
            parts.append(_stored(features, dtype, files[rows.start]))
        write_atomically(folder / shard_name(n), _shard(torch.cat(parts), contents[n], unreadable[n]))
    ours = [(n, (folder / shard_name(n)).stat().st_size, unreadable[n]) for n in shards]
    whole = sorted(gather_object(ours))
    if accelerator.is_main_process:
        index["shard_bytes"] = [size for _, size, _ in whole]
        index["unreadable"] = {image: error for _, _, errors in whole for image, error in errors.items()}
        write_index(folder, index)
    accelerator.wait_for_everyone()
    return sum(gather_object([sum(map(len, batches))]))


def open_features(vision: VisionEncoder, root: Path, paths: Sequence[Path], folder: Path) -> FeatureTable:
    """Map the features of images from a folder that `write_features` made.

    Args:
        vision: The encoder that a run has.
        root: The data folder.
        paths: Images of which there have to be features.
        folder: The folder.

    Raises:
        FileNotFoundError: If there are no features, or some of the images are not among them.
        ValueError: If they are of another encoder, unfinished, or damaged.
    """
    index = read_index(folder)
    dtype = index["fingerprint"]["dtype"]
    check_encoder(index["fingerprint"], {**fingerprint(vision), "dtype": dtype}, folder)
    shape = [vision.token_count, vision.d_vision]
    if index["shape"] != shape:
        raise ValueError(f"{folder / INDEX_FILE} is damaged: expected shape {shape}, found {index['shape']}")
    if index["shard_bytes"] is None:
        raise ValueError(f"the visual features at {folder} are not finished; {EXTRACT} goes on with them")
    shards = [folder / shard_name(n) for n in range(len(index["shard_bytes"]))]
    for shard, expected in zip(shards, index["shard_bytes"], strict=True):
        size = file_size(shard)
        if size != expected:
            raise ValueError(
                f"{shard} is damaged: expected {expected:,} bytes, found {size:,}; {EXTRACT} makes it again"
            )
    rows = {image: row for row, image in enumerate(index["images"])}
    keys = image_keys(paths, root)
    missing = [path for path, key in zip(paths, keys, strict=True) if key not in rows]
    if missing:
        raise FileNotFoundError(
            f"{len(missing):,} of {len(paths):,} images have no visual features in {folder} (first: "
            f"{missing[0]}); {EXTRACT} adds them, with --splits for splits besides a run's own"
        )
    for place in range(0, len(paths), -(-len(paths) // LOOKED_AT)):
        expected, size = index["image_bytes"][rows[keys[place]]], file_size(paths[place])
        if size not in (0, expected):
            raise ValueError(
                f"{paths[place]} is not the image whose visual features are in {folder}: expected "
                f"{expected:,} bytes, found {size:,}; {EXTRACT} encodes changed images anew, or name the "
                "--features_dir of these"
            )
    per_shard = index["shard_images"]
    table = FeatureTable.map(
        shards,
        {path: divmod(rows[key], per_shard) for path, key in zip(paths, keys, strict=True)},
        {root / image: error for image, error in index["unreadable"].items()},
    )
    for number, (shard, features) in enumerate(zip(shards, table.shards, strict=True)):
        expected_shape = (min(per_shard, len(rows) - number * per_shard), *shape)
        if tuple(features.shape) != expected_shape or table.dtype != dtype:
            raise ValueError(
                f"{shard} is damaged: expected {dtype} {expected_shape}, found {table.dtype} "
                f"{tuple(features.shape)}; {EXTRACT} makes it again"
            )
    return table


def shard_name(number: int) -> str:
    """File of a shard."""
    return f"features-{number:05d}.safetensors"


def _plan(
    vision: VisionEncoder,
    root: Path,
    paths: Sequence[Path],
    folder: Path,
    made_by: dict[str, Any],
    shard_images: int,
) -> dict[str, Any]:
    """The index of what is to be: the images that it has already in their order, then the others."""
    shape = [vision.token_count, vision.d_vision]
    known: list[str] = []
    whole = None
    if (folder / INDEX_FILE).is_file():
        before = read_index(folder)
        check_encoder(before["fingerprint"], made_by, folder)
        known = [confined(image, f"{folder / INDEX_FILE}, images") for image in before["images"]]
        whole, shard_images = before["shard_bytes"], before["shard_images"]
        _check_images(root, before, folder)
    images = list(dict.fromkeys([*known, *image_keys(paths, root)]))
    return {
        "format_version": FORMAT_VERSION,
        "fingerprint": made_by,
        "shape": shape,
        "shard_images": shard_images,
        "shard_bytes": whole if len(images) == len(known) else None,
        "images": images,
        "image_bytes": [file_size(root / image) for image in images],
        "unreadable": {},
    }


def _check_images(root: Path, before: Mapping[str, Any], folder: Path) -> None:
    """Check that the images of earlier features are still in the data folder: they may have to be made again.

    Raises:
        FileNotFoundError: If images that were encoded are not below the data folder.
    """
    images, per_shard = before["images"], before["shard_images"]
    shards = range(-(-len(images) // per_shard))
    written = {number for number in shards if (folder / shard_name(number)).is_file()}
    gone = [
        image
        for row, (image, size) in enumerate(zip(images, before["image_bytes"], strict=True))
        if size and row // per_shard in written and not file_size(root / image)
    ]
    if gone:
        raise FileNotFoundError(
            f"{len(gone):,} of the {len(images):,} images whose visual features are in {folder} are not in "
            f"{root} (first: {gone[0]}); nothing was changed. Put them back, or give other images another "
            "--features_dir"
        )


def _identity(index: Mapping[str, Any], rows: slice) -> dict[str, Any]:
    """What a shard says of itself: by what it was made, of which images, by name and size."""
    images = [index["images"][rows], index["image_bytes"][rows]]
    return {"fingerprint": index["fingerprint"], "images": digest(images)}


def _stored(
    features: Float[Tensor, "batch tokens d_vision"], dtype: Precision, first: Path
) -> Float[Tensor, "batch tokens d_vision"]:
    """Features as they are stored.

    Raises:
        ValueError: If some are too large for that.
    """
    stored = features.to(DTYPES[dtype])
    if not stored.isfinite().all():
        raise ValueError(
            f"features of {first} or the {len(stored) - 1:,} images after it are too large for {dtype}; "
            "bfloat16 and float32 hold larger numbers: choose another --dtype"
        )
    return stored


def _shard(
    features: Float[Tensor, "images tokens d_vision"],
    identity: Mapping[str, Any],
    unreadable: Mapping[str, str],
) -> bytes:
    """A shard's file."""
    content = {**identity, "crc32": zlib.crc32(tensor_bytes(features)), "unreadable": unreadable}
    file: bytes = save({"features": features}, metadata={"dept_vl": json.dumps(content)})
    return file


def _unreadable_of(path: Path, identity: Mapping[str, Any]) -> dict[str, str] | None:
    """Unreadable images of a stored shard that is whole and of these images; None without such a shard."""
    try:
        features = read_shard(path)
        with safe_open(path, "pt") as file:
            content = json.loads(file.metadata()["dept_vl"])
        unreadable: dict[str, str] = check(content["unreadable"], dict[str, str])
        expected = {**identity, "crc32": zlib.crc32(tensor_bytes(features)), "unreadable": unreadable}
    except (FileNotFoundError, ValueError, LookupError, TypeError):
        return None
    return unreadable if content == expected else None
