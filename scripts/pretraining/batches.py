"""Endless batches of scenes and of questions about them, to pretrain the small backbones."""

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

from pretraining.options import SPATIAL
from pretraining.questions import FAMILIES, RELATIONS, SIDES, ask, ask_pair, ask_text, caption
from study_data.questions import NOUNS, QA
from study_data.render import (
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

IGNORE_INDEX = -100
"""Label that torch's loss ignores."""
CELL_CLASSES = {"shape": [*SHAPES, "nothing"], "colour": list(COLOURS), "size": list(SIZES)}
PHRASE = re.compile(
    rf"\b(?:(?:{'|'.join(SIZES)}) )?(?:(?:{'|'.join(COLOURS)}) )?(?:{'|'.join([*SHAPES, *NOUNS])})s?\b"
)
MOST = 2
"""Objects that fit a phrase are counted up to this number."""
COMPARES = re.compile(rf"\b(?:({'|'.join(RELATIONS)})|far ({'|'.join(SIDES)}))\b")
"""Expressions that compare the positions of two objects."""
TOWARDS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
"""Direction of each relation."""

Cells = tuple[np.ndarray, np.ndarray, np.ndarray]


def cells(scenes: list[Scene]) -> Cells:
    """Return pixels and, for the object centred in each cell, attribute classes and offset in the cell."""
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
    """Return pixels in -1..1, classes and offsets."""
    pixels, targets, offsets = (torch.from_numpy(part).to(device) for part in drawn)
    return pixels.permute(0, 3, 1, 2) / 127.5 - 1, targets, offsets


class DrawnCells(IterableDataset[Cells]):
    """Endless batches of newly drawn scenes."""

    def __init__(self, seed: int, size: int) -> None:
        self.seed, self.size = seed, size

    def __iter__(self) -> Iterator[Cells]:
        """Yield batches. Each worker draws different scenes."""
        rng = worker_rng(self.seed)
        while True:
            yield cells([sample_scene(rng) for _ in range(self.size)])


def worker_rng(seed: int) -> Random:
    """Return a random generator for this worker; without workers its seed is `seed` itself."""
    worker = get_worker_info()
    return Random(seed if worker is None else seed + 1_000_003 * (worker.id + 1))


def loader(dataset: Any, workers: int) -> DataLoader[Any]:
    """Return a data loader that passes items unchanged, because NumPy arrays need no shared memory."""
    ahead = 4 if workers else None
    return DataLoader(dataset, None, num_workers=workers, prefetch_factor=ahead, collate_fn=as_is)


def as_is(item: Any) -> Any:
    """Return the item unchanged."""
    return item


class Pixels(Dataset[Cells]):
    """Rendered scenes, in parts of `size` scenes."""

    def __init__(self, scenes: list[Scene], size: int = 500) -> None:
        self.parts = [scenes[start : start + size] for start in range(0, len(scenes), size)]

    def __len__(self) -> int:
        """Return the number of parts."""
        return len(self.parts)

    def __getitem__(self, place: int) -> Cells:
        """Return pixels, classes and offsets of a part."""
        return cells(self.parts[place])


@dataclass(frozen=True)
class Sample:
    """Source and target text, and the rows of the scenes that they are about."""

    qa: QA
    rows: tuple[int, ...]


class DrawnBatches(IterableDataset[dict[str, np.ndarray]]):
    """Endless batches, each of one kind, so that long targets are not mixed with short ones.

    Batches of captions and pairs, which are longer, are smaller. `spatial_share` of the questions are of the
    families `spatial`, which are about positions.
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
        """Yield batches. Each worker asks different questions."""
        rng = worker_rng(self.seed)
        while True:
            batch = self.draw(rng)
            yield encoded(self.tokenizer, batch) | phrases(self.tokenizer, batch, self.scenes)

    def draw(self, rng: Random) -> list[Sample]:
        """Draw one batch."""
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
        """Draw one question about a scene, or a spatial question about a crowded scene."""
        families = self.families
        if self.crowded and rng.random() < self.spatial_share:
            families, row = self.spatial, rng.choice(self.crowded)
        return Sample(with_prefix(ask(self.scenes[row], rng, families), rng), (row,))


def with_prefix(qa: QA, rng: Random) -> QA:
    """Add a task prefix to half of the questions, as in the source texts of the tasks."""
    prefix = rng.choices(["", "vqa: ", "gqa: "], [5, 4, 1])[0]
    return QA(prefix + qa.source_text, qa.target_text)


def encoded(tokenizer: Any, batch: list[Sample]) -> dict[str, np.ndarray]:
    """Return token ids of source and target texts, and the rows of the scenes."""
    source = tokenizer([s.qa.source_text for s in batch], padding=True, return_tensors="np")
    target = tokenizer([s.qa.target_text for s in batch], padding=True, return_tensors="np")
    labels = np.where(target.attention_mask == 0, IGNORE_INDEX, target.input_ids)
    rows = np.array([s.rows for s in batch], np.int64)
    texts = {"input_ids": source.input_ids, "attention_mask": source.attention_mask}
    return texts | {"labels": labels, "rows": rows}


def phrases(tokenizer: Any, batch: list[Sample], scenes: list[Scene]) -> dict[str, np.ndarray]:
    """Return what the phrases in the texts refer to, for questions about one image.

    Returns:
        `ends`: example and token where each phrase ends. `classes`: number of objects that fit it, attribute
        classes if it is a single object, and for a comparison whether it is the second phrase and whether it
        lies further in that direction. `places`: centre of the single object, in cells, and how far it lies
        in that direction (NaN if not asked).
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
    """Return how far two compared objects lie in the direction of the comparison; empty without one."""
    compares = COMPARES.search(source)
    if compares is None or [len(items) for items in found] != [1, 1]:
        return []
    right, down = TOWARDS[compares[1] or SIDES[compares[2]]]
    return [right * item.x + down * item.y for (item,) in found]


def fitting(scene: Scene, phrase: str) -> list[Object]:
    """Return the objects that fit a phrase such as `large red thing`."""
    nouns = {form for noun in NOUNS for form in (noun, f"{noun}s")}
    wanted = [word for word in phrase.split() if word not in nouns]
    # Shapes may be in the plural.
    return [
        item
        for item in scene.objects
        if all(word in (item.size, item.colour, item.shape, f"{item.shape}s") for word in wanted)
    ]
