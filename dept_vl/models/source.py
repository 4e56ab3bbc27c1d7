"""Questions and images as a pretrained model reads them: its processor, and the form that a question has.

| form                 | for                                                                              |
|----------------------|----------------------------------------------------------------------------------|
| the chat template    | models whose processor has one                                                   |
| `FORMS`              | families without one, as their authors ask them                                  |
| `--text_form`        | any text with `{text}`, and `{image}` where the image is not put in by itself     |
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Int
from PIL import Image
from torch import Tensor

from dept_vl._utils.errors import UsageError
from dept_vl._utils.io import one_line
from dept_vl.models.placeholders import text_of
from dept_vl.models.tokens import AnswerStyle, write_answers_as

CHAT = "chat"
DESCRIBE = "Describe the image."
"""Asked of a chat model where a task has no question."""
FORMS = {
    "blip-2": ("Question: {text} Answer:", "a photo of"),
    "instructblip": ("{text} Short answer:", "A short image description:"),
    "florence2": ("<VQA>{text}", "<CAPTION>"),
    "paligemma": ("{image}answer en {text}", "{image}caption en"),
}
"""Type of a model -> how it is asked a question, and asked for a caption."""
USUAL_FORM = ("{image}{text}", "{image}" + DESCRIBE)
QUESTION = "what is red"
"""Asked to learn what a processor makes of a question."""
MARK = "MARK"
"""Stands for an answer in a chat template."""
TEXT_AT_MOST = 20
"""Times that a text is shortened at most until it fits."""
PER_TOKEN = ("token_type_ids", "cross_attention_mask")
"""Suffixes of the names of inputs with a value per token."""


@dataclass(frozen=True)
class TextForm:
    """How a question is written.

    Attributes:
        ask: A text with `{text}`; `chat` for the processor's template.
        describe: What is asked where there is no question.
    """

    ask: str
    describe: str = DESCRIBE

    @classmethod
    def of(cls, given: str, processor: Any, model_type: str) -> "TextForm":
        """The form that is asked for, or the usual one of a model.

        Raises:
            UsageError: If a form has no place for the text, or there is no chat template.
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
            return cls(given)
        if template:
            return cls(CHAT)
        return cls(*FORMS.get(model_type, USUAL_FORM))


class SourceReader:
    """Makes sources of texts and images; picklable, for the processes that read images.

    Args:
        processor: Of transformers.
        form: How a question is written.
        taken: Names of what the model takes.
        image_tokens: Ids of the tokens of an image.

    Attributes:
        frame: Text tokens that the form adds to a question.
        placeholder: Token of a word, which the model treats as any other.
    """

    def __init__(
        self, processor: Any, form: TextForm, taken: Sequence[str], image_tokens: Sequence[int]
    ) -> None:
        self.processor, self.form = processor, form
        self.tokenizer = getattr(processor, "tokenizer", processor)
        self.taken = frozenset(taken) - {"labels"}
        self.image_tokens = torch.tensor(sorted(image_tokens), dtype=torch.long)
        self.nested = True
        self.frame = self.placeholder = 0

    def __call__(
        self, texts: Sequence[str], images: Sequence[Sequence[Image.Image]], longest: Sequence[int]
    ) -> dict[str, Tensor]:
        """Tokens, mask, pixels and whatever else the model reads.

        Args:
            texts: Questions, each cut so that its source has no more text than `longest`.
            images: Images of each.
            longest: Tokens of text of each, those of the form included.

        Raises:
            ValueError: If the form alone is longer.
        """
        rooms = [max(1, limit - self.frame) for limit in longest]
        cut = [self.shortened(text, room) for text, room in zip(texts, rooms, strict=True)]
        for _ in range(TEXT_AT_MOST):
            source = self.process(cut, images)
            # Tokens merge where question and form meet, so that what fits alone may not fit.
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

    def process(self, texts: Sequence[str], images: Sequence[Sequence[Image.Image]]) -> dict[str, Tensor]:
        """What the processor makes of texts, in their form, and images."""
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
        made = self.processor(**options)
        return {name: value for name, value in made.items() if name in self.taken and torch.is_tensor(value)}

    def written(self, text: str, images: int) -> str:
        """A question in its form."""
        if self.form.ask == CHAT:
            asked: str = self.processor.apply_chat_template(
                self.conversation(text, images), add_generation_prompt=True, tokenize=False
            )
            return asked
        image = getattr(self.processor, "boi_token", None) or getattr(self.processor, "image_token", None)
        form = self.form.ask if text else self.form.describe
        return form.replace("{image}", str(image or "") * images).replace("{text}", text)

    def conversation(self, text: str, images: int) -> list[dict[str, Any]]:
        """A question as a message of a user."""
        content: list[dict[str, Any]] = [{"type": "image"}] * images
        return [{"role": "user", "content": [*content, {"type": "text", "text": text or self.form.describe}]}]

    def shortened(self, text: str, tokens: int) -> str:
        """The first tokens of a text."""
        ids = self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        return text if len(ids) <= tokens else self.tokenizer.decode(ids[:tokens])

    def is_text(
        self, ids: Int[Tensor, "batch source"], mask: Bool[Tensor, "batch source"]
    ) -> Bool[Tensor, "batch source"]:
        """See `placeholders.text_of`."""
        return text_of(ids, mask, self.image_tokens)

    def learn(
        self, image: int | None, name: str, *, encoder_decoder: bool, reads_images: bool = True
    ) -> None:
        """Find what the form adds to a question, which tokens are an image's, and how an answer continues.

        Args:
            image: Token of an image, as the model's configuration has it.
            name: Of the model, for messages.
            encoder_decoder: Whether an answer is a sequence of its own.
            reads_images: Whether it is asked with an image.

        Raises:
            ValueError: If the processor makes nothing of a question, or is not the model's.
        """
        blank = [Image.new("RGB", (64, 64))] * reads_images
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
                    f"the processor of {name} is not its model's: expected tokens {image} for an image, as "
                    "in config.json, found none; put the processor beside the model that it belongs to"
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
        """Find how an answer continues a source, and what ends it."""
        tokenizer = self.tokenizer
        end = tokenizer.eos_token_id
        if encoder_decoder:
            if tokenizer(MARK).input_ids[-1] != end:  # T5Gemma's ends no text by itself
                write_answers_as(tokenizer, AnswerStyle(lead="", end=end, start=1))
            return
        if self.form.ask == CHAT:
            answer = {"role": "assistant", "content": [{"type": "text", "text": MARK}]}
            whole = self.processor.apply_chat_template(
                [*self.conversation(QUESTION, images), answer], tokenize=False
            )
            behind = tokenizer(whole.partition(MARK)[2].strip(), add_special_tokens=False).input_ids
            end = next((n for n in behind[:1] if n in special), end)
        open_ = tokenizer.decode(ids[-4:])[-1:]
        write_answers_as(tokenizer, AnswerStyle(lead="\n" if open_.isspace() else None, end=end, start=0))


def _with_fences(ids: list[int], image: int, special: set[int]) -> list[int]:
    """The token of an image, and the special tokens that stand around its first and last."""
    fences = {image}
    for step, place in ((-1, ids.index(image)), (1, len(ids) - 1 - ids[::-1].index(image))):
        beside = place + step
        while 0 <= beside < len(ids) and ids[beside] in special:
            fences.add(ids[beside])
            beside += step
    return sorted(fences)
