"""The search of `--tune` against the published grid of learning rates: dev and test figures, and steps.

    python scripts/tune_against_grid.py

Both begin from the same split of the budget, and the search's first trial is the package's default rates,
a place of the grid. The dev split chooses in both. Finished runs are kept, so the same command continues
where it was stopped.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from dept_vl._utils.io import write_atomically
from dept_vl._utils.options import Count, Options, Positive, Seed
from dept_vl._utils.stats import interval
from dept_vl._utils.tables import markdown_table
from dept_vl.cli import entry, parse_options
from dept_vl.config import OptimOptions, RunConfig, read_config

if TYPE_CHECKING:
    from dept_vl.training.summary import RunResult


@dataclass(frozen=True)
class TuningConfig(Options):
    """What is searched, and for how long."""

    config: Path = Path("data/configs/scenes-gqa.json")
    """Configuration of the task, which has images."""
    trials: Positive = 20
    """Of the search."""
    seeds: tuple[Seed, ...] = (1, 2, 3, 4, 5)
    """One grid and one search for each."""
    max_steps: Positive = 160
    """Steps of a whole run."""
    batch_size: Positive = 8
    """Examples of a step."""
    dev_limit: Count = 150
    """At most so many dev examples; 0 takes all."""
    test_limit: Count = 500
    """At most so many test examples, the same for both; 0 takes all."""
    output_dir: Path = Path("runs/tuning")
    """Folder of all runs."""


def main(options: TuningConfig) -> str:
    """Run what is missing, then write and return the table."""
    import torch

    from dept_vl._utils.io import read_json
    from dept_vl.studies.search import GRID, grid, tune
    from dept_vl.training.log import best_dev

    torch.set_num_threads(1)  # as `compare` does
    base = prepared(options)
    found = []
    for seed in options.seeds:
        folder = options.output_dir / f"seed{seed}"
        seeded = replace(base, train=replace(base.train, seed=seed))
        gridded = grid(seeded, folder / "grid")
        best = max(gridded, key=lambda result: best_dev(result.output_dir))
        search = replace(seeded, tune=options.trials, output_dir=folder / "search", resume="auto")
        searched = tune(search)
        every = {result.output_dir.name: best_dev(result.output_dir) for result in gridded}
        taken = figures(searched) | {"steps": read_json(folder / "search" / "tuning.json")["steps"]}
        found.append({"seed": seed, "grid": figures(best), "tune": taken, "dev of the grid": every})
    table = side_by_side(options, found)
    content = {"grid_steps": len(GRID) * options.max_steps, "seeds": found}
    write_atomically(options.output_dir / "tuning.json", (json.dumps(content, indent=1) + "\n").encode())
    write_atomically(options.output_dir / "tuning.md", (table + "\n").encode())
    print(f"\n{table}\n\nruns: {options.output_dir}")
    return table


def prepared(options: TuningConfig) -> RunConfig:
    """Return the configuration of both, with visual features from files."""
    from dept_vl.training.extract import with_features

    base = read_config(options.config)
    steps, default = options.max_steps, OptimOptions()
    base = replace(
        base,
        data=replace(base.data, dev_limit=options.dev_limit, test_limit=options.test_limit, meteor=False),
        train=replace(
            base.train,
            max_steps=steps,
            eval_every=steps,
            checkpoint_every=0,
            per_device_batch_size=options.batch_size,
            eval_batch_size=64,
        ),
        optim=replace(
            base.optim,
            prompt_lr=default.prompt_lr,
            offset_lr=default.offset_lr,
            projection_lr=default.projection_lr,
            warmup_steps=steps // 10,
        ),
    )
    return with_features(base, options.output_dir / "features")


def figures(result: "RunResult") -> dict[str, Any]:
    """Name and figures of the run that was chosen."""
    from dept_vl.training.log import best_dev

    dev, test = best_dev(result.output_dir), next(iter(result.scores.values()))
    return {"run": result.output_dir.name, "dev": dev, "test": test}


def side_by_side(options: TuningConfig, found: list[Mapping[str, Any]]) -> str:
    """Compare both over the seeds, and their difference seed by seed."""
    from dept_vl.studies.search import GRID

    rows = []
    for name, key, count in (
        ("best of the published grid", "grid", len(GRID) * options.max_steps),
        (f"--tune {options.trials}", "tune", round(fmean(one["tune"]["steps"] for one in found))),
    ):
        dev, test = (interval([one[key][figure] for one in found]) for figure in ("dev", "test"))
        rows.append([name, str(dev), str(test), f"{count:,}"])
    gains = interval([one["tune"]["test"] - one["grid"]["test"] for one in found])
    table = markdown_table(["", "dev", "test", "steps"], rows)
    return f"{table}\n\nTest figure of the search above that of the grid, seed by seed: {gains}."


if __name__ == "__main__":
    entry(lambda arguments: main(parse_options(TuningConfig, arguments, "tune_against_grid.py", __doc__)))
