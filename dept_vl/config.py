"""Every option of a run and of the commands, with its range and its help; imports no engine.

`cli` makes flags of these dataclasses, and pydantic reads them from files.
"""

import os
from collections.abc import Collection
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from pydantic import AfterValidator, Field

from dept_vl._utils.errors import UsageError
from dept_vl._utils.io import read_json
from dept_vl._utils.options import (
    Count,
    Finite,
    Options,
    Positive,
    Rate,
    Seed,
    Workers,
    build,
)
from dept_vl._utils.options import to_json as to_json
from dept_vl._utils.options import validate as validate
from dept_vl._utils.run_files import find_again
from dept_vl.models.options import (
    BEFORE_ORDER,
    LARGEST_GRID,
    ImageFit,
    ObjectOrder,
    TrainedPart,
    VisualNorm,
    VisualPositionBias,
)
from dept_vl.prompts.base import LARGEST_SIZE, METHODS, Init
from dept_vl.tasks import TASKS
from dept_vl.tasks.base import AnswerLabels, QuestionCase
from dept_vl.tasks.own.options import OwnOptions

ShotsPer = Literal["class", "all"]
Features = Literal["auto", "cached", "live"]
TrainFeatures = Literal["auto", "cached", "live", "encoded"]
OnBadImage = Literal["raise", "skip"]
"""What is done with an example whose image cannot be read."""
Precision = Literal["float16", "bfloat16", "float32"]
Size = Annotated[int, Field(ge=0, le=LARGEST_SIZE)]
PositiveSize = Annotated[int, Field(ge=1, le=LARGEST_SIZE)]
InitParts = Literal["prompt", "all"]
"""P alone, or all that the prompt has."""
MethodName = Annotated[
    str,
    AfterValidator(METHODS.check),
    tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="{" + ",".join(METHODS) + "}",
        instance_from_str=lambda values: METHODS.check(values[0]),
        is_instance=lambda value: isinstance(value, str),
        str_from_instance=lambda name: [name],
    ),
]
"""Name of a method in the registry, which users may add to."""
Own = Annotated[OwnOptions, tyro.conf.arg(name="")]
OWN_TASK = "vqa"
"""Task that reads data of your own."""


