"""Readers of tables in all formats. Each record comes with its number, as an editor shows it."""

import codecs
import csv
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from io import TextIOWrapper
from pathlib import Path
from threading import Lock
from typing import Any

import ijson
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dept_vl._utils.embedded import open_arrow
from dept_vl._utils.errors import UsageError
from dept_vl._utils.io import NestedError, RepeatedKeyError, UniqueKeys, check_keys
from dept_vl._utils.printable import one_line
from dept_vl.tasks.io.records import Shallow, brief, json_fault, json_object
from dept_vl.tasks.own.classes import class_names, named
from dept_vl.tasks.own.inline import Embedded

Record = dict[str, Any]
Numbered = Iterator[tuple[int, Record]]

UNITS = {".csv": "line", ".tsv": "line", ".jsonl": "line", ".ndjson": "line"}
"""Unit of the record numbers, by file extension; for others it is the row, from 1."""
DELIMITERS = ",\t;|"
LONGEST_CELL = 1 << 27
"""Maximum length of a CSV cell, in characters; data URLs of images are long."""
CELL_LIMIT = Lock()
"""Lock held while the process-wide cell limit of `csv` is changed."""
BATCH_ROWS = 1000
IMAGE_ROWS = 16
"""Number of rows read at a time if image bytes are read with them."""
BOMS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}
CHUNK = 1 << 16
NO_ROWS = ("info", "license", "licenses", "categories", "boxes")
"""Keys of official files that hold no rows."""
ONE_A_LINE = "one JSON object a line"


def place(path: Path, number: int) -> str:
    """Return the location of a record, for error messages."""
    return f"{_unit(path)} {number}"


@lru_cache(maxsize=64)
def _unit(path: Path) -> str:
    return f"{path}, {UNITS.get(path.suffix.lower(), 'row')}"


def encoding_of(path: Path) -> str:
    """Return the encoding of a text file: from its byte order mark, from the zeros of UTF-16, else UTF-8."""
    with path.open("rb") as file:
        start = file.read(3)
    for mark, name in BOMS.items():
        if start.startswith(mark):
            return name
    if 0 in start[:2]:  # a table begins with a character of ASCII
        return "utf-16-le" if start[0] else "utf-16-be"
    return "utf-8"


def text_of(path: Path) -> TextIOWrapper:
    """Open a text file without changing its line ends."""
    return path.open(encoding=encoding_of(path), newline="")


def read_lines(path: Path) -> Numbered:
    """Read JSON Lines, ignoring blank lines and a comma at the end of a line."""
    with _decoding(path), text_of(path) as file:
        for number, line in enumerate(file, start=1):
            text = line.strip().removesuffix(",")
            if text:
                yield number, json_object(text, place(path, number), ONE_A_LINE, UsageError)


def _undecodable(path: Path) -> int:
    """Return the number of the first line that is not UTF-8; 1 if all lines are."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                line.decode()
            except UnicodeDecodeError:
                return number
    return 1


@contextmanager
def _decoding(path: Path) -> Iterator[None]:
    """Convert a UnicodeDecodeError to a UsageError with the line number."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{path}, line {_undecodable(path)}: the byte 0x{error.object[error.start]:02x} is not UTF-8; "
            'save the file as UTF-8 (in a spreadsheet "CSV UTF-8"), or with a byte order mark as UTF-16'
        ) from None


def read_csv(path: Path) -> Numbered:
    """Read a table with a header. The delimiter is the most frequent of `DELIMITERS` in the header."""
    line = 1
    try:
        with _decoding(path), text_of(path) as file:
            first = file.readline()
            file.seek(0)
            if not first.strip():
                raise UsageError(f"{path}: expected a line with the names of the columns, found none")
            usual = "\t" if path.suffix.lower() == ".tsv" else ","
            delimiter = max(DELIMITERS, key=lambda mark: (first.count(mark), mark == usual))
            rows = csv.reader(file, delimiter=delimiter, strict=True)
            header = _header(path, next(rows))
            line = rows.line_num + 1
            for cells in _long_cells(rows):
                if delimiter == "\t" and any(_took_rows(cells, at) for at in range(len(cells))):
                    raise UsageError(
                        f"{place(path, line)}: a cell in quotes contains whole rows; if the quote is part "
                        "of the text, double it and quote the cell; if not, replace the tabs by spaces"
                    )
                if len(cells) == len(header):
                    yield rows.line_num, dict(zip(header, cells, strict=True))
                elif any(cells):
                    raise UsageError(
                        f"{place(path, rows.line_num)}: expected {len(header)} cells ({', '.join(header)}), "
                        f"found {len(cells)}; text that holds {delimiter!r} needs double quotes around it"
                    )
                line = rows.line_num + 1  # start of the next row: quoted text can span lines
    except csv.Error as error:
        reason = str(error).replace("'\t'", "a tab")
        raise UsageError(f"{place(path, line)}: {reason}; write a quote inside quotes twice") from None


