"""Conversion of all tables to rows of one schema, done once and cached."""

import hashlib
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from dept_vl._utils.embedded import is_data_url
from dept_vl._utils.errors import UsageError
from dept_vl.tasks.io.rows import Rows, convert
from dept_vl.tasks.own.columns import Columns, confine, read_mapping
from dept_vl.tasks.own.find import TableFile
from dept_vl.tasks.own.formats import annotations_of, read_records
from dept_vl.tasks.own.inline import EMBEDDED, Embedded, InlineImages
from dept_vl.tasks.own.options import OwnOptions
from dept_vl.tasks.own.readers import place

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
        "cleaned": pa.bool_(),
        "number_as": pa.string(),
    }
)
TEXT_TABLES = (".csv", ".tsv")
"""File extensions of tables whose cells are all text."""


def rows_of(
    tables: list[TableFile], folder: Path, base: Path, options: OwnOptions, *, images_alone: bool
) -> Rows:
    """Return the rows of all tables, from the cache if possible. `images_alone` is that of `Columns`."""
    sources = [table.path for table in tables]
    sources += [path for table in tables if (path := annotations_of(table.path)) is not None]
    said = asdict(replace(options, data=None, images=None, split_seed=0, holdout_share=0.1, metric="auto"))
    key = repr(
        (
            "as it looks, all lists, empty choices counted, ids as text, images of turns",
            said,
            str(folder.absolute()),
            str(base.absolute()),  # which references to images in tables are relative to
            [(str(table.path.absolute()), table.split) for table in tables],  # links may lead elsewhere
            images_alone,
        )
    )
    title = f"own-{hashlib.sha256(key.encode()).hexdigest()[:8]}"
    columns = Columns(
        read_mapping(options.columns),
        lambda: (
            (place(table.path, number), record)
            for table in tables
            if table.path.suffix.lower() not in TEXT_TABLES
            for number, record in read_records(table.path)
        ),
        all_turns=options.turns == "all",
        images_alone=images_alone,
    )
    return convert(title, sources, SCHEMA, _records(tables, folder, base, options, columns), unique="id")


def _records(
    tables: list[TableFile], folder: Path, base: Path, options: OwnOptions, columns: Columns
) -> Iterator[dict[str, Any]]:
    seen: dict[str, int] = {}
    count = 0
    for table in tables:
        text_cells = table.path.suffix.lower() in TEXT_TABLES
        # In a table beside its images (`imagefolder`), image names are relative to the table's folder.
        folder_of_table = table.path.parent
        beside = table.path.stem == "metadata" and options.images is None and folder_of_table != base
        below = f"{folder_of_table.relative_to(base).as_posix()}/" if beside else ""
        before = count
        inline = InlineImages(table.path, base)
        for number, record in read_records(table.path):
            where = place(table.path, number)
            inline.next_record()
            for row in columns.rows(record, where, text_cells=text_cells):
                row["split"] = row["split"] or table.split
                row["id"], row["renamed"] = _new_id(row["id"], count, seen, where)
                at = f"{where}, column {row['column']!r}"
                row["images"] = [
                    inline.reference(image, record, number, at)
                    if is_data_url(image)
                    else _reference(image, folder, base, below, at)
                    for image in row["images"]
                ]
                count += 1
                yield row
        if count == before:
            raise UsageError(f"{table.path} holds no rows")
    columns.check_mapping(options.data or str(base))


def _new_id(given: str, number: int, seen: dict[str, int], where: str) -> tuple[str, bool]:
    """Return a unique id, and whether it replaces a given id that is already used.

    `seen` has the ids of earlier rows, and how often each was given. A row without id gets its number.
    """
    if given and seen.get(given) == 0:
        raise UsageError(
            f"{where}: the id {given!r:.60} is the number of an earlier row that has no id; give all rows an "
            "id, or none"
        )
    first = chosen = given or str(number)
    while chosen in seen:
        seen[first] += 1
        chosen = f"{first}#{seen[first]}"
    seen[chosen] = int(bool(given))
    return chosen, bool(given) and chosen != given


def _reference(image: str, folder: Path, base: Path, below: str, where: str) -> str:
    """Return the reference to an image in the image folder, or in a table below the data folder."""
    if isinstance(image, Embedded):
        return EMBEDDED + image[len(EMBEDDED) :].removeprefix(f"{base.absolute()}/")
    return confine(image if image.startswith("/") else below + image, folder, where)
