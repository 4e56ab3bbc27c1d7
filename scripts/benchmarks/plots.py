"""Plots of a comparison, with the names of methods beside their points."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dept_vl._utils.stats import Interval
from dept_vl.training.report.plots import colour_of, draw_means, drawn

NAME_HEIGHT = 10
"""Vertical distance of names in a plot, in points."""


def point_plot(points: Mapping[str, tuple[float, Interval]], path: Path, *, x: str, y: str) -> bool:
    """Plot a point for each method, the better the more to the left and the higher.

    Returns:
        Whether matplotlib is installed. Without it nothing is drawn.
    """
    lines = {name: {place: score} for name, (place, score) in points.items()}
    try:
        with drawn(path, figsize=(8, 5), layout="constrained") as (pane,):
            for name, of_name in lines.items():
                draw_means(pane, name, of_name, colour_of(name))
            pane.set(xlabel=x, ylabel=y)
            name_ends(pane, lines)
            pane.set_title("better: up and left", loc="left", style="italic", fontsize=10)
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
                name_ends(pane, lines)
            drawing[0].set(ylabel=y)
    except ImportError:
        return False
    return True


def name_ends(pane: Any, lines: Mapping[str, Mapping[Any, Interval]]) -> None:
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
