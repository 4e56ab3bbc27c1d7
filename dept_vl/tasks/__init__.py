"""The tasks, one file each."""

from collections.abc import Callable
from pathlib import Path

from dept_vl.tasks.coco import COCOCaptions
from dept_vl.tasks.example import Task
from dept_vl.tasks.gqa import GQA
from dept_vl.tasks.nlvr2 import NLVR2
from dept_vl.tasks.vqav2 import VQAv2

TASKS: dict[str, Callable[[Path, str], Task]] = {
    "vqav2": VQAv2.load,
    "gqa": GQA.load,
    "nlvr2": NLVR2.load,
    "coco": COCOCaptions.load,
}
"""Name of a task -> how one of its splits is read from a folder."""


def load_task(name: str, root: Path, split: str) -> Task:
    """Read a split of a task.

    Raises:
        ValueError: If there is no such task.
    """
    if name not in TASKS:
        raise ValueError(f"unknown task {name!r}; there are: {', '.join(TASKS)}")
    return TASKS[name](root, split)
