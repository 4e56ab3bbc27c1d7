"""A run: read the data, load the backbone, train the prompt, score it, and show the result.

Every training script is a `RunConfig` and a call of `run`.
"""

import gc
import json
import os
import time
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from transformers.utils.logging import disable_progress_bar

from dept_vl._utils.io import read_object, write_atomically, writing
from dept_vl._utils.run_files import BEST, CANDIDATES_FILE, SHOTS_FILE, SUMMARY_FILE
from dept_vl._utils.tables import markdown_table, score_rows
from dept_vl.adapters.adapter import Adapter, count_trainable
from dept_vl.config import DataOptions, RunConfig, validate
from dept_vl.data.collate import Collator
from dept_vl.data.features import FeatureTable
from dept_vl.data.lengths import source_lengths
from dept_vl.data.splits import Splits, load_splits, read_features
from dept_vl.inference.evaluate import Evaluation, evaluate
from dept_vl.models.precision import prepare_step
from dept_vl.models.prompted import PromptedModel
from dept_vl.models.sharding import place_model
from dept_vl.prompts import methods as family
from dept_vl.tasks.base import Task
from dept_vl.tasks.text.task import TextTask
from dept_vl.training.build import budget_line, build_model
from dept_vl.training.checkpoint import Progress, steps_of
from dept_vl.training.errors import explained
from dept_vl.training.folder import keep_precision, open_folder, release
from dept_vl.training.loop import TrainingTask, train
from dept_vl.training.optim import SUSPICIOUS_PROMPT_LR
from dept_vl.training.report.html import Answered, or_warn, write_run_report
from dept_vl.training.report.pictures import picture_grid
from dept_vl.training.trackers import check_tracker, start_tracker

LENGTH_SAMPLE = 2000
"""Questions about images that are measured to see how many `max_source_length` cuts; of text tasks all."""
SUMMARY = {
    "scores": {str: float},
    "trainable_parameters": {str: int},
    "seconds": float,
    "train_seconds": float,
    "steps": int,
    "best_step": int,
    "skipped_examples": int,
    "unanswered_examples": int,
    "tokens_per_example": float,
    "reference_tokens_per_example": float,
}
"""Fields of `summary.json`, as `files.difference` has them."""


@dataclass(frozen=True)
class RunResult:
    """What a run produced.

    Attributes:
        output_dir: Its folder.
        scores: Figures on the test split, of several tasks each under its name; empty if the run was
            interrupted or no answers are published.
        trainable: Trained parameters, as `count_trainable` gives them.
        training: What the loop reports; None if there was nothing to train.
        seconds: From start to end.
        tokens: Encoder tokens of a mean test example.
        reference_tokens: The same with a plain prompt of `reference_prompt_length` vectors.
    """

    output_dir: Path
    scores: dict[str, float]
    trainable: dict[str, int]
    training: Progress | None
    seconds: float
    tokens: float
    reference_tokens: float

    @property
    def exit_status(self) -> int:
        """Of the program: 130 after Ctrl-C and 143 after SIGTERM, as shells have it."""
        stopped_by = self.training.stopped_by if self.training is not None else 0
        return 128 + stopped_by if stopped_by else 0


def run(config: RunConfig, *, more_to_come: bool = False) -> RunResult:
    """Train on one split, choose on another, score on a third; of one task or several together.

    Args:
        config: Of the run.
        more_to_come: Another run follows in this program, so its processes stay together.

    Raises:
        FileExistsError: If the output folder already holds a run.
        FileNotFoundError: If data or images are missing.
        ValueError: If options are out of range, or do not fit the data or the backbone; the message says
            which.
        ImportError: If the tracker's package is not installed.
        OSError, RuntimeError: If the machine fails the run, as `explained` says it.
    """
    started = time.perf_counter()
    validate(config)
    check_tracker(config.log_with)
    disable_progress_bar()  # transformers' bars for loading weights
    accelerator = Accelerator(
        # Said plainly, or accelerate takes several processes on a bare CPU for as many single runs.
        cpu=not torch.accelerator.is_available(),
        gradient_accumulation_steps=config.train.gradient_accumulation_steps,
        mixed_precision=config.mixed_precision,
        log_with=config.log_with,
        project_dir=str(config.output_dir or "runs"),
    )
    task_options = _together(config)
    output_dir, checkpoint = open_folder(config, accelerator)
    if (output_dir / SUMMARY_FILE).is_file():
        accelerator.print(f"{output_dir} is finished already; its results are in {SUMMARY_FILE}")
        result = _finished(output_dir)
    else:
        with explained(output_dir):
            try:
                result = _run(config, task_options, accelerator, output_dir, checkpoint, started)
            except (ValueError, FileNotFoundError):
                release(output_dir, accelerator)
                raise
    accelerator.wait_for_everyone()
    if more_to_come:
        for tracker in accelerator.trackers:
            tracker.finish()
        gc.collect()  # models lie in cycles, and hundreds of runs may follow
    else:
        accelerator.end_training()  # closes the trackers and the process group, so last
    return result


