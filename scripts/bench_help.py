"""Processor time of help and of errors in options, relative to importing the library for options (tyro).

    python scripts/bench_help.py

Each command runs in its own process in an empty folder. The commands take turns, starting with a different
one each round. Figures are the median of user and system time. The exit status is 1 if a command takes longer
than `--bar` allows.
"""

import os
import resource
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

from dept_vl._utils.options import Options, Positive, Rate
from dept_vl._utils.tables import markdown_table
from dept_vl.cli import COMMANDS, entry, parse_options

ROOT = Path(__file__).parents[1]
TYRO = 'python -c "import tyro"'
MISTAKES = {
    "train --prompt_lrr 1": 2,
    "train --task vqav": 2,
    "train --method dpt": 2,
    "trian": 2,
    "train --data_dir nowhere": 1,
    "train --config nowhere.json": 1,
    "evaluate --run nowhere": 1,
}
"""Commands with errors in their options, and their exit status."""


@dataclass(frozen=True)
class BenchConfig(Options):
    """Configuration of the benchmark."""

    rounds: Positive = 5
    """Number of rounds."""
    bar: Rate = 1.0
    """Seconds that a command may take longer than the import."""


def commands() -> dict[str, tuple[list[str], int]]:
    """Return the arguments and the exit status of each command, by what is typed."""
    package = [sys.executable, "-m", "dept_vl"]
    lines = {"--help": 0, **{f"{name} --help": 0 for name in COMMANDS}, **MISTAKES}
    script = str(ROOT / "scripts" / "train_vqa.py")
    return {
        TYRO: ([sys.executable, "-c", "import tyro"], 0),
        **{f"dept-vl {line}": ([*package, *line.split()], status) for line, status in lines.items()},
        "python scripts/train_vqa.py --help": ([sys.executable, script, "--help"], 0),
    }


def seconds_of(command: list[str], status: int, folder: str) -> float:
    """Return the processor time of a process.

    Raises:
        RuntimeError: If it ends with another status.
    """
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode != status:
        raise RuntimeError(f"{command} ended with {done.returncode} instead of {status}: {done.stderr}")
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main(config: BenchConfig) -> int:
    """Measure and print; return the exit status."""
    processes = commands()
    seconds: dict[str, list[float]] = {name: [] for name in processes}
    with TemporaryDirectory() as folder:
        for number in range(1 + config.rounds):  # the first compiles modules
            names = list(processes)
            first = number % len(names)
            for name in names[first:] + names[:first]:
                seconds[name].append(seconds_of(*processes[name], folder))
    found = {name: median(times[1:]) for name, times in seconds.items()}
    more = {name: time - found[TYRO] for name, time in found.items()}
    rows = [(f"`{name}`", f"{time:.2f}", f"{more[name]:+.2f}") for name, time in found.items()]
    print(markdown_table(["", "s of processor time", "more than tyro"], rows))
    slow = [name for name, time in more.items() if time > config.bar]
    print(f"\n{'NOT met' if slow else 'met'}: at most {config.bar} s more", *slow, sep="\n")
    return 1 if slow else 0


if __name__ == "__main__":
    entry(lambda arguments: main(parse_options(BenchConfig, arguments, "bench_help.py", __doc__)))
