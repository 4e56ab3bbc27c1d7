"""Visual features in files that every run maps into memory.

    index.json                    encoder, images, and whether all shards are written
    features-00000.safetensors    features of the first images, (images, tokens, d_vision)
    features-00001.safetensors    features of the next images

Shards are written atomically and describe their own content, so that a stopped extraction can be
resumed. `feature_index` defines the content of index and shards.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from filelock import FileLock, Timeout
from jaxtyping import Float
from torch import Tensor

from dept_vl._utils.embedded import is_embedded
from dept_vl._utils.errors import DamagedFileError
from dept_vl._utils.images import confined
from dept_vl._utils.io import write_atomically
from dept_vl._utils.printable import say
from dept_vl._utils.processes import on_main
from dept_vl._utils.terminal import waiting
from dept_vl.data.feature_index import (
    FORMAT_VERSION,
    INDEX_FILE,
    changed_images,
    check_encoder,
    check_first,
    check_shard,
    file_stats,
    fingerprint,
    image_keys,
    is_first,
    read_index,
    rows_of,
    shard_content,
    shard_name,
    unreadable_of,
    write_index,
)
from dept_vl.data.features import EXTRACT, FeatureTable, batches_of, encode_images
from dept_vl.models.vision import VisionEncoder
from dept_vl.tasks.options import Precision

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
LOCK_SECONDS = 10.0
"""Timeout in seconds of each attempt to lock a folder that another extraction writes to."""


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
    """Encode images into a folder; the shards are divided among the processes, and finished ones are kept.

    If another extraction writes to the folder, wait for it. An unfinished folder is resumed, and new images
    are added to a finished one. Shards are encoded again if they are damaged, or if the size or modification
    time of an image has changed. The files do not depend on the number of processes. Images are named by
    their path below `root`. An existing folder keeps its number of images a file (`shard_images`). With
    `skip_unreadable`, unreadable images are recorded instead of raising an error.

    Returns:
        Number of images encoded, over all processes.
    """
    with _only_writer(folder, accelerator):
        made_by = {**fingerprint(vision), "dtype": dtype}
        index = on_main(accelerator, lambda: _plan(vision, root, paths, folder, made_by, shard_images))
        images, per_shard = index["images"], index["shard_images"]
        shards = range(accelerator.process_index, -(-len(images) // per_shard), accelerator.num_processes)
        of = {n: rows_of(index, n) for n in shards}
        stored = {n: unreadable_of(folder, index, n) for n in shards}
        unreadable = {n: errors for n, errors in stored.items() if errors is not None}
        todo = [n for n in shards if n not in unreadable or (unreadable[n] and not skip_unreadable)]
        if not any(gather_object([bool(todo) or index["shard_bytes"] is None])):
            return 0
        index["shard_bytes"] = None  # until all are there
        on_main(accelerator, lambda: write_index(folder, index))
        files = [root / image for image in images]
        # No batch crosses the end of a shard, so that batches do not depend on the processes.
        batches = [batch for n in todo for batch in batches_of(of[n].start, of[n].stop, batch_size)]
        # Closed also after an error, to remove the progress line.
        with closing(
            encode_images(
                vision, files, batches, num_workers, accelerator.is_main_process, accelerator.num_processes
            )
        ) as encoded:
            for n in todo:
                parts, unreadable[n] = [], {}
                for rows, features, messages in islice(encoded, -(-len(images[of[n]]) // batch_size)):
                    errors = {images[row]: error for row, error in zip(rows, messages, strict=True) if error}
                    if errors and not skip_unreadable:
                        raise ValueError(
                            f"{next(iter(errors.values()))}. To leave it out, pass --on_bad_image skip"
                        )
                    unreadable[n] |= errors
                    parts.append(_stored(features, index["fingerprint"]["dtype"], files[rows.start]))
                write_atomically(
                    folder / shard_name(n), shard_content(torch.cat(parts), index, n, unreadable[n])
                )
        ours = [(n, (folder / shard_name(n)).stat().st_size, unreadable[n]) for n in shards]
        with waiting("waiting for the other processes"):
            whole = sorted(gather_object(ours))
        index["shard_bytes"] = [size for _, size, _ in whole]
        index["unreadable"] = {image: error for _, _, errors in whole for image, error in errors.items()}
        on_main(accelerator, lambda: write_index(folder, index))
        return sum(gather_object([sum(map(len, batches))]))


@contextmanager
def _only_writer(folder: Path, accelerator: Accelerator) -> Iterator[None]:
    """Hold a system lock on a folder of features; a killed process releases it."""
    place = folder.resolve()
    lock = FileLock(place.with_name(f".{place.name}.lock"))
    waited = False

    def take() -> bool:
        place.parent.mkdir(parents=True, exist_ok=True)
        with suppress(Timeout):
            lock.acquire(timeout=LOCK_SECONDS if waited else 0)
        return lock.is_locked

    while not on_main(accelerator, take):
        if not waited:
            say(f"another extraction is writing to {folder}; waiting for it to end")
        waited = True
    try:
        yield
    finally:
        lock.release()


def open_features(
    vision: VisionEncoder, root: Path, paths: Sequence[Path], folder: Path, *, renewable: int = 0
) -> FeatureTable:
    """Map the features of images from a folder that `write_features` made.

    The checksum of each shard is compared once per process. At most `renewable` images that have
    changed are encoded again, in memory. Raise FileNotFoundError or ValueError if they cannot be used.
    """
    index = read_index(folder)
    dtype = index["fingerprint"]["dtype"]
    check_first(index, folder, paths, exif=vision.exif)
    check_encoder(index, {**fingerprint(vision), "dtype": dtype}, folder)
    if index["shard_bytes"] is None:
        raise ValueError(
            f"the visual features at {folder} are not finished; {EXTRACT} resumes the extraction"
        )
    rows = {image: row for row, image in enumerate(index["images"])}
    keys = image_keys(paths, root)
    missing = [path for path, key in zip(paths, keys, strict=True) if key not in rows]
    if missing:
        raise FileNotFoundError(
            f"{len(missing):,} of {len(paths):,} images have no visual features in {folder} (first: "
            f"{missing[0]}); {EXTRACT} adds them, with --splits for splits besides a run's own"
        )
    places = {path: rows[key] for path, key in zip(paths, keys, strict=True)}
    changed = changed_images(index, places)
    if len(changed) > renewable:
        examples = ", ".join(map(str, changed[:3]))
        raise ValueError(
            f"{len(changed):,} of {len(places):,} images have changed in size or time since their visual "
            f"features in {folder} were made ({examples}); {EXTRACT} encodes them again, or name the "
            "--features_dir of these"
        )
    per_shard = index["shard_images"]
    used = sorted({row // per_shard for row in places.values()})
    for number in used:
        check_shard(index, number, folder)
    table = FeatureTable(
        [folder / shard_name(number) for number in used],
        {path: (used.index(row // per_shard), row % per_shard) for path, row in places.items()},
        {root / image: error for image, error in index["unreadable"].items()},
    )
    if changed:
        say(f"visual features: {len(changed):,} of {len(paths):,} images have changed and are encoded again")
        return table.with_renewed(vision, changed)
    return table


def _plan(
    vision: VisionEncoder,
    root: Path,
    paths: Sequence[Path],
    folder: Path,
    made_by: dict[str, Any],
    shard_images: int,
) -> dict[str, Any]:
    """Return the index to write: images of the existing index in their order, then new images."""
    shape = [vision.token_count, vision.d_vision]
    known: list[str] = []
    whole = None
    before = None
    if (folder / INDEX_FILE).is_file():
        try:
            before = read_index(folder)
        except DamagedFileError as error:
            say(f"note: {error}", error=True)  # and the index is made again
    if before is not None:
        check_encoder(before, made_by, folder)
        known = [
            image if is_embedded(image) else confined(image, f"{folder / INDEX_FILE}, images")
            for image in before["images"]
        ]
        # Features of version 1 are encoded again.
        whole, shard_images = None if is_first(before) else before["shard_bytes"], before["shard_images"]
        _check_images(root, before, folder)
    images = list(dict.fromkeys([*known, *image_keys(paths, root)]))
    stats = file_stats([root / image for image in images])
    return {
        "format_version": FORMAT_VERSION,
        "fingerprint": made_by,
        "shape": shape,
        "shard_images": shard_images,
        "shard_bytes": whole if len(images) == len(known) else None,
        "images": images,
        "image_bytes": [size for size, _ in stats],
        "image_times": [time for _, time in stats],
        "unreadable": {},
    }


def _check_images(root: Path, before: Mapping[str, Any], folder: Path) -> None:
    """Raise FileNotFoundError if encoded images are missing, since they may have to be encoded again."""
    images, per_shard = before["images"], before["shard_images"]
    shards = range(-(-len(images) // per_shard))
    written = {number for number in shards if (folder / shard_name(number)).is_file()}
    now = file_stats([root / image for image in images])
    gone = [
        image
        for row, (image, size) in enumerate(zip(images, before["image_bytes"], strict=True))
        if size and row // per_shard in written and not now[row][0]
    ]
    if gone:
        raise FileNotFoundError(
            f"{len(gone):,} of the {len(images):,} images whose visual features are in {folder} are not in "
            f"{root} (first: {gone[0]}); nothing was changed. Put them back, or give other images another "
            "--features_dir"
        )


def _stored(
    features: Float[Tensor, "batch tokens d_vision"], dtype: Precision, first: Path
) -> Float[Tensor, "batch tokens d_vision"]:
    """Return features in their stored precision; ValueError if values are too large for it."""
    stored = features.to(DTYPES[dtype])
    if not stored.isfinite().all():
        raise ValueError(
            f"features of {first} or the {len(stored) - 1:,} images after it are too large for {dtype}; "
            "bfloat16 and float32 hold larger numbers: choose another --dtype"
        )
    return stored
