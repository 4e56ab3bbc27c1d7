"""GQA (Hudson & Manning 2019) from its official files.

    val_balanced_questions.json   {"05515938": {"imageId": "2405722", "question", "answer", "isBalanced",
                                  "groups": {"global"}, "entailed": [...], "types": {"structural", ...},
                                  "semantic": [...], ...}, ...}
    images/2405722.jpg
    eval/val_choices.json         {"05515938": {"valid": [...], "plausible": [...]}}, if there

from https://cs.stanford.edu/people/dorarad/gqa/download.html. The questions of `train_all` come in ten
parts in the folder `train_all_questions`.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import pyarrow as pa

from dept_vl._utils.images import confined
from dept_vl.tasks.base import Example, QuestionCase, Task
from dept_vl.tasks.io.files import Published, check_split, find, find_folder
from dept_vl.tasks.io.predictions import ExampleId, PredictionFormat
from dept_vl.tasks.io.records import brief, field, read_mapping, same_as_first
from dept_vl.tasks.io.rows import NO_ROWS, Rows, convert
from dept_vl.tasks.metrics.gqa import Figures, GqaQuestion, score_gqa

SOURCE = "https://cs.stanford.edu/people/dorarad/gqa/download.html"
FOLDERS = ("images", "allImages/images")
Choices = Mapping[str, Mapping[str, Sequence[str]]]

SHORT = {name: f"{name}_balanced" for name in ("train", "val", "testdev", "test")}
"""Short names of splits: `val` is `val_balanced`, on which accuracy is reported, and so on."""
SPLITS = (
    *(f"{name}_{kind}" for name in ("train", "val", "testdev", "test") for kind in ("balanced", "all")),
    *("challenge_balanced", "challenge_all", "submission_all"),
)
JOINED = {
    "trainval": ("train_balanced", "val_balanced"),
    "trainval_balanced": ("train_balanced", "val_balanced"),
    "trainval_all": ("train_all", "val_all"),
}
"""Splits that join two official ones; VL-T5 and VL-Adapter train on the balanced one."""

SCHEMA = pa.schema(
    {
        "question_id": pa.string(),
        "image_id": pa.string(),
        "question": pa.string(),
        "answers": pa.list_(pa.string()),
        "is_balanced": pa.bool_(),
        "group": pa.string(),
        "entailed": pa.list_(pa.string()),
        "structural": pa.string(),
        "semantic": pa.string(),
        "detailed": pa.string(),
        "steps": pa.int32(),
    }
)
PARTS = {"train_all": 10}
"""Splits that are a folder of numbered files, with the number of files."""

_SCORED = tuple(f.name for f in fields(GqaQuestion) if f.name != "answer")


def _names(split: str) -> tuple[str, ...]:
    return f"{split}_questions.json", f"questions/{split}_questions.json"


PUBLISHED = {
    split: Published((_names(split),), (FOLDERS,), SOURCE, count, None, answers)
    for split, count, answers in (
        ("train_balanced", 943_000, 943_000),
        ("val_balanced", 132_062, 132_062),
        ("testdev_balanced", 12_578, 12_578),
    )
}


@dataclass(frozen=True)
class GQA(Task):
    """One split of GQA. Metrics are the official ones in percent; for `distribution` lower is better.

    `rows` has the columns of `SCHEMA`. Without a `choices_file`, validity and plausibility are left out.
    """

    rows: Rows = NO_ROWS
    image_folder: Path = Path()
    choices_file: Path | None = None
    question_case: QuestionCase = "lower"

    name = "gqa"
    prefix = "gqa: "
    image_columns: ClassVar = (("image_id",),)
    scales: ClassVar = {"distribution": "lower is better"}
    prediction_format = PredictionFormat("questionId", "prediction", "str")
    dev_split = "val"
    test_split = "testdev"
    server_split = "submission_all"
    published: ClassVar = PUBLISHED
    example_call = '"image.jpg", "is there a dog to the left of the car?"'
    pipeline = "visual-question-answering"

    def read(self, root: Path, split: str) -> "GQA":
        """Read a split from a folder with the official files. Raises the errors of `load`."""
        split = SHORT.get(split, split)
        check_split(split, (*SHORT, *JOINED, *SPLITS), "GQA")
        choices = f"{split.split('_')[0]}_choices.json"
        choices_file = next((p for p in (root / "eval" / choices, root / choices) if p.is_file()), None)
        paths = [path for part in JOINED.get(split, (split,)) for path in question_files(root, part)]
        rows = Rows.open([file for path in paths for file in read_rows(path).files])
        folder = find_folder(root, FOLDERS, "<imageId>.jpg", SOURCE)
        return replace(self, rows=rows, image_folder=folder, choices_file=choices_file)

    def __getitem__(self, index: int) -> Example:
        row = self.rows[index]
        return Example(
            example_id=row["question_id"],
            source_text=self.source(row["question"]),
            images=(self.image_path(row["image_id"]),),
            targets=tuple((answer, 1.0) for answer in row["answers"]),
            question=row["question"],
            answer="".join(row["answers"]),
            answers=tuple(row["answers"]),
            # Only balanced questions are scored.
            kinds=tuple(
                (f"{name} type", row[name])
                for name in ("structural", "semantic")
                if row["answers"] and row["is_balanced"]
            ),
        )

    def image_path(self, image_id: str) -> Path:
        """Return the file of an image."""
        return self.image_folder / f"{image_id}.jpg"

    def metrics(self, predictions: Mapping[ExampleId, str]) -> dict[str, float]:
        """Compute accuracy, binary, open, distribution; with a choices file validity and plausibility.

        Consistency needs the entailed questions too, so it is only computed for complete `all` splits.
        """
        choices = None if self.choices_file is None else read_choices(self.choices_file)
        score = score_rows(self.rows, {str(key): value for key, value in predictions.items()}, choices)
        return {name: value for name, value in score.items() if isinstance(value, float)}

    def written(self, answer: str) -> str:
        """Return a decoded prediction in lower case, like the gold answers."""
        return answer.strip().lower()


def question_files(root: Path, split: str) -> list[Path]:
    """Return the file or files of a split; raise FileNotFoundError if one is missing."""
    for folder in (root / f"{split}_questions", root / "questions" / f"{split}_questions"):
        if split not in PARTS or not folder.is_dir():
            continue
        parts = [folder / f"{split}_questions_{number}.json" for number in range(PARTS[split])]
        missing = [path.name for path in parts if not path.is_file()]
        if missing:
            raise FileNotFoundError(
                f"expected the {len(parts)} parts of GQA's {split} in {folder}, found "
                f"{len(parts) - len(missing)}; missing: {', '.join(missing)}; they are published at {SOURCE}"
            )
        return parts
    return [find(root, _names(split), "GQA", SOURCE)]


def read_rows(path: Path) -> Rows:
    """Read a file of questions, with the columns of `SCHEMA`. Questions of test splits have no answers."""
    sources = [find(path.parent, (path.name,), "GQA", SOURCE)]
    return convert(f"gqa-{path.stem}", sources, SCHEMA, _records(path), unique="question_id")


def score_rows(rows: Rows, predictions: Mapping[str, str], choices: Choices | None) -> Figures:
    """Return the official scores of predictions, compared as written; consistency if it is possible."""
    questions = {
        row["question_id"]: GqaQuestion(
            answer="".join(row["answers"]), **{name: row[name] for name in _SCORED}
        )
        for row in rows
    }
    # The official scorer needs every entailed question, and a prediction for every question.
    balanced = [question for question in questions.values() if question.is_balanced]
    consistency = (
        any(other != question.question_id for question in balanced for other in question.entailed)
        and all(other in questions for question in balanced for other in question.entailed)
        and all(question_id in predictions for question_id in questions)
    )
    return score_gqa(questions, predictions, choices, consistency=consistency)


def read_choices(path: Path) -> Choices:
    """Read valid and plausible answers by question id; the last file read is cached until it changes."""
    return _choices(path, path.stat().st_mtime_ns if path.exists() else 0)


@lru_cache(maxsize=1)
def _choices(path: Path, changed: int) -> Choices:
    content: dict[str, Any] = {}
    known: dict[str, tuple[str, ...]] = {}
    for question_id, record in read_mapping(path, SOURCE):
        where = f"{path}, question {question_id!r:.60}"
        answers = {kind: tuple(field(record, kind, list, where)) for kind in ("valid", "plausible")}
        other = [one for values in answers.values() for one in values if not isinstance(one, str)]
        if other:
            raise ValueError(f"{where}: expected answers of text, found {brief(other[0])}")
        # Most lists are repeated; equal ones share one tuple.
        content[question_id] = {
            kind: known.setdefault(json.dumps(values), values) for kind, values in answers.items()
        }
    return content


def _records(path: Path) -> Iterator[dict[str, Any]]:
    answered: bool | None = None
    for question_id, record in read_mapping(path, SOURCE):
        where = f"{path}, question {question_id!r:.60}"
        answered = same_as_first("answer" in record, answered, "an answer", where)
        text = field(record, "question", str, where)
        balanced = bool(record.get("isBalanced", True))
        question = GqaQuestion(question_id, text, "", balanced, None, (), "", "", "", 0)
        if answered:
            try:
                question = GqaQuestion.from_record(question_id, record)
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from None
        yield {
            **{name: getattr(question, name) for name in _SCORED},
            "image_id": confined(field(record, "imageId", str, where), f"{where}, imageId"),
            "answers": [question.answer] if answered else [],
        }


TASK = GQA()
