"""Options of runs and commands as dataclasses, with their ranges and help texts.

`cli` turns the fields into command-line flags, and pydantic reads them from configuration files. This
module does not import torch.
"""

import os
from collections.abc import Collection
from dataclasses import dataclass, field, replace
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
    """Options of the training loop."""

    max_steps: Positive = 10_000
    """Number of optimizer steps."""
    num_epochs: Count = 0
    """Number of epochs to train for, instead of max_steps; 0 uses max_steps. An epoch is one pass over all
    examples; for captions, over all captions."""
    per_device_batch_size: Positive = 32
    """Training batch size per process. Each of several tasks can set its own (task_batch_size)."""
    gradient_accumulation_steps: Positive = 1
    """Number of batches to accumulate gradients over before each optimizer step."""
    max_grad_norm: Annotated[float, Field(ge=1e-9)] = 1.0
    """Maximum norm of the gradients of all trained parameters together; larger gradients are clipped."""
    eval_every: Positive = 1000
    """Number of optimizer steps between evaluations on the dev split. The last step is always evaluated."""
    eval_batch_size: Positive = 128
    """Evaluation batch size per process."""
    checkpoint_every: Count = 1000
    """Number of optimizer steps between checkpoints, from which an interrupted run resumes exactly. The last
    two are kept, each about three times the size of the trained parameters. 0 writes a checkpoint only when
    training ends or is stopped, and deletes it when the run is complete."""
    pause_at: Count = 0
    """Stop after this step, evaluate and write a checkpoint; --resume continues the run. 0 does not pause."""
    patience: Count = 0
    """Stop early after this many evaluations without a better score; 0 disables early stopping."""
    log_every: Positive = 20
    """Number of optimizer steps between lines of the log."""
    num_workers: Workers = 0
    """Number of worker processes that read images; 0 reads them in the training process."""
    group_by_length: bool = False
    """Put texts of similar length into one batch, to reduce padding. Every example still comes once per
    epoch."""
    seed: Seed = 42
    """Random seed of the initialisation, the order of the examples and the sampled answers."""
    gradient_checkpointing: bool = False
    """Recompute the activations of the language model's layers in the backward pass instead of keeping them.
    This saves memory and takes about a third more time."""
    compile: bool = False
    """Compile the language model's layers for training with torch.compile, once for all text lengths. On a
    CPU this saves memory but takes more time. Requires a C++ compiler and, on a GPU, Triton."""
    cuda_graphs: bool = False
    """Record the training step, and the greedy decoding of short answers of encoder-decoder models, as CUDA
    graphs, one for each padded length. This is faster for small batches. Requires a CUDA device, a single
    process, no gradient accumulation and no gradient checkpointing; otherwise the run prints the reason and
    trains without graphs."""
    deterministic: bool = False
    """Use deterministic operations only; an operation without a deterministic implementation raises an error.
    On a GPU, runs with the same seed otherwise differ in the last digits (gradients of embeddings and
    attention), and this flag makes them slower. On a CPU they are identical without it."""


RATES = {"prompt": "prompt", "low_rank": "offset", "visual_projection": "projection", "backbone": "backbone"}
"""Prefix of the optimizer options of each group of `PromptedModel.parameter_groups`."""
OFFSET_LR, OFFSET_LR_ALONE = 1e-3, 1e-2
"""Default learning rates of an offset beside a soft prompt, and of one without a soft prompt."""


