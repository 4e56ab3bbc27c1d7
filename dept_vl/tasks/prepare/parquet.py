"""Stream of rows from a parquet copy of a data set, on the Hub or in a folder.

In a folder, the copy has the form of a download (parquet files, in `data/`, in a folder per configuration or
in a folder per split) or of `save_to_disk`.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from dept_vl._utils.errors import UsageError
from dept_vl._utils.printable import say
from dept_vl.tasks.io.files import check_shards

HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")

Part = tuple[str | None, str]
"""A configuration of a copy (None if it has only one) and a split."""


@dataclass(frozen=True)
class Source:
    """A copy in a folder or on the Hub (`place`), with its usual Hub name and the official source."""

    place: str | Path
    hub: str
    official: str

    def rows(
        self, part: Part, needed: Sequence[str], carried: Sequence[str] = (), images: Sequence[str] = ()
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        """Return the rows of a part as a stream, with their location. Columns are checked immediately.

        `carried` columns are optional. Those of `images` are not decoded, but returned as dicts with `bytes`.
        """
        from datasets import Image  # seconds to import

        where = f"{self.place}, {' '.join(name for name in part if name)}"
        dataset = self._open(part, where)
        found = dataset.column_names or []
        missing = [name for name in needed if name not in found]
        if missing:
            raise ValueError(
                f"{where}: expected the columns {', '.join(needed)}; {', '.join(missing)} missing, found "
                f"{', '.join(found)}. The copy has changed, or is another one: take the official files from "
                f"{self.official}, or another copy of {self.hub}"
            )
        absent = [name for name in carried if name not in found]
        if absent:
            say(f"{where}: no columns {', '.join(absent)}, so the official file goes without", error=True)
        dataset = dataset.select_columns([*needed, *(name for name in carried if name in found)])
        try:
            for name in images:
                dataset = dataset.cast_column(name, Image(decode=False))
        except Exception as error:  # Arrow's, of many kinds
            raise OSError(
                f"{where}: expected images in {', '.join(images)}, found {dataset.features} ({error})"
            ) from error
        return self._read(dataset, where)

    def _open(self, part: Part, where: str) -> Any:
        if isinstance(self.place, Path):
            return _open_folder(self.place, part, self.hub)
        from datasets import load_dataset

        config, split = part
        try:
            return load_dataset(self.place, config, split=split, streaming=True)
        except Exception as error:  # the Hub's client raises almost anything
            raise OSError(
                f"cannot read {where} from the Hub, and it is not a folder here: {error}. "
                f"{placing(self.place)}"
            ) from error

    def _read(self, dataset: Any, where: str) -> Iterator[tuple[str, dict[str, Any]]]:
        rows = iter(tqdm(dataset, desc=where, unit=" rows", disable=None))
        number = 0
        while True:
            try:
                row = next(rows, None)
            except Exception as error:  # as above, and Arrow on damaged files
                raise OSError(
                    f"cannot read on in {where} after {number:,} rows: {error}. {placing(self.hub)}"
                ) from error
            if row is None:
                break
            number += 1
            yield f"{where}, row {number}", row
        if not number:
            raise ValueError(f"{where}: expected rows, found none")


def open_source(source: str | Path, hub: str, official: str) -> Source:
    """Return a copy in a folder or on the Hub; raise FileNotFoundError if `source` is neither."""
    folder = Path(source).expanduser()
    if folder.is_dir():
        return Source(folder, hub, official)
    if isinstance(source, Path) or not HUB_NAME.fullmatch(source):
        raise FileNotFoundError(
            f"no such folder: {source}; expected a folder that holds a copy of {hub}, or that name"
        )
    return Source(source, hub, official)


def placing(hub: str | Path) -> str:
    """Return instructions for downloading a copy to a folder, for messages."""
    return (
        f"Download it where there is a network (hf download {hub} --repo-type dataset --local-dir FOLDER) "
        "and give FOLDER as the source"
    )


def _open_folder(folder: Path, part: Part, hub: str) -> Any:
    from datasets import load_dataset, load_from_disk

    config, split = part
    root = folder / config if config else folder
    files = [
        path
        for path in sorted(root.rglob("*.parquet"))
        if path.stem == split or path.stem.startswith(f"{split}-") or split in path.relative_to(root).parts
    ]
    try:
        check_shards(files)
    except UsageError as error:
        raise ValueError(f"{error}. {placing(hub)}") from None
    try:
        if files:
            return load_dataset(
                "parquet", data_files={split: [str(path) for path in files]}, split=split, streaming=True
            )
        if (root / split / "state.json").is_file():
            return load_from_disk(str(root / split))
        # A split saved on its own must name itself.
        if (root / "state.json").is_file() and str((saved := load_from_disk(str(root))).split) == split:
            return saved
    except Exception as error:  # Arrow's errors and those of `datasets` have no common base
        raise OSError(f"cannot read the split {split} in {root}: {error}. {placing(hub)}") from error
    others = sorted(str(path.relative_to(folder)) for path in folder.rglob("*.parquet"))
    raise FileNotFoundError(
        f"no split {split} in {root}: expected {split}-*.parquet, a folder {split} of parquet files, or what "
        f"save_to_disk writes; found {', '.join(others[:5]) or 'no parquet files'} in {folder}. "
        f"{placing(hub)}"
    )
