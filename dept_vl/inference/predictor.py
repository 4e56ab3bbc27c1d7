"""Answer questions with an adapter.

Prompting, batching and decoding are those of evaluation, so the same question gets the same answer.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch.nn.utils.rnn import pad_sequence

from dept_vl._utils.images import ImageSource
from dept_vl._utils.printable import warn
from dept_vl._utils.terminal import Count, counted
from dept_vl.adapters.adapter import Adapter
from dept_vl.data.collate import Batch, key_of, process, read_for, without_prefix
from dept_vl.data.features import FeatureTable, load_pixels
from dept_vl.inference.decoding import generation_options, spellings
from dept_vl.inference.evaluate import written
from dept_vl.inference.given import as_images
from dept_vl.models.base import FrozenBackbone
from dept_vl.models.prompted import PromptedModel
from dept_vl.models.tokens import style_of, tokenised
from dept_vl.tasks.base import Decoding, Task
from dept_vl.tasks.io.records import brief

ENCODED_AT_ONCE = 32
"""Batch size of the vision tower."""

Images = Any
"""One image (see `given.as_image`) or several; for a task with two images per question (NLVR2), pairs."""
T = TypeVar("T")


@dataclass(frozen=True)
class Predictor:
    """An adapter on its backbone, ready to answer questions.

    Attributes:
        model: Model in evaluation mode.
        adapter: Adapter of the model; None for the backbone alone.
        task: Task that determines how questions are asked.
        decoding: Decoding settings.
        max_source_length: Number of tokens that texts are truncated to.
        run: Folder of the run that the adapter was loaded from, if any.

    Example:
        >>> import dept_vl
        >>> predictor = dept_vl.load("runs/vqa")
        >>> answers = predictor.answer("street.jpg", ["how many cars are there?", "is it day?"])
        >>> len(answers)
        2
    """

    model: PromptedModel
    adapter: Adapter | None
    task: Task
    decoding: Decoding
    max_source_length: int
    run: Path | None = None

    def answer(
        self, image: Images = None, question: str | Sequence[str] = "", *, batch_size: int = 32
    ) -> str | list[str]:
        """Answer one or several questions.

        A single image is used for all questions (and encoded once), and a single question for all images.
        Otherwise there must be as many images as questions.

        Args:
            image: A path, the bytes of a file, an open file, a data URL, a Pillow image, an array or a
                tensor of shape (height, width), (height, width, channels) or (channels, height, width) with
                integers from 0 to 255 or floats from 0 to 1, or a row of `datasets`; or several of these,
                as a sequence or as an array or tensor with four dimensions. For a task with two images per
                question (NLVR2), a pair of images or several pairs. None for a task without images.
            question: Question, or sequence of questions; not needed for captions. For a task without
                images, it can be the first argument.
            batch_size: Batch size.

        Returns:
            One answer for a single image and question, otherwise a list of answers.

        Raises:
            FileNotFoundError: If an image does not exist.
            ValueError: If an image cannot be read, the numbers of images and questions do not match, a
                question is empty, or it needs more positions than the model has.
        """
        if self.task.image_count == 0 and not question and image is not None:
            image, question = None, image
        pairs = self.task.image_count > 1
        (images, questions), single = line_up(
            images=as_images(image, pairs=pairs),
            questions=as_questions(question),
        )
        asks = [Ask(self, *one) for one in zip(questions, images, strict=True)]
        answers = [reply.text for reply in answer_all(asks, lambda _: self.model, batch_size)]
        return answers[0] if single else answers

    @cached_property
    def generation(self) -> tuple[dict[str, Any], dict[str, str]]:
        """Arguments `options` and `spelled` of `evaluate.decode`, cached because many candidates are slow."""
        tokenizer = self.model.backbone.tokenizer
        return generation_options(self.decoding, tokenizer), spellings(tokenizer, self.decoding.candidates)


@dataclass(frozen=True)
class Ask:
    """A question to a predictor."""

    predictor: Predictor
    question: str
    images: tuple[ImageSource | torch.Tensor, ...]  # tensors are pixels, as from `features.load_pixels`

    def source(self) -> str:
        """Return the text that the model reads, and warn if it is truncated or has special tokens.

        Raise ValueError if the number of images is wrong, or the question is empty or not valid Unicode.
        """
        task = self.predictor.task
        if len(self.images) != task.image_count:
            needed = "no image" if task.image_count == 0 else f"{task.image_count} for each question"
            raise ValueError(f"images of {task.name}: expected {needed}, found {len(self.images)}")
        if task.asks and not self.question.strip():
            raise ValueError(f"{task.name} answers questions, and this one is empty; ask something")
        text = task.source(self.question)
        try:
            text.encode()
        except UnicodeEncodeError as error:  # tokenizers would raise a TypeError
            raise ValueError(
                f"{text!r:.60}: expected text, found {text[error.start]!a}, which is half a character; leave "
                "it out"
            ) from None
        backbone = self.predictor.model.backbone
        tokenizer = backbone.tokenizer
        composed = backbone.processor is None
        read = text if composed else without_prefix(text)
        ids = tokenised(tokenizer, read, add_special_tokens=False, verbose=False).input_ids
        special = set(ids) & (set(tokenizer.all_special_ids) - {tokenizer.unk_token_id})
        if special:
            warn(
                f"{text!r:.60} has {tokenizer.decode(sorted(special))!r}, which the model reads as special "
                "tokens and not as text",
                stacklevel=5,
            )
        length = len(ids) + (tokenizer.num_special_tokens_to_add() if composed else 0)
        longest = self.predictor.max_source_length - backbone.frame
        if length > longest:
            warn(
                f"{text!r:.60} has {length} tokens and is cut to {longest}, as in "
                "training (max_source_length)",
                stacklevel=5,
            )
        return text


@dataclass(frozen=True)
class Reply:
    """An answer and its token counts."""

    text: str
    read: int  # number of input tokens of text and images, without the prompt
    written: int  # number of generated tokens, including the end token
    whole: bool  # whether the answer is complete; otherwise it was cut at the maximum length or time


def line_up(**parts: tuple[list[Any], bool]) -> tuple[list[list[Any]], bool]:
    """Repeat lists of one item to a common length; return the lists and whether every item was single.

    Raise ValueError if a list is empty, or the lengths do not match.
    """
    count = max(len(items) for items, _ in parts.values())
    if any(len(items) not in (1, count) or not items for items, _ in parts.values()):
        counts = " and ".join(f"{len(items)} {name}" for name, (items, _) in parts.items())
        raise ValueError(f"expected as many of each, or one for all; found {counts}")
    single = all(alone for _, alone in parts.values())
    return [items if len(items) == count else items * count for items, _ in parts.values()], single


def as_questions(given: Any) -> tuple[list[str], bool]:
    """Return the questions of `answer`, and whether one was given; ValueError if they are no texts."""
    if isinstance(given, str):
        return [given], True
    if not isinstance(given, Iterable) or isinstance(given, bytes | Mapping):
        raise ValueError(f"expected a question or a list of questions, found {brief(given)}")
    questions = list(given)
    for place, question in enumerate(questions, start=1):
        if not isinstance(question, str):
            raise ValueError(f"question {place}: expected a text, found {brief(question)}")
    return questions, False


@torch.no_grad()
def answer_all(
    asks: Sequence[Ask],
    model_of: Callable[[Sequence[Ask]], PromptedModel],
    batch_size: int,
    max_time: float | None = None,
) -> list[Reply]:
    """Answer questions in batches.

    A batch holds questions with the same decoding and number of images, possibly for different predictors
    on the same backbone; `model_of` returns the model for it. Decoding stops after `max_time` seconds.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size: expected 1 or more, found {batch_size}")
    backbone = asks[0].predictor.model.backbone
    sources = [ask.source() for ask in asks]
    batch_of = _composed(asks, sources) if backbone.processor is None else _processed(asks, sources)
    groups: dict[tuple[int, Decoding], list[int]] = {}
    for place, ask in enumerate(asks):
        groups.setdefault((len(ask.images), ask.predictor.decoding), []).append(place)
    replies: dict[int, Reply] = {}
    device, style = backbone.device, style_of(backbone.tokenizer)
    batches = [
        alike[start : start + batch_size]
        for alike in groups.values()
        for start in range(0, len(alike), batch_size)
    ]
    with Count("answering", len(asks), show=len(batches) > 1) as count:
        for places in batches:
            options, spelled = asks[places[0]].predictor.generation
            if max_time is not None:
                options = options | {"max_time": max_time}
            batch = batch_of(places).to(device)
            inputs: dict[str, Any] = batch.inputs()
            tokens = model_of([asks[n] for n in places]).generate(**inputs, **options)
            texts = written(backbone.tokenizer, tokens, spelled)
            visual = batch.visual_features
            read = batch.attention_mask.sum(1) + (0 if visual is None else visual[0, :, :, 0].numel())
            tokens = tokens[:, style.start :]
            ends = tokens == style.end
            lengths = ends.int().argmax(1) + 1
            for row, (n, text) in enumerate(zip(places, texts, strict=True)):
                whole = bool(ends[row].any())
                length = int(lengths[row]) if whole else tokens.shape[1]
                replies[n] = Reply(asks[n].predictor.task.written(text), int(read[row]), length, whole)
            count.add(len(places))
    return [replies[place] for place in range(len(asks))]