def _run(
    config: RunConfig,
    task_options: list[DataOptions],
    accelerator: Accelerator,
    output_dir: Path,
    checkpoint: Path | None,
    started: float,
) -> RunResult:
    set_seed(config.train.seed)
    if config.train.deterministic:
        _only_deterministic()
    with accelerator.local_main_process_first():  # the first to read converts the files for all
        tasks = [load_splits(options, config.train.seed) for options in task_options]
    if accelerator.is_main_process:
        for task in tasks:
            if task.shots is not None:
                suffix = f"-{task.options.task}" if config.also else ""
                task.shots.write(output_dir / SHOTS_FILE.replace(".json", f"{suffix}.json"))
    max_target_length = max(task.decoding.max_new_tokens for task in tasks)
    model = build_model(config)
    place_model(model, accelerator)
    for task in tasks:
        model.backbone.check_length(
            model.prompt.prompt_length if model.prompt else 0,
            config.prompt.max_source_length,
            visual_tokens(model, task.train),
            max_target_length,
        )
        for name, split in (("train", task.train), ("dev", task.dev), ("test", task.test)):
            check_source_lengths(
                split, name, model.backbone.tokenizer, config.prompt.max_source_length, accelerator
            )
    images = read_features(
        model.backbone.vision,
        tasks,
        num_workers=config.train.num_workers,
        accelerator=accelerator,
    )
    if images is not None:
        precision = images.dtype if isinstance(images, FeatureTable) else "float32"
        keep_precision(output_dir, precision, accelerator)
    # Behind the features, which the tower computes in full precision.
    prepare_step(
        model.backbone.language,
        accelerator.device,
        bfloat16=accelerator.mixed_precision == "bf16",
        gradient_checkpointing=config.train.gradient_checkpointing,
        compiled=config.train.compile,
    )
    collator = Collator(
        model.backbone.tokenizer,
        max_source_length=config.prompt.max_source_length,
        max_target_length=max_target_length,
        images=images,
        on_bad_image=config.data.on_bad_image or "skip",
        pad_to_multiple_of=pad_to(accelerator),
    )
    evaluation_collator = replace(collator, on_bad_image=config.data.on_bad_image or "raise")
    trainable = count_trainable(model)
    if model.prompt is not None:
        accelerator.print(budget_line(config.prompt, model.prompt))
    accelerator.print(f"{trainable['total']:,} trainable parameters: {trainable}\noutput: {output_dir}")
    training = None
    if trainable["total"]:
        sizes = {} if model.prompt is None else family.describe(model.prompt)
        found = {f"prompt.{name}": sizes[name] for name in ("prompt_length", "rank") if name in sizes}
        found |= {f"trainable_parameters.{name}": count for name, count in trainable.items()}
        steps = steps_of(checkpoint) if checkpoint else 0
        start_tracker(accelerator, config, output_dir, found, steps)
        if config.optim.prompt_lr < SUSPICIOUS_PROMPT_LR and "prompt" in trainable:
            accelerator.print(
                f"warning: prompt_lr={config.optim.prompt_lr} is small for a soft prompt; 0.3 is usual"
            )
        training = train(
            model,
            [_training_task(task, config) for task in tasks],
            collator,
            evaluation_collator,
            accelerator,
            output_dir,
            config.train,
            config.optim,
            checkpoint=checkpoint,
        )
    if training is not None and training.stopped_by:
        accelerator.print(
            f"stopped at step {training.steps} of {config.train.max_steps}; --resume {output_dir} goes on"
            + (f"; the best adapter so far is in {output_dir / BEST}" if training.best_step else "")
        )
        return RunResult(output_dir, {}, trainable, training, time.perf_counter() - started, 0.0, 0.0)
    if training is not None and 0 < config.train.pause_at <= training.steps < config.train.max_steps:
        accelerator.print(f"paused at step {training.steps} of {config.train.max_steps}: {output_dir}")
        return RunResult(output_dir, {}, trainable, training, time.perf_counter() - started, 0.0, 0.0)
    evaluations = [
        evaluate(
            model,
            task.test,
            evaluation_collator,
            accelerator,
            batch_size=config.train.eval_batch_size,
            decoding=task.decoding,
            num_workers=config.train.num_workers,
            progress=accelerator.is_main_process,
        )
        for task in tasks
    ]
    text_and_image = mean(
        evaluation.text_tokens + visual_tokens(model, task.test)
        for task, evaluation in zip(tasks, evaluations, strict=True)
    )
    result = RunResult(
        output_dir,
        {
            f"{task.test.name}/{name}" if config.also else name: value
            for task, evaluation in zip(tasks, evaluations, strict=True)
            for name, value in evaluation.scores.items()
        },
        trainable,
        training,
        time.perf_counter() - started,
        text_and_image + (model.prompt.prompt_length if model.prompt else 0),
        text_and_image + config.prompt.reference_prompt_length,
    )
    if training is not None:
        accelerator.log({f"test/{name}": value for name, value in result.scores.items()}, step=training.steps)
    if accelerator.is_main_process:
        _write_results(config, model, tasks, evaluations, result)
    return result


