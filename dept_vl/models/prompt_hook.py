"""Insertion of a prompt into a pretrained model, by placeholder tokens and a hook on the word embeddings.

For each prompt vector, a token of an ordinary word is inserted after the start token of the source. The model
embeds these placeholders like other tokens. The hook replaces their embeddings by P and adds the offset to
the text. The model itself handles masks, positions, caches and images.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from dept_vl._utils.errors import UsageError
from dept_vl.models.padding import inserting, packing, take
from dept_vl.prompts.dept import DePT


@dataclass(frozen=True)
class Placement:
    """Source with placeholders, and the positions of prompt and text in it."""

    ids: Int[Tensor, "batch source"]  # token ids of the source, with placeholders
    mask: Bool[Tensor, "batch source"]  # mask that is True on tokens and placeholders
    others: dict[str, Tensor]  # further inputs with a value per token, such as token types
    columns: Int[Tensor, "batch source"]  # column in `[P ; text]` of each token; -1 for images and padding
    order: Int[Tensor, "batch text"]  # columns of each row's text tokens, followed by other columns
    is_text: Bool[Tensor, "batch text"]  # mask that is True on the columns in `order` that are text


def place(
    prompt: DePT | None,
    ids: Int[Tensor, "batch source"],
    mask: Bool[Tensor, "batch source"],
    is_text: Bool[Tensor, "batch source"],
    others: Mapping[str, Tensor],
    *,
    placeholder: int | Int[Tensor, "batch 1"],
    start: int | None = None,
    padding_first: bool | None = False,
) -> Placement:
    """Insert placeholders into a source, and move its padding to one side.

    `others` are further inputs with a value per token, which is zero for placeholders. The start token stays
    in front of them. `padding_first` moves padding to the left instead of the right; None leaves it in place.
    """
    batch = len(ids)
    length = 0 if prompt is None else prompt.prompt_length
    lengths = getattr(prompt, "lengths", None)
    in_prompt = torch.arange(length, device=ids.device).expand(batch, -1)
    real = torch.ones_like(in_prompt, dtype=torch.bool)
    if lengths is not None:  # rows with different prompts, of which shorter ones are padded on the left
        real = in_prompt >= length - lengths[:, None]
    text = torch.where(is_text, is_text.cumsum(1) - 1 + length, -1)
    mask = mask.bool()
    behind = mask
    if start is not None:
        first = (mask.cumsum(1) == 1) & mask
        behind = mask & ~(first & (ids == start))
    # One order of columns for all inputs: placeholders go after padding and start, then padding to one side.
    at = inserting(behind, length)
    if padding_first is not None:
        at = take(at, packing(take(torch.cat([real, mask], dim=1), at), padding_first=padding_first))

    def put_in(front: Tensor, row: Tensor) -> Tensor:
        return take(torch.cat([front, row], dim=1), at)

    ids = put_in(torch.as_tensor(placeholder, device=ids.device).expand_as(in_prompt), ids)
    columns = put_in(in_prompt.where(real, -1), text)
    rows = {name: put_in(row.new_zeros(batch, length, *row.shape[2:]), row) for name, row in others.items()}
    mask = put_in(real, mask)
    texts = columns >= length
    order = packing(texts)[:, : int(texts.sum(1).max())]
    return Placement(ids, mask, rows, columns, order, take(texts, order))


def text_of(
    ids: Int[Tensor, "batch source"], mask: Bool[Tensor, "batch source"], image_tokens: Int[Tensor, " tokens"]
) -> Bool[Tensor, "batch source"]:
    """Return a mask of text tokens: all but padding and those from the first to the last image token."""
    image = torch.isin(ids, image_tokens.to(ids.device)) & mask
    begun = image.cumsum(1) > 0
    ended = image.flip(1).cumsum(1).flip(1) == 0
    return mask & (~begun | ended)


def words_of(model: PreTrainedModel) -> Any:
    """Return the word embeddings of the source: an `nn.Embedding`, or a wrapper of it."""
    if is_encoder_decoder(model.config) and not hasattr(model, "get_image_features"):
        model = model.get_encoder()  # encoder and decoder can have separate word embeddings
    return model.get_input_embeddings()


def is_encoder_decoder(config: PretrainedConfig) -> bool:
    """Return whether a model is an encoder-decoder."""
    return bool(config.is_encoder_decoder or config.get_text_config().is_encoder_decoder)


@contextmanager
def prompting(embedding: nn.Module, prompt: DePT | None, placed: Placement) -> Iterator[None]:
    """Apply a prompt to the word embeddings of a source within a `with` statement.

    Inputs with repeated rows (beams) or appended tokens are recognised.
    """
    if prompt is None:
        yield
        return
    hook = embedding.register_forward_hook(
        lambda module, inputs, named, embedded: put(prompt, placed, (*inputs, *named.values())[0], embedded),
        with_kwargs=True,
    )
    try:
        yield
    finally:
        hook.remove()


def put(prompt: DePT, placed: Placement, ids: Any, embedded: Tensor) -> Tensor | None:
    """Return the embeddings with prompt and offset, or None if `ids` are not those of the source."""
    rows, width = placed.ids.shape
    # Other calls: inputs without token ids, decoding steps, or inputs of a decoder.
    if ids.ndim != 2 or ids.shape[1] < width or ids.shape[0] % rows:
        return None
    copies = ids.shape[0] // rows
    source, columns = (
        (tensor if copies == 1 else tensor.repeat_interleave(copies, 0)).to(embedded.device)
        for tensor in (placed.ids, placed.columns)
    )
    changed = columns >= 0
    # Only prompt and text are compared, because models may replace image tokens by padding.
    if not bool(((ids[:, :width] == source) | ~changed).all()):
        return None
    read = embedded[:, :width]
    order, is_text = placed.order.to(embedded.device), placed.is_text.to(embedded.device)
    prompted = _prompted(prompt, take(read[::copies], order), is_text)
    if copies > 1:
        prompted = prompted.repeat_interleave(copies, 0)
    both = torch.cat([read, prompted], dim=1)
    at = torch.where(changed, columns + width, torch.arange(width, device=columns.device))
    at = at + both.shape[1] * torch.arange(len(at), device=at.device)[:, None]
    # Looking up rows of a table is three times as fast as gathering single values.
    source_read = nn.functional.embedding(at, both.flatten(0, 1))
    return torch.cat([source_read, embedded[:, width:]], dim=1) if ids.shape[1] > width else source_read


def _prompted(
    prompt: DePT, text: Float[Tensor, "batch text d_model"], is_text: Bool[Tensor, "batch text"]
) -> Float[Tensor, "batch prompt_text d_model"]:
    """Return `[P ; text]` with the offset added to the text, in the data type of the embeddings."""
    prompted: Tensor = prompt(text, is_text)[0]
    if prompted.shape[1] == 0:  # neither prompt nor text
        prompted = text.new_zeros(len(text), 1, text.shape[2])
    return prompted.to(text.dtype)


def check_text_alone(prompt: DePT) -> None:
    """Raise UsageError if a prompt of a pretrained model changes more than the text."""
    if prompt.needs_encoder or prompt.visual_offset is not None:
        raise UsageError(
            "in a pretrained model, a prompt can only change the text: use pt, dept, adept, hybrid, ulpt, "
            f"lopt or residual, without visual_offset; found the method {prompt.describe()['method']}"
        )
