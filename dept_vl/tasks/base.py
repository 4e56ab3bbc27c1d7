"""What a task gives: examples to read, and a score for the answers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Protocol, runtime_checkable

from dept_vl.tasks.io.predictions import ExampleId, PredictionFormat


@dataclass(frozen=True)
class Example:
    """One thing to answer.

    Attributes:
        example_id: As in the task's official files.
        source_text: What the encoder reads, task prefix included.
        images: None, one or two files.
        targets: Answers to learn, each with its score in (0, 1]; empty where none is published.
        in_turn: Learn every target once before any comes again (captions), rather than one drawn in
            proportion to its score.
        question: The bare question, to show.
        answer: The most usual human answer, to show; empty where none is published.
        answers: All human answers, each as often as it was given, to show.
        kinds: What it is one of, by kind of kind: `("answer type", "yes/no")`. Accuracies are shown for each.
    """

    example_id: ExampleId
    source_text: str
    images: tuple[Path, ...]
    targets: tuple[tuple[str, float], ...]
    in_turn: bool = False
    question: str = ""
    answer: str = ""
    answers: tuple[str, ...] = ()
    kinds: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Decoding:
    """How an answer is decoded.

    Attributes:
        max_new_tokens: Longest answer, in tokens.
        num_beams: Beams of the search; 1 is greedy.
        candidates: The only answers there are; empty generates freely.
    """

    max_new_tokens: int
    num_beams: int = 1
    candidates: tuple[str, ...] = ()


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
    def marked_by(self) -> str:
        """What `mark` gives, in words."""
        ...

    @property
    def decoding(self) -> Decoding:
        """How its answers are decoded by default."""
        ...

    @property
    def prediction_format(self) -> PredictionFormat:
        """The form of its server's files."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...

    def example_ids(self) -> Sequence[ExampleId]:
        """The ids of all examples."""
        ...

    def images(self, index: int) -> tuple[Path, ...]:
        """The image files of one example, without making the example."""
        ...

    def image_files(self) -> Sequence[Path]:
        """The different image files of all examples."""
        ...

    def subset(self, indices: Sequence[int]) -> "Task":
        """The same split with these examples alone, scored alone."""
        ...

    def written(self, answer: str) -> str:
        """A decoded answer as it goes into a submission."""
        ...

    def mark(self, example: Example, prediction: str) -> float:
        """How good one answer is, from 0 to 1, to an example whose answers are published; to show it."""
        ...

    def score(self, predictions: Mapping[ExampleId, str]) -> dict[str, float]:
        """Figures from one prediction for each example; the primary one first."""
        ...


@runtime_checkable
class Asked(Protocol):
    """A task without its files: enough to put questions of one's own to a model."""

    @property
    def name(self) -> str:
        """As in the table of tasks."""
        ...

    @property
    def image_count(self) -> int:
        """Images of an example."""
        ...

    @property
    def asks(self) -> bool:
        """Whether there is a question; captions have none."""
        ...

    @property
    def decoding(self) -> Decoding:
        """How its answers are decoded by default."""
        ...

    def source(self, question: str) -> str:
        """What the encoder reads of a question."""
        ...

    def written(self, answer: str) -> str:
        """A decoded answer as it is shown."""
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
