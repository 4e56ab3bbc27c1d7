"""What a finished run produced: `summary.json`, `summary.md`, and the same as an object."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dept_vl._utils.io import read_object
from dept_vl._utils.run_files import SUMMARY_FILE
from dept_vl._utils.tables import markdown_table
from dept_vl.config import RunConfig
from dept_vl.tasks.base import score_rows
from dept_vl.training.progress import Progress
from dept_vl.training.stages import Part

SUMMARY = {
    "scores": {str: float},
    "trainable_parameters": {str: int},
    "seconds": float,
    "train_seconds": float,
    "steps": int,
    "best_step": int,
    "skipped_examples": int,
    "unanswered_examples": int,
    "tokens_per_example": float,
    "reference_tokens_per_example": float,
}
"""Fields of `summary.json`, as `files.difference` has them."""


@dataclass(frozen=True)
class RunResult:
    """What a run produced.

    Attributes:
        output_dir: Folder of the run.
        scores: Scores on the test split, of several tasks each under its name; empty if the run was
            interrupted or no answers are published.
        trainable: Trained parameters, as `count_trainable` gives them.
        training: What the loop reports; None if nothing was trained, or not now.
        seconds: From start to end.
        tokens: Encoder tokens of a mean test example.
        reference_tokens: The same with a plain prompt of `reference_prompt_length` vectors.
    """

    output_dir: Path
    scores: dict[str, float]
    trainable: dict[str, int]
    training: Progress | None
    seconds: float
    tokens: float
    reference_tokens: float

    @property
    def exit_status(self) -> int:
        """Exit status of the program: 130 after Ctrl-C and 143 after SIGTERM, as shells have it."""
        stopped_by = self.training.stopped_by if self.training is not None else 0
        return 128 + stopped_by if stopped_by else 0


def summary(result: RunResult, unanswered: int) -> dict[str, Any]:
    """Return the content of `summary.json`.

    Args:
        result: Result of the run.
        unanswered: Test examples whose image could not be read.
    """
    training = result.training
    return {
        "scores": result.scores,
        "trainable_parameters": result.trainable,
        "seconds": round(result.seconds, 1),
        "train_seconds": round(training.train_seconds, 4) if training else 0.0,
        "steps": training.steps if training else 0,
        "best_step": training.best_step if training else 0,
        "skipped_examples": training.skipped if training else 0,
        "unanswered_examples": unanswered,
        "tokens_per_example": round(result.tokens, 2),
        "reference_tokens_per_example": round(result.reference_tokens, 2),
    }


def finished(output_dir: Path) -> RunResult:
    """Read the result of a finished run from its summary."""
    summary = read_object(output_dir / SUMMARY_FILE, SUMMARY)
    return RunResult(
        output_dir,
        summary["scores"],
        summary["trainable_parameters"],
        None,
        summary["seconds"],
        summary["tokens_per_example"],
        summary["reference_tokens_per_example"],
    )


def summary_table(config: RunConfig, parts: Sequence[Part], result: RunResult) -> str:
    """Scores, parameters, time and length, as a Markdown table."""
    trainable, training = result.trainable, result.training
    groups = {k: v for k, v in trainable.items() if k not in ("total", "without_projection")}
    splits = ", ".join(f"{part.task.name} {part.name}" for part in parts)
    rows: list[tuple[str, str]] = [
        *score_rows(result.scores, splits, [part.task for part in parts]),
        ("examples scored", f"{sum(len(part.task) for part in parts):,}"),
        ("trainable parameters", f"{trainable['total']:,}"),
        *[(f"  {name}", f"{count:,}") for name, count in groups.items()],
        ("  without the visual projection", f"{trainable['without_projection']:,}"),
        ("encoder tokens per example", f"{result.tokens:.1f}"),
        (
            f"  with a {config.prompt.reference_prompt_length}-vector prompt instead",
            f"{result.reference_tokens:.1f} ({1 - result.tokens / result.reference_tokens:.0%} saved)",
        ),
    ]
    if training is not None:
        rows += [
            (f"seconds of training ({training.steps} steps)", f"{training.train_seconds:.0f}"),
            ("seconds in all", f"{result.seconds:.0f}"),
        ]
    if training is not None and training.skipped:
        rows.append(("training examples skipped, image not readable", f"{training.skipped:,}"))
    return markdown_table(["", "this run"], rows)
