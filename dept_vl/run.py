"""A run: read the data, load the backbone, train the prompt, score it, and show the result.

Every training script is a `RunConfig` and a call of `run`.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, set_seed
from transformers.utils.logging import disable_progress_bar

from dept_vl.backbone import Backbone, VisualPositionBias
from dept_vl.batch import Collator
from dept_vl.checkpoint import Adapter, count_trainable
from dept_vl.dept import DePT, sample_vocabulary, solve_rank
from dept_vl.evaluate import Evaluation, evaluate, write_predictions
from dept_vl.features import FeatureTable, table_bytes
from dept_vl.model import PromptedModel
from dept_vl.optim import SUSPICIOUS_PROMPT_LR, OptimOptions
from dept_vl.report import markdown_table, picture_grid
from dept_vl.tasks import load_task
from dept_vl.tasks.example import Task, hold_out_images, limit
from dept_vl.train import BEST, LOG_FILE, TrainOptions, TrainResult, train
from dept_vl.vision import VisionEncoder

CONFIG_FILE, SUMMARY_FILE = "config.json", "summary.json"
PREDICTIONS_FILE, PICTURE_FILE = "predictions.json", "answers.png"
COMMON_TOKENS = 5000
"""Initial prompt vectors are drawn from this many of the first, commonest tokens (Lester et al. 2021)."""
LENGTH_SAMPLE = 2000
"""Questions that are measured to see how many `max_source_length` cuts."""
GIB = 2**30


@dataclass(frozen=True)
class DataOptions:
    """What is read."""

    task: str = "vqav2"
    """Name of the task."""
    data_dir: Path = Path("data/vqav2")
    """Folder with the task's official files."""
    train_split: str = "train"
    """Split to train on."""
    dev_split: str = ""
    """Split to choose the best adapter on; empty holds images out of the training split."""
    holdout_images: int = 200
    """Images held out of the training split, with all their questions, where dev_split is empty."""
    dev_limit: int = 2000
    """At most so many examples of the dev split, drawn with the seed; 0 takes all."""
    test_split: str = "val"
    """Split that the best adapter is scored on at the end."""
    test_limit: int = 0
    """At most so many examples of it, drawn with the seed; 0 takes all."""
    feature_memory: float = 4.0
    """GiB of memory for visual features computed once before training; images that would need more
    are read and encoded at every step."""


@dataclass(frozen=True)
class BackboneOptions:
    """The frozen models."""

    backbone: Path | None = None
    """Folder of a saved backbone, such as data/tiny-clip-t5; or vision and language instead."""
    vision: str | None = None
    """Hub name or folder of the image encoder, such as openai/clip-vit-base-patch32."""
    language: str | None = None
    """Hub name or folder of the encoder-decoder, such as google-t5/t5-base or facebook/bart-base."""
    vision_layer: int = -1
    """Hidden state of the image encoder that is read: -1 the last, -2 the penultimate."""
    class_token: bool = False
    """Keep the image encoder's class token."""
    pooled_grid: int = 0
    """Max-pool the patches to a square of this side; 0 keeps them all."""
    visual_position_bias: VisualPositionBias = "none"
    """none: visual tokens have no position in the language model (published); relative: stock."""
    backbone_dropout: bool = True
    """Dropout in the frozen language model while training."""
    train_projection: bool = True
    """Train the visual projection, as every published row does."""
    train_backbone: bool = False
    """Train the language model too: full fine-tuning, the ceiling to compare with."""


@dataclass(frozen=True)
class PromptOptions:
    """The prompt."""

    prompt_length: int = 40
    """Vectors of the soft prompt (m); 0 leaves the offset alone."""
    rank: int | None = None
    """Rank of the offset (r); 0 is plain prompt tuning. Left out, it is the largest with which the
    prompt has no more parameters than reference_prompt_length vectors."""
    reference_prompt_length: int = 100
    """Length of the plain soft prompt (l) whose parameters are spent."""
    max_source_length: int = 20
    """Longest text, in tokens, task prefix included (s)."""
    alpha: float = 8.0
    """The offset is scaled by alpha / sqrt(rank)."""
    prompt_init: Literal["vocabulary", "text", "random"] = "vocabulary"
    """Start from embeddings of common tokens drawn with the seed, of init_text, or from noise."""
    init_text: str = ""
    """Words to start from, for prompt_init text; repeated or cut to the prompt's length."""


