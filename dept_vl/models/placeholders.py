"""A prompt in a pretrained model, by placeholder tokens and one hook on the word embeddings.

The source gets as many tokens of an ordinary word as the prompt has vectors, behind its start token and in
front of everything else. The model looks them up as any others; the hook puts P in their places and adds the
offset to the text. Masks, positions, caches and the places of images are the model's own doing.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from dept_vl.models.padding import inserting, packing, take
from dept_vl.prompts.dept import DePT


@dataclass(frozen=True)
class Placement:
    """A source with placeholders, and what belongs in their places.

    Attributes:
        ids: Tokens of the source.
        mask: True on tokens, placeholders included.
        others: Further values per token, such as its type.
        columns: The column of `[P ; text]` that each token takes; -1 for images and padding.
        order: Columns of each row's text, moved together.
        is_text: True on those of `order` that are text.
    """

    ids: Int[Tensor, "batch source"]
    mask: Bool[Tensor, "batch source"]
    others: dict[str, Tensor]
    columns: Int[Tensor, "batch source"]
    order: Int[Tensor, "batch text"]
    is_text: Bool[Tensor, "batch text"]


def place(
    prompt: DePT | None,
    ids: Int[Tensor, "batch source"],
    mask: Bool[Tensor, "batch source"],
    is_text: Bool[Tensor, "batch source"],
    others: Mapping[str, Tensor],
    *,
    placeholder: int,
    start: int | None = None,
    padding_first: bool | None = False,
) -> Placement:
    """Put placeholders into a source, and its padding to one side.

    Args:
        prompt: None puts none in.
        ids: Tokens of the source, padded on either side.
        mask: True on tokens.
        is_text: True on tokens of text.
        others: Further values per token; they are zero for placeholders.
        placeholder: Token that the model treats as any word.
        start: Token that stays in front, if a row begins with it.
        padding_first: Padding goes first, so that an answer follows the text; None leaves it where it is.
    """
    batch = len(ids)
    length = 0 if prompt is None else prompt.prompt_length
    lengths = getattr(prompt, "lengths", None)
    in_prompt = torch.arange(length, device=ids.device).expand(batch, -1)
    real = torch.ones_like(in_prompt, dtype=torch.bool)
    if lengths is not None:  # of rows with prompts of their own, a shorter one's padding is in front
        real = in_prompt >= length - lengths[:, None]
    text = torch.where(is_text, is_text.cumsum(1) - 1 + length, -1)
    mask = mask.bool()
    behind = mask
    if start is not None:
        first = (mask.cumsum(1) == 1) & mask
        behind = mask & ~(first & (ids == start))
    # One order of columns for all: placeholders behind padding and start, then padding to its side.
    at = inserting(behind, length)
    if padding_first is not None:
        at = take(at, packing(take(torch.cat([real, mask], dim=1), at), padding_first=padding_first))

    def put_in(front: Tensor, row: Tensor) -> Tensor:
        return take(torch.cat([front, row], dim=1), at)

    ids = put_in(torch.full_like(in_prompt, placeholder), ids)
    columns = put_in(in_prompt.where(real, -1), text)
    rows = {name: put_in(row.new_zeros(batch, length, *row.shape[2:]), row) for name, row in others.items()}
    mask = put_in(real, mask)
    texts = columns >= length
    order = packing(texts)[:, : int(texts.sum(1).max())]
    return Placement(ids, mask, rows, columns, order, take(texts, order))


def text_of(
    ids: Int[Tensor, "batch source"], mask: Bool[Tensor, "batch source"], image_tokens: Int[Tensor, " tokens"]
) -> Bool[Tensor, "batch source"]:
    """Which tokens are text: all but padding and what is between the first of an image and the last."""
    image = torch.isin(ids, image_tokens.to(ids.device)) & mask
    begun = image.cumsum(1) > 0
    ended = image.flip(1).cumsum(1).flip(1) == 0
    return mask & (~begun | ended)


def words_of(model: PreTrainedModel) -> Any:
    """The `nn.Embedding` that looks up the tokens of a source, or what was put around it."""
    if is_encoder_decoder(model.config) and not hasattr(model, "get_image_features"):
        model = model.get_encoder()  # where each stack of a language model has its own
    return model.get_input_embeddings()


def is_encoder_decoder(config: PretrainedConfig) -> bool:
    """Whether a model's answer is a sequence of its own."""
    return bool(config.is_encoder_decoder or config.get_text_config().is_encoder_decoder)


@contextmanager
def prompting(embedding: nn.Module, prompt: DePT | None, placed: Placement) -> Iterator[None]:
    """Within, the word embeddings of a source are those of its prompt; of anything else as ever.

    Args:
        embedding: The model's, of the source's tokens.
        prompt: None changes nothing.
        placed: What the model reads; it may repeat rows (beams) and append tokens (an answer).
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
    """Replace the embeddings of placeholders and text, if it is the source that is looked up."""
    rows, width = placed.ids.shape
    # Not a single token to compare with, a step of decoding, or a decoder's own.
    if ids.ndim != 2 or ids.shape[1] < width or ids.shape[0] % rows:
        return None
    copies = ids.shape[0] // rows
    source, columns = (
        (tensor if copies == 1 else tensor.repeat_interleave(copies, 0)).to(embedded.device)
        for tensor in (placed.ids, placed.columns)
    )
    changed = columns >= 0
    # Images may be looked up as padding.
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
    # Rows of a table: three times as fast as gathering every number of them.
    source_read = nn.functional.embedding(at, both.flatten(0, 1))
    return torch.cat([source_read, embedded[:, width:]], dim=1) if ids.shape[1] > width else source_read


def _prompted(
    prompt: DePT, text: Float[Tensor, "batch text d_model"], is_text: Bool[Tensor, "batch text"]
) -> Float[Tensor, "batch prompt_text d_model"]:
    """`[P ; text]` with the offset on the text, in the precision of the embeddings."""
    prompted: Tensor = prompt(text, is_text)[0]
    if prompted.shape[1] == 0:  # neither prompt nor text
        prompted = text.new_zeros(len(text), 1, text.shape[2])
    return prompted.to(text.dtype)