@dataclass(frozen=True)
class DataOptions(Options):
    """What is read."""

    task: str = "vqav2"
    """Name of the task."""
    data_dir: Path | None = None
    """Folder with the task's files; left out, data/TASK, and for a text task without it the Hub."""
    train_split: str | None = None
    """Split to train on; left out, the task's own."""
    dev_split: str | None = None
    """Split to choose the best adapter on; left out, the task's own, and where it has none, as where this is
    empty, images are held out of the training split."""
    holdout_images: Count = 200
    """Images held out of the training split, with all their questions, where dev_split is empty."""
    dev_limit: Count = 2000
    """At most so many examples of the dev split, drawn with the seed; 0 takes all."""
    test_split: str | None = None
    """Split that the best adapter is scored on at the end; left out, the task's own."""
    test_limit: Count = 0
    """At most so many examples of it, drawn with the seed; 0 takes all."""
    shots: Count = 0
    """Learn from so many examples of the training split alone; 0 takes all."""
    shots_per: ShotsPer = "class"
    """class: so many of each class; all: so many in all, spread over the classes (published for DePT)."""
    shots_dev: Literal["shots", "split"] = "shots"
    """shots: choose the best adapter on as many other examples; split: on the dev split (published for DePT),
    up to dev_limit."""
    shots_seed: Seed = 0
    """Of the draw of the shots."""
    shots_file: Path | None = None
    """Shots of another run (its shots.json) instead of a draw."""
    task_batch_size: Count = 0
    """Examples of this task per process and forward pass; 0 takes per_device_batch_size."""
    num_beams: Annotated[int, Field(ge=0, le=1000)] = 0
    """Beams of the search for an answer; 0 takes the task's own: 5 for captions, else 1 (greedy)."""
    max_answer_tokens: Count = 0
    """Truncate training targets and generated answers to this many tokens, end token included; 0 takes the
    task's limit (10, captions 40), or for --data the longest training answer (at most 256)."""
    answer_labels: AnswerLabels = "all"
    """Answers to learn of VQAv2. all: the human ones, normalised; published: as they are written, within the
    list of 3,129 (LXMERT, VL-T5), or answer_list.json in data_dir; a question without one weighs nothing."""
    question_case: QuestionCase = "lower"
    """lower: questions are read in lower case; keep: as they are written (published). Of several tasks the
    first says it for all."""
    max_lost_answers: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Raise an error if more than this share of the training answers is truncated, or is another text after
    tokenising and decoding."""
    candidate_floor: Count = 0
    """Choose among the answers that are the usual one of at least so many training questions (VQAv2:
    9 in the literature); 0 generates freely."""
    meteor: bool = True
    """Score captions by METEOR too, a Java program that takes seconds for every evaluation."""
    choose_by: str | None = None
    """Metric of the dev split by which the best adapter is chosen; left out, the task's own."""
    on_bad_image: OnBadImage | None = None
    """raise or skip where an image is missing or cannot be read; left out, examples are skipped and
    counted in training, and evaluation stops. Of several tasks the first says it for all."""
    features: TrainFeatures = "auto"
    """Where visual features come from. cached: from the files that dept-vl features made; live:
    every image is read and encoded at every step; auto: from those files if they are there for this encoder
    and all images, else encoded once before training if feature_memory is enough, else live. encoded, for
    method memory: what the frozen encoder makes of every text with its images is kept, in feature_memory.
    Of several tasks the first says it for all."""
    features_dir: Path | None = None
    """Folder of the files with the task's visual features; left out, features in its data_dir."""
    feature_memory: Annotated[float, Field(ge=0)] = 4.0
    """GiB of memory for features that are encoded once before training. Of several tasks the first
    says it for all images together."""
    own: Own = field(default_factory=OwnOptions)

    def __post_init__(self) -> None:
        """Data of your own are read by task vqa, unless another task is named."""
        if self.own.data is not None and self.task == DataOptions.task:
            object.__setattr__(self, "task", OWN_TASK)

    def splits(self) -> tuple[str, str, str]:
        """Return the training, dev and test split: the given ones, else the task's own.

        An empty dev split holds images out of the training split; a text task, which has none, uses its own.

        Raises:
            UnknownNameError: If there is no such task.
        """
        task, dev = TASKS[self.task], self.dev_split
        if dev is None or not (dev or task.image_count):
            dev = task.dev_split
        return self.train_split or task.train_split, dev, self.test_split or task.test_split


