"""The public API of `dept_vl`. Everything else is internal and may change without notice.

Import these names from the package itself (`import dept_vl; dept_vl.load(...)`).

| name                  | purpose                                                                         |
|-----------------------|---------------------------------------------------------------------------------|
| `load`                | load an adapter and its backbone; returns a `Predictor`                         |
| `load_many`           | load several adapters on one backbone; each row of a batch may use another one  |
| `Predictor`           | a loaded adapter; `answer(image, question)` answers questions                   |
| `train`               | train an adapter, as configured by a `RunConfig`                                |
| `evaluate`            | score a run, an adapter or a `Predictor` on a split                             |
| `RunConfig`           | all options of a run; its groups (`DataOptions`, ...) are in `dept_vl.config`   |
| `Backbone`            | a frozen language model, usually with a vision tower and a projection           |
| `VisionLanguageModel` | a frozen pretrained vision-language model (BLIP-2, Qwen2.5-VL, ...)             |
| `DePT`                | the trainable prompt: a soft prompt and a low-rank offset of the embeddings     |
| `build_prompt`        | build a prompt of any method for a backbone                                     |
| `PromptedModel`       | an `nn.Module` that runs a backbone with a prompt                               |
| `Adapter`             | a trained prompt, saved to and loaded from a folder or the Hub                  |
| `attach`              | add a prompt to a loaded model of transformers (BLIP-2, Florence-2, ...)        |
| `Attached`            | the handle that `attach` returns; it can save and remove the prompt             |
| `load_task`           | read one split of a task                                                        |
| `register_task`       | add a task of your own                                                          |
| `register_method`     | add a method of your own                                                        |
"""

import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from transformers import PreTrainedModel
from transformers.utils import logging

from dept_vl._utils.errors import UsageError
from dept_vl._utils.run_files import BEST, LAST, SUMMARY_FILE
from dept_vl._utils.terminal import waiting
from dept_vl.adapters.adapter import Adapter
from dept_vl.adapters.attach import new_prompt
from dept_vl.adapters.hub import as_path
from dept_vl.config import EvaluateConfig, OnBadImage, PromptOptions, RunConfig, validate
from dept_vl.inference.loading import load, run_of
from dept_vl.inference.predictor import Predictor
from dept_vl.models.base import FrozenBackbone
from dept_vl.prompts.base import Init
from dept_vl.prompts.dept import DePT
from dept_vl.tasks.own.options import OwnOptions
from dept_vl.training import build
from dept_vl.training.run import run
from dept_vl.training.score_run import Evaluated, score_predictor, score_run

RUNNING = threading.RLock()
"""Lock of `train` and `evaluate`: all threads share the random generators and accelerate's state."""


@dataclass(frozen=True)
class Trained:
    """Result of `train`.

    Attributes:
        folder: Folder of the run, with the adapter, predictions, log and report.
        scores: Test scores by metric (`task/metric` if the run has several tasks). Empty if the run was
            stopped or the answers of the test split are not published.
        trainable: Number of trained parameters by parameter group, and their total.
    """

    folder: Path
    scores: dict[str, float]
    trainable: dict[str, int]

    @property
    def finished(self) -> bool:
        """Whether the run was completed. To continue a stopped run, call `train` with `resume="auto"`."""
        return (self.folder / SUMMARY_FILE).is_file()

    @cached_property
    def adapter(self) -> Adapter:
        """The best adapter; if the run was stopped before its first evaluation, the last one."""
        return Adapter.load(self.folder / (BEST if (self.folder / BEST).is_dir() else LAST))


