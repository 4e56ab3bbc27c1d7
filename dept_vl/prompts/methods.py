"""Built-in prompt methods: DePT and related methods, compared at the same number of trainable parameters.

With every method but `memory`, the encoder reads `[P ; E + g]`, where E are the word embeddings and g is an
offset, zero before training. The README of this folder has a table of P, g and the learning rates. With
`visual_offset`, `adept` and `hybrid` shift each visual token by a second f of the same rank.
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
    """Plain prompt tuning (Lester et al., EMNLP 2021): P has m = l vectors. Trains m*d parameters."""

    name = "pt"
    keeps_length = True
    has_rank = False

    def build(self) -> DePT:
        """See `Method.build`."""
        return DePT(**self.common)


class Decomposed(Method):
    """DePT (Shi & Lipani, ICLR 2024): g = scale * A[position] @ B. Trains m*d + (s + d)*r parameters."""

    name = "dept"

    @property
    def scale(self) -> float:
        """See `Method.scale`."""
        return self.alpha / math.sqrt(self.rank) if self.rank else 0.0

    def build(self) -> DePT:
        """See `Method.build`."""
        return DePT(**self.common, rank=self.rank)


class ADePT(Method):
    """ADePT (Tang et al., ICLR 2025): g = f(E) = ReLU(E A' + a) B' + b.

    Trains m*d + (2*d + 1)*r + d parameters, and (2*d + 1)*r + d more with `visual_offset`.
    """

    name = "adept"
    shifts_images = True

    def build(self) -> DePT:
        """See `Method.build`."""
        token, visual = _bottlenecks(self)
        return DePT(**self.common, token_offset=token, visual_offset=visual)


class Hybrid(Decomposed):
    """The offsets of DePT and ADePT, each of rank r. Trains m*d + (s + 3*d + 1)*r + d parameters."""

    name = "hybrid"
    shifts_images = True

    def build(self) -> DePT:
        """See `Method.build`."""
        token, visual = _bottlenecks(self)
        return DePT(**self.common, rank=self.rank, token_offset=token, visual_offset=visual)


class ULPT(Method):
    """ULPT (Wu et al., 2025): P = (Z P~) * s + b; P~ is random and frozen. Trains m*r + 2*d parameters."""

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
    """LoPT (Xiao et al., 2023; Guo et al., 2024): P = U V, of rank r. Trains (m + d)*r parameters."""

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
    """P = P' + f(P'), f as ADePT's (Razdaibiedina et al., 2023). Trains m*d + (2*d + 1)*r + d parameters."""

    name = "residual"
    needs_vectors = True

    def build(self) -> DePT:
        """See `Method.build`."""
        return DePT(**self.common, source=Residual(self.d_model, self.prompt_length, self.rank))


class MemoryOffset(Method):
    """Adapter between encoder and decoder, without a prompt. Trains (2*d + 1)*r + d parameters.

    The decoder reads H + f(H) of the encoder's output H. If nothing else is trained, the encoder runs without
    gradients, because the offset comes after it.
    """

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