@dataclass(frozen=True)
class RunConfig:
    """Everything a run depends on; written to its folder, and repeated with --config."""

    data: DataOptions = field(default_factory=DataOptions)
    backbone: BackboneOptions = field(default_factory=BackboneOptions)
    prompt: PromptOptions = field(default_factory=PromptOptions)
    train: TrainOptions = field(default_factory=TrainOptions)
    optim: OptimOptions = field(default_factory=OptimOptions)
    output_dir: Path | None = None
    """Folder of the run, which must hold none yet; left out, a new one under runs/."""
    mixed_precision: Literal["no", "bf16"] = "no"
    """bf16 computes the backbone in bfloat16. There is no fp16: T5 overflows in it."""
    log_with: str | None = None
    """A tracker of accelerate, such as tensorboard or wandb, beside the run's own log.jsonl."""


@dataclass(frozen=True)
class RunResult:
    """What a run produced.

    Attributes:
        output_dir: Its folder.
        scores: Figures on the test split; empty if the run was interrupted.
        trainable: Trained parameters, as `count_trainable` gives them.
        training: What the loop reports; None if there was nothing to train.
        seconds: From start to end.
        tokens: Encoder tokens of a mean test example.
        reference_tokens: The same with a plain prompt of `reference_prompt_length` vectors.
    """

    output_dir: Path
    scores: dict[str, float]
    trainable: dict[str, int]
    training: TrainResult | None
    seconds: float
    tokens: float
    reference_tokens: float


def run(config: RunConfig) -> RunResult:
    """Train on one split, choose on another, score on a third.

    Raises:
        FileExistsError: If the output folder already holds a run.
        ValueError: If options do not fit the data or the backbone; the message says which.
    """
    started = time.perf_counter()
    disable_progress_bar()  # transformers' bars for loading weights
    accelerator = Accelerator(
        # Said plainly, or accelerate takes several processes on a bare CPU for as many single runs.
        cpu=not torch.accelerator.is_available(),
        gradient_accumulation_steps=config.train.gradient_accumulation_steps,
        mixed_precision=config.mixed_precision,
        log_with=config.log_with,
        project_dir=str(config.output_dir or "runs"),
    )
    output_dir = _claim_output_dir(config, accelerator)
    set_seed(config.train.seed)
    train_task, dev_task, test_task = load_splits(config.data, config.train.seed)
    model = build_model(config, train_task.max_new_tokens)
    model.to(accelerator.device)
    tokenizer = model.backbone.tokenizer
    check_source_lengths(train_task, tokenizer, config.prompt.max_source_length, accelerator)
    collator = Collator(
        tokenizer,
        max_source_length=config.prompt.max_source_length,
        max_target_length=train_task.max_new_tokens,
        images=_images(config, model, [train_task, dev_task, test_task], accelerator),
    )
    trainable = count_trainable(model)
    accelerator.print(f"{trainable['total']:,} trainable parameters: {trainable}\noutput: {output_dir}")
    training = None
    if trainable["total"]:
        accelerator.init_trackers("dept_vl", config={"config": json.dumps(to_json(config))})
        if config.optim.prompt_lr < SUSPICIOUS_PROMPT_LR and "prompt" in trainable:
            accelerator.print(
                f"warning: prompt_lr={config.optim.prompt_lr} is small for a soft prompt; 0.3 is usual"
            )
        training = train(
            model,
            train_task,
            dev_task,
            collator,
            accelerator,
            output_dir,
            config.train,
            config.optim,
        )
    if training is not None and training.interrupted:
        accelerator.end_training()
        accelerator.print(
            f"stopped at step {training.steps}; the best adapter so far is in {output_dir / BEST}"
        )
        return RunResult(output_dir, {}, trainable, training, time.perf_counter() - started, 0.0, 0.0)
    evaluation = evaluate(
        model,
        test_task,
        collator,
        accelerator,
        batch_size=config.train.eval_batch_size,
        num_workers=config.train.num_workers,
        progress=accelerator.is_main_process,
    )
    vision = model.backbone.vision
    visual_tokens = 0 if vision is None else vision.token_count * len(test_task[0].images)
    text_and_image = evaluation.text_tokens + visual_tokens
    result = RunResult(
        output_dir,
        evaluation.scores,
        trainable,
        training,
        time.perf_counter() - started,
        text_and_image + (model.prompt.prompt_length if model.prompt else 0),
        text_and_image + config.prompt.reference_prompt_length,
    )
    if accelerator.is_main_process:
        _write_results(config, model, test_task, evaluation, result)
    accelerator.wait_for_everyone()
    accelerator.end_training()  # closes the trackers and the process group, so last
    return result


