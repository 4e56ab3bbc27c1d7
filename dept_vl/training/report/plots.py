"""Plots of scores with confidence intervals, and the colours of methods."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dept_vl._utils.printable import printable
from dept_vl._utils.stats import Interval

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

    Other options are passed to matplotlib's `Figure`. Raise ImportError if matplotlib is not installed.
    """
    from matplotlib.figure import Figure
    from matplotlib.text import Text

    figure = Figure(**options)
    yield figure.subplots(1, panes, sharey=True, squeeze=False)[0]
    for text in figure.findobj(Text):
        text.set_parse_math(False)
        text.set_text(printable(text.get_text(), lines=True))
    figure.savefig(path)


def score_plot(lines: Mapping[str, Mapping[Any, Interval]], path: Path, *, x: str, y: str) -> bool:
    """Plot means with their 95% intervals, one line for each name, which maps positions to means.

    Return whether matplotlib is installed; without it nothing is drawn.
    """
    try:
        with drawn(path, figsize=(6, 4), layout="constrained") as (pane,):
            for name, of_name in lines.items():
                draw_means(pane, name, of_name)
            pane.set(xlabel=x, ylabel=y)
            pane.legend()
    except ImportError:
        return False
    return True


def draw_means(pane: Any, name: str, means: Mapping[Any, Interval], colour: str | None = None) -> None:
    """Draw means with their 95% intervals on axes of matplotlib."""
    values, widths = [one.mean for one in means.values()], [one.half_width or 0.0 for one in means.values()]
    pane.errorbar(list(means), values, widths, marker="o", capsize=3, label=name, color=colour)
