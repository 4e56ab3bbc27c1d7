"""The public names of `dept_vl`, in one place. Everything else is internal and may change without notice.

Import them from the package itself (`import dept_vl; dept_vl.load(...)`); each is loaded when first used.

| name              | what it is                                                                    |
|-------------------|-------------------------------------------------------------------------------|
| `load`            | load an adapter on its backbone, ready to answer                              |
| `load_many`       | load several adapters on one backbone, a different one for every row          |
| `Predictor`       | what `load` returns: `answer(image, question)`                                |
| `train`           | train an adapter by a `RunConfig`                                             |
| `evaluate`        | answer and score a split with a run or an adapter                             |
| `RunConfig`       | every option of a run; its groups (`DataOptions`, ...) are in `dept_vl.config` |
| `Backbone`        | a frozen vision-language model                                                |
| `VisionLanguageModel` | a pretrained model (BLIP-2, Qwen2.5-VL, ...), frozen                     |
| `DePT`            | the trainable prompt                                                          |
| `build_prompt`    | make a prompt of any method for a backbone                                    |
| `PromptedModel`   | a prompt on a backbone, an `nn.Module`                                        |
| `Adapter`         | a trained prompt as a small file, or on the Hub                               |
| `attach`          | put a prompt on a ready-made model of transformers (BLIP-2, Florence-2, ...)  |
| `Attached`        | what `attach` returns                                                         |
| `load_task`       | read one split of a task                                                      |
| `register_task`   | add a task of your own                                                        |
| `register_method` | add a method of your own                                                      |
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from transformers import PreTrainedModel
from transformers.utils import logging

from dept_vl._utils.errors import UsageError
from dept_vl._utils.run_files import BEST, LAST, SUMMARY_FILE
from dept_vl.adapters.adapter import Adapter
from dept_vl.adapters.attach import new_prompt
from dept_vl.config import EvaluateConfig, OnBadImage, PromptOptions, RunConfig
from dept_vl.inference.loading import load, run_of
from dept_vl.inference.predictor import Predictor
from dept_vl.models.base import FrozenBackbone
from dept_vl.prompts.dept import DePT
from dept_vl.tasks.own.options import OwnOptions
from dept_vl.training import build
from dept_vl.training.run import run
from dept_vl.training.score_run import Evaluated, score_predictor, score_run

PromptInit = Literal["vocabulary", "text", "random"]


@dataclass(frozen=True)
class Trained:
    """What `train` returns.

    Attributes:
        folder: Folder of the run: adapter, predictions, log, report.
        scores: Scores on the test split, of several tasks each under its name; empty if the run was stopped
            or no answers are published.
        trainable: Trained parameters, by group and in total.
    """

    folder: Path
    scores: dict[str, float]
    trainable: dict[str, int]

    @property
    def finished(self) -> bool:
        """Whether the run came to its end; `train` with `resume="auto"` continues one that was stopped."""
        return (self.folder / SUMMARY_FILE).is_file()

    @cached_property
    def adapter(self) -> Adapter:
        """The best adapter, or the last one of a run that was stopped before it was evaluated."""
        return Adapter.load(self.folder / (BEST if (self.folder / BEST).is_dir() else LAST))


def train(config: RunConfig) -> Trained:
    """Train an adapter, score it on the test split, and write both to the folder of the run.

    Works in a script, in a notebook and under `accelerate launch`, any number of times in one process.
    Random generators, deterministic mode, signal handlers and accelerate's state are afterwards what they
    were before. Ctrl-C stops the run after the current step, with a checkpoint to resume from.

    Args:
        config: Options of the run.

    Raises:
        FileExistsError: If `config.output_dir` already holds a run, and `config.resume` is not given.
        FileNotFoundError: If data, images or models are missing.
        ValueError: If options are out of range or do not fit each other, the data or the backbone.

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
    if config.tune:
        raise UsageError(f"tune={config.tune} searches options over many runs; use the command with --tune")
    with _restored():
        result = run(config, more_to_come=True)
    return Trained(result.output_dir, result.scores, result.trainable)


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
    """Answer and score a split with a finished run, an adapter or a predictor.

    Args:
        source: What `train` returned, the folder of a run or an adapter, an adapter's name on the Hub, or
            what `load` returned.
        split: Split to score on; left out, the run's or the task's test split.
        task: Task to score on; left out, the run's first or the adapter's.
        data_dir: Folder with the task's files; left out, the run's or data/TASK.
        limit: At most so many examples; 0 takes all.
        batch_size: Examples decoded at a time.
        num_workers: Processes that read images; 0 reads them in this process.
        on_bad_image: Stop at an image that cannot be read, or skip it and count an empty answer.
        output_dir: Folder for predictions and scores, and for the file that a task's server takes; None
            writes nothing.
        data: Your own data instead: a file, a folder, or a data set's name on the Hub.
        **own: Of these: `images`, `columns` and the other fields of `OwnOptions`.

    Raises:
        FileExistsError: If `output_dir` already holds predictions.
        FileNotFoundError: If the adapter, the data or images are missing.
        ValueError: If options do not fit each other.

    Example:
        >>> import dept_vl
        >>> evaluated = dept_vl.evaluate("runs/vqa", split="val", limit=4)
        >>> score = evaluated.scores["overall"]
        >>> len(evaluated.predictions)
        4
    """
    place = source.folder if isinstance(source, Trained) else source
    folder = None if isinstance(place, Predictor) else run_of(Path(place))
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
    with _restored():
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
    init: PromptInit = "vocabulary",
    init_text: str = "",
    seed: int = 0,
) -> DePT:
    """Make a prompt for a backbone, with its initial vectors.

    Args:
        method: Name of the method: pt, dept, adept, hybrid, ulpt, lopt, residual, memory, or a registered
            one.
        backbone: Gives the width, and the embeddings to start from: a `Backbone`, a `VisionLanguageModel`, or
            for `attach` a ready-made model of transformers, which takes method dept with a rank of its own.
        prompt_length: Vectors of the prompt (m); methods of full length have `reference_prompt_length`.
        rank: Rank of the offset (r); None takes the largest that fits the budget.
        reference_prompt_length: Length of the plain prompt (l) whose parameters are the budget.
        max_source_length: Longest text in tokens (s).
        alpha: The offset is scaled by alpha / sqrt(rank).
        visual_offset: Shift visual tokens too (adept, hybrid).
        init: Start from embeddings of common tokens, of `init_text`, or from noise.
        init_text: Words to start from.
        seed: Seed of all that is drawn.

    Raises:
        ValueError: If there is no such method, a size is out of range, or the prompt has no parameters.

    Example:
        >>> import dept_vl
        >>> backbone = dept_vl.Backbone.from_pretrained("data/tiny-clip-t5")
        >>> prompt = dept_vl.build_prompt("dept", backbone, prompt_length=8, rank=2)
        >>> prompt.prompt_length
        8
        >>> model = dept_vl.PromptedModel(backbone, prompt)
    """
    if isinstance(backbone, PreTrainedModel):
        if method != "dept" or rank is None or init != "vocabulary":
            raise UsageError("a ready-made model takes method dept, a rank, and starts from its vocabulary")
        sizes = {"prompt_length": prompt_length, "rank": rank, "max_source_length": max_source_length}
        return new_prompt(backbone, **sizes, seed=seed)
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
    prompt = build.build_prompt(options, backbone, seed)
    if prompt is None:
        raise UsageError("prompt_length=0 and rank=0 leave nothing to train; give one of them a size")
    return prompt


@contextmanager
def _restored() -> Iterator[None]:
    """Restore what a run changes for the whole process."""
    drawn = random.getstate(), np.random.get_state()
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    cudnn = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    bars = logging.is_progress_bar_enabled()
    used, placed = bool(AcceleratorState._shared_state), bool(PartialState._shared_state)
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            yield
    finally:
        random.setstate(drawn[0])
        np.random.set_state(drawn[1])
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = cudnn
        if bars:
            logging.enable_progress_bar()
        # accelerate keeps the first run's precision for the life of the process. Of several processes the
        # state stays: their group is in it.
        if not used and PartialState._shared_state and PartialState().num_processes == 1:
            AcceleratorState._reset_state(reset_partial_state=not placed)
            GradientState._reset_state()
