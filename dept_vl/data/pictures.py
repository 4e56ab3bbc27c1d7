"""Contact sheet of questions with their images and answers."""

import textwrap
from collections.abc import Mapping
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from dept_vl._utils.images import read_image
from dept_vl._utils.printable import printable
from dept_vl.tasks.base import Task
from dept_vl.tasks.io.predictions import ExampleId

TILE = 200
"""Side of a tile, in pixels."""
TEXT_HEIGHT, MARGIN, FONT_SIZE, ANSWER_SIZE, WRAP = 88, 14, 15, 19, 27
RIGHT, WRONG, INK, PAPER = (24, 128, 56), (190, 32, 32), (32, 32, 32), (255, 255, 255)


def picture_grid(
    task: Task,
    predictions: Mapping[ExampleId, str],
    path: Path,
    *,
    columns: int = 5,
    rows: int = 3,
    mistakes: int = 5,
) -> None:
    """Draw images with question, prediction and human answer; correct predictions are green, others red.

    At most `mistakes` of the tiles are wrong predictions.
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
        # Several images share a tile, side by side, as many as can be seen.
        shown = example.images[: TILE // MARGIN]
        side = TILE // len(shown)
        for number, image in enumerate(map(read_image, shown)):
            resized = image.resize((side, side), Image.Resampling.BICUBIC)
            sheet.paste(resized, (left + number * side, top + (TILE - side) // 2))
        draw.rectangle((left, top, left + TILE, top + TILE), outline=INK)
        text = textwrap.wrap(printable(example.question, lines=True), WRAP)[:3]
        draw.multiline_text((left, top + TILE + 6), "\n".join(text), fill=INK, font=font)
        right = answer == example.answer
        verdict = answer if right or not example.answer else f"{answer} (humans: {example.answer})"
        place_of_answer = (left, top + TILE + TEXT_HEIGHT - 28)
        # Captions are not marked as right or wrong; they are drawn below a human caption.
        fill = INK if not example.answer else RIGHT if right else WRONG
        verdict = textwrap.shorten(printable(verdict, lines=True), WRAP)
        draw.text(place_of_answer, verdict, fill=fill, font=_fitting(draw, verdict))
    sheet.save(path)


def _fitting(draw: ImageDraw.ImageDraw, text: str) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Return the largest font in which a line fits into a tile."""
    fonts = map(ImageFont.load_default, range(ANSWER_SIZE, 0, -1))
    return next(font for font in fonts if draw.textlength(text, font) <= TILE)


def _choose(task: Task, predictions: Mapping[ExampleId, str], count: int, mistakes: int) -> list[int]:
    """Return `count` indices spread over the split, with different images and at most `mistakes` errors."""
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
