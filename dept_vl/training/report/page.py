"""Pieces of an HTML page that needs nothing but itself: no script, no file beside it, no address outside.

Whatever text comes from data goes through `text`, which leaves nothing of it that a browser would obey.
"""

import html
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

Point = tuple[int | float, int | float]

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
"""What the page may load, should anything slip through: pictures that it holds itself."""

STYLE_FILE = Path(__file__).with_name("page.css")

WIDTH, HEIGHT = 360, 190
"""Of a chart, in units of its own; it is as wide as there is room."""
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 10, 24
"""Around the curves, for the labels."""
SERIES = 4
"""Different colours of curves."""
MOST_POINTS = 600
"""Of a curve: more would not be seen."""


def text(value: object) -> str:
    """Text of any origin as text of a page: escaped, and without half characters and control characters."""
    kept = "".join(
        character if character in "\n\t" or character >= " " else "\N{REPLACEMENT CHARACTER}"
        for character in str(value)
    )
    return html.escape(kept.encode("utf-8", "replace").decode())


def page(title: str, parts: Sequence[str]) -> str:
    """A whole document.

    Args:
        title: Of it, as text.
        parts: What is in it, as HTML.
    """
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{text(title)}</title>\n<style>\n{STYLE_FILE.read_text()}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(parts)
        + "\n</main>\n</body>\n</html>\n"
    )


def tiles(facts: Sequence[tuple[str, str]]) -> str:
    """A row of numbers, each with what it is."""
    return (
        '<div class="tiles">'
        + "".join(f'<div class="tile"><b>{text(v)}</b><span>{text(k)}</span></div>' for k, v in facts)
        + "</div>"
    )


def table(header: Sequence[str], rows: Sequence[Sequence[str]], *, share: Sequence[float] = ()) -> str:
    """A table; all but its first column are numbers.

    Args:
        header: Of the columns.
        rows: The cells.
        share: Of each row, from 0 to 1, drawn as a bar; left out, there are none.
    """

    def line(cells: Sequence[str], tag: str, bar: str = "") -> str:
        first, *others = map(text, cells)
        numbers = "".join(f'<{tag} class="n">{cell}</{tag}>' for cell in others)
        return f"<tr><{tag}>{first}</{tag}>{numbers}{bar}</tr>"

    bars = [
        f'<td class="bar"><div style="width:{100 * min(max(one, 0.0), 1.0):.1f}%"></div></td>'
        for one in share
    ]
    body = "".join(line(row, "td", bar) for row, bar in zip(rows, bars or [""] * len(rows), strict=True))
    head = line(header, "th", "<th></th>" if bars else "") if any(header) else ""
    return f"<table>{head}{body}</table>"


def chart(
    title: str,
    lines: Mapping[str, Sequence[Point]],
    *,
    logarithmic: bool = False,
    note: str = "by step",
    marked: Point | None = None,
) -> str:
    """Curves over the steps of a run; empty if there is no point.

    Args:
        title: Above it.
        lines: Points by name of the curve, from left to right.
        logarithmic: Of the vertical axis; what is not above 0 is then left out.
        note: Below the title, of a single curve.
        marked: A point to set apart.
    """
    kept = {
        name: [(float(x), float(y)) for x, y in points if math.isfinite(y) and (y > 0 or not logarithmic)]
        for name, points in lines.items()
    }
    kept = {name: points for name, points in kept.items() if points}
    if not kept:
        return ""
    xs = [x for points in kept.values() for x, _ in points]
    ys = [y for points in kept.values() for _, y in points]
    x_ticks = _ticks(min(0.0, *xs), max(xs))
    y_ticks = _decades(min(ys), max(ys)) if logarithmic else _ticks(min(ys), max(ys))
    scale = math.log10 if logarithmic else float
    low, high = scale(min(*ys, *y_ticks)), scale(max(*ys, *y_ticks))

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - x_ticks[0]) / (max(*xs, x_ticks[-1]) - x_ticks[0] or 1)
        up = (scale(y) - low) / (high - low or 1)
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)

    drawn = []
    for tick in y_ticks:
        _, y = place(x_ticks[0], tick)
        drawn.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        drawn.append(f'<text x="{LEFT - 6}" y="{y + 3.5:.1f}" text-anchor="end">{tick:g}</text>')
    for tick in x_ticks:
        x, _ = place(tick, y_ticks[0])
        drawn.append(f'<text x="{x:.1f}" y="{HEIGHT - 7}" text-anchor="middle">{tick:g}</text>')
    for number, points in enumerate(kept.values()):
        places = [place(*point) for point in _thinned(points)]
        colour = f"s{number % SERIES}"
        drawn.append(f'<path class="{colour}" d="M{"L".join(f"{x:.1f} {y:.1f}" for x, y in places)}"/>')
        if len(places) == 1:
            drawn.append(_dot(places[0], colour))
    if marked is not None:
        drawn.append(_dot(place(float(marked[0]), float(marked[1])), "s0"))
    names = (f'<span><i class="s{i % SERIES}"></i>{text(name)}</span>' for i, name in enumerate(kept))
    legend = f'<p class="legend">{"".join(names) if len(kept) > 1 else text(note)}</p>'
    picture = (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{text(title)}">{"".join(drawn)}</svg>'
    )
    return f'<div class="chart"><h3>{text(title)}</h3>{legend}{picture}</div>'


def _dot(place: tuple[float, float], colour: str) -> str:
    return f'<circle class="dot {colour}" cx="{place[0]:.1f}" cy="{place[1]:.1f}" r="3.5"/>'


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
