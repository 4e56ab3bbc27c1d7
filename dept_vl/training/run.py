"""A training run: read the data, load the backbone, train the prompt, score it and write a report.

Every training script builds a `RunConfig` and calls `run`.
"""

import gc
import shutil
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from statistics import mean

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import set_seed
from transformers.utils.logging import disable_progress_bar

from dept_vl._utils.io import write_atomically, write_noted_json
from dept_vl._utils.printable import say
from dept_vl._utils.processes import main_first, on_main
from dept_vl._utils.run_files import BEST, CANDIDATES_FILE, CHECKPOINTS, REPORT_FILE, SHOTS_FILE, SUMMARY_FILE
from dept_vl._utils.terminal import waiting
from dept_vl.adapters.adapter import Adapter
from dept_vl.adapters.tensors import count_trainable
from dept_vl.config import RunConfig, validate
from dept_vl.data.answers import fit_answers
from dept_vl.data.collate import Collator
from dept_vl.data.encoded import WITH_TEXT, check_encoder_alone, check_memory, encode_sources
from dept_vl.data.feature_source import read_features
from dept_vl.data.features import FeatureTable
from dept_vl.data.lengths import check_texts
from dept_vl.data.splits import answering_of, load_splits, options_together
from dept_vl.inference.graphed import GraphedAnswers
from dept_vl.models.graphs import padding_multiple
from dept_vl.models.precision import prepare_step
from dept_vl.models.sharding import place_model
from dept_vl.training.build import budget_line, build_model, only_deterministic, visual_tokens, without_effect
from dept_vl.training.checkpoint import steps_of
from dept_vl.training.errors import explained
from dept_vl.training.folder import Opened, choose_folder, is_complete, keep_precision, open_folder, release
from dept_vl.training.graphs import why_not
from dept_vl.training.identity import check_kept, keep_identity
from dept_vl.training.loop import Loop
from dept_vl.training.optim import SUSPICIOUS_PROMPT_LR, steps_of_epochs
from dept_vl.training.owner import owning
from dept_vl.training.progress import Progress
from dept_vl.training.report.html import Answered, or_warn, write_run_report
from dept_vl.training.report.remake import remake_page
from dept_vl.training.stages import Part, Stages
from dept_vl.training.summary import RunResult, Summary, finished, summary_table
from dept_vl.training.trackers import check_tracker, start_tracker


def run(config: RunConfig, *, more_to_come: bool = False) -> RunResult:
    """Train on one or several tasks, choose the best checkpoint on the dev splits, and score the test splits.

    With `more_to_come`, another run follows in this program, so the process group stays open.

    Raises:
        FileExistsError: If the output folder already holds a run.
        FileNotFoundError: If data or images are missing.
        InUseError: If another process is using the folder.
        ValueError: If options are out of range, or do not fit the data or the backbone. The message names the
            option.
        ImportError: If the tracker's package is not installed.
        OSError, RuntimeError: If the disk, the memory or another process fails; see `explained`.
    """
    started = time.perf_counter()
    validate(config)
    config = config.settled()
    check_tracker(config.log_with)
    disable_progress_bar()  # transformers' bars for loading weights
    accelerator = Accelerator(
        # Without this, accelerate does not connect several processes on a machine without a GPU.
        cpu=not torch.accelerator.is_available(),
        gradient_accumulation_steps=config.train.gradient_accumulation_steps,
        mixed_precision=config.mixed_precision,
        log_with=config.log_with,
        project_dir=str(config.output_dir or "runs"),
    )
    options_together(config)  # raises before a folder is created
    output_dir = on_main(accelerator, lambda: choose_folder(config))
    # A complete run is only read, so its disk may be read-only.
    complete = bool(config.resume) and on_main(accelerator, lambda: is_complete(output_dir))
    with nullcontext() if complete else owning(output_dir, accelerator, wait=config.wait):
        opened = on_main(accelerator, lambda: open_folder(config, output_dir))
        result = _run_in(opened, config, accelerator, started)
        accelerator.wait_for_everyone()
    if more_to_come:
        for tracker in accelerator.trackers:
            tracker.finish()
        gc.collect()  # models are in reference cycles, and hundreds of runs may follow
    else:
        accelerator.end_training()  # closes the trackers and the process group, so last
    return result


