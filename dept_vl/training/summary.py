"""Results of a finished run: `summary.json`, its object, and the table of `summary.md`."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dept_vl._utils.io import read_object
from dept_vl._utils.run_files import SUMMARY_FILE
from dept_vl._utils.tables import markdown_table
from dept_vl.config import RunConfig
from dept_vl.tasks.base import score_rows
from dept_vl.training.progress import Progress
from dept_vl.training.stages import Part

DIGITS = {"seconds": 1, "train_seconds": 4, "tokens_per_example": 2, "reference_tokens_per_example": 2}
"""Decimal places of the figures in the file."""


@dataclass(frozen=True)
class Summary:
    """Fields of `summary.json`."""

    scores: dict[str, float]  # test scores, prefixed with the task's name if several; empty if unpublished
    trainable_parameters: dict[str, int]  # numbers of trainable parameters, from `count_trainable`
    seconds: float  # seconds of the whole run
    train_seconds: float  # seconds spent in training steps
    steps: int  # number of optimizer steps; 0 if nothing was trained
    best_step: int  # step of the best evaluation on the dev split
    skipped_examples: int  # training examples skipped because their image could not be read
    unanswered_examples: int  # test examples whose image could not be read
    tokens_per_example: float  # mean number of encoder tokens of a test example
    reference_tokens_per_example: float  # the same with a plain prompt of `reference_prompt_length` vectors

    def content(self) -> dict[str, Any]:
        """Return the content of `summary.json`."""
        return asdict(self) | {name: round(getattr(self, name), digits) for name, digits in DIGITS.items()}


@dataclass(frozen=True)
class RunResult:
    """Result of a run."""

    output_dir: Path
    scores: dict[str, float]  # on the test split, as in `Summary`; also empty if the run was interrupted
    trainable: dict[str, int]  # numbers of trainable parameters, from `count_trainable`
    training: Progress | None = None  # None if nothing was trained, or the run was finished before

    @property
    def exit_status(self) -> int:
        """Exit status for the program: 130 after Ctrl-C, 143 after SIGTERM (as in shells), else 0."""
        stopped_by = self.training.stopped_by if self.training is not None else 0
        return 128 + stopped_by if stopped_by else 0


def finished(output_dir: Path) -> RunResult:
    """Read the result of a finished run from its summary."""
    summary = read_object(output_dir / SUMMARY_FILE, Summary)
    return RunResult(output_dir, summary["scores"], summary["trainable_parameters"])


def summary_table(config: RunConfig, parts: Sequence[Part], summary: Summary) -> str:
    """Return scores, parameters, time and input length as a Markdown table."""
    trainable = summary.trainable_parameters
    tokens, reference = summary.tokens_per_example, summary.reference_tokens_per_example
    groups = {k: v for k, v in trainable.items() if k not in ("total", "without_projection")}
    splits = ", ".join(f"{part.task.name} {part.name}" for part in parts)
    rows: list[tuple[str, str]] = [
        *score_rows(summary.scores, splits, [part.task for part in parts]),
        ("examples scored", f"{sum(len(part.task) for part in parts):,}"),
        ("trainable parameters", f"{trainable['total']:,}"),
        *[(f"  {name}", f"{count:,}") for name, count in groups.items()],
        ("  without the visual projection", f"{trainable['without_projection']:,}"),
        ("encoder tokens per example", f"{tokens:.1f}"),
        (
            f"  with a {config.prompt.reference_prompt_length}-vector prompt instead",
            f"{reference:.1f} ({1 - tokens / reference:.0%} saved)",
        ),
    ]
    if summary.steps:
        rows += [
            (f"seconds of training ({summary.steps} steps)", f"{summary.train_seconds:.0f}"),
            ("seconds in all", f"{summary.seconds:.0f}"),
        ]
    if summary.skipped_examples:
        rows.append(("training examples skipped, image not readable", f"{summary.skipped_examples:,}"))
    return markdown_table(["", "this run"], rows)
