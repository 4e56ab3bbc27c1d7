"""The training loop."""

import signal
import threading
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import DataLoader

from dept_vl._utils.printable import say
from dept_vl._utils.processes import main_first, on_main
from dept_vl._utils.run_files import BEST, LAST, LOG_FILE
from dept_vl.adapters.adapter import Adapter
from dept_vl.config import OptimOptions, TrainOptions
from dept_vl.data import workers as readers
from dept_vl.data.collate import Batch, Collator, Draw
from dept_vl.data.lengths import source_lengths
from dept_vl.data.sampling import TrainingBatches, TrainingDraws
from dept_vl.data.splits import Splits, answering_of
from dept_vl.inference.evaluate import Generate, evaluate
from dept_vl.models.prompted import PromptedModel
from dept_vl.models.sharding import average_gradients, is_spread
from dept_vl.training.checkpoint import TrainingState
from dept_vl.training.graphs import Backward, GraphedStep, Inputs
from dept_vl.training.log import Log
from dept_vl.training.optim import build_optimizer, build_schedule, clip, sizes_of
from dept_vl.training.progress import Progress

ECHO_SECONDS = 3.0
"""A second Ctrl-C within this many seconds is taken for a repetition of the first one."""


class Loop:
    """Training loop. It trains `model.parameter_groups()` and keeps the best adapter on the dev splits.

    Every batch is of one task, the same task on all processes. With several tasks, the mean of their primary
    scores decides which adapter is best. Only this class updates `Progress`.

    `collator` makes training batches and `dev_collator` evaluation batches. `generate`, if given, predicts
    evaluation batches instead of the model. With `graphs`, steps are recorded as CUDA graphs.
    """

    def __init__(
        self,
        model: PromptedModel,
        tasks: Sequence[Splits],
        collator: Collator,
        dev_collator: Collator,
        accelerator: Accelerator,
        output_dir: Path,
        options: TrainOptions,
        optim: OptimOptions,
        *,
        checkpoint: Path | None = None,
        graphs: bool = False,
        generate: Generate | None = None,
    ) -> None:
        self.model, self.tasks, self.dev_collator, self.generate = model, tasks, dev_collator, generate
        self.accelerator, self.output_dir, self.options = accelerator, output_dir, options
        self.sizes = sizes_of(model, optim)
        optimizer = build_optimizer(model.parameter_groups(), optim, self.sizes)
        self.schedule = build_schedule(optimizer, optim, options.max_steps)
        self.state = TrainingState(output_dir, model, optimizer, self.schedule, accelerator)
        self.progress = Progress() if checkpoint is None else self.state.load(checkpoint)
        # Training calls the wrapped model, because the bare one would not synchronise gradients.
        self.spread = is_spread(model)
        self.wrapped = model if self.spread else accelerator.prepare_model(model)
        self.optimizer = accelerator.prepare_optimizer(optimizer)
        self.trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        self.backward: Backward = self._backward
        if graphs:
            sizes = {task.options.task_batch_size or options.per_device_batch_size for task in tasks}
            self.backward = GraphedStep(self._backward, self.trained, sizes, accelerator.device, say)
        self.batches = iter(self._loader(collator))
        if checkpoint is not None:
            self.state.load_random_state(checkpoint)
        self.log = Log(
            accelerator, output_dir / LOG_FILE, self.progress, options.max_steps, options.eval_every
        )

    def run(self) -> Progress:
        """Train to the last step, and leave the model with the best adapter loaded.

        Ctrl-C and SIGTERM end the loop after the current step or evaluation and write a checkpoint. A run
        resumed from it gives the same results as an uninterrupted one. A loss that is not finite is a
        NotFiniteError, which names the step and the ids of the batch.
        """
        progress, options = self.progress, self.options
        self.model.train()
        with closing(self.log), _Interrupt() as interrupt:
            end = min(options.max_steps, options.pause_at or options.max_steps)
            while progress.steps < end and not self._out_of_patience():
                self._step(end, interrupt)
                if progress.stopped_by:
                    break
            if progress.stopped_by == signal.SIGINT and not progress.best_step:
                # The user should get an adapter; this evaluation is neither logged nor in the checkpoint.
                self._evaluate(keep=False)
        self._save_adapter(LAST, progress.scores)
        if progress.best_step:
            Adapter.load(self.output_dir / BEST).apply(self.model)
        return progress

    def _loader(self, collator: Collator) -> DataLoader[Draw]:
        """Return the training batches of this process, starting at the next step."""
        options, accelerator = self.options, self.accelerator
        lengths = None
        if options.group_by_length:
            with main_first(accelerator):  # the first to count keeps the lengths for all
                whole = [source_lengths(task.train, collator.tokenizer) for task in self.tasks]
            lengths = [of_task.clip(max=collator.max_source_length) for of_task in whole]
        return readers.load(
            TrainingDraws([task.train for task in self.tasks], options.seed),
            options.num_workers,
            batch_sampler=TrainingBatches(
                [len(task.train) for task in self.tasks],
                [task.options.task_batch_size or options.per_device_batch_size for task in self.tasks],
                seed=options.seed,
                process=accelerator.process_index,
                processes=accelerator.num_processes,
                lengths=lengths,
                start=self.progress.steps * options.gradient_accumulation_steps,
            ),
            collate_fn=collator,
        )

    def _step(self, end: int, interrupt: "_Interrupt") -> None:
        """Take one optimizer step, then log, evaluate and save if they are due."""
        progress, options, accelerator = self.progress, self.options, self.accelerator
        started = time.perf_counter()
        losses = [self._learn() for _ in range(options.gradient_accumulation_steps)]
        rates = {group["name"]: group["lr"] for group in self.optimizer.param_groups}
        self.schedule.step()
        progress.steps += 1
        self.log.line.advance(progress.steps)
        step, last = progress.steps, progress.steps == end
        evaluating = last or step % options.eval_every == 0
        saving = last or (options.checkpoint_every > 0 and step % options.checkpoint_every == 0)
        agreed = evaluating or step % options.log_every == 0
        progress.stopped_by = interrupt.requested(accelerator, agreed=agreed)
        logging = agreed or saving
        if logging or progress.stopped_by:
            loss, examples, skipped = self.log.look(torch.stack(losses).mean())
            progress.examples += examples
            progress.skipped += skipped
        progress.train_seconds += time.perf_counter() - started  # now that the device has ended the step
        if logging:
            self.log.loss(loss, rates)
        if evaluating:
            # A pause can add an evaluation, which must not change the random numbers that dropout draws next.
            extra = step % options.eval_every != 0
            with torch.random.fork_rng(devices=[], enabled=extra):
                self._evaluate()
            progress.stopped_by = progress.stopped_by or interrupt.requested(accelerator, agreed=True)
        # Saved after the last step too, so that a run stopped while it scores the test split resumes there.
        if saving or progress.stopped_by or self._out_of_patience():
            self.state.save(replace(progress, stopped_by=0))

    def _learn(self) -> Tensor:
        """Train on one batch and return its loss as a tensor: reading it would wait for the device."""
        options, accelerator = self.options, self.accelerator
        batch = next(self.batches)
        # Counted before the batch is moved, because reading a count from the device would wait for it.
        tokens = encoder_tokens(self.model, batch)
        batch = batch.to(accelerator.device)
        _check_readable(batch, self.progress.steps + 1)
        with accelerator.accumulate(*(() if self.spread else (self.wrapped,))):
            loss = self.backward(batch.training_inputs())
            if accelerator.sync_gradients:
                if self.spread:
                    average_gradients(self.trained, accelerator)
                clip(self.trained, options.max_grad_norm, self.sizes)
            self.optimizer.step()
            self.optimizer.zero_grad()
        self.log.note(batch, tokens, loss)
        return loss

    def _backward(self, inputs: Inputs) -> Tensor:
        """Run forward and backward on a batch and return its loss."""
        with self.accelerator.autocast():
            loss: Tensor = self.wrapped(**inputs).loss
        # accelerate's backward and clipping need engines that a backbone on several devices lacks.
        (loss / self.options.gradient_accumulation_steps).backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    def _out_of_patience(self) -> bool:
        return 0 < self.options.patience <= self.progress.evaluations_without_progress

    def _evaluate(self, *, keep: bool = True) -> None:
        """Evaluate on the dev splits and save the adapter if it is the best; log the scores if `keep`."""
        progress = self.progress
        started = time.perf_counter()
        score, scores = self._score_dev()
        progress.eval_seconds += time.perf_counter() - started
        self.log.scores(_primary(self.tasks), score, scores, keep=keep)
        progress.evaluations_without_progress += 1
        better = score > progress.best_score
        progress.scores = scores
        progress.history.append((progress.steps, score))
        if better:
            progress.best_scores, progress.best_step = scores, progress.steps
            progress.evaluations_without_progress = 0
            self._save_adapter(BEST, scores)

    def _score_dev(self) -> tuple[float, dict[str, float]]:
        """Return the score that decides, and all scores (with the task's name if there are several)."""
        deciding: list[float] = []
        scores: dict[str, float] = {}
        for task in self.tasks:
            of_task = evaluate(
                self.model,
                task.dev,
                self.dev_collator,
                self.accelerator,
                batch_size=self.options.eval_batch_size,
                decoding=task.decoding,
                num_workers=self.options.num_workers,
                generate=self.generate,
            ).scores
            deciding.append(of_task[task.chosen_by])
            prefix = f"{task.dev.name}/" if len(self.tasks) > 1 else ""
            scores |= {prefix + name: value for name, value in of_task.items()}
        return sum(deciding) / len(deciding), scores

    def _save_adapter(self, name: str, scores: dict[str, float]) -> None:
        names, case = "+".join(task.dev.name for task in self.tasks), self.tasks[0].dev.question_case
        adapter = Adapter.of(
            self.model, task=names, metrics=scores, question_case=case, answering=answering_of(self.tasks)
        )
        on_main(self.accelerator, lambda: adapter.save(self.output_dir / name))


def _primary(tasks: Sequence[Splits]) -> str:
    """Return the name of the score that decides."""
    if len(tasks) == 1:
        return tasks[0].chosen_by
    return "mean of " + ", ".join(f"{task.dev.name} {task.chosen_by}" for task in tasks)


def encoder_tokens(model: PromptedModel, batch: Batch) -> int:
    """Count the tokens that the encoder reads for a batch (prompt, text and visual), without padding."""
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
            "look at the image folder with dept-vl data check; a new run with a larger "
            "--per_device_batch_size gets past a few damaged images"
        )


class _Interrupt:
    """Context manager that turns Ctrl-C or SIGTERM into a request to stop. A later Ctrl-C kills as usual."""

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.signal = 0
        self.asked_at = 0.0
        self.previous: dict[int, Any] = {}

    def __enter__(self) -> "_Interrupt":
        # Only the main thread may set handlers; in other threads the handlers stay as they are.
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
        """Return the signal that any process received. Several processes exchange it only if `agreed`."""
        if accelerator.num_processes == 1:
            return self.signal
        if not agreed:
            return 0
        flags = accelerator.gather(torch.tensor([self.signal], device=accelerator.device))
        return int(flags.max().item())