def _composed(asks: Sequence[Ask], sources: Sequence[str]) -> Callable[[Sequence[int]], Batch]:
    """Return a function from indices of questions to their batch, for a composed backbone."""
    backbone = asks[0].predictor.model.backbone
    tokenizer = backbone.tokenizer
    table, names = encode_images(backbone, [ask.images for ask in asks])

    def ids_of(n: int) -> torch.Tensor:
        longest = asks[n].predictor.max_source_length  # truncate as this adapter does
        return torch.tensor(
            tokenised(tokenizer, sources[n], max_length=longest, truncation=True).input_ids, dtype=torch.long
        )

    def batch_of(places: Sequence[int]) -> Batch:
        texts = [ids_of(n) for n in places]
        if not all(map(len, texts)):
            raise ValueError("there is no text to read; ask something, or give the task a prefix")
        images = [names[n] for n in places]
        return Batch(
            tuple(places),
            pad_sequence(texts, batch_first=True, padding_value=tokenizer.pad_token_id),
            pad_sequence([torch.ones_like(ids) for ids in texts], batch_first=True),
            visual_features=table(images) if table is not None and images[0] else None,
        )

    return batch_of


def _processed(asks: Sequence[Ask], sources: Sequence[str]) -> Callable[[Sequence[int]], Batch]:
    """Return a function from indices of questions to their batch, for a pretrained model."""
    backbone = asks[0].predictor.model.backbone
    processor = backbone.processor
    assert processor is not None
    distinct = {key_of(image): image for ask in asks for image in ask.images}
    read = {}
    for number, (key, image) in enumerate(distinct.items(), 1):
        assert not isinstance(image, torch.Tensor)  # only composed backbones get pixels
        with _numbered(number, len(distinct)):
            read[key] = read_for(processor, image, exif=backbone.exif is not False)

    def batch_of(places: Sequence[int]) -> Batch:
        made = process(
            processor,
            [sources[n] for n in places],
            [[read[key_of(image)] for image in asks[n].images] for n in places],
            [asks[n].predictor.max_source_length for n in places],
        )
        return Batch(tuple(places), made.pop("input_ids"), made.pop("attention_mask"), processed=made)

    return batch_of


