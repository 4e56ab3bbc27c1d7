"""Images stored inside a table, addressed by paths below the table's file.

    photos.parquet/image/17      row 17 of the column `image`
    photos.parquet/images/17/0   the first of several images, or data URLs, in row 17
    photos.jsonl/bytes/120/4096  a data URL in a text file, 4,096 bytes long from byte 120

They are read when needed and never copied to files.
"""

import base64
import binascii
import os
import re
from bisect import bisect_right
from collections import deque
from collections.abc import Iterator
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from threading import Lock
from typing import Any
from urllib.parse import quote, unquote, unquote_to_bytes

from dept_vl._utils.checksums import open_sealed

COLUMNAR = (".parquet", ".arrow")
NAME = re.compile(r"(.*\.(?:parquet|arrow|jsonl?|ndjson|[ct]sv))/([^/]+)/([0-9]+)(?:/([0-9]+))?", re.I | re.S)
ARROW_MAGIC = b"ARROW1"
BATCH_ROWS = 8
"""Number of rows of a Parquet file decoded at a time, since a row group may hold gigabytes. Pages are decoded
whole."""


KEPT_BATCHES = 8
"""Number of decoded batches to keep, since threads do not read rows exactly in order."""


def embedded_path(file: str, column: str, row: int, item: int | None = None) -> str:
    """Return the path of the image of a row, or of one of several."""
    end = "" if item is None else f"/{item}"
    return f"{file}/{quote(column, safe='')}/{row}{end}"


def is_embedded(path: str | Path) -> bool:
    """Return whether a path leads to an image inside a table."""
    return _parts(os.fspath(path)) is not None


def embedded_bytes(path: str | Path) -> bytes:
    """Read an embedded image; FileNotFoundError if there is no such row, ValueError if it has no bytes."""
    parts = _parts(os.fspath(path))
    if parts is None:
        raise FileNotFoundError(f"no image at {path}")
    file, column, row, item = parts
    if not file.lower().endswith(COLUMNAR):
        return data_url_bytes(_text_at(file, row, item or 0), str(path))
    try:
        value = _value(file, unquote(column), row)
        if urls := list(data_urls(value)):
            return data_url_bytes(urls[item or 0], str(path))
        value = value[item] if item is not None else value
    except (KeyError, IndexError, TypeError):
        raise FileNotFoundError(f"no image at {path}: {file} has no such row") from None
    content = value.get("bytes") if isinstance(value, dict) else value
    if not isinstance(content, bytes):
        raise ValueError(f"{path} is not a readable image: the row holds no bytes")
    return content


def is_data_url(text: str) -> bool:
    """Return whether a text starts like a data URL."""
    return text[:5].lower() == "data:"


def data_url_bytes(url: str, name: str = "image") -> bytes:
    """Return the content of a data URL; raise ValueError with `name` if it is not valid."""
    kind, comma, data = url.partition(",")
    try:
        if not comma or not is_data_url(kind):
            raise ValueError(f"found {url[:40]!r}")
        content = unquote_to_bytes(data)
        return base64.b64decode(content, validate=True) if kind.lower().endswith(";base64") else content
    except (ValueError, binascii.Error) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{name}: expected a data URL, data:image/png;base64,...: {reason}") from None


def data_urls(value: Any) -> Iterator[str]:
    """Yield the data URLs in a JSON-like value, in their order."""
    if isinstance(value, str):
        if is_data_url(value):
            yield value
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from data_urls(part)


def _text_at(file: str, start: int, length: int) -> str:
    with open(file, "rb") as opened:
        opened.seek(start)
        content = opened.read(length)
    # Data URLs are ASCII, so in UTF-16 every other byte is zero. Some JSON writers escape the slash.
    return content.replace(b"\0", b"").replace(b"\\/", b"/").decode("latin-1")


def _parts(path: str) -> tuple[str, str, int, int | None] | None:
    match = NAME.fullmatch(path)
    if match is None or not os.path.isfile(match[1]):
        return None
    return match[1], match[2], int(match[3]), None if match[4] is None else int(match[4])


def _value(file: str, column: str, row: int) -> Any:
    if file.lower().endswith(".arrow"):
        return open_arrow(file, os.stat(file).st_mtime_ns).column(column)[row].as_py()
    changed = os.stat(file).st_mtime_ns
    starts = _group_starts(file, changed)
    group = bisect_right(starts, row) - 1
    return _group(file, changed, group, column, os.getpid()).value(row - starts[group])


@lru_cache(maxsize=64)
def open_arrow(file: str, changed: int) -> Any:
    """Map an Arrow file into memory: file format, with or without our checksum, or stream format."""
    import pyarrow as pa

    with open(file, "rb") as opened:
        is_file = opened.read(len(ARROW_MAGIC)) == ARROW_MAGIC
    if not is_file:
        return pa.ipc.open_stream(pa.memory_map(file)).read_all()
    try:
        return pa.ipc.open_file(pa.memory_map(file)).read_all()
    except pa.ArrowInvalid:
        return pa.ipc.open_file(pa.BufferReader(open_sealed(Path(file)))).read_all()


@lru_cache(maxsize=64)
def _group_starts(file: str, changed: int) -> list[int]:
    import pyarrow.parquet as pq

    metadata = pq.read_metadata(file, memory_map=True)
    counts = (metadata.row_group(number).num_rows for number in range(metadata.num_row_groups))
    return [0, *accumulate(counts)][:-1]


class _Group:
    """A column of a row group, decoded forwards in small batches."""

    def __init__(self, file: str, number: int, column: str) -> None:
        import pyarrow.parquet as pq

        # Each group opens the file itself, since threads must not share an open file.
        self._opened = pq.ParquetFile(file, memory_map=True)
        self._number, self._column, self._lock = number, column, Lock()
        self._rewind()

    def _rewind(self) -> None:
        self._batches = self._opened.iter_batches(
            BATCH_ROWS, row_groups=[self._number], columns=[self._column], use_threads=False
        )
        self._kept, self._end = deque[tuple[int, Any]](maxlen=KEPT_BATCHES), 0

    def value(self, place: int) -> Any:
        """Return the value of a row, counted from the first of the group."""
        with self._lock:
            if self._kept and place < self._kept[0][0]:
                self._rewind()
            while place >= self._end:
                batch = next(self._batches, None)
                if batch is None:
                    raise IndexError(place)
                self._kept.append((self._end, batch))
                self._end += len(batch)
            start, batch = next(pair for pair in reversed(self._kept) if pair[0] <= place)
            return batch.column(0)[place - start].as_py()


@lru_cache(maxsize=1)  # neighbouring rows are usually read in order
def _group(file: str, changed: int, number: int, column: str, process: int) -> _Group:
    # `process` keeps workers from using an inherited group, which may be in the middle of a read.
    return _Group(file, number, column)
