"""A few examples of a training split: k of each class, or k in all, and as many others to choose on.

They are kept with a run as `shots.json`, so that another run can learn from the same ones:

    {"k": 4, "seed": 1, "classes": ["false", "true"], "train": [17, ...], "dev": [203, ...]}
"""

from collections.abc import Sequence, Set
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random

from dept_vl._utils.io import read_object, write_json
from dept_vl._utils.options import check
from dept_vl.tasks.base import Task

YES_NO = 2
"""Different answers of a split that is all yes and no."""


@dataclass(frozen=True)
class Shots:
    """Places in a training split.

    Attributes:
        k: Examples of each class, or in all.
        seed: Of the draw.
        classes: The classes; empty if the task has none.
        train: Places of the examples to learn.
        dev: Places of those to choose on.
    """

    k: int
    seed: int
    classes: tuple[str, ...]
    train: tuple[int, ...]
    dev: tuple[int, ...]

    def write(self, path: Path) -> None:
        """Keep them for another run."""
        write_json(path, asdict(self), indent=None)


def classes_of(task: Task) -> tuple[str, ...]:
    """The classes of a task: the words of a classification, yes and no where there is nothing else.

    Empty where answers are open.
    """
    if task.decoding.candidates:
        return tuple(sorted(task.decoding.candidates))
    answers: set[str] = set()
    for index in range(len(task)):
        answers.add(task[index].answer)
        if len(answers) > YES_NO:
            return ()
    return tuple(sorted(answers))


def draw_shots(task: Task, k: int, seed: int) -> Shots:
    """Draw k examples of each class to learn and k to choose on, with no image on both sides.

    Args:
        task: The training split.
        k: How many of each class, or in all where there are no classes.
        seed: Of the draw.

    Raises:
        ValueError: If there are too few; the message names the class and its count.
    """
    classes = classes_of(task)
    order = Random(seed).sample(range(len(task)), len(task))
    train = _take(task, order, k, classes, set())
    learnt, seen = set(train), {path for index in train for path in task.images(index)}
    others = [index for index in order if index not in learnt]
    return Shots(k, seed, classes, train, _take(task, others, k, classes, seen))


def _take(
    task: Task, order: Sequence[int], k: int, classes: tuple[str, ...], avoided: Set[Path]
) -> tuple[int, ...]:
    """The first k of each class that show none of the images to avoid."""
    taken: dict[str, list[int]] = {name: [] for name in classes or ("",)}
    for index in order:
        if all(len(indices) == k for indices in taken.values()):
            break
        indices = taken[task[index].answer if classes else ""]
        if len(indices) < k and avoided.isdisjoint(task.images(index)):
            indices.append(index)
    for name, indices in taken.items():
        if len(indices) < k:
            count = sum(task[index].answer == name or not name for index in range(len(task)))
            raise ValueError(
                f"{k} shots are {k} examples{f' of the class {name!r}' if name else ''} to learn and {k} "
                f"with other images to choose on; the training split of {task.name} has {count}: choose a "
                "smaller k"
            )
    return tuple(sorted(index for indices in taken.values() for index in indices))


def read_shots(path: Path, count: int) -> Shots:
    """Read what a run wrote.

    Args:
        path: Its `shots.json`.
        count: Examples in the training split.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If it is damaged, or of another split.
    """
    shots: Shots = check(read_object(path, Shots), Shots)
    places = [*shots.train, *shots.dev]
    if not shots.train or not shots.dev or len(set(places)) < len(places):
        raise ValueError(f"{path} is damaged: expected different examples to learn and to choose on")
    if not all(0 <= place < count for place in places):
        raise ValueError(
            f"{path} is of another training split: expected places below {count:,}, found {max(places):,}"
        )
    return shots