@dataclass(frozen=True)
class BackboneOptions(Options):
    """The frozen models."""

    backbone: Path | None = None
    """Folder of a saved backbone, such as data/tiny-clip-t5; or model, or vision and language, instead."""
    model: str | None = None
    """Hub name or folder of a pretrained vision-language model, such as Salesforce/blip2-flan-t5-xl or
    Qwen/Qwen2.5-VL-3B-Instruct: any of transformers' AutoModelForImageTextToText; or, for text alone, of
    AutoModelForCausalLM and AutoModelForSeq2SeqLM."""
    text_form: str = ""
    """How model is asked: chat for its chat template, or a text with {text} (and {image}); left out, the chat
    template where there is one, else as its authors ask it. The adapter keeps it."""
    vision: str | None = None
    """Hub name or folder of the image encoder, such as openai/clip-vit-base-patch32."""
    language: str | None = None
    """Hub name or folder of the encoder-decoder, such as google-t5/t5-base or facebook/bart-base; for
    text alone also of a decoder-only model, such as openai-community/gpt2."""
    vision_layer: Annotated[int, Field(ge=-1000, le=1000)] = -1
    """Hidden state of the image encoder that is read: -1 the last, -2 the penultimate."""
    class_token: bool = False
    """Keep the image encoder's class token."""
    pooled_grid: Annotated[int, Field(ge=0, le=LARGEST_GRID)] = 0
    """Max-pool the patches to a square of this side; 0 keeps them all."""
    exif: bool = True
    """Turn images as their EXIF orientation says; --no_exif takes pixels as they are stored."""
    image_fit: ImageFit | Literal["auto"] = "auto"
    """How images become square. squash: resized, nothing is lost (published); crop: the centre is cut out;
    pad: between bars of the mean colour; own: what the encoder's processor does, as in older runs; auto: the
    backbone folder's own, else squash."""
    visual_position_bias: VisualPositionBias = "none"
    """none: the language model's own positions leave visual tokens out (published); relative: stock."""
    object_order: ObjectOrder | Literal["auto"] = "auto"
    """Vector of each visual token's place. frozen: random, not trained (published); trained: with the visual
    projection; none: the language model reads a set of patches; auto: the backbone folder's own, else
    frozen."""
    visual_norm: VisualNorm | Literal["auto"] = "auto"
    """once: visual tokens bypass BART's norm of embeddings, having their own (published); twice: they pass
    through both, as in older runs; auto: the backbone folder's own, else once. T5 has no such norm."""
    backbone_dropout: bool = True
    """Dropout in the frozen language model while training."""
    train_projection: bool = True
    """Train the visual projection, as every published row does."""
    train_backbone: bool = False
    """Train the language model too: full fine-tuning, the ceiling to compare with."""
    train_only: TrainedPart = "all"
    """With train_backbone: all of it; biases alone (BitFit; T5 has none: the scales of its norms); or lora,
    the pairs of LoRA that peft adds to the attention's queries and values."""
    lora_rank: PositiveSize = 8
    """Rank of each pair of LoRA."""

    def loading(self) -> dict[str, Any]:
        """Return the arguments of `models.vlm.open_backbone`.

        Raises:
            UsageError: If options of two models that are joined are given besides a whole one.
        """
        if self.model is not None:
            usual, free = BackboneOptions(), {"model", "text_form", "exif", "backbone_dropout"}
            free |= {"train_projection", "train_backbone", "train_only", "lora_rank"}
            options = [f.name for f in fields(self) if f.name not in free]
            changed = [name for name in options if getattr(self, name) != getattr(usual, name)]
            if changed:
                these = ", ".join(f"--{name}" for name in changed)
                raise UsageError(f"--model is a whole model; leave out {these}")
            return {"model": self.model, "text_form": self.text_form, "exif": self.exif}
        if self.text_form:
            raise UsageError("--text_form is how a pretrained model is asked (--model); leave it out here")
        names = ("backbone", "vision", "language", "vision_layer", "class_token", "pooled_grid", "exif")
        given = {name: getattr(self, name) for name in (*names, "visual_position_bias")}
        return given | {k: None if getattr(self, k) == "auto" else getattr(self, k) for k in BEFORE_ORDER}


@dataclass(frozen=True)
class PromptOptions(Options):
    """The prompt."""

    method: MethodName = "dept"
    """pt, dept, adept (offset by token), hybrid (by position and token), ulpt, lopt (compressed prompts),
    residual, or memory (an adapter behind the encoder, no prompt); see prompts/methods.py."""
    prompt_length: Size = 40
    """Vectors of the soft prompt (m); 0 leaves the offset alone. pt, ulpt and lopt have
    reference_prompt_length instead."""
    rank: Size | None = None
    """Rank of the offset, or of a compressed prompt (r); 0 is plain prompt tuning. Left out, it is the
    largest with which the prompt has no more parameters than reference_prompt_length vectors."""
    reference_prompt_length: PositiveSize = 100
    """Length of the plain soft prompt (l) whose parameters are spent."""
    max_source_length: PositiveSize = 20
    """Longest text, in tokens, task prefix included (s); on a command line the task's own is the default
    (NLVR2: 72, text tasks: 256)."""
    alpha: Finite = 8.0
    """The offset is scaled by alpha / sqrt(rank)."""
    visual_offset: bool = False
    """Shift each visual token by a function of itself too, of the same rank (adept, hybrid)."""
    prompt_init: Init = "vocabulary"
    """Start from embeddings of common tokens drawn with the seed, of init_text, or from noise."""
    init_text: str = ""
    """Words to start from, for prompt_init text; repeated or cut to the prompt's length."""
    init_from: tuple[Path, ...] = ()
    """Start from trained prompts instead: folders of runs or adapters; of several, from their mean."""
    init_parts: InitParts = "prompt"
    """Of these take the prompt alone (P), or all of it: the offset too."""


