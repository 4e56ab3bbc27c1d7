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
from typing import Any

import numpy as np
from jaxtyping import Float

from dept_vl._utils.images import read_image
from dept_vl._utils.io import one_line, write_atomically
from dept_vl._utils.run_files import BEST, LOG_FILE, REPORT_FILE
from dept_vl._utils.terminal import duration
from dept_vl.adapters.adapter import Adapter
from dept_vl.adapters.hub import ADAPTER_FILE
from dept_vl.adapters.schema import read_description
from dept_vl.config import RunConfig, flat, to_json
from dept_vl.tasks.base import Example, Task
from dept_vl.tasks.io.predictions import ExampleId
from dept_vl.training.report.page import chart, page, table, text, tiles

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
    """Write the page of a finished run, from what lies in its folder and what it answered.

    Args:
        folder: Of the run.
        config: Of the run.
        summary: Content of its summary.json.
        answered: Its test split, of several tasks each.

    Returns:
        The page.
    """
    described = folder / BEST / ADAPTER_FILE
    adapter = read_description(described) if described.is_file() else {}
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
    """Write the report; on failure print a warning, because the results are already on disk."""
    try:
        write()
    except Exception as error:
        print(f"warning: {REPORT_FILE} could not be written ({one_line(error)}); nothing else is missing")


def about(answered: Sequence[Answered], prompt: Mapping[str, Any] | None, backbone: Mapping[str, Any]) -> str:
    """Tasks, backbone and prompt, in a line."""
    tasks = " + ".join(f"{one.task.name} {one.split}" for one in answered)
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
    """What is shown: the worst answers, worst first, and the best, other images before the same again.

    Of equal answers those come first on which humans agree most; then chance decides, always the same.

    Args:
        found: Of a split.
        images: Of an example by its place in the split.

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
            scale = one.task.scale_of(name).replace("-", "\N{NON-BREAKING HYPHEN}")
            facts.append((f"{one.task.name} {one.split}: {name} ({scale})", f"{one.scores[name]:.2f}"))
    facts.append(("examples answered", f"{sum(len(one.task) for one in answered):,}"))
    if summary:
        tokens, reference = summary["tokens_per_example"], summary["reference_tokens_per_example"]
        facts += [
            ("trained parameters", f"{summary['trainable_parameters']['total']:,}"),
            (f"encoder tokens an example, {1 - tokens / reference:.0%} saved", f"{tokens:.2f}"),
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
        found = mark(one)
        name = f"{one.task.name} {one.split}"
        if one.scores:
            parts.append(f"<h2>Scores: {text(name)}</h2>")
            parts.append(f'<div class="tables">{_score_table(one)}{_kind_tables(found.kinds)}</div>')
        first, best = choose(found, one.task.images)
        if np.isnan(found.marks).any():
            note = "No human answers are published; drawn at random."
            parts += _gallery(f"Answers: {name}", note, one, found, first)
            continue
        said = f"Marks from 0 to 100: {one.task.marked_by}."
        note = f"{int((found.marks < 1).sum()):,} of {len(found.marks):,} answers are not fully right. {said}"
        more = " Equal ones: most agreed on first."
        parts += _gallery(f"Worst answers: {name}", note + more, one, found, first)
        parts += _gallery(f"Best answers: {name}", said, one, found, best)
    return parts


def _score_table(answered: Answered) -> str:
    rows = [
        (name, f"{value:.2f}", answered.task.scale_of(name))
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


def _gallery(title: str, note: str, answered: Answered, found: Marks, chosen: Sequence[int]) -> list[str]:
    if not chosen:
        return []
    cards = "".join(_card(answered, index, float(found.marks[index])) for index in chosen)
    wide = " wide" if len(answered.task.images(chosen[0])) != 1 else ""
    head = f'<h2>{text(title)}</h2>\n<p class="quiet">{text(note)}</p>'
    return [head, f'<div class="cards{wide}">{cards}</div>']


def _card(answered: Answered, index: int, mark: float) -> str:
    example = answered.task[index]
    prediction = answered.predictions[example.example_id]
    marked = not math.isnan(mark)
    kind = "right" if mark >= 1 else "wrong" if mark <= 0 else "partly"
    shown = f'<span class="mark">{100 * mark:.0f}</span>' if marked else ""
    pictures = "".join(map(thumbnail, example.images))
    of_kind = "".join(f" · {name}" for _, name in example.kinds)
    lines = [
        # Of captions there is none: theirs would be a human caption.
        "" if example.in_turn else f'<p class="data question">{text(_cut(example.question))}</p>',
        f'<p class="data said">{shown}{text(_cut(prediction)) or "(nothing)"}</p>',
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


def _distinct(
    ordered: Iterable[Any],
    images: Callable[[int], tuple[Path, ...]],
    count: int,
    seen: set[tuple[Path, ...]],
    *,
    fill: bool = False,
) -> list[int]:
    """The first so many whose images are not among those seen, which are noted; in their order.

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


def _trained(parameters: Mapping[str, int]) -> list[tuple[str, str]]:
    return [(name.replace("_", " "), f"{count:,}") for name, count in parameters.items()]


def _folded(title: str, content: str) -> str:
    return f"<details><summary>{text(title)}</summary>{content}</details>"


def _shown(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _cut(said: str) -> str:
    return said if len(said) <= LONGEST else said[: LONGEST - 2] + " …"
