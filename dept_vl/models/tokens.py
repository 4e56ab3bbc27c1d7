"""Answers as tokens: what is learnt, what may be generated, and back to text.

An encoder-decoder's answer is a sequence of its own. A decoder-only model's continues where its text
stops, so its tokens are those that the tokenizer would make of it in "text answer", and the end of text.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jaxtyping import Int
from torch import Tensor

IGNORE_INDEX = -100
"""Label of a position that the loss does not count."""
WORD = "a"
"""Stands for the text in front of an answer; which it is does not matter to the tokens after a space."""


@dataclass(frozen=True)
class AnswerStyle:
    """How the answers of a pretrained model are written, where its tokenizer alone does not tell.

    Attributes:
        lead: What stands before an answer, with no space between; None for a word and a space.
        end: Token that ends an answer.
        start: Tokens in front of a generated answer: 1 for a decoder's start.
    """

    lead: str | None
    end: int
    start: int


def write_answers_as(tokenizer: Any, style: AnswerStyle) -> None:
    """Have a tokenizer's answers written in a style, everywhere and in worker processes too."""
    tokenizer.answer_style = style


def start_tokens(tokenizer: Any) -> int:
    """Tokens in front of a generated answer: an encoder-decoder's first is the decoder's start."""
    style: AnswerStyle | None = getattr(tokenizer, "answer_style", None)
    return style.start if style else int(not continues_text(tokenizer))


def end_token(tokenizer: Any) -> int:
    """Token that ends an answer."""
    style: AnswerStyle | None = getattr(tokenizer, "answer_style", None)
    end: int = tokenizer.eos_token_id if style is None else style.end
    return end


def continues_text(tokenizer: Any) -> bool:
    """Whether answers continue the sequence of their text.

    The tokenizer tells: that of a decoder-only model leaves a text open, that of an encoder-decoder ends it
    (T5 and BART with `</s>`).
    """
    if getattr(tokenizer, "answer_style", None) is not None:
        return True
    word = tokenizer(WORD, add_special_tokens=False).input_ids
    return bool(tokenizer(WORD).input_ids[-len(word) :] == word)


def target_ids(tokenizer: Any, answers: Sequence[str], max_length: int | None = None) -> list[list[int]]:
    """Token ids of answers, end of text included, each cut to `max_length`.

    Raises:
        ValueError: If an answer continues the sequence of its text and the tokenizer merges the two.
    """
    if not continues_text(tokenizer):
        cut = {} if max_length is None else {"max_length": max_length, "truncation": True}
        separate: list[list[int]] = tokenizer(text_target=list(answers), **cut).input_ids
        return separate
    style: AnswerStyle | None = getattr(tokenizer, "answer_style", None)
    lead = WORD if style is None or style.lead is None else style.lead
    word = tokenizer(lead, add_special_tokens=False).input_ids
    # Not " answer" alone: Llama's tokenizer puts a space of its own before the first word.
    space = " " if lead == WORD else ""
    following = [f"{lead}{space}{answer}" if answer else lead for answer in answers]
    targets = []
    for answer, ids in zip(answers, tokenizer(following, add_special_tokens=False).input_ids, strict=True):
        if ids[: len(word)] != word:
            raise ValueError(
                f"the tokenizer merges {answer!r} with the word before it, so that text and answer cannot be "
                "tokenised apart; use a language model whose tokenizer splits at spaces"
            )
        target = ids[len(word) :]
        if max_length is not None:
            target = target[: max_length - 1]
        targets.append([*target, end_token(tokenizer)])
    return targets


def target_texts(tokenizer: Any, tokens: Int[Tensor, "sequences target"]) -> list[str]:
    """Generated tokens as answers, without special tokens and without the space after the text."""
    texts: list[str] = tokenizer.batch_decode(tokens, skip_special_tokens=True)
    return [text.removeprefix(" ") for text in texts] if continues_text(tokenizer) else texts