@dataclass(frozen=True)
class TrainOptions(Options):
    """How long, how fast, and how often to look."""

    max_steps: Positive = 10_000
    """Optimizer steps."""
    num_epochs: Count = 0
    """Train for so many epochs instead of max_steps: in one every example, of captions every caption, comes
    once; 0 takes max_steps."""
    per_device_batch_size: Positive = 32
    """Examples per process and forward pass; among several tasks each may have its own."""
    gradient_accumulation_steps: Positive = 1
    """Forward passes per optimizer step."""
    max_grad_norm: Annotated[float, Field(ge=1e-9)] = 1.0
    """Gradients are clipped to this norm over all trained parameters."""
    eval_every: Positive = 1000
    """Optimizer steps between evaluations on the dev split; the last step is always evaluated."""
    eval_batch_size: Positive = 128
    """Examples decoded at a time, per process."""
    checkpoint_every: Count = 1000
    """Optimizer steps between checkpoints, from which a killed run resumes exactly (on disk
    three times what is trained, the last two are kept); 0 writes one only when the run is stopped and, until
    the test split is scored, after the last step."""
    pause_at: Count = 0
    """Stop at this step, with an evaluation and a checkpoint; continue with --resume. 0 runs to the end."""
    patience: Count = 0
    """Stop after this many evaluations without a better score; 0 never stops early."""
    log_every: Positive = 20
    """Optimizer steps between lines of the log."""
    num_workers: Workers = 0
    """Processes that read images; 0 reads them in the training process."""
    group_by_length: bool = False
    """Make batches of texts of about the same length, so that little is padded; every example still comes
    once an epoch."""
    seed: Seed = 42
    """Of initialisation, order and sampled answers."""
    gradient_checkpointing: bool = False
    """Run every layer of the language model a second time in the backward pass instead of keeping what it
    computed: less memory, about a third more time."""
    compile: bool = False
    """Compile the language model's layers with torch.compile for training, once for all lengths; on a CPU it
    saves memory and costs time. Needs a C++ compiler, and on a GPU Triton."""
    cuda_graphs: bool = False
    """Record the kernels of a training step once for every padded length, and launch them together from then
    on: faster where batches are small. Needs a CUDA device, one process, no gradient accumulation and no
    gradient checkpointing; elsewhere the run says why and trains without. Short answers of an
    encoder-decoder, decoded by greedy search, are recorded too."""
    deterministic: bool = False
    """Only operations that give the same bits every time. On a CPU a seed repeats a run without it; on
    a GPU some sums (gradients of look-ups and of attention) come in any order, and runs of one seed
    differ in the last digits. Slower there; an operation without such a form is an error."""


RATES = {"prompt": "prompt", "low_rank": "offset", "visual_projection": "projection", "backbone": "backbone"}
"""What the options of each group of `PromptedModel.parameter_groups` begin with."""


