"""Score a finished run on any split of any task. The command `dept-vl evaluate` uses this."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from transformers.utils.logging import disable_progress_bar

from dept_vl._utils.errors import UsageError
from dept_vl._utils.io import write_noted_json
from dept_vl._utils.printable import say
from dept_vl._utils.processes import main_first, on_main
from dept_vl._utils.run_files import BEST, CONFIG_FILE, SCORES_FILE, SUMMARY_FILE
from dept_vl._utils.tables import markdown_table
from dept_vl._utils.terminal import waiting
from dept_vl.adapters.adapter import Adapter
from dept_vl.adapters.hub import ADAPTER_FILE
from dept_vl.config import OWN_TASK, DataOptions, EvaluateConfig, RunConfig, read_config
from dept_vl.data.collate import Collator
from dept_vl.data.feature_source import check_readable, encoder_of, mapped_features
from dept_vl.data.features import FeatureTable
from dept_vl.data.lengths import check_texts
from dept_vl.data.splits import check_images, data_options, informed, load_split, run_decoding
from dept_vl.inference.evaluate import Evaluation, evaluate
from dept_vl.inference.predictor import Predictor
from dept_vl.models.precision import hold_frozen_in_bfloat16
from dept_vl.models.pretrained_vlm import open_backbone
from dept_vl.models.sharding import place_model
from dept_vl.models.vision import VisionEncoder
from dept_vl.tasks import TASKS
from dept_vl.tasks.base import Task, limit, score_rows
from dept_vl.tasks.io.predictions import ExampleId, Submission
from dept_vl.training.identity import note_changes
from dept_vl.training.owner import owning
from dept_vl.training.report.html import Answered, write_evaluation_report
from dept_vl.training.stages import Part, Stages, write_answers


@dataclass(frozen=True)
class Evaluated:
    """Predictions and scores of one split.

    Attributes:
        evaluation: Predictions and scores.
        output_dir: Folder of the written files; None if none were written.
        submission: Submission for the task's server, if the split has no published answers.
        changed: How the split differs from what the run read of it; empty if it does not.
    """

    evaluation: Evaluation
    output_dir: Path | None
    submission: Submission | None = None
    changed: str = ""

    @property
    def scores(self) -> dict[str, float]:
        """Scores of the split; empty if its answers are not published."""
        return self.evaluation.scores

    @property
    def predictions(self) -> dict[ExampleId, str]:
        """Predictions by example id."""
        return self.evaluation.predictions


def score_run(config: EvaluateConfig, *, write: bool = True) -> Evaluated:
    """Load a run's model, predict and score a split, and write the predictions, scores and submission.

    Without `write`, no files are written.

    Raises:
        FileNotFoundError: If the run, the data or images are missing.
        FileExistsError: If the output folder already holds predictions.
        InUseError: If another process is using that folder.
        ValueError: If options do not fit each other. The message names them.
    """
    disable_progress_bar()
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(), mixed_precision=config.mixed_precision
    )
    scoring = ScoreRun(config, accelerator)
    folder = scoring.output_dir if write else None
    with _writing(folder, accelerator, config):
        scoring.prepare()
        scoring.score()
        if write:
            scoring.write()
        accelerator.wait_for_everyone()
    accelerator.end_training()
    return Evaluated(scoring.evaluations[0], folder, scoring.submission, scoring.changed)


def score_predictor(predictor: Predictor, config: EvaluateConfig) -> Evaluated:
    """Predict and score a split with a predictor. `config.run` is ignored."""
    accelerator = Accelerator(cpu=next(predictor.model.parameters()).device.type == "cpu")
    output_dir = config.output_dir
    options, trained = _predictor_data(predictor, config)
    with _writing(output_dir, accelerator, config):
        with main_first(accelerator):
            task = load_split(options, options.splits()[-1])
        changed = ""
        if trained is not None and (run := predictor.run) is not None:
            changed = on_main(accelerator, lambda: note_changes(run, trained, options))
        seed = 0 if trained is None else trained.train.seed
        task = check_images(limit(task.asked_by(predictor.task), config.limit, seed), config.on_bad_image)
        backbone, longest = predictor.model.backbone, predictor.max_source_length
        split = options.splits()[-1]
        check_texts(task, split, backbone.tokenizer, longest, accelerator, backbone.frame)
        collator = Collator.for_model(
            predictor.model,
            predictor.decoding.max_new_tokens,
            max_source_length=longest,
            images=predictor.model.backbone.vision,
            on_bad_image=config.on_bad_image,
            device=accelerator.device,
        )
        evaluation = evaluate(
            predictor.model,
            task,
            collator,
            accelerator,
            batch_size=config.batch_size,
            decoding=predictor.decoding,
            num_workers=config.num_workers,
        )
        if output_dir is not None and accelerator.is_main_process:
            output_dir.mkdir(parents=True, exist_ok=True)
            write_answers(task, evaluation, output_dir)
            write_noted_json(output_dir / SCORES_FILE, evaluation.scores, indent=2)
    return Evaluated(evaluation, output_dir, changed=changed)


def _predictor_data(predictor: Predictor, config: EvaluateConfig) -> tuple[DataOptions, RunConfig | None]:
    """Return the data to score a predictor on, and the configuration of its run if they are the run's."""
    asked, run = predictor.task, predictor.run
    given = config.own.data is not None
    name = OWN_TASK if given else asked.loaded_as
    if run is not None:
        trained = read_config(run / CONFIG_FILE)
        if name in {TASKS[one.task].loaded_as for one in (trained.data, *trained.also)}:
            options = data_options(replace(config, run=run, task=name), trained)
            return options, trained
    options = DataOptions(
        task=name,
        data_dir=config.data_dir,
        own=config.own,
        question_case=asked.question_case,
        test_split=config.split or (TASKS[name].other_split if given else "") or asked.test_split,
    )
    return options, None


