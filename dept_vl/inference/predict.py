"""Implementation of `dept-vl predict`: a few questions, or all of a table into a file.

    answers.jsonl.partial        answers so far, in the order of the table
    answers.jsonl.partial.json   checksums of the inputs that the answers depend on
    answers.jsonl                all answers, when complete

Batches hold the same rows for any number of processes and after any interruption, so the file is always the
same. Only the main process writes. Memory holds the batches between two writes, not the whole table.
"""

import json
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from itertools import islice
from pathlib import Path
from time import perf_counter
from typing import BinaryIO

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from filelock import FileLock, Timeout
from torch.utils.data import Dataset
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from dept_vl._utils.checksums import checksum
from dept_vl._utils.errors import DamagedFileError, InUseError, UsageError
from dept_vl._utils.io import parse_json, read_object, write_json, writing
from dept_vl._utils.printable import say
from dept_vl._utils.processes import main_first, on_main
from dept_vl._utils.tensors import exact_fingerprint
from dept_vl._utils.terminal import Count, duration, waiting
from dept_vl.adapters.fingerprint import describe_backbone
from dept_vl.config import OWN_TASK, DataOptions
from dept_vl.data import workers
from dept_vl.data.collate import Batch, Collator, Draw
from dept_vl.data.content import rows_content
from dept_vl.data.feature_index import file_stats
from dept_vl.data.feature_source import mapped_features
from dept_vl.data.lengths import check_texts
from dept_vl.data.splits import check_images, load_split
from dept_vl.inference.evaluate import decode
from dept_vl.inference.loading import load
from dept_vl.inference.options import PredictConfig
from dept_vl.inference.predictor import Predictor
from dept_vl.tasks.base import Task
from dept_vl.tasks.io.predictions import ExampleId
from dept_vl.tasks.own.images import names_image
from dept_vl.tasks.own.options import TABLES
from dept_vl.tasks.own.task import CAPTIONS

ROUND = 8
"""Batches per process between two writes, if there are several processes: a write waits for all of them."""
NOT_WRITTEN = {*TABLES, ".gz", ".bz2", ".xz", ".zst", ".zip"} - {".jsonl", ".ndjson", ".json"}
"""File extensions that would promise another format than JSON Lines."""
Answers = list[tuple[int, str | None]]
"""Pairs of a row number and its answer; None if the row's image cannot be read."""


def predict(config: PredictConfig) -> list[str]:
    """Print and return the answers to `config.inputs`; with `config.own.data`, write them to a file instead.

    Raises:
        FileNotFoundError: If the adapter, its backbone or an image is missing.
        UsageError: If options are incompatible, or images or questions are missing.
    """
    disable_progress_bar()
    set_verbosity_error()
    of_table = config.own.data is not None
    if of_table and config.inputs:
        raise UsageError(f"--data names the images and questions; leave out {' '.join(config.inputs)!r:.200}")
    if not of_table and (given := config.of_tables()):
        raise UsageError(f"{', '.join(given)}: only for tables; give --data, or leave it out")
    accelerator = None
    if of_table:  # gives each process its device
        on_cpu = config.device == "cpu" or not torch.accelerator.is_available()
        accelerator = Accelerator(cpu=on_cpu)
    with waiting("loading the adapter"):
        predictor = load(
            config.adapter,
            backbone=config.backbone,
            revision=config.revision,
            task=config.task,
            device=config.device,
        )
    if accelerator is not None:
        answer_table(predictor, config, accelerator)
        accelerator.end_training()
        return []
    task = predictor.task
    images, questions = config.inputs[: task.image_count], config.inputs[task.image_count :]
    if len(images) < task.image_count or (task.asks and not questions):
        needed = [*["IMAGE"] * task.image_count, *['"QUESTION"'] * task.asks]
        raise UsageError(f"{task.name} needs {' '.join(needed)}; got {' '.join(map(repr, config.inputs))}")
    if more := [text for text in questions if names_image(text)]:
        raise UsageError(
            f"{task.name} takes {task.image_count or 'no'} image{'s' * (task.image_count > 1)}, got "
            f"{len(images) + len(more)} ({', '.join(map(repr, [*images, *more]))}); ask about further images "
            "with another command, or with --data"
        )
    answers = predictor.answer([images] if images else None, questions or [""])
    say(*answers)
    return list(answers)


