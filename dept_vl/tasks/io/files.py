"""Files of data sets: official ones by name, published facts about them, and shards of tables."""

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from dept_vl._utils.errors import UsageError

SHARD = re.compile(r"(.*)-\d+-of-(\d+)(-[0-9a-f]+)?")
"""Name of a shard, such as `train-00000-of-00002` or `train-00000-of-00002-54ed883c`."""


@dataclass(frozen=True)
class Published:
    """Published facts about a split."""

    files: tuple[tuple[str, ...], ...]  # possible names of each annotation file, the usual one first
    folders: tuple[tuple[str, ...], ...]  # possible names of each image folder, the usual one first
    source: str  # where the files are published
    examples: int  # number of questions, sentences or captioned images
    images: int | None = None  # number of different images; None if not published
    answers: int | None = None  # number of human answers or captions; None if there are none, or unpublished


def find(root: Path, names: Sequence[str], what: str, source: str) -> Path:
    """Return the first of these files that exists; raise FileNotFoundError if none does."""
    for name in names:
        if (root / name).is_file():
            return root / name
    others = f" (or {', '.join(names[1:])})" if len(names) > 1 else ""
    raise FileNotFoundError(
        f"{what} file not found: expected {names[0]}{others} in {root}; it is published at {source}"
    )


def find_folder(root: Path, names: Sequence[str], holds: str, source: str) -> Path:
    """Return the first of these folders that exists; raise FileNotFoundError if none does."""
    for name in names:
        if (root / name).is_dir():
            return root / name
    raise FileNotFoundError(
        f"no image folder for {names[0]}: expected {root / names[0]} with {holds}; "
        f"the images are published at {source}"
    )


def check_split(split: str, known: Iterable[str], what: str) -> None:
    """Raise ValueError if the name of a split is unknown."""
    if split not in (names := tuple(known)):
        raise ValueError(f"{what} has the splits {', '.join(names)}; got {split!r}")


def check_shards(files: Iterable[Path]) -> None:
    """Raise UsageError if shards of a table are missing, or a table is in its folder twice."""
    tables: dict[Path, dict[int, list[Path]]] = defaultdict(lambda: defaultdict(list))
    for path in files:
        shard = SHARD.fullmatch(path.stem)
        name, count = (shard[1], int(shard[2])) if shard else (path.stem, 1)
        tables[path.parent / name][count].append(path)
    for table, found in tables.items():
        if [len(paths) for paths in found.values()] != [*found] or len(found) > 1:
            counts = [f"{len(paths)} file(s) of {count}" for count, paths in sorted(found.items())]
            names = sorted(path.name for paths in found.values() for path in paths)
            raise UsageError(
                f"{table.parent}: the table {table.name} is incomplete or stored twice: found "
                f"{' and '.join(counts)} ({', '.join(names[:4])}{', ...' * (len(names) > 4)}). Keep every "
                "shard once, or one whole file"
            )
