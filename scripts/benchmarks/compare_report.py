"""Tables and plots of a comparison: scores, cost of a step, and whether the bars are met."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import chain
from pathlib import Path
from statistics import fmean, median
from typing import Any

from benchmarks.costs import StepCost
from benchmarks.measure import Ratio
from benchmarks.plots import curve_plot, point_plot
from dept_vl._utils.io import read_json, write_atomically
from dept_vl._utils.printable import say
from dept_vl._utils.stats import Interval, interval
from dept_vl._utils.tables import markdown_table
from dept_vl.prompts.base import METHODS

RIVALS = ("LoRA", "pt")
"""Methods to compare all others with."""
MET = {True: "met", False: "not met"}
CIDER_SCALE = 10
"""CIDEr is divided by this, so that it has the weight of other scores in a mean over tasks (1000 to 100)."""
HEADER = ["method", "score", "trained", "rates", "CPU ms per step", "MiB of a step", "tokens"]


@dataclass(frozen=True)
class Row:
    """Results of a method on a task.

    Attributes:
        task: Name of the task.
        method: Name of the method.
        figure: Name of the task's primary score.
        score: Mean and interval of that score over the seeds.
        scores: Score of each seed, in the order of the seeds.
        rates: Chosen learning rates.
        tried: Dev score of all learning rates that were tried, by label.
        parameters: Number of trainable parameters.
        tokens: Encoder tokens per example.
        cost: Cost of a training step; None if nothing is trained.
        curve: Dev scores of the seeds, by step.
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
    curve: dict[int, list[float]] = field(default_factory=dict)


def report(
    settings: Mapping[str, Any],
    usual: Mapping[str, tuple[str, float] | None],
    rows: Sequence[Row],
    folder: Path,
    notes: Sequence[str] = (),
) -> None:
    """Write and print the tables.

    Writes `comparison.json` and `.md` and, if matplotlib is installed, `comparison.png` and `curves.png`.
    `usual` holds the most frequent answer of each task with its score. `notes` say why methods are left out.
    """
    relative = (against(name, rows) for name in RIVALS)
    parts = [
        overview(usual, rows),
        *relative,
        bars(rows),
        rates_table(rows),
        *task_tables(usual, rows),
        *notes,
    ]
    text = "\n\n".join(filter(None, parts))
    content = {"config": settings, "majority": usual, "rows": [asdict(row) for row in rows]}
    write_atomically(folder / "comparison.json", (json.dumps(content, indent=1) + "\n").encode())
    write_atomically(folder / "comparison.md", (text + "\n").encode())
    draw(rows, folder / "comparison.png")
    draw_curves(rows, folder / "curves.png")
    say("", *text.split("\n"), "", f"written to {folder / 'comparison.md'}")


def by_method(rows: Sequence[Row], *, everywhere: bool = False) -> dict[str, list[Row]]:
    """Return the rows of each method; with `everywhere` only methods that have all tasks.

    Means over different tasks cannot be compared.
    """
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row.method, []).append(row)
    count = len({row.task for row in rows}) if everywhere else 0
    return {name: mine for name, mine in found.items() if len(mine) >= count}


def overview(usual: Mapping[str, tuple[str, float] | None], rows: Sequence[Row]) -> str:
    """Return a table of all methods on all tasks, with their mean over tasks and the cost of a step."""
    tasks = list(dict.fromkeys(row.task for row in rows))
    scores = {(row.task, row.method): str(row.score) for row in rows}
    known = (usual[task] for task in tasks)
    lines = [["majority answer", *(f"{found[1]:.2f}" if found else "" for found in known), *[""] * 4]]
    whole = by_method(rows, everywhere=True)
    for name, mine in by_method(rows).items():
        mean, cost = "", None
        if name in whole:
            mean, cost = str(interval(means_over_tasks(mine))), mean_cost(mine)
        lines.append(
            [
                name,
                *(scores.get((task, name), "") for task in tasks),
                mean,
                f"{mine[0].parameters:,}",
                *((f"{one:.0f}" for one in cost) if cost else ("", "")),
            ]
        )
    header = ["method", *tasks, "mean over tasks", "trained", "CPU ms per step", "MiB of a step"]
    return markdown_table(header, lines)


