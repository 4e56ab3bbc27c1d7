"""Transfer between the shipped tasks: how much a prompt trained on one helps with a few examples of another.

    OUTPUT/source-TASK/       DePT trained on all examples of a task
    OUTPUT/TARGET/            transfer to one target (see `transfer.py`) from the sources of other tasks
    OUTPUT/features/TASK/     visual features, encoded once
    OUTPUT/transfer.json, .md, and .png if matplotlib is installed

Only prompts are trained, not the visual projection. All initialisations for a target have the same examples,
steps and learning rates. Among the sources, except the target itself, the one with the lowest loss on the
target's dev shots is used.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from benchmarks.features import with_features
from benchmarks.options import SOURCES, TARGETS, SuiteConfig, shipped
from dept_vl._utils.io import read_json, write_atomically, write_json
from dept_vl._utils.printable import say
from dept_vl._utils.stats import Interval, interval
from dept_vl._utils.tables import markdown_table
from dept_vl.config import RunConfig, read_config, to_json
from dept_vl.studies.options import Start, TransferConfig
from dept_vl.studies.transfer import NAMES, transfer
from dept_vl.training.identity import forget_contents
from dept_vl.training.report.plots import score_plot
from dept_vl.training.run import run_once

INHERITED: tuple[Start, ...] = ("prompt", "all")


def transfer_suite(config: SuiteConfig) -> None:
    """Run all transfers that are not finished, and write the table.

    Raises:
        DifferentError: If a finished run has other options, data, models or sources.
        FileNotFoundError: If data are missing.
        SystemExit: If a signal stopped a run.
        ValueError: If a target is unknown.
    """
    config.check()
    forget_contents()
    torch.set_num_threads(1)  # as `compare` does
    if config.smallest:
        config = replace(config, k=(1,), seeds=1, source_steps=2, max_steps=2, test_limit=8)
    for name in SOURCES:
        run_once(_config(config, name, config.source_steps))
    for name in config.targets:
        transfer(_to(config, name), more_to_come=True)
    # The transfers above have written these files.
    cells = {name: read_json(config.output_dir / name / "transfer.json")["cells"] for name in config.targets}
    text = table(cells) + "\n\n" + wins(cells, config.k)
    write_json(config.output_dir / "transfer.json", cells)
    write_atomically(config.output_dir / "transfer.md", (text + "\n").encode())
    draw(cells, config.k, config.output_dir / "transfer.png")
    say("", *text.split("\n"), "", f"written to {config.output_dir / 'transfer.md'}")


def _config(config: SuiteConfig, name: str, steps: int) -> RunConfig:
    """Return the configuration of a run on a task: only the prompt is trained, on stored features."""
    base = read_config(shipped(TARGETS[name]))
    base = replace(
        base,
        data=replace(base.data, test_limit=config.test_limit),
        backbone=replace(base.backbone, train_projection=False),
        train=replace(
            base.train,
            max_steps=steps,
            eval_every=max(1, steps // 2),
            checkpoint_every=0,
            per_device_batch_size=config.batch_size,
            eval_batch_size=64,
        ),
        optim=replace(base.optim, warmup_steps=steps // 10),
        output_dir=config.output_dir / f"source-{name}",
    )
    if config.smallest:
        return replace(base, data=replace(base.data, dev_limit=8, features="live"))
    return with_features(base, config.output_dir / "features" / name)


def _to(config: SuiteConfig, name: str) -> TransferConfig:
    """Return the configuration of a transfer to a target, and write that of its runs to a file."""
    folder = config.output_dir / name
    base = replace(_config(config, name, config.max_steps), output_dir=None)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "target.json", to_json(base), indent=2)
    return TransferConfig(
        source=tuple(str(config.output_dir / f"source-{other}") for other in SOURCES if other != name),
        target=base.data.task,
        k=config.k,
        seeds=config.seeds,
        config=folder / "target.json",
        output_dir=folder,
    )


Cells = Sequence[dict[str, Any]]
"""Cells of `transfer.json`: k, start and the scores of the seeds."""


def _scores(cells: Cells, k: int, start: Start) -> list[float]:
    return next(cell["scores"] for cell in cells if (cell["k"], cell["start"]) == (k, start))


def gain(cells: Cells, k: int, start: Start) -> Interval:
    """Return the difference between an initialisation and none, paired by seed."""
    pairs = zip(_scores(cells, k, start), _scores(cells, k, "scratch"), strict=True)
    return interval([ours - scratch for ours, scratch in pairs])


def table(found: Mapping[str, Cells]) -> str:
    """Return a table of every target, k and start."""
    rows = []
    for name, cells in found.items():
        for k in dict.fromkeys(cell["k"] for cell in cells):
            scores = [interval(_scores(cells, k, start)) for start in NAMES]
            gains = [gain(cells, k, start) for start in INHERITED]
            rows.append([name, k, *map(str, scores), *map(str, gains)])
    header = ["target", "k", *NAMES.values(), "P - scratch", "P and offset - scratch"]
    return markdown_table(header, rows)


def wins(found: Mapping[str, Cells], shots: Sequence[int]) -> str:
    """Describe for each k on how many targets a trained initialisation is better than none."""
    lines = []
    for k, start in product(shots, INHERITED):
        gains = {name: gain(cells, k, start) for name, cells in found.items()}
        better = [name for name, one in gains.items() if one.mean > 0]
        widths = {name: gains[name].half_width for name in better}
        sure = [name for name, width in widths.items() if width is not None and gains[name].mean > width]
        lines.append(
            f"- k={k}, {NAMES[start]}: better than from scratch on {len(better)} of {len(found)} targets "
            f"({', '.join(better) or 'none'}), on {len(sure)} by more than the 95% interval."
        )
    return "\n".join(lines)


def draw(found: Mapping[str, Cells], shots: Sequence[int], path: Path) -> bool:
    """Plot the mean over targets of each start by k, with intervals over seeds."""
    lines: dict[str, dict[int, Interval]] = {}
    for start, name in NAMES.items():
        lines[name] = {}
        for k in shots:
            by_target = [_scores(cells, k, start) for cells in found.values()]
            lines[name][k] = interval([fmean(of_seed) for of_seed in zip(*by_target, strict=True)])
    return score_plot(lines, path, x="shots (k)", y=f"mean over {len(found)} targets")
