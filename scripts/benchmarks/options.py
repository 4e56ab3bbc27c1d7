"""Options of comparison, transfers between the shipped tasks, benchmark and GPU check; imports no models."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from benchmarks.compare_methods import compared
from dept_vl._utils.errors import UnknownNameError, UsageError
from dept_vl._utils.options import Count, Options, Positive, Seed, check_distinct
from dept_vl.config import Own
from dept_vl.tasks.own.options import OwnOptions

CLONE = Path(__file__).resolve().parents[2]


def shipped(name: str) -> Path:
    """Return the path of a file that ships with the clone, from any working directory."""
    return Path(name) if Path(name).exists() else CLONE / name


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
            UsageError: If a target or a k is named more than once.
        """
        for target in self.targets:
            if target not in TARGETS:
                raise UnknownNameError("target", target, TARGETS)
        check_distinct(targets=self.targets, k=self.k)


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
            UsageError: If a name is unknown, or options contradict each other.
        """
        if self.smallest and self.max_steps != type(self).max_steps:
            raise UsageError("--smallest trains for two steps; leave it out, or --max_steps")
        if self.backbone is not None and self.model is not None:
            raise UsageError("--model is a whole model; leave out --backbone, or --model")
        for method in self.methods:
            if method not in compared():
                raise UnknownNameError("method", method, compared())
        for task in self.tasks:
            if task not in COMPARED_TASKS and not Path(task).is_file():
                raise UnknownNameError("task or configuration file", task, COMPARED_TASKS)
        names = [Path(task).stem for task in self.tasks]  # of configurations, which name their results
        check_distinct(tasks=names, methods=self.methods, seeds=self.seeds, max_steps=self.max_steps)


@dataclass(frozen=True)
class BenchConfig(Options):
    """Configuration of the benchmark of training steps."""

    output_dir: Path
    """Folder for bench.json, bench.md and bench.png."""
    models: str = "small,base,large"
    """Comma-separated: small, base and large with T5's widths and depths; blip2, florence2 and qwen2.5-vl,
    pretrained models at widths that fit a CPU; tiny is for tests."""
    shapes: str = "vl,glue,mrqa"
    """Comma-separated: vl (20 text and 49 visual tokens), glue (about 60 of text), mrqa (about 300)."""
    methods: str = ""
    """Methods of a training step, such as pt100,dept40,dept40+compiled. Default: those that bars and tables
    need."""
    rounds: Positive = 9
    """Rounds of every group. The long ones (large, mrqa, answers) have a third of them."""
    batch_size: Positive = 8
    """Batch size of a step: half of it at large, a quarter with mrqa, and eight times as many for answers."""
    dtype: Literal["auto", "bf16", "fp32"] = "auto"
    """Data type of the computation; auto is bfloat16 if the machine supports it in hardware."""
    device: str = ""
    """Device, such as cpu or cuda. Default: a GPU if there is one."""
    backbone_dropout: bool = False
    """Use dropout in the frozen backbone."""
    bars: bool = False
    """Print for each bar the measured ratio and whether the bar is met."""
    tiny: bool = False
    """Test that everything runs: a tiny model, and one round of every method. The figures mean nothing."""


@dataclass(frozen=True)
class GpuCheckConfig(Options):
    """Configuration of the GPU check."""

    output_dir: Path
    """Folder for gpu_check.json, .md and .log. Parts that are finished there are not repeated."""
    minutes: Annotated[float, Field(gt=0)] = 10.0
    """Minutes in total, shared among the parts."""
    dry_run: bool = False
    """Test that every part runs, with the smallest sizes, on any device. The figures mean nothing."""
    parts: tuple[str, ...] = ()
    """Parts to run. Default: all."""
    report_only: bool = False
    """Measure nothing, and write gpu_check.md from the results in output_dir."""
    part: str = ""
    """Measure this part in this process, with all the minutes. The script itself uses this."""
