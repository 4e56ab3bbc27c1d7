"""Check which files of a data set exist, and whether its counts are those published."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

import pyarrow.compute as pc

from dept_vl._utils.errors import UnknownNameError
from dept_vl._utils.images import missing_files, read_image
from dept_vl._utils.terminal import counted
from dept_vl.tasks import TASKS
from dept_vl.tasks.base import Task
from dept_vl.tasks.io.files import Published


@dataclass(frozen=True)
class Finding:
    """A line of the report, with its status.

    The status is `found` or `missing` for files, `ok` or `differs` for counts, `broken` for images, `skipped`
    for splits; for your own data also `note`, `empty`, `leak` or `lost`.
    """

    status: str
    what: str

    @property
    def good(self) -> bool:
        """Whether nothing is wrong."""
        return self.status in ("found", "ok", "note")


def check(task: str, root: Path, *, sample: int = 200) -> Iterator[Finding]:
    """Check every split of a task, opening a random sample of the images of each; 0 opens all."""
    known = [name for name, blank in TASKS.items() if blank.published]
    if task not in known:
        raise UnknownNameError("task", task, known)
    if not root.is_dir():
        raise FileNotFoundError(f"no folder {root}; make it and put the files of {task} there")
    blank = TASKS[task]
    seen: set[tuple[str, ...]] = set()
    for split, published in blank.published.items():
        whole = True
        for names in (*published.files, *published.folders):
            path = next((root / name for name in names if (root / name).exists()), None)
            whole &= path is not None
            if names not in seen:
                seen.add(names)
                others = f" (or {', '.join(names[1:])})" if len(names) > 1 else ""
                source = blank.elsewhere.get(names[0], published.source)
                missing = Finding("missing", f"{names[0]}{others}, published at {source}")
                yield missing if path is None else Finding("found", str(path))
        if whole:
            yield from _split(blank, root, split, published, sample)
        else:
            yield Finding("skipped", f"{task} {split}: files are missing")


def _split(blank: Task, root: Path, split: str, published: Published, sample: int) -> Iterator[Finding]:
    try:
        task = blank.load(root, split)
    except (ValueError, OSError) as error:
        yield Finding("broken", str(error))
        return
    name = f"{task.name} {split}"
    files = task.image_files()
    answers = pc.sum(pc.list_value_length(task.rows.column("answers"))).as_py()
    for what, found, expected in (
        ("examples", len(task), published.examples),
        ("images", len(files), published.images),
        ("answers", answers, published.answers),
    ):
        if expected == found:
            yield Finding("ok", f"{name}: {what}: {found:,}, as published")
        elif expected is not None:
            yield Finding("differs", f"{name}: {what}: found {found:,}, published are {expected:,}")
    yield from check_files(name, files, sample)


def check_files(name: str, files: list[Path], sample: int) -> Iterator[Finding]:
    """Check that image files exist, and open a random sample of them; 0 opens all."""
    missing = missing_files(files)
    if missing:
        yield Finding("missing", f"{name}: {len(missing):,} of {len(files):,} image files")
        yield from (Finding("missing", str(path)) for path in missing)
    gone = set(missing)
    there = [path for path in files if path not in gone]
    opened = there if not 0 < sample < len(there) else Random(0).sample(there, sample)
    broken = []
    for path in counted(f"opening images of {name}", opened, len(opened)):
        try:
            read_image(path)
        except (ValueError, FileNotFoundError) as error:
            broken.append(str(error))
    yield from (Finding("broken", error) for error in broken)
    if opened:
        good = f"{len(opened) - len(broken):,} of {len(opened):,} images opened of {len(there):,}"
        yield Finding("broken" if broken else "ok", f"{name}: {good}")
