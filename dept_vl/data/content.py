"""Short hashes of the content of a split: its rows as read, and the sizes of its images."""

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dept_vl.data.feature_index import file_stats
from dept_vl.tasks.io.rows import Rows

ROWS = 65_536
"""Number of rows hashed at a time. The hash depends on it."""
REMARKS = frozenset({"cleaned", "number_as"})
"""Columns that the hash ignores: they describe how others were read, and older rows lack them."""
MISSING = -1
"""Size of a missing image."""


def rows_content(rows: Rows) -> str:
    """Return 16 hexadecimal digits that identify rows and their order, independent of their storage."""
    digest = hashlib.sha256()
    for part in rows.chunks(ROWS):
        for name in sorted(set(part.column_names) - REMARKS):
            column = part.column(name).combine_chunks()
            digest.update(f"{name} {len(column)} ".encode())
            for piece in _pieces(column):
                digest.update(piece)
    return digest.hexdigest()[:16]


def _pieces(array: Any) -> Iterator[Any]:
    """Yield bytes that identify the values of an Arrow column, independent of their encoding."""
    kind = array.type
    if pa.types.is_dictionary(kind):
        array = array.dictionary_decode()
        kind = array.type
    if array.null_count:
        yield np.packbits(array.is_valid().to_numpy(zero_copy_only=False))
    if pa.types.is_large_string(kind) or pa.types.is_string(kind) or pa.types.is_binary(kind):
        array = pc.fill_null(array, b"" if pa.types.is_binary(kind) else "").cast(pa.large_binary())
        _, ends, text = array.buffers()
        offsets = np.frombuffer(ends, np.int64)[array.offset : array.offset + len(array) + 1]
        yield np.diff(offsets)
        yield memoryview(text or b"")[offsets[0] : offsets[-1]]
    elif pa.types.is_list(kind) or pa.types.is_large_list(kind):
        yield pc.fill_null(pc.list_value_length(array), 0).to_numpy().astype(np.int64)
        yield from _pieces(array.flatten())
    elif pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind):
        zero = pc.fill_null(array, pa.scalar(0).cast(kind))
        wide = np.float64 if pa.types.is_floating(kind) else np.int64
        yield zero.to_numpy(zero_copy_only=False).astype(wide)
    else:  # none of this package's tasks
        yield repr(array.to_pylist()).encode()


def sizes_content(paths: Sequence[Path]) -> str:
    """Return 16 hexadecimal digits that identify the sizes of files and their order."""
    sizes = [size if (size, time) != (0, 0) else MISSING for size, time in file_stats(paths)]
    return hashlib.sha256(np.array(sizes, np.int64).tobytes()).hexdigest()[:16]
