"""Initialisation of soft prompts from words of the vocabulary, from a text, or at random.

The random values, and those of A and B, are set where they are made, in `dept.DePT` and `methods`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dept_vl.prompts.base import Init
from dept_vl.prompts.dept import DePT

COMMON_TOKENS = 5000
"""Number of tokens to draw initial prompt vectors from, the first of the vocabulary (Lester et al. 2021)."""

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
    """Initialise the soft prompt P in place.

    `vocabulary` takes embeddings of random common tokens, except `special_tokens`, `text` those of a text,
    repeated or cut to m vectors, and `random` keeps the random vectors of a new prompt. `embed` returns the
    embeddings of token ids. `generator` is on the CPU; None for torch's default generator.

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
    """Draw random token ids, without replacement until all have been drawn, and none of `exclude`.

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
