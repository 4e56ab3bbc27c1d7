"""Options of the prompt; imports no torch."""

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
"""Parts of a trained prompt to start from: only P, or all parameters."""
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
"""Name of a registered prompt method."""


@dataclass(frozen=True)
class PromptOptions(Options):
    """The prompt."""

    method: MethodName = "dept"
    """Prompt method: pt, dept, adept (offset by token), hybrid (by position and token), ulpt, lopt
    (compressed prompts), residual, or memory (adapter after the encoder); see prompts/methods.py."""
    prompt_length: Size = 40
    """Number of vectors in the soft prompt (m); 0 for the offset alone. pt, ulpt and lopt use
    reference_prompt_length instead, and memory has no soft prompt."""
    rank: Size | None = None
    """Rank of the offset or of a compressed prompt (r); 0 for plain prompt tuning. By default, the largest
    rank with no more parameters than a plain prompt of reference_prompt_length vectors."""
    reference_prompt_length: PositiveSize = 100
    """Length of the plain soft prompt (l) whose number of parameters is the budget."""
    max_source_length: PositiveSize = 20
    """Maximum text length in tokens, including the task prefix (s). On a command line, the default depends on
    the task (NLVR2: 72, text tasks: 256)."""
    alpha: Finite = 8.0
    """Scaling parameter of the offset, which is multiplied by alpha / sqrt(rank)."""
    visual_offset: bool = False
    """Add an offset of the same rank to each visual token (adept, hybrid)."""
    prompt_init: Init = "vocabulary"
    """Initial vectors: embeddings of common tokens drawn with the random seed or of init_text, or random."""
    init_text: str = ""
    """Initial text for prompt_init text; repeated or cut to the prompt's length."""
    init_from: tuple[Path, ...] = ()
    """Folders of runs or adapters to start from instead. Several prompts are averaged."""
    init_parts: InitParts = "prompt"
    """Parts to take from init_from: the soft prompt (P), or all, which includes the offset. A visual
    projection that the only source has trained is taken in both cases."""

    @property
    def has_vectors(self) -> bool:
        """Whether there is a soft prompt."""
        method = METHODS[self.method]
        return method.keeps_length or (method.has_prompt and self.prompt_length > 0)