def train(config: RunConfig) -> Trained:
    """Train an adapter, score it on the test split, and save adapter and scores in the folder of the run.

    This works in scripts, in notebooks and under `accelerate launch`, and can be called repeatedly in one
    process. Of several threads, one trains or evaluates at a time, and the others wait. Another thread that
    draws random numbers of torch meanwhile, as `load` does, changes the run. It restores random generators,
    deterministic mode, signal handlers and, with a single process, accelerate's state.
    Ctrl-C stops the run after the current step and writes a checkpoint to resume from.

    Args:
        config: Options of the run.

    Raises:
        FileExistsError: If `config.output_dir` already holds a run and `config.resume` is not set.
        FileNotFoundError: If data, images or models are missing.
        ValueError: If an option is out of range or incompatible with other options, the data or the backbone.

    Example:
        >>> from pathlib import Path
        >>> import dept_vl
        >>> from dept_vl.config import BackboneOptions, DataOptions, PromptOptions, TrainOptions
        >>> config = dept_vl.RunConfig(
        ...     data=DataOptions(task="vqav2", data_dir=Path("data/vqav2"), dev_split="val"),
        ...     backbone=BackboneOptions(backbone=Path("data/tiny-clip-t5")),
        ...     prompt=PromptOptions(prompt_length=8),
        ...     train=TrainOptions(max_steps=2, per_device_batch_size=4),
        ...     output_dir=Path("runs/trained"),
        ... )
        >>> trained = dept_vl.train(config)
        >>> score = trained.scores["overall"]
        >>> answer = dept_vl.load(trained.folder).answer("street.jpg", "what colour is the car?")
    """
    with _alone(), _restored():
        result = run(config, more_to_come=True)
    return Trained(result.output_dir.absolute(), result.scores, result.trainable)


def evaluate(
    source: Trained | Predictor | str | Path,
    *,
    split: str = "",
    task: str = "",
    data_dir: str | Path | None = None,
    limit: int = 0,
    batch_size: int = 128,
    num_workers: int = 0,
    on_bad_image: OnBadImage = "raise",
    output_dir: str | Path | None = None,
    data: str | Path | None = None,
    **own: Any,
) -> Evaluated:
    """Score a run, an adapter or a predictor on a split.

    Args:
        source: Result of `train`, folder of a run or an adapter, name of an adapter on the Hub, or a
            `Predictor`.
        split: Split to score on. Defaults to the test split of the run or the task.
        task: Task to score on. Defaults to the first task of the run, or the task of the adapter.
        data_dir: Folder with the task's files. Defaults to the run's data folder, or `data/TASK`.
        limit: Maximum number of examples, drawn at random; 0 scores all.
        batch_size: Batch size per process.
        num_workers: Number of processes that read images; 0 reads them in the main process.
        on_bad_image: "raise" stops at an image that cannot be read; "skip" predicts an empty answer for it.
        output_dir: Folder to save predictions and scores in. For a run this includes the submission file
            of a split whose answers are not published. None saves nothing.
        data: Your own data to score on: a file, a folder, or the name of a data set on the Hub.
        **own: Further options for `data`, see `OwnOptions` (`images`, `columns`, ...).

    Raises:
        FileExistsError: If `output_dir` already holds predictions.
        FileNotFoundError: If the adapter, the data or images are missing.
        UsageError: If an option is unknown or out of range.
        ValueError: If options are incompatible with each other.

    Example:
        >>> import dept_vl
        >>> evaluated = dept_vl.evaluate("runs/vqa", split="val", limit=4)
        >>> score = evaluated.scores["overall"]
        >>> len(evaluated.predictions)
        4
    """
    OwnOptions.check_names(own, evaluate)
    place = source.folder if isinstance(source, Trained) else source
    folder = None if isinstance(place, Predictor) else run_of(as_path(place))
    config = EvaluateConfig(
        run=folder or Path(),
        adapter=None if isinstance(place, Predictor) or Path(place) == folder else Path(place),
        task=task,
        data_dir=None if data_dir is None else Path(data_dir),
        split=split,
        limit=limit,
        batch_size=batch_size,
        num_workers=num_workers,
        on_bad_image=on_bad_image,
        output_dir=None if output_dir is None else Path(output_dir),
        own=OwnOptions.of(data=data, **own),
    )
    validate(config)
    with _alone(), _restored():
        if folder is not None:
            return score_run(config, write=output_dir is not None)
        PartialState(cpu=not torch.accelerator.is_available())  # gives each process its device
        predictor = place if isinstance(place, Predictor) else load(place, task=task or None)
        if task and task != predictor.task.name:
            raise UsageError(f"this predictor answers {predictor.task.name}, not {task!r}: load another")
        return score_predictor(predictor, config)