def load_splits(options: DataOptions, seed: int) -> tuple[Task, Task, Task]:
    """The training, dev and test splits.

    Raises:
        ValueError: If there are no answers to train or to choose on.
    """
    train_task = load_task(options.task, options.data_dir, options.train_split)
    if options.dev_split:
        dev_task = load_task(options.task, options.data_dir, options.dev_split)
    else:
        train_task, dev_task = hold_out_images(train_task, options.holdout_images, seed)
    for option, split, task in (
        ("train_split", options.train_split, train_task),
        ("dev_split", options.dev_split, dev_task),
    ):
        if not task[0].targets:
            raise ValueError(f"{option}={split} of {options.task} has no published answers; choose another")
    test_task = load_task(options.task, options.data_dir, options.test_split)
    return (
        train_task,
        limit(dev_task, options.dev_limit, seed),
        limit(test_task, options.test_limit, seed),
    )


def build_model(config: RunConfig, max_target_length: int) -> PromptedModel:
    """The backbone, with a prompt where one has any size, and what is trained set free."""
    options = config.backbone
    backbone = Backbone.from_pretrained(
        options.backbone,
        vision=options.vision,
        language=options.language,
        vision_layer=options.vision_layer,
        class_token=options.class_token,
        pooled_grid=options.pooled_grid,
        visual_position_bias=options.visual_position_bias,
    )
    backbone.freeze(language=not options.train_backbone, visual_projection=not options.train_projection)
    prompt = build_prompt(config.prompt, backbone, config.train.seed)
    backbone.check_length(
        config.prompt.prompt_length if prompt else 0,
        config.prompt.max_source_length,
        backbone.vision.token_count if backbone.vision else 0,
    )
    return PromptedModel(backbone, prompt, backbone_dropout=options.backbone_dropout)


def build_prompt(options: PromptOptions, backbone: Backbone, seed: int) -> DePT | None:
    """The prompt with its initial vectors; None if both its parts are of size zero."""
    rank = options.rank
    if rank is None:
        budget = options.reference_prompt_length * backbone.d_model
        rank = solve_rank(backbone.d_model, options.max_source_length, budget, options.prompt_length)
    if options.prompt_length == 0 and rank == 0:
        return None
    prompt = DePT(
        backbone.d_model,
        prompt_length=options.prompt_length,
        rank=rank,
        max_source_length=options.max_source_length,
        alpha=options.alpha,
    )
    if options.prompt_init != "random":
        tokenizer = backbone.tokenizer
        if options.prompt_init == "text":
            ids = tokenizer(options.init_text, add_special_tokens=False, return_tensors="pt").input_ids[0]
        else:
            ids = sample_vocabulary(
                min(COMMON_TOKENS, len(tokenizer)),
                options.prompt_length,
                torch.Generator().manual_seed(seed),
                exclude=tokenizer.all_special_ids,
            )
        prompt.init_prompt(backbone.embed(ids.long()[None])[0])
    return prompt


def check_source_lengths(
    task: Task, tokenizer: Any, max_source_length: int, accelerator: Accelerator
) -> None:
    """Say how many texts are cut; refuse a length that leaves nothing of the question.

    Raises:
        ValueError: If the task prefix alone fills `max_source_length`.
    """
    texts = [task[index].source_text for index in range(min(LENGTH_SAMPLE, len(task)))]
    shared = len(tokenizer(texts[0].split(":")[0] + ":").input_ids)
    if max_source_length <= shared:
        raise ValueError(
            f"max_source_length is {max_source_length} tokens and the task prefix of "
            f"{texts[0]!r} alone takes {shared}; raise max_source_length"
        )
    lengths = [len(ids) for ids in tokenizer(texts).input_ids]
    cut = sum(length > max_source_length for length in lengths)
    if cut:
        accelerator.print(
            f"warning: max_source_length={max_source_length} cuts {cut} of the first {len(texts)} texts; "
            f"the longest has {max(lengths)} tokens"
        )