def answer_table(predictor: Predictor, config: PredictConfig, accelerator: Accelerator) -> Path:
    """Answer the rows of a table that have no answer yet, and return the path of the finished file.

    Raise FileExistsError if that exists, InUseError if another process is writing it, and UsageError if no
    file is given, the table does not fit the adapter, or the partial file belongs to other inputs.
    """
    output = config.output
    if output is None or not output.name:  # an empty one is the folder `.`
        raise UsageError("--data needs --output, the file for the answers")
    if output.suffix.lower() in NOT_WRITTEN:
        raise UsageError(
            f"answers are written as JSON Lines, not compressed: expected {output.with_suffix('.jsonl')}, "
            f"found {output}"
        )
    table, collate = _read(predictor, config, accelerator)
    started, size, processes = perf_counter(), config.batch_size, accelerator.num_processes
    with _partial(output, _made_of(predictor, table), table.example_ids(), accelerator) as (file, begun):
        first, last = begun // size, math.ceil(len(table) / size)
        mine = range(first + accelerator.process_index, last, processes)
        loader = workers.load(
            _Numbered(table),
            config.num_workers,
            batch_sampler=[range(n * size, min((n + 1) * size, len(table))) for n in mine],
            collate_fn=collate,
        )
        answers, at_once, unread = _answers(predictor, table, loader), 1 if processes == 1 else ROUND, 0
        with Count("answering", len(table) - begun, show=accelerator.is_main_process) as count:
            for _ in range(math.ceil((last - first) / (processes * at_once))):
                found = [pair for batch in islice(answers, at_once) for pair in batch]
                # Some rows of the first batch may have been written before.
                pairs = [pair for pair in sorted(gather_object(found)) if pair[0] >= begun]
                unread += _write(file, table, pairs, output)
                count.add(len(pairs))
    seconds, count_now = perf_counter() - started, len(table) - begun
    say(
        f"{output}: {len(table):,} answers, {count_now:,} of them now, in {duration(seconds)}: "
        f"{count_now / seconds:,.1f} rows a second on {processes} process{'es' * (processes > 1)}"
    )
    if unread:
        say(f"warning: {unread:,} rows have no readable image and the answer null")
    return output


@waiting("reading the table")
def _read(predictor: Predictor, config: PredictConfig, accelerator: Accelerator) -> tuple[Task, Collator]:
    """Return the rows of the table as a task, and the collator for them."""
    asked, vision = predictor.task, predictor.model.backbone.vision
    task = OWN_TASK if asked.asks else CAPTIONS.name  # a task whose rows need no question
    options = DataOptions(
        task=task, own=config.own, features=config.features, features_dir=config.features_dir
    )
    with main_first(accelerator):  # the main process caches the rows for the others
        table = load_split(options, config.split).asked_by(asked)
    for note in table.notes:
        say(f"note: {note}")
    backbone, longest = predictor.model.backbone, predictor.max_source_length
    check_texts(table, config.split, backbone.tokenizer, longest, accelerator, backbone.frame)
    table = check_images(table, config.on_bad_image)
    features = None
    if vision is not None:
        features = mapped_features(vision, [(options, table.image_files())], config.features)
    collate = Collator.for_model(
        predictor.model,
        predictor.decoding.max_new_tokens,
        max_source_length=predictor.max_source_length,
        images=vision if features is None else features,
        on_bad_image=config.on_bad_image,
        device=accelerator.device,
    )
    return table, collate


class _Numbered(Dataset[Draw]):
    """Rows of a table, with the row number as example id."""

    def __init__(self, table: Task) -> None:
        self.table = table

    def __getitem__(self, row: int) -> Draw:
        return Draw(replace(self.table[row], example_id=row))


@torch.no_grad()
def _answers(predictor: Predictor, table: Task, batches: Iterable[Batch]) -> Iterator[Answers]:
    model, (options, spelled) = predictor.model, predictor.generation
    for batch in batches:
        pairs: Answers = [(int(row), None) for row in batch.skipped]
        if batch.ids:
            texts = decode(model, batch.to(model.backbone.device), options, spelled)
            # A choice keeps the spelling of the table, so it is not normalised like other answers.
            written = table.written if batch.choices else predictor.task.written
            pairs += [(int(row), written(text)) for row, text in zip(batch.ids, texts, strict=True)]
        yield pairs


