"""Decomposed Prompt Tuning (DePT): a short soft prompt plus a low-rank offset on frozen embeddings.

Source: Shi & Lipani, "DePT: Decomposed Prompt Tuning for Parameter-Efficient Fine-tuning", ICLR 2024.

| symbol | meaning                                          | here                   |
|--------|--------------------------------------------------|------------------------|
| d      | model width                                      | `d_model`              |
| s      | longest source text, in tokens                   | `max_source_length`    |
| m      | vectors in the short soft prompt                 | `prompt_length`        |
| r      | rank of the low-rank pair                        | `rank`                 |
| P      | soft prompt (m, d)                               | `soft_prompt`          |
| A, B   | low-rank pair (s, r) and (r, d)                  | `offset_a`, `offset_b` |
| n      | source length of the batch at hand, n <= s       | `text`                 |

The encoder reads `[P ; E(x) + scale * A[:n] @ B]` with `scale = alpha / sqrt(r)`. B starts at zero, so
an untrained DePT is plain prompt tuning with m vectors; r = 0 *is* plain prompt tuning, m = 0 is
the offset alone. A prompt of l vectors has l*d parameters; DePT spends them as m*d + (s + d)*r and
saves l - m positions in every encoder layer and every decoder cross-attention.

Other methods compute P from something else (`source`), or shift each text token (`token_offset`), each
visual token (`visual_offset`) or each vector of the encoder's output (`memory_offset`) by a function of
itself; `methods` has them.
"""

import math
from abc import ABC, abstractmethod
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from dept_vl.prompts.base import METHODS, Method, check_sizes

RENAMED = {"lora_a": "offset_a", "lora_b": "offset_b"}
"""Parameters by the names that older files have for them."""

POWERS = {"offset_b": 1, "down.weight": -1, "up.weight": 1, "up.bias": 1}
"""Of the embeddings' size, by the end of a parameter's name; of P, and of what moves it, 1, of others 0."""


class PromptSource(nn.Module, ABC):
    """Computes P where its vectors are not parameters themselves."""

    @abstractmethod
    def forward(self) -> Float[Tensor, "prompt d_model"]:
        """Return P."""

    @abstractmethod
    def start_from(self, vectors: Float[Tensor, "prompt d_model"]) -> None:
        """Set the parameters so that P is as close to these vectors as possible."""

    @abstractmethod
    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """Return the parameters by learning rate, as `DePT.parameter_groups` does."""


