"""Options of the studies; this module imports no engine."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from dept_vl._utils.errors import UnknownNameError, UsageError
from dept_vl._utils.options import Count, Options, Positive, Seed
from dept_vl.config import OWN_TASK, Own
from dept_vl.studies.compare_methods import compared
from dept_vl.tasks import TASKS
from dept_vl.tasks.own.options import OwnOptions

Start = Literal["scratch", "prompt", "all"]


def _files(*tasks: str, prefix: str = "") -> dict[str, str]:
    """Return the shipped configuration of each task."""
    return {task: f"data/configs/{prefix}{task}.json" for task in tasks}


SOURCES = _files("scenes-vqav2", "scenes-gqa", "scenes-nlvr2")
CONCEPTS = _files("relabelled", "many-or-few", prefix="concept-")
TARGETS = SOURCES | CONCEPTS
COMPARED_TASKS = _files("easy-vqa") | SOURCES | _files("scenes-coco") | CONCEPTS | _files("snippets")
"""Real questions on rendered images; the four forms on scenes and questions that pretraining kept out; a new
labelling and a new judgement; text."""


MAIN = (
    *("zero-shot", "pt", "dept", "adept", "adept + images", "adept + images, m = 0", "memory", "residual"),
    *("BitFit", "LoRA", "full fine-tuning", "dept + projection", "LoRA + projection"),
)
"""Methods that are compared unless others are named."""


@dataclass(frozen=True)
class TransferConfig(Options):
    """From where, to where, with how much."""

    source: tuple[str, ...]
    """Where prompts come from: folders of runs or adapters, or names of tasks, which are trained first."""
    target: str = ""
    """Task to learn from a few examples; left out, that of --data."""
    preset: Literal["own", "paper"] = "own"
    """How shots are counted. own: of each class, with as many others to choose on; paper: as DePT has it
    (Shi & Lipani 2024): in all, spread over the classes, and the whole dev split to choose on."""
    k: tuple[Positive, ...] = (4, 16, 32)
    """Shots: examples of each class, or in all where answers are open."""
    seeds: Positive = 5
    """Runs of each kind, with the seeds from 1; a seed draws the shots too."""
    starts: tuple[Start, ...] = ("scratch", "prompt", "all")
    """From nothing, from the source's P, from its P and offset."""
    several: Literal["pick", "average"] = "pick"
    """Of several sources take the one with the least loss on the target's dev shots, or their mean."""
    config: Path | None = None
    """Configuration of the target's runs; left out, that of the first source's run."""
    data_dir: Path | None = None
    """Folder with the target's files; left out, the configuration's or data/TARGET."""
    source_config: tuple[Path, ...] = ()
    """Configurations of the sources that are names of tasks, in their order; left out, the target's with the
    task's own data."""
    max_steps: Count = 0
    """Steps of each run on the target; 0 takes the configuration's."""
    test_limit: Count = 0
    """At most so many test examples; 0 takes the configuration's."""
    output_dir: Path = Path("runs/transfer")
    """Folder of all runs; finished runs are not repeated, stopped ones resume."""
    own: Own = field(default_factory=OwnOptions)

    def __post_init__(self) -> None:
        """Data of your own are read by task vqa, unless another task is named."""
        if self.own.data is not None and not self.target:
            object.__setattr__(self, "target", OWN_TASK)

    def check(self) -> None:
        """Check what can be seen before anything is run.

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
    """How much of it, and where it is kept."""

    targets: tuple[str, ...] = tuple(TARGETS)
    """Names of tasks."""
    k: tuple[Positive, ...] = (4, 16)
    """Shots: examples of each class, or in all where answers are open."""
    seeds: Positive = 5
    """Runs of each kind, with the seeds from 1; a seed draws the shots too."""
    source_steps: Positive = 300
    """Steps of the sources."""
    max_steps: Count = 40
    """Steps of every run on a target."""
    batch_size: Positive = 8
    """Examples of a step."""
    test_limit: Count = 300
    """At most so many test examples; 0 takes all."""
    output_dir: Path = Path("runs/transfers")
    """Folder of all runs; finished runs are not repeated, stopped ones resume."""
    smallest: bool = False
    """Two steps, one shot and one seed on a handful of examples: to see that it runs."""

    def check(self) -> None:
        """Check the names of the targets.

        Raises:
            UnknownNameError: If one is unknown.
        """
        for target in self.targets:
            if target not in TARGETS:
                raise UnknownNameError("target", target, TARGETS)


@dataclass(frozen=True)
class CompareConfig(Options):
    """What is compared, and where it is kept."""

    tasks: tuple[str, ...] = tuple(COMPARED_TASKS)
    """Names of tasks, or configuration files."""
    methods: tuple[str, ...] = MAIN
    """Names of methods."""
    seeds: tuple[Seed, ...] = (1, 2, 3, 4, 5)
    """One run of each method per seed; with the first one all rates are tried."""
    max_steps: tuple[Positive, ...] = (60,)
    """Steps of every run; several for a comparison at each."""
    backbone: Path | None = None
    """Folder of another backbone than the tasks' own."""
    model: str | None = None
    """Hub name or folder of a pretrained model instead; methods that it cannot carry are left out."""
    batch_size: Positive = 8
    """Examples of a step."""
    dev_limit: Count = 150
    """At most so many dev examples, by which rates are chosen; 0 takes all."""
    test_limit: Count = 200
    """At most so many test examples, the same for all methods of a seed; 0 takes all."""
    rounds: Positive = 9
    """Steps of every method whose processor time is measured."""
    output_dir: Path = Path("runs/compare")
    """Folder of all runs; finished runs are not repeated, stopped ones resume."""
    smallest: bool = False
    """Two steps of one seed with the first rates, on a handful of examples: to see that it runs."""
    own: Own = field(default_factory=OwnOptions)
    """Compared on instead, with the backbone and the options of the first of tasks."""

    def check(self) -> None:
        """Check the names of tasks and methods.

        Raises:
            UnknownNameError: If one is unknown.
        """
        if self.backbone is not None and self.model is not None:
            raise UsageError("--model is a whole model; leave out --backbone, or --model")
        for method in self.methods:
            if method not in compared():
                raise UnknownNameError("method", method, compared())
        for task in self.tasks:
            if task not in COMPARED_TASKS and not Path(task).is_file():
                raise UnknownNameError("task or configuration file", task, COMPARED_TASKS)


