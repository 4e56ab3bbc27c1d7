"""A file of visual features: what it says of itself, and whether that is true."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxtyping import Float
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from dept_vl._utils.checksums import note_compared, was_compared
from dept_vl._utils.errors import DamagedFileError
from dept_vl._utils.options import check
from dept_vl.data.feature_index import INDEX_FILE, file_stats, identity_of, shard_sum, tensor_bytes
from dept_vl.data.features import EXTRACT, read_shard


def shard_name(number: int) -> str:
    """File of a shard."""
    return f"features-{number:05d}.safetensors"


def rows_of(index: Mapping[str, Any], number: int) -> slice:
    """The images of a shard."""
    per_shard = index["shard_images"]
    return slice(number * per_shard, min((number + 1) * per_shard, len(index["images"])))


def shard_content(
    features: Float[Tensor, "images tokens d_vision"],
    index: Mapping[str, Any],
    number: int,
    unreadable: Mapping[str, str],
) -> bytes:
    """A shard's file."""
    content = _description(features, index, number, unreadable)
    file: bytes = save({"features": features}, metadata={"dept_vl": json.dumps(content)})
    return file


def _description(
    features: Float[Tensor, "images tokens d_vision"],
    index: Mapping[str, Any],
    number: int,
    unreadable: Mapping[str, str],
) -> dict[str, Any]:
    """What a shard says of itself."""
    identity = identity_of(index, rows_of(index, number))
    return {**identity, **shard_sum(index, tensor_bytes(features)), "unreadable": unreadable}


def unreadable_of(folder: Path, index: Mapping[str, Any], number: int) -> dict[str, str] | None:
    """Unreadable images of a stored shard that is whole and of these images; None without such a shard."""
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
    """Raise DamagedFileError unless a shard is whole and of the images of the index."""
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
            f"{path} is damaged, or of other images: its checksum is not that of its content, or it is not "
            f"what {INDEX_FILE} says; {EXTRACT} makes it again"
        )
    note_compared(path)
