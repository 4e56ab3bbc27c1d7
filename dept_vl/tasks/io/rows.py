"""Annotation files as Arrow columns: converted once, then memory-mapped by every process.

Converted files are stored in the cache folder (`$DEPT_VL_CACHE`, else `~/.cache/dept_vl`). Their names depend
on the paths and content of the sources, so that changed sources are converted again. Each file ends with a
checksum, which is compared before Arrow reads the columns, since damaged columns would crash it.
"""

import hashlib
import json
import os
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dept_vl._utils.checksums import known_checksum, open_sealed, seal
from dept_vl._utils.errors import DamagedFileError
from dept_vl._utils.printable import say

CONVERTER_VERSION = 1
"""Version of the conversion, to be raised when the same sources would give other columns."""
CHUNK_ROWS = 50_000
"""Number of rows held as Python objects during conversion."""


def cache_folder() -> Path:
    """Return the folder for converted files."""
    if chosen := os.environ.get("DEPT_VL_CACHE"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "dept_vl"


Indices = np.ndarray[Any, np.dtype[np.int64]]


class Rows:
    """Selected rows of an Arrow table.

    Args:
        table: Columns, memory-mapped if they come from files.
        indices: Indices of the selected rows, in order; None for all rows.
        files: Files that the table was read from, in order; empty for a table in memory.
    """

    def __init__(self, table: pa.Table, indices: Indices | None = None, files: Sequence[Path] = ()) -> None:
        self.table, self.indices, self.files = table, indices, tuple(files)
        self._columns = {name: table.column(name) for name in table.column_names}

    @classmethod
    def open(cls, files: Sequence[Path], indices: Indices | None = None) -> "Rows":
        """Map sealed Arrow files of one schema into memory; raise DamagedFileError if one has changed."""
        tables = [pa.ipc.open_file(pa.BufferReader(open_sealed(path))).read_all() for path in files]
        return cls(pa.concat_tables(tables), indices, files)

    @classmethod
    def of(cls, records: Sequence[Mapping[str, Any]], schema: pa.Schema) -> "Rows":
        """Return rows in memory, made from a few records."""
        return cls(pa.Table.from_pylist([dict(record) for record in records], schema))

    def __reduce__(self) -> tuple[Any, ...]:
        # Mapped tables are pickled by file name, so that a spawned worker maps them without copying.
        if self.files:
            return Rows.open, (self.files, self.indices)
        return Rows, (self.table, self.indices)

    def __len__(self) -> int:
        return self.table.num_rows if self.indices is None else len(self.indices)

    def value(self, name: str, index: int) -> Any:
        """Return one field of one row."""
        return self._columns[name][self._place(index)].as_py()

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return all fields of one row."""
        place = self._place(index)
        return {name: column[place].as_py() for name, column in self._columns.items()}

    def _place(self, index: int) -> int:
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        return index % len(self) if self.indices is None else int(self.indices[index])

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Yield all rows, read in chunks."""
        for chunk in self.chunks(CHUNK_ROWS):
            yield from chunk.to_pylist()

    def chunks(self, size: int) -> Iterator[pa.Table]:
        """Yield all rows, as tables of `size` rows."""
        for start in range(0, len(self), size):
            if self.indices is None:
                yield self.table.slice(start, size)
            else:
                yield self.table.take(pa.array(self.indices[start : start + size]))

    def column(self, name: str) -> pa.ChunkedArray:
        """Return one field of all rows."""
        column = self._columns[name]
        return column if self.indices is None else column.take(pa.array(self.indices))

    def lengths(self, name: str) -> Indices:
        """Return the lengths of the lists in a field, without reading the lists."""
        counted = pc.list_value_length(self._columns[name]).to_numpy(zero_copy_only=False)
        found: Indices = counted.astype(np.int64)
        return found if self.indices is None else found[self.indices]

    def distinct(self, *names: str) -> list[tuple[Any, ...]]:
        """Return the distinct values of these fields, in order of first appearance."""
        codes = np.zeros(len(self), dtype=np.int64)
        for name in names:
            encoded = self.column(name).combine_chunks().dictionary_encode()
            codes = codes * max(1, len(encoded.dictionary)) + encoded.indices.to_numpy()
        first = np.sort(np.unique(codes, return_index=True)[1])
        return list(zip(*(self.column(name).take(first).to_pylist() for name in names), strict=True))

    def subset(self, indices: Sequence[int] | Indices) -> "Rows":
        """Return only these rows; raise IndexError if a row does not exist."""
        places = np.arange(len(self)) if self.indices is None else self.indices
        return Rows(self.table, places[np.asarray(indices, dtype=np.int64)], self.files)

    def where(self, name: str, values: Sequence[Any], *, keep: bool = True) -> "Rows":
        """Return the rows whose field is one of the values, or with `keep=False` the others."""
        column = self.column(name)
        found = pc.is_in(column, value_set=pa.array(values, column.type)).to_numpy(zero_copy_only=False)
        return self.subset(np.flatnonzero(found == keep))


NO_ROWS = Rows.of([], pa.schema({}))
"""Rows of a blank task."""


def convert(
    name: str,
    sources: Sequence[Path],
    schema: pa.Schema,
    records: Iterator[Mapping[str, Any]],
    *,
    unique: str,
) -> Rows:
    """Convert records to an Arrow file in the cache folder, unless it is already there, and return its rows.

    `records` are not read if the file is there. `name` starts the file's name, `unique` is the id column.
    """
    # The whole content is hashed: size, time or a sample could miss an edit, and parsing takes far longer.
    stats = [(str(path.resolve()), path.stat().st_size, known_checksum(path)) for path in sources]
    key = hashlib.sha256(json.dumps([CONVERTER_VERSION, str(schema), stats]).encode()).hexdigest()[:24]
    path = cache_folder() / f"{name}-{key}.arrow"
    try:
        return Rows.open([path])
    except DamagedFileError as error:
        say(f"note: {error}; it is made again from {sources[0].name}", error=True)
    except OSError:
        pass  # not there yet
    with new_cache_file(path, f"the columns of {sources[0].name}") as partial:
        _write(partial, schema, records, sources[0])
        written = pa.ipc.open_file(pa.memory_map(str(partial))).read_all()
        _check_unique(written.column(unique), unique, sources)
    return Rows.open([path])


def _check_unique(ids: pa.ChunkedArray, name: str, sources: Sequence[Path]) -> None:
    if len(ids.unique()) == len(ids):
        return
    values, counts = ids.value_counts().flatten()
    repeated = values.filter(pc.greater(counts, 1))
    raise ValueError(
        f"{sources[0]}: {name} {repeated[0].as_py()!r} is there more than once, as do "
        f"{len(repeated) - 1:,} others; expected every id once"
    )


def _write(path: Path, schema: pa.Schema, records: Iterator[Mapping[str, Any]], source: Path) -> None:
    what = f"the columns of {source.name}"
    with writing_cache(path.parent, what):
        file = pa.OSFile(str(path), "wb")
        writer = pa.ipc.new_file(file, schema)
    with file:
        # Read outside `writing_cache`, since errors of reading a source are not errors of writing the cache.
        for batch in _batches(schema, records, source):
            with writing_cache(path.parent, what):
                writer.write_batch(batch)
        with writing_cache(path.parent, what):
            writer.close()
            file.close()


@contextmanager
def new_cache_file(path: Path, what: str) -> Iterator[Path]:
    """Yield the path of a file to write, which then gets a checksum and becomes `path`, unless writing fails.

    Its name is unique, since several processes on several machines may write it at a time; any of their files
    will do.
    """
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with writing_cache(path.parent, what):
            path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        with writing_cache(path.parent, what):
            seal(partial)
            partial.replace(path)
    finally:
        with suppress(OSError):  # if this fails, another error is already being raised
            partial.unlink()


@contextmanager
def writing_cache(folder: Path, what: str) -> Iterator[None]:
    """Add advice to errors of writing the cache folder."""
    try:
        yield
    except OSError as error:
        raise OSError(
            f"cannot write {what} to {folder} ({error}); make room there, or set DEPT_VL_CACHE "
            "to another folder"
        ) from error


def _batches(
    schema: pa.Schema, records: Iterator[Mapping[str, Any]], source: Path
) -> Iterator[pa.RecordBatch]:
    start = 0
    while chunk := list(islice(records, CHUNK_ROWS)):
        yield pa.record_batch([_column(column, chunk, source, start) for column in schema], schema=schema)
        start += len(chunk)


def _column(column: pa.Field, chunk: Sequence[Mapping[str, Any]], source: Path, start: int) -> pa.Array:
    try:
        return pa.array([record[column.name] for record in chunk], column.type)
    # Arrow's own errors are among these: too large a number, a lone surrogate, a list of other things.
    except (TypeError, ValueError, OverflowError) as error:
        if len(chunk) > 1:  # to find the faulty record
            for number, record in enumerate(chunk):
                _column(column, [record], source, start + number)
        raise ValueError(
            f"{source}, record {start + 1:,}: expected every {column.name!r} to fit {column.type}, found one "
            f"that does not: {error}"
        ) from None
