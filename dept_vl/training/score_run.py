"""Score a finished run on any split of any task: what `scripts/evaluate.py` does."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from transformers.utils.logging import disable_progress_bar

from dept_vl._utils.run_files import BEST, CONFIG_FILE, SCORES_FILE
from dept_vl._utils.tables import markdown_table, score_rows
from dept_vl.adapters.adapter import Adapter
from dept_vl.config import DataOptions, EvaluateConfig, read_config
from dept_vl.data.collate import Collator
from dept_vl.data.features import FeatureTable
from dept_vl.data.splits import (
    check_images,
    check_readable,
    choose_decoding,
    data_options,
    mapped_features,
    run_candidates,
)
from dept_vl.inference.evaluate import Evaluation, evaluate
from dept_vl.models.backbone import Backbone
from dept_vl.models.precision import hold_frozen_in_bfloat16
from dept_vl.models.sharding import place_model
from dept_vl.models.vision import VisionEncoder
from dept_vl.tasks import load_task
from dept_vl.tasks.base import Task, limit
from dept_vl.tasks.io.submission import SUBMITTED, Submission, write_submission
from dept_vl.training.report.html import Answered, or_warn, write_evaluation_report
from dept_vl.training.run import pad_to, write_answers


@dataclass(frozen=True)
class Assessment:
    """What came of it.

    Attributes:
        evaluation: Predictions and figures.
        output_dir: Where the files are.
        submission: Of a split without published answers whose task has a server.
    """

    evaluation: Evaluation
    output_dir: Path
    submission: Submission | None


def assess(config: EvaluateConfig) -> Assessment:
    """Load the run's model, answer the split, score it, and write what the server wants.

    Raises:
        FileNotFoundError: If the run, the data or images are missing.
        FileExistsError: If the output folder holds an evaluation already.
        ValueError: If options do not fit each other; the message says which.
    """
    disable_progress_bar()
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(), mixed_precision=config.mixed_precision
    )
    trained = read_config(config.run / CONFIG_FILE)
    set_seed(trained.train.seed)
    options = data_options(config, trained)
    output_dir = config.output_dir or config.run / f"{options.task}-{options.test_split}"
    # A run's own folder has predictions, of its test split.
    if (output_dir / SCORES_FILE).exists() or any(output_dir.glob("predictions*")):
        raise FileExistsError(
            f"{output_dir} already holds predictions; nothing was changed there. Choose another --output_dir"
        )
    with accelerator.local_main_process_first():
        task = load_task(options.task, options.data_dir, options.test_split)
        whole = None
        if task.name in SUBMITTED and not config.limit and not task[0].targets:
            # Now, or a missing file would be noticed when all is answered.
            whole = load_task(task.name, options.data_dir, SUBMITTED[task.name])
    task = check_images(limit(task, config.limit, trained.train.seed), config.on_bad_image)
    decoding = choose_decoding(task, options, run_candidates(config, task.name))
    adapter = Adapter.load(config.adapter or config.run / BEST)
    model = adapter.build(Backbone.from_pretrained(**trained.backbone.loading())).folded()
    place_model(model, accelerator)
    images: FeatureTable | VisionEncoder | None = model.backbone.vision
    if isinstance(images, VisionEncoder):
        wanted = [(options, list(task.image_files()))]
        images = mapped_features(images, wanted, config.features, accelerator) or images
    if isinstance(images, FeatureTable) and config.on_bad_image == "raise":
        check_readable(images, task)
    if config.mixed_precision == "bf16":
        hold_frozen_in_bfloat16(model.backbone.language)
    evaluation = evaluate(
        model,
        task,
        Collator(
            model.backbone.tokenizer,
            max_source_length=(model.prompt or trained.prompt).max_source_length,
            max_target_length=decoding.max_new_tokens,
            images=images,
            on_bad_image=config.on_bad_image,
            pad_to_multiple_of=pad_to(accelerator),
        ),
        accelerator,
        batch_size=config.batch_size,
        decoding=decoding,
        num_workers=config.num_workers,
        progress=accelerator.is_main_process,
    )
    submission = None
    if accelerator.is_main_process:
        submission = _write(options, task, evaluation, output_dir, whole)
        answered = Answered(task, options.test_split, evaluation.predictions, evaluation.scores)
        or_warn(lambda: write_evaluation_report(output_dir, adapter, answered))
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return Assessment(evaluation, output_dir, submission)


def _write(
    options: DataOptions, task: Task, evaluation: Evaluation, folder: Path, whole: Task | None
) -> Submission | None:
    folder.mkdir(parents=True, exist_ok=True)
    path = write_answers(task, evaluation, folder)
    (folder / SCORES_FILE).write_text(json.dumps(evaluation.scores, indent=2) + "\n")
    if evaluation.scores:
        rows = score_rows(evaluation.scores, f"{task.name} {options.test_split}")
        print(f"\n{markdown_table(['', 'score'], [*rows, ('examples scored', f'{len(task):,}')])}\n")
    print(f"predictions: {path}")
    if whole is None:
        return None
    submission = write_submission(evaluation.predictions, whole, folder / "submission.json")
    filled = f", {submission.filled:,} of other phases left empty" if submission.filled else ""
    print(f"submission: {submission.path} ({submission.answered:,} answers{filled}); ids checked")
    return submission