def _took_rows(cells: Sequence[str], at: int) -> bool:
    """Return whether a cell reads like the end of its row, whole rows, and the start of another one."""
    tabs = [line.count("\t") for line in cells[at].split("\n")]
    whole = len(cells) - 1
    return (
        len(tabs) > 1
        and whole > 0
        and (tabs[0], tabs[-1]) == (whole - at, at)
        and {*tabs[1:-1]} <= {0, whole}
    )


def _long_cells(rows: Iterator[list[str]]) -> Iterator[list[str]]:
    """Yield rows with cells of up to `LONGEST_CELL` characters, restoring the limit of `csv` each time."""
    while True:
        with CELL_LIMIT:
            usual = csv.field_size_limit(LONGEST_CELL)
            try:
                cells = next(rows, None)
            finally:
                csv.field_size_limit(usual)
        if cells is None:
            return
        yield cells


def _header(path: Path, cells: Sequence[str]) -> list[str]:
    header = list(map(one_line, cells))
    repeated = sorted({name for name in header if name and header.count(name) > 1})
    if repeated:
        raise UsageError(f"{path}, line 1: the columns {', '.join(repeated)} are there more than once")
    return header


def json_shape(path: Path) -> tuple[str, list[str]]:
    """Return the shape of a JSON file, and the keys of its lists of objects.

    The shape is `lines`, `list`, `objects`, `record`, or `keys` if there are such lists.
    """
    first, end, second = _lines(path)
    if first in ("[", ""):
        return "list", []
    if first == "{" and (second == "{" or end == "},"):
        return "lines", []
    keys: list[str] = []
    key, depth, holder = "", 0, ""
    with _json(path) as raw:
        for event, value in ijson.basic_parse(raw, buf_size=CHUNK):
            if event == "map_key":
                key = value if depth == 1 else key
            elif event in ("start_map", "start_array"):
                depth += 1
                if depth == 2:
                    holder = event
                    if event == "start_map" and not keys and key not in NO_ROWS:
                        return "objects", []
                elif depth == 3 and event == "start_map" and holder == "start_array" and key not in NO_ROWS:
                    holder = ""  # the first object of a list tells enough
                    if key in keys:
                        raise UsageError(f"{path}: {RepeatedKeyError(key)}")
                    keys.append(key)
            elif event in ("end_map", "end_array"):
                depth -= 1
    if keys:
        return "keys", keys
    return ("record" if second else "lines"), []  # lines: one record alone


def _lines(path: Path) -> tuple[str, str, str]:
    """Return the first characters of the first two lines, and the last two characters of the first line."""
    first = end = ""
    with _decoding(path), text_of(path) as file:
        while chunk := file.read(CHUNK):
            line, newline, rest = (chunk if first else chunk.lstrip()).replace("\r", "\n").partition("\n")
            first = first or line[:1]
            end = (end + line[-CHUNK:]).rstrip()[-2:]
            if first and newline:
                while rest and not rest.lstrip():
                    rest = file.read(CHUNK)
                return first, end, rest.lstrip()[:1]
    return first, end, ""


def begins_with_list(path: Path) -> bool:
    """Return whether a text file starts with `[`."""
    return _lines(path)[0] == "["


def read_json(path: Path, key: str = "") -> Numbered:
    """Read the objects of a JSON list, or of the list under a key, one at a time."""
    with _json(path) as raw:
        prefix = f"{key}.item" if key else "item"
        items = ijson.items(raw, prefix, buf_size=CHUNK, use_float=True, map_type=UniqueKeys)
        yield from _numbered(items, path)


def read_record(path: Path) -> Numbered:
    """Read a file that is one JSON object."""
    with text_of(path) as file:
        yield 1, json_object(file.read(), place(path, 1), ONE_A_LINE, UsageError)


def read_objects(path: Path) -> Numbered:
    """Read an object of objects. Each record gets its key as `id`."""
    with _json(path) as raw:
        items = ijson.kvitems(raw, "", buf_size=CHUNK, use_float=True, map_type=UniqueKeys)
        for number, (name, record) in _numbered(items, path):
            yield number, {"id": name, **record}


def _numbered(items: Iterator[Any], path: Path) -> Iterator[tuple[int, Any]]:
    """Yield objects, or keys with objects, with their numbers; UsageError for other values."""
    for number, item in enumerate(items, start=1):
        record = item[1] if isinstance(item, tuple) else item
        if not isinstance(record, dict):
            raise UsageError(f"{place(path, number)}: expected an object, found {brief(record)}")
        try:
            check_keys(record)
        except RepeatedKeyError as error:
            raise UsageError(f"{place(path, number)}: {error}") from None
        yield number, item


