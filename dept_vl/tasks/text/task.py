"""Text tasks: the model reads a text without images and generates the answer.

`text.table` defines the tasks and `text.source` reads their data, which are converted once to the columns of
`SCHEMA`. `id` is the index of the row in the published split, and equals GLUE's `idx`.
"""

import hashlib
import re
import string
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from dept_vl.tasks.base import Decoding, Example, Task, data_folder
from dept_vl.tasks.io.files import check_split
from dept_vl.tasks.io.predictions import ExampleId, PredictionFormat
from dept_vl.tasks.io.rows import NO_ROWS, Indices, Rows, convert
from dept_vl.tasks.metrics.text import squad
from dept_vl.tasks.text.source import Source, check_columns, open_source
from dept_vl.tasks.text.table import TEXT_TASKS, Answered, Part, TextSpec
from dept_vl.tasks.text.table import number as read_number

SCHEMA = pa.schema(
    {"id": pa.int64(), "source_text": pa.string(), "answers": pa.list_(pa.string()), "group": pa.string()}
)
UNLABELLED = (None, "", -1, "-1")
"""Values of a label that is not published."""
FAR = 5
"""Difference between the smallest and the largest number that can be an answer (stsb)."""
DRAWING_SEED = 42
"""Random seed for drawing held-out examples, as in the literature."""
SHORT = {"dev": "validation", "val": "validation"}


@dataclass(frozen=True)
class TextTask(Task):
    """One split of a text task in `TEXT_TASKS`. `rows` has the columns of `SCHEMA`."""

    name: str
    rows: Rows = NO_ROWS

    image_count = 0
    max_source_length = 256
    id_column = "id"
    source_column = "source_text"
    prediction_format = PredictionFormat("id", "prediction", "int")
    dev_split = "validation"
    test_split = "test"
    example_call = '"..."'

    def load(self, root: Path | None = None, split: str = "") -> "TextTask":
        """Read a split, like `Task.load`; from the Hub without `root` and without a folder `data/NAME`."""
        folder = data_folder(self.name, root)
        return self.read(None if root is None and not folder.is_dir() else folder, split or self.train_split)

    def read(self, root: Path | None, split: str) -> "TextTask":
        """Read a split of `text.table` from a folder with a copy of the data set; None is the Hub."""
        name, spec = self.name, self.spec
        split = SHORT.get(split, split)
        check_split(split, spec.splits, name)
        part = spec.splits[split]
        whole = read_rows(name, root, part.split)
        rows = whole if part.side == "all" else whole.subset(choose(len(whole), part))
        if not len(rows):
            raise ValueError(
                f"the {split} split of {name} is empty: it is taken from the published split {part.split!r}, "
                f"which has only {len(whole)} examples here"
            )
        return replace(self, rows=rows)

    @property
    def spec(self) -> TextSpec:
        """Definition of the task."""
        return TEXT_TASKS[self.name]

    @property
    def primary(self) -> str:  # type: ignore[override]  # never assigned
        """Primary metric, reported in papers."""
        return self.spec.primary

    @property
    def marked_by(self) -> str:  # type: ignore[override]  # never assigned
        """Name of the measure that `mark` returns: correct class, distance of numbers, or word F1."""
        if self.spec.words:
            return "right or wrong"
        return "word F1" if self.spec.answer is None else f"1 - distance / {FAR}"

    @property
    def decoding(self) -> Decoding:  # type: ignore[override]  # never assigned
        """Greedy decoding, among the class names if there are classes."""
        return Decoding(self.spec.max_new_tokens, candidates=tuple(self.spec.words.values()))

    @property
    def pipeline(self) -> str:  # type: ignore[override]  # never assigned
        """Pipeline tag of the task on the Hugging Face Hub."""
        return "text-classification" if self.spec.words else "question-answering"

    def __getitem__(self, index: int) -> Example:
        row = self.rows[index]
        answer = row["answers"][0] if row["answers"] else ""
        return Example(
            example_id=row["id"],
            source_text=row["source_text"],
            images=(),
            targets=((answer, 1.0),) if row["answers"] else (),
            question=row["source_text"],
            answer=answer,
            answers=tuple(row["answers"]),
            kinds=(("class", answer),) if answer and self.spec.words else (),
        )

    def source(self, question: str) -> str:
        """Return a text in the task's template; for a single column its value is enough; else ValueError."""
        text, names = " ".join(question.split()), _fields(self.spec.text)
        form = "(.+)".join(re.escape(part) for part in re.split(r"\{\w+\}", self.spec.text))
        if not re.fullmatch(form, text) and len(names) == 1:
            text = self.spec.text.format_map({names[0]: text})
        if not re.fullmatch(form, text):
            raise ValueError(
                f"{self.name} reads {self.spec.text!r}; write the text like that, not {text!r:.80}"
            )
        return text

    def mark(self, example: Example, prediction: str) -> float:
        """Return a score from 0 to 1 for one prediction; 0 if a number is expected and there is none."""
        if self.spec.words:
            return float(prediction == example.answer)
        if self.spec.answer is None:
            return squad([prediction], [example.answers])["f1"] / 100
        found = read_number(prediction)
        return 0.0 if found < 0 else max(0.0, 1 - abs(found - float(example.answer)) / FAR)

    def metrics(self, predictions: Mapping[ExampleId, str]) -> dict[str, float]:
        """Compute the metrics in percent, with the primary metric first."""
        said = [predictions[key] for key in self.example_ids()]
        answers, groups = (self.rows.column(name).to_pylist() for name in ("answers", "group"))
        return self.spec.score(Answered(said, answers, groups, tuple(self.spec.words.values())))


