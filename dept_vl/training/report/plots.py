"""Plots of scores with their intervals."""

from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path

from dept_vl._utils.stats import Interval


def line_plot(lines: Mapping[str, Mapping[int, Interval]], path: Path, *, x: str, y: str) -> bool:
    """Means with their 95% intervals, a line for each name.

    Args:
        lines: By name, by place on the horizontal axis.
        path: PNG file to write.
        x: What the horizontal axis is.
        y: What the vertical axis is.

    Returns:
        Whether matplotlib is installed; without it nothing is drawn.
    """
    series = {name: list(points.items()) for name, points in lines.items()}
    return _plot(series, path, x, y, markers="o", legend_beside=False)


def scatter_plot(points: Mapping[str, tuple[float, Interval]], path: Path, *, x: str, y: str) -> bool:
    """A named point for each method: what it costs, and what it reaches with its 95% interval.

    Args:
        points: By name, place on the horizontal axis and figure.
        path: PNG file to write.
        x: What the horizontal axis is.
        y: What the vertical axis is.

    Returns:
        Whether matplotlib is installed; without it nothing is drawn.
    """
    series = {name: [point] for name, point in points.items()}
    return _plot(series, path, x, y, markers="osD^v<>pPX*hd", legend_beside=True)


def _plot(
    series: Mapping[str, Sequence[tuple[int | float, Interval]]],
    path: Path,
    x: str,
    y: str,
    *,
    markers: str,
    legend_beside: bool,
) -> bool:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(8, 5) if legend_beside else (6, 4), layout="constrained")
    axes = figure.subplots()
    for marker, (name, points) in zip(cycle(markers), series.items(), strict=False):
        means = [score.mean for _, score in points]
        widths = [score.half_width or 0.0 for _, score in points]
        axes.errorbar([place for place, _ in points], means, widths, marker=marker, capsize=3, label=name)
    axes.set(xlabel=x, ylabel=y)
    axes.legend(**({"loc": "center left", "bbox_to_anchor": (1.0, 0.5)} if legend_beside else {}))
    figure.savefig(path)
    return True
