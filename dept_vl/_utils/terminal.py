"""Progress in the terminal, and readable durations."""

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from threading import Event, Thread
from time import monotonic
from typing import ClassVar, TypeVar

from tqdm import tqdm

from dept_vl._utils.printable import printable

PLAIN_SECONDS = 10.0
"""Minimum time between progress lines in a pipe, file or batch job."""
BEAT = 1.0
"""Seconds between checks whether a line is due."""
T = TypeVar("T")


def is_live() -> bool:
    """Return whether stderr supports progress bars: a terminal or a notebook."""
    return sys.stderr.isatty() or type(sys.stderr).__module__.startswith("ipykernel")


class Count:
    """Progress on stderr: a bar on a terminal, elsewhere a line every ten seconds.

    Only the main process prints, and of nested counts the innermost. Outside a terminal, work of less than
    ten seconds prints nothing, and lines are also printed while a single item takes long.

    Args:
        what: Name of the work, such as `evaluating`.
        total: Total amount of work; 0 if unknown.
        unit: Name of the displayed unit, and number of items per unit.
        done: Amount that was done before.
        show: Whether this process shows progress.
    """

    told_at: ClassVar[float] = 0.0
    """Time of the last line printed by any count."""
    begun: ClassVar[list["Count"]] = []
    """Active counts, outermost first."""

    def __init__(
        self, what: str, total: int, unit: tuple[str, int] = ("", 1), *, done: int = 0, show: bool = True
    ) -> None:
        self.what, self.total, (self.unit, self.per) = printable(what), total, unit
        self.show = show and os.environ.get("RANK", "0") == "0"
        self.live = is_live()
        self.done, self.before, self.started = done, done, monotonic()
        self.ended = Event()
        self.bar = tqdm(
            desc=self.what,
            total=total or None,
            disable=not (self.show and self.live),
            leave=False,
            unit_scale=self.per > 1,
            dynamic_ncols=True,
            bar_format=None if total else "{desc}: {elapsed}",
        )

    def __enter__(self) -> "Count":
        if self.show:
            Count.begun.append(self)
            Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.ended.set()
        self.bar.close()
        if self in Count.begun:
            Count.begun.remove(self)

    def add(self, more: int) -> None:
        """Add to the count, and print a line if one is due."""
        more = min(more, self.total - self.done)
        self.done += more
        self.bar.update(more)
        self._tell()

    def _watch(self) -> None:
        """Print progress while nothing is added."""
        while not self.ended.wait(BEAT):
            if self.live:
                self.bar.refresh()
            self._tell()

    def _tell(self) -> None:
        now = monotonic()
        if self.live or not self.show or now - max(self.started, Count.told_at) < PLAIN_SECONDS:
            return
        if self not in Count.begun[-1:]:
            return
        Count.told_at = now
        words = [f"{duration(now - self.started)} so far"]
        if self.total:
            counts = f"{self.done // self.per:,} of {self.total // self.per:,}"
            words = [" ".join(filter(None, (counts, self.unit))), *words]
        if new := self.done - self.before:
            words[-1] = f"{duration((now - self.started) / new * (self.total - self.done))} left"
        print(f"{self.what}: {', '.join(words)}", file=sys.stderr, flush=True)


@contextmanager
def waiting(what: str) -> Iterator[None]:
    """Show elapsed time during work of unknown length. Also usable as a decorator; see `Count`."""
    with Count(what, 0):
        yield


def counted(
    what: str, items: Iterable[T], total: int, *, size: Callable[[T], int] = lambda _: 1, show: bool = True
) -> Iterator[T]:
    """Yield items with progress, each counted when the next is requested; see `Count`.

    `total` is over all processes; the `size` of an item of the main process must cover those of all.
    """
    with Count(what, total, show=show) as count:
        for item in items:
            yield item
            count.add(size(item))


def duration(seconds: float) -> str:
    """Return a duration in its two largest units: 31s, 2m31s, 2h31m, 3d04h."""
    whole = round(seconds)
    for (large, size), (small, part) in (
        (("d", 86_400), ("h", 3_600)),
        (("h", 3_600), ("m", 60)),
        (("m", 60), ("s", 1)),
    ):
        if whole >= size:
            return f"{whole // size}{large}{whole % size // part:02d}{small}"
    return f"{whole}s"
