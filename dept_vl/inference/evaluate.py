"""Predict and score a split. The result does not depend on the number of processes."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from jaxtyping import Int
from torch import Tensor

from dept_vl._utils.processes import on_main
from dept_vl._utils.terminal import counted, waiting
from dept_vl.data import workers as readers
from dept_vl.data.collate import Batch, Collator
from dept_vl.inference.decoding import choice_options, generation_options, spellings
from dept_vl.models.prompted import PromptedModel
from dept_vl.models.sharding import is_spread
from dept_vl.models.tokens import target_texts
from dept_vl.tasks.base import Decoding, Task
from dept_vl.tasks.io.predictions import ExampleId

Generate = Callable[..., torch.Tensor]
"""`PromptedModel.generate`, or a function that returns the same token ids."""
NO_ANSWER = ""
"""Prediction for an example whose image cannot be read; it counts as wrong."""


@dataclass(frozen=True)
class Evaluation:
    """Predictions and scores of a split."""

    predictions: dict[ExampleId, str]  # by example id, in the form that a submission has
    scores: dict[str, float]  # by metric; empty if no answers are published
    text_tokens: float  # mean number of tokens of a text
    skipped: tuple[ExampleId, ...] = ()  # ids of examples whose image could not be read


def decode(
    model: PromptedModel,
    batch: Batch,
    options: Mapping[str, Any],
    spelled: Mapping[str, str],
    generate: Generate | None = None,
) -> list[str]:
    """Return the predictions for a batch.

    `options` and `spelled` come from `decoding.generation_options` and `decoding.spellings`; `generate` is
    called instead of `model.generate`, except for examples with choices.
    """
    inputs: dict[str, Any] = batch.inputs()
    tokenizer = model.backbone.tokenizer
    choices = batch.choices or ((),) * len(batch.ids)
    free, chosen = [""] * len(choices), [""] * len(choices)
    if not all(choices):
        free = written(tokenizer, (generate or model.generate)(**inputs, **options), spelled)
    if any(choices):
        longest = max(choices, key=len)  # stands in for rows without choices
        ranked = {**options, **choice_options([of_row or longest for of_row in choices], tokenizer)}
        chosen = target_texts(tokenizer, model.generate(**inputs, **ranked))
    return [
        spellings(tokenizer, of_row).get(text, text) if of_row else answer
        for answer, text, of_row in zip(free, chosen, choices, strict=True)
    ]


def written(tokenizer: Any, tokens: Int[Tensor, "sequences target"], spelled: Mapping[str, str]) -> list[str]:
    """Decode token ids to text, and replace the text of a candidate by the candidate itself."""
    return [spelled.get(text, text) for text in target_texts(tokenizer, tokens)]


def checked_scores(task: Task, scores: Mapping[str, Any]) -> dict[str, float]:
    """Return the scores of a task as plain numbers, the primary one first; empty if there are none.

    Raise ValueError if the primary score is missing, or a score is not a finite number.
    """
    numbers = {}
    for name, value in scores.items():
        try:
            numbers[name] = float(value)
        except (TypeError, ValueError):
            numbers[name] = math.nan
        if not math.isfinite(numbers[name]):
            raise ValueError(
                f"the metric {name} of {task.name} is {value!r:.60}; expected a finite number, so give one "
                "where the metric is undefined, too"
            )
    if numbers and task.primary not in numbers:
        raise ValueError(
            f"expected {task.primary}, the primary metric of {task.name}, among its metrics; found "
            f"{', '.join(numbers)}"
        )
    return {task.primary: numbers.pop(task.primary), **numbers} if numbers else {}


@torch.no_grad()
def evaluate(
    model: PromptedModel,
    task: Task,
    collator: Collator,
    accelerator: Accelerator,
    *,
    batch_size: int,
    decoding: Decoding | None = None,
    num_workers: int = 0,
    generate: Generate | None = None,
) -> Evaluation:
    """Predict a split, divided among the processes, and score all predictions.

    `model` is not wrapped by accelerate, and `batch_size` is per process. `decoding` defaults to the task's,
    and `generate` to `model.generate`; `num_workers` processes read images.
    """
    was_training = model.training
    model.eval()
    tokenizer, decoding = model.backbone.tokenizer, decoding or task.decoding
    options, spelled = generation_options(decoding, tokenizer), spellings(tokenizer, decoding.candidates)
    mine = list(range(accelerator.process_index, len(task), accelerator.num_processes))
    spread = is_spread(model)
    if spread:
        # Parameters are sharded, so all processes have to decode equally many batches and tokens.
        options |= {"synced_gpus": True}
        if len(mine) * accelerator.num_processes < len(task) or not mine:
            mine.append(0)
    loader = readers.load(
        task, num_workers, sampler=mine, batch_size=batch_size, collate_fn=collator.of_examples
    )

    def rows_of(batch: Batch) -> int:
        """Estimate the rows of all processes, assuming that they progress equally."""
        return (len(batch.ids) + len(batch.skipped)) * int(accelerator.num_processes)

    answers: list[tuple[ExampleId, str]] = []
    lengths: list[tuple[ExampleId, int]] = []
    skipped: list[ExampleId] = []
    for batch in counted("evaluating", loader, len(task), size=rows_of):
        skipped.extend(batch.skipped)
        if not batch.ids:
            if spread:
                raise ValueError(
                    f"no image of a batch could be read (ids {list(batch.skipped[:5])}, ...), and the other "
                    "processes cannot continue without this one; repair the images, or evaluate with the "
                    "backbone whole"
                )
            continue
        moved = batch.to(accelerator.device)
        with accelerator.autocast():
            texts = decode(model, moved, options, spelled, generate)
        answers.extend(zip(batch.ids, map(task.written, texts), strict=True))
        lengths.extend(zip(batch.ids, batch.attention_mask.sum(1).tolist(), strict=True))
    model.train(was_training)
    answers.extend((example_id, NO_ANSWER) for example_id in skipped)
    predictions: dict[ExampleId, str] = dict(gather_object(answers))
    # Only once, because some scorers start external programs.
    with waiting("scoring answers"):
        scores = on_main(accelerator, lambda: checked_scores(task, task.score(predictions)))
    return Evaluation(
        predictions,
        scores,
        sum(dict(gather_object(lengths)).values()) / max(1, len(task)),
        tuple(dict.fromkeys(gather_object(skipped))),
    )
