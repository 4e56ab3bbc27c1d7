"""The tasks, one file each; the text tasks in one table."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

from dept_vl._utils.errors import UnknownNameError
from dept_vl.tasks import coco, gqa, nlvr2, vqav2
from dept_vl.tasks.base import Asked, Task
from dept_vl.tasks.coco import COCOCaptions
from dept_vl.tasks.gqa import GQA
from dept_vl.tasks.io.rows import Rows
from dept_vl.tasks.nlvr2 import NLVR2
from dept_vl.tasks.text import task
from dept_vl.tasks.text.table import TEXT_TASKS
from dept_vl.tasks.text.task import TextTask
from dept_vl.tasks.vqav2 import VQAv2

TASKS: dict[str, Callable[[Path, str], Task]] = {
    "vqav2": VQAv2.load,
    "gqa": GQA.load,
    "nlvr2": NLVR2.load,
    "coco": COCOCaptions.load,
    **{name: partial(TextTask.load, name) for name in TEXT_TASKS},
}
"""Name of a task -> how one of its splits is read from a folder."""


def load_task(name: str, root: Path | None, split: str) -> Task:
    """Read a split of a task.

    Args:
        name: Of the task.
        root: Folder with its files; None for `data/NAME`, and for a text task without it for the Hub.
        split: As the task calls it.

    Raises:
        ValueError: If there is no such task.

    Example:
        >>> import dept_vl
        >>> from pathlib import Path
        >>> task = dept_vl.load_task("vqav2", Path("data/vqav2"), "val")
        >>> scores = task.score({task[place].example_id: "yes" for place in range(len(task))})
        >>> 0 <= scores["overall"] <= 100
        True
    """
    if name not in TASKS:
        raise UnknownNameError("task", name, TASKS)
    folder = data_folder(name, root)
    if root is None and name in TEXT_TASKS and not folder.is_dir():
        return TextTask.load(name, None, split)
    return TASKS[name](folder, split)


def asked(name: str) -> Asked:
    """A task without its files, for questions of one's own.

    Raises:
        ValueError: If there is no such task.
    """
    if name in TEXT_TASKS:
        return TextTask(name, Rows.of([], task.SCHEMA))
    tasks: dict[str, Asked] = {
        "vqav2": VQAv2(Rows.of([], vqav2.SCHEMA), {}),
        "gqa": GQA(Rows.of([], gqa.SCHEMA), Path()),
        "nlvr2": NLVR2(Rows.of([], nlvr2.SCHEMA), Path()),
        "coco": COCOCaptions(Rows.of([], coco.SCHEMA), {}),
    }
    if name not in tasks:
        raise UnknownNameError("task", name, TASKS)
    return tasks[name]


def data_folder(name: str, root: Path | None) -> Path:
    """Folder with a task's files: `data/NAME` unless said."""
    return Path("data") / name if root is None else root