def _only_deterministic() -> None:
    """Refuse what does not repeat to the bit; holds for the rest of the process."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False


def pad_to(accelerator: Accelerator) -> int:
    """Multiple to which batches are padded: tensor cores compute in tiles of 8, a CPU gains nothing."""
    return 8 if accelerator.device.type == "cuda" else 1


def _finished(output_dir: Path) -> RunResult:
    """What a run that ended before has left."""
    summary = read_object(output_dir / SUMMARY_FILE, SUMMARY)
    return RunResult(
        output_dir,
        summary["scores"],
        summary["trainable_parameters"],
        None,
        summary["seconds"],
        summary["tokens_per_example"],
        summary["reference_tokens_per_example"],
    )


def visual_tokens(model: PromptedModel, task: Task) -> int:
    """Visual tokens of an example."""
    vision = model.backbone.vision
    return 0 if vision is None else vision.token_count * len(task[0].images)


def _training_task(task: Splits, config: RunConfig) -> TrainingTask:
    size = task.options.task_batch_size or config.train.per_device_batch_size
    return TrainingTask(task.train, task.dev, task.decoding, size)


def _together(config: RunConfig) -> list[DataOptions]:
    """The options of every task: different tasks, the first of which says what is done with bad images."""
    names = [options.task for options in (config.data, *config.also)]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ValueError(
            f"expected different tasks to train on together, found {', '.join(repeated)} more than once"
        )
    on_bad_image = config.data.on_bad_image
    for place, options in enumerate(config.also):
        if options.on_bad_image not in (None, on_bad_image):
            raise ValueError(
                f"expected one on_bad_image for all tasks, found {on_bad_image!r} in data and "
                f"{options.on_bad_image!r} in also[{place}]; leave it out there"
            )
    return [replace(options, on_bad_image=on_bad_image) for options in (config.data, *config.also)]


def check_source_lengths(
    task: Task, split: str, tokenizer: Any, max_source_length: int, accelerator: Accelerator
) -> None:
    """Say how many texts are cut; refuse a length that leaves nothing of the question.

    Raises:
        ValueError: If the task prefix alone fills `max_source_length`.
    """
    text = task[0].source_text
    shared = len(tokenizer(text.split(":")[0] + ":").input_ids)
    if max_source_length <= shared:
        raise ValueError(
            f"max_source_length is {max_source_length} tokens and the task prefix of "
            f"{text!r} alone takes {shared}; raise max_source_length"
        )
    whole = isinstance(task, TextTask)
    with accelerator.local_main_process_first():  # the first to count keeps the lengths for all
        lengths = source_lengths(
            task if whole else task.subset(range(min(LENGTH_SAMPLE, len(task)))), tokenizer
        )
    cut = int((lengths > max_source_length).sum())
    if cut:
        counted = f"{'all' if whole else 'the first'} {len(lengths):,} texts ({task.name} {split})"
        accelerator.print(
            f"warning: max_source_length={max_source_length} cuts {cut:,} of {counted}; the longest has "
            f"{lengths.max():,} tokens"
        )


def _write_results(
    config: RunConfig,
    model: PromptedModel,
    tasks: list[Splits],
    evaluations: list[Evaluation],
    result: RunResult,
) -> None:
    folder = result.output_dir
    name = "+".join(task.test.name for task in tasks)
    Adapter.of(model, task=name, metrics=result.scores).save(folder / BEST)
    for task, evaluation in zip(tasks, evaluations, strict=True):
        write_answers(task.test, evaluation, folder, f"-{task.test.name}" if config.also else "")
        if task.options.candidate_floor:
            candidates = json.dumps(task.decoding.candidates) + "\n"
            write_atomically(folder / CANDIDATES_FILE, candidates.encode())
    table = summary_table(config, tasks, result)
    write_atomically(folder / "summary.md", (table + "\n").encode())
    training = result.training
    summary = {
        "scores": result.scores,
        "trainable_parameters": result.trainable,
        "seconds": round(result.seconds, 1),
        "train_seconds": round(training.train_seconds, 4) if training else 0.0,
        "steps": training.steps if training else 0,
        "best_step": training.best_step if training else 0,
        "skipped_examples": training.skipped if training else 0,
        "unanswered_examples": sum(len(evaluation.skipped) for evaluation in evaluations),
        "tokens_per_example": round(result.tokens, 2),
        "reference_tokens_per_example": round(result.reference_tokens, 2),
    }
    # Last, and whole: it says that the run is finished.
    write_atomically(folder / SUMMARY_FILE, (json.dumps(summary, indent=2) + "\n").encode())
    print(f"\n{table}\n\nadapter, predictions, log and pictures: {folder}")
    answered = [
        Answered(task.test, task.options.test_split, evaluation.predictions, evaluation.scores)
        for task, evaluation in zip(tasks, evaluations, strict=True)
    ]
    or_warn(lambda: write_run_report(folder, config, summary, answered))


def write_answers(task: Task, evaluation: Evaluation, folder: Path, suffix: str = "") -> Path:
    """Write the predictions in the form of the task's server, and a picture of some; say what is missing.

    Returns:
        The file of predictions.
    """
    path = folder / f"predictions{suffix}.{task.prediction_format.kind}"
    with writing(path):
        task.prediction_format.write(evaluation.predictions, path)
    if evaluation.skipped:
        print(
            f"warning: {len(evaluation.skipped):,} of {len(task):,} examples of {task.name} have no "
            "readable image and got an empty answer, which counts as wrong "
            f"(first ids: {list(evaluation.skipped[:3])})"
        )
    elif task[0].images:
        picture = folder / f"answers{suffix}.png"
        with writing(picture):
            picture_grid(task, evaluation.predictions, picture)
    return path


def summary_table(config: RunConfig, tasks: list[Splits], result: RunResult) -> str:
    """Scores, parameters, time and length, as a Markdown table."""
    trainable, training = result.trainable, result.training
    groups = {k: v for k, v in trainable.items() if k not in ("total", "without_projection")}
    splits = ", ".join(f"{task.test.name} {task.options.test_split}" for task in tasks)
    rows: list[tuple[str, str]] = [
        *score_rows(result.scores, splits),
        ("examples scored", f"{sum(len(task.test) for task in tasks):,}"),
        ("trainable parameters", f"{trainable['total']:,}"),
        *[(f"  {name}", f"{count:,}") for name, count in groups.items()],
        ("  without the visual projection", f"{trainable['without_projection']:,}"),
        ("encoder tokens per example", f"{result.tokens:.1f}"),
        (
            f"  with a {config.prompt.reference_prompt_length}-vector prompt instead",
            f"{result.reference_tokens:.1f} ({1 - result.tokens / result.reference_tokens:.0%} saved)",
        ),
    ]
    if training is not None:
        rows += [
            (f"seconds of training ({training.steps} steps)", f"{training.train_seconds:.0f}"),
            ("seconds in all", f"{result.seconds:.0f}"),
        ]
    if training is not None and training.skipped:
        rows.append(("training examples skipped, image not readable", f"{training.skipped:,}"))
    return markdown_table(["", "this run"], rows)
