"""Report of a run: `report.html`, one file with curves, scores and examples of predictions.

Questions, answers and images come from the data; `page` describes how they are made safe to show.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from jaxtyping import Float

from dept_vl._utils.io import is_there, one_line, write_atomically
from dept_vl._utils.printable import say
from dept_vl._utils.run_files import BEST, LOG_FILE, REPORT_FILE
from dept_vl._utils.terminal import duration
from dept_vl.adapters.adapter import Adapter
from dept_vl.adapters.hub import ADAPTER_FILE
from dept_vl.adapters.schema import read_description
from dept_vl.config import RATES, RunConfig, flat, to_json
from dept_vl.tasks.base import Example, Task, shown_metrics
from dept_vl.tasks.io.predictions import ExampleId
from dept_vl.training.log import read_log
from dept_vl.training.report.page import chart, templates, thumbnail
from dept_vl.training.report.plots import colour_of

SHOWN, BEST_SHOWN = 48, 12
"""Number of examples of a task on the page, and how many of them are its best predictions."""
KINDS = 30
"""Maximum number of types of a kind on the page; the most frequent ones are shown."""


@dataclass(frozen=True)
class Answered:
    """Split with its predictions."""

    task: Task
    split: str
    predictions: Mapping[ExampleId, str]
    scores: Mapping[str, float]  # scores of the predictions; empty if the answers are not published
    changed: str = ""  # how the split differs from what the run read of it; empty if it does not

    @property
    def name(self) -> str:
        """Name of the task and the split."""
        return f"{self.task.name} {self.split}"


@dataclass(frozen=True)
class Marks:
    """Marks of the predictions for a split."""

    marks: Float[np.ndarray, " examples"]  # from 0 to 1; NaN if the answers are not published
    agreed: Float[np.ndarray, " examples"]  # share of the humans who gave the most frequent answer
    kinds: Mapping[str, Mapping[str, Sequence[float]]]  # marks by kind and type of example


def write_run_report(
    folder: Path, config: RunConfig, summary: Mapping[str, Any], answered: Sequence[Answered]
) -> Path:
    """Write the report of a finished run and return its path."""
    described = folder / BEST / ADAPTER_FILE
    adapter = read_description(described) if is_there(described) else {}
    records = read_log(folder / LOG_FILE) if is_there(folder / LOG_FILE) else []
    # These two options do not describe the run itself.
    options = {k: v for k, v in flat(to_json(config)).items() if k not in ("output_dir", "resume")}
    return _write(
        folder,
        folder.name,
        about(answered, adapter.get("prompt"), adapter.get("backbone", {})),
        answered,
        summary=summary,
        colour=colour_of(config.prompt.method),
        charts=_curves(records, summary["best_step"], _deciding(answered, config.data.choose_by)),
        trained=[(k.replace("_", " "), f"{v:,}") for k, v in summary["trainable_parameters"].items()],
        options=[(k, ", ".join(map(str, v)) if isinstance(v, list) else v) for k, v in options.items()],
    )


def write_evaluation_report(folder: Path, adapter: Adapter, answered: Answered) -> Path:
    """Write the report of a split that a finished run was evaluated on, and return its path."""
    return _write(folder, answered.name, about([], adapter.prompt, adapter.backbone), [answered])


def or_warn(write: Callable[[], Path]) -> None:
    """Call `write`, and print a warning if it fails, because the results are already on disk."""
    try:
        write()
    except Exception as error:
        say(f"warning: {REPORT_FILE} could not be written ({one_line(error)}); nothing else is missing")


def about(answered: Sequence[Answered], prompt: Mapping[str, Any] | None, backbone: Mapping[str, Any]) -> str:
    """Describe tasks, backbone and prompt in one line."""
    tasks = " + ".join(one.name for one in answered)
    sizes = "no prompt" if not prompt else "{method}, m={prompt_length}, r={rank}, s={max_source_length}"
    return " · ".join(filter(None, (tasks, backbone.get("name"), sizes.format(**(prompt or {})))))


def mark(answered: Answered) -> Marks:
    """Mark every prediction by the task's own rule."""
    task = answered.task
    marks, agreed = np.full(len(task), np.nan), np.zeros(len(task))
    kinds = defaultdict[str, dict[str, list[float]]](lambda: defaultdict(list))
    for index in range(len(task)):
        example = task[index]
        if not example.targets:
            continue
        one = task.mark(example, answered.predictions[example.example_id])
        counts = Counter(example.answers)
        marks[index], agreed[index] = one, max(counts.values(), default=0) / max(1, counts.total())
        for kind, name in example.kinds:
            kinds[kind][name].append(one)
    return Marks(marks, agreed, kinds)


def choose(found: Marks, images: Callable[[int], tuple[Path, ...]]) -> tuple[list[int], list[int]]:
    """Choose the worst and the best predictions to show, and prefer images that are not shown yet.

    Among equal marks, examples with more agreement of humans come first, then a fixed random order decides.
    Return the indices of imperfect predictions, worst first, and of the best others; without marks, those of
    any examples, and an empty list.
    """
    chance = np.random.default_rng(0).permutation(len(found.marks))
    seen: set[tuple[Path, ...]] = set()
    if np.isnan(found.marks).any():
        return _distinct(np.argsort(chance), images, SHOWN, seen), []
    worst_first = np.lexsort((chance, -found.agreed, found.marks))
    wrong = worst_first[found.marks[worst_first] < 1]
    worst = _distinct(wrong, images, SHOWN - BEST_SHOWN, seen, fill=True)
    best_first = np.lexsort((chance, -found.agreed, -found.marks))
    others = best_first[(found.marks[best_first] > 0) & ~np.isin(best_first, worst)]
    return worst, _distinct(others, images, BEST_SHOWN, seen)


