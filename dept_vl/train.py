"""The one training loop."""

import json
import math
import signal
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from tqdm import tqdm

from dept_vl.batch import Batch, Collator, TrainingBatches, TrainingDraws
from dept_vl.checkpoint import Adapter
from dept_vl.evaluate import evaluate
from dept_vl.lengths import source_lengths
from dept_vl.model import PromptedModel
from dept_vl.optim import OptimOptions, build_optimizer, build_schedule
from dept_vl.tasks.example import Decoding, Task
from dept_vl.tasks.predictions import ExampleId

BEST, LAST = "best", "last"
"""Folders of a run: the adapter that scored best, and the one at the end."""
LOG_FILE = "log.jsonl"
ECHO_SECONDS = 3.0
"""A second Ctrl-C within this time is the first one's echo."""


@dataclass(frozen=True)
class TrainOptions:
    """How long, how fast, and how often to look."""

    max_steps: int = 10_000
    """Optimizer steps."""
    per_device_batch_size: int = 32
    """Examples per process and forward pass; among several tasks each may have its own."""
    gradient_accumulation_steps: int = 1
    """Forward passes per optimizer step."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this norm over all trained parameters."""
    eval_every: int = 1000
    """Optimizer steps between evaluations on the dev split; the last step is always evaluated."""
    eval_batch_size: int = 128
    """Examples decoded at a time, per process."""
    patience: int = 0
    """Stop after this many evaluations without a better score; 0 never stops early."""
    log_every: int = 20
    """Optimizer steps between lines of the log."""
    num_workers: int = 0
    """Processes that read images; 0 reads them in the training process."""
    group_by_length: bool = False
    """Make batches of texts of about the same length, so that little is padded; every example still comes
    once an epoch."""
    seed: int = 42
    """Of initialisation, order and sampled answers."""


@dataclass(frozen=True)
class TrainingTask:
    """A task to learn.

    Attributes:
        train: The split to learn.
        dev: The split to choose the best adapter on.
        decoding: How answers are decoded.
        batch_size: Examples per process and forward pass.
    """

    train: Task
    dev: Task
    decoding: Decoding
    batch_size: int


@dataclass
class TrainResult:
    """What a training run leaves behind.

    Attributes:
        best_scores: Figures of the best evaluation on the dev splits.
        best_step: When it was made.
        steps: Optimizer steps done.
        train_seconds: Spent in training steps, evaluation left out.
        eval_seconds: Spent in evaluations.
        interrupted: Whether Ctrl-C ended it.
        history: Step and score of each evaluation: the primary figure, of several tasks the mean.
        skipped: Examples left out because their image could not be read, each time they came up.
    """

    best_scores: dict[str, float] | None = None
    best_step: int = 0
    steps: int = 0
    train_seconds: float = 0.0
    eval_seconds: float = 0.0
    interrupted: bool = False
    history: list[tuple[int, float]] = field(default_factory=list)
    skipped: int = 0