@contextmanager
def _json(path: Path) -> Iterator[Shallow]:
    """Open a JSON file as UTF-8, for ijson; convert JSON errors to a UsageError with line and column."""
    with _decoding(path), text_of(path) as file:
        try:
            yield Shallow(lambda size: file.read(size).encode("utf-8", errors="surrogatepass"))
        except (ijson.JSONError, NestedError) as error:
            where, reason = json_fault(path, error, encoding_of(path))
            raise UsageError(f"{where}: the file is not complete JSON: {reason}") from None


def read_parquet(
    path: Path, columns: Sequence[str] = (), *, classes: Collection[str] | None = None
) -> Numbered:
    """Read a Parquet file, or some columns. Images become references; their bytes are not read.

    `classes` is that of `formats.read_records`.
    """
    try:
        with pq.ParquetFile(path, memory_map=True) as file:
            leaves = [file.schema.column(n).path for n in range(len(file.schema))]
            finish = _finisher(path, file.schema_arrow, classes)
            types = {field.name: field.type for field in file.schema_arrow}
            if columns:
                leaves = [leaf for leaf in leaves if leaf in columns or leaf.split(".")[0] in columns]
            read = [leaf for leaf in leaves if not _holds_bytes(leaf, types, leaves)]
            size = IMAGE_ROWS if any(leaf.endswith(".bytes") for leaf in read) else BATCH_ROWS
            number = 0
            for batch in file.iter_batches(size, columns=read):
                for row in batch.to_pylist():
                    number += 1
                    yield number, finish(row, number - 1)
    except (pa.ArrowInvalid, OSError) as error:
        raise UsageError(
            f"{path} is not a complete Parquet file: {str(error).splitlines()[0][:120]}"
        ) from None


def read_arrow(path: Path) -> Numbered:
    """Read an Arrow file, as written by `save_to_disk`. Images become references, as in `read_parquet`."""
    try:
        table = open_arrow(str(path), path.stat().st_mtime_ns)
    except (pa.ArrowInvalid, OSError) as error:
        raise UsageError(f"{path} is not a complete Arrow file: {str(error).splitlines()[0][:120]}") from None
    finish = _finisher(path, table.schema)
    embedded = [field.name for field in table.schema if _is_image(field.type)]
    lists = [name for name in embedded if _is_list(table.schema.field(name).type)]
    plain = table.drop_columns(embedded)
    for start in range(0, table.num_rows, BATCH_ROWS):
        size = min(BATCH_ROWS, table.num_rows - start)
        rows = plain.slice(start, size).to_pylist() if plain.num_columns else [{} for _ in range(size)]
        for place, row in enumerate(rows, start=start):
            row |= {name: [None] * len(table.column(name)[place]) for name in lists}
            yield place + 1, finish(row, place)


def _finisher(
    path: Path, schema: pa.Schema, known: Collection[str] | None = None
) -> Callable[[Record, int], Record]:
    """Return a function that puts references to images, and names of classes, into a row."""
    images = {field.name: _is_list(field.type) for field in schema if _is_image(field.type)}
    classes = class_names(schema.metadata, known)
    short = [field.name for field in schema if _is_short(field.type)]

    def finish(row: Record, place: int) -> Record:
        row |= {name: _shortest(row[name]) for name in short if name in row}
        for name, several in images.items():
            if not several:
                row[name] = Embedded.at(path, name, place)
            elif isinstance(value := row.get(name), list):
                row[name] = [Embedded.at(path, name, place, item) for item in range(len(value))]
        for column, names in classes.items():
            if column in row:
                row[column] = named(row[column], names)
        return row

    return finish


def _is_short(kind: pa.DataType) -> bool:
    """Return whether a column holds numbers of fewer than 64 bits, or lists of these."""
    if _is_list(kind):
        return _is_short(kind.value_type)
    return bool(pa.types.is_float16(kind) or pa.types.is_float32(kind))


def _shortest(value: Any) -> Any:
    """Return a number of 32 bits as it is written, 0.1 and not 0.10000000149011612; also in lists."""
    if isinstance(value, list):
        return [_shortest(one) for one in value]
    return float(str(np.float32(value))) if isinstance(value, float) else value


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind))


def _is_image(kind: pa.DataType) -> bool:
    """Return whether a column holds images: bytes, structs with bytes, or lists of these."""
    if _is_list(kind):
        return _is_image(kind.value_type)
    if pa.types.is_struct(kind):
        return bool(kind.get_field_index("bytes") >= 0)
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _holds_bytes(leaf: str, types: dict[str, pa.DataType], leaves: Sequence[str]) -> bool:
    """Return whether a Parquet leaf belongs to images and is not needed to read the table."""
    name = next(name for name in types if leaf == name or leaf.startswith(f"{name}."))
    if not _is_image(types[name]):
        return False
    if not _is_list(types[name]):
        return True
    # For lists of images one leaf is read, to count them: the paths if there are any.
    own = [one for one in leaves if one.startswith(f"{name}.")]
    return leaf != next((one for one in own if one.endswith(".path")), own[0])
