"""What the terminal can show: how far something is, and durations as people read them."""

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
"""Least time between two lines where they stay: in a pipe, a file, a batch job."""
BEAT = 1.0
"""Seconds between looks whether a line is due."""
T = TypeVar("T")


def is_live() -> bool:
    """Return whether a line on stderr can be drawn over: on a terminal, and in a notebook."""
    return sys.stderr.isatty() or type(sys.stderr).__module__.startswith("ipykernel")


class Count:
    """Tells on stderr how far something is: a bar on a terminal, elsewhere a line every ten seconds.

    What ends within ten seconds says nothing in a pipe, and of several processes the main one tells. A line
    comes also while a single piece takes longer; of several counts within each other the innermost tells.

    Args:
        what: Is done, such as `evaluating`.
        total: How much there is; 0 if that is not known.
        unit: What is counted, and by how many.
        done: How much was done before.
        show: Whether this process tells.
    """

    told_at: ClassVar[float] = 0.0
    """When the last line of any count was printed."""
    begun: ClassVar[list["Count"]] = []
    """Those within each other."""

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
        """Add to the count, and print a line if ten seconds have passed since the last."""
        more = min(more, self.total - self.done)
        self.done += more
        self.bar.update(more)
        self._tell()

    def _watch(self) -> None:
        """Tell while nothing is added."""
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
    """Tell that something of unknown length is done, and since when; a decorator too. See `Count`."""
    with Count(what, 0):
        yield


def counted(
    what: str, items: Iterable[T], total: int, *, size: Callable[[T], int] = lambda _: 1, show: bool = True
) -> Iterator[T]:
    """Count items, each when the next one is asked for; see `Count`.

    `total` is over all processes; of several processes those of the main one stand for all, by their `size`.
    """
    with Count(what, total, show=show) as count:
        for item in items:
            yield item
            count.add(size(item))


def duration(seconds: float) -> str:
    """In the two largest units: 31s, 2m31s, 2h31m, 3d04h."""
    whole = round(seconds)
    for (large, size), (small, part) in (
        (("d", 86_400), ("h", 3_600)),
        (("h", 3_600), ("m", 60)),
        (("m", 60), ("s", 1)),
    ):
        if whole >= size:
            return f"{whole // size}{large}{whole % size // part:02d}{small}"
    return f"{whole}s"
