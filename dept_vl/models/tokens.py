"""Conversion of answers to token ids and back.

An encoder-decoder's answer is a separate sequence. A decoder-only model's answer continues its text, so its
tokens are those of the answer in "text answer", followed by the end-of-text token.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from threading import RLock
from typing import Any

from jaxtyping import Int
from torch import Tensor

IGNORE_INDEX = -100
"""Label of positions that the loss ignores."""
WORD = "a"
"""Stand-in for the text in front of an answer, which does not affect the tokens after a space."""
AFTER_WORD = f"{WORD} "
"""Lead of most answers. Not a space alone, because Llama's tokenizer adds one in front of the first word."""
TOKENISING = RLock()
"""Lock of `tokenised`: a tokenizer keeps the truncation and padding of a call, and threads may share it."""
if hasattr(os, "register_at_fork"):  # a worker process is forked only while the lock is free
    os.register_at_fork(
        before=TOKENISING.acquire,
        after_in_parent=TOKENISING.release,
        after_in_child=TOKENISING.release,
    )


@dataclass(frozen=True)
class AnswerStyle:
    """How answers follow their texts. `source` sets that of a pretrained model's tokenizer."""

    lead: str | None  # text directly in front of an answer; None if an answer is a sequence of its own
    end: int  # id of the token that ends an answer
    start: int  # number of tokens in front of a generated answer: 1 for a decoder's start token, or 0


def tokenised(tokenizer: Any, *texts: Any, **options: Any) -> Any:
    """Call a tokenizer or processor, one thread at a time: it keeps the truncation of the call that runs."""
    with TOKENISING:
        return tokenizer(*texts, **options)


def style_of(tokenizer: Any) -> AnswerStyle:
    """Return the style of answers: the tokenizer's attribute, which worker processes keep, or the usual one.

    The tokenizers of encoder-decoders end every text with a special token (T5 and BART with `</s>`).
    """
    style: AnswerStyle | None = getattr(tokenizer, "answer_style", None)
    if style is None:
        word = tokenised(tokenizer, WORD, add_special_tokens=False).input_ids
        ends_texts = tokenised(tokenizer, WORD).input_ids[-len(word) :] != word
        style = AnswerStyle(None if ends_texts else AFTER_WORD, tokenizer.eos_token_id, int(ends_texts))
    return style


def target_ids(tokenizer: Any, answers: Sequence[str], max_length: int | None = None) -> list[list[int]]:
    """Return the token ids of answers, including the end token, each truncated to `max_length`.

    Raises:
        ValueError: If an answer continues the sequence of its text and the tokenizer merges the two.
    """
    style = style_of(tokenizer)
    if style.lead is None:
        cut = {} if max_length is None else {"max_length": max_length, "truncation": True}
        separate: list[list[int]] = tokenised(tokenizer, text_target=list(answers), **cut).input_ids
        return separate
    lead = style.lead.removesuffix(" ")
    word = tokenised(tokenizer, lead, add_special_tokens=False).input_ids
    following = [f"{style.lead}{answer}" if answer else lead for answer in answers]
    targets = []
    tokens = tokenised(tokenizer, following, add_special_tokens=False).input_ids
    for answer, ids in zip(answers, tokens, strict=True):
        if ids[: len(word)] != word:
            raise ValueError(
                f"the tokenizer merges {answer!r} with the word before it, so that text and answer cannot be "
                "tokenised apart; use a language model whose tokenizer splits at spaces"
            )
        target = ids[len(word) :]
        if max_length is not None:
            target = target[: max_length - 1]
        targets.append([*target, style.end])
    return targets


def target_texts(tokenizer: Any, tokens: Int[Tensor, "sequences target"]) -> list[str]:
    """Return the answers of generated tokens, without special tokens and the space after the text."""
    texts: list[str] = tokenizer.batch_decode(tokens, skip_special_tokens=True)
    separate = style_of(tokenizer).lead is None
    return texts if separate else [text.removeprefix(" ") for text in texts]
