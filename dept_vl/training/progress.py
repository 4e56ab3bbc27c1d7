"""Progress of a run and its display: one line, redrawn on a terminal, or printed now and then elsewhere."""

import math
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from tqdm import tqdm

from dept_vl._utils.printable import say
from dept_vl._utils.terminal import PLAIN_SECONDS, Count, duration, is_live

USUAL_COLUMNS = 100
"""Width to assume where it is not known, for example in a notebook."""
BAR = 6
"""Minimum width of the bar, in columns; a narrower bar is left out."""


@dataclass
class Progress:
    """Progress of a training run. Only `loop` updates it."""

    steps: int = 0  # number of optimizer steps done
    best_step: int = 0  # step of the best evaluation on the dev splits; 0 before the first evaluation
    best_scores: dict[str, float] = field(default_factory=dict)  # scores of the best evaluation
    scores: dict[str, float] = field(default_factory=dict)  # scores of the last evaluation
    history: list[tuple[int, float]] = field(default_factory=list)  # step and score of each evaluation
    evaluations_without_progress: int = 0  # number of evaluations since the best one
    examples: int = 0  # number of examples trained on, over all processes
    skipped: int = 0  # number of examples skipped because their image could not be read, counted each time
    train_seconds: float = 0.0  # seconds spent in training steps
    eval_seconds: float = 0.0  # seconds spent in evaluations
    stopped_by: int = 0  # number of the signal that ended the run early; 0 if none did

    @property
    def best_score(self) -> float:
        """Deciding score of the best evaluation; minus infinity before the first."""
        return max((score for _, score in self.history), default=-math.inf)


@dataclass(frozen=True)
class Figures:
    """Figures of a training step that are logged and shown."""

    loss: float  # mean loss over the step's batches and all processes
    rates: Mapping[str, float]  # learning rate by parameter group
    samples_per_second: float  # since the last record, over all processes
    tokens_per_second: float  # the same of encoder tokens: prompt, text and visual, without padding
    memory: float  # memory of the main process in GiB, see `memory_gib`
    seconds_left: float  # estimated seconds to the last step, including evaluations

    def record(self) -> dict[str, float]:
        """Return the figures under their names in the log and in trackers."""
        return {
            "loss": self.loss,
            **{f"lr/{group}": rate for group, rate in self.rates.items()},
            "samples_per_second": round(self.samples_per_second, 1),
            "tokens_per_second": round(self.tokens_per_second, 1),
            "memory_gib": round(self.memory, 3),
            "seconds_left": round(self.seconds_left, 1),
        }

    def plain(self) -> str:
        """Return the figures as one line of text."""
        rates = " ".join(f"{group} {rate:.3g}" for group, rate in self.rates.items())
        return (
            f"loss {self.loss:.3f}, lr {rates}, {short(self.samples_per_second)} samples/s, "
            f"{short(self.tokens_per_second)} tokens/s, {self.memory:.1f} GiB, "
            f"{duration(self.seconds_left)} left"
        )

    def brief(self) -> list[str]:
        """Return the figures as short texts, the most important first."""
        return [
            f"loss {self.loss:.3f}",
            f"{duration(self.seconds_left)} left",
            "lr " + "/".join(map(_rate, self.rates.values())),
            f"{short(self.samples_per_second)} ex/s",
            f"{short(self.tokens_per_second)} tok/s",
            f"{self.memory:.1f}G",
        ]


class ProgressLine:
    """Displays the progress: as one line on a terminal or in a notebook, else as lines now and then."""

    def __init__(self, total: int, done: int, *, show: bool) -> None:
        self.total, self.show, self.told_at = total, show, -PLAIN_SECONDS
        # Shown while a step takes long, or none is logged.
        self.count = Count("training", total, done=done, show=show and not is_live()).__enter__()
        self.pieces: list[str] = []
        self.bar = tqdm(total=total, initial=done, disable=not (show and is_live()), bar_format="{desc}")
        self._draw(done)

    def advance(self, step: int) -> None:
        """Advance to a step."""
        self.count.done = step
        if not self.bar.disable:
            self._draw(step)
            self.bar.update(step - self.bar.n)

    def tell(self, step: int, figures: Figures) -> None:
        """Show the figures of a step."""
        if not self.bar.disable:
            self.pieces = figures.brief()
            self._draw(step)
            self.bar.refresh()
        elif self.show and (step == self.total or time.monotonic() - self.told_at >= PLAIN_SECONDS):
            self.told_at = Count.told_at = time.monotonic()
            say(f"step {step}/{self.total}: {figures.plain()}")

    def close(self) -> None:
        """Close the progress line and leave it as it is."""
        self.count.__exit__()
        self.bar.close()

    def _draw(self, step: int) -> None:
        # The last column stays free, or some terminals begin a new line.
        columns = _columns() - 1
        line = fitted([f"{step}/{self.total}", *self.pieces], columns)
        room = columns - len(line) - 1
        self.bar.ncols = columns
        # Not part of the format, which would interpret braces.
        self.bar.desc = line
        self.bar.bar_format = "{desc} {bar}" if room >= BAR else "{desc}"


def fitted(pieces: Sequence[str], columns: int) -> str:
    """Join the first pieces with spaces, as many as fit into the columns."""
    line = pieces[0]
    for piece in pieces[1:]:
        if len(line) + 1 + len(piece) > columns:
            break
        line += " " + piece
    return line


def short(number: float) -> str:
    """Format a number with at least two digits: 0.52, 5.2, 52, 520, 5.2k, 52k, 5.2M."""
    for unit, size in (("M", 1e6), ("k", 1e3)):
        if number >= 0.9995 * size:
            scaled = number / size
            return f"{scaled:.1f}{unit}" if scaled < 9.95 else f"{scaled:.0f}{unit}"
    return f"{number:.2f}" if number < 0.995 else f"{number:.1f}" if number < 9.95 else f"{number:.0f}"


def _rate(rate: float) -> str:
    """Format a learning rate with two digits: 0.29, 9.6e-4."""
    return f"{rate:.2g}" if rate == 0 or rate >= 0.01 else f"{rate:.1e}".replace("e-0", "e-")


def _columns() -> int:
    try:
        # 0 where a terminal does not say.
        return os.get_terminal_size(sys.stderr.fileno()).columns or USUAL_COLUMNS
    except (OSError, ValueError):
        return USUAL_COLUMNS