@dataclass(frozen=True)
class OptimOptions(Options):
    """AdamW with a learning rate for each part; linear warm-up, then linear decay to zero."""

    rates: Literal["absolute", "relative"] = "absolute"
    """absolute: prompt_lr and offset_lr are taken as they are; relative: they are those of T5-base, scaled by
    the size of this model's word embeddings over that of T5-base's (16.6)."""
    prompt_lr: Rate = 0.3
    """Peak learning rate of the soft prompt (alpha1 of the paper; its winners: 0.3 and 0.4)."""
    offset_lr: Rate = 1e-3
    """Peak learning rate of the low-rank pair (alpha2; the paper's winners: 1e-4 to 5e-3)."""
    projection_lr: Rate = 1e-3
    """Peak learning rate of the visual projection."""
    backbone_lr: Rate = 1e-4
    """Peak learning rate of the language model, where it is trained (--train_backbone)."""
    prompt_weight_decay: Rate = 1e-5
    """AdamW's decay of the soft prompt."""
    offset_weight_decay: Rate = 1e-5
    """AdamW's decay of the low-rank pair."""
    projection_weight_decay: Rate = 0.01
    """AdamW's decay of the visual projection."""
    backbone_weight_decay: Rate = 0.01
    """AdamW's decay of the language model."""
    adam_eps: Annotated[float, Field(gt=0, le=1)] = 1e-8
    """AdamW's epsilon (published: 1e-6)."""
    warmup_steps: Count = 500
    """Steps of linear warm-up."""
    warmup_ratio: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of all steps that are linear warm-up, instead of warmup_steps; 0 takes warmup_steps."""

    def of_group(self, group: str) -> tuple[float, float]:
        """Learning rate and weight decay of a group of `PromptedModel.parameter_groups`."""
        name = RATES[group]
        return getattr(self, f"{name}_lr"), getattr(self, f"{name}_weight_decay")


@dataclass(frozen=True)
class RunConfig(Options):
    """Everything a run depends on; written to its folder, and repeated with --config.

    Example:
        >>> import dept_vl
        >>> from dept_vl.config import PromptOptions, TrainOptions
        >>> config = dept_vl.RunConfig(prompt=PromptOptions(method="pt"), train=TrainOptions(max_steps=100))
        >>> config.data.task
        'vqav2'
    """

    data: DataOptions = field(default_factory=DataOptions)
    also: Annotated[tuple[DataOptions, ...], tyro.conf.Suppress] = ()
    """Further tasks to train on together, of a configuration file: every batch is of one task, drawn in
    proportion to the number of its batches."""
    backbone: BackboneOptions = field(default_factory=BackboneOptions)
    prompt: PromptOptions = field(default_factory=PromptOptions)
    train: TrainOptions = field(default_factory=TrainOptions)
    optim: OptimOptions = field(default_factory=OptimOptions)
    output_dir: Path | None = None
    """Folder of the run, which must hold none yet; left out, a new one under runs/."""
    resume: str = ""
    """Resume a run that was stopped: its folder, or auto to resume the run in output_dir if there is one and
    start it if not, so that the same command can be repeated."""
    accept_changes: bool = False
    """Resume a run although its options or data have changed since it began."""
    wait: bool = False
    """Wait while another process has the folder, rather than leave it."""
    tune: Annotated[int, Field(ge=0, le=10_000)] = 0
    """Search the learning rates and the split between prompt and rank first, in so many trials."""
    mixed_precision: Literal["no", "bf16"] = "no"
    """bf16 computes the backbone in bfloat16. There is no fp16: T5 overflows in it."""
    log_with: str | None = None
    """A tracker beside the run's own log.jsonl: tensorboard, wandb, trackio, or another of accelerate's."""


@dataclass(frozen=True)
class ExtractConfig(Options):
    """What visual features are extracted of, by what, and how they are stored."""

    data: DataOptions = field(default_factory=DataOptions)
    also: Annotated[tuple[DataOptions, ...], tyro.conf.Suppress] = ()
    """Further tasks, of a configuration file; their features go into folders of their own."""
    backbone: BackboneOptions = field(default_factory=BackboneOptions)
    splits: tuple[str, ...] = ()
    """Splits whose images are encoded; left out, those of training, dev and test."""
    dtype: Precision = "float16"
    """What features are stored in; bfloat16 and float32 hold larger numbers."""
    shard_images: Positive = 1024
    """Images in one file; a folder that is resumed keeps its own."""
    batch_size: Positive = 64
    """Images encoded at a time, per process."""
    num_workers: Workers = 0
    """Processes that read and preprocess images; 0 reads them in the encoding process."""


@dataclass(frozen=True)
class EvaluateConfig(Options):
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
    """Split to score on; left out, the run's test split, of other data of your own those named test, else
    all."""
    limit: Count = 0
    """At most so many examples, drawn with the run's seed; 0 takes all."""
    num_beams: Annotated[int, Field(ge=0, le=1000)] = 0
    """Beams of the search; 0 takes the run's or the task's own."""
    candidates: Path | None = None
    """JSON list of answers to choose among; left out, on VQAv2 the run's candidates.json if it has one."""
    batch_size: Positive = 128
    """Examples decoded at a time, per process."""
    num_workers: Workers = 0
    """Processes that read images; 0 reads them in the evaluating process."""
    features: Features = "auto"
    """cached: visual features from the files that dept-vl features made; live: every image is read
    and encoded; auto: from those files if they are there for the run's encoder and all images, else live."""
    features_dir: Path | None = None
    """Folder of those files; left out, the run's for the run's data, else features in data_dir."""
    on_bad_image: OnBadImage = "raise"
    """raise, or skip: give an empty answer, count it and continue."""
    mixed_precision: Literal["no", "bf16"] = "no"
    """bf16 computes the backbone in bfloat16."""
    output_dir: Path | None = None
    """Folder for predictions, scores and a submission; left out, RUN/TASK-SPLIT."""
    own: Own = field(default_factory=OwnOptions)
    wait: bool = False
    """Wait while another process has that folder, rather than leave it."""


