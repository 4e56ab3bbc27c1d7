"""The vectors that a soft prompt starts from: words of the vocabulary, a text, or noise."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dept_vl.prompts.base import Init
from dept_vl.prompts.dept import DePT

COMMON_TOKENS = 5000
"""Initial prompt vectors are drawn from this many of the first, commonest tokens (Lester et al. 2021)."""

Embed = Callable[[Int[Tensor, " tokens"]], Float[Tensor, "tokens d_model"]]


@torch.no_grad()
def initialise(
    prompt: DePT,
    init: Init,
    embed: Embed,
    *,
    vocabulary_size: int = 0,
    special_tokens: Sequence[int] = (),
    generator: torch.Generator | None = None,
    tokenizer: Any = None,
    text: str = "",
) -> None:
    """Start P from word embeddings, repeated or cut to its m vectors.

    Args:
        prompt: Changed in place.
        init: `vocabulary` draws common tokens, `text` takes those of a text, `random` keeps the noise that
            the prompt was built with.
        embed: Looks word embeddings up.
        vocabulary_size: Tokens that may be drawn, if there are fewer than `COMMON_TOKENS`.
        special_tokens: Ids that are never drawn.
        generator: Source of randomness for the draw, on the CPU; None is torch's own.
        tokenizer: Of the text.
        text: For `init="text"`.

    Raises:
        ValueError: If the text has no token, or no token is left to draw.
    """
    if init == "random":
        return
    if init == "text":
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids[0]
    else:
        ids = sample_vocabulary(
            min(COMMON_TOKENS, vocabulary_size),
            prompt.prompt_length,
            generator or torch.default_generator,
            exclude=special_tokens,
        )
    prompt.init_prompt(embed(ids.long()))


def sample_vocabulary(
    vocabulary_size: int, count: int, generator: torch.Generator, *, exclude: Sequence[int] = ()
) -> Int[Tensor, " count"]:
    """Draw token ids to start a prompt from, without replacement until the vocabulary is used up.

    Args:
        vocabulary_size: Ids are drawn from `range(vocabulary_size)`.
        count: How many ids.
        generator: Source of randomness, on the CPU.
        exclude: Ids never drawn (special tokens).

    Raises:
        ValueError: If every id is excluded.
    """
    allowed = torch.ones(vocabulary_size, dtype=torch.bool)
    allowed[[token for token in exclude if token < vocabulary_size]] = False
    ids = allowed.nonzero().squeeze(1)
    if len(ids) == 0:
        raise ValueError(f"no token is left to draw from a vocabulary of {vocabulary_size}")
    rounds = [ids[torch.randperm(len(ids), generator=generator)] for _ in range(-(-count // len(ids)))]
    return torch.cat(rounds)[:count] if rounds else ids[:0]
