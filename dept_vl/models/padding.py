"""Padding of embeddings."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def pack(
    embeddings: Float[Tensor, "batch length d_model"],
    mask: Bool[Tensor, "batch length"],
    *,
    padding_first: bool = False,
) -> tuple[Float[Tensor, "batch length d_model"], Bool[Tensor, "batch length"]]:
    """Move every row's padding to its end, or to its start, the order of the rest kept."""
    order = torch.argsort(mask.to(torch.uint8), dim=1, descending=not padding_first, stable=True)
    rows = order[..., None].expand_as(embeddings)
    return embeddings.gather(1, rows), mask.gather(1, order)
