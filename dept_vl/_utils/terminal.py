"""What the terminal can show, and durations as people read them."""

import sys


def is_live() -> bool:
    """Whether a line on stderr can be drawn over: on a terminal, and in a notebook, without widgets."""
    return sys.stderr.isatty() or type(sys.stderr).__module__.startswith("ipykernel")


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
