"""Every option of a run and of the commands, with its range and its help; imports no engine.

`cli` makes flags of these dataclasses, and pydantic reads them from files.
"""

import os
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from pydantic import Field

from dept_vl._utils.errors import UsageError
from dept_vl._utils.io import read_json
from dept_vl._utils.options import Count, Options, Positive, Rate, Seed, Workers, build
from dept_vl._utils.options import to_json as to_json
from dept_vl._utils.options import validate as validate
from dept_vl._utils.run_files import find_again
from dept_vl.models.options import BEFORE_ORDER
from dept_vl.models.options import BackboneOptions as BackboneOptions
from dept_vl.prompts.options import InitParts as InitParts
from dept_vl.prompts.options import PromptOptions as PromptOptions
from dept_vl.tasks import TASKS
from dept_vl.tasks.options import OWN_TASK as OWN_TASK
from dept_vl.tasks.options import DataOptions as DataOptions
from dept_vl.tasks.options import Features as Features
from dept_vl.tasks.options import OnBadImage as OnBadImage
from dept_vl.tasks.options import Own as Own
from dept_vl.tasks.own.options import OwnOptions


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

    Options that came later than `started` had their defaults. `free` are names of more options that may
    change; those of `data` hold for the other tasks too. Paths are beside `folder`, that of the run.
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

    `base` gives what the file leaves out.

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
