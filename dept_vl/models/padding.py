"""Columns of padded rows: taken in another order, packed to one side, inserted in front of the text.

This is the only place where padding is moved. Prompts (`prompts.dept`) are given rows that are packed
already, so that a column of the text is its position.
"""

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor


def packing(
    mask: Bool[Tensor, "batch length"], *, padding_first: bool = False
) -> Int[Tensor, "batch length"]:
    """The order of columns, for `take`, that moves each row's padding to its end, or to its start.

    The other columns keep their order. `packing(mask).argsort(dim=1)` is the way back.
    """
    return torch.argsort(mask.to(torch.uint8), dim=1, descending=not padding_first, stable=True)


def take(
    values: Shaped[Tensor, "batch length *rest"], columns: Int[Tensor, "batch taken"], dim: int = 1
) -> Shaped[Tensor, "batch _ *_"]:
    """The columns of each row by their numbers, along any dimension but the first."""
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
    """Move every row's padding to its end, or to its start, the order of the rest kept."""
    columns = packing(mask, padding_first=padding_first)
    return take(embeddings, columns), take(mask, columns)


def insert(
    front: Shaped[Tensor, "batch prompt *rest"],
    row: Shaped[Tensor, "batch source *rest"],
    mask: Shaped[Tensor, "batch source"],
) -> Shaped[Tensor, "batch prompt_source *rest"]:
    """Put columns in front of each row, but behind the padding that it begins with.

    Padding on the left would otherwise stand between prompt and text, and change their distance.
    """
    return take(torch.cat([front, row], dim=1), inserting(mask, front.shape[1]))


def inserting(mask: Shaped[Tensor, "batch source"], length: int) -> Int[Tensor, "batch prompt_source"]:
    """The order of columns, for `take`, in which so many in front of a row go behind its padding."""
    padding = (mask.cumsum(1) == 0).sum(1, keepdim=True)
    column = torch.arange(length + mask.shape[1], device=mask.device)
    columns = torch.where(column < padding + length, column - padding, column)
    return torch.where(column < padding, column + length, columns)
