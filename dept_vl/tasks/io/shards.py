"""Check of the files of a table: each row once, and no shard missing."""

import re
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from dept_vl._utils.errors import UsageError

SHARD = re.compile(r"(.*)-\d+-of-(\d+)(-[0-9a-f]+)?")
"""Name of a shard, such as `train-00000-of-00002` or `train-00000-of-00002-54ed883c`."""


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
