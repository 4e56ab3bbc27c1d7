"""Visual features of a set of images, each encoded once: in memory, or in files that every run maps into it.

The tower is frozen, so an image's features never change. A folder of features holds

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
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from jaxtyping import Float
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from dept_vl.files import difference, read_json, read_tensors, write_atomically
from dept_vl.images import ImageSource, confined, read_image
from dept_vl.live import is_live
from dept_vl.vision import VisionEncoder

INDEX_FILE = "index.json"
FORMAT_VERSION = 1
Precision = Literal["float16", "bfloat16", "float32"]
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
EXTRACT = "scripts/extract_features.py"
LOOKED_AT = 100
"""Images that are compared in size with those that were encoded, before their features are used."""
VOLATILE = ("_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype")
"""What a configuration says that changes no feature."""


def load_pixels(vision: VisionEncoder, source: ImageSource) -> Float[Tensor, "3 height width"]:
    """Read and preprocess one image.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no readable image.
    """
    return vision.preprocess([read_image(source)])[0]


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
        files: What the shards are mapped from; empty if they are in memory.

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
        """Encode images into memory, in float32.

        Args:
            vision: The frozen encoder.
            paths: The images; each is encoded once however often it is named.
            batch_size: Images encoded at a time.
            num_workers: Processes that read and preprocess images; 0 uses this one.
            progress: Show a bar.
        """
        distinct = list(dict.fromkeys(paths))
        batches = _batches(0, len(distinct), batch_size)
        features = torch.empty(len(distinct), vision.token_count, vision.d_vision)
        errors: dict[Path, str] = {}
        for rows, encoded, messages in _encode(vision, distinct, batches, num_workers, progress):
            features[rows.start : rows.stop] = encoded
            errors |= {distinct[row]: error for row, error in zip(rows, messages, strict=True) if error}
        return cls([features], {path: (0, row) for row, path in enumerate(distinct)}, errors)

    @classmethod
    def map(
        cls, files: Sequence[Path], places: Mapping[Path, tuple[int, int]], errors: Mapping[Path, str]
    ) -> "FeatureTable":
        """Map shards into memory.

        Raises:
            FileNotFoundError: If one is missing.
            ValueError: If one is truncated.
        """
        return cls([_read_shard(file) for file in files], places, errors, files)

    @classmethod
    def joined(cls, tables: Sequence["FeatureTable"]) -> "FeatureTable":
        """Several mapped tables as one.

        Raises:
            ValueError: If they are of several dtypes.
        """
        places: dict[Path, tuple[int, int]] = {}
        errors: dict[Path, str] = {}
        files: list[Path] = []
        for table in tables:
            places |= {path: (len(files) + shard, row) for path, (shard, row) in table.places.items()}
            errors |= table.errors
            files += table.files
        return cls.map(files, places, errors)

    def __reduce__(self) -> tuple[Any, ...]:
        # By name where there is one, so that a spawned worker maps the files and copies nothing.
        if self.files:
            return FeatureTable.map, (self.files, self.places, self.errors)
        return FeatureTable, (self.shards, self.places, self.errors)

    def check(self, paths: Sequence[Path]) -> None:
        """Refuse images that could not be read.

        Raises:
            ValueError: With what is wrong with the first of them.
        """
        for path in paths:
            if path in self.errors:
                raise ValueError(self.errors[path])

    def __call__(self, examples: Sequence[Sequence[Path]]) -> Float[Tensor, "batch images tokens d_vision"]:
        """Features of the images of some examples, each of which has as many."""
        places = [self.places[path] for paths in examples for path in paths]
        found = self.shards[0].new_empty(len(places), *self.shards[0].shape[1:])
        rows = found.view(torch.uint8).numpy()
        for place, (shard, row) in enumerate(places):
            rows[place] = self._rows[shard][row]
        return found.view(len(examples), -1, *found.shape[1:])


def table_bytes(vision: VisionEncoder, image_count: int) -> int:
    """Memory that `FeatureTable.encode` takes for so many images."""
    return image_count * vision.token_count * vision.d_vision * 4


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
    batches = [batch for n in todo for batch in _batches(of[n].start, of[n].stop, batch_size)]
    encoded = _encode(vision, files, batches, num_workers, accelerator.is_main_process)
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


def _batches(start: int, stop: int, size: int) -> list[range]:
    return [range(first, min(first + size, stop)) for first in range(start, stop, size)]


def _encode(
    vision: VisionEncoder, paths: Sequence[Path], batches: Sequence[range], num_workers: int, progress: bool
) -> Iterator[tuple[range, Float[Tensor, "batch tokens d_vision"], Sequence[str]]]:
    """The batches, each with its features and, for every image, what is wrong with it or nothing."""
    device = next(vision.parameters()).device
    loader: DataLoader[Any] = DataLoader(
        _Pixels(vision, paths), batch_sampler=[list(batch) for batch in batches], num_workers=num_workers
    )
    total = sum(map(len, batches))
    with tqdm(total=total, desc="encoding images", disable=not (progress and is_live()), leave=False) as bar:
        for rows, (pixels, messages) in zip(batches, loader, strict=True):
            yield rows, vision(pixels.to(device)).cpu(), messages
            bar.update(len(rows))


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


def _read_shard(path: Path) -> Float[Tensor, "images tokens d_vision"]:
    """Map a shard into memory.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If it is damaged.
    """
    tensors = read_tensors(path)
    if tensors.keys() != {"features"} or tensors["features"].dim() != 3:
        raise ValueError(f"{path} is damaged: it holds no features; {EXTRACT} makes it again")
    return tensors["features"]


def _left_by(path: Path, identity: Mapping[str, Any]) -> dict[str, str] | None:
    """Unreadable images of a shard that is there, whole and of these images; None if there is none such."""
    try:
        features = _read_shard(path)
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
