"""The templates of an HTML page that needs nothing but itself, and the curves that are drawn on it.

Whatever text a template shows is escaped, and loses what a browser cannot show: see `shown`.
"""

import base64
import io
import math
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from dept_vl._utils.images import read_image
from dept_vl._utils.printable import printable

Point = tuple[int | float, int | float]

WIDTH, HEIGHT = 360, 214
"""Of a chart, in units of its own; it is as wide as there is room."""
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 22, 38
"""Around the curves, for the labels."""
MOST_POINTS = 600
"""Of a curve: more would not be seen."""
SIDE, QUALITY = 240, 80
"""Pixels of an image's longer side, and its JPEG quality: some 10 KB each."""


def shown(value: object) -> object:
    """What a template shows of a value; text of any origin is `printable`."""
    return value if isinstance(value, Markup) else printable(value, lines=True)


@cache
def templates() -> Environment:
    """The templates beside this file."""
    return Environment(
        loader=PackageLoader(__package__, "."),
        autoescape=True,
        finalize=shown,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def thumbnail(path: Path) -> str | None:
    """An image as a small JPEG in base 64; None if it cannot be read."""
    try:
        image = read_image(path)
        image.thumbnail((SIDE, SIDE))
        written = io.BytesIO()
        image.save(written, "JPEG", quality=QUALITY, optimize=True)
    # A page without one of its pictures is still a page.
    except (OSError, ValueError):
        return None
    return base64.b64encode(written.getvalue()).decode()


def chart(
    title: str,
    lines: Mapping[str, Sequence[Point]],
    *,
    y: str,
    logarithmic: bool = False,
    note: str = "",
    order: Sequence[str] = (),
    marked: Point | None = None,
) -> dict[str, Any] | None:
    """Curves over the steps of a run, for the template's `chart`; None if there is no point.

    Args:
        title: Above it.
        lines: Points by name of the curve, from left to right.
        y: Name and unit of the vertical axis.
        logarithmic: Of the vertical axis; what is not above 0 is then left out.
        note: Below the title, of a single curve.
        order: Names that keep their colours when others are missing.
        marked: A point to set apart.
    """
    kept = {
        name: [(float(x), float(y)) for x, y in points if math.isfinite(y) and (y > 0 or not logarithmic)]
        for name, points in lines.items()
    }
    kept = {name: points for name, points in kept.items() if points}
    if not kept:
        return None
    xs, ys = zip(*chain.from_iterable(kept.values()), strict=True)
    x_ticks = _ticks(min(0.0, *xs), max(xs))
    y_ticks = _decades(min(ys), max(ys)) if logarithmic else _ticks(min(ys), max(ys))
    scale = math.log10 if logarithmic else float
    right, low, high = max(*xs, *x_ticks), scale(min(*ys, *y_ticks)), scale(max(*ys, *y_ticks))

    def place(x: float, value: float) -> tuple[float, float]:
        across = (x - x_ticks[0]) / (right - x_ticks[0] or 1)
        up = (scale(value) - low) / (high - low or 1)
        from_left, from_top = across * (WIDTH - LEFT - RIGHT), (1 - up) * (HEIGHT - TOP - BOTTOM)
        return round(LEFT + from_left, 1), round(TOP + from_top, 1)

    return {
        "title": title,
        "note": note,
        "curves": {name: [place(*point) for point in _thinned(points)] for name, points in kept.items()},
        "colours": {name: order.index(name) if name in order else at for at, name in enumerate(kept)},
        "marked": marked and place(*marked),
        "y": y,
        "x_ticks": [(place(tick, y_ticks[0])[0], f"{tick:g}") for tick in x_ticks],
        "y_ticks": [(place(x_ticks[0], tick)[1], f"{tick:g}") for tick in y_ticks],
        "box": {
            "width": WIDTH,
            "height": HEIGHT,
            "left": LEFT,
            "right": WIDTH - RIGHT,
            "bottom": HEIGHT - BOTTOM,
        },
    }


def _thinned(points: Sequence[Point]) -> list[Point]:
    """So many that each can be seen; the last one stays."""
    step = math.ceil(len(points) / MOST_POINTS)
    return [*points[:-1:step], points[-1]]


def _ticks(low: float, high: float) -> list[float]:
    """Three to six round numbers around a range."""
    if high <= low:
        low, high = low - (abs(low) or 1) / 20, low + (abs(low) or 1) / 20
    size = 10.0 ** math.floor(math.log10((high - low) / 3))
    step = next(s * size for s in (1, 2, 5, 10) if (high - low) / (s * size) <= 4)
    first = math.floor(low / step)
    return [round(number * step, 12) for number in range(first, math.ceil(high / step) + 1)]


def _decades(low: float, high: float) -> list[float]:
    """The powers of ten around a range, of many every second or third."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    return [10.0**power for power in range(first, max(last, first + 1) + 1, max(1, (last - first) // 4))]
