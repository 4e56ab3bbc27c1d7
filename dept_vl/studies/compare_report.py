"""What a comparison shows: all methods on all tasks, what a step costs, and whether the bars are met."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

from dept_vl._utils.io import write_atomically
from dept_vl._utils.stats import Interval, interval
from dept_vl._utils.tables import markdown_table
from dept_vl.prompts.budget import METHODS
from dept_vl.studies.bench.costs import StepCost
from dept_vl.studies.bench.measure import Ratio
from dept_vl.training.report.plots import scatter_plot

MIB = 2**20
CIDER_SCALE = 10
"""CIDEr goes to 1000, other figures to 100; so divided it has as much weight in a mean over tasks."""
HEADER = ["method", "score", "trained", "rates", "CPU ms per step", "MiB of a step", "tokens"]


@dataclass(frozen=True)
class Row:
    """A method on a task.

    Attributes:
        task: Name.
        method: Name.
        figure: What the task's primary figure is called.
        score: That figure over the seeds.
        scores: Of each seed, in their order.
        rates: Chosen ones.
        tried: Dev figure of all rates that were tried, by their label.
        parameters: Trained.
        tokens: The encoder's, per example.
        cost: Of a training step; None if nothing is trained.
    """

    task: str
    method: str
    figure: str
    score: Interval
    scores: list[float]
    rates: dict[str, float]
    tried: dict[str, float]
    parameters: int
    tokens: float
    cost: StepCost | None


def report(
    settings: Mapping[str, Any],
    usual: Mapping[str, tuple[str, float] | None],
    rows: Sequence[Row],
    folder: Path,
) -> None:
    """Write and print the tables.

    Args:
        settings: What was compared.
        usual: The commonest answer of each task and its score.
        rows: Every method on every task.
        folder: For `comparison.json` and `.md`, and `.png` where matplotlib is installed.
    """
    parts = [overview(usual, rows), bars(rows), rates_table(rows), *task_tables(usual, rows)]
    text = "\n\n".join(filter(None, parts))
    content = {"config": settings, "majority": usual, "rows": [asdict(row) for row in rows]}
    write_atomically(folder / "comparison.json", (json.dumps(content, indent=1) + "\n").encode())
    write_atomically(folder / "comparison.md", (text + "\n").encode())
    draw(rows, folder / "comparison.png")
    print(f"\n{text}\n\nwritten to {folder / 'comparison.md'}", flush=True)


def overview(usual: Mapping[str, tuple[str, float] | None], rows: Sequence[Row]) -> str:
    """All methods on all tasks, their mean over the tasks, and what a step costs."""
    tasks, names = _distinct(row.task for row in rows), _distinct(row.method for row in rows)
    scores = {(row.task, row.method): str(row.score) for row in rows}
    known = [found[1] if (found := usual[task]) else None for task in tasks]
    lines: list[list[str]] = [
        ["majority answer", *("" if one is None else f"{one:.2f}" for one in known), "", "", "", ""]
    ]
    for name in names:
        mine = [row for row in rows if row.method == name]
        means = means_over_tasks(mine) if len(mine) == len(tasks) else []
        # A mean over other tasks could not be compared with those of the other rows.
        costed = mine if len(mine) == len(tasks) else []
        costs, seconds = [row.cost for row in costed if row.cost], step_seconds(costed)
        lines.append(
            [
                name,
                *(scores.get((task, name), "") for task in tasks),
                str(interval(means)) if means else "",
                f"{mine[0].parameters:,}",
                "" if seconds is None else f"{1000 * seconds:.0f}",
                f"{fmean(cost.bytes for cost in costs) / MIB:.0f}" if costs else "",
            ]
        )
    header = ["method", *tasks, "mean over tasks", "trained", "CPU ms per step", "MiB of a step"]
    return markdown_table(header, lines)


def step_seconds(rows: Sequence[Row]) -> float | None:
    """Processor time of a step, mean over tasks; None if nothing is trained."""
    costs = [median(row.cost.seconds) for row in rows if row.cost]
    return fmean(costs) if costs else None


def draw(rows: Sequence[Row], path: Path) -> bool:
    """The mean over the tasks against what a step costs, of methods that are on all of them."""
    count = len(_distinct(row.task for row in rows))
    points = {}
    for name in _distinct(row.method for row in rows):
        mine = [row for row in rows if row.method == name]
        seconds = step_seconds(mine)
        if seconds is not None and len(mine) == count:
            points[name] = (1000 * seconds, interval(means_over_tasks(mine)))
    return bool(points) and scatter_plot(points, path, x="CPU ms per step", y="mean over tasks")


def means_over_tasks(rows: Sequence[Row]) -> list[float]:
    """A method's mean over its tasks, for each seed; CIDEr counts a tenth."""
    scaled = [
        [score / CIDER_SCALE if row.figure == "CIDEr" else score for score in row.scores] for row in rows
    ]
    return [fmean(of_seed) for of_seed in zip(*scaled, strict=True)]


