"""From examples to tensors: targets, batches, and which example comes when."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from itertools import chain
from random import Random
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from dept_vl.features import FeatureTable, load_pixels
from dept_vl.model import IGNORE_INDEX
from dept_vl.tasks.example import Example, ExampleId, Task
from dept_vl.vision import VisionEncoder


@dataclass(frozen=True)
class Batch:
    """Tensors of one batch; text and targets are padded on the right, to the longest here."""

    ids: tuple[ExampleId, ...]
    input_ids: Int[Tensor, "batch text"]
    attention_mask: Int[Tensor, "batch text"]
    labels: Int[Tensor, "batch target"] | None = None
    weights: Float[Tensor, " batch"] | None = None
    pixel_values: Float[Tensor, "batch images 3 height width"] | None = None
    visual_features: Float[Tensor, "batch images tokens d_vision"] | None = None

    def to(self, device: torch.device) -> "Batch":
        """The same batch on a device."""
        moved: dict[str, Any] = {
            field.name: value.to(device, non_blocking=True)
            for field in fields(self)
            if isinstance(value := getattr(self, field.name), Tensor)
        }
        return replace(self, **moved)

    def inputs(self) -> dict[str, Tensor | None]:
        """What `PromptedModel.generate` takes."""
        return {
            "input_ids": self.input_ids,
            "attention_mask": self.attention_mask,
            "pixel_values": self.pixel_values,
            "visual_features": self.visual_features,
        }

    def training_inputs(self) -> dict[str, Tensor | None]:
        """What `PromptedModel.forward` takes."""
        return {**self.inputs(), "labels": self.labels, "weights": self.weights}


@dataclass(frozen=True)
class Draw:
    """An example with the answer chosen for this turn (none in evaluation)."""

    example: Example
    target: str | None = None
    weight: float = 1.0


class Collator:
    """Tokenise and pad a list of draws, and add their images.

    Args:
        tokenizer: Of the backbone.
        max_source_length: Texts are cut to this many tokens.
        max_target_length: Likewise for answers.
        images: A table of features, or the encoder whose preprocessing makes pixels; None for text.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        max_source_length: int,
        max_target_length: int,
        images: FeatureTable | VisionEncoder | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.max_source_length = max_source_length
        self.max_target_length = max_target_length
        self.images = images

    def __call__(self, draws: Sequence[Draw]) -> Batch:
        """A batch; labels and weights only if the draws have targets."""
        source = self.tokenizer(
            [draw.example.source_text for draw in draws],
            max_length=self.max_source_length,
            truncation=True,
            padding=True,
            return_tensors="pt",
        )
        batch = Batch(
            ids=tuple(draw.example.example_id for draw in draws),
            input_ids=source.input_ids,
            attention_mask=source.attention_mask,
        )
        if draws[0].target is not None:
            target = self.tokenizer(
                text_target=[draw.target for draw in draws],
                max_length=self.max_target_length,
                truncation=True,
                padding=True,
                return_tensors="pt",
            )
            labels = target.input_ids.masked_fill(target.attention_mask == 0, IGNORE_INDEX)
            weights = torch.tensor([draw.weight for draw in draws], dtype=torch.float32)
            batch = replace(batch, labels=labels, weights=weights)
        return self._with_images(batch, [draw.example.images for draw in draws])

    def _with_images(self, batch: Batch, images: list[Any]) -> Batch:
        if not images[0] or self.images is None:
            return batch
        if isinstance(self.images, FeatureTable):
            return replace(batch, visual_features=self.images(images))
        vision = self.images
        pixels = {path: load_pixels(vision, path) for path in dict.fromkeys(chain.from_iterable(images))}
        rows = [torch.stack([pixels[path] for path in paths]) for paths in images]
        return replace(batch, pixel_values=torch.stack(rows))


class TrainingDraws(Dataset[Draw]):
    """The endless stream of draws: number n is example n mod len in epoch n div len.

    The answer is chosen with probability proportional to its score (VL-T5), from the seed and n
    alone, so it depends on no process, worker or restart.
    """

    def __init__(self, task: Task, seed: int) -> None:
        self.task, self.seed = task, seed

    def __getitem__(self, number: int) -> Draw:
        example = self.task[number % len(self.task)]
        texts, scores = zip(*example.targets, strict=True)
        choice = Random(f"{self.seed} {number}").choices(range(len(texts)), scores)[0]
        return Draw(example, texts[choice], scores[choice])


class EvaluationDraws(Dataset[Draw]):
    """Every example once, without a target."""

    def __init__(self, task: Task) -> None:
        self.task = task

    def __len__(self) -> int:
        return len(self.task)

    def __getitem__(self, index: int) -> Draw:
        return Draw(self.task[index])


class TrainingBatches(Sampler[list[int]]):
    """This process's share of every batch: draw numbers, in an order fixed by the seed.

    Each epoch is one permutation of the examples and batches run across its end, so every global
    batch is full and the same whatever the number of processes.

    Args:
        example_count: Examples in an epoch.
        batch_size: Of one process.
        seed: Of the permutations.
        process, processes: Which of how many.
    """

    def __init__(
        self,
        example_count: int,
        batch_size: int,
        *,
        seed: int,
        process: int = 0,
        processes: int = 1,
    ) -> None:
        self.example_count = example_count
        self.batch_size = batch_size
        self.seed = seed
        self.process = process
        self.processes = processes

    def __iter__(self) -> Iterator[list[int]]:
        numbers = self._numbers()
        while True:
            whole = [next(numbers) for _ in range(self.batch_size * self.processes)]
            yield whole[self.process * self.batch_size : (self.process + 1) * self.batch_size]

    def _numbers(self) -> Iterator[int]:
        epoch = 0
        while True:
            order = list(range(self.example_count))
            Random(f"{self.seed} {epoch}").shuffle(order)
            yield from (epoch * self.example_count + index for index in order)
            epoch += 1