@dataclass(frozen=True)
class PredictConfig(Options):
    """What to predict, with which adapter."""

    inputs: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="IMAGE... QUESTION...")]
    """Image files, then questions; none with --data."""
    adapter: str
    """Folder of a run or of an adapter, or an adapter's name on the Hub."""
    backbone: Path | None = None
    """What the adapter was trained on, if it is not where the adapter says: a folder, or VISION+LANGUAGE."""
    revision: str | None = None
    """Branch, tag or commit of an adapter on the Hub."""
    task: str | None = None
    """How the questions are asked; left out, as the adapter was trained."""
    device: str | None = None
    """Such as cpu or cuda; left out, a GPU if there is one."""
    own: Own = field(default_factory=OwnOptions)
    output: Path | None = None
    """With --data: file for the answers, JSON Lines in the order of the table. After a stop the same
    command continues it, on any number of processes."""
    split: str = "all"
    """With --data: rows to answer; all, or those of the split train, validation or test."""
    batch_size: Positive = 128
    """With --data: rows answered at a time, per process."""
    num_workers: Workers = 0
    """With --data: processes that read images; 0 reads them in the answering process."""
    features: Features = "auto"
    """With --data: as for dept-vl evaluate."""
    features_dir: Path | None = None
    """With --data: folder of those files; left out, features in the folder of the data."""
    on_bad_image: OnBadImage = "raise"
    """With --data: raise, or skip: give the answer null, count it and continue."""


@dataclass(frozen=True)
class DemoConfig(Options):
    """What is shown where."""

    adapters: tuple[str, ...]
    """Folders of runs or adapters, or names on the Hub, all of one backbone."""
    backbone: Path | None = None
    """What they were trained on, if it is not where the first says: a folder, or VISION+LANGUAGE."""
    host: str = "127.0.0.1"
    """Address to listen at; whoever reaches another than the default has to know a password."""
    port: Annotated[int, Field(ge=0, le=65535)] = 7860
    """Port to listen at."""
    password: str | None = None
    """That visitors have to know, with any user name. Others on this machine can read it in the list of
    processes: rather set DEPT_VL_PASSWORD in the environment. Left out, one is made up where it is needed."""
    device: str | None = None
    """Such as cpu or cuda; left out, a GPU if there is one."""