def to_json(config: RunConfig) -> dict[str, Any]:
    """The configuration in JSON's own types."""
    encoded: dict[str, Any] = json.loads(json.dumps(asdict(config), default=str))
    return encoded


def _claim_output_dir(config: RunConfig, accelerator: Accelerator) -> Path:
    """Create the run's folder and write its configuration there."""
    chosen = [str(config.output_dir or Path("runs") / time.strftime(f"{config.data.task}-%Y%m%d-%H%M%S"))]
    output_dir = Path(broadcast_object_list(chosen)[0])
    holds_run = any((output_dir / name).exists() for name in (CONFIG_FILE, LOG_FILE, BEST))
    # Every process looks before one writes, so that all of them refuse together.
    accelerator.wait_for_everyone()
    if holds_run:
        raise FileExistsError(
            f"{output_dir} already holds a run; nothing was changed there. Choose another --output_dir, or "
            "leave it out for a new folder under runs/"
        )
    if accelerator.is_main_process:
        output_dir.mkdir(parents=True, exist_ok=True)
        (output_dir / CONFIG_FILE).write_text(json.dumps(to_json(config), indent=2) + "\n")
    accelerator.wait_for_everyone()
    return output_dir


def _images(
    config: RunConfig, model: PromptedModel, tasks: Sequence[Task], accelerator: Accelerator
) -> FeatureTable | VisionEncoder | None:
    vision = model.backbone.vision
    if vision is None:
        return None
    paths = {path: None for task in tasks for index in range(len(task)) for path in task.images(index)}
    if table_bytes(vision, len(paths)) > config.data.feature_memory * GIB:
        return vision
    return FeatureTable(
        vision,
        paths,
        num_workers=config.train.num_workers,
        progress=accelerator.is_main_process,
    )


def _write_results(
    config: RunConfig,
    model: PromptedModel,
    test_task: Task,
    evaluation: Evaluation,
    result: RunResult,
) -> None:
    folder = result.output_dir
    Adapter.of(model, task=test_task.name, metrics=evaluation.scores).save(folder / BEST)
    write_predictions(evaluation.predictions, folder / PREDICTIONS_FILE)
    if test_task[0].images:
        picture_grid(test_task, evaluation.predictions, folder / PICTURE_FILE)
    table = summary_table(config, model, test_task, result)
    (folder / "summary.md").write_text(table + "\n")
    training = result.training
    summary = {
        "scores": result.scores,
        "trainable_parameters": result.trainable,
        "seconds": round(result.seconds, 1),
        "train_seconds": round(training.train_seconds, 4) if training else 0.0,
        "steps": training.steps if training else 0,
        "best_step": training.best_step if training else 0,
        "tokens_per_example": round(result.tokens, 2),
        "reference_tokens_per_example": round(result.reference_tokens, 2),
    }
    (folder / SUMMARY_FILE).write_text(json.dumps(summary, indent=2) + "\n")
    print(f"\n{table}\n\nadapter, predictions, log and {PICTURE_FILE}: {folder}")


def summary_table(config: RunConfig, model: PromptedModel, task: Task, result: RunResult) -> str:
    """Accuracy, parameters, time and length, as a Markdown table."""
    trainable, training = result.trainable, result.training
    groups = {k: v for k, v in trainable.items() if k not in ("total", "without_projection")}
    rows: list[tuple[str, str]] = [
        (
            f"{task.name} {config.data.test_split}: {name.removeprefix('answer_type/')} (0-100)",
            f"{value:.2f}",
        )
        for name, value in result.scores.items()
        if not name.startswith("question_type/")
    ]
    rows += [
        ("examples scored", f"{len(task):,}"),
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
    return markdown_table(["", "this run"], rows)
