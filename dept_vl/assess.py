"""Score a finished run on any split of any task: what `scripts/evaluate.py` does."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from transformers.utils.logging import disable_progress_bar

from dept_vl.batch import Collator, OnBadImage
from dept_vl.build import load_backbone
from dept_vl.checkpoint import Adapter
from dept_vl.cli import read_config
from dept_vl.config import DataOptions, Features, RunConfig
from dept_vl.evaluate import Evaluation, evaluate
from dept_vl.features import FeatureTable
from dept_vl.files import read_json
from dept_vl.html_report import Answered, or_warn, write_evaluation_report
from dept_vl.report import markdown_table, score_rows
from dept_vl.run import CANDIDATES_FILE, pad_to, write_answers
from dept_vl.sharing import BEST
from dept_vl.splits import check_images, check_readable, mapped_features, with_split_names
from dept_vl.spread import place_model
from dept_vl.state import CONFIG_FILE
from dept_vl.step import hold_frozen_in_bfloat16
from dept_vl.submission import SUBMITTED, Submission, write_submission
from dept_vl.tasks import load_task
from dept_vl.tasks.example import Asked, Decoding, Task, limit
from dept_vl.tasks.nlp_table import TEXT_TASKS
from dept_vl.vision import VisionEncoder

SCORES_FILE = "scores.json"


@dataclass(frozen=True)
class AssessConfig:
    """What is scored on what."""

    run: Path
    """Folder of a run: its config.json says the backbone, its best/ holds the adapter."""
    adapter: Path | None = None
    """Folder of another adapter of the same backbone."""
    task: str = ""
    """Task to score on; left out, the run's first."""
    data_dir: Path | None = None
    """Folder with the task's official files; left out, the run's."""
    split: str = ""
    """Split to score on; left out, the run's test split."""
    limit: int = 0
    """At most so many examples, drawn with the run's seed; 0 takes all."""
    num_beams: int = 0
    """Beams of the search; 0 takes the run's or the task's own."""
    candidates: Path | None = None
    """JSON list of answers to choose among; left out, on VQAv2 the run's candidates.json if it has one."""
    batch_size: int = 128
    """Examples decoded at a time, per process."""
    num_workers: int = 0
    """Processes that read images; 0 reads them in the evaluating process."""
    features: Features = "auto"
    """cached: visual features from the files that scripts/extract_features.py made; live: every image is read
    and encoded; auto: from those files if they are there for the run's encoder and all images, else live."""
    features_dir: Path | None = None
    """Folder of those files; left out, the run's for the run's data, else features in data_dir."""
    on_bad_image: OnBadImage = "raise"
    """raise, or skip: give an empty answer, count it and go on."""
    mixed_precision: Literal["no", "bf16"] = "no"
    """bf16 computes the backbone in bfloat16."""
    output_dir: Path | None = None
    """Folder for predictions, scores and a submission; left out, RUN/TASK-SPLIT."""


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


def assess(config: AssessConfig) -> Assessment:
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
    decoding = choose_decoding(config, options, task)
    adapter = Adapter.load(config.adapter or config.run / BEST)
    model = adapter.build(load_backbone(trained.backbone)).folded()
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


def data_options(config: AssessConfig, trained: RunConfig) -> DataOptions:
    """The run's options of the task, as the configuration changes them.

    Raises:
        ValueError: If the task is one of images, new to the run, and its folder or split is not said.
    """
    known = {options.task: options for options in (trained.data, *trained.also)}
    name = config.task or trained.data.task
    if name not in known and name not in TEXT_TASKS and not (config.data_dir and config.split):
        raise ValueError(f"{config.run} knows nothing of {name!r}; say --data_dir and --split too")
    options = with_split_names(known.get(name, DataOptions(task=name)))
    return replace(
        options,
        data_dir=config.data_dir or options.data_dir,
        # The run's features are of the images of its own folder.
        features_dir=config.features_dir or (None if config.data_dir else options.features_dir),
        test_split=config.split or options.test_split,
        num_beams=config.num_beams or options.num_beams,
    )


def choose_decoding(config: AssessConfig, options: DataOptions, task: Task | Asked) -> Decoding:
    """The task's own way of decoding, as the options of the task and the configuration change it.

    Raises:
        FileNotFoundError: If the file of candidates is missing.
        ValueError: If it is no list of answers.
    """
    default = task.decoding
    candidates = default.candidates
    path = config.candidates
    if path is None and task.name == "vqav2" and (config.run / CANDIDATES_FILE).is_file():
        path = config.run / CANDIDATES_FILE
    if path is not None:
        candidates = read_candidates(path)
    return Decoding(default.max_new_tokens, options.num_beams or default.num_beams, candidates)


def read_candidates(path: Path) -> tuple[str, ...]:
    """A list of answers to choose among.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no list of answers.
    """
    if not path.is_file():
        raise FileNotFoundError(f"expected a JSON list of candidate answers at {path}, found no such file")
    try:
        content = read_json(path)
    except ValueError as error:
        raise ValueError(f"{error}; expected a JSON list of answers") from None
    if not isinstance(content, list) or not content or not all(isinstance(one, str) for one in content):
        raise ValueError(f"{path}: expected a JSON list of answers, found {content!r:.60}")
    return tuple(content)


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
