"""Images whose bytes are in a column of a Parquet or Arrow file, named like files below it.

    photos.parquet/image/17      row 17 of the column `image`
    photos.parquet/images/17/0   the first of several images of row 17

So they are read when they are needed, and never written out.
"""

import os
from bisect import bisect_right
from collections import deque
from functools import lru_cache
from pathlib import Path
from threading import Lock
from typing import Any
from urllib.parse import quote, unquote

from dept_vl._utils.checksums import open_sealed

SUFFIXES = (".parquet", ".arrow")
ARROW_MAGIC = b"ARROW1"
BATCH_ROWS = 8
"""Rows of a Parquet file that are decoded at a time: a row group may hold gigabytes. Its pages are decoded
whole."""


KEPT_BATCHES = 8
"""That stay decoded: threads that read one row after the other come a little out of order."""


def embedded_path(file: str, column: str, row: int, item: int | None = None) -> str:
    """Name the image of a row, or one of several."""
    end = "" if item is None else f"/{item}"
    return f"{file}/{quote(column, safe='')}/{row}{end}"


def is_embedded(path: str | Path) -> bool:
    """Return whether a path leads into a Parquet or Arrow file."""
    return _parts(os.fspath(path)) is not None


def embedded_bytes(path: str | Path) -> bytes:
    """Read the bytes of an embedded image.

    Raises:
        FileNotFoundError: If the file is gone, or has no such row.
        ValueError: If there are no bytes.
    """
    parts = _parts(os.fspath(path))
    if parts is None:
        raise FileNotFoundError(f"no image at {path}")
    file, column, row, item = parts
    try:
        value = _value(file, unquote(column), row)
        value = value[item] if item is not None else value
    except (KeyError, IndexError, TypeError):
        raise FileNotFoundError(f"no image at {path}: {file} has no such row") from None
    content = value.get("bytes") if isinstance(value, dict) else value
    if not isinstance(content, bytes):
        raise ValueError(f"{path} is no readable image: the row holds no bytes")
    return content


def _parts(path: str) -> tuple[str, str, int, int | None] | None:
    for suffix in SUFFIXES:
        file, mark, rest = path.rpartition(suffix + "/")
        names = rest.split("/")
        if mark and len(names) in (2, 3) and all(name.isdecimal() for name in names[1:]):
            file += suffix
            if os.path.isfile(file):
                item = int(names[2]) if len(names) == 3 else None
                return file, names[0], int(names[1]), item
    return None


def _value(file: str, column: str, row: int) -> Any:
    if file.endswith(".arrow"):
        return open_arrow(file, os.stat(file).st_mtime_ns).column(column)[row].as_py()
    changed = os.stat(file).st_mtime_ns
    starts = _group_starts(file, changed)
    group = bisect_right(starts, row) - 1
    return _group(file, changed, group, column, os.getpid()).value(row - starts[group])


@lru_cache(maxsize=64)
def open_arrow(file: str, changed: int) -> Any:
    """Map an Arrow file into memory: of the file format, sealed by us or not, or of the stream format."""
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
    """The first row of each row group."""
    import pyarrow.parquet as pq

    metadata = pq.read_metadata(file, memory_map=True)
    starts, row = [], 0
    for number in range(metadata.num_row_groups):
        starts.append(row)
        row += metadata.row_group(number).num_rows
    return starts


class _Group:
    """A column of a row group, decoded a few rows at a time, forwards."""

    def __init__(self, file: str, number: int, column: str) -> None:
        import pyarrow.parquet as pq

        # An opened file each: threads must not decode from one at a time.
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


@lru_cache(maxsize=1)  # neighbours are usually read one after the other
def _group(file: str, changed: int, number: int, column: str, process: int) -> _Group:
    # Of this process alone: what a worker inherits may be in the middle of a read.
    return _Group(file, number, column)
