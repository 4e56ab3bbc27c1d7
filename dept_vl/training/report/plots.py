"""Plots of scores with confidence intervals, and the colours of methods."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dept_vl._utils.printable import printable
from dept_vl._utils.stats import Interval

NAME_HEIGHT = 10
"""Vertical distance of names in a plot, in points."""
COLOURS = {
    "dept": "#0072b2",
    "pt": "#d55e00",
    "adept": "#009e73",
    "memory": "#cc79a7",
    "LoRA": "#e69f00",
    "hybrid": "#56b4e9",
    "residual": "#117733",
    "ulpt": "#882255",
    "lopt": "#aa4499",
    "BitFit": "#999933",
    "full fine-tuning": "#332288",
}
"""Colour of each method on pages and in figures, from the palettes of Okabe and Ito and of Paul Tol, which
remain distinguishable with any colour vision."""
OTHERS = "#777777"


def colour_of(name: str) -> str:
    """Return the colour of a method; `dept, m = 20`, `dept40` and `dept + projection` have that of `dept`."""
    first = (re.match("[a-z]+", name.partition(",")[0].partition(" +")[0].lower()) or [""])[0]
    return next((colour for method, colour in COLOURS.items() if method.lower().split()[0] == first), OTHERS)


@contextmanager
def drawn(path: Path, panes: int = 1, **options: Any) -> Iterator[Any]:
    """Yield axes side by side to draw on, then save the figure. Texts are drawn without math parsing.

    Other options are passed to matplotlib's `Figure`.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    from matplotlib.figure import Figure
    from matplotlib.text import Text

    figure = Figure(**options)
    yield figure.subplots(1, panes, sharey=True, squeeze=False)[0]
    for text in figure.findobj(Text):
        text.set_parse_math(False)
        text.set_text(printable(text.get_text(), lines=True))
    figure.savefig(path)


def score_plot(
    lines: Mapping[str, Mapping[Any, Interval]],
    path: Path,
    *,
    x: str,
    y: str,
    points: bool = False,
    corner: str = "",
) -> bool:
    """Plot means with their 95% intervals, one line for each name.

    Each line maps positions on the horizontal axis to means. With `points` each line is one point with its
    name beside it. `corner` is written above the upper left corner.

    Returns:
        Whether matplotlib is installed. Without it nothing is drawn.
    """
    try:
        with drawn(path, figsize=(8, 5) if points else (6, 4), layout="constrained") as (pane,):
            for name, of_name in lines.items():
                means = [score.mean for score in of_name.values()]
                widths = [score.half_width or 0.0 for score in of_name.values()]
                colour = colour_of(name) if points else None
                pane.errorbar(list(of_name), means, widths, marker="o", capsize=3, label=name, color=colour)
            pane.set(xlabel=x, ylabel=y)
            if points:
                _name_ends(pane, lines)
            else:
                pane.legend()
            pane.set_title(corner, loc="left", style="italic", fontsize=10)
    except ImportError:
        return False
    return True


def curve_plot(
    panes: Mapping[str, Mapping[str, Mapping[float, Interval]]], path: Path, *, y: str, log: bool = False
) -> bool:
    """Plot means over several horizontal axes, one pane each, with the names at the ends of the curves.

    With `log` the horizontal axes are logarithmic.

    Returns:
        Whether matplotlib is installed. Without it nothing is drawn.
    """
    try:
        from matplotlib.ticker import LogLocator

        with drawn(path, len(panes), figsize=(14, 6), layout="constrained") as drawing:
            for pane, (x, lines) in zip(drawing, panes.items(), strict=True):
                for name, of_name in lines.items():
                    means = [score.mean for score in of_name.values()]
                    pane.plot(list(of_name), means, marker="o", ms=3, color=colour_of(name))
                pane.set(xlabel=x)
                if log:
                    pane.set_xscale("log", subs=())
                    pane.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
                    pane.xaxis.set_major_formatter("{x:g}")
                _name_ends(pane, lines)
            drawing[0].set(ylabel=y)
    except ImportError:
        return False
    return True


def _name_ends(pane: Any, lines: Mapping[str, Mapping[Any, Interval]]) -> None:
    """Write each name to the right of its last point, without overlaps where there is room below."""
    left, right = pane.get_xlim()
    pane.set_xlim(
        right=right * (right / left) ** 0.3 if pane.get_xscale() == "log" else right + 0.3 * (right - left)
    )
    pane.figure.draw_without_rendering()  # otherwise positions differ from those in the file
    ends = {
        name: (list(of_name)[-1], list(of_name.values())[-1].mean)
        for name, of_name in lines.items()
        if of_name
    }
    taken: list[tuple[float, float, float]] = []  # left, right and height of the names so far, in points
    scale = 72 / pane.figure.dpi
    for name, place in sorted(ends.items(), key=lambda end: -end[1][1]):
        left, height = (scale * pixel for pixel in pane.transData.transform(place))
        left, right, lowered = left + 6, left + 6 + 4.5 * len(name), height + 2
        for other_left, other_right, other in sorted(taken, key=lambda one: -one[2]):
            if left < other_right and other_left < right and abs(other - lowered) < NAME_HEIGHT:
                lowered = other - NAME_HEIGHT
        taken.append((left, right, lowered))
        pane.annotate(
            name, place, xytext=(6, lowered - height), textcoords="offset points", va="center", fontsize=8
        )
