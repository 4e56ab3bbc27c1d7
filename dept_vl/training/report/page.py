"""Templates of a self-contained HTML page, and the charts on it.

All text in a template is escaped, also characters that do not print: see `shown`.
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
"""Size of a chart in its own units; the page scales it to the space available."""
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 22, 38
"""Margins around the curves, for the labels."""
MOST_POINTS = 600
"""Maximum number of points of a curve."""
SIDE, QUALITY = 240, 80
"""Longer side of a thumbnail in pixels, and its JPEG quality. A file has about 10 KB."""


def shown(value: object) -> object:
    """Make a value safe to show in a template; text becomes `printable`."""
    return value if isinstance(value, Markup) else printable(value, lines=True)


@cache
def templates() -> Environment:
    """Return the environment of the templates in this folder."""
    return Environment(
        loader=PackageLoader(__package__, "."),
        autoescape=True,
        finalize=shown,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def thumbnail(path: Path) -> str | None:
    """Return an image as a small JPEG in base 64, or None if it cannot be read."""
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
    marked: Point | None = None,
) -> dict[str, Any] | None:
    """Return the data of a line chart over training steps, or None if there are no points.

    `lines` are the points of each curve, from left to right; on a logarithmic axis those not above 0 are left
    out. `y` is the name and unit of the vertical axis, `marked` a point to highlight.
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
        "colours": {name: place for place, name in enumerate(kept)},
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
    """Return at most about `MOST_POINTS` points, with the last one."""
    step = math.ceil(len(points) / MOST_POINTS)
    return [*points[:-1:step], points[-1]]


def _ticks(low: float, high: float) -> list[float]:
    """Return three to six round numbers that cover a range."""
    if high <= low:
        low, high = low - (abs(low) or 1) / 20, low + (abs(low) or 1) / 20
    size = 10.0 ** math.floor(math.log10((high - low) / 3))
    step = next(s * size for s in (1, 2, 5, 10) if (high - low) / (s * size) <= 4)
    first = math.floor(low / step)
    return [round(number * step, 12) for number in range(first, math.ceil(high / step) + 1)]


def _decades(low: float, high: float) -> list[float]:
    """Return powers of ten that cover a range; every second or third if there are many."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    return [10.0**power for power in range(first, max(last, first + 1) + 1, max(1, (last - first) // 4))]
