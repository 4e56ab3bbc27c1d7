"""The page that a run is shown by: `report.html`, one file with curves, figures, and what was answered.

Its questions, answers and images are other people's data: see `page` for what is made of them.
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
"""Examples of a task on the page, and how many of these are its best answers."""
KINDS = 30
"""Types of a kind that are shown, the commonest ones."""


@dataclass(frozen=True)
class Answered:
    """A split with what was answered.

    Attributes:
        task: The split.
        split: What it is called.
        predictions: An answer for each example.
        scores: Its figures; empty where no answers are published.
    """

    task: Task
    split: str
    predictions: Mapping[ExampleId, str]
    scores: Mapping[str, float]

    @property
    def name(self) -> str:
        """Of task and split."""
        return f"{self.task.name} {self.split}"


@dataclass(frozen=True)
class Marks:
    """How good the answers to a split are.

    Attributes:
        marks: Of each answer, from 0 to 1; not numbers where no answers are published.
        agreed: Share of the humans who gave the most usual answer.
        kinds: The marks by kind and type.
    """

    marks: Float[np.ndarray, " examples"]
    agreed: Float[np.ndarray, " examples"]
    kinds: Mapping[str, Mapping[str, Sequence[float]]]


def write_run_report(
    folder: Path, config: RunConfig, summary: Mapping[str, Any], answered: Sequence[Answered]
) -> Path:
    """Write the report of a finished run, from its folder and its answers."""
    described = folder / BEST / ADAPTER_FILE
    adapter = read_description(described) if is_there(described) else {}
    records = read_log(folder / LOG_FILE) if is_there(folder / LOG_FILE) else []
    # The folder and the way of resuming say nothing about the run itself.
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
    """Write the page of a split that a finished run was scored on."""
    return _write(folder, answered.name, about([], adapter.prompt, adapter.backbone), [answered])


def or_warn(write: Callable[[], Path]) -> None:
    """Write the report; on failure print a warning, because the results are already on disk."""
    try:
        write()
    except Exception as error:
        say(f"warning: {REPORT_FILE} could not be written ({one_line(error)}); nothing else is missing")


def about(answered: Sequence[Answered], prompt: Mapping[str, Any] | None, backbone: Mapping[str, Any]) -> str:
    """Tasks, backbone and prompt, in a line."""
    tasks = " + ".join(one.name for one in answered)
    sizes = "no prompt" if not prompt else "{method}, m={prompt_length}, r={rank}, s={max_source_length}"
    return " · ".join(filter(None, (tasks, backbone.get("name"), sizes.format(**(prompt or {})))))


def mark(answered: Answered) -> Marks:
    """Mark every answer by the task's own rule."""
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
    """Choose the worst answers, worst first, and the best; prefer images that are not shown yet.

    Of equal answers those come first on which humans agree most; then chance decides, always the same.

    Returns:
        Places of answers that are not perfect, and of the best of the others; where nothing is marked, of
        any, and none.
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
    """Name and scale of the metric that chose the checkpoint."""
    if len(answered) != 1:
        return "mean of the tasks' metrics"
    task = answered[0].task
    metric = chosen or task.primary
    return f"{metric} ({task.scale_of(metric)})"


def _rate(name: str) -> str:
    """The option of a group's learning rate; with `--rates relative` a group may have a size behind it."""
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
    """Return what the page shows of a split."""
    found = mark(answered)
    first, best = choose(found, answered.task.images)
    if np.isnan(found.marks).any():
        galleries = [("Answers", "No human answers are published; drawn at random.", first)]
    else:
        said = f"Scores from 0 to 100: {answered.task.marked_by}."
        wrong = f"{int((found.marks < 1).sum()):,} of {len(found.marks):,} answers are not fully right."
        worst = f"{wrong} {said} Equal ones: most agreed on first."
        galleries = [("Worst answers", worst, first), ("Best answers", said, best)]
    return {
        "name": answered.name,
        "task": answered.task,
        "scores": answered.scores,
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
    """Name, rows of the commonest types, their mean marks, and how many types are left out."""
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
    """List human answers, the commonest first, with their counts; captions one below the other."""
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
    """Return the first examples, in their order, whose images are not seen yet, and add these to `seen`.

    With `fill`, if there are fewer, the first of the others too.
    """
    chosen: list[tuple[int, int]] = []  # place in the order, and what stands there
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
