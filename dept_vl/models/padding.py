"""Reordering of columns in padded batches: moving padding to one side, and inserting columns.

Padding is moved only here. Prompts (`prompts.dept`) get rows whose padding is on the right, so that the
column of a text token is its position.
"""

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor


def packing(
    mask: Bool[Tensor, "batch length"], *, padding_first: bool = False
) -> Int[Tensor, "batch length"]:
    """Return the order of columns, for `take`, that moves padding to the right, or to the left.

    The other columns keep their order. `packing(mask).argsort(dim=1)` is the inverse.
    """
    return torch.argsort(mask.to(torch.uint8), dim=1, descending=not padding_first, stable=True)


def take(
    values: Shaped[Tensor, "batch length *rest"], columns: Int[Tensor, "batch taken"], dim: int = 1
) -> Shaped[Tensor, "batch _ *_"]:
    """Return columns of each row by their indices, along any dimension but the first."""
    index_shape = [1] * values.ndim
    index_shape[0], index_shape[dim] = columns.shape
    taken_shape = [*values.shape]
    taken_shape[dim] = columns.shape[1]
    return values.gather(dim, columns.view(index_shape).expand(taken_shape))


def pack(
    embeddings: Float[Tensor, "batch length d_model"],
    mask: Bool[Tensor, "batch length"],
    *,
    padding_first: bool = False,
) -> tuple[Float[Tensor, "batch length d_model"], Bool[Tensor, "batch length"]]:
    """Move the padding of embeddings and mask to the right, or to the left."""
    columns = packing(mask, padding_first=padding_first)
    return take(embeddings, columns), take(mask, columns)


def insert(
    front: Shaped[Tensor, "batch prompt *rest"],
    row: Shaped[Tensor, "batch source *rest"],
    mask: Shaped[Tensor, "batch source"],
) -> Shaped[Tensor, "batch prompt_source *rest"]:
    """Insert columns in front of each row, but after padding on the left.

    Otherwise that padding would be between prompt and text, and change their distance.
    """
    return take(torch.cat([front, row], dim=1), inserting(mask, front.shape[1]))


def inserting(mask: Shaped[Tensor, "batch source"], length: int) -> Int[Tensor, "batch prompt_source"]:
    """Return the order of columns, for `take`, that moves the first `length` columns after left padding."""
    padding = (mask.cumsum(1) == 0).sum(1, keepdim=True)
    column = torch.arange(length + mask.shape[1], device=mask.device)
    columns = torch.where(column < padding + length, column - padding, column)
    return torch.where(column < padding, column + length, columns)
