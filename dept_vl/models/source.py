"""Preprocessing of questions and images for a pretrained model, with its processor and a form of questions.

| form              | used for                                                                         |
|-------------------|----------------------------------------------------------------------------------|
| the chat template | models whose processor has one                                                   |
| `FORMS`           | model types without one, in the form of their authors                            |
| `--text_form`     | any text with `{text}`, and `{image}` if the processor does not insert the image |
"""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Int
from PIL import Image
from torch import Tensor
from transformers import PreTrainedModel

from dept_vl._utils.errors import UsageError
from dept_vl._utils.images import check_shape
from dept_vl._utils.io import one_line
from dept_vl._utils.printable import warn
from dept_vl.models.prompt_hook import is_encoder_decoder, text_of
from dept_vl.models.tokens import AFTER_WORD, AnswerStyle, tokenised

CHAT = "chat"
DESCRIBE = "Describe the image."
"""Question to a chat model in tasks without questions."""
FORMS = {
    "blip-2": ("Question: {text} Answer:", "a photo of"),
    "instructblip": ("{text} Short answer:", "A short image description:"),
    "florence2": ("<VQA>{text}", "<CAPTION>"),
    "paligemma": ("{image}answer en {text}", "{image}caption en"),
}
"""Forms for questions and for captions, by model type."""
USUAL_FORM = ("{image}{text}", "{image}" + DESCRIBE)
QUESTION = "what is red"
"""Test question to inspect the output of a processor."""
MARK = "MARK"
"""Answer that is used to inspect a chat template."""
TEXT_AT_MOST = 20
"""Maximum number of attempts to shorten a text until it fits."""
QFORMER = "qformer_"
"""Prefix of the names of InstructBLIP's inputs to its Q-Former, which reads the text too."""
PER_TOKEN = ("token_type_ids", "cross_attention_mask")
"""Suffixes of the names of inputs that have a value per token."""


@dataclass(frozen=True)
class TextForm:
    """Template of the text that a model is given with an image."""

    ask: str  # text with `{text}` in place of the question, or `chat` for the processor's chat template
    describe: str = DESCRIBE  # text that is used if there is no question

    @classmethod
    def of(cls, given: str, processor: Any, model_type: str) -> "TextForm":
        """Return the given form, or the usual form of a model type if `given` is empty.

        Raises:
            UsageError: If `given` has no `{text}`, or is `chat` and there is no chat template.
        """
        template = getattr(processor, "chat_template", None)
        if given == CHAT and not template:
            raise UsageError(
                f"--text_form chat needs a chat template, and the processor of this {model_type} has none; "
                "give a text with {text}, or leave it out"
            )
        if given and given != CHAT:
            if "{text}" not in given:
                raise UsageError(f"--text_form is a text with {{text}} in it, or chat; found {given!r:.80}")
            return cls(given, "{image}" * ("{image}" in given) + DESCRIBE)
        if template:
            return cls(CHAT)
        return cls(*FORMS.get(model_type, USUAL_FORM))


