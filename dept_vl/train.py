"""The one training loop."""

import json
import math
import signal
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from dept_vl.batch import Batch, Collator, TrainingBatches, TrainingDraws, prepare_reader
from dept_vl.checkpoint import Adapter
from dept_vl.evaluate import evaluate
from dept_vl.files import one_line, write_atomically, writing
from dept_vl.lengths import source_lengths
from dept_vl.model import PromptedModel
from dept_vl.optim import OptimOptions, build_optimizer, build_schedule
from dept_vl.spread import average_gradients, is_spread
from dept_vl.state import Progress, TrainingState
from dept_vl.tasks.example import Decoding, Task
from dept_vl.tasks.predictions import ExampleId

BEST, LAST = "best", "last"
"""Folders of a run: the adapter that scored best, and the one at the end."""
LOG_FILE = "log.jsonl"
SPIKE, SPIKE_WINDOW = 5.0, 20
"""A loss is remarked on above so many times the median of so many logged before it."""
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
    checkpoint_every: int = 1000
    """Optimizer steps between checkpoints, from which a run that was killed goes on exactly (on disk
    three times what is trained, the last two are kept); 0 writes one only when the run is stopped."""
    pause_at: int = 0
    """Stop at this step, with an evaluation and a checkpoint, to go on by --resume; 0 goes through."""
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
    gradient_checkpointing: bool = False
    """Run every layer of the language model a second time in the backward pass instead of keeping what it
    computed: less memory, about a third more time."""
    compile: bool = False
    """Compile the step with torch.compile, once for all lengths; the first steps take minutes. Needs a C++
    compiler, and on a GPU Triton."""
    deterministic: bool = False
    """Only operations that give the same bits every time. On a CPU a seed repeats a run without it; on
    a GPU some sums (gradients of look-ups and of attention) come in any order, and runs of one seed
    differ in the last digits. Slower there, and an operation without such a form is refused by name."""


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
    the step at hand, with a checkpoint from which it can go on as if nothing had happened.

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
    loader: DataLoader[Any] = DataLoader(
        TrainingDraws([task.train for task in tasks], options.seed),
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
        num_workers=options.num_workers,
        worker_init_fn=prepare_reader,
    )
    batches = iter(loader)
    if checkpoint is not None:
        state.load_random_state(checkpoint)
    names = "+".join(task.dev.name for task in tasks)
    log = _Log(accelerator, output_dir / LOG_FILE, progress, options)
    model.train()
    with _Interrupt() as interrupt:
        end = min(options.max_steps, options.pause_at or options.max_steps)
        while progress.steps < end and not _patience_is_over(progress, options):
            started = time.perf_counter()
            losses = []
            for _ in range(options.gradient_accumulation_steps):
                batch = next(batches).to(accelerator.device)
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
                log.note(batch, loss)
            rates = {f"lr/{group['name']}": group["lr"] for group in optimizer.param_groups}
            schedule.step()
            progress.steps += 1
            progress.train_seconds += time.perf_counter() - started
            step, last = progress.steps, progress.steps == end
            evaluating = last or step % options.eval_every == 0
            saving = options.checkpoint_every > 0 and (last or step % options.checkpoint_every == 0)
            saving = saving or (last and end < options.max_steps)
            progress.stopped_by = interrupt.requested(accelerator, step, options.log_every)
            logging = evaluating or saving or step % options.log_every == 0
            if logging or progress.stopped_by:
                mean_loss = log.look(torch.stack(losses).mean())
            if logging:
                log.loss(mean_loss, rates)
            if evaluating:
                _evaluate_dev(model, tasks, dev_collator, accelerator, options, progress, output_dir, log)
            if saving or progress.stopped_by:
                state.save(replace(progress, stopped_by=0))
            if progress.stopped_by:
                break
        if progress.stopped_by == signal.SIGINT and not progress.best_step:
            # Somebody is waiting for an adapter; the checkpoint knows nothing of this evaluation.
            _evaluate_dev(model, tasks, dev_collator, accelerator, options, progress, output_dir, log)
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
    log: "_Log",
) -> None:
    """Evaluate on the dev splits; keep the adapter if it is the best so far."""
    started = time.perf_counter()
    score, scores = _evaluate_all(model, tasks, collator, accelerator, options)
    progress.eval_seconds += time.perf_counter() - started
    log.scores(_primary(tasks), score, scores)
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


def _check_readable(batch: Batch, step: int) -> None:
    if not batch.ids:
        raise ValueError(
            f"no image of the batch at step {step} could be read (ids {list(batch.skipped[:5])}, ...); "
            "look at the image folder with scripts/prepare_data.py check"
        )


