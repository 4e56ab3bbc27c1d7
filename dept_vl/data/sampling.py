"""Order of examples in training: the draws, and the batches of each process."""

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
"""Number of batches sorted by length together: enough to save padding, few enough to keep batches mixed."""


class TrainingDraws(Dataset[Draw]):
    """Endless streams of draws, one per task: draw n is example n mod len in epoch n div len.

    The target is drawn with probability proportional to its score (as in VL-T5). The drawing depends only on
    the seed and n, not on processes, workers or restarts. A target with score 0 gets weight 0. An `in_turn`
    example with k targets uses each of them once in k epochs.
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


@dataclass(eq=False)
class TrainingBatches(Sampler[list[tuple[int, int]]]):
    """This process's share of every batch, as (task, draw number), in an order fixed by the seed.

    Each batch has examples of one task. Tasks are drawn with probability proportional to their batches per
    epoch, so that all go through their epochs together. Each epoch is a permutation of the examples. Batches
    continue across its end, so that every global batch is full and independent of the number of processes.

    With `lengths`, texts of similar length are batched together: `WINDOW` batches at a time are sorted by
    length and shuffled. A window ends with the epoch, at the batch that contains its last example.
    """

    example_counts: Sequence[int]  # of each task
    batch_sizes: Sequence[int]  # per process, for each task
    _: KW_ONLY
    seed: int  # of the permutations and the order of tasks
    process: int = 0  # index of this process
    processes: int = 1  # number of processes
    lengths: Sequence[Lengths] | None = None  # of the texts of each task in tokens, to group them by
    start: int = 0  # number of batches to skip, to resume a run

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        numbers = [self._numbers(count) for count in self.example_counts]
        if self.lengths is not None:
            numbers = [
                self._grouped(stream, lengths, size * self.processes)
                for stream, lengths, size in zip(numbers, self.lengths, self.batch_sizes, strict=True)
            ]
        # Shares are of global batches, so that the order does not depend on the number of processes.
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
            # Four bytes per number: a list of GQA's 14 million would take half a GiB.
            order = array("I", range(example_count))
            Random(f"{self.seed} {epoch}").shuffle(order)
            yield from (epoch * example_count + index for index in order)
            epoch += 1

    def _grouped(self, numbers: Iterator[int], lengths: Lengths, batch_size: int) -> Iterator[int]:
        """Yield the same numbers, in batches of texts of similar length."""
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
