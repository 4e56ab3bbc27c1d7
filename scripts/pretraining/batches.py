"""Batches of scenes and of questions about them, without end, for pretraining the small backbones."""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from dept_vl.tasks.scenes.questions import FAMILIES, NOUNS, QA, RELATIONS, SIDES, ask
from dept_vl.tasks.scenes.render import (
    COLOURS,
    GRID,
    IMAGE_SIZE,
    SHAPES,
    SIZES,
    Object,
    Scene,
    render,
    sample_scene,
)
from dept_vl.tasks.scenes.texts import ask_pair, ask_text, caption
from pretraining.options import SPATIAL

IGNORE_INDEX = -100
"""Class that the loss does not count, as torch has it."""
CELL_CLASSES = {"shape": [*SHAPES, "nothing"], "colour": list(COLOURS), "size": list(SIZES)}
PHRASE = re.compile(
    rf"\b(?:(?:{'|'.join(SIZES)}) )?(?:(?:{'|'.join(COLOURS)}) )?(?:{'|'.join([*SHAPES, *NOUNS])})s?\b"
)
MOST = 2
"""Objects that a phrase fits are counted up to here."""
COMPARES = re.compile(rf"\b(?:({'|'.join(RELATIONS)})|far ({'|'.join(SIDES)}))\b")
"""How a text compares the places of two objects."""
TOWARDS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
"""The direction that a relation looks in."""

Cells = tuple[np.ndarray, np.ndarray, np.ndarray]


def cells(scenes: list[Scene]) -> Cells:
    """Pixels and, of the object centred in each cell, the class of each attribute and the offset in it."""
    pixels = np.stack([np.asarray(render(scene)) for scene in scenes])
    targets = np.full((len(scenes), len(CELL_CLASSES), GRID**2), IGNORE_INDEX)
    targets[:, 0] = len(SHAPES)
    offsets = np.zeros((len(scenes), GRID**2, 2), np.float32)
    step = IMAGE_SIZE / GRID
    for row, scene in enumerate(scenes):
        for item in scene.objects:
            cell = item.cell[0] * GRID + item.cell[1]
            offsets[row, cell] = item.y / step - item.cell[0], item.x / step - item.cell[1]
            for column, (attribute, classes) in enumerate(CELL_CLASSES.items()):
                targets[row, column, cell] = classes.index(getattr(item, attribute))
    return pixels, targets, offsets


