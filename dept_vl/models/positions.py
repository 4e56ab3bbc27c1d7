"""Encoder positions that only apply to the text (`visual_position_bias="none"`)."""

from threading import RLock
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

Segments = tuple[int, int]
"""Number of prompt columns at the start of a call's input, and of visual columns at its end."""
STOCK: Segments = (0, 0)
"""Segments of an input that is all text, for the unchanged encoder of transformers."""
ENCODING = RLock()
"""Lock that `EncoderDecoder.encode` holds in a forward pass, since threads may share an encoder."""


class TextPositions:
    """Hooks that remove position information from parts of `[prompt ; text ; visual]`.

    T5's relative bias becomes zero for every pair with a visual column. BART's learned positions are only
    added to the text, and visual columns may bypass its norm of embeddings (`visual_normed`). The hooks are
    permanent, and on modules that see one sequence, so its segments are passed as the keyword argument
    `segments` of the encoder's call.

    Invariants of `_segments`:

    - Each call of the encoder sets it from its argument `segments`, or to `STOCK` without one, so that a call
      never uses those of another. The hooks read it during the call.
    - Gradient checkpointing runs the layers again in the backward pass, possibly after other calls. A hook on
      the gradient of a call's output then sets that call's segments.
    - `EncoderDecoder.encode` holds `ENCODING` during a forward pass. A backward pass with checkpointing must
      not overlap another thread's call. In a compiled graph, the segments are constants.

    Attributes:
        counts_text: Whether positions are counted from the first text column (BART).

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