def _write(file: BinaryIO | None, table: Task, pairs: Answers, output: Path) -> int:
    """Append answers to the file, and return how many are null. Without a file, do nothing."""
    if file is None:
        return 0
    lines = []
    for row, answer in pairs:
        asked = {"question": table.rows.value("question", row)} if table.asks else {}
        lines.append(
            json.dumps({"id": table.rows.value("id", row), **asked, "answer": answer}, ensure_ascii=False)
        )
    with writing(output):
        file.write("".join(f"{line}\n" for line in lines).encode())
        file.flush()
    return sum(answer is None for _, answer in pairs)


def _made_of(predictor: Predictor, table: Task) -> dict[str, str]:
    """Return checksums of the inputs that the answers depend on."""
    adapter, options = predictor.adapter, (predictor.decoding, predictor.max_source_length)
    described = None if adapter is None else (adapter.prompt, adapter.question_case, adapter.answering)
    backbone = {**describe_backbone(predictor.model.backbone), "name": None}  # it may move
    return {
        "rows": rows_content(table.rows),
        # Sizes alone would not tell two images of one size that were exchanged.
        "images": checksum(repr(file_stats(table.image_files() if table.image_count else [])).encode()),
        "adapter": exact_fingerprint({} if adapter is None else adapter.tensors, described),
        "backbone": checksum(repr(backbone).encode()),
        "decoding": f"{predictor.task.name} {checksum(repr(options).encode())}",
    }


@contextmanager
def _partial(
    output: Path, made_of: dict[str, str], ids: Sequence[ExampleId], accelerator: Accelerator
) -> Iterator[tuple[BinaryIO | None, int]]:
    """Yield the partial file (main process only) and its number of answers; on exit rename it to `output`."""
    partial, main = output.with_name(f"{output.name}.partial"), accelerator.is_main_process
    about = partial.with_name(f"{partial.name}.json")
    lock = FileLock(output.with_name(f".{output.name}.lock"), thread_local=False)

    def begin() -> int:
        output.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise InUseError(f"{output} is written by another process; wait for its end") from None
        return _begun(output, partial, about, made_of, ids)

    try:
        done = on_main(accelerator, begin)
        if not main:
            yield None, done
            return
        with writing(partial), partial.open("ab") as file:
            yield file, done
            file.flush()
            os.fsync(file.fileno())
        _check_free(output)  # another program may have written it meanwhile
        partial.replace(output)
        about.unlink()
    finally:
        if lock.is_locked:
            with suppress(OSError):
                Path(lock.lock_file).unlink()
            lock.release()


def _begun(
    output: Path, partial: Path, about: Path, made_of: dict[str, str], ids: Sequence[ExampleId]
) -> int:
    """Return the number of answers in the partial file, after removing an incomplete last line."""
    _check_free(output)
    if not partial.exists():
        with writing(about):
            write_json(about, made_of)
        return 0
    otherwise = f"remove {partial}, or choose another --output"
    if not about.exists():
        raise UsageError(f"{partial} has lost {about.name} and cannot be continued; {otherwise}")
    before = read_object(about, dict[str, str])
    changed = [name for name, digits in made_of.items() if before.get(name) != digits]
    if changed:
        raise UsageError(
            f"{partial} was started with other {' and '.join(changed)}; give the same, {otherwise}"
        )
    count = end = 0
    with partial.open("r+b") as file:
        for line in file:
            if not line.endswith(b"\n"):
                break
            if count >= len(ids) or _id_in(line) != ids[count]:
                expected = repr(ids[count]) if count < len(ids) else "no more lines"
                raise DamagedFileError(
                    f"{partial}, line {count + 1}: expected the answer of id {expected}, found "
                    f"{line[:80]!r}; {otherwise}"
                )
            count, end = count + 1, end + len(line)
        file.truncate(end)
    return count


def _check_free(output: Path) -> None:
    if os.path.lexists(output):
        raise FileExistsError(f"{output} is there already; nothing was changed. Choose another --output")


def _id_in(line: bytes) -> ExampleId | None:
    """Return the id in a line of answers; None if it is no such line."""
    try:
        found: ExampleId = parse_json(line.decode())["id"]
    except (ValueError, TypeError, KeyError):
        return None
    return found
