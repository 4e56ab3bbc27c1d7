"""Registry of tasks. Each task has its own file; the text tasks share one table."""

from pathlib import Path
from typing import Any

from dept_vl._utils.registry import Registry
from dept_vl.tasks.base import Task
from dept_vl.tasks.text.table import TEXT_TASKS

__all__ = ["TASKS", "load_task", "register_task"]

TASKS: Registry[Task] = Registry(
    "task",
    {
        "vqav2": "dept_vl.tasks.vqav2:TASK",
        "gqa": "dept_vl.tasks.gqa:TASK",
        "nlvr2": "dept_vl.tasks.nlvr2:TASK",
        "coco": "dept_vl.tasks.coco:TASK",
        "vqa": "dept_vl.tasks.own.task:VQA",
        "captions": "dept_vl.tasks.own.task:CAPTIONS",
        "labels": "dept_vl.tasks.own.task:LABELS",
        **{name: f"dept_vl.tasks.text.task:{name}" for name in TEXT_TASKS},
    },
)
"""Blank tasks by name, imported on first use."""


def load_task(name: str, root: Path | None = None, split: str = "", **own: Any) -> Task:
    """Read a split of a task.

    Args:
        name: Name of the task.
        root: Folder with the task's files. None is `data/NAME`, or the Hub for a text task without it.
        split: Name of the split in the task's own terms; empty for the training split.
        **own: Fields of `OwnOptions`, for your own data and task vqa: `data` (file, folder, or name on the
            Hub), `images`, `columns` and others.

    Raises:
        FileNotFoundError: If a file or an image folder is missing.
        UnknownNameError: If the task is not registered.
        ValueError: If the split is unknown or a file is damaged.

    Example:
        >>> import dept_vl
        >>> from pathlib import Path
        >>> task = dept_vl.load_task("vqav2", Path("data/vqav2"), "val")
        >>> scores = task.score({task[place].example_id: "yes" for place in range(len(task))})
        >>> 0 <= scores["overall"] <= 100
        True
    """
    if not own:
        return TASKS[name].load(root, split)
    from dept_vl.tasks.own.options import OwnOptions

    OwnOptions.check_names(own, load_task)
    return TASKS[name].with_options(OwnOptions.of(**own)).load(root, split)


def register_task(task: Task) -> None:
    """Register your own task, so that every script, study and function finds it by name.

    1. Write a subclass of `Task`: a frozen dataclass with the field `rows: Rows = NO_ROWS`; other fields,
       such as the image folder, have a default too.
    2. Set its class attributes: `name`, `prefix`, the splits, and others that differ from `Task`.
    3. Write `read(root, split)`: return `replace(self, rows=Rows.of(records, SCHEMA))` with the columns of
       the ids and the `answers` (lists); for large files use `rows.convert`, which caches the columns.
    4. Write `__getitem__(index)`: make an `Example` of a row.
    5. Override `mark` and `metrics` for another metric than accuracy.
    6. Call `register_task(MyTask())`; a task of this package gets a line in `TASKS` instead.

    Args:
        task: Blank task, without rows.

    Raises:
        TypeError: If it is no `Task`.
        ValueError: If another one of this name is registered, or the name is no name of a folder.

    Example:
        >>> from dataclasses import dataclass
        >>> from pathlib import Path
        >>> import dept_vl
        >>> from dept_vl.tasks import TASKS
        >>> from dept_vl.tasks.vqav2 import VQAv2
        >>> @dataclass(frozen=True)
        ... class Signs(VQAv2):  # questions about street signs, in VQAv2's format
        ...     name, prefix, dev_split = "signs", "sign: ", "val"
        >>> dept_vl.register_task(Signs())
        >>> len(dept_vl.load_task("signs", Path("data/vqav2"), "val")) > 0
        True
        >>> TASKS.unregister("signs")
    """
    if not isinstance(task, Task):
        raise TypeError(f"expected a blank task, such as MyTask(), found {task!r:.80}")
    TASKS.register(task.name, task)
