"""What the terminal can show: how far something is, and durations as people read them."""

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from time import monotonic
from typing import TypeVar

from tqdm import tqdm

PLAIN_SECONDS = 10.0
"""Least time between two lines where they stay: in a pipe, a file, a batch job."""
T = TypeVar("T")


def is_live() -> bool:
    """Whether a line on stderr can be drawn over: on a terminal, and in a notebook, without widgets."""
    return sys.stderr.isatty() or type(sys.stderr).__module__.startswith("ipykernel")


class Count:
    """Tells on stderr how far something is: a bar on a terminal, elsewhere a line every ten seconds.

    What ends within ten seconds says nothing in a pipe, and of several processes the main one tells.

    Args:
        what: Is done, such as `evaluating`.
        total: How much there is.
        unit: What is counted, and by how many.
        show: Whether this process tells.
    """

    def __init__(self, what: str, total: int, unit: tuple[str, int] = ("", 1), *, show: bool = True) -> None:
        self.what, self.total, (self.unit, self.per) = what, total, unit
        self.show = show and os.environ.get("RANK", "0") == "0"
        self.live = is_live()
        self.done, self.started = 0, monotonic()
        self.told_at = self.started
        self.bar = tqdm(
            desc=what,
            total=total,
            disable=not (self.show and self.live),
            leave=False,
            unit_scale=self.per > 1,
        )

    def __enter__(self) -> "Count":
        return self

    def __exit__(self, *exception: object) -> None:
        self.bar.close()

    def add(self, more: int) -> None:
        """Add to the count, and print a line if ten seconds have passed since the last."""
        self.done += more
        self.bar.update(more)
        now = monotonic()
        if self.live or not self.show or now - self.told_at < PLAIN_SECONDS or not self.done:
            return
        self.told_at = now
        left = (now - self.started) / self.done * max(0, self.total - self.done)
        counts = f"{self.done // self.per:,} of {self.total // self.per:,}"
        words = filter(None, (counts, self.unit))
        print(f"{self.what}: {' '.join(words)}, {duration(left)} left", file=sys.stderr, flush=True)


def counted(
    what: str,
    items: Iterable[T],
    total: int,
    *,
    size: Callable[[T], int] = lambda _: 1,
    show: bool = True,
) -> Iterator[T]:
    """The items, each counted when the next one is asked for; see `Count`.

    Args:
        what: Is done.
        items: Of it.
        total: How much there is.
        size: How much of that an item is.
        show: Whether this process tells.
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
