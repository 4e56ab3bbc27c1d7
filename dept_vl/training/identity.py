"""Compare a run that is resumed or reused with its start, which is stored in `identity.json`.

Differences in rows, image sizes, weights, source adapters or examples per step raise an error. Differences in
threads, device or versions, which change only the last bits, print a note. Paths and file formats may change,
since data are compared by content. Of images only the size in bytes is stored: another image of equal size
goes unnoticed here, while stored features compare times too (`feature_index`).
"""

import hashlib
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from dept_vl._utils.io import is_there, read_json, read_object, write_noted_json
from dept_vl._utils.options import check
from dept_vl._utils.printable import say
from dept_vl._utils.processes import on_main
from dept_vl._utils.run_files import CONFIG_FILE, FEATURES_FILE, IDENTITY_FILE
from dept_vl._utils.tensors import exact_fingerprint, fingerprint
from dept_vl._utils.terminal import waiting
from dept_vl.adapters.adapter import Adapter
from dept_vl.config import (
    BATCHES,
    LOCATIONS,
    BackboneOptions,
    DataOptions,
    RunConfig,
    differences,
    read_config,
    to_json,
)
from dept_vl.data.content import rows_content, sizes_content
from dept_vl.data.encoded import WITH_TEXT
from dept_vl.data.feature_index import INDEX_FILE
from dept_vl.data.feature_source import features_folder
from dept_vl.data.lengths import tokenizer_description
from dept_vl.data.splits import Splits, load_splits, options_together, parts_of
from dept_vl.models.base import FrozenBackbone
from dept_vl.models.pretrained_vlm import open_backbone
from dept_vl.tasks.base import Task, data_folder

PACKAGES = ("torch", "transformers", "numpy")
"""Packages whose versions may change the last bits of a result."""


@dataclass
class Identity:
    """Fields of `identity.json`."""

    started_in: str  # working directory at the start, for relative paths
    content: dict[str, str]  # fingerprints of what the result depends on, by name
    setup: dict[str, str]  # device, threads and versions, which change only the last bits
    changes: list[str] = field(default_factory=list)  # changes since the start, in order of time


class DifferentError(ValueError):
    """Raised when a run would continue with other options or data than it began with."""


def changed_options(folder: Path, config: RunConfig) -> list[str]:
    """Return the options that differ from a run's start, except those that are compared by content."""
    free = (*BATCHES, *LOCATIONS) if is_there(folder / IDENTITY_FILE) else BATCHES
    return differences(read_object(folder / CONFIG_FILE, dict), to_json(config), free, folder)


def keep_identity(
    folder: Path,
    config: RunConfig,
    splits: Sequence[Splits],
    backbone: FrozenBackbone,
    accelerator: Accelerator,
    checkpoint: Path | None,
) -> None:
    """Store what a new run depends on, or compare it when the run resumes.

    If it differs and changes are not accepted, every process raises DifferentError.
    """

    def keep() -> None:
        content = {
            **_content(splits),
            **_weights(backbone, folder_too=config.backbone.backbone is not None),
            **_sources(config),
            "batches": batches(config, accelerator.num_processes),
        }
        _keep(folder, config, Identity(str(Path.cwd()), content, _setup(accelerator)), checkpoint)

    on_main(accelerator, keep)


def check_kept(folder: Path, config: RunConfig, processes: int | None = None) -> None:
    """Check that a finished run had these options, and that it would read the same data and models today.

    DifferentError lists what differs. Without `processes`, the number is that of the run.
    """
    options = changed_options(folder, config)
    content = [] if options else _changed_contents(folder, config, processes)
    if options or content:
        raise DifferentError(
            f"{folder} was started with {_other(options, content)} and has ended; nothing was changed there. "
            "Start a new run in another --output_dir, or remove this folder to have it made again"
        )


def _changed_contents(folder: Path, config: RunConfig, processes: int | None) -> list[str]:
    """Return how data and models differ from those that a run read; empty if this is unknown."""
    if not is_there(folder / IDENTITY_FILE):
        _remark(folder, f"it has no {IDENTITY_FILE}")
        return []
    identity = check(read_json(folder / IDENTITY_FILE), Identity)
    then, processes = identity.content, processes or int(identity.setup["processes"])
    features = _changed_features(folder, config)
    try:
        if _differences(then, contents(config, processes)):
            forget_contents()  # they may have changed since they were read
        return features + _differences(then, contents(config, processes))
    except FileNotFoundError as error:
        _remark(folder, str(error))
        return []


