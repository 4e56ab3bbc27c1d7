"""Few-shot selection: a few examples of a training split, and as many others as a dev set.

As in LM-BFF (Gao et al. 2021), k examples per class are drawn for training and k per class for the dev set.
As in DePT's few-shot tables (Shi & Lipani 2024), the k examples can instead be spread evenly over the classes
(`shots_per`: with k = 16, eight of each of two classes), and a whole dev split can be used (`shots_dev`). The
selection is saved with a run as `shots.json`, so that another run can use it:

    {"k": 4, "seed": 1, "classes": ["false", "true"], "train": [17, ...], "dev": [203, ...], "content": "..."}
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random

from dept_vl._utils.io import read_object, write_noted_json
from dept_vl._utils.options import check
from dept_vl.config import DataOptions
from dept_vl.data.content import rows_content
from dept_vl.tasks.base import Task
from dept_vl.tasks.options import ShotsPer

YES_NO = 2
"""Number of different answers in a yes/no split."""


@dataclass(frozen=True)
class Shots:
    """Few-shot selection from a training split."""

    k: int  # number of examples per class, or in total
    seed: int  # random seed of the drawing
    classes: tuple[str, ...]  # names of the classes; empty if the task has none
    train: tuple[int, ...]  # indices of the training examples
    dev: tuple[int, ...]  # indices of the dev examples
    content: str = ""  # hash of the rows of these examples; empty in older files

    def write(self, path: Path) -> None:
        """Save the selection, so that another run can use it."""
        write_noted_json(path, asdict(self), indent=None)


def classes_of(task: Task) -> tuple[str, ...]:
    """Return the classes of a task: its candidates, or its answers if there are at most two; else nothing."""
    if task.decoding.candidates:
        return tuple(sorted(task.decoding.candidates))
    answers: set[str] = set()
    for index in range(len(task)):
        answers.add(task[index].answer)
        if len(answers) > YES_NO:
            return ()
    return tuple(sorted(answers))


def choose_shots(options: DataOptions, train: Task) -> Shots | None:
    """Return the few-shot selection of these options, drawn or read; None to train on all examples."""
    if options.shots and options.shots_file:
        raise ValueError(
            f"shots={options.shots} draws examples and shots_file={options.shots_file} names them; give one"
        )
    if options.shots_file:
        return read_shots(options.shots_file, train)
    if not options.shots:
        return None
    return draw_shots(train, options.shots, options.shots_seed, options.shots_per)


def draw_shots(task: Task, k: int, seed: int, per: ShotsPer = "class") -> Shots:
    """Draw k training examples and k dev examples per class, without sharing images between the two.

    With `per` all, k is the total; the first classes get one more if it does not divide.
    """
    classes = classes_of(task)
    sizes = dict.fromkeys(classes or ("",), k)
    if per == "all" and classes:
        sizes = {name: k // len(classes) + (n < k % len(classes)) for n, name in enumerate(classes)}
    order = Random(seed).sample(range(len(task)), len(task))
    images = task.image_keys()
    train = _take(task, order, sizes)
    learnt, seen = set(train), {path for index in train for path in images[index]}
    others = [index for index in order if index not in learnt and seen.isdisjoint(images[index])]
    dev = _take(task, others, sizes)
    return Shots(k, seed, classes, train, dev, rows_content(task.subset([*train, *dev]).rows))


def _take(task: Task, order: Sequence[int], sizes: Mapping[str, int]) -> tuple[int, ...]:
    """Return the first `sizes[name]` examples of each class."""
    taken: dict[str, list[int]] = {name: [] for name in sizes}
    for index in order:
        if all(len(indices) == sizes[name] for name, indices in taken.items()):
            break
        name = "" if "" in sizes else task[index].answer
        indices = taken[name]
        if len(indices) < sizes[name]:
            indices.append(index)
    for name, indices in taken.items():
        k = sizes[name]
        if len(indices) < k:
            count = sum(task[index].answer == name or not name for index in range(len(task)))
            raise ValueError(
                f"{k} shots are {k} examples{f' of the class {name!r}' if name else ''} to learn and {k} "
                f"with other images to choose on; the training split of {task.name} has {count}: choose a "
                "smaller k"
            )
    return tuple(sorted(index for indices in taken.values() for index in indices))


def read_shots(path: Path, task: Task) -> Shots:
    """Read a few-shot selection; ValueError if it is damaged or of another training split than `task`."""
    shots: Shots = check(read_object(path, Shots), Shots)
    places = [*shots.train, *shots.dev]
    if not shots.train or not shots.dev or len(set(places)) < len(places):
        raise ValueError(f"{path} is damaged: expected different examples to learn and to choose on")
    if not all(0 <= place < len(task) for place in places):
        raise ValueError(
            f"{path} is of another training split: expected places below {len(task):,}, found {max(places):,}"
        )
    if shots.content and shots.content != rows_content(task.subset(places).rows):
        raise ValueError(
            f"{path} is of another training split: the examples at its indices differ in {task.name}; use "
            "the data and split options of the run that drew them"
        )
    return shots