class SourceReader:
    """Preprocessor of texts and images for a pretrained model. It is picklable, for worker processes.

    A test question shows how the processor reads it. `image` is the id of the image token, if there is one.

    Attributes:
        qformer_positions: Number of text tokens that InstructBLIP's Q-Former can read; None without one.
        frame: Number of text tokens that the form adds to a question.
        placeholder: Id of the token of an ordinary word.

    Raises:
        ValueError: If the processor fails on the test question, or does not belong to the model.
    """

    def __init__(
        self, processor: Any, form: TextForm, model: PreTrainedModel, name: str, image: int | None
    ) -> None:
        self.processor, self.form = processor, form
        self.tokenizer = getattr(processor, "tokenizer", processor)
        self.taken = frozenset(inspect.signature(model.forward).parameters) - {"labels"}
        qformer = getattr(model.config, "qformer_config", None)
        self.qformer_positions: int | None = getattr(qformer, "max_position_embeddings", None)
        self.image_tokens = torch.tensor([] if image is None else [image], dtype=torch.long)
        self.nested = True
        self.frame = self.placeholder = 0
        self._learn(image, name, encoder_decoder=is_encoder_decoder(model.config))

    def __call__(
        self, texts: Sequence[str], images: Sequence[Sequence[Image.Image]], longest: Sequence[int]
    ) -> dict[str, Tensor]:
        """Return the model inputs of questions and images: token ids, mask, pixels and others.

        Questions have at most `longest` text tokens, including those of the form.

        Raises:
            ValueError: If the form alone is longer than `longest`.
        """
        rooms = [max(1, limit - self.frame) for limit in longest]
        cut = [self.shortened(text, room) for text, room in zip(texts, rooms, strict=True)]
        for _ in range(TEXT_AT_MOST):
            source = self.process(cut, images)
            # Question and form are tokenised together, which can give more tokens than separately.
            lengths = self.is_text(source["input_ids"], source["attention_mask"].bool()).sum(1)
            over = (lengths - torch.tensor(longest)).tolist()
            if max(over) <= 0:
                return source
            rooms = [room - max(0, more) for room, more in zip(rooms, over, strict=True)]
            if min(rooms) < 1:
                break
            cut = [self.shortened(text, room) for text, room in zip(cut, rooms, strict=True)]
        raise ValueError(
            f"the form of a question alone has more than {min(longest)} tokens; raise max_source_length"
        )

    def check_image(self, image: Image.Image) -> None:
        """Check the size of an image before processing it; see `images.check_shape`."""
        size = dict(getattr(getattr(self.processor, "image_processor", None), "size", None) or {})
        # Beside a longest edge, it limits the number of pixels.
        check_shape(*image.size, None if "longest_edge" in size else size.get("shortest_edge"))

    def process(self, texts: Sequence[str], images: Sequence[Sequence[Image.Image]]) -> dict[str, Tensor]:
        """Return the processor's output for texts, in their form, and images."""
        counts = [len(of_one) for of_one in images]
        written = [self.written(text, count) for text, count in zip(texts, counts, strict=True)]
        options: dict[str, Any] = {"text": written, "padding": True, "return_tensors": "pt"}
        if any(counts):
            options["images"] = (
                [list(of_one) for of_one in images]
                if self.nested
                else [i for of_one in images for i in of_one]
            )
        start = self.tokenizer.bos_token
        if self.form.ask == CHAT and start and written[0].startswith(start):
            options["add_special_tokens"] = False  # the template has put it there
        made = tokenised(self.processor, **options)
        source = {
            name: value for name, value in made.items() if name in self.taken and torch.is_tensor(value)
        }
        return source | self._cut_for_qformer(source)

    def _cut_for_qformer(self, source: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the Q-Former's text, cut to its positions; the language model reads the whole text."""
        texts = {name: row for name, row in source.items() if name.startswith(QFORMER)}
        if self.qformer_positions is None or all(
            len(row[0]) <= self.qformer_positions for row in texts.values()
        ):
            return {}
        warn(
            f"the Q-Former reads the first {self.qformer_positions} tokens of a text; one is longer",
            stacklevel=4,
        )
        return {name: row[:, : self.qformer_positions] for name, row in texts.items()}

    def written(self, text: str, images: int) -> str:
        """Return the text that the model reads for a question, in the form of its processor."""
        if self.form.ask == CHAT:
            asked: str = self.processor.apply_chat_template(
                self.conversation(text, images), add_generation_prompt=True, tokenize=False
            )
            return asked
        image = getattr(self.processor, "boi_token", None) or getattr(self.processor, "image_token", None)
        form = self.form.ask if text else self.form.describe
        return form.replace("{image}", str(image or "") * images).replace("{text}", text)

    def conversation(self, text: str, images: int) -> list[dict[str, Any]]:
        """Return a question as a conversation with one user message."""
        content: list[dict[str, Any]] = [{"type": "image"}] * images
        return [{"role": "user", "content": [*content, {"type": "text", "text": text or self.form.describe}]}]

    def shortened(self, text: str, tokens: int) -> str:
        """Return a text truncated to a number of tokens; raise ValueError if it has tokens of images."""
        ids = tokenised(self.tokenizer, text, add_special_tokens=False, verbose=False).input_ids
        of_images = sorted(set(ids).intersection(self.image_tokens.tolist()))
        if of_images:
            raise ValueError(
                f"the question {text!r:.80} has {self.tokenizer.decode(of_images[:1])!r}, which this model "
                "reads as an image; leave it out, or write it otherwise"
            )
        return text if len(ids) <= tokens else self.tokenizer.decode(ids[:tokens])

    def is_text(
        self, ids: Int[Tensor, "batch source"], mask: Bool[Tensor, "batch source"]
    ) -> Bool[Tensor, "batch source"]:
        """Return a mask of text tokens; see `prompt_hook.text_of`."""
        return text_of(ids, mask, self.image_tokens)

    def _learn(self, image: int | None, name: str, *, encoder_decoder: bool) -> None:
        """Find `frame`, `placeholder`, the image tokens and the style of answers by a test question."""
        blank = [Image.new("RGB", (64, 64))] * (self.tokenizer is not self.processor)
        for nested in (True, False):
            self.nested = nested
            try:
                source = self.process([QUESTION], [blank])
                break
            except Exception as error:
                problem = f"{type(error).__name__}: {one_line(error)}"
        else:
            raise ValueError(
                f"the processor of {name} makes nothing of a question: {problem}; give another "
                "--text_form, or the processor that belongs to the model"
            )
        ids, tokenizer = source["input_ids"][0].tolist(), self.tokenizer
        special = {n for n, token in tokenizer.added_tokens_decoder.items() if token.special}
        special -= {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
        if image is not None:
            if image not in ids:
                raise ValueError(
                    f"the processor of {name} belongs to another model: expected tokens {image} for an "
                    "image, as in config.json, found none; put the model's own processor beside it"
                )
            self.image_tokens = torch.tensor(_with_fences(ids, image, special))
        of_text = tokenizer(QUESTION, add_special_tokens=False).input_ids
        text = self.is_text(source["input_ids"], source["attention_mask"].bool())
        self.frame = max(0, int(text.sum()) - len(of_text))
        words = [n for n in of_text if n not in special and n not in self.image_tokens.tolist()]
        if not words or tokenizer.unk_token_id in of_text:
            raise ValueError(f"the tokenizer of {name} knows no words: {QUESTION!r} becomes {of_text}")
        self.placeholder = words[0]
        self._learn_answers(ids, special, encoder_decoder, len(blank))

    def _learn_answers(self, ids: list[int], special: set[int], encoder_decoder: bool, images: int) -> None:
        """Determine how an answer follows a source, and the token that ends it."""
        tokenizer = self.tokenizer
        end = tokenizer.eos_token_id
        if encoder_decoder:
            if tokenizer(MARK).input_ids[-1] != end:  # T5Gemma's tokenizer adds no end token
                tokenizer.answer_style = AnswerStyle(lead="", end=end, start=1)
            return
        if self.form.ask == CHAT:
            answer = {"role": "assistant", "content": [{"type": "text", "text": MARK}]}
            whole = self.processor.apply_chat_template(
                [*self.conversation(QUESTION, images), answer], tokenize=False
            )
            behind = tokenizer(whole.partition(MARK)[2].strip(), add_special_tokens=False).input_ids
            end = next((n for n in behind[:1] if n in special), end)
        open_ = tokenizer.decode(ids[-4:])[-1:]
        tokenizer.answer_style = AnswerStyle(lead="\n" if open_.isspace() else AFTER_WORD, end=end, start=0)


def _with_fences(ids: list[int], image: int, special: set[int]) -> list[int]:
    """Return the image token and the special tokens next to the first and last image token."""
    fences = {image}
    for step, place in ((-1, ids.index(image)), (1, len(ids) - 1 - ids[::-1].index(image))):
        beside = place + step
        while 0 <= beside < len(ids) and ids[beside] in special:
            fences.add(ids[beside])
            beside += step
    return sorted(fences)
