"""Built-in prompt methods: DePT and related methods, compared at the same number of trainable parameters.

With every method but `memory`, the encoder reads `[P ; E + g]`, where E are the word embeddings:

| method   | P                     | g                            | source                              |
|----------|-----------------------|------------------------------|-------------------------------------|
| pt       | free, m = l           | 0                            | Lester et al., EMNLP 2021           |
| dept     | free, m < l           | scale * A[pos] @ B           | Shi & Lipani, ICLR 2024             |
| adept    | free, m < l           | f(E) = ReLU(E A' + a) B' + b | Tang et al., ICLR 2025              |
| hybrid   | free, m < l           | both, each of rank r         | the two above                       |
| ulpt     | (Z P~) * s + b, m = l | 0; P~ is random and frozen   | Wu et al., 2025                     |
| lopt     | U V, m = l            | 0                            | Xiao et al., 2023; Guo et al., 2024 |
| residual | P' + f(P'), m < l     | 0; f as ADePT's              | Razdaibiedina et al., 2023          |
| memory   | none                  | 0                            | this project, see below             |

With `visual_offset`, `adept` and `hybrid` shift each visual token by a second f of the same rank. `memory` is
an adapter between encoder and decoder, without a prompt. The decoder reads `H + f(H)` of the encoder's output
H. If nothing else is trained, the encoder runs without gradients, because the offset comes after it.

r is the rank of A B, of A' B', of U V, of Z P~, or the width of the residual's hidden layer. `prompt_lr` is
the learning rate of the parameters whose step changes P by about as much (P, Z, b of ulpt, U), `offset_lr`
that of all others. Offsets are zero before training, so the encoder then reads `[P ; E]`. Each method is one
class here and one entry of `base.METHODS`; `base.register_method` adds others.
"""

import math
from copy import deepcopy

import torch
from jaxtyping import Float
from torch import Tensor

from dept_vl.prompts.base import Method
from dept_vl.prompts.dept import DePT
from dept_vl.prompts.reparameterized import Bottleneck, LowRank, Residual, ScaledRandom


class PromptTuning(Method):
    """Plain prompt tuning, with a soft prompt only. Trains m*d parameters."""

    name = "pt"
    keeps_length = True
    has_rank = False

    def build(self) -> DePT:
        """See `Method.build`."""
        return DePT(**self.common)


class Decomposed(Method):
    """DePT: a soft prompt and an offset by position. Trains m*d + (s + d)*r parameters."""

    name = "dept"

    @property
    def scale(self) -> float:
        """See `Method.scale`."""
        return self.alpha / math.sqrt(self.rank) if self.rank else 0.0

    def build(self) -> DePT:
        """See `Method.build`."""
        return DePT(**self.common, rank=self.rank)


class ADePT(Method):
    """ADePT: a soft prompt and an offset by token.

    Trains m*d + (2*d + 1)*r + d parameters, and (2*d + 1)*r + d more with `visual_offset`.
    """

    name = "adept"
    shifts_images = True

    def build(self) -> DePT:
        """See `Method.build`."""
        token, visual = _bottlenecks(self)
        return DePT(**self.common, token_offset=token, visual_offset=visual)


class Hybrid(Decomposed):
    """A soft prompt, an offset by position and one by token. Trains m*d + (s + 3*d + 1)*r + d parameters."""

    name = "hybrid"
    shifts_images = True

    def build(self) -> DePT:
        """See `Method.build`."""
        token, visual = _bottlenecks(self)
        return DePT(**self.common, rank=self.rank, token_offset=token, visual_offset=visual)


class ULPT(Method):
    """ULPT: P is a frozen random matrix times Z, scaled and shifted. Trains m*r + 2*d parameters."""

    name = "ulpt"
    keeps_length = seeded = needs_vectors = compressed = True

    @property
    def largest_rank(self) -> int:
        """See `Method.largest_rank`."""
        return self.d_model

    def build(self) -> DePT:
        """See `Method.build`."""
        source = ScaledRandom(self.d_model, self.prompt_length, self.rank, self.seed)
        return DePT(**self.common, source=source)


class LoPT(Method):
    """LoPT: P is a product of two matrices of rank r. Trains (m + d)*r parameters."""

    name = "lopt"
    keeps_length = needs_vectors = compressed = True

    @property
    def largest_rank(self) -> int:
        """See `Method.largest_rank`."""
        return min(self.prompt_length, self.d_model)

    def build(self) -> DePT:
        """See `Method.build`."""
        return DePT(**self.common, source=LowRank(self.d_model, self.prompt_length, self.rank))


class ResidualPrompt(Method):
    """Residual prompt tuning: P = P' + f(P'). Trains m*d + (2*d + 1)*r + d parameters."""

    name = "residual"
    needs_vectors = True

    def build(self) -> DePT:
        """See `Method.build`."""
        return DePT(**self.common, source=Residual(self.d_model, self.prompt_length, self.rank))


class MemoryOffset(Method):
    """Adapter between encoder and decoder, H + f(H). Trains (2*d + 1)*r + d parameters."""

    name = "memory"
    has_prompt = False

    def build(self) -> DePT:
        """See `Method.build`."""
        return DePT(**self.common, memory_offset=Bottleneck(self.d_model, self.rank))


def _bottlenecks(method: Method) -> tuple[Bottleneck, Bottleneck | None]:
    """Return the untrained offsets of text and visual tokens; the latter is None without `visual_offset`."""
    token = Bottleneck(method.d_model, method.rank)
    return token, Bottleneck(method.d_model, method.rank) if method.visual_offset else None


def build(method: Method) -> DePT:
    """Build the untrained prompt of a method; see `base.sized`."""
    prompt: DePT = method.build()
    prompt.method = method
    return prompt


@torch.no_grad()
def fold(
    prompt: DePT, word_embeddings: Float[Tensor, "words d_model"]
) -> tuple[DePT, Float[Tensor, "words d_model"]]:
    """Return a prompt with P as one tensor, and an embedding matrix with the token offset, for inference.

    Offsets of visual tokens and of the encoder's output depend on the image and stay modules.

    Args:
        prompt: Prompt of any method.
        word_embeddings: Word embeddings of the whole vocabulary. They are not changed.
    """
    folded = DePT(
        prompt.d_model,
        prompt_length=prompt.prompt_length,
        rank=prompt.rank,
        max_source_length=prompt.max_source_length,
        alpha=prompt.alpha,
        visual_offset=deepcopy(prompt.visual_offset),
        memory_offset=deepcopy(prompt.memory_offset),
    ).to(word_embeddings.device)
    for ours, theirs in (
        (folded.soft_prompt, prompt.vectors()),
        (folded.offset_a, prompt.offset_a),
        (folded.offset_b, prompt.offset_b),
    ):
        if ours is not None and theirs is not None:
            ours.copy_(theirs)
    if prompt.token_offset is not None:
        word_embeddings = word_embeddings + prompt.token_offset(word_embeddings)
    return folded.requires_grad_(False).eval(), word_embeddings
