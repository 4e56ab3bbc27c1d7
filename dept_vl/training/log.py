"""What a run writes down as it trains: lines of JSON, the same to its trackers, and what a person sees."""

import json
import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import torch
from accelerate import Accelerator
from torch import Tensor

from dept_vl._utils.errors import DamagedFileError
from dept_vl._utils.io import check_noted, note, noted, one_line, parse_json, write_noted, writing
from dept_vl._utils.printable import say
from dept_vl._utils.run_files import LOG_FILE
from dept_vl.data.collate import Batch
from dept_vl.tasks.io.predictions import ExampleId
from dept_vl.training.progress import Figures, Progress, ProgressLine

GIB = 2**30
SPIKE, SPIKE_WINDOW = 5.0, 20
"""A loss is remarked on above so many times the median of so many logged before it."""


@dataclass(frozen=True)
class Counted:
    """What was learnt since the last look, over all processes.

    Attributes:
        loss: Mean loss of the last step.
        examples: Examples learnt.
        skipped: Examples left out because their image could not be read.
    """

    loss: float
    examples: int
    skipped: int


class Log:
    """A line of JSON for every record, the same to the run's trackers, and what a person sees.

    Losses are looked at only when they are logged, since each look waits for the device; a loss that
    is not finite is found then, with the step and the batch that it came from.

    Lines of steps after `progress` are cut off: they come again. Only the main process writes.
    """

    def __init__(
        self, accelerator: Accelerator, path: Path, progress: Progress, max_steps: int, eval_every: int
    ) -> None:
        self.accelerator, self.path, self.progress = accelerator, path, progress
        self.max_steps, self.evaluations = max_steps, math.ceil(max_steps / eval_every)
        self.pending: list[tuple[int, tuple[ExampleId, ...], Tensor]] = []
        self.examples = self.tokens = self.skipped = 0
        # Of all processes, since the last figures.
        self.learnt = self.read = 0
        self.told_at = progress.train_seconds
        self.usual: deque[float] = deque(maxlen=SPIKE_WINDOW)
        if accelerator.is_main_process:
            _cut_log(path, progress.steps)
        self.line = ProgressLine(max_steps, progress.steps, show=accelerator.is_main_process)

    def note(self, batch: Batch, tokens: int, loss: Tensor) -> None:
        """Remember a batch until the next look."""
        self.pending.append((self.progress.steps + 1, batch.ids, loss.detach()))
        self.examples += len(batch.ids)
        self.tokens += tokens
        self.skipped += len(batch.skipped)

    def look(self, loss: Tensor) -> Counted:
        """Check all losses since the last look and count what was learnt since then.

        Raises:
            ValueError: If a loss is not finite.
        """
        self._check_finite()
        # Whole numbers and single precision: Apple's MPS has no float64. Python adds the losses in double.
        counts = torch.tensor([[self.examples, self.tokens, self.skipped]], device=loss.device)
        examples, tokens, skipped = self.accelerator.gather(counts).sum(0).tolist()
        mean_loss = sum(self.accelerator.gather(loss[None]).tolist()) / self.accelerator.num_processes
        self.learnt += examples
        self.read += tokens
        self.examples = self.tokens = self.skipped = 0
        return Counted(mean_loss, examples, skipped)

    def loss(self, mean_loss: float, rates: Mapping[str, float]) -> None:
        """Write the loss of a step and its learning rates, by parameter group."""
        progress = self.progress
        seconds = max(progress.train_seconds - self.told_at, 1e-9)
        figures = Figures(
            mean_loss,
            rates,
            self.learnt / seconds,
            self.read / seconds,
            memory_gib(self.accelerator.device),
            self._seconds_left(),
        )
        self.told_at, self.learnt, self.read = progress.train_seconds, 0, 0
        skipped = {"skipped_examples": float(progress.skipped)} if progress.skipped else {}
        self._write(figures.record() | skipped)
        self.line.tell(progress.steps, figures)
        self._remark_spike(mean_loss)

    def scores(self, name: str, score: float, scores: Mapping[str, float], *, keep: bool = True) -> None:
        """Print the scores of an evaluation, and log them if they are kept.

        A resumed run keeps the lines up to its checkpoint: what an undisturbed run has not must not be there.
        """
        if keep:
            self._write({"score": score, **{f"dev/{key}": value for key, value in scores.items()}})
        self.line.say(f"step {self.progress.steps}: dev {name} {score:.2f}")

    def advance(self) -> None:
        """Advance by a step."""
        self.line.advance(self.progress.steps)

    def close(self) -> None:
        """End the line, and note what was written."""
        self.line.close()
        if self.accelerator.is_main_process and self.path.is_file():
            note(self.path.parent, {self.path.name: noted(self.path)})

    def _seconds_left(self) -> float:
        """At the mean pace of steps and evaluations so far."""
        progress = self.progress
        steps = progress.train_seconds / progress.steps * (self.max_steps - progress.steps)
        done = len(progress.history)
        evaluations = progress.eval_seconds / done * max(0, self.evaluations - done) if done else 0.0
        return steps + evaluations

    def _check_finite(self) -> None:
        losses = torch.stack([loss for _, _, loss in self.pending]).tolist()
        pending, self.pending = self.pending, []
        for (step, ids, _), loss in zip(pending, losses, strict=True):
            if not math.isfinite(loss):
                folder = self.path.parent
                raise ValueError(
                    f"the loss is {loss} at step {step} (a batch with the ids {list(ids[:5])}, ...); lower "
                    "the learning rates or train in full precision, in a new run. Checkpoints and the best "
                    f"adapter in {folder} are of steps before"
                )

    def _remark_spike(self, mean_loss: float) -> None:
        usual = median(self.usual) if len(self.usual) == SPIKE_WINDOW else math.inf
        if mean_loss > SPIKE * usual:
            self.line.say(
                f"warning: the loss is {mean_loss:.3f} at step {self.progress.steps}; {usual:.3f} is usual. "
                "If it stays there, lower the learning rates in a new run"
            )
        self.usual.append(mean_loss)

    def _write(self, record: Mapping[str, float]) -> None:
        step = self.progress.steps
        if self.accelerator.is_main_process:
            with writing(self.path), self.path.open("a") as file:
                file.write(json.dumps({"step": step, **record}) + "\n")
        self.accelerator.log(dict(record), step=step)