@contextmanager
def _writing(folder: Path | None, accelerator: Accelerator, config: EvaluateConfig) -> Iterator[None]:
    """Lock an unused folder while an evaluation writes to it; do nothing if it is None."""
    if folder is None:
        yield
        return
    with owning(folder, accelerator, wait=config.wait):  # tells of a run that is being trained there
        on_main(accelerator, lambda: _check_unused(folder))
        yield


def _check_unused(folder: Path) -> None:
    """Raise an error if a folder has no name, or holds predictions, a run or an adapter."""
    if not folder.name:
        raise UsageError("--output_dir is empty, or the folder `.`; name another folder")
    if (folder / SCORES_FILE).exists() or any(folder.glob("predictions*")):
        raise FileExistsError(
            f"{folder} already holds predictions; nothing was changed there. Choose another --output_dir"
        )

    if (folder / CONFIG_FILE).exists() or (folder / ADAPTER_FILE).exists():
        raise FileExistsError(
            f"{folder} holds a run or an adapter; nothing was changed there. Choose another --output_dir"
        )


class ScoreRun(Stages):
    """Evaluation of a finished run: the stages `score` and `write` run again on any split."""

    def __init__(self, config: EvaluateConfig, accelerator: Accelerator) -> None:
        self.config = config
        self.trained = read_config(config.run / CONFIG_FILE)
        set_seed(self.trained.train.seed)
        self.options = data_options(config, self.trained)
        self.split = self.options.splits()[-1]
        folder = config.output_dir or config.run / f"{self.options.task}-{self.split}"
        super().__init__(accelerator, folder, batch_size=config.batch_size, num_workers=config.num_workers)
        self.whole: Task | None = None
        self.submission: Submission | None = None
        self.changed = ""

    @waiting("preparing")
    def prepare(self) -> None:
        """Read the split, load the model, and open the visual features."""
        config, accelerator = self.config, self.accelerator
        self.adapter = Adapter.from_pretrained(config.adapter or config.run / BEST)
        options = replace(self.options, question_case=self.adapter.question_case)
        if kept := config.own.kept_from(self.trained.data.own):
            say(f"note: as in the run: {kept}")
        with main_first(accelerator):
            task = load_split(options, self.split)
            if task.server_split and not config.limit and not task[0].targets:
                # Loaded now, so that a missing file is noticed before the predictions are made.
                self.whole = load_split(options, task.server_split)
        task.check_requirements()  # fails before the predictions are made
        self.changed = on_main(accelerator, lambda: note_changes(config.run, self.trained, options))
        task = check_images(limit(task, config.limit, self.trained.train.seed), config.on_bad_image)
        if config.adapter is None and not (config.run / SUMMARY_FILE).exists():
            say(f"note: {config.run} is not finished; its best adapter so far is scored")
        asker, longest = informed(self._asker(), self.adapter.answering, config.run)
        task = task.asked_by(asker.reading(options.question_case))
        answering = asker if task.fits_answers else task
        decoding = run_decoding(config, options, answering, asker, longest)
        for note in task.notes:
            say(f"note: {note}")
        self.parts = [Part(task, self.split, decoding)]
        backbone = open_backbone(**self.trained.backbone.loading())
        self.model = self.adapter.build(backbone).folded()
        place_model(self.model, accelerator)
        self.model.backbone.probe(task.image_count)
        images: FeatureTable | VisionEncoder | None = self.model.backbone.vision
        paths = list(task.image_files())
        vision = encoder_of(self.model.backbone, config.features, options) if paths else None
        if vision is not None:
            images = mapped_features(vision, [(options, paths)], config.features) or images
        if isinstance(images, FeatureTable) and config.on_bad_image == "raise":
            check_readable(images, task)
        if config.mixed_precision == "bf16":
            hold_frozen_in_bfloat16(self.model.backbone.language)
        longest_source = self.trained.prompt.max_source_length + self.model.backbone.frame
        if self.model.prompt is not None:
            longest_source = self.model.prompt.max_source_length
        check_texts(task, self.split, backbone.tokenizer, longest_source, accelerator, backbone.frame)
        self.collator = Collator.for_model(
            self.model,
            decoding.max_new_tokens,
            max_source_length=longest_source,
            images=images,
            on_bad_image=config.on_bad_image,
            device=accelerator.device,
        )

    def _asker(self) -> Task:
        """Return the task whose question format is used; for the user's own data, a task of the run."""
        asked = TASKS[self.options.task]
        if not asked.fits_answers:
            return asked
        trained = [TASKS[one.task] for one in (self.trained.data, *self.trained.also)]
        return next((task for task in trained if task.loaded_as == asked.loaded_as), trained[0])

    def write_scores(self) -> None:
        """Write `scores.json` and the submission, and print the table."""
        (part,), (evaluation,), folder = self.parts, self.evaluations, self.output_dir
        write_noted_json(folder / SCORES_FILE, evaluation.scores, indent=2)
        if evaluation.scores:
            rows = score_rows(evaluation.scores, f"{part.task.name} {part.name}", [part.task])
            table = markdown_table(["", "score"], [*rows, ("examples scored", f"{len(part.task):,}")])
            say("", *table.split("\n"), "")
        say(f"predictions: {self.predictions[0]}")
        if self.whole is None:
            return
        submission = self.whole.write_submission(evaluation.predictions, folder / "submission.json")
        filled = f", {submission.filled:,} of other phases left empty" if submission.filled else ""
        say(f"submission: {submission.path} ({submission.answered:,} answers{filled}); ids checked")
        self.submission = submission

    def write_report(self, answered: Sequence[Answered]) -> Path:
        """Write the report of the evaluation."""
        page = replace(answered[0], changed=self.changed)
        return write_evaluation_report(self.output_dir, self.adapter, page)