def against(rival: str, rows: Sequence[Row]) -> str:
    """Compare every method with one, paired by seed: score, time and memory; empty if it is missing."""
    whole = by_method(rows, everywhere=True)
    if rival not in whole:
        return ""
    theirs, of_rival = means_over_tasks(whole[rival]), mean_cost(whole[rival])
    lines = []
    for name, mine in whole.items():
        if name == rival:
            continue
        gain = interval([a - b for a, b in zip(means_over_tasks(mine), theirs, strict=True)])
        cost, ratios = mean_cost(mine), ["", ""]
        if cost and of_rival:
            ratios = [f"{a / b:.2f}" for a, b in zip(cost, of_rival, strict=True)]
        lines.append([name, f"{gain:+}", *ratios])
    return f"Relative to {rival}:\n\n{markdown_table(['method', 'score', 'time', 'memory'], lines)}"


def mean_cost(mine: Sequence[Row]) -> tuple[float, float] | None:
    """Return milliseconds and MiB of a method's step, averaged over tasks; None if nothing is trained."""
    costs = [row.cost for row in mine if row.cost]
    return (fmean(cost.milliseconds for cost in costs), fmean(cost.mib for cost in costs)) if costs else None


def draw(rows: Sequence[Row], path: Path) -> bool:
    """Plot the mean over tasks against the time of a step, for methods that have all tasks."""
    points = {
        name: (cost[0], interval(means_over_tasks(mine)))
        for name, mine in by_method(rows, everywhere=True).items()
        if (cost := mean_cost(mine))
    }
    return bool(points) and point_plot(points, path, x="CPU ms per step", y="mean over tasks")


def draw_curves(rows: Sequence[Row], path: Path) -> bool:
    """Plot the mean dev score over tasks, by steps and by processor time."""
    steps, seconds = dict[str, dict[float, Interval]](), dict[str, dict[float, Interval]]()
    for name, mine in by_method(rows, everywhere=True).items():
        if cost := mean_cost(mine):
            places = set.intersection(*(set(row.curve) for row in mine))
            means = {
                step: interval(means_over_tasks([replace(row, scores=row.curve[step]) for row in mine]))
                for step in sorted(places)
            }
            steps[name] = {float(step): score for step, score in means.items()}
            seconds[name] = {step * cost[0] / 1000: score for step, score in means.items()}
    panes = {"steps": steps, "CPU seconds of steps": seconds}
    return any(steps.values()) and curve_plot(panes, path, y="mean over tasks, dev split")


def over_lengths(folder: Path, like: int) -> str:
    """Write and return the mean scores for each number of steps, over the tasks that all of them have.

    Writes `lengths.md` and, if matplotlib is installed, `lengths.png`. Comparisons with other data or models
    than that of `like` steps are left out, and a note is printed.
    """
    written = {
        int(path.parent.name.removesuffix("-steps")): read_json(path)
        for path in folder.glob("*-steps/comparison.json")
    }
    known = {steps: _compared_on(content["config"]) for steps, content in written.items()}
    now = known[like]
    others = [
        n for n, then in known.items() if any(then[name] != now[name] for name in then.keys() & now.keys())
    ]
    for steps in others:
        say(f"note: the comparison of {steps} steps is of other data or models than that of {like}: left out")
    found = {
        steps: [_row(row) for row in content["rows"]]
        for steps, content in written.items()
        if steps not in others
    }
    lengths = sorted(found)
    tasks = set.intersection(*({row.task for row in rows} for rows in found.values()))
    whole = {
        steps: by_method([row for row in found[steps] if row.task in tasks], everywhere=True)
        for steps in lengths
    }
    names = list(dict.fromkeys(chain(*(whole[steps] for steps in reversed(lengths)))))
    means = {
        name: {steps: means_over_tasks(whole[steps][name]) for steps in lengths if name in whole[steps]}
        for name in names
    }
    scores = {
        name: {steps: interval(of_length) for steps, of_length in mine.items()}
        for name, mine in means.items()
    }
    parts = [f"Means over {', '.join(sorted(tasks))}:", _by_length(lengths, scores)]
    if rival := means.get(RIVALS[0]):
        gains = {
            name: {
                steps: interval([a - b for a, b in zip(of_length, rival[steps], strict=True)])
                for steps, of_length in mine.items()
                if steps in rival
            }
            for name, mine in means.items()
            if name != RIVALS[0]
        }
        parts += [f"Relative to {RIVALS[0]}, seed by seed:", _by_length(lengths, gains, sign="+")]
    costs = {
        name: cost
        for of_length in whole.values()
        for name, mine in of_length.items()
        if len(scores[name]) > 1 and (cost := mean_cost(mine))
    }
    if costs:
        seconds = {
            name: {place * milliseconds / 1000: score for place, score in scores[name].items()}
            for name, (milliseconds, _) in costs.items()
        }
        trained = {name: {float(place): score for place, score in scores[name].items()} for name in costs}
        panes = {"steps": trained, "CPU seconds of steps": seconds}
        curve_plot(panes, folder / "lengths.png", y="mean over tasks, test split", log=True)
    text = "\n\n".join(parts)
    write_atomically(folder / "lengths.md", (text + "\n").encode())
    return text


