"""Options of the studies. This module imports no model code."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from dept_vl._utils.errors import UnknownNameError, UsageError
from dept_vl._utils.options import Count, Options, Positive, check_distinct
from dept_vl.config import OWN_TASK, Own
from dept_vl.tasks import TASKS
from dept_vl.tasks.own.options import OwnOptions

Start = Literal["scratch", "prompt", "all"]


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
        """Raise UsageError if a name is unknown or missing, or a list is empty or repeats a value."""
        if not self.target:
            raise UsageError("a target is missing: give --target TASK, or --data FILE")
        if self.target not in TASKS:
            raise UnknownNameError("target", self.target, TASKS)
        self.own.check_used()
        if self.seeds < 1 or not self.k or min(self.k) < 1 or not self.source or not self.starts:
            raise UsageError(
                "expected one source, one k, one seed and one start or more, and k of 1 or more; found "
                f"source={self.source}, k={self.k}, seeds={self.seeds}, starts={self.starts}"
            )
        check_distinct(source=self.source, k=self.k, starts=self.starts)
