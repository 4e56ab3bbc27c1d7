"""The page that a run is shown by: `report.html`, one file with curves, figures, and what was answered.

Its questions, answers and images are other people's data: see `page` for what is made of them.
"""

import base64
import io
import json
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from dept_vl.checkpoint import CONFIG_FILE as ADAPTER_FILE
from dept_vl.checkpoint import Adapter
from dept_vl.config import RunConfig, flat, to_json
from dept_vl.files import one_line, read_json, write_atomically
from dept_vl.images import read_image
from dept_vl.live import duration
from dept_vl.log import LOG_FILE
from dept_vl.page import chart, page, table, text, tiles
from dept_vl.report import scale_of
from dept_vl.tasks.example import Example, Task
from dept_vl.tasks.predictions import ExampleId
from dept_vl.train import BEST

REPORT_FILE = "report.html"
SHOWN, BEST_SHOWN = 48, 12
"""Examples of a task on the page, and how many of these are its best answers."""
SIDE, QUALITY = 240, 80
"""Pixels of an image's longer side, and its JPEG quality: some 10 KB each."""
LONGEST = 600
"""Characters of a text that are shown."""
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


@dataclass(frozen=True)
class Marked:
    """An example by its place in the split, with the mark of its answer and what decides among equals.

    Attributes:
        index: In the split.
        mark: From 0 to 1; not a number where no answers are published.
        agreed: Share of the humans who gave the most usual answer.
        images: Of the example.
    """

    index: int
    mark: float
    agreed: float
    images: tuple[Path, ...]


def write_run_report(
    folder: Path, config: RunConfig, summary: Mapping[str, Any], answered: Sequence[Answered]
) -> Path:
    """Write the page of a finished run, from what lies in its folder and what it answered.

    Args:
        folder: Of the run.
        config: Of the run.
        summary: Content of its summary.json.
        answered: Its test split, of several tasks each.

    Returns:
        The page.
    """
    adapter = read_json(folder / BEST / ADAPTER_FILE) if (folder / BEST / ADAPTER_FILE).is_file() else {}
    lines = (folder / LOG_FILE).read_text().splitlines() if (folder / LOG_FILE).is_file() else []
    # Where it lies and how it went on is nothing of what it is.
    options = {k: v for k, v in flat(to_json(config)).items() if k not in ("output_dir", "resume")}
    parts = [
        *_head(folder.name, about(answered, adapter.get("prompt"), adapter.get("backbone", {}))),
        tiles(_facts(answered, summary)),
        *_curves(list(map(json.loads, lines)), summary["best_step"]),
        *_sections(answered),
        _folded("What was trained", table(("", "parameters"), _trained(summary["trainable_parameters"]))),
        _folded("Options", table(("", ""), [(k, _shown(v)) for k, v in options.items()])),
    ]
    return _write(folder, folder.name, parts)


def write_evaluation_report(folder: Path, adapter: Adapter, answered: Answered) -> Path:
    """Write the page of a split that a finished run was scored on.

    Args:
        folder: Of the evaluation.
        adapter: That was scored.
        answered: The split.

    Returns:
        The page.
    """
    name = f"{answered.task.name} {answered.split}"
    parts = [
        *_head(name, about([], adapter.prompt, adapter.backbone)),
        tiles(_facts([answered], {})),
        *_sections([answered]),
    ]
    return _write(folder, name, parts)


def or_warn(write: Callable[[], Path]) -> None:
    """Write a page; a page that fails is said to, since the results that it shows lie there already."""
    try:
        write()
    except Exception as error:
        print(f"warning: {REPORT_FILE} could not be written ({one_line(error)}); nothing else is missing")


def about(answered: Sequence[Answered], prompt: Mapping[str, Any] | None, backbone: Mapping[str, Any]) -> str:
    """Tasks, backbone and prompt, in a line."""
    tasks = " + ".join(f"{one.task.name} {one.split}" for one in answered)
    sizes = "no prompt" if not prompt else "{method}, m={prompt_length}, r={rank}, s={max_source_length}"
    return " · ".join(filter(None, (tasks, backbone.get("name"), sizes.format(**(prompt or {})))))


