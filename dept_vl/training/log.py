"""Log of a run: records in `log.jsonl` and in the trackers, and messages on the terminal."""

import json
import math
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import torch
from accelerate import Accelerator
from torch import Tensor

from dept_vl._utils.errors import DamagedFileError, NotFiniteError
from dept_vl._utils.io import check_noted, note, noted, one_line, parse_json, write_noted, writing
from dept_vl._utils.printable import say
from dept_vl.data.collate import Batch
from dept_vl.data.feature_source import GIB
from dept_vl.tasks.io.predictions import ExampleId
from dept_vl.training.progress import Figures, Progress, ProgressLine

SPIKE, SPIKE_WINDOW = 5.0, 20
"""A warning is printed if a loss is above SPIKE times the median of the last SPIKE_WINDOW logged losses."""


class Log:
    """Log of a training run. Each record is a line of JSON, and is passed to the trackers and the terminal.

    Losses are read only when they are logged, since reading waits for the device. A loss that is not finite
    is found then, and the error names its step and batch.

    On resuming, lines of steps after `progress.steps` are removed. Only the main process writes.
    """

    def __init__(
        self, accelerator: Accelerator, path: Path, progress: Progress, max_steps: int, eval_every: int
    ) -> None:
        self.accelerator, self.path, self.progress = accelerator, path, progress
        self.max_steps, self.evaluations = max_steps, math.ceil(max_steps / eval_every)
        self.pending: list[tuple[int, tuple[ExampleId, ...], Tensor]] = []
        self.examples = self.tokens = self.skipped = 0
        # Examples and tokens of all processes since the last record.
        self.learnt = self.read = 0
        self.told_at = progress.train_seconds
        self.usual: deque[float] = deque(maxlen=SPIKE_WINDOW)
        if accelerator.is_main_process:
            _cut_log(path, progress.steps)
        self.line = ProgressLine(max_steps, progress.steps, show=accelerator.is_main_process)

    def note(self, batch: Batch, tokens: int, loss: Tensor) -> None:
        """Add a batch to the counts and keep its loss until `look` is called."""
        self.pending.append((self.progress.steps + 1, batch.ids, loss.detach()))
        self.examples += len(batch.ids)
        self.tokens += tokens
        self.skipped += len(batch.skipped)

    def look(self, loss: Tensor) -> tuple[float, int, int]:
        """Check all losses since the last call; NotFiniteError if one is not finite.

        Return the mean loss of the last step and, since the last call, the numbers of examples trained on and
        of those skipped because their image could not be read, all of them over all processes.
        """
        self._check_finite()
        # Whole numbers and single precision: Apple's MPS has no float64. Python adds the losses in double.
        counts = torch.tensor([[self.examples, self.tokens, self.skipped]], device=loss.device)
        examples, tokens, skipped = self.accelerator.gather(counts).sum(0).tolist()
        mean_loss = sum(self.accelerator.gather(loss[None]).tolist()) / self.accelerator.num_processes
        self.learnt += examples
        self.read += tokens
        self.examples = self.tokens = self.skipped = 0
        return mean_loss, examples, skipped

    def loss(self, mean_loss: float, rates: Mapping[str, float]) -> None:
        """Write the loss of a step and the learning rate of each parameter group."""
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
        """Print the scores of an evaluation, and log them if `keep`.

        Extra evaluations are not logged, so that the log equals that of an uninterrupted run.
        """
        if keep:
            self._write({"score": score, **{f"dev/{key}": value for key, value in scores.items()}})
        say(f"step {self.progress.steps}: dev {name} {score:.2f}")

    def close(self) -> None:
        """Close the progress line, and note the size and checksum of the log."""
        self.line.close()
        if self.accelerator.is_main_process and self.path.is_file():
            note(self.path.parent, {self.path.name: noted(self.path)})

    def _seconds_left(self) -> float:
        """Return the seconds to the end of the run, at the mean pace of steps and evaluations so far."""
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
                raise NotFiniteError(
                    f"the loss is {loss} at step {step} (a batch with the ids {list(ids[:5])}, ...); lower "
                    "the learning rates or train in full precision, in a new run. Checkpoints and the best "
                    f"adapter in {folder} are of steps before"
                )

    def _remark_spike(self, mean_loss: float) -> None:
        usual = median(self.usual) if len(self.usual) == SPIKE_WINDOW else math.inf
        if mean_loss > SPIKE * usual:
            say(
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


def read_log(path: Path) -> list[dict[str, Any]]:
    """Return the records of a log, up to the size noted for it; DamagedFileError if it is damaged.

    A log of an older version is read to its end.
    """
    size = check_noted(path, grows=True)
    content = path.read_bytes()
    # Lines after the last checkpoint are not used, and the last line may be incomplete.
    lines = (content if size < 0 else content[:size]).splitlines(keepends=True)
    try:
        records = [parse_json(line.decode()) for line in lines if line.endswith(b"\n")]
        if not all(isinstance(record["step"], int) for record in records):
            raise ValueError("a step is not a whole number")
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise DamagedFileError(
            f"{path} is damaged: expected a JSON object with a step on each line ({one_line(error)}); "
            "move it away to continue without it"
        ) from None
    return records


def memory_gib(device: torch.device) -> float:
    """Return the peak memory of tensors on a GPU, else the current memory of the process, in GiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIB
    return float(psutil.Process().memory_info().rss) / GIB


def _cut_log(path: Path, steps: int) -> None:
    """Remove the lines of a log after a step, which will be written again."""
    if not path.is_file():
        if steps:
            say(f"warning: {path} is gone; the new one begins behind step {steps:,}")
        return
    kept = [json.dumps(record) + "\n" for record in read_log(path) if record["step"] <= steps]
    write_noted(path.parent, {path.name: "".join(kept).encode()})