def build_prompt(
    method: str,
    backbone: FrozenBackbone | PreTrainedModel,
    *,
    prompt_length: int = 40,
    rank: int | None = None,
    reference_prompt_length: int = 100,
    max_source_length: int = 20,
    alpha: float = 8.0,
    visual_offset: bool = False,
    init: Init = "vocabulary",
    init_text: str = "",
    seed: int = 0,
) -> DePT:
    """Build an initialised prompt for a backbone.

    Args:
        method: Prompt tuning method: pt, dept, adept, hybrid, ulpt, lopt, residual, memory, or the name of
            a registered one.
        backbone: Model that the prompt is for: a `Backbone`, a `VisionLanguageModel`, or a loaded model of
            transformers for `attach`. The latter requires `method="dept"`, a `rank`, and the defaults of
            `init`, `init_text` and `visual_offset`.
        prompt_length: Number of vectors of the soft prompt (m). Methods whose prompt has the full length
            use `reference_prompt_length` instead.
        rank: Rank of the low-rank offset (r). None uses the largest rank within the parameter budget.
        reference_prompt_length: Length (l) of the plain soft prompt whose parameter count is the budget.
        max_source_length: Maximum length of a text in tokens (s).
        alpha: Scale of the offset, which is multiplied by alpha / sqrt(rank).
        visual_offset: Whether to add an offset to visual tokens too (adept and hybrid only).
        init: Initial prompt vectors: embeddings of common tokens ("vocabulary"), embeddings of `init_text`
            ("text"), or random numbers ("random").
        init_text: Text whose embeddings initialise the prompt.
        seed: Random seed.

    Raises:
        ValueError: If the method is unknown, a size is out of range, or the prompt would have no parameters.

    Example:
        >>> import dept_vl
        >>> backbone = dept_vl.Backbone.from_pretrained("data/tiny-clip-t5")
        >>> prompt = dept_vl.build_prompt("dept", backbone, prompt_length=8, rank=2)
        >>> prompt.prompt_length
        8
        >>> model = dept_vl.PromptedModel(backbone, prompt)
    """
    if isinstance(backbone, PreTrainedModel):
        if method != "dept" or rank is None or visual_offset or (init, init_text) != ("vocabulary", ""):
            raise UsageError(
                "a ready-made model takes method dept, a rank and no visual_offset, and starts from its "
                "vocabulary"
            )
        return new_prompt(
            backbone,
            prompt_length=prompt_length,
            rank=rank,
            max_source_length=max_source_length,
            alpha=alpha,
            seed=seed,
        )
    options = PromptOptions(
        method=method,
        prompt_length=prompt_length,
        rank=rank,
        reference_prompt_length=reference_prompt_length,
        max_source_length=max_source_length,
        alpha=alpha,
        visual_offset=visual_offset,
        prompt_init=init,
        init_text=init_text,
    )
    validate(options)
    prompt = build.build_prompt(options, backbone, seed)
    if prompt is None:
        raise UsageError("prompt_length=0 and rank=0 leave nothing to train; give one of them a size")
    return prompt


@contextmanager
def _alone() -> Iterator[None]:
    """Wait until no other thread trains or evaluates, and keep others from it."""
    if not RUNNING.acquire(blocking=False):
        with waiting("waiting for another thread that trains or evaluates"):
            RUNNING.acquire()
    try:
        yield
    finally:
        RUNNING.release()


@contextmanager
def _restored() -> Iterator[None]:
    """Train in the usual gradient mode and precision, and restore the state that a run changes.

    Restored are random generators, deterministic mode and accelerate's state.
    """
    drawn = random.getstate(), np.random.get_state()
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    cudnn = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    bars = logging.is_progress_bar_enabled()
    used, placed = bool(AcceleratorState._shared_state), bool(PartialState._shared_state)
    device = getattr(torch.accelerator.current_accelerator(), "type", "cpu")
    try:
        with (
            torch.random.fork_rng(devices=range(torch.cuda.device_count())),
            torch.inference_mode(mode=False),
            torch.enable_grad(),
            torch.autocast("cpu", enabled=False),
            torch.autocast(device, enabled=False),
        ):
            yield
    finally:
        random.setstate(drawn[0])
        np.random.set_state(drawn[1])
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = cudnn
        if bars:
            logging.enable_progress_bar()
        # accelerate would keep the first run's precision for the life of the process. With several processes
        # its state is kept, because it holds their process group.
        if not used and PartialState._shared_state and PartialState().num_processes == 1:
            AcceleratorState._reset_state(reset_partial_state=not placed)
            GradientState._reset_state()
