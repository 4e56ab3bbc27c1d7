"""Our own files, JSON and safetensors: written whole, and read as if anybody could have written them.

Whatever is wrong with one becomes one ValueError of one line, with its path; nothing is made of a file
before it is checked, and nothing larger than the file itself.
"""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from dept_vl._utils.options import check

LONGEST_JSON = 1 << 26
"""Bytes; descriptions and configurations have a few thousand."""


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file beside its place, flush it to the disk, and rename it: whole or not at all.

    Raises:
        OSError: If it cannot be written, naming the file; what was there before is untouched.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        write_flushed(partial, content, path)
        partial.replace(path)
    except OSError:
        # A full disk has no room for a part either.
        with suppress(OSError):
            partial.unlink()
        raise


def write_flushed(path: Path, content: bytes, name: Path | None = None) -> None:
    """Write a file, and wait until it is on the disk; an error has the name, or the path."""
    with writing(name or path), path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def write_json(path: Path, content: Any, indent: int | None = 1) -> None:
    """Write a JSON file: whole or not at all.

    Raises:
        OSError: If it cannot be written.
    """
    write_atomically(path, (json.dumps(content, indent=indent) + "\n").encode())


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Name the file in errors of writing it, where the system says only that there is no space left."""
    try:
        yield
    except OSError as error:
        if error.errno and error.filename is None:
            error.filename = str(path)
        raise


def one_line(error: BaseException) -> str:
    """What an error says, on one line of bearable length: it may quote the file."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def read_json(path: Path) -> Any:
    """Read a JSON file of ours.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If it is damaged, or too long to be one of ours.
    """
    if not path.is_file():
        raise FileNotFoundError(f"expected a JSON file at {path}, found none")
    size = path.stat().st_size
    if size > LONGEST_JSON:
        raise ValueError(
            f"{path} is damaged or another file: expected at most {LONGEST_JSON:,} bytes, found {size:,}"
        )
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    # Nesting a thousand deep ends the decoder with a RecursionError.
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: it is not valid JSON: {one_line(error)}") from None


def read_object(path: Path, kind: Any, earlier: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Read a JSON object with the fields of a dataclass, or of another type that pydantic knows.

    Args:
        path: The file.
        kind: The dataclass.
        earlier: What an older file leaves out.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged, or has other fields; they are named.
    """
    content: dict[str, Any] = read_json(path)
    if earlier and isinstance(content, dict):
        content = {**earlier, **content}
    try:
        check(content, kind)
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    return content
