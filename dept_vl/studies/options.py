"""Options of the studies. This module imports no model code."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from dept_vl._utils.errors import UnknownNameError, UsageError
from dept_vl._utils.options import Count, Options, Positive, Seed
from dept_vl.config import OWN_TASK, Own
from dept_vl.studies.compare_methods import compared
from dept_vl.tasks import TASKS
from dept_vl.tasks.own.options import OwnOptions

Start = Literal["scratch", "prompt", "all"]


def _files(*tasks: str, prefix: str = "") -> dict[str, str]:
    """Return the path of each task's shipped configuration."""
    return {task: f"data/configs/{prefix}{task}.json" for task in tasks}


SOURCES = _files("scenes-vqav2", "scenes-gqa", "scenes-nlvr2")
CONCEPTS = _files("relabelled", "many-or-few", prefix="concept-")
TARGETS = SOURCES | CONCEPTS
COMPARED_TASKS = _files("easy-vqa") | SOURCES | _files("scenes-coco") | CONCEPTS | _files("snippets")
"""Tasks of `compare`: real questions on rendered images; the four forms on scenes and questions that
pretraining left out; a new labelling and a new judgement; text."""


MAIN = (
    *("zero-shot", "pt", "dept", "adept", "adept + images", "adept + images, m = 0", "memory", "residual"),
    *("BitFit", "LoRA", "full fine-tuning", "dept + projection", "LoRA + projection"),
)
"""Methods that are compared by default."""


@dataclass(frozen=True)
class TransferConfig(Options):
    """Configuration of a few-shot transfer: sources, target, and numbers of shots."""

    source: tuple[str, ...]
    """Sources of the prompts: folders of runs or adapters, or names of tasks, which are trained first."""
    target: str = ""
    """Target task, learnt from a few examples. Default with --data: vqa."""
    preset: Literal["own", "paper"] = "own"
    """How shots are counted. own: k of each class, and as many others as a dev set; paper: as in DePT (Shi &
    Lipani 2024), k in total, spread over the classes, with the whole dev split."""
    k: tuple[Positive, ...] = (4, 16, 32)
    """Shots: numbers of examples of each class, or in total if answers are open."""
    seeds: Positive = 5
    """Number of runs of each kind, with random seeds 1, 2, ...; the seed also draws the shots."""
    starts: tuple[Start, ...] = ("scratch", "prompt", "all")
    """Initialisations: none, the source's P, its P and offset."""
    several: Literal["pick", "average"] = "pick"
    """With several sources, use the one with the lowest loss on the target's dev shots, or their average."""
    config: Path | None = None
    """Configuration of the target's runs. Default: that of the first source's run."""
    data_dir: Path | None = None
    """Folder with the target's files. Default: the configuration's, or data/TARGET."""
    source_config: tuple[Path, ...] = ()
    """Configurations of the sources that are names of tasks, in the same order. Default: the target's
    configuration with the task's own data."""
    max_steps: Count = 0
    """Steps of each run on the target; 0 uses the configuration's."""
    test_limit: Count = 0
    """Maximum number of test examples; 0 uses the configuration's."""
    output_dir: Path = Path("runs/transfer")
    """Folder of all runs. Finished runs are not repeated, stopped ones are resumed."""
    own: Own = field(default_factory=OwnOptions)

    def __post_init__(self) -> None:
        """Set the target to task vqa if own data are given and no target."""
        if self.own.data is not None and not self.target:
            object.__setattr__(self, "target", OWN_TASK)

    def check(self) -> None:
        """Check the options that can be checked before a run.

        Raises:
            UsageError: If a name is unknown or missing, or a list is empty.
        """
        if not self.target:
            raise UsageError("a target is missing: give --target TASK, or --data FILE")
        if self.target not in TASKS:
            raise UnknownNameError("target", self.target, TASKS)
        if self.seeds < 1 or not self.k or min(self.k) < 1 or not self.source or not self.starts:
            raise UsageError(
                "expected one source, one k, one seed and one start or more, and k of 1 or more; found "
                f"source={self.source}, k={self.k}, seeds={self.seeds}, starts={self.starts}"
            )


@dataclass(frozen=True)
class SuiteConfig(Options):
    """Configuration of all transfers between the shipped tasks."""

    targets: tuple[str, ...] = tuple(TARGETS)
    """Target tasks."""
    k: tuple[Positive, ...] = (4, 16)
    """Shots: numbers of examples of each class, or in total if answers are open."""
    seeds: Positive = 5
    """Number of runs of each kind, with random seeds 1, 2, ...; the seed also draws the shots."""
    source_steps: Positive = 300
    """Steps of each source's run."""
    max_steps: Count = 40
    """Steps of each run on a target."""
    batch_size: Positive = 8
    """Batch size."""
    test_limit: Count = 300
    """Maximum number of test examples; 0 uses all."""
    output_dir: Path = Path("runs/transfers")
    """Folder of all runs. Finished runs are not repeated, stopped ones are resumed."""
    smallest: bool = False
    """Test that everything runs: two steps, one shot and one seed on a handful of examples."""

    def check(self) -> None:
        """Check the names of the targets.

        Raises:
            UnknownNameError: If a target is unknown.
        """
        for target in self.targets:
            if target not in TARGETS:
                raise UnknownNameError("target", target, TARGETS)


@dataclass(frozen=True)
class CompareConfig(Options):
    """Configuration of a comparison of methods."""

    tasks: tuple[str, ...] = tuple(COMPARED_TASKS)
    """Names of tasks, or configuration files."""
    methods: tuple[str, ...] = MAIN
    """Names of methods."""
    seeds: tuple[Seed, ...] = (1, 2, 3, 4, 5)
    """Random seeds, with one run of each method per seed. Learning rates are searched with the first one."""
    max_steps: tuple[Positive, ...] = (60,)
    """Steps of every run. Several numbers make a comparison for each."""
    backbone: Path | None = None
    """Folder of a backbone to use instead of the tasks' own."""
    model: str | None = None
    """Hub name or folder of a pretrained model to use instead. Methods it does not support are left out."""
    batch_size: Positive = 8
    """Batch size."""
    dev_limit: Count = 150
    """Maximum number of dev examples, which decide between learning rates; 0 uses all."""
    test_limit: Count = 200
    """Maximum number of test examples, the same for all methods of a seed; 0 uses all."""
    rounds: Positive = 9
    """Number of steps of each method whose processor time is measured."""
    output_dir: Path = Path("runs/compare")
    """Folder of all runs. Finished runs are not repeated, stopped ones are resumed."""
    smallest: bool = False
    """Test that everything runs: two steps of one seed with the first learning rates, on a handful of
    examples."""
    own: Own = field(default_factory=OwnOptions)
    """Data to compare on instead, with the backbone and the options of the first of tasks."""

    def check(self) -> None:
        """Check the names of tasks and methods.

        Raises:
            UsageError: If a name is unknown, or both `backbone` and `model` are given.
        """
        if self.backbone is not None and self.model is not None:
            raise UsageError("--model is a whole model; leave out --backbone, or --model")
        for method in self.methods:
            if method not in compared():
                raise UnknownNameError("method", method, compared())
        for task in self.tasks:
            if task not in COMPARED_TASKS and not Path(task).is_file():
                raise UnknownNameError("task or configuration file", task, COMPARED_TASKS)
