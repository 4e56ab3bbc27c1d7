"""The tasks, one file each; the text tasks in one table."""

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
"""Name -> the blank task, imported when first used."""


def load_task(name: str, root: Path | None = None, split: str = "", **own: Any) -> Task:
    """Read a split of a task.

    Args:
        name: Name of the task.
        root: Folder with its files; None for `data/NAME`, and for a text task without it for the Hub.
        split: Name of the split, as the task calls it; empty for the training split.
        **own: Of your own data, for task vqa: `data` (file, folder, or name on the Hub), `images`, `columns`
            and the other fields of `OwnOptions`.

    Raises:
        FileNotFoundError: If a file or an image folder is missing.
        UnknownNameError: If there is no such task.
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

    return TASKS[name].with_options(OwnOptions.of(**own)).load(root, split)


def register_task(task: Task) -> None:
    """Add a task of your own, so that every script, study and function finds it by its name.

    1. Write a subclass of `Task`: a frozen dataclass with the field `rows: Rows = NO_ROWS`; other fields,
       such as the image folder, have a default too.
    2. Set its class attributes: `name`, `prefix`, the splits, and what else differs from `Task`. The ids
       of the examples need `id_column` and `prediction_format`.
    3. Write `read(root, split)`: return `replace(self, rows=Rows.of(records, SCHEMA))` with the columns of
       the ids and the `answers`; for large files use `rows.convert`, which caches the columns.
    4. Write `__getitem__(index)`: make an `Example` of a row.
    5. Override `mark` and `metrics` for another metric than accuracy.
    6. Call `register_task(MyTask())`; a task of this package gets a line in `TASKS` instead.

    Args:
        task: The task without rows.

    Raises:
        ValueError: If another task has the name.

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
    TASKS.register(task.name, task)