def train(
    model: PromptedModel,
    tasks: Sequence[TrainingTask],
    collator: Collator,
    dev_collator: Collator,
    accelerator: Accelerator,
    output_dir: Path,
    options: TrainOptions,
    optim: OptimOptions,
) -> TrainResult:
    """Train what `model.parameter_groups()` names; keep the adapter that does best on the dev splits.

    Of several tasks every batch is of one, the same on all processes, and the mean of their primary
    figures decides. The model ends with the best adapter loaded. Ctrl-C ends the run after the step at
    hand; the adapter is saved either way.

    Raises:
        ValueError: If the loss is not finite; the message names the step and the batch's ids.
    """
    optimizer = build_optimizer(model.parameter_groups(), optim)
    schedule = build_schedule(optimizer, optim, options.max_steps)
    # The wrapped model is the one called: a call past the wrapper would not synchronise gradients.
    wrapped, optimizer = accelerator.prepare(model, optimizer)
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    lengths = None
    if options.group_by_length:
        with accelerator.local_main_process_first():  # the first to count keeps the lengths for all
            whole = [source_lengths(task.train, collator.tokenizer) for task in tasks]
        lengths = [of_task.clip(max=collator.max_source_length) for of_task in whole]
    loader: DataLoader[Any] = DataLoader(
        TrainingDraws([task.train for task in tasks], options.seed),
        batch_sampler=TrainingBatches(
            [len(task.train) for task in tasks],
            [task.batch_size for task in tasks],
            seed=options.seed,
            process=accelerator.process_index,
            processes=accelerator.num_processes,
            lengths=lengths,
        ),
        collate_fn=collator,
        num_workers=options.num_workers,
    )
    batches = iter(loader)
    result = TrainResult()
    log = _Log(accelerator, output_dir / LOG_FILE)
    names = "+".join(task.dev.name for task in tasks)
    seen = skipped_here = 0
    main = accelerator.is_main_process
    # None: no bar where the output is no terminal; the log's lines are printed instead.
    bar = tqdm(total=options.max_steps, desc="training", disable=None if main else True)
    scores: dict[str, float] = {}
    best_score = -math.inf
    evaluations_without_progress = 0
    model.train()
    with _Interrupt() as interrupt:
        for step in range(1, options.max_steps + 1):
            started = time.perf_counter()
            losses = []
            for _ in range(options.gradient_accumulation_steps):
                batch = next(batches).to(accelerator.device)
                _check_readable(batch, step)
                skipped_here += len(batch.skipped)
                seen += len(batch.ids) * accelerator.num_processes
                with accelerator.accumulate(wrapped):
                    loss = wrapped(**batch.training_inputs()).loss
                    accelerator.backward(loss)
                    if accelerator.sync_gradients:
                        accelerator.clip_grad_norm_(trained, options.max_grad_norm)
                    optimizer.step()
                    optimizer.zero_grad()
                losses.append(loss.detach())
            rates = {f"lr/{group['name']}": group["lr"] for group in optimizer.param_groups}
            schedule.step()
            result.steps = step
            result.train_seconds += time.perf_counter() - started
            bar.update()

            if step % options.log_every == 0 or step == options.max_steps:
                totals = torch.stack([torch.stack(losses).mean(), losses[0].new_tensor(skipped_here)])
                mean_loss, skipped = accelerator.reduce(totals, "sum").tolist()
                mean_loss /= accelerator.num_processes
                result.skipped = int(skipped)
                _check_finite(mean_loss, step, batch.ids, output_dir)
                speed = seen / result.train_seconds
                bar.set_postfix(loss=f"{mean_loss:.3f}", samples_per_second=f"{speed:.0f}")
                bad = {"skipped_examples": result.skipped} if result.skipped else {}
                log.write(step, {"loss": mean_loss, **rates, "samples_per_second": round(speed, 1), **bad})
                if main and bar.disable:
                    left = result.train_seconds / step * (options.max_steps - step)
                    print(f"step {step}/{options.max_steps} loss {mean_loss:.3f} {left:.0f} s left")

            stopping = interrupt.requested(accelerator, step, options.log_every)
            ending = step == options.max_steps or (stopping and result.best_scores is None)
            if step % options.eval_every == 0 or ending:
                started = time.perf_counter()
                score, scores = _evaluate_all(model, tasks, dev_collator, accelerator, options)
                result.eval_seconds += time.perf_counter() - started
                log.write(step, {f"dev/{name}": value for name, value in scores.items()})
                result.history.append((step, score))
                if main:
                    bar.write(f"step {step}: dev {_primary(tasks)} {score:.2f}")
                evaluations_without_progress += 1
                if result.best_scores is None or score > best_score:
                    result.best_scores, result.best_step, best_score = scores, step, score
                    evaluations_without_progress = 0
                    _save(model, names, scores, output_dir / BEST, accelerator)
            if stopping:
                result.interrupted = True
                break
            if options.patience and evaluations_without_progress >= options.patience:
                break
    bar.close()
    _save(model, names, scores, output_dir / LAST, accelerator)
    accelerator.wait_for_everyone()
    Adapter.load(output_dir / BEST).apply(model)
    return result


