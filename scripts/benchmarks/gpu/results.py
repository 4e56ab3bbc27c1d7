"""Results of a part, saved after every entry, and timing."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from filelock import FileLock

from benchmarks.measure import in_turn
from dept_vl._utils.io import one_line, read_json, write_json
from dept_vl._utils.printable import say

RESULTS_FILE = "gpu_check.json"
TOKENIZER = Path("data", "tiny-clip-t5", "language")
"""Path of the tokenizer in the project."""
Entry = dict[str, Any]


@contextmanager
def updating(path: Path) -> Iterator[dict[str, Any]]:
    """Read a file of results and write it back after the block, locked against other processes."""
    with FileLock(path.with_suffix(".lock")):
        content: dict[str, Any] = read_json(path) if path.is_file() else {}
        yield content
        write_json(path, content)


@dataclass
class Measuring:
    """Measurement of one part.

    Attributes:
        path: File with the results of all parts.
        part: Name of this part.
        seconds: Time limit. Entries that would start later are left out.
        device: Device to measure on.
        small: Whether sizes are the smallest, so that the figures mean nothing.
    """

    path: Path
    part: str
    seconds: float
    device: torch.device
    small: bool
    started: float = field(default_factory=time.monotonic)

    def entry(self, name: str, measure: Callable[..., Entry], *arguments: Any) -> None:
        """Store the result of `measure` or its error, unless it is stored already or the time is up."""
        content = read_json(self.path) if self.path.is_file() else {}
        before = content.get(self.part, {}).get("entries", {}).get(name, {})
        if before and "error" not in before:
            return
        if time.monotonic() - self.started > self.seconds:
            say(f"{self.part}: no time for {name}")
            return
        try:
            measured = measure(*arguments)
        except Exception as error:  # the other entries are measured in any case
            measured = {"error": f"{type(error).__name__}: {one_line(error)}"}
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        say(f"{self.part}: {name}: {measured}")
        with updating(self.path) as content:
            content.setdefault(self.part, {}).setdefault("entries", {})[name] = measured

    def in_rounds(self, steps: Mapping[str, Callable[[], object]]) -> dict[str, list[float]]:
        """Return the seconds of several steps by name, each once per round, starting with a different one."""
        for step in steps.values():
            for _ in range(1 if self.small else 3):
                step()
        seconds: dict[str, list[float]] = {name: [] for name in steps}
        for names in in_turn(list(steps), 2 if self.small else 15):
            for name in names:
                seconds[name].append(self._timed(steps[name], 1))
        return seconds

    def milliseconds(self, step: Callable[[], object]) -> Entry:
        """Time a step in rounds of several and synchronise after each; return the median and the range."""
        for _ in range(1 if self.small else 3):
            step()
        once = self._timed(step, 1)
        count = 1 if self.small else max(1, min(20, round(0.25 / once)))
        rounds = [1000 * self._timed(step, count) for _ in range(1 if self.small else 5)]
        return {"ms": median(rounds), "low": min(rounds), "high": max(rounds), "steps": count}

    def peak_mib(self, step: Callable[[], object]) -> float | None:
        """Return the peak device memory during a step in MiB, including what was allocated before."""
        if self.device.type != "cuda":
            return None
        torch.cuda.reset_peak_memory_stats(self.device)
        step()
        return float(torch.cuda.max_memory_allocated(self.device)) / 2**20

    def _timed(self, step: Callable[[], object], count: int) -> float:
        self._wait()
        started = time.perf_counter()
        for _ in range(count):
            step()
        self._wait()
        return (time.perf_counter() - started) / count

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
