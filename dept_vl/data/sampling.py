"""Which example comes when: the draws of training and evaluation, and the batches of every process."""

import itertools
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import KW_ONLY, dataclass
from random import Random

from torch.utils.data import Dataset, Sampler

from dept_vl.data.collate import Draw
from dept_vl.data.lengths import Lengths
from dept_vl.tasks.base import Task

WINDOW = 50
"""Batches that are sorted by length together: enough for few to be padded much, few enough to stay mixed."""


class TrainingDraws(Dataset[Draw]):
    """The endless streams of draws, one a task: number n is example n mod len in epoch n div len.

    The answer is chosen with probability proportional to its score (VL-T5), from the seed and n
    alone, so it depends on no process, worker or restart; one whose score is 0 weighs
    nothing. Of targets that are learnt in turn, as many epochs as there are targets show each once.
    """

    def __init__(self, tasks: Sequence[Task], seed: int) -> None:
        self.tasks, self.seed = tasks, seed

    def __getitem__(self, key: tuple[int, int]) -> Draw:
        place, number = key
        task = self.tasks[place]
        epoch, index = divmod(number, len(task))
        example = task[index]
        texts, scores = zip(*example.targets, strict=True)
        if example.in_turn:
            order = Random(f"{self.seed} {index}").sample(range(len(texts)), len(texts))
            choice = order[epoch % len(texts)]
        elif any(scores):
            choice = Random(f"{self.seed} {number}").choices(range(len(texts)), scores)[0]
        else:
            choice = 0
        return Draw(example, texts[choice], scores[choice])


class EvaluationDraws(Dataset[Draw]):
    """Every example once, without a target."""

    def __init__(self, task: Task) -> None:
        self.task = task

    def __len__(self) -> int:
        return len(self.task)

    def __getitem__(self, index: int) -> Draw:
        return Draw(self.task[index])


@dataclass(eq=False)
class TrainingBatches(Sampler[list[tuple[int, int]]]):
    """This process's share of every batch: (task, draw number), in an order fixed by the seed.

    A batch is of one task, drawn with probability proportional to the number of batches in its epoch,
    so that all tasks go through their epochs together. Each epoch is one permutation of the examples
    and batches run across its end, so every global batch is full and the same whatever the number of
    processes.

    With lengths, texts of about the same length come together: the next `WINDOW` batches are sorted by
    length and put into a random order. They end where the epoch does, with the batch that runs across.

    Attributes:
        example_counts: Examples in an epoch of each task.
        batch_sizes: Of one process, for each task.
        seed: Of the permutations and of the order of the tasks.
        process: Which of `processes` this is.
        processes: How many there are.
        lengths: Of the texts of each task, in tokens, as they are cut; None leaves them mixed.
        start: Batches to skip, of a run that resumes.
    """

    example_counts: Sequence[int]
    batch_sizes: Sequence[int]
    _: KW_ONLY
    seed: int
    process: int = 0
    processes: int = 1
    lengths: Sequence[Lengths] | None = None
    start: int = 0

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        numbers = [self._numbers(count) for count in self.example_counts]
        if self.lengths is not None:
            numbers = [
                self._grouped(stream, lengths, size * self.processes)
                for stream, lengths, size in zip(numbers, self.lengths, self.batch_sizes, strict=True)
            ]
        # Whole batches, so that no rounding makes the order depend on the number of processes.
        pairs = zip(self.example_counts, self.batch_sizes, strict=True)
        shares = [count / (size * self.processes) for count, size in pairs]
        choices = Random(f"{self.seed} tasks")
        for place in itertools.count():
            task = choices.choices(range(len(shares)), shares)[0]
            size = self.batch_sizes[task]
            whole = [(task, next(numbers[task])) for _ in range(size * self.processes)]
            if place >= self.start:
                yield whole[self.process * size : (self.process + 1) * size]

    def _numbers(self, example_count: int) -> Iterator[int]:
        epoch = 0
        while True:
            # Four bytes a number: a list of GQA's 14 million would take half a GiB.
            order = array("I", range(example_count))
            Random(f"{self.seed} {epoch}").shuffle(order)
            yield from (epoch * example_count + index for index in order)
            epoch += 1

    def _grouped(self, numbers: Iterator[int], lengths: Lengths, batch_size: int) -> Iterator[int]:
        """Yield the same numbers, in batches of texts of about the same length."""
        count, drawn = len(lengths), 0
        while True:
            left_in_epoch = count - drawn % count
            size = batch_size * min(WINDOW, -(-left_in_epoch // batch_size))
            window = sorted(itertools.islice(numbers, size), key=lambda number: int(lengths[number % count]))
            starts = list(range(0, size, batch_size))
            Random(f"{self.seed} {drawn} batches").shuffle(starts)
            for start in starts:
                yield from window[start : start + batch_size]
            drawn += size