@dataclass(frozen=True)
class BenchConfig(Options):
    """What is measured, and how often."""

    output_dir: Path
    """Folder for bench.json, bench.md and bench.png."""
    models: str = "small,base,large"
    """Of small, base and large, widths and depths of T5, and blip2, florence2 and qwen2.5-vl, pretrained
    models of widths that fit a CPU; tiny is for tests."""
    shapes: str = "vl,glue,mrqa"
    """Of vl (20 text and 49 visual tokens), glue (around 60 of text) and mrqa (around 300)."""
    methods: str = ""
    """Methods of a training step, such as pt100,dept40,dept40+compiled; left out, those that the bars and
    tables need."""
    rounds: Positive = 9
    """Rounds of every group; of the long ones (large, mrqa, answers) a third."""
    batch_size: Positive = 8
    """Examples of a step; half of them at large, a quarter of mrqa's, eight times as many to be answered."""
    dtype: Literal["auto", "bf16", "fp32"] = "auto"
    """Of the computation: auto is bfloat16 where the machine computes in it."""
    device: str = ""
    """Such as cpu or cuda; left out, a GPU if there is one."""
    backbone_dropout: bool = False
    """Dropout in the frozen backbone."""
    bars: bool = False
    """Say of each bar which ratio was measured and whether it is met."""
    tiny: bool = False
    """The smallest: a tiny model, one round of every method; the figures mean nothing."""


@dataclass(frozen=True)
class GpuCheckConfig(Options):
    """What is checked, and in how much time."""

    output_dir: Path
    """Folder for gpu_check.json, .md and .log; parts that are finished there are not repeated."""
    minutes: Annotated[float, Field(gt=0)] = 10.0
    """Minutes in all, shared among the parts."""
    dry_run: bool = False
    """The smallest sizes, on any device: to see that every part runs; the numbers mean nothing."""
    parts: tuple[str, ...] = ()
    """Parts to run; left out, all."""
    report_only: bool = False
    """Write gpu_check.md of the results that output_dir holds, and measure nothing."""
    part: str = ""
    """Measure this part in this process, in all the minutes; for the script itself."""