def _write(folder: Path, title: str, line: str, answered: Sequence[Answered], **run: Any) -> Path:
    content = (
        templates()
        .get_template("report.html.j2")
        .render(
            {"summary": None, "charts": [], **run},
            title=title,
            about=line,
            examples=sum(len(one.task) for one in answered),
            sections=list(map(_section, answered)),
            duration=duration,
        )
    )
    write_atomically(folder / REPORT_FILE, content.encode())
    return folder / REPORT_FILE


def _deciding(answered: Sequence[Answered], chosen: str | None) -> str:
    """Return name and scale of the metric that chose the checkpoint."""
    if len(answered) != 1:
        return "mean of the tasks' metrics"
    task = answered[0].task
    metric = chosen or task.primary
    return f"{metric} ({task.scale_of(metric)})"


def _rate(name: str) -> str:
    """Return the name of a group's learning-rate option, with the group's size if it has one."""
    group, *size = name.removeprefix("lr/").split(" ", 1)
    return " ".join([f"{RATES[group]}_lr", *size])


def _curves(log: Sequence[Mapping[str, Any]], best_step: int, metric: str) -> list[dict[str, Any]]:
    def line(name: str) -> list[tuple[float, float]]:
        return [(float(record["step"]), float(record[name])) for record in log if name in record]

    rates = dict.fromkeys(name for record in log for name in record if name.startswith("lr/"))
    scores = line("score")
    best = next((point for point in scores if point[0] == best_step), None)
    note = "" if best is None else f"best: {best[1]:.2f} at step {best_step:,}"
    charts = [
        chart("Loss", {"loss": line("loss")}, y="nats per answer token"),
        chart("Score on the dev split", {"score": scores}, y=metric, note=note, marked=best),
        chart("Learning rates", {_rate(name): line(name) for name in rates}, y="rate", logarithmic=True),
    ]
    return list(filter(None, charts))


def _section(answered: Answered) -> dict[str, Any]:
    found = mark(answered)
    first, best = choose(found, answered.task.images)
    if np.isnan(found.marks).any():
        galleries = [("Answers", "No human answers are published; drawn at random.", first)]
    else:
        said = f"Scores from 0 to 100: {answered.task.marked_by}."
        wrong = f"{int((found.marks < 1).sum()):,} of {len(found.marks):,} answers are not fully right."
        worst = f"{wrong} {said} Among equal scores, those that humans agree on most come first."
        galleries = [("Worst answers", worst, first), ("Best answers", said, best)]
    return {
        "name": answered.name,
        "task": answered.task,
        "scores": answered.scores,
        "changed": answered.changed,
        "figures": [
            (name, f"{value:.2f}", answered.task.scale_of(name))
            for name, value in shown_metrics(answered.scores).items()
            if "answer_type/" not in name
        ],
        "kinds": [_kind(name, types) for name, types in found.kinds.items()],
        "galleries": [
            (title, note, [_card(answered, index, float(found.marks[index])) for index in chosen])
            for title, note, chosen in galleries
        ],
    }


def _kind(kind: str, types: Mapping[str, Sequence[float]]) -> tuple[str, list[Any], list[float], int]:
    """Return name, rows of the most frequent types, their mean marks, and the number of types left out."""
    common = sorted(types, key=lambda name: (-len(types[name]), name))[:KINDS]
    means = [fmean(types[name]) for name in common]
    rows = [
        (name, f"{len(types[name]):,}", f"{100 * mean:.2f}") for name, mean in zip(common, means, strict=True)
    ]
    return kind, rows, means, len(types) - len(common)


def _card(answered: Answered, index: int, mark: float) -> dict[str, Any]:
    example = answered.task[index]
    verdict = "" if math.isnan(mark) else "right" if mark >= 1 else "wrong" if mark <= 0 else "partly"
    return {
        "example": example,
        "prediction": answered.predictions[example.example_id],
        "mark": mark,
        "verdict": verdict,
        "humans": _humans(example),
        "pictures": [(path.name, thumbnail(path)) for path in example.images],
    }


def _humans(example: Example) -> str:
    """Return the human answers with their counts, most frequent first; captions one per line."""
    counts = Counter(example.answers)
    if len(example.answers) <= 1:
        return "".join(f"human: {answer}" for answer in example.answers)
    if example.in_turn:
        return "\n".join(("humans:", *example.answers))
    return "humans: " + " · ".join(
        answer if count == 1 else f"{answer} ×{count}" for answer, count in counts.most_common()
    )


def _distinct(
    ordered: Iterable[Any],
    images: Callable[[int], tuple[Path, ...]],
    count: int,
    seen: set[tuple[Path, ...]],
    *,
    fill: bool = False,
) -> list[int]:
    """Return the first examples with images that are not in `seen`, and add their images to it.

    With `fill`, add the first of the other examples if there are fewer than `count`.
    """
    chosen: list[tuple[int, int]] = []  # position in the order, and index of the example
    passed: list[tuple[int, int]] = []
    for place, index in enumerate(map(int, ordered)):
        if len(chosen) == count:
            break
        shown = images(index)
        (passed if shown and shown in seen else chosen).append((place, index))
        seen.add(shown)
    if fill:
        chosen = sorted([*chosen, *passed[: count - len(chosen)]])
    return [index for _, index in chosen]
