"""Outputs of a frozen encoder for the texts and images of a data set, computed once and kept in memory.

This works for prompts that only act after the encoder (`memory`), while nothing before its output is trained.
A training step then only runs the decoder.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from jaxtyping import Float
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from dept_vl._utils.errors import UsageError
from dept_vl._utils.printable import say
from dept_vl._utils.terminal import counted
from dept_vl.data.lengths import source_lengths
from dept_vl.models.backbone import ENCODED, ENCODED_MASK
from dept_vl.models.prompted import PromptedModel
from dept_vl.tasks.base import Example, Task

Source = tuple[str, tuple[Path, ...]]
"""Text and images of an example."""
Collate = Callable[[Sequence[Example]], Any]
"""Function that makes a batch of examples, skipping those whose images cannot be read."""
BATCH = 64
"""Number of sources to encode at a time."""
GIB = 2**30
WITH_TEXT = ", encoded with the text"
"""Suffix of the visual features' precision in a run's records, if encoder outputs were kept."""


class EncodedSources:
    """Encoder outputs by text and images.

    Args:
        chunks: Encoder outputs, each of several sources concatenated without padding.
        places: Location of each source: index of its chunk, first vector, and end.
        errors: Error message by images, for images that could not be read.
    """

    def __init__(
        self,
        chunks: Sequence[Float[Tensor, "_ d_model"]],
        places: Mapping[Source, tuple[int, int, int]],
        errors: Mapping[tuple[Path, ...], str],
    ) -> None:
        self.chunks, self.places, self.errors = list(chunks), places, errors

    def check(self, images: Sequence[Path]) -> None:
        """Raise ValueError if these images could not be read."""
        if tuple(images) in self.errors:
            raise ValueError(self.errors[tuple(images)])

    def __call__(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """Return the encoder outputs of examples, padded on the right, and their mask."""
        places = [self.places[source_of(example)] for example in examples]
        vectors = [self.chunks[chunk][start:stop] for chunk, start, stop in places]
        masks = [torch.ones(len(of_one), dtype=torch.bool) for of_one in vectors]
        return {
            ENCODED: pad_sequence(vectors, batch_first=True),
            ENCODED_MASK: pad_sequence(masks, batch_first=True),
        }


def source_of(example: Example) -> Source:
    """Return the text and images of an example."""
    return example.source_text, tuple(example.images)


def check_encoder_alone(model: PromptedModel) -> None:
    """Raise UsageError if the encoder's output depends on trained parameters."""
    prompt = model.prompt
    if model.backbone.processor is not None or not model.backbone.language.config.is_encoder_decoder:
        problem = f"is for a composed encoder-decoder (--vision, --language); {model.backbone.name} is none"
    elif prompt is None or not prompt.needs_encoder or prompt.changes_input:
        problem = "is for a prompt that acts behind the encoder alone (--method memory)"
    elif set(model.parameter_groups()) != {"low_rank"}:
        problem = "needs projection and backbone frozen (--no_train_projection, and no --train_backbone)"
    else:
        return
    raise UsageError(f"--features encoded {problem}; take cached or live instead")


def check_memory(
    model: PromptedModel, tasks: Sequence[Task], *, longest: int, itemsize: int, gib: float
) -> None:
    """Raise UsageError if the encoder outputs of all examples exceed `gib` GiB, assuming no equal sources.

    `longest` is the maximum length of a text, in tokens; `itemsize` is the size of a number, in bytes.
    """
    vision = model.backbone.vision
    vectors = 0
    for task in tasks:
        vectors += int(source_lengths(task, model.backbone.tokenizer).clip(max=longest).sum())
        vectors += 0 if vision is None else len(task) * len(task[0].images) * vision.token_count
    needed = vectors * model.backbone.d_model * itemsize / GIB
    if needed > gib:
        raise UsageError(
            f"--features encoded takes {needed:.3g} GiB of memory for these data, and --feature_memory is "
            f"{gib:g}; raise it, or take --features cached"
        )


@torch.no_grad()
def encode_sources(
    model: PromptedModel, examples: Iterable[Example], collate: Collate, accelerator: Accelerator
) -> EncodedSources:
    """Encode every distinct pair of text and images once, in an order that only depends on the data.

    Call `check_encoder_alone` first; the result is wrong if trained parameters change the encoder's output.
    """
    distinct = {source_of(example): example for example in examples}
    # Sorting by length reduces padding.
    order = sorted(distinct, key=lambda source: len(source[0]))
    chunks: list[Tensor] = []
    places: dict[Source, tuple[int, int, int]] = {}
    errors: dict[tuple[Path, ...], str] = {}
    was_training = model.training
    model.eval()
    batches = [order[start : start + BATCH] for start in range(0, len(order), BATCH)]
    for batch in counted("encoding texts with images", batches, len(order), size=len):
        # Ids are positions in the batch, which show the sources that were read.
        read = collate([replace(distinct[source], example_id=place) for place, source in enumerate(batch)])
        unread = [batch[place][1] for place in read.skipped]
        errors |= {images: f"{' or '.join(map(str, images))} could not be read" for images in unread}
        if not read.ids:
            continue
        with accelerator.autocast():
            encoded, mask = model.backbone.read(None, **read.to(accelerator.device).inputs())
        ends = accumulate(mask.sum(1).tolist(), initial=0)
        for place, span in zip(read.ids, pairwise(ends), strict=True):
            places[batch[place]] = (len(chunks), *span)
        chunks.append(encoded.last_hidden_state[mask].cpu())
    model.train(was_training)
    say(f"encoder outputs: of {len(places):,} texts with their images, in memory")
    return EncodedSources(chunks, places, errors)