def marks(answered: Answered) -> tuple[list[Marked], dict[str, dict[str, list[float]]]]:
    """The mark of every answer, and the marks by kind and type."""
    marked, kinds = [], defaultdict[str, dict[str, list[float]]](lambda: defaultdict(list))
    task = answered.task
    for index in range(len(task)):
        example = task[index]
        mark, agreed = math.nan, 0.0
        if example.targets:
            mark = task.mark(example, answered.predictions[example.example_id])
            counts = Counter(example.answers)
            agreed = max(counts.values(), default=0) / max(1, counts.total())
            for kind, name in example.kinds:
                kinds[kind][name].append(mark)
        marked.append(Marked(index, mark, agreed, example.images))
    return marked, kinds


def choose(marked: Sequence[Marked]) -> tuple[list[Marked], list[Marked]]:
    """What is shown: the worst answers, worst first, and the best, each of another image.

    Of equal answers those come first on which humans agree most; then chance decides, always the same.

    Returns:
        Answers that are not perfect, and the best of the others; where nothing is marked, any, and none.
    """
    order = list(marked)
    Random(0).shuffle(order)
    if any(math.isnan(one.mark) for one in order):
        return _distinct(order, SHOWN, set()), []
    seen: set[tuple[Path, ...]] = set()
    faulty = sorted((one for one in order if one.mark < 1), key=lambda one: (one.mark, -one.agreed))
    worst = _distinct(faulty, SHOWN - BEST_SHOWN, seen)
    best = sorted(order, key=lambda one: (-one.mark, -one.agreed))
    shown = {one.index for one in worst}
    return worst, _distinct(
        (one for one in best if one.mark > 0 and one.index not in shown), BEST_SHOWN, seen
    )


def thumbnail(path: Path) -> str:
    """An image as a small picture in the page, or a note in its place if it cannot be read."""
    try:
        image = read_image(path)
        image.thumbnail((SIDE, SIDE))
        written = io.BytesIO()
        image.save(written, "JPEG", quality=QUALITY, optimize=True)
    # A page without one of its pictures is still a page.
    except (OSError, ValueError):
        return f'<div class="gone">{text(path.name)} could not be read</div>'
    encoded = base64.b64encode(written.getvalue()).decode()
    return f'<img alt="" loading="lazy" src="data:image/jpeg;base64,{encoded}">'


def _write(folder: Path, title: str, parts: Sequence[str]) -> Path:
    path = folder / REPORT_FILE
    write_atomically(path, page(f"{title}: dept_vl", parts).encode())
    return path


def _head(title: str, line: str) -> list[str]:
    return [f"<h1>{text(title)}</h1>", f'<p class="quiet">{text(line)}</p>']


