"""Methods side by side on easy-VQA with the small backbone, at an equal budget of prompt parameters.

    python scripts/compare.py

Every method trains for the same number of steps on the same examples in the same order, three
seeds each, and is chosen on the same dev split. Finished runs are kept under `--output_dir`, so a
stopped comparison goes on where it was.
"""

import json
import shutil
import statistics
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import tyro

from dept_vl.cli import read_config
from dept_vl.config import RunConfig
from dept_vl.report import markdown_table
from dept_vl.run import SUMMARY_FILE, run
from dept_vl.splits import load_splits

Summary = dict[str, Any]
"""The summary.json of a run."""


@dataclass(frozen=True)
class CompareConfig:
    """What is compared, and where it is kept."""

    base: Path = Path("data/configs/easy-vqa.json")
    """Configuration that every method starts from."""
    output_dir: Path = Path("runs/compare")
    """Folder of all runs; those finished are not repeated."""
    seeds: tuple[int, ...] = (1, 2, 3)
    """One run of each method per seed."""
    methods: tuple[str, ...] = ()
    """Names of methods to run; empty runs them all."""
    max_steps: int = 60
    """Steps of every method: few, so that the rows differ."""
    test_limit: int = 3000
    """At most so many test questions, the same for all methods of a seed; 0 takes all."""


def prompted(length: int, rank: int | None, projection: bool) -> Callable[[RunConfig], RunConfig]:
    """A prompt of this length and rank (None: the rank that the budget leaves)."""

    def configure(config: RunConfig) -> RunConfig:
        return replace(
            config,
            prompt=replace(config.prompt, prompt_length=length, rank=rank),
            backbone=replace(config.backbone, train_projection=projection),
        )

    return configure


def fine_tuned(config: RunConfig) -> RunConfig:
    """No prompt; the whole language model and the projection are trained: the ceiling."""
    bare = prompted(0, 0, projection=True)(config)
    return replace(bare, backbone=replace(bare.backbone, train_backbone=True))


def methods(base: RunConfig) -> dict[str, Callable[[RunConfig], RunConfig]]:
    """Name -> how the base configuration is changed."""
    long, short = base.prompt.reference_prompt_length, base.prompt.prompt_length
    return {
        "zero-shot": prompted(0, 0, projection=False),
        "projection only": prompted(0, 0, projection=True),
        f"PT (l={long})": prompted(long, 0, projection=False),
        f"DePT (m={short})": prompted(short, None, projection=False),
        f"PT (l={long}) + projection": prompted(long, 0, projection=True),
        f"DePT (m={short}) + projection": prompted(short, None, projection=True),
        "full fine-tuning": fine_tuned,
    }


def main(config: CompareConfig) -> str:
    """Run what is missing, then write and return the table."""
    base = read_config(config.base)
    base = replace(base, train=replace(base.train, max_steps=config.max_steps))
    base = replace(base, data=replace(base.data, test_limit=config.test_limit))
    chosen = {name: f for name, f in methods(base).items() if not config.methods or name in config.methods}
    if unknown := set(config.methods) - set(chosen):
        raise ValueError(f"unknown methods {sorted(unknown)}; there are: {', '.join(methods(base))}")
    summaries: dict[str, list[Summary]] = {name: [] for name in chosen}
    # Seeds outermost, so that methods take turns and a slow spell of the machine meets them all.
    for seed in config.seeds:
        for name, configure in chosen.items():
            folder = config.output_dir / f"seed{seed}" / name.replace(" ", "_")
            if not (folder / SUMMARY_FILE).is_file():
                shutil.rmtree(folder, ignore_errors=True)  # a run that was stopped half-way
                seeded = replace(base, train=replace(base.train, seed=seed), output_dir=folder)
                run(configure(seeded))
            summaries[name].append(json.loads((folder / SUMMARY_FILE).read_text()))
    table = markdown_table(HEADER, [majority_row(base), *(row(*item) for item in summaries.items())])
    ratio = time_ratio(summaries, base)
    report = table + (f"\n\n{ratio}" if ratio else "")
    (config.output_dir / "comparison.md").write_text(report + "\n")
    print(f"\n{report}\n\nwritten to {config.output_dir / 'comparison.md'}")
    return report


HEADER = ["method", "accuracy", "yes/no", "other", "trained parameters", "ms per step", "encoder tokens"]
"""Accuracies are official VQA accuracies, 0-100: mean and standard deviation over the seeds."""


def row(name: str, runs: list[Summary]) -> list[str]:
    """A line of the table."""
    figures = ("overall", "answer_type/yes/no", "answer_type/other")
    accuracies = [spread([run["scores"][figure] for run in runs]) for figure in figures]
    milliseconds = [1000 * run["train_seconds"] / run["steps"] for run in runs if run["steps"]]
    return [
        name,
        *accuracies,
        f"{runs[0]['trainable_parameters']['total']:,}",
        f"{statistics.median(milliseconds):.0f}" if milliseconds else "",
        f"{statistics.mean(run['tokens_per_example'] for run in runs):.1f}",
    ]


def spread(values: list[float]) -> str:
    """Mean and, from two values on, sample standard deviation."""
    deviation = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{deviation}"


def time_ratio(summaries: dict[str, list[Summary]], base: RunConfig) -> str:
    """DePT's time per step over PT's, seed by seed; empty if one of them was not run."""
    names = list(methods(base))
    lines = []
    for long, short in ((names[2], names[3]), (names[4], names[5])):
        if long in summaries and short in summaries:
            ratios = [
                (dept["train_seconds"] / dept["steps"]) / (pt["train_seconds"] / pt["steps"])
                for pt, dept in zip(summaries[long], summaries[short], strict=True)
            ]
            lines.append(
                f"Time per step, {short} over {long}: {statistics.median(ratios):.2f} "
                f"({min(ratios):.2f} to {max(ratios):.2f} over the seeds)."
            )
    return "\n".join(lines)


def majority_row(base: RunConfig) -> list[str]:
    """The commonest training answer, given to every question."""
    splits = load_splits(base.data, base.train.seed)
    counts = Counter(splits.train[index].answer for index in range(len(splits.train)))
    answer = counts.most_common(1)[0][0]
    scores = splits.test.score(dict.fromkeys(splits.test.example_ids(), answer))
    figures = ("overall", "answer_type/yes/no", "answer_type/other")
    return [f"majority answer ({answer})", *(f"{scores[figure]:.2f}" for figure in figures), "0", "", ""]


if __name__ == "__main__":
    main(tyro.cli(CompareConfig, use_underscores=True))