def _changed_features(folder: Path, config: RunConfig) -> list[str]:
    """Return how the data type of the features differs from that of the run, if this is certain."""
    path = folder / FEATURES_FILE
    if not is_there(path):
        return []
    began: str = read_json(path)["dtype"]
    precision = began.removesuffix(WITH_TEXT)
    if config.data.features == "live":
        precision = "float32"
    elif config.data.features == "cached" and is_there(index := features_folder(config.data) / INDEX_FILE):
        precision = read_json(index)["fingerprint"]["dtype"]
    now = precision + (WITH_TEXT if config.data.features == "encoded" else "")
    return [] if now == began else [f"features={began} -> {now}"]


@cache
def _remark(folder: Path, reason: str) -> None:
    say(f"note: cannot check whether {folder} was trained on these data: {reason}")


def contents(config: RunConfig, processes: int = 1) -> dict[str, str]:
    """Return fingerprints of the data and models that a run would read now, cached: see `forget_contents`."""
    found: dict[str, str] = {}
    for options in options_together(config):
        found |= _contents_of(options, config.train.seed)
    found |= _weights_of(config.backbone)
    sources = [Adapter.from_pretrained(path) for path in config.prompt.init_from]
    if any("visual_projection" in source.trainable_parameters for source in sources):
        found.pop("backbone.projection", None)  # the run began with the source's projection
    return found | _sources(config) | {"batches": batches(config, processes)}


def forget_contents() -> None:
    """Clear the cached fingerprints, so that data and models are read again."""
    _contents_of.cache_clear()
    _weights_of.cache_clear()


@cache
@waiting("looking whether the data are the same")
def _contents_of(options: DataOptions, seed: int) -> dict[str, str]:
    # No scores are computed, so METEOR need not be installed.
    return _content([load_splits(replace(options, meteor=False, choose_by=None), seed)])


@cache
@waiting("looking whether the model is the same")
def _weights_of(options: BackboneOptions) -> dict[str, str]:
    return _weights(open_backbone(**options.loading()), folder_too=options.backbone is not None)


def _sources(config: RunConfig) -> dict[str, str]:
    """Return fingerprints of the adapters that a prompt is initialised from."""
    adapters = {path: Adapter.from_pretrained(path) for path in config.prompt.init_from}
    return {
        f"init_from {path}": exact_fingerprint(adapter.tensors, adapter.prompt)
        for path, adapter in adapters.items()
    }


def note_changes(folder: Path, trained: RunConfig, now: DataOptions) -> str:
    """Print and return how a split differs from what a run read of it; empty if it does not.

    The result is also empty if the run did not read the split, or does not say what it read.
    `now` are the options that the split is read with; `test_split` is its name.
    """
    path, split = folder / IDENTITY_FILE, now.splits()[-1]
    began = {options.task: options for options in options_together(trained)}.get(now.task)
    if began is None or began.own.data != now.own.data or not is_there(path):
        return ""
    began = replace(began, data_dir=now.data_dir, own=now.own)
    content: dict[str, str] = {}
    try:
        for part, task in parts_of(began, split, trained.train.seed):
            content |= _part(task, part)
    except (FileNotFoundError, ValueError) as error:  # what is left may not be divided as before
        _remark(folder, str(error))
    changed = "; ".join(_differences(check(read_json(path), Identity).content, content))
    if changed:
        place = now.own.data or data_folder(now.task, now.data_dir)
        say(f"note: {now.task} {split} of {place} has changed since {folder} read it ({changed})")
    return changed


