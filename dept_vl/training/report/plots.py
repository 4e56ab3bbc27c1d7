"""Plots of scores with their intervals."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import cycle
from pathlib import Path
from typing import Any

from dept_vl._utils.printable import printable
from dept_vl._utils.stats import Interval


@contextmanager
def drawn(path: Path, panes: int = 1, **options: Any) -> Iterator[Any]:
    """Panes side by side to draw on; written when they are left, with texts as they are: `$` is no formula.

    Args:
        path: PNG file to write.
        panes: How many.
        **options: Of matplotlib's `Figure`.

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
    lines: Mapping[str, Mapping[Any, Interval]], path: Path, *, x: str, y: str, points: bool = False
) -> bool:
    """Means with their 95% intervals, a line for each name.

    Args:
        lines: By name, by place on the horizontal axis.
        path: PNG file to write.
        x: What the horizontal axis is.
        y: What the vertical axis is.
        points: Whether each line is one point: each then has a marker of its own, and the names stand beside.

    Returns:
        Whether matplotlib is installed; without it nothing is drawn.
    """
    try:
        with drawn(path, figsize=(8, 5) if points else (6, 4), layout="constrained") as (pane,):
            for marker, (name, of_name) in zip(cycle("osD^v<>pPX*hd" if points else "o"), lines.items()):
                means = [score.mean for score in of_name.values()]
                widths = [score.half_width or 0.0 for score in of_name.values()]
                pane.errorbar(list(of_name), means, widths, marker=marker, capsize=3, label=name)
            pane.set(xlabel=x, ylabel=y)
            pane.legend(**({"loc": "center left", "bbox_to_anchor": (1.0, 0.5)} if points else {}))
    except ImportError:
        return False
    return True
