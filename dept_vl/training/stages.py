"""Stages `score` and `write`, shared by a training run and the evaluation of a finished run."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from accelerate import Accelerator

from dept_vl._utils.io import write_noted, writing
from dept_vl._utils.printable import say
from dept_vl._utils.processes import on_main
from dept_vl.data.collate import Collator
from dept_vl.data.pictures import picture_grid
from dept_vl.inference.evaluate import Evaluation, Generate, evaluate
from dept_vl.models.prompted import PromptedModel
from dept_vl.tasks.base import Decoding, Task
from dept_vl.training.report.html import Answered, or_warn


@dataclass(frozen=True)
class Part:
    """Split to score. `suffix` ends the names of its files, if a run has several tasks."""

    task: Task
    name: str
    decoding: Decoding
    suffix: str = ""


class Stages(ABC):
    """Base class of a run in stages. A subclass prepares the model, the collator and the splits to score."""

    model: PromptedModel  # not wrapped
    collator: Collator  # of evaluation batches
    parts: list[Part]  # splits to score
    generate: Generate | None = None  # predicts a batch; None uses the model's own

    def __init__(
        self, accelerator: Accelerator, output_dir: Path, *, batch_size: int, num_workers: int
    ) -> None:
        self.accelerator, self.output_dir = accelerator, output_dir
        self.batch_size, self.num_workers = batch_size, num_workers
        self.evaluations: list[Evaluation] = []  # of each split, set by `score`
        self.predictions: list[Path] = []  # files, set by `write`

    def score(self) -> None:
        """Predict and score every split."""
        self.evaluations = [
            evaluate(
                self.model,
                part.task,
                self.collator,
                self.accelerator,
                batch_size=self.batch_size,
                decoding=part.decoding,
                num_workers=self.num_workers,
                generate=self.generate,
            )
            for part in self.parts
        ]

    def write(self) -> None:
        """Write predictions, pictures, scores and the report on the main process."""
        on_main(self.accelerator, self._write)

    def _write(self) -> None:
        self.output_dir.mkdir(parents=True, exist_ok=True)
        self.predictions = [
            write_answers(part.task, evaluation, self.output_dir, part.suffix)
            for part, evaluation in zip(self.parts, self.evaluations, strict=True)
        ]
        self.write_scores()
        answered = [
            Answered(part.task, part.name, evaluation.predictions, evaluation.scores)
            for part, evaluation in zip(self.parts, self.evaluations, strict=True)
        ]
        or_warn(lambda: self.write_report(answered))

    @abstractmethod
    def write_scores(self) -> None:
        """Write and print the scores."""

    @abstractmethod
    def write_report(self, answered: Sequence[Answered]) -> Path:
        """Write the report and return its path."""


def write_answers(task: Task, evaluation: Evaluation, folder: Path, suffix: str = "") -> Path:
    """Write the predictions in the format of the task's server, and a picture; return the former's path.

    Warn about skipped examples.
    """
    path = folder / f"predictions{suffix}{task.prediction_format.suffix}"
    write_noted(folder, {path.name: task.prediction_format.content(evaluation.predictions)})
    if evaluation.skipped:
        say(
            f"warning: {len(evaluation.skipped):,} of {len(task):,} examples of {task.name} have no "
            "readable image and got an empty answer, which counts as wrong "
            f"(first ids: {list(evaluation.skipped[:3])})"
        )
    elif task[0].images:
        picture = folder / f"answers{suffix}.png"
        with writing(picture):
            picture_grid(task, evaluation.predictions, picture)
    return path