def choose(count: int, part: Part) -> Indices:
    """Return the indices of a part of `count` rows, in ascending order."""
    import torch  # not needed for scoring only

    order = torch.randperm(count, generator=torch.Generator().manual_seed(DRAWING_SEED))
    drawn = min(part.size, count // 10) if part.size else count // 2
    side = order[:drawn] if part.side == "drawn" else order[drawn:]
    chosen: Indices = side.sort().values.numpy()
    return chosen


def read_rows(name: str, folder: Path | None, split: str) -> Rows:
    """Read a published split, converted once to `SCHEMA`."""
    spec = TEXT_TASKS[name]
    wanted = (spec.only[0],) if spec.only else ()
    source = open_source(spec, folder, split, columns(spec), wanted)
    if not source.files:  # a data set in memory
        return Rows.of(list(_records(spec, source)), SCHEMA)
    # The name depends on the definition too, since tasks share files (MRQA).
    made_by = repr(
        (
            spec.text,
            spec.label,
            sorted(spec.words.items()),
            spec.group,
            spec.only,
            "class names that the task has",
        )
    )
    title = f"{name}-{split}-{hashlib.sha256(made_by.encode()).hexdigest()[:8]}"
    return convert(title, source.files, SCHEMA, _records(spec, source), unique="id")


def columns(spec: TextSpec) -> tuple[str, ...]:
    """Return the columns that a task requires."""
    return tuple(dict.fromkeys((*_fields(spec.text), *_fields(spec.group), *spec.columns, spec.label)))


def _fields(template: str) -> list[str]:
    """Return the columns in a template, such as `idx` for `{idx[question]}`."""
    return [name.split("[")[0] for _, name, _, _ in string.Formatter().parse(template) if name]


def _records(spec: TextSpec, source: Source) -> Iterator[dict[str, Any]]:
    needed, texts = columns(spec), _fields(spec.text)
    for number, row in enumerate(source.rows):
        if spec.only and row.get(spec.only[0], spec.only[1]) != spec.only[1]:
            continue
        where = f"{source.place}, row {number}"
        check_columns(where, needed, list(row))
        if not all(row[name] is None or isinstance(row[name], str) for name in texts):
            shown = ", ".join(f"{row[name]!r:.40}" for name in texts)
            raise ValueError(f"{where}: expected text in {', '.join(texts)}, found {shown}")
        row = {**row, **{name: row[name] or "" for name in texts}}
        if not any(row[name].strip() for name in texts):
            raise ValueError(f"{where}: expected text in {', '.join(texts)}, found nothing")
        try:
            row = spec.prepare(row)
            yield {
                "id": number,
                # Single spaces between words, as T5's tokenizer produces anyway.
                "source_text": " ".join(spec.text.format_map(row).split()),
                "answers": read_answers(spec, row[spec.label]),
                "group": spec.group.format_map(row),
            }
        except (AttributeError, TypeError, KeyError, ValueError) as error:
            raise ValueError(f"{where}: {error}") from None


def read_answers(spec: TextSpec, label: Any) -> list[str]:
    """Return the correct answers: class name, number as text, or all listed; ValueError for other labels."""
    if isinstance(label, list) and not spec.words and spec.answer is None:
        if not all(isinstance(answer, str) for answer in label):
            raise ValueError(f"expected {spec.label} to be a list of texts, found {label!r:.80}")
        return label
    if isinstance(label, (str, int, float)) or label is None:
        if label in UNLABELLED:
            return []
        if spec.answer is not None:
            return [spec.answer(label)]
        if str(label) in spec.words:
            return [spec.words[str(label)]]
        if str(label) in spec.words.values():
            return [str(label)]
    expected = ", ".join(f"{key} ({word})" for key, word in spec.words.items()) or "a list of answers"
    raise ValueError(f"expected {spec.label} to be {expected}, found {label!r:.80}")


def __getattr__(name: str) -> TextTask:
    """Return the blank task of a name, for the registry."""
    if name not in TEXT_TASKS:
        raise AttributeError(name)
    return TextTask(name)
