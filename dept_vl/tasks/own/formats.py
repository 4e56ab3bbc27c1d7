"""Readers of other data sets' files. Their records get the columns that `columns` understands.

Supported are VQA v1 and v2 and OK-VQA (questions and annotations in two files), COCO's `captions_*.json`,
Karpathy's file of COCO and Flickr, Visual7W, GQA (an object of objects), and any object with a list of
records in it (TextVQA, ST-VQA), or with one for each split. VizWiz and A-OKVQA are plain lists.
"""

import re
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

from dept_vl._utils.errors import UsageError
from dept_vl.tasks.io.records import brief
from dept_vl.tasks.own.columns import identity
from dept_vl.tasks.own.readers import (
    Numbered,
    Record,
    begins_with_list,
    json_shape,
    place,
    read_arrow,
    read_csv,
    read_json,
    read_lines,
    read_objects,
    read_parquet,
    read_record,
)

QUESTIONS, ANNOTATIONS, IMAGES = "questions", "annotations", "images"
READERS: dict[str, Callable[[Path], Numbered]] = {
    "lines": read_lines,
    "list": read_json,
    "objects": read_objects,
    "record": read_record,
}
"""Reader by shape of a JSON file."""
SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev", "eval"), "validation"),
    **dict.fromkeys(("test", "testing"), "test"),
}
"""Split names used here, by the usual names of splits."""
SPLIT_NAMES = {"restval": "train"}
"""Split names by Karpathy's names; `restval` holds further training images."""


