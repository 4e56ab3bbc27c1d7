"""Rows of all tables in one form, converted once and kept in the cache folder."""

import base64
import binascii
import hashlib
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from dept_vl._utils.checksums import checksum
from dept_vl._utils.errors import UsageError
from dept_vl.tasks.io.rows import Rows, convert
from dept_vl.tasks.own.columns import INLINE, Columns, confine, read_mapping
from dept_vl.tasks.own.files import TableFile
from dept_vl.tasks.own.formats import annotations_of, read_records
from dept_vl.tasks.own.options import OwnOptions
from dept_vl.tasks.own.tables import EMBEDDED, place

SCHEMA = pa.schema(
    {
        "id": pa.string(),
        "form": pa.string(),
        "question": pa.string(),
        "answers": pa.list_(pa.string()),
        "choices": pa.list_(pa.string()),
        "images": pa.list_(pa.string()),
        "split": pa.string(),
        "type": pa.string(),
        "renamed": pa.bool_(),
        "embedded": pa.list_(pa.binary()),
        "place": pa.int64(),
    }
)
INLINE_NUMBER = "inline:"
"""Begins the reference to an image of the column `embedded`, which data URLs go into: its number in the row,
and its checksum, by which the same image of other rows is known."""


def rows_of(
    tables: list[TableFile], folder: Path, base: Path, options: OwnOptions, *, images_alone: bool
) -> Rows:
    """Return the rows of all tables, converted once; those of images alone only if they may be."""
    sources = [table.path for table in tables]
    sources += [path for table in tables if (path := annotations_of(table.path)) is not None]
    said = asdict(replace(options, data=None, images=None, split_seed=0, holdout_share=0.1, metric="auto"))
    key = repr(("checksums", said, str(folder.absolute()), [table.split for table in tables], images_alone))
    title = f"own-{hashlib.sha256(key.encode()).hexdigest()[:8]}"
    columns = Columns(
        read_mapping(options.columns), all_turns=options.turns == "all", images_alone=images_alone
    )
    return convert(title, sources, SCHEMA, _records(tables, folder, base, options, columns), unique="id")


def _records(
    tables: list[TableFile], folder: Path, base: Path, options: OwnOptions, columns: Columns
) -> Iterator[dict[str, Any]]:
    seen: set[str] = set()
    count = 0
    for table in tables:
        text_cells = table.path.suffix.lower() in (".csv", ".tsv")
        # Beside images, as `imagefolder` has it, names are of the table's own folder.
        beside = table.path.stem == "metadata" and options.images is None and table.folder != base
        below = f"{table.folder.relative_to(base).as_posix()}/" if beside else ""
        before = count
        for number, record in read_records(table.path):
            where = place(table.path, number)
            for row in columns.rows(record, where, text_cells=text_cells):
                row["split"] = row["split"] or table.split
                row["id"], row["renamed"] = _new_id(row["id"], count, seen)
                at = f"{where}, column {row['column']!r}"
                row["images"], row["embedded"] = _references(row["images"], folder, base, below, at)
                row["place"] = count
                count += 1
                yield row
        if count == before:
            raise UsageError(f"{table.path} holds no rows")


def _new_id(given: str, number: int, seen: set[str]) -> tuple[str, bool]:
    """Return an id that no row before has, and whether another was given."""
    chosen, copy = given or str(number), 1
    while chosen in seen:
        copy += 1
        chosen = f"{given or number}#{copy}"
    seen.add(chosen)
    return chosen, bool(given) and chosen != given


def _references(
    images: list[str], folder: Path, base: Path, below: str, where: str
) -> tuple[list[str], list[bytes]]:
    """Return references that stay inside the folder, and the bytes of data URLs."""
    references: list[str] = []
    embedded: list[bytes] = []
    for image in images:
        if image.startswith(INLINE):
            content = _decoded(image, where)
            references.append(f"{INLINE_NUMBER}{len(embedded)}:{checksum(content)}")
            embedded.append(content)
        elif image.startswith(EMBEDDED):
            # Below the folder of the data, which may be moved.
            references.append(EMBEDDED + image[len(EMBEDDED) :].removeprefix(f"{base.absolute()}/"))
        elif image.startswith("/"):
            references.append(confine(image, folder, where))
        else:
            references.append(confine(below + image, folder, where))
    return references, embedded


def _decoded(url: str, where: str) -> bytes:
    header, comma, content = url.partition(",")
    try:
        if comma and header.endswith(";base64"):
            return base64.b64decode(content, validate=True)
    except binascii.Error:
        pass
    raise UsageError(f"{where}: expected a data URL data:image/...;base64,..., found {url[:60]!r}")
