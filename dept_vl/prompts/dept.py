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
| n      | source length of the current batch, n <= s       | `text`                 |

The encoder reads `[P ; E(x) + scale * A[:n] @ B]` with `scale = alpha / sqrt(r)`. B is initialised to zero,
so an untrained DePT equals plain prompt tuning with m vectors. With r = 0 it stays plain prompt tuning, and
with m = 0 only the offset is left. A plain prompt of l vectors has l*d parameters. DePT has m*d + (s + d)*r
and saves l - m positions in every encoder layer and every decoder cross-attention.

Other methods (see `methods`) compute P from other parameters (`source`), or add to each text token
(`token_offset`), visual token (`visual_offset`) or vector of the encoder's output (`memory_offset`) a
function of that same vector.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Collection
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from dept_vl.prompts.base import METHODS, Method, check_sizes

RENAMED = {"lora_a": "offset_a", "lora_b": "offset_b"}
"""Current name of each parameter that is named differently in older files."""

POWERS = {"offset_b": 1, "down.weight": -1, "up.weight": 1, "up.bias": 1}
"""Exponents for `DePT.powers`, by the end of a parameter's name. Others have 1 if they move P, and else 0."""


class PromptSource(nn.Module, ABC):
    """Module that computes the soft prompt P from its parameters, where P is not trained directly.

    Attributes:
        as_prompt: Names of the parameters whose step changes P by about as much; see `DePT.parameter_groups`.
    """

    as_prompt: ClassVar[Collection[str]]

    @abstractmethod
    def forward(self) -> Float[Tensor, "prompt d_model"]:
        """Return P."""

    @abstractmethod
    def start_from(self, vectors: Float[Tensor, "prompt d_model"]) -> None:
        """Set the parameters so that P is as close to `vectors` as possible."""


