"""The encoder's own positions, kept to the text (`visual_position_bias="none"`)."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

Segments = tuple[int, int]
"""How many of a call's first columns are prompt, and how many of its last are visual; the rest are text."""
STOCK: Segments = (0, 0)
"""All columns are text: the encoder as transformers has it."""


class TextPositions:
    """Hooks that leave prompt and visual columns of `[prompt ; text ; visual]` without position signal.

    T5's relative bias becomes zero for every pair with a visual column; BART's learned positions count the
    text alone, and its norm of embeddings may leave visual columns as they are. The hooks are on parts of the
    encoder, which see one sequence, so the segments travel beside it: as the keyword argument `segments` of
    the encoder's call.

    Invariants of `_segments`, which nothing outside this class reads or writes:

    - Set before each call of the encoder, from its `segments`, which the encoder itself never gets; a call
      without them sets `STOCK`. A call therefore never sees the segments of another.
    - Read by the hooks on these modules, during the call only, except for gradient checkpointing:
      it runs the layers again in the backward pass, after other calls perhaps. The gradient of a call's
      output comes first there, and sets that call's segments again.
    - Not cleared after a call: the next one sets them.
    - One thread calls the encoder at a time. In a compiled graph the segments are constants of the graph.

    Args:
        encoder: Hooked in place, for good.
        visual_normed: Visual columns bypass the norm of embeddings, having a norm of their own.

    Attributes:
        counts_text: Positions are columns counted from the text's first (BART), whatever is before it.

    Raises:
        ValueError: If the encoder has neither T5's nor BART's positions.
    """

    def __init__(self, encoder: PreTrainedModel, visual_normed: bool = False) -> None:
        self._segments = STOCK
        self.counts_text = False
        hooked = False
        for name, module in encoder.named_modules():
            if name.endswith(".relative_attention_bias"):  # in the first block; UMT5: in every block
                module.register_forward_hook(self._without_visual_bias)
                hooked = True
            elif name == "embed_positions":
                module.register_forward_hook(self._positions_of_text)
                hooked = self.counts_text = True
            elif name == "layernorm_embedding" and visual_normed:
                module.register_forward_hook(self._without_visual_norm)
        if not hooked:
            raise ValueError(
                f"{type(encoder).__name__} has neither T5's relative_attention_bias nor BART's "
                "embed_positions, which visual_position_bias='none' needs; 'relative' supports any "
                "encoder-decoder"
            )
        encoder.register_forward_pre_hook(self._begin_call, with_kwargs=True)
        encoder.register_forward_hook(self._end_call)

    def _begin_call(
        self, encoder: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        self._segments = named.pop("segments", STOCK)
        return inputs, named

    def _end_call(self, encoder: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        hidden, segments = output[0], self._segments
        if hidden.requires_grad and not torch.compiler.is_compiling():
            hidden.register_hook(lambda _: setattr(self, "_segments", segments))

    def _without_visual_bias(
        self, module: nn.Module, inputs: object, bias: Float[Tensor, "query key heads"]
    ) -> Float[Tensor, "query key heads"]:
        _, visual = self._segments
        if visual == 0:
            return bias
        text = bias.shape[0] - visual
        return nn.functional.pad(bias[:text, :text], (0, 0, 0, visual, 0, visual))

    def _positions_of_text(
        self, module: nn.Module, inputs: object, positions: Float[Tensor, "batch source d_model"]
    ) -> Float[Tensor, "batch source d_model"]:
        prompt, visual = self._segments
        text = positions.shape[1] - prompt - visual
        return nn.functional.pad(positions[:, :text], (0, 0, prompt, visual))

    def _without_visual_norm(
        self,
        module: nn.Module,
        inputs: tuple[Float[Tensor, "batch source d_model"]],
        normed: Float[Tensor, "batch source d_model"],
    ) -> Float[Tensor, "batch source d_model"]:
        _, visual = self._segments
        text = normed.shape[1] - visual
        return torch.cat([normed[:, :text], inputs[0][:, text:].to(normed.dtype)], dim=1)