def _run_in(opened: Opened, config: RunConfig, accelerator: Accelerator, started: float) -> RunResult:
    output_dir = opened.path
    if (output_dir / SUMMARY_FILE).is_file():
        say(f"{output_dir} is finished already; its results are in {SUMMARY_FILE}")
        if accelerator.is_main_process and not (output_dir / REPORT_FILE).is_file():
            or_warn(lambda: remake_page(output_dir))
        return finished(output_dir)
    with explained(output_dir):
        try:
            return Run(config, accelerator, output_dir, opened.checkpoint, started).run()
        except (ValueError, FileNotFoundError):
            release(opened, accelerator)
            raise


def run_once(config: RunConfig) -> RunResult:
    """Start or resume the run in `config.output_dir`, or return its result if it is finished.

    Raise SystemExit, with the exit status, if a signal stopped the run, and DifferentError if it was started
    with other options or data. Data and models are read once per process, see `forget_contents`.
    """
    config = replace(config, resume="auto").settled()
    folder = Path(config.output_dir or "")
    if (folder / SUMMARY_FILE).is_file():
        processes = PartialState(cpu=not torch.accelerator.is_available())
        on_main(processes, lambda: check_kept(folder, config, processes.num_processes))
        return finished(folder)
    result = run(config, more_to_come=True)
    if result.exit_status:
        raise SystemExit(result.exit_status)
    return result


