"""Scenes of a few coloured shapes on a light background, drawn with Pillow."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from PIL import Image, ImageDraw

IMAGE_SIZE = 64
"""Width and height of an image, in pixels."""

GRID = 4
"""Number of grid cells per side. No two objects have their centre in the same cell."""

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (245, 20, 20),
    "green": (20, 225, 20),
    "blue": (20, 30, 245),
    "yellow": (250, 240, 20),
    "black": (15, 15, 15),
    "gray": (128, 128, 128),
    "teal": (0, 128, 128),
    "brown": (160, 50, 45),
    "orange": (255, 145, 20),
    "purple": (135, 30, 160),
    "pink": (255, 120, 190),
}
SHAPES = ("circle", "rectangle", "triangle", "diamond", "cross", "star")
SIZES: dict[str, tuple[int, int]] = {"small": (7, 12), "medium": (14, 20), "large": (23, 32)}
"""Range of an object's longer side in pixels, by size."""

COLOUR_JITTER = 22
LIGHTEST, DARKEST_GROUND = 255, 222
SECOND_OBJECT_TRIES = 12


@dataclass(frozen=True)
class Object:
    """One shape. `x` and `y` are its centre, `width` and `height` its box, in pixels."""

    shape: str
    colour: str
    size: str
    x: float
    y: float
    width: float
    height: float

    @property
    def cell(self) -> tuple[int, int]:
        """Row and column of the grid cell that holds the centre."""
        step = IMAGE_SIZE / GRID
        return min(int(self.y / step), GRID - 1), min(int(self.x / step), GRID - 1)

    def overlaps(self, other: "Object", gap: float = 1.0) -> bool:
        """Return whether the two boxes touch."""
        return (
            abs(self.x - other.x) < (self.width + other.width) / 2 + gap
            and abs(self.y - other.y) < (self.height + other.height) / 2 + gap
        )


@dataclass(frozen=True)
class Scene:
    """Objects from left to right, and a random seed for the background and colour variations."""

    objects: tuple[Object, ...]
    seed: int


def sample_scene(rng: Random, *, max_objects: int = 4) -> Scene:
    """Draw one to `max_objects` objects that do not overlap; one object is the most frequent number."""
    count = rng.choices(range(1, max_objects + 1), [4, 3, 2, 2][:max_objects])[0]
    objects: list[Object] = []
    for _ in range(SECOND_OBJECT_TRIES * count):
        if len(objects) == count:
            break
        candidate = _sample_object(rng, crowded=count > 1)
        if not any(candidate.overlaps(o) or candidate.cell == o.cell for o in objects):
            objects.append(candidate)
    return Scene(tuple(sorted(objects, key=lambda o: o.x)), rng.randrange(2**31))


def _sample_object(rng: Random, *, crowded: bool) -> Object:
    size = rng.choices(list(SIZES), [3, 3, 2] if crowded else [1, 1, 1])[0]
    shape = rng.choice(SHAPES)
    width = height = rng.uniform(*SIZES[size])
    if shape == "rectangle":
        aspect = rng.uniform(0.5, 1.0)
        width, height = rng.choice([(width, height * aspect), (width * aspect, height)])
    x = rng.uniform(width / 2, IMAGE_SIZE - width / 2)
    y = rng.uniform(height / 2, IMAGE_SIZE - height / 2)
    return Object(shape, rng.choice(list(COLOURS)), size, x, y, width, height)


def render(scene: Scene, stretch: int = 1) -> Image.Image:
    """Draw a scene. The same scene always gives the same pixels.

    Args:
        scene: Scene to draw.
        stretch: Ratio of width to height; objects keep their shape and move apart.
    """
    rng = Random(scene.seed)
    ground = tuple(rng.randint(DARKEST_GROUND, LIGHTEST) for _ in range(3))
    image = Image.new("RGB", (stretch * IMAGE_SIZE, IMAGE_SIZE), ground)
    draw = ImageDraw.Draw(image)
    for item in scene.objects:
        colour = tuple(
            min(255, max(0, channel + rng.randint(-COLOUR_JITTER, COLOUR_JITTER)))
            for channel in COLOURS[item.colour]
        )
        x = item.x * stretch
        box = (x - item.width / 2, item.y - item.height / 2, x + item.width / 2, item.y + item.height / 2)
        OUTLINES[item.shape](draw, box, colour)
    return image


Box = tuple[float, float, float, float]
Colour = tuple[int, ...]


def _polygon(*points: tuple[float, float]) -> Callable[[ImageDraw.ImageDraw, Box, Colour], None]:
    """Return a function that draws a filled polygon, given in the unit square with y downwards."""

    def draw_polygon(draw: ImageDraw.ImageDraw, box: Box, colour: Colour) -> None:
        left, top, right, bottom = box
        draw.polygon([(left + x * (right - left), top + y * (bottom - top)) for x, y in points], fill=colour)

    return draw_polygon


def _star(points: int = 5, inner: float = 0.42) -> list[tuple[float, float]]:
    corners = []
    for corner in range(2 * points):
        radius = 0.5 if corner % 2 == 0 else 0.5 * inner
        angle = math.pi * corner / points - math.pi / 2
        corners.append((0.5 + radius * math.cos(angle), 0.5 + radius * math.sin(angle)))
    return corners


ARM, END = 0.34, 0.66
"""Where the arms of a cross begin and end."""
CROSS = [
    *[(ARM, 0.0), (END, 0.0), (END, ARM), (1.0, ARM), (1.0, END), (END, END)],
    *[(END, 1.0), (ARM, 1.0), (ARM, END), (0.0, END), (0.0, ARM), (ARM, ARM)],
]

OUTLINES: dict[str, Callable[[ImageDraw.ImageDraw, Box, Colour], None]] = {
    "circle": lambda draw, box, colour: draw.ellipse(box, fill=colour),
    "rectangle": lambda draw, box, colour: draw.rectangle(box, fill=colour),
    "triangle": _polygon((0.5, 0.0), (1.0, 1.0), (0.0, 1.0)),
    "diamond": _polygon((0.5, 0.0), (1.0, 0.5), (0.5, 1.0), (0.0, 0.5)),
    "cross": _polygon(*CROSS),
    "star": _polygon(*_star()),
}
