"""Report on your own data and on problems in them, for `dept-vl data check --data`."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc

from dept_vl._utils.checksums import file_checksum
from dept_vl._utils.images import read_image
from dept_vl.config import DataOptions
from dept_vl.data.answers import look_at_answers
from dept_vl.data.lengths import source_lengths
from dept_vl.data.pictures import picture_grid
from dept_vl.data.splits import load_split
from dept_vl.tasks.base import Task
from dept_vl.tasks.io.rows import Rows
from dept_vl.tasks.own.options import OwnOptions
from dept_vl.tasks.own.split import ALL, TEST, TRAIN, VALIDATION
from dept_vl.tasks.own.task import OwnTask
from dept_vl.tasks.prepare.check import Finding, check_files

SHOWN = 10
"""Number of the most frequent answers, and of faulty rows, to show."""
SIDE = 4
"""Number of examples across and down the contact sheet."""
USUAL = 99
"""Percentile of the lengths, printed beside the maximum."""


def check_own(own: OwnOptions, *, sample: int, tokenizer: Any, sheet: Path | None) -> Iterator[Finding]:
    """Check your own data: counts, images, ids, questions, answers, lengths and splits.

    Open `sample` images (0 opens all), measure texts with `tokenizer` (None counts characters), and draw 16
    examples into the PNG file `sheet`.
    """
    try:
        whole = load_split(DataOptions(own=own), ALL)
        assert isinstance(whole, OwnTask)
        files = whole.image_files()
    except (ValueError, OSError) as error:
        yield Finding("broken", str(error))
        return
    size = f"{len(whole):,} rows, {len(files):,} images, {whole.image_count} a row"
    yield Finding("ok", f"{whole.name}: {size}; {whole.primary} decides")
    yield from _splits(own)
    yield from check_files(whole.name, files, sample)
    yield from (Finding("leak", line) for line in whole.leaks)
    yield from (Finding("note", line) for line in whole.notes if line not in whole.leaks)
    yield from _questions(whole)
    yield from _answers(whole.rows)
    yield from _characters(whole.rows) if tokenizer is None else _tokens(whole, tokenizer)
    if sheet is not None and len(shown := _readable(whole, SIDE * SIDE)):
        answers = {shown[place].example_id: _answer(shown, place) for place in range(len(shown))}
        down = -(-len(shown) // SIDE)
        picture_grid(shown, answers, sheet, columns=SIDE, rows=down, mistakes=SIDE * SIDE)
        yield Finding("ok", f"{len(shown)} examples are drawn in {sheet}")


def _splits(own: OwnOptions) -> Iterator[Finding]:
    files: dict[str, list[Path]] = {}
    for name in (TRAIN, VALIDATION, TEST):
        try:
            split = load_split(DataOptions(own=own), name)
        except ValueError as error:
            yield Finding("note", f"{name}: {error}")
            continue
        named = bool(split.rows.column("split")[0].as_py())
        how = "as the data say" if named else "what is left" if name == TRAIN else "held out by image"
        files[name] = [path for path in split.image_files() if path.is_file()]
        yield Finding("ok", f"{name}: {len(split):,} rows, {len(split.image_files()):,} images, {how}")
    yield from _copies(files)


def _copies(files: dict[str, list[Path]]) -> Iterator[Finding]:
    """Find images of validation and test that are copies of training images, under another name."""
    train = set(files.get(TRAIN, ()))
    sizes = {path.stat().st_size for path in train}
    for name in (VALIDATION, TEST):
        others = [path for path in files.get(name, ()) if path not in train and path.stat().st_size in sizes]
        alike = {path.stat().st_size for path in others}  # only these are read
        contents = {file_checksum(path) for path in train if path.stat().st_size in alike}
        copies = sum(file_checksum(path) in contents for path in others)
        if copies:
            of_split = f"{copies:,} of the {len(files[name]):,} images of {name}"
            yield Finding("leak", f"{of_split} are copies of images of {TRAIN}")


def _questions(task: Task) -> Iterator[Finding]:
    if not task.asks:
        return
    texts = task.rows.column("question")
    empty = np.flatnonzero(pc.equal(texts, "").to_numpy(zero_copy_only=False))
    if len(empty):
        ids = ", ".join(task.rows.value("id", int(place)) for place in empty[:SHOWN])
        yield Finding("empty", f"{len(empty):,} of {len(task):,} questions are empty (ids {ids})")


def _answers(rows: Rows) -> Iterator[Finding]:
    column = rows.column("answers")
    counts = rows.lengths("answers")
    values, times = pc.list_flatten(column).combine_chunks().value_counts().flatten()
    total = int(counts.sum())
    if not total:
        yield Finding("note", "answers: none; the rows can be answered, and neither learnt nor scored")
        return
    order = np.argsort(-times.to_numpy(), kind="stable")[:SHOWN]
    usual = ", ".join(f"{values[int(n)].as_py()!r:.40} {times[int(n)].as_py() / total:.1%}" for n in order)
    each = f"{counts.min()}" if counts.min() == counts.max() else f"{counts.min()} to {counts.max()}"
    yield Finding("ok", f"answers: {total:,}, {each} a row, {len(values):,} different; {usual}")


def _characters(rows: Rows) -> Iterator[Finding]:
    for name, column in (
        ("question", rows.column("question")),
        ("answer", pc.list_flatten(rows.column("answers"))),
    ):
        longest = pc.max(pc.utf8_length(column)).as_py() or 0
        if longest:
            yield Finding("ok", f"longest {name}: {longest:,} characters; --backbone counts tokens")


def _tokens(task: Task, tokenizer: Any) -> Iterator[Finding]:
    lengths = source_lengths(task, tokenizer)
    longest = task.rows.value("id", int(lengths.argmax()))
    yield Finding(
        "ok",
        f"longest text: {lengths.max():,} tokens (id {longest}), {USUAL}% have at most "
        f"{int(np.percentile(lengths, USUAL)):,}; --max_source_length cuts longer ones",
    )
    known = task.answered()
    if not len(known):
        return
    lost = look_at_answers(known, tokenizer, 0)
    yield Finding("ok", f"longest answer: {lost.longest:,} tokens, end included")
    if lost.unwritable:
        some = ", ".join(f"{text!r:.60}" for text, _ in lost.unwritable.most_common(SHOWN))
        yield Finding(
            "lost",
            f"{lost.unwritable.total():,} of {lost.answers:,} answers cannot be written by this tokenizer: "
            f"{some}",
        )


def _readable(task: Task, count: int) -> Task:
    """Return examples spread over the rows, with different images that can be read."""
    chosen: list[int] = []
    seen: set[tuple[Path, ...]] = set()
    step = max(1, len(task) // (count * SIDE))
    for place in (n for start in range(step) for n in range(start, len(task), step)):
        images = task.images(place)
        if len(chosen) == count or len(seen) > count * SIDE:
            break
        if images not in seen:
            seen.add(images)
            try:
                for image in images:
                    read_image(image)
            except (ValueError, FileNotFoundError):
                continue
            chosen.append(place)
    return task.subset(sorted(chosen))


def _answer(task: Task, place: int) -> str:
    example = task[place]
    return example.answer or next(iter(example.answers), "")