def read_records(
    path: Path, columns: Sequence[str] = (), *, classes: Collection[str] | None = None
) -> Numbered:
    """Read the records of a file in any supported format; of Parquet only `columns`, if there are any.

    Classes in Parquet get the names that `datasets` stores, or stay numbers if one is not in `classes`.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    match path.suffix.lower():
        case ".csv" | ".tsv":
            return read_csv(path)
        case ".jsonl" | ".ndjson":
            return read_json(path) if begins_with_list(path) else read_lines(path)
        case ".parquet":
            return read_parquet(path, columns, classes=classes)
        case ".arrow":
            return read_arrow(path)
        case ".json":
            return _read_json(path)
    raise UsageError(
        f"{path}: expected a table (.json, .jsonl, .csv, .tsv, .parquet, .arrow), found {path.suffix!r}"
    )


def _read_json(path: Path) -> Numbered:
    shape, keys = json_shape(path)
    if shape in READERS:
        return READERS[shape](path)
    if all(key.lower() in SPLITS for key in keys):
        return _splits(path, keys)
    if set(keys) == {QUESTIONS, ANNOTATIONS}:
        return _joined(path, path)
    if len(keys) > 1 and set(keys) != {IMAGES, ANNOTATIONS}:
        found = ", ".join(f"{key!r:.40}" for key in keys[:10])
        raise UsageError(
            f"{path}: expected one list of rows, found {found}; only {keys[0]!r:.40} would be read. Put the "
            "lists into files of their own, or call them train, validation and test"
        )
    return _read_list(path, keys[0])


def _splits(path: Path, keys: Sequence[str]) -> Numbered:
    rows = ((key, row) for key in keys for _, row in read_json(path, key))
    for number, (key, row) in enumerate(rows, start=1):
        yield number, {**row, "split": row.get("split") or SPLITS[key.lower()]}


def _read_list(path: Path, shape: str) -> Numbered:
    if shape == QUESTIONS:
        answers = annotations_of(path)
        return _joined(path, answers) if answers is not None else read_json(path, QUESTIONS)
    first = next(read_json(path, shape), (0, {}))[1]
    if shape == IMAGES:
        if "sentences" in first:
            return ((number, _karpathy(row)) for number, row in read_json(path, IMAGES))
        if "qa_pairs" in first:
            return _visual7w(path)
        return _coco_captions(path)
    if shape == ANNOTATIONS and "caption" in first:
        return _coco_captions(path)
    return read_json(path, shape)


def annotations_of(questions: Path) -> Path | None:
    """Return the answer file that belongs to a question file, as in VQAv2; None if there is none."""
    key = _pair_key(questions.name)
    for path in sorted(questions.parent.glob("*.json")):
        if path != questions and "annotation" in path.name and _pair_key(path.name) == key:
            return path
    return None


def is_annotations(path: Path) -> bool:
    """Return whether a file holds the answers to a question file in the same folder."""
    if path.suffix != ".json" or "annotation" not in path.name:
        return False
    return any(_pair_key(other.name) == _pair_key(path.name) for other in path.parent.glob("*question*.json"))


def _pair_key(name: str) -> str:
    return re.sub(r"OpenEnded_|MultipleChoice_|questions?|annotations?|[_.-]", "", name)


def _joined(questions: Path, annotations: Path) -> Numbered:
    answers: dict[str, dict[str, Any]] = {}
    known: dict[str, str] = {}
    for number, row in read_json(annotations, ANNOTATIONS):
        where = place(annotations, number)
        question_id = identity(row.get("question_id"), f"{where}, question_id")
        if not question_id:
            raise UsageError(f"{where}: expected a question_id, found {', '.join(row)}")
        if question_id in answers:
            raise UsageError(f"{where}: the question_id {row['question_id']!r:.60} is there twice")
        given = row.get("answers", row.get("answer", row.get("multiple_choice_answer")))
        several = given if isinstance(given, list) else [] if given is None else [given]
        texts = [one.get("answer") if isinstance(one, dict) else one for one in several]
        # A few thousand answers make up most of the file; equal ones share one string.
        kept: dict[str, Any] = {
            "answers": [known.setdefault(text, text) if isinstance(text, str) else text for text in texts]
        }
        if isinstance(row.get("answer_type"), str):
            kept["answer_type"] = known.setdefault(row["answer_type"], row["answer_type"])
        answers[question_id] = kept
    unasked = dict.fromkeys(answers)
    for number, row in read_json(questions, QUESTIONS):
        question_id = identity(row.get("question_id"), f"{place(questions, number)}, question_id")
        unasked.pop(question_id, None)
        yield number, {**row, **answers.get(question_id, {})}
    _check_used(unasked, annotations, "question_id", f"question in {questions.name}")


def _karpathy(row: Record) -> Record:
    folder = f"{row['filepath']}/" if isinstance(row.get("filepath"), str) else ""
    split = row.get("split")
    return {
        "image": f"{folder}{row.get('filename')}",
        "captions": row.get("sentences"),
        "id": row.get("cocoid", row.get("imgid")),
        "split": SPLIT_NAMES.get(split, split) if isinstance(split, str) else None,
    }


def _visual7w(path: Path) -> Numbered:
    for number, row in read_json(path, IMAGES):
        pairs = row.get("qa_pairs") or []
        if not isinstance(pairs, list) or not all(isinstance(pair, dict) for pair in pairs):
            raise UsageError(
                f"{place(path, number)}: expected 'qa_pairs' to be a list of objects, found {brief(pairs)}"
            )
        for pair in pairs:
            yield (
                number,
                {
                    "image": row.get("filename"),
                    "question": pair.get("question"),
                    "answer": pair.get("answer"),
                    "multiple_choices": pair.get("multiple_choices", []),
                    "id": pair.get("qa_id"),
                    "answer_type": pair.get("type"),
                    "split": row.get("split"),
                },
            )


def _coco_captions(path: Path) -> Numbered:
    captions: dict[str, list[Any]] = {}
    for number, row in read_json(path, ANNOTATIONS):
        if "caption" not in row or "image_id" not in row:
            raise UsageError(
                f"{place(path, number)}: expected captions with image_id and caption in 'annotations', found "
                f"{', '.join(row)}"
            )
        image_id = identity(row["image_id"], f"{place(path, number)}, image_id")
        captions.setdefault(image_id, []).append(row["caption"])
    unseen = dict.fromkeys(captions)
    for number, row in read_json(path, IMAGES):
        image_id = identity(row.get("id"), f"{place(path, number)}, id")
        unseen.pop(image_id, None)
        known = captions.get(image_id, [])
        yield number, {"image": row.get("file_name"), "id": row.get("id"), "captions": known}
    _check_used(unseen, path, "image_id", f"image in {IMAGES}")


def _check_used(unused: Collection[str], path: Path, name: str, what: str) -> None:
    """Raise UsageError if ids of annotations belong to nothing."""
    if unused:
        raise UsageError(
            f"{path}: {len(unused):,} annotations have the {name} of no {what} (first: "
            f"{next(iter(unused))!r:.60}); add what is missing, or take these annotations away"
        )