def bars(rows: Sequence[Row]) -> str:
    """What DePT has to reach, and whether it does; empty if it or plain prompt tuning is missing."""
    by_name = {
        name: [row for row in rows if row.method == name] for name in _distinct(r.method for r in rows)
    }
    if not {"dept", "pt"} <= by_name.keys():
        return ""
    means = {name: means_over_tasks(by_name[name]) for name in METHODS if name in by_name}
    ours, theirs = means["dept"], means["pt"]
    differences = interval([a - b for a, b in zip(ours, theirs, strict=True)])
    lines = [
        f"- DePT's mean over tasks >= PT's: {interval(ours)} against {interval(theirs)}, difference "
        f"{differences} over seeds: {_said(differences.mean >= 0)}."
    ]
    pairs = [
        (a.cost, b.cost)
        for a, b in zip(by_name["dept"], by_name["pt"], strict=True)
        if a.cost is not None and b.cost is not None
    ]
    if pairs:
        time = [Ratio.of(a.seconds, b.seconds).median for a, b in pairs]
        memory = [a.bytes / b.bytes for a, b in pairs]
        lines += [
            f"- {what} of a step, DePT over PT: {median(ratios):.2f} ({min(ratios):.2f} to "
            f"{max(ratios):.2f} over tasks): {_said(max(ratios) < 1)}."
            for what, ratios in (("Processor time", time), ("Memory", memory))
        ]
    others = {name: fmean(values) for name, values in means.items() if name not in ("dept", "pt")}
    if others:
        best = max(others, key=lambda name: others[name])
        better = [name for name, value in others.items() if value >= fmean(ours)]
        lines.append(
            f"- Some other member of the family >= DePT: {', '.join(better) or 'none'}; the best is {best} "
            f"with {interval(means[best])}: {_said(bool(better))}."
        )
    everywhere = {
        name: means_over_tasks(mine)
        for name, mine in by_name.items()
        if name != "dept" and len(mine) == len(by_name["dept"])
    }
    # Methods with fewer seeds have the first ones.
    differences_of = {
        name: interval([a - b for a, b in zip(values, ours, strict=False)])
        for name, values in everywhere.items()
    }
    said = ", ".join(f"{name} {difference}" for name, difference in differences_of.items())
    lines.append(f"- Difference to DePT, seed by seed: {said}.")
    return "\n".join(lines)


def _said(met: bool) -> str:
    return "met" if met else "not met"


def rates_table(rows: Sequence[Row]) -> str:
    """How far the dev figure of each setting of DePT's rates is below the task's best one."""
    tried = {row.task: row.tried for row in rows if row.method == "dept" and row.tried}
    if not tried:
        return ""
    labels = _distinct(label for figures in tried.values() for label in figures)
    lines = []
    for label in labels:
        below = [max(figures.values()) - figures[label] for figures in tried.values()]
        lines.append([label.replace(",", ", "), *(f"{one:.1f}" for one in below)])
    return (
        "DePT's dev figure below that of the best setting of its rates:\n\n"
        + markdown_table(["rates", *tried], lines)
    )  # fmt: skip


def task_tables(usual: Mapping[str, tuple[str, float] | None], rows: Sequence[Row]) -> list[str]:
    """A table for each task."""
    parts = []
    for task in _distinct(row.task for row in rows):
        of_task = [row for row in rows if row.task == task]
        found = usual[task]
        first = [[f"majority answer ({found[0]})", f"{found[1]:.2f}", "0", *[""] * 4]] if found else []
        table = markdown_table(HEADER, [*first, *map(_cells, of_task)])
        parts.append(f"### {task}: {of_task[0].figure}\n\n{table}")
    return parts


def _cells(row: Row) -> list[str]:
    return [
        row.method,
        str(row.score),
        f"{row.parameters:,}",
        " / ".join(f"{rate:g}" for rate in row.rates.values()),
        f"{1000 * median(row.cost.seconds):.0f}" if row.cost else "",
        f"{row.cost.bytes / MIB:.1f}" if row.cost else "",
        f"{row.tokens:.1f}",
    ]


def _distinct(values: Any) -> list[str]:
    return list(dict.fromkeys(values))
