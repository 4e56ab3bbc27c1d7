"""Readers of official annotation files, one record at a time.

VQAv2's training annotations have 4.4 million answers, and GQA has 22 million questions. As Python objects
they would fill tens of GiB, so only one record is kept in memory, whatever the file's size. NaN, Infinity and
integers of more than 64 bits are rejected, except by `read_lines`, which accepts what Python's `json`
accepts.
"""

import codecs
import json
import reprlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import ijson

from dept_vl._utils.io import Depth, NestedError, RepeatedKeyError, UniqueKeys, check_keys, parse_json
from dept_vl._utils.terminal import Count

CHUNK = 1 << 14
"""Number of bytes read at a time."""
LONGEST_PARSED = 1 << 26
"""Maximum size in bytes of a damaged JSON file that is parsed again to find the line of the error."""


def read_list(path: Path, key: str, source: str) -> Iterator[dict[str, Any]]:
    """Read the objects in the list under one key of a JSON object, such as `{"questions": [{}, {}, ...]}`.

    Without a key, the file is a list itself. The rest of the file after the list is checked too. The `source`
    argument of all readers here names where the file is published, for messages.

    Raises:
        FileNotFoundError: If the file does not exist. The other readers here raise it too.
        ValueError: If the file is truncated, has another form, or has no record.
    """
    with _json(path, source) as file:
        prefix = f"{key}.item" if key else "item"
        items = ijson.items(file, prefix, buf_size=CHUNK, use_float=True, map_type=UniqueKeys)
        expected = f"an object with a list of objects under {key!r}" if key else "a list of objects"
        for _, record in _checked(enumerate(items), path, expected):
            yield record


def read_mapping(path: Path, source: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Read the keys and values of a JSON object of objects, such as GQA's questions by id."""
    with _json(path, source) as file:
        records = ijson.kvitems(file, "", buf_size=CHUNK, use_float=True, map_type=UniqueKeys)
        yield from _checked(records, path, "an object of objects")


def json_object(
    text: str | bytes, where: str, expected: str, kind: type[ValueError] = ValueError
) -> dict[str, Any]:
    """Parse the JSON object of a line; errors of this kind say where it is, and what form was expected."""
    try:
        record = parse_json(text if isinstance(text, str) else text.decode())
    except RepeatedKeyError as error:
        raise kind(f"{where}: {error}") from None
    except ValueError as error:
        column = f", column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
        shown = text if isinstance(text, str) else text.decode(errors="replace")
        reason = json_reason(error, shown)
        raise kind(f"{where}{column}: expected {expected}, found {text[:60]!r} ({reason})") from None
    if not isinstance(record, dict):
        raise kind(f"{where}: expected a JSON object, found {brief(record)}")
    return record


def read_lines(path: Path, source: str) -> Iterator[dict[str, Any]]:
    """Read the objects of a JSON Lines file, ignoring blank lines."""
    found = False
    with _open(path, source) as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            form = f"a JSON object in the form of {source}"
            record = json_object(line.rstrip(), f"{path}, line {number}", form)
            found = True
            yield record
    if not found:
        raise ValueError(f"{path} is empty: expected one JSON object a line in the form of {source}")


def field(record: dict[str, Any], name: str, kind: type | tuple[type, ...], where: str) -> Any:
    """Return a field of a record; ValueError with location `where` if it is missing or of another type."""
    value = record.get(name)
    # In Python True and False are ints, but they are not valid ids.
    if not isinstance(value, kind) or isinstance(value, bool):
        kinds = kind if isinstance(kind, tuple) else (kind,)
        expected = " or ".join(one.__name__ for one in kinds)
        found = brief(value) if name in record else "no such field"
        raise ValueError(f"{where}: expected {name!r} to be {expected}, found {found}")
    return value


def same_as_first(there: bool, first: bool | None, what: str, where: str) -> bool:
    """Return whether a record has something; ValueError if the first one (None: this one) differs in that."""
    if first not in (None, there):
        found = "one here" if there else f"no {what.split()[-1]} here"
        raise ValueError(
            f"{where}: expected {what} in every record or in none, found {found}, unlike in the first record"
        )
    return there


def json_fault(path: Path, error: Exception, encoding: str = "utf-8-sig") -> tuple[str, str]:
    """Return the location of an error in a JSON file (line and column unless it is large) and the reason."""
    where, reason = f"{path}", " ".join(str(error).removesuffix("(right here) ------^\n").split())[:200]
    if path.stat().st_size <= LONGEST_PARSED:
        text = ""
        try:
            text = path.read_text(encoding)
            json.loads(text)
        except (ValueError, RecursionError) as again:
            reason = json_reason(again, text)
            if isinstance(again, json.JSONDecodeError):
                where = f"{path}, line {again.lineno}, column {again.colno}"
    return where, reason


def json_reason(error: Exception, text: str) -> str:
    """Return why a text is not valid JSON."""
    if isinstance(error, json.JSONDecodeError):
        if text[: error.pos].rstrip().endswith(","):
            return "a comma stands before the closing bracket, or a value is missing behind it"
        return error.msg
    return str(NestedError() if isinstance(error, RecursionError) else error)


def brief(value: Any) -> str:
    """Return the start of a value, for messages."""
    try:
        return f"{value!r:.60}"
    except RecursionError:
        return "a value that is nested too deeply"


def _open(path: Path, source: str) -> BinaryIO:
    """Open a file and skip its byte order mark, if any."""
    try:
        file = path.open("rb")
    except FileNotFoundError:
        raise FileNotFoundError(
            f"expected {path.name} in {path.parent}, found no such file; it is published at {source}"
        ) from None
    if file.read(len(codecs.BOM_UTF8)) != codecs.BOM_UTF8:
        file.seek(0)
    return file


class Shallow:
    """A source of bytes for ijson that limits the nesting of lists and objects."""

    def __init__(self, read: Callable[[int], bytes], count: Count | None = None) -> None:
        self._read, self._count, self._depth = read, count, Depth()

    def read(self, size: int) -> bytes:
        """Return the next bytes; raise NestedError if they are nested too deeply."""
        data = self._read(size)
        self._depth.add(data)
        if self._count is not None:
            self._count.add(len(data))
        return data


@contextmanager
def _json(path: Path, source: str) -> Iterator[Shallow]:
    """Open a JSON file; convert errors in it to a one-line ValueError."""
    with (
        _open(path, source) as file,
        Count(f"reading {path.name}", path.stat().st_size, ("MiB", 1 << 20)) as count,
    ):
        try:
            yield Shallow(file.read, count)
        except (ijson.JSONError, NestedError, UnicodeDecodeError) as error:
            where, reason = json_fault(path, error)
            place = f"before byte {file.tell():,}: " if where == str(path) else ""
            raise ValueError(
                f"{where}: the file is cut short or damaged: {place}{reason}; expected whole JSON as it is "
                f"published at {source}"
            ) from None


def _checked(records: Iterable[tuple[Any, Any]], path: Path, expected: str) -> Iterator[tuple[Any, Any]]:
    """Yield the records with their names; raise ValueError if one is not an object, or there are none."""
    found = False
    for name, record in records:
        if not isinstance(record, dict):
            raise ValueError(f"{path}, entry {name!r}: expected an object, found {reprlib.repr(record)}")
        try:
            check_keys(record)
        except RepeatedKeyError as error:
            raise ValueError(f"{path}, entry {name!r:.60}: {error}") from None
        found = True
        yield name, record
    if not found:
        raise ValueError(f"{path}: expected {expected}, found none; is it another file renamed?")