@contextmanager
def _numbered(number: int, count: int) -> Iterator[None]:
    """Add the number of the image to an error if there are several images."""
    try:
        yield
    except (ValueError, FileNotFoundError) as error:
        place = f"image {number} of {count}: " if count > 1 else ""
        raise type(error)(f"{place}{error}") from None


def encode_images(
    backbone: FrozenBackbone, groups: Sequence[tuple[ImageSource | torch.Tensor, ...]]
) -> tuple[FeatureTable | None, list[tuple[Path, ...]]]:
    """Encode groups of images; return a table of features, and the names of each group's images in it.

    An image or file that occurs several times is read and encoded once. Without a vision tower or without
    images, the table is None. Errors of reading have the number of the image, if there are several.
    """
    vision = backbone.vision
    distinct = {key_of(image): image for group in groups for image in group}
    name_of = {key: Path(f"image-{number}") for number, key in enumerate(distinct)}
    names = [tuple(name_of[key_of(image)] for image in group) for group in groups]
    if vision is None or not distinct:
        return None, names
    device = next(vision.parameters()).device
    images, parts = list(distinct.values()), []
    starts = range(0, len(images), ENCODED_AT_ONCE)
    for start in counted("encoding images", starts, len(starts), show=len(starts) > 1):
        pixels = []
        for number, image in enumerate(images[start : start + ENCODED_AT_ONCE], start + 1):
            with _numbered(number, len(images)):
                pixels.append(image if isinstance(image, torch.Tensor) else load_pixels(vision, image))
        parts.append(vision(torch.stack(pixels).to(device)).float().cpu())
    places = {name: (0, number) for number, name in enumerate(name_of.values())}
    return FeatureTable([torch.cat(parts)], places, {}), names
