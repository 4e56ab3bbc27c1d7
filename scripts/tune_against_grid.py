"""Compare the search of `--tune` with the published grid of learning rates: dev and test scores, and steps.

    python scripts/tune_against_grid.py

Both use the same split of the budget. The first trial of the search uses the package's default learning
rates, which are in the grid. Both choose by the dev split. Finished runs are kept, so the same command
resumes.
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
    """Configuration of the comparison."""

    config: Path = Path("data/configs/scenes-gqa.json")
    """Configuration of the task, which must have images."""
    trials: Positive = 20
    """Number of trials of the search."""
    seeds: tuple[Seed, ...] = (1, 2, 3, 4, 5)
    """Random seeds, with one grid and one search for each."""
    max_steps: Positive = 160
    """Steps of every run."""
    batch_size: Positive = 8
    """Batch size."""
    dev_limit: Count = 150
    """Maximum number of dev examples; 0 uses all."""
    test_limit: Count = 500
    """Maximum number of test examples, the same for both; 0 uses all."""
    output_dir: Path = Path("runs/tuning")
    """Folder of all runs."""


def main(options: TuningConfig) -> str:
    """Run everything that is not finished, then write and return the table."""
    import torch

    from dept_vl._utils.io import read_json
    from dept_vl.studies.search import GRID, tune
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


def grid(config: RunConfig, folder: Path) -> "list[RunResult]":
    """Run the published grid with the configuration's own prompt length."""
    from dept_vl.studies.search import GRID
    from dept_vl.training.folder import existing
    from dept_vl.training.run import run_once

    return [
        run_once(
            replace(
                config,
                tune=0,
                optim=replace(config.optim, prompt_lr=prompt_lr, offset_lr=offset_lr),
                output_dir=existing(folder / f"prompt_lr={prompt_lr:g},offset_lr={offset_lr:g}"),
            )
        )
        for prompt_lr, offset_lr in GRID
    ]


def prepared(options: TuningConfig) -> RunConfig:
    """Return the configuration of both, and extract its visual features."""
    from benchmarks.features import with_features

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
    """Return name and scores of a run."""
    from dept_vl.training.log import best_dev

    dev, test = best_dev(result.output_dir), next(iter(result.scores.values()))
    return {"run": result.output_dir.name, "dev": dev, "test": test}


def side_by_side(options: TuningConfig, found: list[Mapping[str, Any]]) -> str:
    """Return a table of both over the seeds, and their difference paired by seed."""
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