def _by_length(lengths: Sequence[int], scores: Mapping[str, Mapping[int, Interval]], sign: str = "") -> str:
    """Return a table of scores by method and number of steps; empty where a method was not trained."""
    lines = [
        [name, *(f"{mine[steps]:{sign}}" if steps in mine else "" for steps in lengths)]
        for name, mine in scores.items()
    ]
    return markdown_table(["method", *(f"{steps:,} steps" for steps in lengths)], lines)


def _compared_on(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return fingerprints of what a comparison read, by name. An older one has not stored all of them."""
    found: dict[str, Any] = dict(config.get("backbones", {}))
    for task, contents in config.get("contents", {}).items():
        found |= {f"{task} {name}": content for name, content in contents.items()}
    return found


def _row(content: dict[str, Any]) -> Row:
    """Return a row from the content that `report` wrote."""
    cost = content["cost"] and StepCost(**content["cost"])
    curve = {int(step): scores for step, scores in content["curve"].items()}
    return Row(**{**content, "score": Interval(**content["score"]), "cost": cost, "curve": curve})


def means_over_tasks(rows: Sequence[Row]) -> list[float]:
    """Return a method's mean over its tasks for each seed; CIDEr counts a tenth."""
    scaled = [
        [score / CIDER_SCALE if row.figure == "CIDEr" else score for score in row.scores] for row in rows
    ]
    return [fmean(of_seed) for of_seed in zip(*scaled, strict=True)]


def bars(rows: Sequence[Row]) -> str:
    """Describe the bars for DePT and whether they are met; empty if DePT or prompt tuning is missing."""
    whole = by_method(rows, everywhere=True)
    if not {"dept", "pt"} <= whole.keys():
        return ""
    means = {name: means_over_tasks(mine) for name, mine in whole.items()}
    ours = means["dept"]
    differences = {
        name: interval([a - b for a, b in zip(values, ours, strict=True)])
        for name, values in means.items()
        if name != "dept"
    }
    over_pt = interval([a - b for a, b in zip(ours, means["pt"], strict=True)])
    lines = [
        f"- DePT's mean over tasks >= PT's: {interval(ours)} against {interval(means['pt'])}, difference "
        f"{over_pt} over seeds: {MET[over_pt.mean >= 0]}."
    ]
    costs = [(a.cost, b.cost) for a, b in zip(whole["dept"], whole["pt"], strict=True) if a.cost and b.cost]
    time = [Ratio.of(a.seconds, b.seconds).median for a, b in costs]
    for what, ratios in {"Processor time": time, "Memory": [a.bytes / b.bytes for a, b in costs]}.items():
        if ratios:
            lines.append(
                f"- {what} of a step, DePT over PT: {median(ratios):.2f}, the median over tasks "
                f"({min(ratios):.2f} to {max(ratios):.2f}): {MET[max(ratios) < 1]}."
            )
    family = {name: fmean(means[name]) for name in METHODS if name in means and name not in ("dept", "pt")}
    if family:
        best = max(family, key=lambda name: family[name])
        better = [name for name, value in family.items() if value >= fmean(ours)]
        lines.append(
            f"- Some other member of the family >= DePT: {', '.join(better) or 'none'}; the best is {best} "
            f"with {interval(means[best])}: {MET[bool(better)]}."
        )
    said = ", ".join(f"{name} {difference}" for name, difference in differences.items())
    return "\n".join([*lines, f"- Difference to DePT, seed by seed: {said}."])


def rates_table(rows: Sequence[Row]) -> str:
    """Return how far each setting of DePT's learning rates is below the best one, by dev score."""
    tried = {row.task: row.tried for row in rows if row.method == "dept" and row.tried}
    if not tried:
        return ""
    lines = [
        [label.replace(",", ", "), *(f"{max(one.values()) - one[label]:.1f}" for one in tried.values())]
        for label in dict.fromkeys(chain(*tried.values()))
    ]
    table = markdown_table(["rates", *tried], lines)
    return f"DePT's dev figure below that of the best setting of its rates:\n\n{table}"


def task_tables(usual: Mapping[str, tuple[str, float] | None], rows: Sequence[Row]) -> list[str]:
    """Return a table for each task."""
    parts = []
    for task in dict.fromkeys(row.task for row in rows):
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
        f"{row.cost.milliseconds:.0f}" if row.cost else "",
        f"{row.cost.mib:.1f}" if row.cost else "",
        f"{row.tokens:.1f}",
    ]