class Run(Stages):
    """A training run in four stages: prepare, fit, score, write."""

    def __init__(
        self,
        config: RunConfig,
        accelerator: Accelerator,
        output_dir: Path,
        checkpoint: Path | None,
        started: float,
    ) -> None:
        train = config.train
        super().__init__(
            accelerator, output_dir, batch_size=train.eval_batch_size, num_workers=train.num_workers
        )
        self.config, self.checkpoint, self.started = config, checkpoint, started
        self.training: Progress | None = None

    def run(self) -> RunResult:
        """Run all stages and return the result. A run that is stopped or paused ends after `fit`."""
        for note in without_effect(self.config):
            say(note)
        self.prepare()
        self.fit()
        if self._ended_early():
            return RunResult(self.output_dir, {}, self.trainable, self.training)
        self.score()
        self.write()
        return RunResult(self.output_dir, self.summary.scores, self.trainable, self.training)

    @waiting("preparing")
    def prepare(self) -> None:
        """Read the data, build the model and encode the images."""
        config, accelerator = self.config, self.accelerator
        set_seed(config.train.seed)
        if config.train.deterministic:
            only_deterministic()
        with main_first(accelerator):  # the first to read converts the files for all
            self.splits = [load_splits(options, config.train.seed) for options in options_together(config)]
        if config.train.num_epochs:
            steps = steps_of_epochs(config.train, self.splits, accelerator.num_processes)
            say(f"{config.train.num_epochs} epochs are {steps:,} steps")
            # The saved configuration keeps `num_epochs`.
            self.config = replace(config, train=replace(config.train, max_steps=steps))
        suffixes = [f"-{splits.test.name}" if config.also else "" for splits in self.splits]
        on_main(accelerator, self._write_shots)
        self.model = build_model(config)
        keep_identity(self.output_dir, config, self.splits, self.model.backbone, accelerator, self.checkpoint)
        place_model(self.model, accelerator)
        for splits in self.splits:
            self.model.backbone.probe(splits.train.image_count)
        self._fit_answers()
        on_main(accelerator, self._write_candidates)
        self.parts = [
            Part(splits.test, splits.options.splits()[-1], splits.decoding, suffix)
            for splits, suffix in zip(self.splits, suffixes, strict=True)
        ]
        max_target_length = max(splits.decoding.max_new_tokens for splits in self.splits)
        self._check_lengths(max_target_length)
        pretrained, encoded = self.model.backbone.processor is not None, config.data.features == "encoded"
        images = read_features(
            self.model.backbone, self.splits, num_workers=config.train.num_workers, accelerator=accelerator
        )
        if images is not None:
            precision = images.dtype if isinstance(images, FeatureTable) else "float32"
            if encoded:
                precision += WITH_TEXT
            keep_precision(self.output_dir, precision, accelerator)
        # After the features, which the tower computes in full precision.
        prepare_step(
            self.model.backbone.language,
            accelerator.device,
            bfloat16=accelerator.mixed_precision == "bf16",
            gradient_checkpointing=config.train.gradient_checkpointing,
            compiled=config.train.compile,
            pretrained=pretrained,
        )
        self.collator = Collator.for_model(
            self.model,
            max_target_length,
            max_source_length=config.prompt.max_source_length + self.model.backbone.frame,
            images=images,
            on_bad_image=config.data.on_bad_image or "raise",
            device=accelerator.device,
        )
        if encoded:
            self._encode_sources()
        reason = why_not(accelerator, config.train, pretrained=pretrained, encoded=encoded)
        if reason and config.train.cuda_graphs:
            say(f"steps are not recorded as CUDA graphs: {reason}")
        self.graphs = config.train.cuda_graphs and not reason
        if self.graphs:
            multiple = padding_multiple(self.collator.max_source_length)
            self.collator = replace(self.collator, pad_to_multiple_of=multiple)
            self.generate = GraphedAnswers(self.model, self.batch_size, say)

    def _write_candidates(self) -> None:
        """Write `candidates.json`, which is read with every adapter of the run."""
        for splits in self.splits:
            if splits.options.candidate_floor:
                write_noted_json(self.output_dir / CANDIDATES_FILE, splits.decoding.candidates, indent=None)

    def _encode_sources(self) -> None:
        """Compute the frozen encoder's output for every example once."""
        tasks = [task for splits in self.splits for task in (splits.train, splits.dev, splits.test)]
        check_encoder_alone(self.model)
        check_memory(
            self.model,
            tasks,
            longest=self.collator.max_source_length,
            itemsize=2 if self.accelerator.mixed_precision == "bf16" else 4,
            gib=self.config.data.feature_memory,
        )
        encoded = encode_sources(
            self.model,
            (task[index] for task in tasks for index in range(len(task))),
            replace(self.collator, on_bad_image="skip").of_examples,
            self.accelerator,
        )
        self.collator = replace(self.collator, images=None, encoded=encoded)

    def fit(self) -> None:
        """Train the trainable parameters, if there are any."""
        config, accelerator, model = self.config, self.accelerator, self.model
        self.trainable = count_trainable(model)
        if model.prompt is not None:
            say(budget_line(config.prompt, model.prompt))
        say(
            f"{self.trainable['total']:,} trainable parameters: {self.trainable}",
            f"output: {self.output_dir}",
        )
        if not self.trainable["total"]:
            return
        sizes = {} if model.prompt is None else model.prompt.describe()
        facts = {f"prompt.{name}": sizes[name] for name in ("prompt_length", "rank") if name in sizes}
        facts |= {f"trainable_parameters.{name}": count for name, count in self.trainable.items()}
        steps = steps_of(self.checkpoint) if self.checkpoint else 0
        start_tracker(accelerator, config, self.output_dir, facts, steps)
        if config.optim.prompt_lr < SUSPICIOUS_PROMPT_LR and "prompt" in self.trainable:
            say(f"warning: prompt_lr={config.optim.prompt_lr} is small for a soft prompt; 0.3 is usual")
        self.training = Loop(
            model,
            self.splits,
            replace(self.collator, on_bad_image=config.data.on_bad_image or "skip"),
            self.collator,
            accelerator,
            self.output_dir,
            config.train,
            config.optim,
            checkpoint=self.checkpoint,
            graphs=self.graphs,
            generate=self.generate,
        ).run()

    def score(self) -> None:
        """Score the best adapter on the test splits."""
        super().score()
        text_and_image = mean(
            evaluation.text_tokens + visual_tokens(self.model, part.task)
            for part, evaluation in zip(self.parts, self.evaluations, strict=True)
        )
        scores = {
            f"{part.task.name}/{name}" if self.config.also else name: value
            for part, evaluation in zip(self.parts, self.evaluations, strict=True)
            for name, value in evaluation.scores.items()
        }
        training = self.training or Progress()
        prompt_length = self.model.prompt.prompt_length if self.model.prompt else 0
        self.summary = Summary(
            scores=scores,
            trainable_parameters=self.trainable,
            seconds=time.perf_counter() - self.started,
            train_seconds=training.train_seconds,
            steps=training.steps,
            best_step=training.best_step,
            skipped_examples=training.skipped,
            unanswered_examples=sum(len(evaluation.skipped) for evaluation in self.evaluations),
            tokens_per_example=text_and_image + prompt_length,
            reference_tokens_per_example=text_and_image + self.config.prompt.reference_prompt_length,
        )

    def write(self) -> None:
        """Log the scores, and write the best adapter, predictions, summaries and report."""
        if self.training is not None:
            scores = {f"test/{name}": value for name, value in self.summary.scores.items()}
            self.accelerator.log(scores, step=self.training.steps)
        adapter = Adapter.of(
            self.model,
            task="+".join(part.task.name for part in self.parts),
            metrics=self.summary.scores,
            question_case=self.config.data.question_case,
            answering=answering_of(self.splits),
        )
        on_main(self.accelerator, lambda: adapter.save(self.output_dir / BEST))
        super().write()

    def write_scores(self) -> None:
        """Write `summary.md` and `summary.json`, and print the table."""
        folder = self.output_dir
        table = summary_table(self.config, self.parts, self.summary)
        write_atomically(folder / "summary.md", (table + "\n").encode())
        # Written last and atomically: this file marks the run as finished.
        write_noted_json(folder / SUMMARY_FILE, self.summary.content(), indent=2)
        if not self.config.train.checkpoint_every:
            shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)  # only needed to resume
        say("", *table.split("\n"), "", f"adapter, predictions, log and pictures: {folder}")

    def write_report(self, answered: Sequence[Answered]) -> Path:
        """Write the report of the run."""
        return write_run_report(self.output_dir, self.config, self.summary.content(), answered)

    def _write_shots(self) -> None:
        for splits in self.splits:
            if splits.shots is not None:
                suffix = f"-{splits.options.task}" if self.config.also else ""
                splits.shots.write(self.output_dir / SHOTS_FILE.replace(".json", f"{suffix}.json"))

    def _fit_answers(self) -> None:
        """Set the maximum answer length of each task, and print truncation figures and data notes."""
        for place, splits in enumerate(self.splits):
            self.splits[place], lines = fit_answers(splits, self.model.backbone.tokenizer)
            lines += [f"note: {note}" for note in splits.train.notes]
            lines += [f"{splits.train.name}: {splits.chosen_by} decides"] if splits.train.fits_answers else []
            for line in lines:
                say(line)

    def _check_lengths(self, max_target_length: int) -> None:
        """Check that inputs fit the language model's positions, and print how many texts are truncated."""
        backbone = self.model.backbone
        longest = self.config.prompt.max_source_length + backbone.frame
        prompt_length = self.model.prompt.prompt_length if self.model.prompt else 0
        for splits in self.splits:
            backbone.language_model.check_length(
                prompt_length,
                longest,
                visual_tokens(self.model, splits.train),
                max_target_length,
            )
            for name, split in (("train", splits.train), ("dev", splits.dev), ("test", splits.test)):
                check_texts(split, name, backbone.tokenizer, longest, self.accelerator, backbone.frame)

    def _ended_early(self) -> bool:
        """Return whether the loop was stopped or paused, and print it if so."""
        training, options = self.training, self.config.train
        if training is not None and training.stopped_by:
            say(
                f"stopped at step {training.steps} of {options.max_steps}; "
                f"--resume {self.output_dir} continues"
                + (f"; the best adapter so far is in {self.output_dir / BEST}" if training.best_step else "")
            )
            return True
        if training is not None and 0 < options.pause_at <= training.steps < options.max_steps:
            say(f"paused at step {training.steps} of {options.max_steps}: {self.output_dir}")
            return True
        return False
