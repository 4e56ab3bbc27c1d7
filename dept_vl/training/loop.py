"""The one training loop."""

import signal
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from dept_vl._utils.run_files import BEST, LAST, LOG_FILE
from dept_vl.adapters.adapter import Adapter
from dept_vl.config import OptimOptions, TrainOptions
from dept_vl.data import workers as readers
from dept_vl.data.collate import Batch, Collator
from dept_vl.data.lengths import source_lengths
from dept_vl.data.sampling import TrainingBatches, TrainingDraws
from dept_vl.inference.evaluate import evaluate
from dept_vl.models.prompted import PromptedModel
from dept_vl.models.sharding import average_gradients, is_spread
from dept_vl.tasks.base import Decoding, Task
from dept_vl.training.checkpoint import Progress, TrainingState
from dept_vl.training.log import Log
from dept_vl.training.optim import build_optimizer, build_schedule

ECHO_SECONDS = 3.0
"""A second Ctrl-C within this time is the first one's echo."""


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


def train(
    model: PromptedModel,
    tasks: Sequence[TrainingTask],
    collator: Collator,
    dev_collator: Collator,
    accelerator: Accelerator,
    output_dir: Path,
    options: TrainOptions,
    optim: OptimOptions,
    *,
    checkpoint: Path | None = None,
) -> Progress:
    """Train what `model.parameter_groups()` names; keep the adapter that does best on the dev splits.

    Of several tasks every batch is of one, the same on all processes, and the mean of their primary
    figures decides. The model ends with the best adapter loaded. Ctrl-C and SIGTERM end the run after
    the step or evaluation at hand, with a checkpoint from which it can go on as if nothing had happened.

    Args:
        model: The unwrapped model.
        tasks: What is learnt.
        collator: Of training batches.
        dev_collator: Of batches to evaluate.
        accelerator: Of the run.
        output_dir: Folder of the run.
        options: How long, how fast, and how often to look.
        optim: Learning rates.
        checkpoint: Where to go on; None starts from the beginning.

    Raises:
        ValueError: If a loss is not finite; the message names the step and the batch's ids.
    """
    optimizer = build_optimizer(model.parameter_groups(), optim)
    schedule = build_schedule(optimizer, optim, options.max_steps)
    state = TrainingState(output_dir, model, optimizer, schedule, accelerator)
    progress = Progress() if checkpoint is None else state.load(checkpoint)
    # The wrapped model is the one called: a call past the wrapper would not synchronise gradients.
    spread = is_spread(model)
    wrapped = model if spread else accelerator.prepare_model(model)
    optimizer = accelerator.prepare_optimizer(optimizer)
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    lengths = None
    if options.group_by_length:
        with accelerator.local_main_process_first():  # the first to count keeps the lengths for all
            whole = [source_lengths(task.train, collator.tokenizer) for task in tasks]
        lengths = [of_task.clip(max=collator.max_source_length) for of_task in whole]
    loader = readers.load(
        TrainingDraws([task.train for task in tasks], options.seed),
        options.num_workers,
        batch_sampler=TrainingBatches(
            [len(task.train) for task in tasks],
            [task.batch_size for task in tasks],
            seed=options.seed,
            process=accelerator.process_index,
            processes=accelerator.num_processes,
            lengths=lengths,
            start=progress.steps * options.gradient_accumulation_steps,
        ),
        collate_fn=collator,
    )
    batches = iter(loader)
    if checkpoint is not None:
        state.load_random_state(checkpoint)
    names = "+".join(task.dev.name for task in tasks)
    log = Log(accelerator, output_dir / LOG_FILE, progress, options.max_steps, options.eval_every)
    model.train()
    with _Interrupt() as interrupt:
        end = min(options.max_steps, options.pause_at or options.max_steps)
        while progress.steps < end and not _patience_is_over(progress, options):
            started = time.perf_counter()
            losses = []
            for _ in range(options.gradient_accumulation_steps):
                batch = next(batches)
                tokens = encoder_tokens(
                    model, batch
                )  # here, since on a device it would have to be waited for
                batch = batch.to(accelerator.device)
                _check_readable(batch, progress.steps + 1)
                with accelerator.accumulate(*(() if spread else (wrapped,))):
                    with accelerator.autocast():
                        loss = wrapped(**batch.training_inputs()).loss
                    # accelerate's own backward and clipping ask for engines that a spread backbone lacks.
                    (loss / options.gradient_accumulation_steps).backward()
                    if accelerator.sync_gradients:
                        if spread:
                            average_gradients(trained, accelerator)
                        nn.utils.clip_grad_norm_(trained, options.max_grad_norm)
                    optimizer.step()
                    optimizer.zero_grad()
                losses.append(loss.detach())
                log.note(batch, tokens, loss)
            rates = {group["name"]: group["lr"] for group in optimizer.param_groups}
            schedule.step()
            progress.steps += 1
            log.advance()
            step, last = progress.steps, progress.steps == end
            evaluating = last or step % options.eval_every == 0
            saving = options.checkpoint_every > 0 and (last or step % options.checkpoint_every == 0)
            saving = saving or (last and end < options.max_steps)
            agreed = evaluating or step % options.log_every == 0
            progress.stopped_by = interrupt.requested(accelerator, agreed=agreed)
            logging = agreed or saving
            if logging or progress.stopped_by:
                mean_loss = log.look(torch.stack(losses).mean())
            progress.train_seconds += time.perf_counter() - started  # now that the device has ended the step
            if logging:
                log.loss(mean_loss, rates)
            if evaluating:
                _evaluate_dev(model, tasks, dev_collator, accelerator, options, progress, output_dir, log)
                progress.stopped_by = progress.stopped_by or interrupt.requested(accelerator, agreed=True)
            if saving or progress.stopped_by:
                state.save(replace(progress, stopped_by=0))
            if progress.stopped_by:
                break
        if progress.stopped_by == signal.SIGINT and not progress.best_step:
            # Somebody is waiting for an adapter; neither checkpoint nor log knows of this evaluation.
            _evaluate_dev(
                model, tasks, dev_collator, accelerator, options, progress, output_dir, log, keep=False
            )
    log.close()
    if accelerator.is_main_process:
        Adapter.of(model, task=names, metrics=progress.scores).save(output_dir / LAST)
    accelerator.wait_for_everyone()
    if progress.best_step:
        Adapter.load(output_dir / BEST).apply(model)
    return progress


