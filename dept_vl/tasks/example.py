"""What a task gives: examples to read, and a score for the answers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Protocol, runtime_checkable

ExampleId = int | str


@dataclass(frozen=True)
class Example:
    """One thing to answer.

    Attributes:
        example_id: As in the task's official files.
        source_text: What the encoder reads, task prefix included.
        images: None, one or two files.
        targets: Answers to learn, each with its score in (0, 1]; empty where none is published.
        question: The bare question, to show.
        answer: The most usual human answer, to show; empty where none is published.
    """

    example_id: ExampleId
    source_text: str
    images: tuple[Path, ...]
    targets: tuple[tuple[str, float], ...]
    question: str = ""
    answer: str = ""


@runtime_checkable  # the tests check types as they run
class Task(Protocol):
    """One split of a task."""

    @property
    def name(self) -> str:
        """As in the table of tasks."""
        ...

    @property
    def primary(self) -> str:
        """The figure by which adapters are compared; higher is better."""
        ...

    @property
    def max_new_tokens(self) -> int:
        """Longest answer to decode."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...

    def images(self, index: int) -> tuple[Path, ...]:
        """The image files of one example, without making the example."""
        ...

    def subset(self, indices: Sequence[int]) -> "Task":
        """The same split with these examples alone, scored alone."""
        ...

    def written(self, answer: str) -> str:
        """A decoded answer as it goes into a submission."""
        ...

    def score(self, predictions: Mapping[ExampleId, str]) -> dict[str, float]:
        """Figures from one prediction for each example; the primary one first."""
        ...


def hold_out_images(task: Task, count: int, seed: int) -> tuple[Task, Task]:
    """Split a task in two by image, so that no image is on both sides: (the rest, held out).

    Raises:
        ValueError: If that would leave nothing to train on.
    """
    images = [task.images(index) for index in range(len(task))]
    distinct = sorted(set(images))
    if not 0 < count < len(distinct):
        raise ValueError(
            f"cannot hold out {count} of the {len(distinct)} images of {task.name}; "
            f"choose holdout_images between 1 and {len(distinct) - 1}, or name a dev_split"
        )
    held_out = set(Random(seed).sample(distinct, count))
    sides: tuple[list[int], list[int]] = ([], [])
    for index, key in enumerate(images):
        sides[key in held_out].append(index)
    return task.subset(sides[0]), task.subset(sides[1])


def limit(task: Task, count: int, seed: int) -> Task:
    """At most `count` examples, drawn at random and kept in order; 0 keeps all."""
    if count == 0 or count >= len(task):
        return task
    return task.subset(sorted(Random(seed).sample(range(len(task)), count)))


def check_predictions(expected: Sequence[ExampleId], predictions: Mapping[ExampleId, str]) -> None:
    """Every example answered and nothing else.

    Raises:
        ValueError: Naming how many ids are missing and extra, and the first of each.
    """
    missing = [example_id for example_id in expected if example_id not in predictions]
    extra = sorted(map(str, predictions.keys() - set(expected)))
    if missing or extra:
        raise ValueError(
            f"expected one prediction for each of {len(expected)} questions; "
            f"{len(missing)} missing (first: {missing[:3]}), {len(extra)} extra (first: {extra[:3]})"
        )
