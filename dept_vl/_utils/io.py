"""Our own files, JSON and safetensors: written whole, and read as if anybody could have written them.

Whatever is wrong with one becomes one ValueError of one line, with its path; nothing is made of a file
before it is checked, and nothing larger than the file itself.
"""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

LONGEST_JSON = 1 << 26
"""Bytes; descriptions and configurations have a few thousand."""


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file beside its place, flush it to the disk, and rename it: whole or not at all.

    Raises:
        OSError: If it cannot be written, naming the file; what was there before is untouched.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        with writing(path), partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError:
        # A full disk has no room for a part either.
        with suppress(OSError):
            partial.unlink()
        raise


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


def read_object(path: Path, like: Any) -> dict[str, Any]:
    """Read a JSON object with fields like those of an example (see `difference`).

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged, or has other fields; the first of them is named.
    """
    content = read_json(path)
    problem = difference(content, like)
    if problem:
        raise ValueError(f"{path} is damaged: {problem}")
    fields: dict[str, Any] = content
    return fields


def difference(found: Any, like: Any, name: str = "") -> str:
    """Where a value of JSON differs in kind from an example; empty if nowhere.

    In an example, an object is one with the same keys, a type any value of it (a finite number for float,
    whole or not; True is no number), a tuple any of its members, `{str: x}` an object of any keys with
    values like x, `[x]` a list of values like x, and anything else itself.
    """
    where = name or "the file"
    if isinstance(like, tuple):
        problems = [difference(found, one, name) for one in like]
        if "" in problems:
            return ""
        # Of null or an object, what is wrong inside of the object.
        said = problems[-1] if isinstance(found, dict | list) else ""
        return said or f"expected {where} to be {_said(like)}, found {found!r:.60}"
    if isinstance(like, dict):
        if not isinstance(found, dict):
            return f"expected {where} to be an object, found {found!r:.60}"
        if like.keys() == {str}:
            places = [(f"{name}[{key!r:.60}]", value, like[str]) for key, value in found.items()]
        elif found.keys() == like.keys():
            places = [(f"{name}.{key}" if name else key, found[key], like[key]) for key in like]
        else:
            missing, unknown = sorted(like.keys() - found.keys()), sorted(found.keys() - like.keys())
            return (
                f"expected {where} to have the fields {sorted(like)}, missing {missing}, unknown "
                f"{unknown[:3]!r:.200}"
            )
    elif isinstance(like, list):
        if not isinstance(found, list):
            return f"expected {where} to be a list, found {found!r:.60}"
        places = [(f"{name}[{place}]", value, like[0]) for place, value in enumerate(found)]
    else:
        fits = _is(found, like) if isinstance(like, type) else type(found) is type(like) and found == like
        return "" if fits else f"expected {where} to be {_said(like)}, found {found!r:.60}"
    return next(filter(None, (difference(value, kind, place) for place, value, kind in places)), "")


def _is(value: Any, kind: type) -> bool:
    if kind is float:
        # An integer of JSON may have more digits than a float.
        return type(value) in (int, float) and abs(value) <= sys.float_info.max
    return type(value) is kind


def _said(like: Any) -> str:
    if isinstance(like, tuple):
        return " or ".join(map(_said, like))
    if isinstance(like, dict | list):
        return "an object" if isinstance(like, dict) else "a list"
    kinds = {float: "a finite number", int: "a whole number", str: "text", bool: "true or false"}
    kinds |= {dict: "an object", list: "a list"}
    return kinds[like] if isinstance(like, type) else json.dumps(like)