@dataclass(frozen=True)
class OptimOptions(Options):
    """Options of AdamW: a learning rate per parameter group, with linear warm-up and linear decay to zero."""

    rates: Literal["absolute", "relative"] = "absolute"
    """absolute: use prompt_lr and offset_lr as given. relative: treat them as learning rates for T5-base, and
    multiply them by the size of this model's word embeddings relative to T5-base's (16.6)."""
    prompt_lr: Rate = 0.3
    """Peak learning rate of the soft prompt (alpha1 in the DePT paper; best values: 0.3 and 0.4)."""
    offset_lr: Rate | None = None
    """Peak learning rate of the low-rank offset (alpha2 in the DePT paper; best values: 1e-4 to 5e-3). The
    default is 0.001 beside a soft prompt, and 0.01 without one (memory, or prompt_length 0)."""
    projection_lr: Rate = 1e-3
    """Peak learning rate of the visual projection."""
    backbone_lr: Rate = 1e-4
    """Peak learning rate of the language model. Only used with --train_backbone."""
    prompt_weight_decay: Rate = 1e-5
    """Weight decay of the soft prompt."""
    offset_weight_decay: Rate = 1e-5
    """Weight decay of the low-rank offset."""
    projection_weight_decay: Rate = 0.01
    """Weight decay of the visual projection."""
    backbone_weight_decay: Rate = 0.01
    """Weight decay of the language model."""
    adam_eps: Annotated[float, Field(gt=0, le=1)] = 1e-8
    """Epsilon of AdamW (published runs: 1e-6)."""
    warmup_steps: Count = 500
    """Number of warm-up steps, but at most a tenth of all steps."""
    warmup_ratio: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Fraction of all steps to warm up for, instead of warmup_steps; 0 uses warmup_steps."""

    def of_group(self, group: str) -> tuple[float, float]:
        """Return learning rate and weight decay of a group of `PromptedModel.parameter_groups`."""
        name = RATES[group]
        rate = getattr(self, f"{name}_lr")
        return OFFSET_LR if rate is None else rate, getattr(self, f"{name}_weight_decay")


@dataclass(frozen=True)
class RunConfig(Options):
    """Configuration of a training run.

    It is saved in the run's folder as `config.json`; pass that file to `--config` to repeat the run.

    Example:
        >>> import dept_vl
        >>> from dept_vl.config import PromptOptions, TrainOptions
        >>> config = dept_vl.RunConfig(prompt=PromptOptions(method="pt"), train=TrainOptions(max_steps=100))
        >>> config.data.task
        'vqav2'
    """

    data: DataOptions = field(default_factory=DataOptions)
    also: Annotated[tuple[DataOptions, ...], tyro.conf.Suppress] = ()
    """Further tasks to train on (configuration files only). Each batch holds examples of one task; a task is
    drawn with a probability proportional to its number of batches."""
    backbone: BackboneOptions = field(default_factory=BackboneOptions)
    prompt: PromptOptions = field(default_factory=PromptOptions)
    train: TrainOptions = field(default_factory=TrainOptions)
    optim: OptimOptions = field(default_factory=OptimOptions)
    output_dir: Path | None = None
    """Folder of the run; it must not hold another run. If not given, a new folder in runs/."""
    resume: str = ""
    """Folder of a stopped run to resume; or auto: resume the run in output_dir if there is one, otherwise
    start it. With auto, the same command can be repeated until the run is complete."""
    accept_changes: bool = False
    """Resume a run even if its options or data have changed since it was started."""
    wait: bool = False
    """Wait if another process is using the folder, instead of raising an error."""
    mixed_precision: Literal["no", "bf16"] = "no"
    """bf16: run the backbone in bfloat16. fp16 is not supported, because T5 overflows in it."""
    log_with: str | None = None
    """Experiment tracker to log to as well: tensorboard, wandb, trackio, or another one of accelerate's."""

    def settled(self) -> "RunConfig":
        """Return the configuration with the default of `optim.offset_lr`, which depends on the prompt."""
        if self.optim.offset_lr is not None:
            return self
        alone = not self.prompt.has_vectors and self.prompt.rank != 0
        return replace(self, optim=replace(self.optim, offset_lr=OFFSET_LR_ALONE if alone else OFFSET_LR))


@dataclass(frozen=True)
class EvaluateConfig(Options):
    """Options of `dept-vl evaluate`."""

    run: Path
    """Folder of a run. Its config.json names the backbone, and its best/ holds the adapter."""
    adapter: Path | None = None
    """Folder of another adapter to score, trained on the same backbone."""
    task: str = ""
    """Task to score on. If not given, the run's first task."""
    data_dir: Path | None = None
    """Folder with the task's official files. If not given, the run's data folder."""
    split: str = ""
    """Split to score on. If not given, the run's test split; with --data, the rows of the split test, or all
    rows if there are none."""
    limit: Count = 0
    """Maximum number of examples, drawn with the run's seed; 0 scores all."""
    num_beams: Annotated[int, Field(ge=0, le=1000)] = 0
    """Number of beams for beam search; 0 uses the run's or the task's default."""
    candidates: Path | None = None
    """JSON file with a list of answers to choose from. If not given, VQAv2 uses the run's candidates.json if
    there is one."""
    batch_size: Positive = 128
    """Batch size per process."""
    num_workers: Workers = 0
    """Number of worker processes that read images; 0 reads them in the main process."""
    features: Features = "auto"
    """cached: read visual features from the files written by dept-vl features. live: read and encode images.
    auto: use the files if they match the run's vision encoder and cover all images, otherwise live."""
    features_dir: Path | None = None
    """Folder of those files. If not given, the run's for the run's data, otherwise features in data_dir."""
    on_bad_image: OnBadImage = "raise"
    """raise: stop at an image that cannot be read. skip: predict an empty answer for it and continue."""
    mixed_precision: Literal["no", "bf16"] = "no"
    """bf16: run the backbone in bfloat16."""
    output_dir: Path | None = None
    """Folder to save predictions, scores and submission in. If not given, RUN/TASK-SPLIT."""
    own: Own = field(default_factory=OwnOptions)
    wait: bool = False
    """Wait if another process is using that folder, instead of raising an error."""


