"""Batches whose rows have different prompts.

A prompt does not change the model's weights, so rows with different prompts can be computed in one batch.
Each row has its own P and offsets. A shorter P is padded to the length of the longest.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from dept_vl.models.padding import take
from dept_vl.prompts.base import LARGEST_SIZE
from dept_vl.prompts.dept import DePT


class PromptTable:
    """Vectors and offsets of several prompts, computed once for all rows.

    With `padding_first`, the padding of a shorter P stays in front of it, for encoders that count positions
    from the text on (`LanguageModel.counts_text`). Otherwise it is moved to the end of the row, where it
    changes no position. The table has the hidden size, device and data type of the word embeddings.

    Attributes:
        vectors: P of each prompt, (prompts, longest P, d_model), with padding in front.
        lengths: Number of vectors of each prompt.
        offsets: Offset by position of each prompt, (prompts, longest text, d_model), which is zero after the
            prompt's own maximum text length; None if no prompt has one.
        limits: Maximum text length of each prompt, in tokens.
        modules: Modules of each prompt by name, or None. The prompts themselves are not kept.
    """

    def __init__(
        self,
        prompts: Sequence[DePT | None],
        words: Float[Tensor, "words d_model"],
        *,
        padding_first: bool = False,
    ) -> None:
        self.d_model = words.shape[1]
        self.padding_first = padding_first
        none = DePT(self.d_model, prompt_length=0, max_source_length=LARGEST_SIZE)
        filled = [none if prompt is None else prompt for prompt in prompts]
        lengths = [prompt.prompt_length for prompt in filled]
        self.lengths = torch.tensor(lengths, device=words.device)
        self.limits = torch.tensor([prompt.max_source_length for prompt in filled], device=words.device)
        self.vectors = words.new_zeros(len(prompts), max(lengths), self.d_model)
        offsets = [prompt.offset(prompt.max_source_length) for prompt in filled]
        longest = max((len(offset) for offset in offsets if offset is not None), default=0)
        self.offsets = words.new_zeros(len(prompts), longest, self.d_model) if longest else None
        for place, (prompt, offset) in enumerate(zip(filled, offsets, strict=True)):
            vectors = prompt.vectors()
            if vectors is not None:
                self.vectors[place, max(lengths) - len(vectors) :] = vectors
            if offset is not None and self.offsets is not None:
                self.offsets[place, : len(offset)] = offset
        names = ("token_offset", "visual_offset", "memory_offset")
        self.modules = {name: [getattr(prompt, name) for prompt in filled] for name in names}


class RowPrompts(DePT):
    """Prompt without parameters, for a batch whose rows have different prompts: `rows` of a table.

    `lengths` has the number of vectors of each row's prompt, `prompt_length` that of the longest.
    """

    def __init__(self, table: PromptTable, rows: Int[Tensor, " batch"]) -> None:
        super().__init__(table.d_model, prompt_length=0, rank=0, max_source_length=LARGEST_SIZE)
        self.table, self.rows = table, rows
        self.lengths = table.lengths[rows]
        self.prompt_length = int(self.lengths.max())
        self.equal = bool((self.lengths == self.prompt_length).all())

    def forward(
        self, token_embeddings: Float[Tensor, "batch text d_model"], mask: Bool[Tensor, "batch text"]
    ) -> tuple[Float[Tensor, "batch prompt_text d_model"], Bool[Tensor, "batch prompt_text"]]:
        """See `DePT.forward`. Columns at the end that are padding in every row are removed.

        Raises:
            ValueError: If a text is longer than `max_source_length` of its row's prompt.
        """
        self._check_lengths(mask)
        embeddings = self._offset(token_embeddings)
        length = self.prompt_length
        if length == 0:
            return embeddings, mask
        vectors = self.table.vectors[self.rows, self.table.vectors.shape[1] - length :]
        embeddings = torch.cat([vectors.to(embeddings.dtype), embeddings], dim=1)
        padding = length - self.lengths[:, None]
        in_prompt = torch.arange(length, device=mask.device) >= padding
        mask = torch.cat([in_prompt, mask], dim=1)
        if self.equal or self.table.padding_first:
            return embeddings, mask
        # Each row is rotated to the left, so that the padding in front moves to its end.
        columns = (torch.arange(mask.shape[1], device=mask.device) + padding) % mask.shape[1]
        embeddings, mask = take(embeddings, columns), take(mask, columns)
        width = int(mask.any(0).nonzero().max()) + 1
        return embeddings[:, :width], mask[:, :width]

    def _check_lengths(self, mask: Bool[Tensor, "batch text"]) -> None:
        limits = self.table.limits[self.rows]
        too_long = (mask.sum(1) > limits).nonzero().flatten().tolist()
        if too_long:
            row = too_long[0]
            raise ValueError(
                f"the text of row {row} has {int(mask[row].sum())} tokens and its prompt was built for "
                f"max_source_length={int(limits[row])}; truncate the text"
            )

    def _offset(
        self, token_embeddings: Float[Tensor, "batch text d_model"]
    ) -> Float[Tensor, "batch text d_model"]:
        """Return the text with the offsets by position and by token."""
        embeddings, offsets = token_embeddings, self.table.offsets
        if offsets is not None:
            # Columns beyond the table are padding, or in rows without an offset.
            column = torch.arange(embeddings.shape[1], device=embeddings.device)
            position = column.clamp(max=offsets.shape[1] - 1)
            embeddings = embeddings + offsets[self.rows[:, None], position].to(embeddings.dtype)
        return self._shifted(embeddings, token_embeddings, "token_offset")

    @property
    def needs_encoder(self) -> bool:
        """See `DePT.needs_encoder`."""
        return any(module is not None for module in self.table.modules["memory_offset"])

    def shift_visual(
        self, visual: Float[Tensor, "batch visual d_model"]
    ) -> Float[Tensor, "batch visual d_model"]:
        """See `DePT.shift_visual`."""
        return self._shifted(visual, visual, "visual_offset")

    def shift_memory(
        self, memory: Float[Tensor, "batch source d_model"]
    ) -> Float[Tensor, "batch source d_model"]:
        """See `DePT.shift_memory`."""
        return self._shifted(memory, memory, "memory_offset")

    def _shifted(
        self,
        vectors: Float[Tensor, "batch tokens d_model"],
        read: Float[Tensor, "batch tokens d_model"],
        name: str,
    ) -> Float[Tensor, "batch tokens d_model"]:
        """Return `vectors` plus, for each row, the offset of `read` by this module of its own prompt."""
        for place, offset in enumerate(self.table.modules[name]):
            rows = (self.rows == place).nonzero().squeeze(1)
            if offset is not None and len(rows):
                vectors = vectors.index_add(0, rows, offset(read[rows]))
        return vectors


def repeated(*parts: Tensor | None) -> tuple[Int[Tensor, " distinct"], Int[Tensor, " batch"]] | None:
    """Return the first row of each group of equal rows, and the group of each row; None if all rows differ.

    Rows are equal if they are equal in all `parts`, which are tensors of a batch or None.
    """
    flat = torch.cat([part.flatten(1).float() for part in parts if part is not None], dim=1)
    _, which = torch.unique(flat, dim=0, return_inverse=True)
    count, rows = int(which.max()) + 1, torch.arange(len(which), device=which.device)
    if count == len(which):
        return None
    return rows.new_full((count,), len(which)).scatter_reduce(0, which, rows, "amin"), which


class RowProjections(nn.Module):
    """Visual projection for a batch whose rows have different projections.

    `parts` are the projections, each with the indices of its rows; together they are all rows.
    """

    def __init__(self, parts: Sequence[tuple[nn.Module | None, Int[Tensor, " _"]]]) -> None:
        super().__init__()
        self.parts = [(part, rows) for part, rows in parts if part is not None]

    def forward(
        self, features: Float[Tensor, "batch images tokens d_vision"]
    ) -> Float[Tensor, "batch images*tokens d_model"]:
        """See `VisualProjection.forward`."""
        if len(self.parts) == 1:
            whole: Tensor = self.parts[0][0](features)
            return whole
        projected = [projection(features[rows]) for projection, rows in self.parts]
        order = torch.cat([rows for _, rows in self.parts]).argsort()
        return torch.cat(projected)[order]