def _keep(folder: Path, config: RunConfig, now: Identity, checkpoint: Path | None) -> None:
    """Store the new identity and configuration; nothing if DifferentError is raised, see `keep_identity`."""
    path = folder / IDENTITY_FILE
    then = check(read_json(path), Identity) if is_there(path) else None
    options = changed_options(folder, config)
    if then is None:
        if checkpoint is not None:
            say(f"note: {folder} has no {IDENTITY_FILE}: that its data are the same cannot be checked")
        then = _older(folder, now, checkpoint)
    content = _differences(then.content, now.content)
    setup = _differences(then.setup, now.setup)
    processes = [change for change in setup if change.startswith("processes=")]
    if checkpoint is not None and config.backbone.backbone_dropout:
        content += [f"{change} (dropout draws other numbers)" for change in processes]
    changed = options + content
    if changed and not config.accept_changes:
        raise DifferentError(
            f"{folder} was started with {_other(options, content)}; continue with its own, by "
            f"--config {folder / CONFIG_FILE}, with these by --accept_changes, or start a new run in another "
            "--output_dir"
        )
    if changed:
        say(f"accepted: {'; '.join(changed)}")
    if setup and checkpoint is not None:
        say(f"note: {'; '.join(setup)}: the result is the same to rounding, not to the bit")
    everything = differences(read_object(folder / CONFIG_FILE, dict), to_json(config), folder=folder)
    if everything:
        write_noted_json(folder / CONFIG_FILE, to_json(config), indent=2)
    changes = [*then.changes, *dict.fromkeys(everything + changed + setup)]
    write_noted_json(path, asdict(Identity(then.started_in, now.content, now.setup, changes)))


def _other(options: Sequence[str], content: Sequence[str]) -> str:
    kinds = (("options", options), ("contents", content))
    return " and ".join(f"other {kind} ({'; '.join(which)})" for kind, which in kinds if which)


def _older(folder: Path, now: Identity, checkpoint: Path | None) -> Identity:
    """Return an identity for a run of an older version: today's, with the run's own number of processes."""
    state = now.setup if checkpoint is None else read_json(checkpoint / "state.json")
    processes = str(state["processes"])
    started = read_config(folder / CONFIG_FILE)
    content = now.content | {"batches": batches(started, int(processes))}
    return Identity(now.started_in, content, now.setup | {"processes": processes})


def batches(config: RunConfig, processes: int) -> str:
    """Describe the examples of a step; equal for any number of processes with the same total batch size."""
    train = config.train
    sizes = [
        (data.task_batch_size or train.per_device_batch_size) * processes
        for data in (config.data, *config.also)
    ]
    parts = train.gradient_accumulation_steps
    if len(sizes) == 1 and not train.group_by_length:
        return f"{sizes[0] * parts} examples a step"
    # Each batch is of one task, or of texts of similar length.
    return f"{parts} batches a step of {' or '.join(map(str, sizes))} examples"


def _content(splits: Sequence[Splits]) -> dict[str, str]:
    found: dict[str, str] = {}
    for one in splits:
        found |= _part(one.train, "train") | _part(one.dev, "dev") | _part(one.test, "test")
    return found


def _part(task: Task, part: str) -> dict[str, str]:
    name, images = f"{task.name}.{part}", task.image_files() if task.image_count else []
    found = {name: f"{len(task)} rows {rows_content(task.rows)}"}
    if images:
        found[f"{name}.images"] = f"{len(images)} files, sizes {sizes_content(images)}"
    return found


def _weights(backbone: FrozenBackbone, *, folder_too: bool) -> dict[str, str]:
    tokenizer = hashlib.sha256(tokenizer_description(backbone.tokenizer).encode()).hexdigest()[:16]
    found = {f"backbone.{name} weights": digits for name, digits in backbone.fingerprint.items()}
    found["backbone.tokenizer"] = tokenizer
    if folder_too and backbone.visual_projection is not None:
        found["backbone.projection"] = fingerprint(backbone.visual_projection.state_dict().items())
    return found


def _setup(accelerator: Accelerator) -> dict[str, str]:
    device = accelerator.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {
        "processes": str(accelerator.num_processes),
        "threads": str(torch.get_num_threads()),
        "device": f"{device.type} ({name})",
        **{package: version(package) for package in PACKAGES},
    }


def _differences(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Return the entries of both that differ, as `name=old -> new`."""
    return [f"{name}={then[name]} -> {now[name]}" for name in then if name in now and then[name] != now[name]]
