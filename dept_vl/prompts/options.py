"""Options of the prompt; this module imports no engine."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from pydantic import AfterValidator, Field

from dept_vl._utils.options import Finite, Options
from dept_vl.prompts.base import LARGEST_SIZE, METHODS, Init

PositiveSize = Annotated[int, Field(ge=1, le=LARGEST_SIZE)]
Size = Annotated[int, Field(ge=0, le=LARGEST_SIZE)]
InitParts = Literal["prompt", "all"]
"""P alone, or all that the prompt has."""
MethodName = Annotated[
    str,
    AfterValidator(METHODS.check),
    tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="{" + ",".join(METHODS) + "}",
        instance_from_str=lambda values: METHODS.check(values[0]),
        is_instance=lambda value: isinstance(value, str),
        str_from_instance=lambda name: [name],
    ),
]
"""Name of a method in the registry, which users may add to."""


@dataclass(frozen=True)
class PromptOptions(Options):
    """The prompt."""

    method: MethodName = "dept"
    """pt, dept, adept (offset by token), hybrid (by position and token), ulpt, lopt (compressed prompts),
    residual, or memory (an adapter behind the encoder, no prompt); see prompts/methods.py."""
    prompt_length: Size = 40
    """Vectors of the soft prompt (m); 0 leaves the offset alone. pt, ulpt and lopt have
    reference_prompt_length instead."""
    rank: Size | None = None
    """Rank of the offset, or of a compressed prompt (r); 0 is plain prompt tuning. Left out, it is the
    largest with which the prompt has no more parameters than reference_prompt_length vectors."""
    reference_prompt_length: PositiveSize = 100
    """Length of the plain soft prompt (l) whose parameters are spent."""
    max_source_length: PositiveSize = 20
    """Longest text, in tokens, task prefix included (s); on a command line the task's own is the default
    (NLVR2: 72, text tasks: 256)."""
    alpha: Finite = 8.0
    """The offset is scaled by alpha / sqrt(rank)."""
    visual_offset: bool = False
    """Shift each visual token by a function of itself too, of the same rank (adept, hybrid)."""
    prompt_init: Init = "vocabulary"
    """Start from embeddings of common tokens drawn with the seed, of init_text, or from noise."""
    init_text: str = ""
    """Words to start from, for prompt_init text; repeated or cut to the prompt's length."""
    init_from: tuple[Path, ...] = ()
    """Start from trained prompts instead: folders of runs or adapters; of several, from their mean."""
    init_parts: InitParts = "prompt"
    """Of these take the prompt alone (P), or all of it: the offset too."""