class DePT(nn.Module):
    """Trainable prompt with the parameters `soft_prompt` (m, d), `offset_a` (s, r) and `offset_b` (r, d).

    A parameter of size zero is `None`, so every parameter that exists is trained and counted.

    Args:
        d_model: Hidden size of the backbone's word embeddings (d).
        prompt_length: Number of vectors in the soft prompt (m >= 0).
        rank: Rank of the offset by position (r >= 0); 0 for no offset.
        max_source_length: Maximum text length in tokens (s), which is the number of rows of `offset_a`.
        alpha: Numerator of the offset's scale, `alpha / sqrt(rank)`. The paper does not mention a scale;
            the code of DePT's authors uses alpha = 8 and the square root.
        source: Module that computes the m vectors of P; None to train the vectors directly.
        token_offset: Module that computes a shift of each text token from its embedding; None for no shift.
        visual_offset: Module that shifts each visual token at the encoder's input; None for no shift.
        memory_offset: Module that shifts each vector of the encoder's output; None for no shift.

    Attributes:
        method: Method that built the prompt, used by `describe`; None if `DePT` was called directly.

    Raises:
        ValueError: If `prompt_length` or `rank` is negative, or `d_model` or `max_source_length` is below 1.

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

    def forward(
        self, token_embeddings: Float[Tensor, "batch text d_model"], mask: Bool[Tensor, "batch text"]
    ) -> tuple[Float[Tensor, "batch prompt_text d_model"], Bool[Tensor, "batch prompt_text"]]:
        """Add the offsets to the text and put the soft prompt in front of it.

        Args:
            token_embeddings: Frozen word embeddings of the text, without visual tokens. Padding has to be on
                the right (see `models.padding.pack`), so that a token's column is its position.
            mask: True on text tokens, False on padding.

        Returns:
            Embeddings and mask of `[P ; text]`, of length m + n.

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
        """Return the visual tokens with `visual_offset` added."""
        return visual if self.visual_offset is None else visual + self.visual_offset(visual)

    def shift_memory(
        self, memory: Float[Tensor, "batch source d_model"]
    ) -> Float[Tensor, "batch source d_model"]:
        """Return the encoder's output with `memory_offset` added."""
        return memory if self.memory_offset is None else memory + self.memory_offset(memory)

    @property
    def offset_modules(self) -> list[nn.Module]:
        """Modules that shift text tokens, visual tokens and vectors of the encoder's output."""
        modules = (self.token_offset, self.visual_offset, self.memory_offset)
        return [module for module in modules if module is not None]

    @property
    def needs_encoder(self) -> bool:
        """Whether the prompt changes the encoder's output, and so needs a backbone with an encoder."""
        return self.memory_offset is not None

    @property
    def changes_input(self) -> bool:
        """Whether the prompt changes the encoder's input."""
        parts = (self.token_offset, self.visual_offset)
        return bool(self.prompt_length or self.rank) or any(part is not None for part in parts)

    def vectors(self) -> Float[Tensor, "prompt d_model"] | None:
        """Return the soft prompt P, or None if m = 0."""
        return self.soft_prompt if self.source is None else self.source()

    def offset(self, text_length: int) -> Float[Tensor, "text d_model"] | None:
        """Return the offset of the first n text positions, `scale * A[:n] @ B`, or None at rank 0.

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
        return self.offset_a[:text_length] @ self.offset_b * self.scale

    @torch.no_grad()
    def init_prompt(self, embeddings: Float[Tensor, "tokens d_model"]) -> None:
        """Initialise the soft prompt with word embeddings, which are repeated or cut to m vectors.

        Raises:
            ValueError: If `embeddings` is empty and m > 0.
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
        """Return the trainable parameters by learning-rate group: `prompt` (alpha1) and `low_rank` (alpha2).

        `prompt` has the parameters whose step changes P by about as much, `low_rank` all other parameters.
        """
        of_source = () if self.source is None else self.source.as_prompt
        as_prompt = {"soft_prompt", *(f"source.{name}" for name in of_source)}
        groups: dict[str, list[nn.Parameter]] = {"prompt": [], "low_rank": []}
        for name, parameter in self.named_parameters():
            groups["prompt" if name in as_prompt else "low_rank"].append(parameter)
        return groups

    def powers(self) -> dict[nn.Parameter, int]:
        """Return the power of the embeddings' scale by which each parameter has to be multiplied.

        For embeddings c times as large, P, B and B' are multiplied by c and A' is divided by c. The encoder's
        output is normalised, so the parameters of `memory_offset` keep their size.
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
        """Rescale an untrained prompt in place, for embeddings that are `size` times as large."""
        for parameter, power in self.powers().items():
            parameter.mul_(size**power)

    def describe(self) -> dict[str, Any]:
        """Return the method and sizes as in `adapter.json`, from which the prompt can be built again.

        Raises:
            ValueError: If the prompt has modules, and no method that makes them.
        """
        method = self.method
        if method is None:
            if self.source is not None or self.offset_modules:
                raise ValueError(
                    "a prompt with modules is described by its method, and this one has none: make it with "
                    "dept_vl.build_prompt, and a method of your own after dept_vl.register_method"
                )
            method = METHODS["dept" if self.rank else "pt"](
                d_model=self.d_model,
                prompt_length=self.prompt_length,
                rank=self.rank,
                max_source_length=self.max_source_length,
                alpha=self.alpha,
            )
        return method.describe()

    def extra_repr(self) -> str:
        """Return the sizes for `print(model)`."""
        return (
            f"d_model={self.d_model}, prompt_length={self.prompt_length}, rank={self.rank}, "
            f"max_source_length={self.max_source_length}, alpha={self.alpha}"
        )


def current_name(tensor_name: str) -> str:
    """Return the current name of a tensor of an older file, such as `prompt.offset_a` for `prompt.lora_a`."""
    return ".".join(RENAMED.get(part, part) for part in tensor_name.split("."))