@dataclass(frozen=True)
class ServeConfig(Options):
    """What is served where, and what requests may be."""

    adapters: tuple[str, ...]
    """Folders of runs or adapters, or names on the Hub, all of one backbone."""
    backbone: Path | None = None
    """What they were trained on, if it is not where the first says: a folder, or VISION+LANGUAGE."""
    host: str = "127.0.0.1"
    """Address to listen at; whoever reaches another than the default has to know a token."""
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    """Port to listen at; 0 takes a free one."""
    token_file: Path | None = None
    """File with the token that requests have to bear; left out, DEPT_VL_TOKEN in the environment."""
    allow_adapter_changes: bool = False
    """Let requests add adapters (POST /v1/adapters) and remove them (DELETE /v1/adapters/NAME)."""
    allow_urls: bool = False
    """Fetch images from public http and https addresses, besides data URLs."""
    device: str | None = None
    """cpu, cuda or mps; left out, all NVIDIA GPUs if there are any. CUDA_VISIBLE_DEVICES picks among them."""
    copies: Positive = 1
    """Of the model on each device, each in a process of its own."""
    max_batch_size: Positive = 32
    """Questions answered together, whichever adapters they are for."""
    max_wait_ms: Rate = 5.0
    """Milliseconds that a question waits for others to be answered with."""
    max_requests: Positive = 1024
    """Requests at a time, those that wait included; further ones are rejected."""
    max_request_mb: Positive = 32
    """Megabytes of a request."""
    max_question: Positive = 1000
    """Characters of a question."""
    timeout: Annotated[float, Field(gt=0, le=86400)] = 60.0
    """Seconds for a request to come, and again for its answer."""


@dataclass(frozen=True)
class ReportConfig(Options):
    """Which run."""

    run: Path
    """Folder of a finished run."""
    picture: Path | None = None
    """PNG file to draw the page into, by Chromium."""
    size: tuple[Positive, Positive] = (1200, 1800)
    """Pixels of that picture across and down."""
    wait: bool = False
    """Wait while another process has the folder, rather than leave it."""


FREE_TO_CHANGE = (
    "output_dir",
    "resume",
    "accept_changes",
    "wait",
    "log_with",
    "train.num_workers",
    "train.pause_at",
    "train.log_every",
    "data.meteor",  # a figure more, which decides nothing
    "data.features",  # `run` sees to it that their precision stays
    "data.features_dir",
    "data.feature_memory",
)
"""Options that may change when a run resumes, because its result does not depend on them."""
LOCATIONS = (
    *("data.data_dir", "data.own.data", "data.own.images", "data.shots_file"),
    *("backbone.backbone", "backbone.model", "backbone.vision", "backbone.language"),
)
"""Options that may change as long as there is the same at the new place."""
BATCHES = ("data.task_batch_size", "train.per_device_batch_size", "train.gradient_accumulation_steps")
"""Options that may change as long as their product with the number of processes stays."""
RENAMED = {"lora_lr": "offset_lr", "lora_weight_decay": "offset_weight_decay"}
"""Options by the names that older configurations and commands have for them."""


def differences(
    started: dict[str, Any], now: dict[str, Any], free: Collection[str] = (), folder: Path = Path()
) -> list[str]:
    """Options on which a run's result depends and that were changed, as `name=old -> new`.

    Args:
        started: As `to_json` gives them; options that came later had their defaults.
        now: The same.
        free: Names of more options that may change; those of `data` hold for the other tasks too.
        folder: Of the run, beside which its paths are.
    """
    usual, more = flat(to_json(RunConfig())), flat(to_json(DataOptions()), "data.")
    found = []
    for options in (current_options(started), now):
        options = _located(_with_splits(options), folder)
        also = {f"also[{place}]": data for place, data in enumerate(options.pop("also"))}
        usual |= {name.replace("data", task, 1): value for task in also for name, value in more.items()}
        found.append({name: _comparable(name, value) for name, value in flat(options | also).items()})
    old, new = (usual | options for options in found)
    return [
        f"{name}={old.get(name)!r} -> {new.get(name)!r}"
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name) and _general(name) not in {*FREE_TO_CHANGE, *free}
    ]


def _general(name: str) -> str:
    """Return the name that an option has of the first task."""
    return f"data.{name.partition('.')[2]}" if name.startswith("also[") else name


def _comparable(name: str, value: Any) -> Any:
    """Return a value, a path as the place that it means."""
    if _general(name) in LOCATIONS and isinstance(value, str) and os.path.exists(value):
        return os.path.realpath(value)
    return value