def _patience_is_over(progress: Progress, options: TrainOptions) -> bool:
    return 0 < options.patience <= progress.evaluations_without_progress


def _evaluate_dev(
    model: PromptedModel,
    tasks: Sequence[TrainingTask],
    collator: Collator,
    accelerator: Accelerator,
    options: TrainOptions,
    progress: Progress,
    output_dir: Path,
    log: Log,
    *,
    keep: bool = True,
) -> None:
    """Evaluate on the dev splits; keep the adapter if it is the best so far, and the figures if asked to."""
    started = time.perf_counter()
    score, scores = _evaluate_all(model, tasks, collator, accelerator, options)
    progress.eval_seconds += time.perf_counter() - started
    log.scores(_primary(tasks), score, scores, keep=keep)
    progress.evaluations_without_progress += 1
    better = score > progress.best_score
    progress.scores = scores
    progress.history.append((progress.steps, score))
    if better:
        progress.best_scores, progress.best_step = scores, progress.steps
        progress.evaluations_without_progress = 0
        if accelerator.is_main_process:
            names = "+".join(task.dev.name for task in tasks)
            Adapter.of(model, task=names, metrics=scores).save(output_dir / BEST)


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


def encoder_tokens(model: PromptedModel, batch: Batch) -> int:
    """Tokens that the encoder reads of a batch: prompt, text and visual ones, padding left out.

    Args:
        model: With its prompt.
        batch: Before it is moved to a device.
    """
    prompt, vision = model.prompt, model.backbone.vision
    images = batch.pixel_values if batch.visual_features is None else batch.visual_features
    each = 0 if prompt is None else prompt.prompt_length
    if vision is not None and images is not None:
        each += images.shape[1] * vision.token_count
    return int(batch.attention_mask.sum()) + each * len(batch.ids)


def _check_readable(batch: Batch, step: int) -> None:
    if not batch.ids:
        raise ValueError(
            f"no image of the batch at step {step} could be read (ids {list(batch.skipped[:5])}, ...); "
            "look at the image folder with scripts/prepare_data.py check; a new run with a larger "
            "--per_device_batch_size gets past a few damaged images"
        )


class _Interrupt:
    """Turns the first Ctrl-C or SIGTERM into a request to stop; a later Ctrl-C kills as usual."""

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.signal = 0
        self.asked_at = 0.0
        self.previous: dict[int, Any] = {}

    def __enter__(self) -> "_Interrupt":
        # Only the main thread may set handlers; elsewhere signals do what they always do.
        if threading.current_thread() is threading.main_thread():
            self.previous = {number: signal.signal(number, self._note) for number in self.SIGNALS}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        # A launcher passes the terminal's Ctrl-C on, so the same one can arrive twice.
        if number == signal.SIGINT and self.signal and time.monotonic() - self.asked_at > ECHO_SECONDS:
            raise KeyboardInterrupt
        if not self.signal:
            self.signal, self.asked_at = number, time.monotonic()

    def requested(self, accelerator: Accelerator, *, agreed: bool) -> int:
        """The signal that any process has got; several look only where all do, since it takes time."""
        if accelerator.num_processes == 1:
            return self.signal
        if not agreed:
            return 0
        flags = accelerator.gather(torch.tensor([self.signal], device=accelerator.device))
        return int(flags.max().item())