def best_dev(run: Path, steps: int | None = None) -> float:
    """Return the best dev score of a run, of several tasks the mean.

    Only evaluations up to `steps` count, if given.
    """
    return max(
        float(record["score"])
        for record in read_log(run / LOG_FILE)
        if "score" in record and (steps is None or record["step"] <= steps)
    )


def read_log(path: Path) -> list[dict[str, Any]]:
    """Read the lines of a log that are noted, of an older version all.

    Raises:
        FileNotFoundError: If there is none.
        DamagedFileError: If it is damaged.
    """
    size = check_noted(path, grows=True)
    content = path.read_bytes()
    # What was written after the last checkpoint is of no use without it, and the last line may be cut.
    lines = (content if size < 0 else content[:size]).splitlines(keepends=True)
    try:
        records = [parse_json(line.decode()) for line in lines if line.endswith(b"\n")]
        if not all(isinstance(record["step"], int) for record in records):
            raise ValueError("a step is no whole number")
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise DamagedFileError(
            f"{path} is damaged: expected a JSON object with a step on each line ({one_line(error)}); "
            "move it away to continue without it"
        ) from None
    return records


def memory_gib(device: torch.device) -> float:
    """Memory, in GiB: of a GPU the most that tensors took so far, else what the process holds now."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIB
    return float(psutil.Process().memory_info().rss) / GIB


def _cut_log(path: Path, steps: int) -> None:
    """Leave the lines of a log up to a step; those behind it will come again."""
    if not path.is_file():
        if steps:
            say(f"warning: {path} is gone; the new one begins behind step {steps:,}")
        return
    kept = [json.dumps(record) + "\n" for record in read_log(path) if record["step"] <= steps]
    write_noted(path.parent, {path.name: "".join(kept).encode()})