class _Log:
    """A line of JSON for every record, the same to the run's trackers, and what a person sees.

    Losses are looked at only when they are logged, since each look waits for the device; a loss that
    is not finite is found then, with the step and the batch that it came from.
    """

    def __init__(
        self, accelerator: Accelerator, path: Path, progress: Progress, options: TrainOptions
    ) -> None:
        self.accelerator, self.path, self.progress, self.options = accelerator, path, progress, options
        self.pending: list[tuple[int, tuple[ExampleId, ...], Tensor]] = []
        self.examples = self.skipped = 0
        self.usual: deque[float] = deque(maxlen=SPIKE_WINDOW)
        main = accelerator.is_main_process
        if main:
            _cut_log(path, progress.steps)
        # None: no bar where the output is no terminal; the log's lines are printed instead.
        self.bar = tqdm(
            total=options.max_steps, initial=progress.steps, desc="training", disable=None if main else True
        )

    def note(self, batch: Batch, loss: Tensor) -> None:
        """Remember a batch until the next look."""
        self.pending.append((self.progress.steps + 1, batch.ids, loss.detach()))
        self.examples += len(batch.ids)
        self.skipped += len(batch.skipped)

    def look(self, loss: Tensor) -> float:
        """Check all losses since the last look and count what was learnt.

        Args:
            loss: Of the last step, on this process.

        Returns:
            The same over all processes.

        Raises:
            ValueError: If one is not finite.
        """
        progress, accelerator = self.progress, self.accelerator
        self._check_finite()
        own = torch.stack([loss, loss.new_tensor(self.examples), loss.new_tensor(self.skipped)]).double()
        mean_loss, examples, skipped = accelerator.reduce(own, "sum").tolist()
        mean_loss /= accelerator.num_processes
        progress.examples += round(examples)
        progress.skipped += round(skipped)
        self.examples = self.skipped = 0
        return float(mean_loss)

    def loss(self, mean_loss: float, rates: Mapping[str, float]) -> None:
        """Write the loss of a step."""
        progress = self.progress
        step, total = progress.steps, self.options.max_steps
        speed = progress.examples / progress.train_seconds
        self.bar.update(step - self.bar.n)
        self.bar.set_postfix(loss=f"{mean_loss:.3f}", samples_per_second=f"{speed:.0f}")
        record = {"loss": mean_loss, **rates, "samples_per_second": round(speed, 1)}
        self._write(record | ({"skipped_examples": progress.skipped} if progress.skipped else {}))
        if self.accelerator.is_main_process and self.bar.disable:
            left = progress.train_seconds / step * (total - step)
            print(f"step {step}/{total} loss {mean_loss:.3f} {left:.0f} s left", flush=True)
        self._remark_spike(mean_loss)

    def scores(self, name: str, score: float, scores: Mapping[str, float]) -> None:
        """Write the figures of an evaluation."""
        self._write({"score": score, **{f"dev/{key}": value for key, value in scores.items()}})
        if self.accelerator.is_main_process:
            self.bar.write(f"step {self.progress.steps}: dev {name} {score:.2f}")

    def close(self) -> None:
        """End the bar."""
        self.bar.close()

    def _check_finite(self) -> None:
        losses = torch.stack([loss for _, _, loss in self.pending]).tolist()
        pending, self.pending = self.pending, []
        for (step, ids, _), loss in zip(pending, losses, strict=True):
            if not math.isfinite(loss):
                folder = self.path.parent
                raise ValueError(
                    f"the loss is {loss} at step {step} (a batch with the ids {list(ids[:5])}, ...); lower "
                    "the learning rates or train in full precision, in a new run. Checkpoints and the best "
                    f"adapter in {folder} are of steps before"
                )

    def _remark_spike(self, mean_loss: float) -> None:
        usual = median(self.usual) if len(self.usual) == SPIKE_WINDOW else math.inf
        if self.accelerator.is_main_process and mean_loss > SPIKE * usual:
            self.bar.write(
                f"warning: the loss is {mean_loss:.3f} at step {self.progress.steps}; {usual:.3f} is usual. "
                "If it stays there, lower the learning rates in a new run"
            )
        self.usual.append(mean_loss)

    def _write(self, record: Mapping[str, float]) -> None:
        step = self.progress.steps
        if self.accelerator.is_main_process:
            with writing(self.path), self.path.open("a") as file:
                file.write(json.dumps({"step": step, **record}) + "\n")
        self.accelerator.log(dict(record), step=step)


def best_dev(run: Path, steps: int | None = None) -> float:
    """The best figure that a run had on its dev splits, of several tasks the mean.

    Args:
        run: Its folder.
        steps: Up to which evaluations count; None for all.
    """
    records = map(json.loads, (run / LOG_FILE).read_text().splitlines())
    return max(
        float(record["score"])
        for record in records
        if "score" in record and (steps is None or record["step"] <= steps)
    )


def _cut_log(path: Path, steps: int) -> None:
    """Leave the lines of a log up to a step; those behind it will come again."""
    if not path.is_file():
        return
    lines = path.read_text().splitlines(keepends=True)
    try:
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= steps]
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise ValueError(
            f"{path} is damaged: expected a JSON object with a step on each line ({one_line(error)}); "
            "move it away to go on without it"
        ) from None
    write_atomically(path, "".join(kept).encode())


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

    def requested(self, accelerator: Accelerator, step: int, every: int) -> int:
        """The signal that any process has got; several processes agree every so many steps."""
        if accelerator.num_processes == 1:
            return self.signal
        if step % every:
            return 0
        flags = accelerator.gather(torch.tensor([self.signal], device=accelerator.device))
        return int(flags.max().item())