def _with_splits(options: dict[str, Any]) -> dict[str, Any]:
    """Return options with the splits named, so that a split left out equals the same one given."""

    def named(data: dict[str, Any]) -> dict[str, Any]:
        names = ("train_split", "dev_split", "test_split")
        known = {name: data[name] for name in ("task", *names) if name in data}
        return data | dict(zip(names, DataOptions(**known).splits(), strict=True))

    return options | {
        "data": named(options.get("data", {})),
        "also": list(map(named, options.get("also", []))),
    }


def flat(options: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Options in groups by their dotted names, `train.max_steps`."""
    found: dict[str, Any] = {}
    for name, value in options.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return found


def current_options(options: dict[str, Any]) -> dict[str, Any]:
    """Return the options of an older configuration, in groups or not, by their names of today.

    What a run of an older version leaves out is as it was then: how two models are joined, and that pixels
    are taken as stored.
    """
    named = {RENAMED.get(name, name): value for name, value in options.items()}
    if isinstance(named.get("optim"), dict):
        named["optim"] = {RENAMED.get(name, name): value for name, value in named["optim"].items()}
    backbone, also = named.get("backbone"), named.get("also")
    # A run writes every option, these from the first version on, so what is missing was no option yet.
    if isinstance(backbone, dict) and {"vision_layer", "pooled_grid"} <= backbone.keys():
        parts = [named.get("data"), *(also if isinstance(also, list) else [])]
        names = [part.get("task") for part in parts if isinstance(part, dict)]
        images = any(isinstance(name, str) and name in TASKS and TASKS[name].image_count for name in names)
        joined = BEFORE_ORDER if backbone.get("vision") else {}
        named["backbone"] = {**({"exif": False} if images else {}), **joined, **backbone}
    return named


def _located(options: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return options with the paths that are found again; `folder` is that of their file."""

    def again(group: Any, *names: str) -> Any:
        if not isinstance(group, dict):
            return group
        found = {name: find_again(group[name], folder) for name in names if isinstance(group.get(name), str)}
        task = group.get("task", DataOptions.task)
        if "data_dir" in names and group.get("data_dir") is None and isinstance(task, str):
            usual = str(Path("data", task))
            if find_again(usual, folder) != usual:
                found["data_dir"] = find_again(usual, folder)
        if isinstance(group.get("own"), dict):
            found["own"] = again(group["own"], "data", "images")
        return group | found

    paths = ("data_dir", "features_dir", "shots_file")
    also, prompt = options.get("also", []), options.get("prompt")
    options = options | {
        "data": again(options.get("data", {}), *paths),
        "also": [again(task, *paths) for task in also] if isinstance(also, list) else also,
        "backbone": again(options.get("backbone", {}), "backbone", "model", "vision", "language"),
    }
    if isinstance(prompt, dict) and isinstance(prompt.get("init_from"), list):
        names = [find_again(name, folder) if isinstance(name, str) else name for name in prompt["init_from"]]
        options["prompt"] = prompt | {"init_from": names}
    return options


def read_config(path: Path, base: RunConfig | None = None) -> RunConfig:
    """Read the config.json of a run. Its output folder is left out: a repeated run gets its own.

    Paths are those that are found now, see `find_again`.

    Args:
        path: The file.
        base: Gives what the file leaves out; None as everywhere.

    Raises:
        FileNotFoundError: If the file is missing.
        UsageError: If it has a key that no option has, or a value of another type or out of range.
        ValueError: If it is not JSON.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no configuration at {path}; give the config.json of a run")
    content = read_json(path)
    if isinstance(content, dict):
        for name in ("output_dir", "resume", "accept_changes", "wait"):
            content.pop(name, None)
        content = _over(_located(current_options(content), path.parent), to_json(base or RunConfig()))
    try:
        return build(RunConfig, content)
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None


def _over(content: dict[str, Any], base: dict[str, Any]) -> dict[str, Any]:
    """Return options over those of a base, group by group."""
    return base | {
        name: _over(value, base[name])
        if isinstance(value, dict) and isinstance(base.get(name), dict)
        else value
        for name, value in content.items()
    }
