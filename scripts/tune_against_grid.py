"""The search of `--tune` against the published grid of learning rates: dev and test figures, and steps.

    python scripts/tune_against_grid.py --config data/configs/easy-vqa.json --output_dir runs/tuning

Finished runs are kept, so the same command goes on where it was stopped.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import tyro

from dept_vl.cli import read_config
from dept_vl.files import write_atomically
from dept_vl.log import best_dev
from dept_vl.report import markdown_table
from dept_vl.run import SUMMARY_FILE
from dept_vl.tune import GRID, cost, grid, tune


@dataclass(frozen=True)
class Options:
    """What is searched, and for how long."""

    config: Path = Path("data/configs/easy-vqa.json")
    """Configuration of the task."""
    trials: int = 20
    """Of the search."""
    max_steps: int = 0
    """Steps of a whole run; 0 takes the configuration's."""
    output_dir: Path = Path("runs/tuning")
    """Folder of all runs."""


def main(options: Options) -> str:
    """Run what is missing, then write and return the table."""
    base = read_config(options.config)
    steps = options.max_steps or base.train.max_steps
    base = replace(base, train=replace(base.train, max_steps=steps))
    tried = grid(base, options.output_dir / "grid")
    best = max(tried, key=lambda result: best_dev(result.output_dir))
    folder = options.output_dir / "search"
    found = tune(replace(base, tune=options.trials, output_dir=folder, resume="auto"))
    rows = []
    for name, result, count in (
        (f"best of the grid ({best.output_dir.name})", best, len(GRID) * steps),
        (f"--tune {options.trials}", found, cost(options.trials, steps)),
    ):
        dev, test = best_dev(result.output_dir), next(iter(result.scores.values()))
        rows.append((name, f"{dev:.2f}", f"{test:.2f}", f"{count:,}"))
    table = markdown_table(["", "dev", "test", "steps"], rows)
    write_atomically(options.output_dir / "tuning.md", (table + "\n").encode())
    print(f"\n{table}\n\nruns: {options.output_dir} ({SUMMARY_FILE} of each)")
    return table


if __name__ == "__main__":
    main(tyro.cli(Options, use_underscores=True))
