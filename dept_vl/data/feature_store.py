"""Visual features in files that every run maps into memory.

    index.json                    what they are, of which images, and whether all are there
    features-00000.safetensors    of the first images, (images, tokens, d_vision)
    features-00001.safetensors    of the next

A shard is written whole or not at all and says itself what it holds, so that a stopped extraction goes on.
An image is known by its path below the data folder: two splits may have files of one name.
"""

import hashlib
import json
import os
import zlib
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, get_args

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from jaxtyping import Float
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor
from torch.distributed.tensor import DTensor

from dept_vl._utils.images import confined
from dept_vl._utils.io import difference, read_json, write_atomically
from dept_vl.config import Precision
from dept_vl.data.features import EXTRACT, FeatureTable, batches_of, encode_images, read_shard
from dept_vl.models.vision import VisionEncoder

INDEX_FILE = "index.json"
FORMAT_VERSION = 1
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
FINGERPRINT = {
    "weights": str,
    "architecture": str,
    "preprocessing": str,
    "vision_layer": int,
    "class_token": bool,
    "pooled_grid": int,
    "dtype": get_args(Precision),
}
INDEX = {
    "format_version": int,
    "fingerprint": FINGERPRINT,
    "shape": [int],
    "shard_images": int,
    "shard_bytes": (None, [int]),
    "images": [str],
    "image_bytes": [int],
    "unreadable": {str: str},
}
"""Fields of `index.json`, as `files.difference` has them; `shard_bytes` is null until all are there."""
LOOKED_AT = 100
"""Images that are compared in size with those that were encoded, before their features are used."""
VOLATILE = ("_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype")
"""What a configuration says that changes no feature."""