def _facts(answered: Sequence[Answered], summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    facts = []
    for one in answered:
        if one.scores:
            name = one.task.primary
            scale = scale_of(name).replace("-", "\N{NON-BREAKING HYPHEN}")
            facts.append((f"{one.task.name} {one.split}: {name} ({scale})", f"{one.scores[name]:.2f}"))
    facts.append(("examples answered", f"{sum(len(one.task) for one in answered):,}"))
    if summary:
        tokens, reference = summary["tokens_per_example"], summary["reference_tokens_per_example"]
        facts += [
            ("trained parameters", f"{summary['trainable_parameters']['total']:,}"),
            (f"encoder tokens an example, {1 - tokens / reference:.0%} saved", f"{tokens:.1f}"),
            (f"of training, {summary['steps']:,} steps", duration(summary["train_seconds"])),
        ]
    return facts


def _curves(log: Sequence[Mapping[str, Any]], best_step: int) -> list[str]:
    def line(name: str) -> list[tuple[float, float]]:
        return [(float(record["step"]), float(record[name])) for record in log if name in record]

    rates = dict.fromkeys(name for record in log for name in record if name.startswith("lr/"))
    scores = line("score")
    best = next((point for point in scores if point[0] == best_step), None)
    note = "by step" if best is None else f"best: {best[1]:.2f} at step {best_step:,}"
    charts = [
        chart("Loss", {"loss": line("loss")}),
        chart("Score on the dev split", {"score": scores}, note=note, marked=best),
        chart("Learning rates", {name.removeprefix("lr/"): line(name) for name in rates}, logarithmic=True),
    ]
    drawn = "".join(charts)
    return ["<h2>Learning curves</h2>", f'<div class="charts">{drawn}</div>'] if drawn else []


def _sections(answered: Sequence[Answered]) -> list[str]:
    parts = []
    for one in answered:
        marked, kinds = marks(one)
        name = f"{one.task.name} {one.split}"
        if one.scores:
            parts.append(f"<h2>Scores: {text(name)}</h2>")
            parts.append(f'<div class="tables">{_score_table(one)}{_kind_tables(kinds)}</div>')
        first, best = choose(marked)
        if any(math.isnan(mark.mark) for mark in marked):
            parts += _gallery(
                f"Answers: {name}", "No human answers are published; drawn at random.", one, first
            )
            continue
        said = f"Marks from 0 to 100: {one.task.marked_by}."
        faulty = sum(mark.mark < 1 for mark in marked)
        note = f"{faulty:,} of {len(marked):,} answers are not fully right. {said}"
        parts += _gallery(f"Worst answers: {name}", f"{note} Equal ones: most agreed on first.", one, first)
        parts += _gallery(f"Best answers: {name}", said, one, best)
    return parts


def _score_table(answered: Answered) -> str:
    rows = [
        (name, f"{value:.2f}", scale_of(name))
        for name, value in answered.scores.items()
        if "question_type/" not in name and "answer_type/" not in name
    ]
    return f"<div>{table(('figure', 'score', 'scale'), rows)}</div>"


def _kind_tables(kinds: Mapping[str, Mapping[str, Sequence[float]]]) -> str:
    tables = []
    for kind, types in kinds.items():
        common = sorted(types, key=lambda name: (-len(types[name]), name))[:KINDS]
        means = [math.fsum(types[name]) / len(types[name]) for name in common]
        rows = [
            (name, f"{len(types[name]):,}", f"{100 * mean:.2f}")
            for name, mean in zip(common, means, strict=True)
        ]
        left = len(types) - len(common)
        note = f'<p class="quiet small">and {left} rarer ones</p>' if left else ""
        tables.append(f"<div>{table((kind, 'examples', 'accuracy'), rows, share=means)}{note}</div>")
    return "".join(tables)


def _gallery(title: str, note: str, answered: Answered, chosen: Sequence[Marked]) -> list[str]:
    if not chosen:
        return []
    cards = "".join(_card(answered, one) for one in chosen)
    wide = " wide" if len(chosen[0].images) != 1 else ""
    head = f'<h2>{text(title)}</h2>\n<p class="quiet">{text(note)}</p>'
    return [head, f'<div class="cards{wide}">{cards}</div>']


def _card(answered: Answered, one: Marked) -> str:
    example = answered.task[one.index]
    prediction = answered.predictions[example.example_id]
    marked = not math.isnan(one.mark)
    kind = "right" if one.mark >= 1 else "wrong" if one.mark <= 0 else "partly"
    mark = f'<span class="mark">{100 * one.mark:.0f}</span>' if marked else ""
    pictures = "".join(map(thumbnail, example.images))
    of_kind = "".join(f" · {name}" for _, name in example.kinds)
    lines = [
        # Of captions there is none: theirs would be a human caption.
        "" if example.in_turn else f'<p class="data question">{text(_cut(example.question))}</p>',
        f'<p class="data said">{mark}{text(_cut(prediction)) or "(nothing)"}</p>',
        f'<p class="data humans quiet small">{text(_cut(_humans(example)))}</p>' if example.answers else "",
        f'<p class="quiet small">{text(f"{example.example_id}{of_kind}")}</p>',
    ]
    return (
        f'<div class="card {kind if marked else ""}">'
        + (f'<div class="pictures">{pictures}</div>' if pictures else "")
        + f'<div class="words">{"".join(lines)}</div></div>'
    )


def _humans(example: Example) -> str:
    """Human answers, the most usual first, with how many gave each; captions one below the other."""
    counts = Counter(example.answers)
    if len(example.answers) == 1:
        return f"human: {example.answers[0]}"
    if example.in_turn:
        return "\n".join(("humans:", *example.answers))
    return "humans: " + " · ".join(
        answer if count == 1 else f"{answer} ×{count}" for answer, count in counts.most_common()
    )


def _distinct(ordered: Iterable[Marked], count: int, seen: set[tuple[Path, ...]]) -> list[Marked]:
    """The first so many whose images are not among those seen, which are noted."""
    chosen: list[Marked] = []
    for one in ordered:
        if len(chosen) == count:
            break
        if not one.images or one.images not in seen:
            seen.add(one.images)
            chosen.append(one)
    return chosen


def _trained(parameters: Mapping[str, int]) -> list[tuple[str, str]]:
    return [(name.replace("_", " "), f"{count:,}") for name, count in parameters.items()]


def _folded(title: str, content: str) -> str:
    return f"<details><summary>{text(title)}</summary>{content}</details>"


def _shown(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _cut(said: str) -> str:
    return said if len(said) <= LONGEST else said[: LONGEST - 2] + " …"
