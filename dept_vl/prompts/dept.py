"""Decomposed Prompt Tuning (DePT): a short soft prompt plus a low-rank offset on frozen embeddings.

Source: Shi & Lipani, "DePT: Decomposed Prompt Tuning for Parameter-Efficient Fine-tuning", ICLR 2024.

| symbol | meaning                                          | here                |
|--------|--------------------------------------------------|---------------------|
| d      | model width                                      | `d_model`           |
| s      | longest source text, in tokens                   | `max_source_length` |
| m      | vectors in the short soft prompt                 | `prompt_length`     |
| r      | rank of the low-rank pair                        | `rank`              |
| P      | soft prompt (m, d)                               | `soft_prompt`       |
| A, B   | low-rank pair (s, r) and (r, d)                  | `offset_a`, `offset_b`  |
| n      | source length of the batch at hand, n <= s       | `text`              |

The encoder reads `[P ; E(x) + scale * A[:n] @ B]` with `scale = alpha / sqrt(r)`. B starts at zero, so
an untrained DePT is plain prompt tuning with m vectors; r = 0 *is* plain prompt tuning, m = 0 is
the offset alone. A prompt of l vectors has l*d parameters; DePT spends them as m*d + (s + d)*r and
saves l - m positions in every encoder layer and every decoder cross-attention.

Methods that make P out of something else, or shift a token by what it is, give `DePT` a source or a
token offset: `family` has them.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

COMMON_TOKENS = 5000
"""Initial prompt vectors are drawn from this many of the first, commonest tokens (Lester et al. 2021)."""
RENAMED = {"lora_a": "offset_a", "lora_b": "offset_b"}
"""Parameters by the names that older files have for them."""


class PromptSource(nn.Module, ABC):
    """What P is made of where its vectors are not trained themselves."""

    @abstractmethod
    def forward(self) -> Float[Tensor, "prompt d_model"]:
        """P."""

    @abstractmethod
    def start_from(self, vectors: Float[Tensor, "prompt d_model"]) -> None:
        """Make P as near to these vectors as can be."""

    @abstractmethod
    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """As `DePT.parameter_groups`."""


class DePT(nn.Module):
    """The trainable prompt: `soft_prompt` (m, d), `offset_a` (s, r) and `offset_b` (r, d).

    A part of size zero is `None`, so every parameter that exists is trained and counted.

    Args:
        d_model: Width of the embeddings that are prompted.
        prompt_length: Vectors in the soft prompt (m >= 0).
        rank: Rank of the offset (r >= 0); 0 is plain prompt tuning.
        max_source_length: Longest text in tokens (s); the rows of `offset_a`.
        alpha: The offset is scaled by `alpha / sqrt(rank)` (section 2.2 says nothing of it; the
            authors' code uses 8, and the root, not the rank itself).
        source: Makes the m vectors of P; None trains them themselves.
        token_offset: A further shift of a token, from its embedding alone; None for none.

    Raises:
        ValueError: If a size is negative, or there is no text position to offset.
    """

    def __init__(
        self,
        d_model: int,
        *,
        prompt_length: int,
        rank: int,
        max_source_length: int,
        alpha: float = 8.0,
        source: PromptSource | None = None,
        token_offset: nn.Module | None = None,
    ) -> None:
        super().__init__()
        if min(prompt_length, rank) < 0 or min(d_model, max_source_length) < 1:
            raise ValueError(
                "DePT needs prompt_length >= 0, rank >= 0, d_model >= 1 and max_source_length >= 1; "
                f"got prompt_length={prompt_length}, rank={rank}, d_model={d_model}, "
                f"max_source_length={max_source_length}"
            )
        self.d_model = d_model
        self.prompt_length = prompt_length
        self.rank = rank
        self.max_source_length = max_source_length
        self.alpha = alpha
        self.scale = alpha / math.sqrt(rank) if rank else 0.0
        self.source = source
        self.token_offset = token_offset

        self.soft_prompt: nn.Parameter | None = None
        self.offset_a: nn.Parameter | None = None
        self.offset_b: nn.Parameter | None = None
        if prompt_length and source is None:
            self.soft_prompt = nn.Parameter(torch.empty(prompt_length, d_model).uniform_(-0.5, 0.5))
        if rank:
            self.offset_a = nn.Parameter(torch.empty(max_source_length, rank))
            self.offset_b = nn.Parameter(torch.zeros(rank, d_model))
            nn.init.kaiming_uniform_(self.offset_a, a=math.sqrt(5))
        self._kept: tuple[tuple[Any, ...], Tensor, Tensor, Tensor] | None = None

    def forward(
        self, token_embeddings: Float[Tensor, "batch text d_model"], mask: Bool[Tensor, "batch text"]
    ) -> tuple[Float[Tensor, "batch prompt_text d_model"], Bool[Tensor, "batch prompt_text"]]:
        """Offset the text by its positions and put the soft prompt in front of it.

        Args:
            token_embeddings: Frozen word embeddings of the text, and of nothing but the text. Padding is on
                the right (`models.padding.pack` moves it there), so that a token's column is its position.
            mask: True on text tokens, False on padding.

        Returns:
            The embeddings and the mask of `[prompt ; text]`, m + n positions long.

        Raises:
            ValueError: If the text is longer than `max_source_length`.
        """
        embeddings = token_embeddings
        offset = self.offset(embeddings.shape[1])
        if offset is not None:
            embeddings = embeddings + offset.to(embeddings.dtype)
        if self.token_offset is not None:
            embeddings = embeddings + self.token_offset(token_embeddings)
        vectors = self.vectors()
        if vectors is None:
            return embeddings, mask
        batch = embeddings.shape[0]
        prompt = vectors.to(embeddings.dtype).expand(batch, -1, -1)
        return (
            torch.cat([prompt, embeddings], dim=1),
            torch.cat([mask.new_ones(batch, self.prompt_length), mask], dim=1),
        )

    def vectors(self) -> Float[Tensor, "prompt d_model"] | None:
        """P; None without one."""
        return self.soft_prompt if self.source is None else self.source()

    def offset(self, text_length: int) -> Float[Tensor, "text d_model"] | None:
        """`scale * A[:n] @ B`, the shift of each of the first n text positions; None at rank 0."""
        if text_length > self.max_source_length:
            raise ValueError(
                f"the text has {text_length} tokens and the prompt was built for "
                f"max_source_length={self.max_source_length}; truncate the text or build the prompt "
                "with a larger max_source_length"
            )
        if self.offset_a is None or self.offset_b is None:
            return None
        if self.training or torch.is_grad_enabled() or torch.compiler.is_compiling():
            # A fused optimizer's step, which may follow, leaves no trace on a tensor's version.
            self._kept = None
            return self.offset_a[:text_length] @ self.offset_b * self.scale
        return self._kept_offset(self.offset_a.detach(), self.offset_b.detach())[:text_length]

    def train(self, mode: bool = True) -> "DePT":
        """Training mode, or inference with nothing kept from before."""
        self._kept = None
        return super().train(mode)

    def _kept_offset(
        self, a: Float[Tensor, "source rank"], b: Float[Tensor, "rank d_model"]
    ) -> Float[Tensor, "source d_model"]:
        """The whole product, for inference: computed when A, B or the precision have changed.

        A change in place raises a tensor's version; any other gives it another storage, which cannot
        lie where the old one does, for that is kept alive here.
        """
        kind = a.device.type
        autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        key = (a.data_ptr(), a._version, b.data_ptr(), b._version, a.dtype, a.device, self.scale, autocast)
        if self._kept is None or self._kept[0] != key:
            self._kept = (key, a, b, a @ b * self.scale)
        return self._kept[-1]

    @torch.no_grad()
    def init_prompt(self, embeddings: Float[Tensor, "tokens d_model"]) -> None:
        """Start the soft prompt from word embeddings, repeated or cut to m vectors."""
        if self.prompt_length == 0:
            return
        if len(embeddings) == 0:
            raise ValueError("the prompt's initial text has no token; give a text of one word or more")
        rows = torch.arange(self.prompt_length, device=embeddings.device) % len(embeddings)
        if self.source is not None:
            self.source.start_from(embeddings[rows])
        elif self.soft_prompt is not None:
            self.soft_prompt.copy_(embeddings[rows])

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """The trainable parameters by learning rate: `prompt` (alpha1) and `low_rank` (alpha2)."""
        of_source = {} if self.source is None else self.source.parameter_groups()
        of_token = [] if self.token_offset is None else list(self.token_offset.parameters())
        groups = {
            "prompt": [self.soft_prompt, *of_source.get("prompt", [])],
            "low_rank": [self.offset_a, self.offset_b, *of_source.get("low_rank", []), *of_token],
        }
        return {name: [p for p in group if p is not None] for name, group in groups.items()}

    def extra_repr(self) -> str:
        """Sizes, for `print(model)`."""
        return (
            f"d_model={self.d_model}, prompt_length={self.prompt_length}, rank={self.rank}, "
            f"max_source_length={self.max_source_length}, alpha={self.alpha}"
        )


def sample_vocabulary(
    vocabulary_size: int, count: int, generator: torch.Generator, *, exclude: Sequence[int] = ()
) -> Int[Tensor, " count"]:
    """Token ids to start a prompt from: drawn without replacement (until the vocabulary is used up).

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


def current_name(tensor_name: str) -> str:
    """Return today's name of a tensor in an older file: `prompt.offset_a` for `prompt.lora_a`."""
    return ".".join(RENAMED.get(part, part) for part in tensor_name.split("."))


def parameter_count(d_model: int, max_source_length: int, prompt_length: int, rank: int) -> int:
    """Trainable parameters of a DePT: m*d + (s + d)*r."""
    return prompt_length * d_model + (max_source_length + d_model) * rank


def solve_rank(d_model: int, max_source_length: int, budget: int, prompt_length: int) -> int:
    """The largest rank whose DePT stays within `budget` parameters, given the prompt's length.

    At T5-base (d=768, s=256) and the budget of a 100-vector prompt (76,800) this is the table of
    the paper: (m, r) = (0, 75), (20, 60), (40, 45), (60, 30), (80, 15), (100, 0).

    Raises:
        ValueError: If the prompt alone is over the budget.
    """
    left = budget - prompt_length * d_model
    if prompt_length < 0 or left < 0:
        raise ValueError(
            f"a prompt of {prompt_length} vectors of width {d_model} has {prompt_length * d_model:,} "
            f"parameters; the budget is {budget:,}, which admits 0 to {max(budget, 0) // d_model}"
        )
    return left // (max_source_length + d_model)


@dataclass(frozen=True)
class Budgeted:
    """Sizes that keep a budget.

    Attributes:
        prompt_length: Vectors of the soft prompt (m).
        rank: Of the offset (r).
        left_over: Parameters of the budget that they do not use.
    """

    prompt_length: int
    rank: int
    left_over: int


def solve_budget(
    d_model: int, max_source_length: int, budget: int, prompt_length: int | None = None
) -> Budgeted:
    """A prompt's length and rank that use a budget as far as whole numbers allow, and never more.

    Args:
        d_model: Width of the model (d).
        max_source_length: Longest text in tokens (s).
        budget: Parameters that may be trained.
        prompt_length: Vectors of the soft prompt; None takes 60% of those that the budget would buy,
            the share that won on 15 of the authors' 17 tasks: (m, r) = (60, 30) at T5-base.

    Raises:
        ValueError: If the prompt alone is over the budget, or the budget buys no parameter at all.
    """
    if prompt_length is None:
        prompt_length = max(budget, 0) * 3 // (5 * d_model)
    rank = solve_rank(d_model, max_source_length, budget, prompt_length)
    if prompt_length == rank == 0:
        raise ValueError(
            f"a budget of {budget:,} parameters buys nothing at d_model={d_model} and max_source_length="
            f"{max_source_length}: a vector of the prompt has {d_model:,} parameters, a rank "
            f"{max_source_length + d_model:,}"
        )
    used = parameter_count(d_model, max_source_length, prompt_length, rank)
    return Budgeted(prompt_length, rank, budget - used)