def fingerprint(vision: VisionEncoder) -> dict[str, str | int | bool]:
    """All that an image's features depend on, by part; of weights and configurations 16 hexadecimal digits.

    Unlike an adapter's, this fingerprint is of every bit of the weights: features are stored, not adapted.
    """
    weights = hashlib.sha256()
    for name, tensor in sorted(vision.model.state_dict().items()):
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor  # of a spread tower
        weights.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        weights.update(_bytes(whole.detach().cpu()))
    config = getattr(vision.model, "config", None)
    return {
        "weights": weights.hexdigest()[:16],
        "architecture": _digest(config.to_diff_dict() if config is not None else type(vision.model).__name__),
        "preprocessing": _digest(vision.processor.to_dict()),
        "vision_layer": vision.layer,
        "class_token": vision.class_token,
        "pooled_grid": vision.pooled_grid,
    }


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
    left = {n: _left_by(folder / shard_name(n), contents[n]) for n in shards}
    unreadable = {n: found for n, found in left.items() if found is not None}
    todo = [n for n in shards if n not in unreadable or (unreadable[n] and not skip_unreadable)]
    if not any(gather_object([bool(todo) or index["shard_bytes"] is None])):
        return 0
    index["shard_bytes"] = None  # until all are there
    if accelerator.is_main_process:
        folder.mkdir(parents=True, exist_ok=True)
        _write_index(folder, index)
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
        index["unreadable"] = {image: error for _, _, found in whole for image, error in found.items()}
        _write_index(folder, index)
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
    _check_encoder(index["fingerprint"], {**fingerprint(vision), "dtype": dtype}, folder)
    shape = [vision.token_count, vision.d_vision]
    if index["shape"] != shape:
        raise ValueError(f"{folder / INDEX_FILE} is damaged: expected shape {shape}, found {index['shape']}")
    if index["shard_bytes"] is None:
        raise ValueError(f"the visual features at {folder} are not finished; {EXTRACT} goes on with them")
    shards = [folder / shard_name(n) for n in range(len(index["shard_bytes"]))]
    for shard, expected in zip(shards, index["shard_bytes"], strict=True):
        found = _size(shard)
        if found != expected:
            raise ValueError(
                f"{shard} is damaged: expected {expected:,} bytes, found {found:,}; {EXTRACT} makes it again"
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
        expected, found = index["image_bytes"][rows[keys[place]]], _size(paths[place])
        if found not in (0, expected):
            raise ValueError(
                f"{paths[place]} is not the image whose visual features are in {folder}: expected "
                f"{expected:,} bytes, found {found:,}; {EXTRACT} encodes changed images anew, or name the "
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


def read_index(folder: Path) -> dict[str, Any]:
    """Read the index of a folder of features.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If it is damaged, or of another format version.
    """
    path = folder / INDEX_FILE
    if not path.is_file():
        raise FileNotFoundError(
            f"no visual features at {folder}: expected {INDEX_FILE} there; {EXTRACT} makes them, with the "
            "run's --task, --data_dir, and --backbone or --vision (or its --config)"
        )
    content = read_json(path)
    version = content.get("format_version") if isinstance(content, dict) else None
    if type(version) is int and version != FORMAT_VERSION:
        raise ValueError(
            f"{path} has format version {version}; this dept_vl reads {FORMAT_VERSION}: make the features "
            "again in another --features_dir"
        )
    problem = difference(content, INDEX) or _impossible(content)
    if problem:
        raise ValueError(f"{path} is damaged: {problem}; remove it, and {EXTRACT} makes it again")
    index: dict[str, Any] = content
    return index


def image_keys(paths: Sequence[Path], root: Path) -> list[str]:
    """What images are called in an index: their paths below the data folder, with forward slashes."""
    start = "" if root == Path() else os.path.join(root, "")
    # Of 120,000 paths, `Path.relative_to` would take half a second.
    return [os.fspath(path).removeprefix(start).replace(os.sep, "/") for path in paths]


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
        _check_encoder(before["fingerprint"], made_by, folder)
        known = [confined(image, f"{folder / INDEX_FILE}, images") for image in before["images"]]
        whole, shard_images = before["shard_bytes"], before["shard_images"]
        _check_there(root, before, folder)
    images = list(dict.fromkeys([*known, *image_keys(paths, root)]))
    return {
        "format_version": FORMAT_VERSION,
        "fingerprint": made_by,
        "shape": shape,
        "shard_images": shard_images,
        "shard_bytes": whole if len(images) == len(known) else None,
        "images": images,
        "image_bytes": [_size(root / image) for image in images],
        "unreadable": {},
    }


def _check_there(root: Path, before: Mapping[str, Any], folder: Path) -> None:
    """Refuse to add to features whose images lie elsewhere: theirs would be made again, of nothing.

    Raises:
        FileNotFoundError: If images that were encoded are not below the data folder.
    """
    images, per_shard = before["images"], before["shard_images"]
    shards = range(-(-len(images) // per_shard))
    there = {number for number in shards if (folder / shard_name(number)).is_file()}
    gone = [
        image
        for row, (image, size) in enumerate(zip(images, before["image_bytes"], strict=True))
        if size and row // per_shard in there and not _size(root / image)
    ]
    if gone:
        raise FileNotFoundError(
            f"{len(gone):,} of the {len(images):,} images whose visual features are in {folder} are not in "
            f"{root} (first: {gone[0]}); nothing was changed. Put them back, or give other images another "
            "--features_dir"
        )


def _check_encoder(found: Mapping[str, Any], expected: Mapping[str, Any], folder: Path) -> None:
    """Refuse features that another encoder made.

    Raises:
        ValueError: With both fingerprints, and the parts in which they differ.
    """
    differing = [part for part in expected if found[part] != expected[part]]
    if differing:
        raise ValueError(
            f"the visual features at {folder} are of another encoder, or other options of it: they differ in "
            f"{', '.join(differing)}. Expected {_said(expected)}; found {_said(found)}. Take the encoder and "
            "options that made them, or another --features_dir"
        )


def _said(fingerprint: Mapping[str, Any]) -> str:
    return ", ".join(f"{part} {fingerprint[part]}" for part in FINGERPRINT)


def _impossible(index: Mapping[str, Any]) -> str:
    """What no extraction can have written; empty if nothing."""
    if len(index["shape"]) != 2 or min(index["shape"]) < 1:
        return f"expected shape to be the tokens and width of an image, found {index['shape']!r:.60}"
    if index["shard_images"] < 1:
        return f"expected shard_images to be 1 or more, found {index['shard_images']}"
    images = index["images"]
    if not images or len(set(images)) != len(images):
        return "expected images to name one or more, each once"
    if len(index["image_bytes"]) != len(images):
        return f"expected image_bytes of {len(images):,} images, found {len(index['image_bytes']):,}"
    sizes, count = index["shard_bytes"], -(-len(images) // index["shard_images"])
    if sizes is not None and len(sizes) != count:
        return f"expected shard_bytes of {count} shards, found {len(sizes)}"
    return ""


def _write_index(folder: Path, index: Mapping[str, Any]) -> None:
    write_atomically(folder / INDEX_FILE, (json.dumps(index, indent=1) + "\n").encode())


def _identity(index: Mapping[str, Any], rows: slice) -> dict[str, Any]:
    """What a shard says of itself: by what it was made, of which images, by name and size."""
    images = [index["images"][rows], index["image_bytes"][rows]]
    return {"fingerprint": index["fingerprint"], "images": _digest(images)}


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


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
    said = {**identity, "crc32": zlib.crc32(_bytes(features)), "unreadable": unreadable}
    content: bytes = save({"features": features}, metadata={"dept_vl": json.dumps(said)})
    return content


def _left_by(path: Path, identity: Mapping[str, Any]) -> dict[str, str] | None:
    """Unreadable images of a shard that is there, whole and of these images; None if there is none such."""
    try:
        features = read_shard(path)
        with safe_open(path, "pt") as file:
            said = json.loads(file.metadata()["dept_vl"])
        unreadable: dict[str, str] = said["unreadable"]
        expected = {**identity, "crc32": zlib.crc32(_bytes(features)), "unreadable": unreadable}
    except (FileNotFoundError, ValueError, LookupError, TypeError):
        return None
    return unreadable if said == expected and not difference(unreadable, {str: str}) else None


def _bytes(tensor: Tensor) -> memoryview:
    array: Any = tensor.contiguous().flatten().view(torch.uint8).numpy()
    return memoryview(array)


def _digest(description: Any) -> str:
    """16 hexadecimal digits of what JSON can say, but for what changes no feature."""
    if isinstance(description, dict):
        description = {key: value for key, value in description.items() if key not in VOLATILE}
    content = json.dumps(description, sort_keys=True, default=str)
    return hashlib.sha256(content.encode()).hexdigest()[:16]
