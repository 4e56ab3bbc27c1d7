"""Built-in prompt methods: DePT and related methods, compared at the same number of trainable parameters.

With every method but `memory`, the encoder reads `[P ; E + g]`, where E are the word embeddings and g is an
offset, zero before training. The README of this folder has a table of P, g and the learning rates. With
`visual_offset`, `adept` and `hybrid` shift each visual token by a second f of the same rank.
"""

import math
from copy import deepcopy

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from dept_vl.prompts.base import Method
from dept_vl.prompts.dept import DePT, PromptSource


class Bottleneck(nn.Module):
    """Offset of a vector, f(x) = ReLU(x A' + a) B' + b, which is zero before training."""

    def __init__(self, d_model: int, rank: int) -> None:
        super().__init__()
        self.down = nn.Linear(d_model, rank)
        self.up = nn.Linear(rank, d_model)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, vectors: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """Return the offset of each vector, in the data type of `vectors`."""
        shifts: Tensor = self.up(torch.relu(self.down(vectors.to(self.down.weight.dtype))))
        return shifts.to(vectors.dtype)


class Residual(PromptSource):
    """Source P = P' + f(P'). Unlike the published f, this f has no final norm, so it starts at zero."""

    as_prompt = ("soft_prompt",)

    def __init__(self, d_model: int, prompt_length: int, rank: int) -> None:
        super().__init__()
        self.soft_prompt = nn.Parameter(torch.empty(prompt_length, d_model).uniform_(-0.5, 0.5))
        self.residual = Bottleneck(d_model, rank)

    def forward(self) -> Float[Tensor, "prompt d_model"]:
        """Return the soft prompt P."""
        vectors: Tensor = self.soft_prompt + self.residual(self.soft_prompt)
        return vectors

    @torch.no_grad()
    def start_from(self, vectors: Float[Tensor, "prompt d_model"]) -> None:
        """Set P' to `vectors` and leave f unchanged; see `PromptSource.start_from`."""
        self.soft_prompt.copy_(vectors)


class LowRank(PromptSource):
    """Source P = U V. V is scaled so that a step of U changes P by about as much."""

    as_prompt = ("u",)

    def __init__(self, d_model: int, prompt_length: int, rank: int) -> None:
        super().__init__()
        self.u = nn.Parameter(torch.empty(prompt_length, rank).uniform_(-0.5, 0.5))
        v = torch.empty(rank, d_model)
        # On the meta device only the shape is needed, and drawing there would import more of torch.
        self.v = nn.Parameter(v if v.is_meta else v.normal_() / math.sqrt(rank))

    def forward(self) -> Float[Tensor, "prompt d_model"]:
        """Return the soft prompt P."""
        return self.u @ self.v

    @torch.no_grad()
    def start_from(self, vectors: Float[Tensor, "prompt d_model"]) -> None:
        """Set U V to the matrix of this rank that is nearest to `vectors` (Eckart & Young)."""
        rank = self.u.shape[1]
        size = math.sqrt(vectors.shape[1] / rank)
        left, values, right = torch.linalg.svd(vectors.float(), full_matrices=False)
        self.u.copy_(left[:, :rank] * values[:rank] / size)
        self.v.copy_(right[:rank] * size)


class ScaledRandom(PromptSource):
    """Source P = (Z P~) * scale + shift, with a frozen random P~, of which only the seed is saved."""

    as_prompt = ("z", "shift")
    random: Tensor

    def __init__(self, d_model: int, prompt_length: int, rank: int, seed: int) -> None:
        super().__init__()
        self.z = nn.Parameter(torch.empty(prompt_length, rank).uniform_(-0.5, 0.5))
        self.scale = nn.Parameter(torch.ones(d_model))
        self.shift = nn.Parameter(torch.zeros(d_model))
        random = torch.empty(rank, d_model)
        if not random.is_meta:
            # NumPy has frozen this generator, so a seed gives the same P~ in every version.
            drawn = np.random.RandomState(seed).standard_normal((rank, d_model)) / math.sqrt(rank)
            random = torch.from_numpy(drawn.astype(np.float32))
        self.register_buffer("random", random, persistent=False)

    def forward(self) -> Float[Tensor, "prompt d_model"]:
        """Return the soft prompt P."""
        return self.z @ self.random * self.scale + self.shift

    @torch.no_grad()
    def start_from(self, vectors: Float[Tensor, "prompt d_model"]) -> None:
        """Set `shift` to the mean of `vectors`, and Z by least squares to fit the remainder."""
        self.scale.fill_(1.0)
        self.shift.copy_(vectors.mean(0))
        solved = torch.linalg.lstsq(self.random.T, (vectors.float() - self.shift).T).solution
        self.z.copy_(solved.T)


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
    """
    folded = deepcopy(prompt).to(word_embeddings.device)
    if (vectors := prompt.vectors()) is not None:
        folded.soft_prompt = nn.Parameter(vectors.to(word_embeddings.device, copy=True))
    folded.source = folded.token_offset = None
    if prompt.token_offset is not None:
        word_embeddings = word_embeddings + prompt.token_offset(word_embeddings)
    return folded.requires_grad_(False).eval(), word_embeddings