class DePT(nn.Module):
    """The trainable prompt: `soft_prompt` (m, d), `offset_a` (s, r) and `offset_b` (r, d).

    A part of size zero is `None`, so every parameter that exists is trained and counted.

    Args:
        d_model: Width of the embeddings that are prompted.
        prompt_length: Vectors in the soft prompt (m >= 0).
        rank: Rank of the offset by position (r >= 0); 0 is no offset.
        max_source_length: Longest text in tokens (s); the rows of `offset_a`.
        alpha: The offset is scaled by `alpha / sqrt(rank)`. The paper does not mention a scale; the
            authors' code has alpha = 8 and the square root.
        source: Computes the m vectors of P; None makes them parameters.
        token_offset: Computes a further shift of each text token from its embedding; None for no shift.
        visual_offset: The same for each visual token, at the encoder's input.
        memory_offset: The same for each vector of the encoder's output, which the decoder reads.

    Attributes:
        method: That built the prompt, for its description; None for P, A and B alone.

    Raises:
        ValueError: If a size is negative, or there is no text position to offset.

    Example:
        >>> import dept_vl, torch
        >>> prompt = dept_vl.DePT(512, prompt_length=40, rank=10, max_source_length=20)
        >>> embeddings, mask = torch.randn(2, 20, 512), torch.ones(2, 20, dtype=torch.bool)
        >>> prompted, longer = prompt(embeddings, mask)
        >>> tuple(prompted.shape), tuple(longer.shape)
        ((2, 60, 512), (2, 60))
    """

    def __init__(
        self,
        d_model: int,
        *,
        prompt_length: int,
        max_source_length: int,
        rank: int = 0,
        alpha: float = 8.0,
        source: PromptSource | None = None,
        token_offset: nn.Module | None = None,
        visual_offset: nn.Module | None = None,
        memory_offset: nn.Module | None = None,
    ) -> None:
        super().__init__()
        check_sizes(d_model, prompt_length, rank, max_source_length)
        self.d_model = d_model
        self.prompt_length = prompt_length
        self.rank = rank
        self.max_source_length = max_source_length
        self.alpha = alpha
        self.scale = alpha / math.sqrt(rank) if rank else 0.0
        self.source = source
        self.token_offset = token_offset
        self.visual_offset = visual_offset
        self.memory_offset = memory_offset
        self.method: Method | None = None

        self.soft_prompt: nn.Parameter | None = None
        self.offset_a: nn.Parameter | None = None
        self.offset_b: nn.Parameter | None = None
        if prompt_length and source is None:
            self.soft_prompt = nn.Parameter(torch.empty(prompt_length, d_model).uniform_(-0.5, 0.5))
        if rank:
            self.offset_a = nn.Parameter(torch.empty(max_source_length, rank))
            self.offset_b = nn.Parameter(torch.zeros(rank, d_model))
            nn.init.kaiming_uniform_(self.offset_a, a=math.sqrt(5))
        self._cache: tuple[tuple[Any, ...], Tensor, Tensor, Tensor] | None = None

    def forward(
        self, token_embeddings: Float[Tensor, "batch text d_model"], mask: Bool[Tensor, "batch text"]
    ) -> tuple[Float[Tensor, "batch prompt_text d_model"], Bool[Tensor, "batch prompt_text"]]:
        """Add the offsets to the text and concatenate the soft prompt to its beginning.

        Args:
            token_embeddings: Frozen word embeddings of the text alone, without images. Padding is on the
                right (`models.padding.pack` moves it there), so that a token's column is its position.
            mask: True on text tokens, False on padding.

        Returns:
            The embeddings and the mask of `[P ; text]`, m + n positions long.

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

    def shift_visual(
        self, visual: Float[Tensor, "batch visual d_model"]
    ) -> Float[Tensor, "batch visual d_model"]:
        """Return the visual tokens that the encoder is to read."""
        return visual if self.visual_offset is None else visual + self.visual_offset(visual)

    def shift_memory(
        self, memory: Float[Tensor, "batch source d_model"]
    ) -> Float[Tensor, "batch source d_model"]:
        """Return the encoder's output that the decoder is to read."""
        return memory if self.memory_offset is None else memory + self.memory_offset(memory)

    @property
    def needs_encoder(self) -> bool:
        """Whether the prompt acts on an encoder's output."""
        return self.memory_offset is not None

    @property
    def changes_input(self) -> bool:
        """Whether the encoder reads anything else than it would without the prompt."""
        parts = (self.token_offset, self.visual_offset)
        return bool(self.prompt_length or self.rank) or any(part is not None for part in parts)

    def vectors(self) -> Float[Tensor, "prompt d_model"] | None:
        """Return P; None if m = 0."""
        return self.soft_prompt if self.source is None else self.source()

    def offset(self, text_length: int) -> Float[Tensor, "text d_model"] | None:
        """Return `scale * A[:n] @ B`, the shift of each of the first n text positions; None at rank 0.

        Raises:
            ValueError: If the text is longer than `max_source_length`.
        """
        if text_length > self.max_source_length:
            raise ValueError(
                f"the text has {text_length} tokens and the prompt was built for "
                f"max_source_length={self.max_source_length}; truncate the text or build the prompt "
                "with a larger max_source_length"
            )
        if self.offset_a is None or self.offset_b is None:
            return None
        if self.training or torch.is_grad_enabled() or torch.compiler.is_compiling():
            # The step of a fused optimizer does not raise a tensor's version, so nothing is cached here.
            self._cache = None
            return self.offset_a[:text_length] @ self.offset_b * self.scale
        return self._cached_offset(self.offset_a.detach(), self.offset_b.detach())[:text_length]

    def train(self, mode: bool = True) -> "DePT":
        """Set the mode, and clear the cached offset."""
        self._cache = None
        return super().train(mode)

    def _cached_offset(
        self, a: Float[Tensor, "source rank"], b: Float[Tensor, "rank d_model"]
    ) -> Float[Tensor, "source d_model"]:
        """Return the whole product for inference, computed again when A, B or the precision change.

        A change in place raises a tensor's version. Any other change gives it another storage, whose
        address cannot be the old one, because the cache keeps the old one alive.
        """
        kind = a.device.type
        autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        key = (a.data_ptr(), a._version, b.data_ptr(), b._version, a.dtype, a.device, self.scale, autocast)
        if self._cache is None or self._cache[0] != key:
            self._cache = (key, a, b, a @ b * self.scale)
        return self._cache[-1]

    @torch.no_grad()
    def init_prompt(self, embeddings: Float[Tensor, "tokens d_model"]) -> None:
        """Start the soft prompt from word embeddings, repeated or cut to m vectors.

        Raises:
            ValueError: If there is no embedding.
        """
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
        """Return the trainable parameters by learning rate, `prompt` (alpha1) and `low_rank` (alpha2).

        `prompt` has what moves P by about its own step, `low_rank` all that multiplies it or shifts the text.
        """
        of_source = {} if self.source is None else self.source.parameter_groups()
        offsets = (self.token_offset, self.visual_offset, self.memory_offset)
        of_tokens = [
            parameter for offset in offsets if offset is not None for parameter in offset.parameters()
        ]
        groups = {
            "prompt": [self.soft_prompt, *of_source.get("prompt", [])],
            "low_rank": [self.offset_a, self.offset_b, *of_source.get("low_rank", []), *of_tokens],
        }
        return {name: [p for p in group if p is not None] for name, group in groups.items()}

    def powers(self) -> dict[nn.Parameter, int]:
        """Return by which power of the embeddings' size each parameter grows, all else being equal.

        Were all embeddings c times as large, P, B and B' would be too, and A' as much smaller. The encoder's
        output is normed, and what acts on it stays as it is.
        """
        vectors = set(self.parameter_groups()["prompt"])
        return {
            parameter: 0
            if name.startswith("memory_offset.")
            else next((of for end, of in POWERS.items() if name.endswith(end)), int(parameter in vectors))
            for name, parameter in self.named_parameters()
        }

    @torch.no_grad()
    def resize(self, size: float) -> None:
        """Make of an untrained prompt what it would be for embeddings that are so many times as large."""
        for parameter, power in self.powers().items():
            parameter.mul_(size**power)

    def describe(self) -> dict[str, Any]:
        """Return method and sizes as `adapter.json` has them, enough to build the prompt again."""
        method = self.method
        if method is None:
            method = METHODS["dept" if self.rank else "pt"](
                d_model=self.d_model,
                prompt_length=self.prompt_length,
                rank=self.rank,
                max_source_length=self.max_source_length,
                alpha=self.alpha,
            )
        return method.describe()

    def extra_repr(self) -> str:
        """Return the sizes, for `print(model)`."""
        return (
            f"d_model={self.d_model}, prompt_length={self.prompt_length}, rank={self.rank}, "
            f"max_source_length={self.max_source_length}, alpha={self.alpha}"
        )


def current_name(tensor_name: str) -> str:
    """Return today's name of a tensor in an older file: `prompt.offset_a` for `prompt.lora_a`."""
    return ".".join(RENAMED.get(part, part) for part in tensor_name.split("."))
