"""Many adapters on one backbone, a different one for every row of a batch if need be.

A prompt is no weight, so that rows with different prompts go through the model together: P, the offset by
position, the offset by token and the visual projection are those of the row's adapter. Prompts of unequal
length are padded, and padding is where it moves nothing: behind the text where positions are relative or
counted from the first that is read, in front of the prompt where they are counted from the text on (BART
with `visual_position_bias="none"`).
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from dept_vl.adapters.adapter import Adapter
from dept_vl.inference.loading import LONGEST_TEXT, find_backbone, load, run_of
from dept_vl.inference.predictor import Ask, Images, Predictor, answer_all, as_images, line_up
from dept_vl.models.backbone import Backbone
from dept_vl.models.padding import pack
from dept_vl.models.prompted import PromptedModel
from dept_vl.prompts.budget import LARGEST_SIZE
from dept_vl.prompts.dept import DePT
from dept_vl.tasks import asked

Names = Sequence[str | None]
"""Adapter of each row; None is the backbone alone."""


class ManyAdapters:
    """Adapters by name, on one backbone.

    Args:
        backbone: As it was before any of them.
        predictors: Loaded on it (`load(..., backbone=backbone)`).
        base_task: How rows without adapter are asked; None takes the first adapter's task.

    Attributes:
        readers: Who answers a row, by name; None the backbone alone.

    Raises:
        ValueError: If there is no adapter, or one is on another backbone or has trained the language model
            itself.
    """

    def __init__(
        self, backbone: Backbone, predictors: Mapping[str, Predictor], *, base_task: str | None = None
    ) -> None:
        if not predictors:
            raise ValueError("expected one adapter or more, found none")
        self.readers: dict[str | None, Predictor] = {}
        for name, predictor in predictors.items():
            self.readers[name] = predictor
            if predictor.model.backbone.language is not backbone.language:
                raise ValueError(
                    f"the adapter {name!r} is on a language model of its own: load it on the backbone of the "
                    "others (load(..., backbone=backbone)); one that has trained the language model itself "
                    "cannot share it"
                )
        self.backbone = backbone.eval()
        task = next(iter(predictors.values())).task if base_task is None else asked(base_task)
        self.readers[None] = Predictor(PromptedModel(backbone), None, task, task.decoding, LONGEST_TEXT)
        self._places = {name: place for place, name in enumerate(self.readers)}
        adapters = [reader.adapter for reader in self.readers.values()]
        self._prompts = PromptTable(
            [None if a is None or a.prompt is None else a.build_prompt() for a in adapters], backbone
        )

    def answer(
        self,
        image: Images = None,
        question: str | Sequence[str] = "",
        *,
        adapters: str | Names | None,
        batch_size: int = 32,
    ) -> str | list[str]:
        """The answer to a question, or the answers to several, by their adapters.

        As `Predictor.answer`; one image, question or adapter goes with every one of several others. Rows of
        one batch may be of different tasks; those whose answers are decoded differently, or that have
        another number of images, go through the model apart.

        Args:
            image: See `Predictor.answer`; in a list each row's: an image, a pair for NLVR2, or None.
            question: See `Predictor.answer`.
            adapters: Name of each row's, or one for all; None is the backbone alone.
            batch_size: Questions answered at a time.

        Raises:
            FileNotFoundError: If there is no such image.
            ValueError: As `Predictor.answer`; or if there is no such adapter.
        """
        single = adapters is None or isinstance(adapters, str)
        names: list[str | None] = (
            [adapters] if adapters is None or isinstance(adapters, str) else list(adapters)
        )
        readers = [self.reader(name) for name in names]
        pairs = all(reader.task.image_count > 1 for reader in readers)
        (images, questions, readers), alone = line_up(
            images=as_images(image, pairs=pairs),
            questions=([question], True) if isinstance(question, str) else (list(question), False),
            adapters=(readers, single),
        )
        rows = zip(readers, questions, images, strict=True)
        name_of = {id(reader): name for name, reader in self.readers.items()}
        answers = answer_all(
            [Ask(*row) for row in rows],
            lambda asks: self.model([name_of[id(ask.reader)] for ask in asks]),
            batch_size,
        )
        return answers[0] if alone else answers

    def model(self, adapters: Names) -> PromptedModel:
        """The model for a batch whose rows have these adapters, for inference.

        It shares the backbone, and is as quick to make as a few small tensors.

        Raises:
            ValueError: If there is no such adapter.
        """
        readers = {name: self.reader(name) for name in adapters}
        device = self.backbone.kind.word_embeddings.weight.device
        rows = torch.tensor([self._places[name] for name in adapters], device=device)
        backbone = self.backbone
        if backbone.visual_projection is not None:
            parts = [
                (reader.model.backbone.visual_projection, (rows == self._places[name]).nonzero().squeeze(1))
                for name, reader in readers.items()
            ]
            backbone = backbone.with_projection(RowProjections(parts))
        return PromptedModel(backbone, RowPrompts(self._prompts, rows))

    def reader(self, name: str | None) -> Predictor:
        """Who answers the rows of an adapter; None the backbone alone.

        Raises:
            ValueError: If there is no such adapter.
        """
        if name not in self.readers:
            known = ", ".join(repr(known) for known in self.readers)
            raise ValueError(f"there is no adapter {name!r}; there are {known}")
        return self.readers[name]


class PromptTable:
    """All that several prompts do, computed once for inference.

    Args:
        prompts: Of any method and size; None is none.
        backbone: In front of whose text they go.

    Attributes:
        vectors: P of each, (prompts, longest P, d_model), padding first.
        lengths: Vectors of each.
        offsets: By position, of each, (prompts, longest text, d_model), zero behind its own longest text;
            None if there is none.
        limits: Longest text of each, in tokens.
        token_offsets: Of each; None is none.
        padding_first: Padding of P stays in front of it.
    """

    @torch.no_grad()
    def __init__(self, prompts: Sequence[DePT | None], backbone: Backbone) -> None:
        words = backbone.kind.word_embeddings.weight
        self.d_model = backbone.d_model
        self.padding_first = backbone.kind.counts_text
        lengths = [0 if prompt is None else prompt.prompt_length for prompt in prompts]
        limits = [LARGEST_SIZE if prompt is None else prompt.max_source_length for prompt in prompts]
        self.lengths = torch.tensor(lengths, device=words.device)
        self.limits = torch.tensor(limits, device=words.device)
        self.vectors = words.new_zeros(len(prompts), max(lengths), self.d_model)
        moved = [None if prompt is None else prompt.to(words.device).eval() for prompt in prompts]
        offsets = [None if prompt is None else prompt.offset(prompt.max_source_length) for prompt in moved]
        longest = max((len(offset) for offset in offsets if offset is not None), default=0)
        self.offsets = words.new_zeros(len(prompts), longest, self.d_model) if longest else None
        for place, (prompt, offset) in enumerate(zip(moved, offsets, strict=True)):
            vectors = None if prompt is None else prompt.vectors()
            if vectors is not None:
                self.vectors[place, max(lengths) - len(vectors) :] = vectors
            if offset is not None and self.offsets is not None:
                self.offsets[place, : len(offset)] = offset
        self.token_offsets = [None if prompt is None else prompt.token_offset for prompt in moved]


class RowPrompts(DePT):
    """In the place of a prompt: every row of a batch has one of a table's. For inference.

    Args:
        table: The prompts.
        rows: Which of them each row has.

    Attributes:
        prompt_length: Of the longest prompt here.
    """

    def __init__(self, table: PromptTable, rows: Int[Tensor, " batch"]) -> None:
        super().__init__(table.d_model, prompt_length=0, rank=0, max_source_length=LARGEST_SIZE)
        self.table, self.rows = table, rows
        self.lengths = table.lengths[rows]
        self.prompt_length = int(self.lengths.max())
        self.equal = bool((self.lengths == self.prompt_length).all())

    def forward(
        self,
        token_embeddings: Float[Tensor, "batch text d_model"],
        mask: Bool[Tensor, "batch text"],
        positions: Int[Tensor, "batch text"] | None = None,
    ) -> tuple[Float[Tensor, "batch prompt_text d_model"], Bool[Tensor, "batch prompt_text"]]:
        """See `DePT.forward`. What is padding is False in the mask.

        Raises:
            ValueError: If a text is longer than its row's prompt was built for.
        """
        table, rows = self.table, self.rows
        too_long = (mask.sum(1) > table.limits[rows]).nonzero().flatten().tolist()
        if too_long:
            row = too_long[0]
            raise ValueError(
                f"the text of row {row} has {int(mask[row].sum())} tokens and its prompt was built for "
                f"max_source_length={int(table.limits[rows[row]])}; truncate the text"
            )
        embeddings = token_embeddings
        if table.offsets is not None:
            if positions is None:
                positions = torch.arange(mask.shape[1], device=mask.device)[None]
            # What is beyond the table is padding, or of a row without offset.
            inside = positions.clamp(max=table.offsets.shape[1] - 1)
            embeddings = embeddings + table.offsets[rows[:, None], inside].to(embeddings.dtype)
        for place, offset in enumerate(table.token_offsets):
            if offset is not None:
                own = (rows == place).nonzero().squeeze(1)
                embeddings = embeddings.index_add(0, own, offset(token_embeddings[own]))
        length = self.prompt_length
        if length == 0:
            return embeddings, mask
        first = table.vectors.shape[1] - length
        vectors = table.vectors[rows, first:].to(embeddings.dtype)
        embeddings = torch.cat([vectors, embeddings], dim=1)
        there = torch.arange(length, device=mask.device) >= length - self.lengths[:, None]
        mask = torch.cat([there, mask], dim=1)
        if self.equal or table.padding_first:
            return embeddings, mask
        embeddings, mask = pack(embeddings, mask)
        width = int(mask.sum(1).max())
        return embeddings[:, :width], mask[:, :width]


class RowProjections(nn.Module):
    """In the place of a visual projection: every row of a batch goes through its own.

    Args:
        parts: Projections, and the rows that go through each; together all rows.
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


def load_many(
    sources: Mapping[str, str | Path],
    *,
    backbone: Backbone | str | Path | None = None,
    device: str | torch.device | None = None,
    base_task: str | None = None,
) -> ManyAdapters:
    """Several adapters of one backbone, loaded once.

    Args:
        sources: As `load` takes them, by the name that each is to have.
        backbone: See `find_backbone`; None takes that of the first.
        device: See `find_backbone`.
        base_task: See `ManyAdapters`.

    Raises:
        FileNotFoundError: If there is no such adapter, or no backbone.
        ValueError: As `load` and `ManyAdapters`.
    """
    if not sources:
        raise ValueError("expected one adapter or more, found none")
    first = next(iter(sources.values()))
    shared = find_backbone(Adapter.from_pretrained(first), run_of(Path(first)), backbone, device)
    predictors = {name: load(source, backbone=shared) for name, source in sources.items()}
    return ManyAdapters(shared, predictors, base_task=base_task)
