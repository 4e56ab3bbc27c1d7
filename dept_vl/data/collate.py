"""Collation of examples into batches of tensors."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import send_to_device
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from dept_vl._utils.images import ImageSource, read_image
from dept_vl.config import OnBadImage
from dept_vl.data.encoded import EncodedSources
from dept_vl.data.features import FeatureTable, load_pixels
from dept_vl.models.image_features import FEATURES, PIXELS
from dept_vl.models.prompted import PromptedModel
from dept_vl.models.source import SourceReader
from dept_vl.models.tokens import IGNORE_INDEX, target_ids, tokenised
from dept_vl.models.vision import VisionEncoder
from dept_vl.tasks import TASKS
from dept_vl.tasks.base import Example
from dept_vl.tasks.io.predictions import ExampleId

INPUTS = ("input_ids", "attention_mask", "pixel_values", "visual_features")
BLANK = (64, 64)
"""Size of the blank image that replaces an image with known features."""


@dataclass(frozen=True)
class Batch:
    """Tensors of one batch. Texts and targets are padded on the right to the longest in the batch.

    `processed` holds the other outputs of a pretrained model's processor, `skipped` the ids of examples whose
    image could not be read, and `choices` the only valid answers to each question (empty if none has any).
    """

    ids: tuple[ExampleId, ...]
    input_ids: Int[Tensor, "batch text"]
    attention_mask: Int[Tensor, "batch text"]
    labels: Int[Tensor, "batch target"] | None = None
    weights: Float[Tensor, " batch"] | None = None
    pixel_values: Float[Tensor, "batch images 3 height width"] | None = None
    visual_features: Float[Tensor, "batch images tokens d_vision"] | None = None
    processed: dict[str, Tensor] | None = None
    skipped: tuple[ExampleId, ...] = ()
    choices: tuple[tuple[str, ...], ...] = ()

    def to(self, device: torch.device) -> "Batch":
        """Return the batch on a device."""
        # Without ids and choices: looking through them takes longer than a copy.
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, Tensor | dict)}
        return replace(self, **send_to_device(tensors, device, non_blocking=True))

    def inputs(self) -> dict[str, Any]:
        """Return the keyword arguments for `PromptedModel.generate`."""
        inputs = {name: getattr(self, name) for name in INPUTS}
        return inputs if self.processed is None else {**inputs, "processed": self.processed}

    def training_inputs(self) -> dict[str, Any]:
        """Return the keyword arguments for `PromptedModel.forward`."""
        return {**self.inputs(), "labels": self.labels, "weights": self.weights}


@dataclass(frozen=True)
class Draw:
    """An example with the target drawn for this step; evaluation has no target."""

    example: Example
    target: str | None = None
    weight: float = 1.0


@dataclass(frozen=True)
class Collator:
    """Collator that tokenises and pads a list of draws and adds their images."""

    tokenizer: Any  # of the backbone
    max_source_length: int  # in tokens; longer texts are truncated
    max_target_length: int  # in tokens; longer targets are truncated
    images: FeatureTable | VisionEncoder | None = None  # features, or the encoder that prepares pixels
    on_bad_image: OnBadImage = "raise"  # raise an error, or skip the example and name it
    processor: SourceReader | None = None  # of a pretrained model; `images` is then a table or None
    exif: bool = True  # whether the processor gets images turned by their EXIF orientation
    encoded: EncodedSources | None = None  # encoder outputs; images are then not read
    pad_to_multiple_of: int = 1  # texts to `max_source_length` at most

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
        """Return the collator for a model.

        Texts have at most the length of the prompt, unless `max_source_length` is given. On a GPU lengths are
        padded to multiples of 8, for its tensor cores.
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
            processor=model.backbone.processor,
            exif=model.backbone.exif is not False,
            pad_to_multiple_of=8 if device is not None and device.type == "cuda" else 1,
        )

    def __call__(self, draws: Sequence[Draw]) -> Batch:
        """Return the batch of these draws. Draws with targets add labels and weights.

        Raises:
            ValueError: If an image cannot be read and `on_bad_image` is "raise", or a text has no tokens.
        """
        draws, visual, skipped = self._read_images(draws)
        ids = tuple(draw.example.example_id for draw in draws)
        if not draws:
            none = torch.empty(0, 0, dtype=torch.long)
            return Batch(ids, none, none, skipped=skipped)
        choices = tuple(draw.example.choices for draw in draws)
        texts = [draw.example.source_text for draw in draws]
        if self.processor is None:
            source = self._source(texts)
        else:
            images, features = visual.pop("files"), visual.pop("visual_features", None)
            source = process(self.processor, texts, images, [self.max_source_length] * len(texts), features)
        _check_texts(ids, source["attention_mask"])
        if self.encoded is not None:
            source |= self.encoded([draw.example for draw in draws])
        batch = Batch(
            ids,
            source.pop("input_ids"),
            source.pop("attention_mask"),
            processed=source or None,
            skipped=skipped,
            choices=choices if any(choices) else (),
            **visual,
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

    def of_examples(self, examples: Sequence[Example]) -> Batch:
        """Return a batch without targets."""
        return self([Draw(example) for example in examples])

    def _source(self, texts: list[str]) -> dict[str, Tensor]:
        """Return the token ids and attention mask of texts."""
        options = {"max_length": self.max_source_length, "truncation": True, "padding": True}
        source = tokenised(self.tokenizer, texts, return_tensors="pt", **options)
        # The tokenizer's own `pad_to_multiple_of` would exceed `max_source_length`.
        width = source.input_ids.shape[1]
        further = min(-width % self.pad_to_multiple_of, self.max_source_length - width)
        input_ids = nn.functional.pad(source.input_ids, (0, further), value=self.tokenizer.pad_token_id)
        return {
            "input_ids": input_ids,
            "attention_mask": nn.functional.pad(source.attention_mask, (0, further)),
        }

    def _read_images(
        self, draws: Sequence[Draw]
    ) -> tuple[Sequence[Draw], dict[str, Any], tuple[ExampleId, ...]]:
        """Return the draws with readable images, their images, and the ids of the other draws."""
        read: FeatureTable | _ImageReader
        if self.encoded is not None:
            kept, skipped = self._readable(draws, self.encoded.check)
            return kept, {}, skipped
        if self.processor is not None and not isinstance(self.images, FeatureTable):
            read, name = _ImageReader(partial(read_for, self.processor, exif=self.exif)), "files"
        elif self.images is None or not draws[0].example.images:
            return draws, {} if self.processor is None else {"files": [[]] * len(draws)}, ()
        elif isinstance(self.images, FeatureTable):
            read, name = self.images, "visual_features"
        else:
            read, name = _ImageReader(partial(load_pixels, self.images)), "pixel_values"
        kept, skipped = self._readable(draws, read.check)
        images = [draw.example.images for draw in kept]
        visual: dict[str, Any] = {name: read(images)} if kept else {}
        if kept and name == "pixel_values":
            visual[name] = torch.stack([torch.stack(pixels) for pixels in visual[name]])
        if self.processor is not None and name != "files":  # blank images make as many tokens as real ones
            visual["files"] = [[Image.new("RGB", BLANK)] * len(of_one) for of_one in images]
        return kept, visual, skipped

    def _readable(
        self, draws: Sequence[Draw], check: Callable[[Sequence[Path]], None]
    ) -> tuple[list[Draw], tuple[ExampleId, ...]]:
        """Return the draws whose images can be read, and the ids of the others."""
        kept, skipped = [], []
        for draw in draws:
            try:
                check(draw.example.images)
                kept.append(draw)
            except (ValueError, FileNotFoundError) as error:
                if self.on_bad_image == "raise":
                    raise ValueError(
                        f"example {draw.example.example_id!r}: {error}. "
                        "Pass --on_bad_image skip to leave out examples with unreadable images"
                    ) from None
                skipped.append(draw.example.example_id)
        return kept, tuple(skipped)


def _check_texts(ids: Sequence[ExampleId], mask: Int[Tensor, "batch text"]) -> None:
    for example_id, length in zip(ids, mask.sum(1).tolist(), strict=True):
        if length == 0:
            raise ValueError(
                f"example {example_id!r} has no text to read; give it one, a task prefix at least"
            )


def process(
    processor: SourceReader,
    texts: Sequence[str],
    images: Sequence[Sequence[Image.Image]],
    longest: Sequence[int],
    features: Float[Tensor, "batch images tokens d_vision"] | None = None,
) -> dict[str, Tensor]:
    """Return the inputs of a pretrained model, for texts without the prefixes of our tasks.

    `longest` is the maximum length of each text, in tokens. If `features` are given, they replace the pixels.
    """
    source = processor([without_prefix(text) for text in texts], images, longest)
    if features is not None:
        del source[PIXELS]
        source[FEATURES] = features.flatten(0, 1)
    return source


def read_for(processor: SourceReader, source: ImageSource, *, exif: bool) -> Image.Image:
    """Read an image and check its shape for a model."""
    image = read_image(source, exif=exif)
    processor.check_image(image)
    return image


class _ImageReader:
    """Reader of the images of a batch. Each image is read once, even if it occurs several times."""

    def __init__(self, read: Callable[[ImageSource], Any]) -> None:
        self.read = read
        self.known: dict[Any, Any] = {}

    def check(self, sources: Sequence[ImageSource]) -> None:
        for source in sources:
            if key_of(source) not in self.known:
                self.known[key_of(source)] = self.read(source)

    def __call__(self, examples: Sequence[Sequence[ImageSource]]) -> list[list[Any]]:
        return [[self.known[key_of(source)] for source in sources] for sources in examples]


def key_of(source: ImageSource | Tensor) -> Any:
    """Return the key by which repeated images are recognised: the object's id, or the path."""
    return id(source) if isinstance(source, Image.Image | Tensor) else source


def without_prefix(text: str) -> str:
    """Return a text without the prefix of a task."""
    for task in TASKS.values():
        if task.prefix and text.startswith(task.prefix):
            return text.removeprefix(task.prefix).strip()
    return text
