"""Rows of published text data sets, from the Hub, from `save_to_disk`, or from a folder of files.

The files of a split, such as `validation.jsonl` or shards `validation-00000-of-00001.parquet`, are searched
in the folder, in a subfolder with the name of the configuration, and in `data`, so that copies of Hub
repositories can be read.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from dept_vl._utils.errors import UsageError, is_user_error
from dept_vl._utils.io import one_line
from dept_vl.tasks.io.files import check_shards
from dept_vl.tasks.own.formats import read_records
from dept_vl.tasks.text.table import TextSpec

SUFFIXES = (".parquet", ".jsonl", ".json", ".csv", ".tsv")
BATCH_ROWS = 1000
"""Number of rows decoded at a time."""


@dataclass(frozen=True)
class Source:
    """Rows of a split, with at least the needed columns, their location for messages, and their files."""

    place: str
    files: tuple[Path, ...]
    rows: Iterator[Mapping[str, Any]]


def placing(spec: TextSpec, split: str) -> str:
    """Return instructions for making a copy of a task's data."""
    if not spec.dataset:
        made = f"python scripts/prepare_data.py {spec.name} --output_dir data/{spec.name}"
        return f"in a clone, make one with: {made}"
    name = f"{spec.dataset!r}" + (f", {spec.config!r}" if spec.config else "")
    return (
        f"on a machine with a network, load_dataset({name}).save_to_disk({spec.name!r}) makes one, or "
        f"put {split}.parquet, .jsonl, .json, .csv or .tsv with the Hub's columns into a folder; then "
        "say --data_dir FOLDER"
    )


def open_source(
    published: TextSpec, folder: Path | None, split: str, needed: Sequence[str], wanted: Sequence[str] = ()
) -> Source:
    """Open a split in a folder, or (None) on the Hub or in its cache. `wanted` columns are optional."""
    if folder is None:
        return _hub(published, split, needed, wanted)
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder} with {published.name}; {placing(published, split)}")
    if (folder / "dataset_dict.json").is_file() and (folder / split / "state.json").is_file():
        return _saved(folder / split, needed, wanted)
    if (folder / "state.json").is_file() and folder.name == split:
        return _saved(folder, needed, wanted)
    files = find_files(folder, published.config, split)
    if not files:
        raise FileNotFoundError(
            f"{folder} holds no split {split!r} of {published.name}: expected {split}.parquet, .jsonl, "
            f".json, .csv or .tsv, its shards, or a folder of save_to_disk; {placing(published, split)}"
        )
    others = f" and {len(files) - 1} more" if len(files) > 1 else ""
    # Read like your own tables; columns are checked with each row.
    columns, classes = (*needed, *wanted), published.words.values()
    rows = (row for path in files for _, row in read_records(path, columns, classes=classes))
    return Source(f"{files[0]}{others}", files, rows)


def find_files(folder: Path, config: str | None, split: str) -> tuple[Path, ...]:
    """Return the files of a split, from the only location and file type that has any."""
    name = re.compile(rf"{re.escape(split)}(-\d+-of-\d+)?")
    roots = dict.fromkeys((folder, folder / (config or "."), folder / "data"))
    found = [
        files
        for root, suffix in product(roots, SUFFIXES)
        if (files := sorted(path for path in root.glob(f"{split}*{suffix}") if name.fullmatch(path.stem)))
    ]
    if len(found) > 1:
        raise UsageError(
            f"{folder} holds the split {split!r} twice, in {found[0][0]} and {found[1][0]}; move one away"
        )
    if not found:
        return ()
    check_shards(found[0])
    return tuple(found[0])


def check_columns(place: str, needed: Sequence[str], found: Sequence[str]) -> None:
    """Raise ValueError if a required column is missing; the message lists the columns found."""
    missing = [name for name in needed if name not in found]
    if missing:
        raise ValueError(
            f"{place}: expected the columns {', '.join(needed)}; {', '.join(missing)} missing, found "
            f"{', '.join(map(str, found))}"
        )


def _hub(published: TextSpec, split: str, needed: Sequence[str], wanted: Sequence[str]) -> Source:
    name = " ".join(part for part in (published.dataset, published.config) if part)
    if not published.dataset:
        raise FileNotFoundError(f"no copy of {published.name}; {placing(published, split)}")
    from datasets import load_dataset  # takes a second, and most runs read the columns made before

    try:
        dataset = load_dataset(published.dataset, published.config, split=split)
    except Exception as error:  # of many types, if there is no network
        reason = str(error).split("\n")[0]
        raise FileNotFoundError(
            f"cannot read {name}, split {split!r}, from the Hub ({reason:.200}), and no copy of it is here; "
            f"{placing(published, split)}"
        ) from None
    return _of_dataset(f"{name} {split}", dataset, needed, wanted)


def _saved(folder: Path, needed: Sequence[str], wanted: Sequence[str]) -> Source:
    from datasets import load_from_disk

    with _whole(folder):
        return _of_dataset(str(folder), load_from_disk(str(folder)), needed, wanted)


@contextmanager
def _whole(place: str | Path) -> Iterator[None]:
    """Convert errors of reading a data set to a ValueError that it is damaged."""
    try:
        yield
    except Exception as error:  # of many types
        if is_user_error(error) and not isinstance(error, OSError):
            raise
        raise ValueError(
            f"{place} is not a complete data set: {type(error).__name__}: {one_line(error)}; save it again"
        ) from None


def _of_dataset(place: str, dataset: Any, needed: Sequence[str], wanted: Sequence[str]) -> Source:
    check_columns(place, needed, dataset.column_names)
    columns = [name for name in (*needed, *wanted) if name in dataset.column_names]
    files = tuple(Path(file["filename"]) for file in dataset.cache_files)
    batches = dataset.select_columns(columns).with_format("arrow").iter(BATCH_ROWS)

    def rows() -> Iterator[Mapping[str, Any]]:
        with _whole(place):
            for batch in batches:
                batch.validate(full=True)  # damaged data would crash the process
                yield from batch.to_pylist()

    return Source(place, files, rows())