def on_device(drawn: Cells, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Pixels in -1..1, classes and offsets."""
    pixels, targets, offsets = (torch.from_numpy(part).to(device) for part in drawn)
    return pixels.permute(0, 3, 1, 2) / 127.5 - 1, targets, offsets


class DrawnCells(IterableDataset[Cells]):
    """Batches of freshly drawn scenes, without end."""

    def __init__(self, seed: int, size: int) -> None:
        self.seed, self.size = seed, size

    def __iter__(self) -> Iterator[Cells]:
        """Each worker draws scenes of its own."""
        rng = worker_rng(self.seed)
        while True:
            yield cells([sample_scene(rng) for _ in range(self.size)])


def worker_rng(seed: int) -> Random:
    """A generator for this process; without workers that of the seed itself."""
    worker = get_worker_info()
    return Random(seed if worker is None else seed + 1_000_003 * (worker.id + 1))


def loader(dataset: Any, workers: int) -> DataLoader[Any]:
    """Load items as they are: NumPy's arrays need no shared memory."""
    ahead = 4 if workers else None
    return DataLoader(dataset, None, num_workers=workers, prefetch_factor=ahead, collate_fn=as_is)


def as_is(item: Any) -> Any:
    """Of a loader that changes nothing."""
    return item


class Pixels(Dataset[Cells]):
    """Rendered scenes, some hundreds an item."""

    def __init__(self, scenes: list[Scene], size: int = 500) -> None:
        self.parts = [scenes[start : start + size] for start in range(0, len(scenes), size)]

    def __len__(self) -> int:
        """Items."""
        return len(self.parts)

    def __getitem__(self, place: int) -> Cells:
        """Pixels of some scenes, and what is in their cells."""
        return cells(self.parts[place])


@dataclass(frozen=True)
class Sample:
    """Text, target and the rows of the scenes that they are about."""

    qa: QA
    rows: tuple[int, ...]


class DrawnBatches(IterableDataset[dict[str, np.ndarray]]):
    """Batches of one kind each, without end, so that long targets keep to themselves.

    Captions and pairs are longer, so that a batch has fewer of them. `spatial_share` of the questions are
    about places, of the families `spatial`.
    """

    def __init__(
        self,
        scenes: list[Scene],
        tokenizer: Any,
        seed: int,
        size: int,
        families: Sequence[str] = tuple(FAMILIES),
        spatial_share: float = 0.0,
        spatial: Sequence[str] = SPATIAL,
    ) -> None:
        self.scenes, self.tokenizer, self.seed, self.size = scenes, tokenizer, seed, size
        self.families, self.spatial_share, self.spatial = families, spatial_share, spatial
        if spatial_share and "more" not in spatial:
            raise ValueError("spatial wants `more` among its families: of them it alone fits every scene")
        self.crowded = [row for row, scene in enumerate(scenes) if len(scene.objects) > 1]

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        """Each worker asks questions of its own."""
        rng = worker_rng(self.seed)
        while True:
            batch = self.draw(rng)
            yield encoded(self.tokenizer, batch) | phrases(self.tokenizer, batch, self.scenes)

    def draw(self, rng: Random) -> list[Sample]:
        """One batch."""
        rows, size = range(len(self.scenes)), self.size
        kind = rng.choices(["questions", "captions", "pairs", "text"], [74, 8, 12, 6])[0]
        if kind == "questions":
            return [self.question(row, rng) for row in rng.choices(rows, k=size)]
        if kind == "captions":
            return [Sample(caption(self.scenes[row], rng), (row,)) for row in rng.choices(rows, k=size // 3)]
        if kind == "pairs":
            chosen = [(rng.choice(rows), rng.choice(rows)) for _ in range(size // 2)]
            return [
                Sample(ask_pair(self.scenes[pair[0]], self.scenes[pair[1]], rng), pair) for pair in chosen
            ]
        return [Sample(ask_text(rng), ()) for _ in range(size)]

    def question(self, row: int, rng: Random) -> Sample:
        """One question about a scene."""
        families = self.families
        if self.crowded and rng.random() < self.spatial_share:
            families, row = self.spatial, rng.choice(self.crowded)
        return Sample(with_prefix(ask(self.scenes[row], rng, families), rng), (row,))


def with_prefix(qa: QA, rng: Random) -> QA:
    """Half of the questions carry a task prefix, as the tasks' own source texts do."""
    prefix = rng.choices(["", "vqa: ", "gqa: "], [5, 4, 1])[0]
    return QA(prefix + qa.source_text, qa.target_text)


def encoded(tokenizer: Any, batch: list[Sample]) -> dict[str, np.ndarray]:
    """Text and target of a batch as tokens, and the rows of its scenes."""
    source = tokenizer([s.qa.source_text for s in batch], padding=True, return_tensors="np")
    target = tokenizer([s.qa.target_text for s in batch], padding=True, return_tensors="np")
    labels = np.where(target.attention_mask == 0, IGNORE_INDEX, target.input_ids)
    rows = np.array([s.rows for s in batch], np.int64)
    texts = {"input_ids": source.input_ids, "attention_mask": source.attention_mask}
    return texts | {"labels": labels, "rows": rows}


def phrases(tokenizer: Any, batch: list[Sample], scenes: list[Scene]) -> dict[str, np.ndarray]:
    """What the phrases in a batch's texts refer to, for questions about one image.

    Returns:
        By name: example and token where a phrase ends; how many objects it fits, where it is one alone the
        class of each attribute, and where two are compared whether it is the second, and whether it lies
        further that way; centre, in cells, of that object, and how far that way it lies (NaN: not told).
    """
    ends, classes, places = [], [], []
    for row, sample in enumerate(batch):
        if len(sample.rows) != 1:
            continue
        source = sample.qa.source_text
        text = tokenizer(source)
        named = list(PHRASE.finditer(source))
        found = [fitting(scenes[sample.rows[0]], phrase[0]) for phrase in named]
        reached = reach(source, found)
        for place, (phrase, items) in enumerate(zip(named, found, strict=True)):
            ends.append((row, text.char_to_token(phrase.end() - 1)))
            item = items[0] if len(items) == 1 else None
            attributes = [
                known.index(getattr(item, name)) if item else IGNORE_INDEX
                for name, known in CELL_CLASSES.items()
            ]
            compared = [place, int(reached[place] == max(reached))] if reached else [IGNORE_INDEX] * 2
            classes.append([min(len(items), MOST), *attributes, *compared])
            centre = [item.x, item.y] if item else [math.nan] * 2
            places.append([*centre, reached[place] if reached else math.nan])
    return {
        "ends": np.array(ends, np.int64).reshape(-1, 2),
        "classes": np.array(classes, np.int64).reshape(-1, 3 + len(CELL_CLASSES)),
        "places": np.array(places, np.float32).reshape(-1, 3) * GRID / IMAGE_SIZE,
    }


def reach(source: str, found: list[list[Object]]) -> list[float]:
    """How far two compared objects lie the way that a text of two phrases asks about; else nothing."""
    compares = COMPARES.search(source)
    if compares is None or [len(items) for items in found] != [1, 1]:
        return []
    right, down = TOWARDS[compares[1] or SIDES[compares[2]]]
    return [right * item.x + down * item.y for (item,) in found]


def fitting(scene: Scene, phrase: str) -> list[Object]:
    """The objects that a phrase such as `large red thing` fits."""
    nouns = {form for noun in NOUNS for form in (noun, f"{noun}s")}
    wanted = [word for word in phrase.split() if word not in nouns]
    # Shapes may be in the plural.
    return [
        item
        for item in scene.objects
        if all(word in (item.size, item.colour, item.shape, f"{item.shape}s") for word in wanted)
    ]
