"""What a person looks at after a run: a table, and a picture of questions with their answers."""

import textwrap
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from dept_vl.images import read_image
from dept_vl.intervals import Interval
from dept_vl.tasks.example import Task
from dept_vl.tasks.predictions import ExampleId

TILE = 200
"""Pixels of a picture's side in the grid."""
TEXT_HEIGHT, MARGIN, FONT_SIZE, ANSWER_SIZE, WRAP = 88, 14, 15, 19, 27
RIGHT, WRONG, INK, PAPER = (24, 128, 56), (190, 32, 32), (32, 32, 32), (255, 255, 255)


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """An aligned Markdown table, readable as plain text too."""
    cells = [list(map(str, row)) for row in (header, *rows)]
    # Narrower than 3, the rule would be no Markdown.
    widths = [max(3, *map(len, column)) for column in zip(*cells, strict=True)]

    def line(row: Sequence[str]) -> str:
        padded = (
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        return "| " + " | ".join(padded) + " |"

    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join([line(cells[0]), line(rule), *map(line, cells[1:])])


def score_rows(scores: Mapping[str, float], splits: str) -> list[tuple[str, str]]:
    """A row for each figure that a summary shows, with its scale."""
    return [
        (f"{splits}: {name.replace('answer_type/', '')} ({scale_of(name)})", f"{value:.2f}")
        for name, value in scores.items()
        if "question_type/" not in name
    ]


def scale_of(name: str) -> str:
    """In what a figure is counted."""
    figure = name.rsplit("/", 1)[-1]
    return {"CIDEr": "x100", "distribution": "lower is better"}.get(figure, "0-100")


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


def picture_grid(
    task: Task,
    predictions: Mapping[ExampleId, str],
    path: Path,
    *,
    columns: int = 5,
    rows: int = 3,
    mistakes: int = 5,
) -> None:
    """Images with question, human answer and prediction: green where right, red where wrong.

    Args:
        task: A split with images.
        predictions: An answer for each of its examples.
        path: PNG file to write.
        columns: Tiles across.
        rows: Tiles down.
        mistakes: Wrong answers to show, where there are as many; the rest are right ones.
    """
    tiles = _choose(task, predictions, columns * rows, mistakes)
    width, height = TILE + MARGIN, TILE + TEXT_HEIGHT + MARGIN
    sheet = Image.new("RGB", (columns * width + MARGIN, rows * height + MARGIN), PAPER)
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(FONT_SIZE)
    for place, index in enumerate(tiles):
        example = task[index]
        answer = predictions[example.example_id]
        left, top = MARGIN + place % columns * width, MARGIN + place // columns * height
        # Two images share a tile, side by side.
        side = TILE // len(example.images)
        for number, image in enumerate(map(read_image, example.images)):
            resized = image.resize((side, side), Image.Resampling.BICUBIC)
            sheet.paste(resized, (left + number * side, top + (TILE - side) // 2))
        draw.rectangle((left, top, left + TILE, top + TILE), outline=INK)
        text = textwrap.wrap(example.question, WRAP)[:3]
        draw.multiline_text((left, top + TILE + 6), "\n".join(text), fill=INK, font=font)
        right = answer == example.answer
        verdict = answer if right or not example.answer else f"{answer} (humans: {example.answer})"
        place_of_answer = (left, top + TILE + TEXT_HEIGHT - 28)
        # A caption is neither right nor wrong; it stands under a human one.
        fill = INK if not example.answer else RIGHT if right else WRONG
        verdict = textwrap.shorten(verdict, WRAP)
        draw.text(place_of_answer, verdict, fill=fill, font=_fitting(draw, verdict))
    sheet.save(path)


def _fitting(draw: ImageDraw.ImageDraw, text: str) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """The largest font in which a line is no wider than a tile."""
    fonts = map(ImageFont.load_default, range(ANSWER_SIZE, 0, -1))
    return next(font for font in fonts if draw.textlength(text, font) <= TILE)


def _choose(task: Task, predictions: Mapping[ExampleId, str], count: int, mistakes: int) -> list[int]:
    """Indices spread over the split, each of another image: first mistakes, then right answers."""
    chosen: dict[bool, list[int]] = {True: [], False: []}
    seen: set[tuple[Path, ...]] = set()
    step = max(1, len(task) // 997)
    for start in range(step):
        for index in range(start, len(task), step):
            example = task[index]
            right = predictions[example.example_id] == example.answer
            if example.images and example.images not in seen and len(chosen[right]) < count:
                seen.add(example.images)
                chosen[right].append(index)
    shown = chosen[False][:mistakes]
    shown = [*chosen[True][: count - len(shown)], *shown]
    return sorted(shown)