FREE_TO_CHANGE = (
    "output_dir",
    "resume",
    "accept_changes",
    "wait",
    "log_with",
    "train.num_workers",
    "train.pause_at",
    "train.log_every",
    "data.meteor",  # only adds a metric to the report
    "data.features",  # `run` checks that their precision stays the same
    "data.features_dir",
    "data.feature_memory",
)
"""Options that may change when a run is resumed, because its result does not depend on them."""
LOCATIONS = (
    *("data.data_dir", "data.own.data", "data.own.images", "data.shots_file"),
    *("backbone.backbone", "backbone.model", "backbone.vision", "backbone.language"),
)
"""Paths that may change when a run is resumed, as long as the content at the new path is the same."""
BATCHES = ("data.task_batch_size", "train.per_device_batch_size", "train.gradient_accumulation_steps")
"""Options that may change when a run is resumed, if their product with the number of processes does not."""
RENAMED = {"lora_lr": "offset_lr", "lora_weight_decay": "offset_weight_decay"}
"""Current names of options by their names in older configurations and commands."""


def differences(
    started: dict[str, Any], now: dict[str, Any], free: Collection[str] = (), folder: Path = Path()
) -> list[str]:
    """Return the changed options that a run's result depends on, each as `name=old -> new`.

    Options missing from `started` are taken to have their defaults. `free` names further options that may
    change; names of `data` options apply to all tasks. `folder` is the run's, for relative paths.
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
    """Return the name of an option of a further task as it is called for the first task."""
    return f"data.{name.partition('.')[2]}" if name.startswith("also[") else name


def _comparable(name: str, value: Any) -> Any:
    """Return the value of an option; resolve it if it is an existing path."""
    if _general(name) in LOCATIONS and isinstance(value, str) and os.path.exists(value):
        return os.path.realpath(value)
    return value


def _with_splits(options: dict[str, Any]) -> dict[str, Any]:
    """Return options with default splits filled in, so that they compare equal to splits that are given."""

    def named(data: dict[str, Any]) -> dict[str, Any]:
        names = ("train_split", "dev_split", "test_split")
        known = {name: data[name] for name in ("task", *names) if name in data}
        return data | dict(zip(names, DataOptions(**known).splits(), strict=True))

    return options | {
        "data": named(options.get("data", {})),
        "also": list(map(named, options.get("also", []))),
    }


def flat(options: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested options to dotted names, such as `train.max_steps`."""
    found: dict[str, Any] = {}
    for name, value in options.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return found


def current_options(options: dict[str, Any]) -> dict[str, Any]:
    """Return the options of an older configuration, nested or flat, under their current names.

    Options that did not exist in the older version are set to its behaviour: how a vision tower and a
    language model are joined, and that images are not rotated by their EXIF orientation. A search (`tune`),
    which earlier versions had, is a UsageError.
    """
    named = _renamed(options)
    if trials := named.pop("tune", 0):
        raise UsageError(
            f"tune is {trials!r:.60}, of a search that this version does not have; expected 0: take the "
            "config.json of a trial, or remove tune"
        )
    if isinstance(named.get("optim"), dict):
        named["optim"] = _renamed(named["optim"])
    backbone, also = named.get("backbone"), named.get("also")
    # Runs save all options. These two exist since the first version, so an option missing here is newer.
    if isinstance(backbone, dict) and {"vision_layer", "pooled_grid"} <= backbone.keys():
        parts = [named.get("data"), *(also if isinstance(also, list) else [])]
        names = [part.get("task") for part in parts if isinstance(part, dict)]
        images = any(isinstance(name, str) and name in TASKS and TASKS[name].image_count for name in names)
        joined = BEFORE_ORDER if backbone.get("vision") else {}
        named["backbone"] = {**({"exif": False} if images else {}), **joined, **backbone}
    return named


def _renamed(options: dict[str, Any]) -> dict[str, Any]:
    for old in RENAMED.keys() & options.keys():
        if RENAMED[old] in options:
            raise UsageError(f"{old} is the old name of {RENAMED[old]}, and both are given; remove {old}")
    return {RENAMED.get(name, name): value for name, value in options.items()}


def _located(options: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Replace relative paths by existing ones, see `find_again`; `folder` is that of the file."""

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
    """Read the config.json of a run, without `output_dir`, `resume`, `accept_changes` and `wait`.

    Relative paths are looked up as described in `find_again`. Options that the file does not have are taken
    from `base`, or have their defaults. Raise FileNotFoundError if the file is missing, DamagedFileError if
    it is not valid JSON, and UsageError if an option is wrong.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no configuration at {path}; give the config.json of a run")
    content = read_json(path)
    if isinstance(content, dict):
        for name in ("output_dir", "resume", "accept_changes", "wait"):
            content.pop(name, None)
    try:
        if isinstance(content, dict):
            content = _over(_located(current_options(content), path.parent), to_json(base or RunConfig()))
        return build(RunConfig, content)
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None


def _over(content: dict[str, Any], base: dict[str, Any]) -> dict[str, Any]:
    """Merge nested options into those of a base."""
    return base | {
        name: _over(value, base[name])
        if isinstance(value, dict) and isinstance(base.get(name), dict)
        else value
        for name, value in content.items()
    }
