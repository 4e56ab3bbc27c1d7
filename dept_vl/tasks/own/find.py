"""Search for the files that hold the data, and for the split of each file."""

import os
import re
from dataclasses import dataclass
from pathlib import Path

from dept_vl._utils.errors import UsageError
from dept_vl.tasks.io.files import check_shards
from dept_vl.tasks.own.formats import SPLITS, is_annotations
from dept_vl.tasks.own.options import TABLES, is_data_set

OURS = (
    "index.json",
    "config.json",
    "dataset_infos.json",
    "dataset_dict.json",
    "state.json",
    "dataset_info.json",
)
"""JSON files that lie beside data but are not tables."""
DEEPEST = 2
"""Number of folders below that of the data in which tables are read."""
SHOWN = 5
"""Number of tables that a note names."""
FETCHED = ("*.parquet", "*.jsonl", "*.json", "*.csv", "*.tsv", "*.jpg", "*.jpeg", "*.png", "*.webp")
"""File patterns to download from a data set on the Hub; they never include code."""


@dataclass(frozen=True)
class TableFile:
    """A table file, with the split in its name (or empty)."""

    path: Path
    split: str


def find_tables(data: str) -> tuple[Path, list[TableFile], list[str]]:
    """Return the folder and tables of a file, folder or Hub data set, and a note on tables left out."""
    path = Path(data)
    if path.is_file():
        return path.parent, [TableFile(path, "")], []
    if not path.is_dir():
        path = fetch(data)
    tables, deep = [], []
    for folder, folders, files in os.walk(path):
        below = Path(folder).relative_to(path)
        folders[:] = sorted(name for name in folders if name != "features" and not name.startswith("."))
        for name in sorted(files):
            file = Path(folder) / name
            is_table = (
                file.suffix.lower() in TABLES and name not in OURS and not name.startswith((".", "cache-"))
            )
            if is_table and len(below.parts) > DEEPEST:
                deep.append(str(below / name))
            elif is_table and not is_annotations(file):
                tables.append(TableFile(file, _split_of(below / name)))
    if not tables:
        raise UsageError(
            f"{path} holds no table: expected files that end in {', '.join(TABLES)}; an image folder needs a "
            "metadata.csv or metadata.jsonl with file_name and question, answer, caption or label"
        )
    named = [table for table in tables if table.split]
    # If some files name a split, files that name none are ignored: they may hold all splits together.
    left_out = [str(table.path.relative_to(path)) for table in tables if named and not table.split]
    tables = named or tables
    check_shards(table.path for table in tables)
    reasons = {
        "other files name a split and these do not": left_out,
        f"they are more than {DEEPEST} folders deep": deep,
    }
    notes = [
        f"ignored, because {why}: {', '.join(names[:SHOWN])}{', ...' * (len(names) > SHOWN)}"
        for why, names in reasons.items()
        if names
    ]
    return path, tables, notes


def _split_of(path: Path) -> str:
    """Return the split named by a file's name, or else by its folder; empty if neither names one."""
    for name in (path.stem, *reversed(path.parent.parts)):
        for word in re.split(r"[^a-z]+", name.lower()):
            if word in SPLITS:
                return SPLITS[word]
    return ""


def fetch(name: str) -> Path:
    """Download the tables and images of a data set on the Hub, once; FileNotFoundError if that fails."""
    if not is_data_set(name):
        raise FileNotFoundError(f"no such file or folder: {name}")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return Path(snapshot_download(name, repo_type="dataset", allow_patterns=list(FETCHED)))
    except (OSError, ValueError, HfHubHTTPError) as error:
        reason = str(error).split("\n")[0]
        raise FileNotFoundError(
            f"{name} is not a file, a folder or a data set that can be fetched from the Hub ({reason:.200})"
        ) from None
