"""From examples to tensors: targets, batches, and which example comes when."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from dept_vl.config import OnBadImage
from dept_vl.data.features import FeatureTable, load_pixels
from dept_vl.models.prompted import PromptedModel
from dept_vl.models.tokens import IGNORE_INDEX, target_ids
from dept_vl.models.vision import VisionEncoder
from dept_vl.tasks.base import Example
from dept_vl.tasks.io.predictions import ExampleId


@dataclass(frozen=True)
class Batch:
    """Tensors of one batch; text and targets are padded on the right, to the longest here.

    `skipped` names the examples that were left out because their image could not be read; `choices` are
    the only answers to each, of questions that have them.
    """

    ids: tuple[ExampleId, ...]
    input_ids: Int[Tensor, "batch text"]
    attention_mask: Int[Tensor, "batch text"]
    labels: Int[Tensor, "batch target"] | None = None
    weights: Float[Tensor, " batch"] | None = None
    pixel_values: Float[Tensor, "batch images 3 height width"] | None = None
    visual_features: Float[Tensor, "batch images tokens d_vision"] | None = None
    skipped: tuple[ExampleId, ...] = ()
    choices: tuple[tuple[str, ...], ...] = ()

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


@dataclass(frozen=True)
class Collator:
    """Tokenise and pad a list of draws, and add their images.

    Attributes:
        tokenizer: Of the backbone.
        max_source_length: Texts are cut to this many tokens.
        max_target_length: Likewise for answers.
        images: A table of features, or the encoder whose preprocessing makes pixels; None for text.
        on_bad_image: Stop with the file's name, or leave the example out and name it in the batch.
        pad_to_multiple_of: Texts and answers are padded to the longest of the batch, and on to a multiple
            of this; of texts no further than `max_source_length`, the prompt's last position.
    """

    tokenizer: Any
    max_source_length: int
    max_target_length: int
    images: FeatureTable | VisionEncoder | None = None
    on_bad_image: OnBadImage = "raise"
    pad_to_multiple_of: int = 1

    @classmethod
    def for_model(
        cls,
        model: PromptedModel,
        max_target_length: int,
        *,
        max_source_length: int | None = None,
        images: FeatureTable | VisionEncoder | None = None,
        on_bad_image: OnBadImage = "raise",
        device: torch.device | None = None,
    ) -> "Collator":
        """Return the collator whose batches a model reads.

        Args:
            model: Model whose tokenizer makes the tokens.
            max_target_length: See the attributes.
            max_source_length: See the attributes; None takes the prompt's.
            images: See the attributes.
            on_bad_image: See the attributes.
            device: Device that computes: tensor cores work on tiles of 8, so a GPU pads to multiples of 8.

        Raises:
            ValueError: If neither the model's prompt nor `max_source_length` says how long a text may be.
        """
        if max_source_length is None:
            if model.prompt is None:
                raise ValueError(
                    "a model without a prompt does not say how long texts are: max_source_length"
                )
            max_source_length = model.prompt.max_source_length
        return cls(
            model.backbone.tokenizer,
            max_source_length=max_source_length,
            max_target_length=max_target_length,
            images=images,
            on_bad_image=on_bad_image,
            pad_to_multiple_of=8 if device is not None and device.type == "cuda" else 1,
        )

    def __call__(self, draws: Sequence[Draw]) -> Batch:
        """A batch; labels and weights only if the draws have targets.

        Raises:
            ValueError: If an image cannot be read and examples are not skipped, naming both; or if a
                text has no token.
        """
        draws, visual, skipped = self._read_images(draws)
        ids = tuple(draw.example.example_id for draw in draws)
        if not draws:
            none = torch.empty(0, 0, dtype=torch.long)
            return Batch(ids, none, none, skipped=skipped)
        source = self.tokenizer(
            [draw.example.source_text for draw in draws],
            max_length=self.max_source_length,
            truncation=True,
            padding=True,
            return_tensors="pt",
        )
        _check_texts(ids, source.attention_mask)
        # Not by the tokenizer, which cuts at multiples alone.
        width = source.input_ids.shape[1]
        further = min(-width % self.pad_to_multiple_of, self.max_source_length - width)
        input_ids = nn.functional.pad(source.input_ids, (0, further), value=self.tokenizer.pad_token_id)
        mask = nn.functional.pad(source.attention_mask, (0, further))
        choices = tuple(draw.example.choices for draw in draws)
        batch = Batch(
            ids, input_ids, mask, skipped=skipped, choices=choices if any(choices) else (), **visual
        )
        answers = [draw.target for draw in draws if draw.target is not None]
        if not answers:
            return batch
        targets = target_ids(self.tokenizer, answers, self.max_target_length)
        labels = pad_sequence(
            [torch.tensor(target) for target in targets], batch_first=True, padding_value=IGNORE_INDEX
        )
        further = -labels.shape[1] % self.pad_to_multiple_of
        labels = nn.functional.pad(labels, (0, further), value=IGNORE_INDEX)
        weights = torch.tensor([draw.weight for draw in draws], dtype=torch.float32)
        return replace(batch, labels=labels, weights=weights)

    def _read_images(
        self, draws: Sequence[Draw]
    ) -> tuple[Sequence[Draw], dict[str, Tensor], tuple[ExampleId, ...]]:
        """The draws whose images are there, the images, and the ids of the other draws."""
        if self.images is None or not draws[0].example.images:
            return draws, {}, ()
        read = self.images if isinstance(self.images, FeatureTable) else _PixelReader(self.images)
        kept, skipped = [], []
        for draw in draws:
            try:
                read.check(draw.example.images)
                kept.append(draw)
            except (ValueError, FileNotFoundError) as error:
                if self.on_bad_image == "raise":
                    raise ValueError(
                        f"example {draw.example.example_id!r}: {error}. "
                        "--on_bad_image skip goes on without it"
                    ) from None
                skipped.append(draw.example.example_id)
        name = "visual_features" if isinstance(self.images, FeatureTable) else "pixel_values"
        return kept, {name: read([draw.example.images for draw in kept])} if kept else {}, tuple(skipped)


def _check_texts(ids: Sequence[ExampleId], mask: Int[Tensor, "batch text"]) -> None:
    for example_id, length in zip(ids, mask.sum(1).tolist(), strict=True):
        if length == 0:
            raise ValueError(
                f"example {example_id!r} has no text to read; give it one, a task prefix at least"
            )


class _PixelReader:
    """Pixels of an example's images; an image that stands in a batch twice is read once."""

    def __init__(self, vision: VisionEncoder) -> None:
        self.vision = vision
        self.pixels: dict[Path, Tensor] = {}

    def check(self, paths: Sequence[Path]) -> None:
        for path in paths:
            if path not in self.pixels:
                self.pixels[path] = load_pixels(self.vision, path)

    def __call__(self, examples: Sequence[Sequence[Path]]) -> Float[Tensor, "batch images 3 height width"]:
        pixels = torch.stack([self.pixels[path] for paths in examples for path in paths])
        return pixels.view(len(examples), -1, *pixels.shape[1:])
