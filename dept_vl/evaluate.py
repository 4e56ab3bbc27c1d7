"""Answer every example of a split and score the answers; the same on any number of processes."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch.utils.data import DataLoader
from tqdm import tqdm

from dept_vl.batch import Collator, EvaluationDraws
from dept_vl.model import PromptedModel
from dept_vl.tasks.example import ExampleId, Task


@dataclass(frozen=True)
class Evaluation:
    """Answers as they go into a submission, their figures, and what the encoder read.

    Attributes:
        predictions: Answer by example id.
        scores: Figures of the task.
        text_tokens: Mean length of a text, in tokens.
    """

    predictions: dict[ExampleId, str]
    scores: dict[str, float]
    text_tokens: float


@torch.no_grad()
def evaluate(
    model: PromptedModel,
    task: Task,
    collator: Collator,
    accelerator: Accelerator,
    *,
    batch_size: int,
    num_beams: int = 1,
    num_workers: int = 0,
    progress: bool = False,
) -> Evaluation:
    """Decode a split, each process its share without padding it, and score the whole.

    Args:
        model: The unwrapped model (its `generate` needs no gradient synchronisation).
        task: The split.
        collator: Without targets.
        accelerator: Of the run.
        batch_size: Examples decoded at a time by one process.
        num_beams: 1 is greedy.
        num_workers: Processes that load images.
        progress: Show a bar on the main process.
    """
    was_training = model.training
    model.eval()
    mine = range(accelerator.process_index, len(task), accelerator.num_processes)
    loader: DataLoader[Any] = DataLoader(
        EvaluationDraws(task),
        sampler=list(mine),
        batch_size=batch_size,
        collate_fn=collator,
        num_workers=num_workers,
    )
    answers: list[tuple[ExampleId, str]] = []
    text_tokens = 0
    for batch in tqdm(loader, desc="evaluating", disable=None if progress else True, leave=False):
        moved = batch.to(accelerator.device)
        with accelerator.autocast():
            tokens = model.generate(**moved.inputs(), max_new_tokens=task.max_new_tokens, num_beams=num_beams)
        texts = model.backbone.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        answers.extend(zip(batch.ids, map(task.written, texts), strict=True))
        text_tokens += int(batch.attention_mask.sum())
    model.train(was_training)
    gathered: list[tuple[ExampleId, str]] = gather_object(answers)
    tokens_read = sum(gather_object([text_tokens]))
    predictions = dict(gathered)
    return Evaluation(predictions, task.score(predictions), tokens_read / max(1, len(task)))


def write_predictions(predictions: Mapping[ExampleId, str], path: Path) -> None:
    """The list of the VQA servers: `[{"question_id": ..., "answer": ...}]`, in order of the ids."""
    # 9 before 10, be the ids numbers or text.
    ids = sorted(predictions, key=lambda key: (len(str(key)), str(key)))
    rows = [{"question_id": key, "answer": predictions[key]} for key in ids]
    path.write_text(json.dumps(rows) + "\n")
