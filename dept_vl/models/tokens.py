"""Answers as tokens: what is learnt, what may be generated, and back to text.

An encoder-decoder's answer is a sequence of its own. A decoder-only model's goes on where its text
stops, so its tokens are those that the tokenizer would make of it in "text answer", and the end of text.
"""

from collections.abc import Sequence
from typing import Any

from jaxtyping import Int
from torch import Tensor

IGNORE_INDEX = -100
"""Label of a position that the loss does not count."""
WORD = "a"
"""Stands for the text in front of an answer; which it is does not matter to the tokens after a space."""


def continues_text(tokenizer: Any) -> bool:
    """Whether answers go on in the sequence of their text.

    The tokenizer tells: that of a decoder-only model leaves a text open, that of an encoder-decoder ends it
    (T5 and BART with `</s>`).
    """
    word = tokenizer(WORD, add_special_tokens=False).input_ids
    return bool(tokenizer(WORD).input_ids[-len(word) :] == word)


def target_ids(tokenizer: Any, answers: Sequence[str], max_length: int | None = None) -> list[list[int]]:
    """Token ids of answers, end of text included, each cut to `max_length`.

    Raises:
        ValueError: If an answer goes on in the sequence of its text and the tokenizer merges the two.
    """
    if not continues_text(tokenizer):
        cut = {} if max_length is None else {"max_length": max_length, "truncation": True}
        separate: list[list[int]] = tokenizer(text_target=list(answers), **cut).input_ids
        return separate
    word = tokenizer(WORD, add_special_tokens=False).input_ids
    # Not " answer" alone: Llama's tokenizer puts a space of its own before the first word.
    following = [f"{WORD} {answer}".rstrip() for answer in answers]
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
        targets.append([*target, tokenizer.eos_token_id])
    return targets


def target_texts(tokenizer: Any, tokens: Int[Tensor, "sequences target"]) -> list[str]:
    """Generated tokens as answers, without special tokens and without the space after the text."""
    texts: list[str] = tokenizer.batch_decode(tokens, skip_special_tokens=True)
    return [text.removeprefix(" ") for text in texts] if continues_text(tokenizer) else texts