def _evaluate_all(
    model: PromptedModel,
    tasks: Sequence[TrainingTask],
    collator: Collator,
    accelerator: Accelerator,
    options: TrainOptions,
) -> tuple[float, dict[str, float]]:
    """The figure that decides, and all figures; of several tasks each under its name."""
    deciding: list[float] = []
    scores: dict[str, float] = {}
    for task in tasks:
        found = evaluate(
            model,
            task.dev,
            collator,
            accelerator,
            batch_size=options.eval_batch_size,
            decoding=task.decoding,
            num_workers=options.num_workers,
        ).scores
        deciding.append(found[task.dev.primary])
        scores |= {f"{task.dev.name}/{k}" if len(tasks) > 1 else k: value for k, value in found.items()}
    return sum(deciding) / len(deciding), scores


def _primary(tasks: Sequence[TrainingTask]) -> str:
    """What the deciding figure is called."""
    if len(tasks) == 1:
        return tasks[0].dev.primary
    return "mean of " + ", ".join(f"{task.dev.name} {task.dev.primary}" for task in tasks)


def _check_readable(batch: Batch, step: int) -> None:
    if not batch.ids:
        raise ValueError(
            f"no image of the batch at step {step} could be read (ids {list(batch.skipped[:5])}, ...); "
            "look at the image folder with scripts/prepare_data.py check"
        )


def _check_finite(loss: float, step: int, ids: tuple[ExampleId, ...], output_dir: Path) -> None:
    if not math.isfinite(loss):
        raise ValueError(
            f"the loss is {loss} at step {step} (a batch with the ids {list(ids[:5])}, ...); lower the "
            f"learning rates or train in full precision. The best adapter so far is in {output_dir / BEST}"
        )


def _save(
    model: PromptedModel,
    task: str,
    scores: Mapping[str, float],
    folder: Path,
    accelerator: Accelerator,
) -> None:
    if accelerator.is_main_process:
        Adapter.of(model, task=task, metrics=scores).save(folder)


class _Log:
    """A line of JSON for every record, and the same to the run's trackers."""

    def __init__(self, accelerator: Accelerator, path: Path) -> None:
        self.accelerator, self.path = accelerator, path

    def write(self, step: int, record: Mapping[str, float]) -> None:
        if self.accelerator.is_main_process:
            with self.path.open("a") as file:
                file.write(json.dumps({"step": step, **record}) + "\n")
        self.accelerator.log(dict(record), step=step)


class _Interrupt:
    """Turns the first Ctrl-C into a request to stop after the step; a later one kills as usual."""

    def __init__(self) -> None:
        self.here = False
        self.asked_at = 0.0
        self.previous: Any = None

    def __enter__(self) -> "_Interrupt":
        # Only the main thread may set handlers; elsewhere Ctrl-C stays what it is.
        if threading.current_thread() is threading.main_thread():
            self.previous = signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(self, *exception: object) -> None:
        if self.previous is not None:
            signal.signal(signal.SIGINT, self.previous)

    def _note(self, number: int, frame: FrameType | None) -> None:
        # A launcher passes the terminal's Ctrl-C on, so the same one can arrive twice.
        if self.here and time.monotonic() - self.asked_at > ECHO_SECONDS:
            raise KeyboardInterrupt
        if not self.here:
            self.here, self.asked_at = True, time.monotonic()

    def requested(self, accelerator: Accelerator, step: int, every: int) -> bool:
        """Whether any process was asked to stop; several processes agree every so many steps."""
        if accelerator.num_processes == 1:
            return self.here
        if step % every:
            return False
        flag = torch.tensor(float(self.here), device=accelerator.device)
        return bool(accelerator.reduce(flag, "sum").item() > 0)
