"""VQAv2 (Goyal et al. 2017) from its official files.

    v2_OpenEnded_mscoco_train2014_questions.json   {"questions": [{"question_id", "image_id", "question"}]}
    v2_mscoco_train2014_annotations.json           {"annotations": [{"question_id", "question_type",
                                                    "answer_type", "answers": [{"answer", ...} x 10]}]}
    train2014/COCO_train2014_000000000009.jpg

from https://visualqa.org/download.html. Names without `v2_` (VQA v1) are read as well. Unofficial splits
need a list in the same folder: `dataset_coco.json` (Karpathy & Fei-Fei 2015) for the Karpathy splits,
`minival.json` (LXMERT, Tan & Bansal 2019) for minival and nominival.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import pyarrow as pa

from dept_vl._utils.errors import DamagedFileError
from dept_vl._utils.io import read_json
from dept_vl._utils.options import check
from dept_vl.tasks import coco
from dept_vl.tasks.base import Example, QuestionCase, Task, most_usual
from dept_vl.tasks.coco import IMAGE_SOURCE, KARPATHY_FILE, KARPATHY_SOURCE, karpathy_split
from dept_vl.tasks.io.files import Published, check_split, find, find_folder
from dept_vl.tasks.io.predictions import ExampleId
from dept_vl.tasks.io.records import brief, read_list
from dept_vl.tasks.io.records import field as required
from dept_vl.tasks.io.rows import NO_ROWS, Rows, convert
from dept_vl.tasks.metrics.vqa import (
    Normalisation,
    listed_scores,
    normalise_answer,
    score_vqa,
    soft_scores,
    vqa_accuracy,
)

SOURCE = "https://visualqa.org/download.html"
MINIVAL_FILE = "minival.json"
MINIVAL_SOURCE = "https://nlp.cs.unc.edu/data/lxmert_data/vqa/minival.json"
ANSWER_LIST = "answer_list.json"
"""Optional file in the data folder that replaces the published answer list."""
PUBLISHED_LIST = Path(__file__).parent / "metrics" / "vqa_answers.json"
ANSWERS = 10
"""Number of human answers per question."""

SUBTYPES = {
    "train": ("train2014",),
    "val": ("val2014",),
    "trainval": ("train2014", "val2014"),
    "minival": ("val2014",),
    "nominival": ("val2014",),
    "karpathy-train": ("train2014", "val2014"),
    "karpathy-val": ("train2014", "val2014"),
    "karpathy-test": ("train2014", "val2014"),
    "test-dev": ("test-dev2015",),
    "test-std": ("test2015",),
    "test": ("test2015",),
}
"""Official files of each split. Submissions, also for test-std, cover all of test2015."""
IMAGE_SUBTYPES = {"test-dev2015": "test2015"}
ANSWERED = ("train2014", "val2014")

SCHEMA = pa.schema(
    {
        "question_id": pa.int64(),
        "image_id": pa.int64(),
        "subtype": pa.string(),
        "question": pa.string(),
        "answers": pa.list_(pa.string()),
        "answer_type": pa.string(),
        "question_type": pa.string(),
    }
)
NO_ANNOTATION: dict[str, Any] = {"answers": [], "answer_type": "", "question_type": ""}


def question_names(subtype: str) -> tuple[str, str]:
    """Return the possible names of the questions file of a subtype: version 2, then version 1."""
    name = f"OpenEnded_mscoco_{subtype}_questions.json"
    return f"v2_{name}", name


def annotation_names(subtype: str) -> tuple[str, str]:
    """Return the possible names of the annotations file of a subtype."""
    name = f"mscoco_{subtype}_annotations.json"
    return f"v2_{name}", name


def folder_names(subtype: str) -> tuple[str, ...]:
    """Return the possible folders of the images of a subtype."""
    return coco.folder_names(IMAGE_SUBTYPES.get(subtype, subtype))


def image_prefix(subtype: str) -> str:
    """Return the start of the image names of a subtype."""
    return f"COCO_{IMAGE_SUBTYPES.get(subtype, subtype)}_"


def _published(split: str, examples: int, images: int | None, answers: int | None, *lists: str) -> Published:
    subtypes = SUBTYPES[split]
    questions = [question_names(subtype) for subtype in subtypes]
    annotations = [annotation_names(subtype) for subtype in subtypes if subtype in ANSWERED]
    files = (*questions, *annotations, *((name,) for name in lists))
    return Published(files, tuple(map(folder_names, subtypes)), SOURCE, examples, images, answers)


PUBLISHED = {
    "train": _published("train", 443_757, 82_783, 4_437_570),
    "val": _published("val", 214_354, 40_504, 2_143_540),
    "minival": _published("minival", 25_994, None, 259_940, MINIVAL_FILE),
    "nominival": _published("nominival", 188_360, None, 1_883_600, MINIVAL_FILE),
    "karpathy-train": _published("karpathy-train", 605_102, None, 6_051_020, KARPATHY_FILE),
    "karpathy-val": _published("karpathy-val", 26_729, None, 267_290, KARPATHY_FILE),
    "karpathy-test": _published("karpathy-test", 26_280, None, 262_800, KARPATHY_FILE),
    "test-dev": _published("test-dev", 107_394, None, None),
    "test": _published("test", 447_793, 81_434, None),
}


@dataclass(frozen=True)
class VQAv2(Task):
    """One split of VQAv2. Accuracy is the official one, from 0 to 100, rounded to two decimals.

    Targets are the human answers with VL-T5's soft scores: 0.3, 0.6, 0.9 or 1 for an answer given by 1, 2, 3,
    or at least 4 of ten annotators. With `answer_list`, only answers in the list are used, as written.
    """

    rows: Rows = NO_ROWS
    image_folders: Mapping[str, Path] = field(default_factory=dict)
    normalisation: Normalisation = "official"
    answer_list: frozenset[str] | None = None
    question_case: QuestionCase = "lower"

    name = "vqav2"
    prefix = "vqa: "
    primary = "overall"
    marked_by = "VQA accuracy"
    image_columns: ClassVar = (("subtype", "image_id"),)
    # A floor of 9 on train and val gives almost the 3,129 published answers, see `prepare.commands`.
    has_usual_answers = True
    # Submissions cover all of test2015, also for test-dev.
    server_split = "test"
    published: ClassVar = PUBLISHED
    elsewhere: ClassVar = {
        KARPATHY_FILE: KARPATHY_SOURCE,
        MINIVAL_FILE: MINIVAL_SOURCE,
        "train2014": IMAGE_SOURCE,
        "val2014": IMAGE_SOURCE,
    }
    example_call = '"image.jpg", "what color is the cat?"'
    pipeline = "visual-question-answering"

    def read(self, root: Path, split: str) -> "VQAv2":
        """Read a split from a folder with the official files. Raises the errors of `load`."""
        check_split(split, SUBTYPES, "VQAv2")
        parts = [
            read_rows(
                find(root, question_names(subtype), "VQAv2", SOURCE),
                find(root, annotation_names(subtype), "VQAv2", SOURCE) if subtype in ANSWERED else None,
                subtype,
            )
            for subtype in SUBTYPES[split]
        ]
        rows = _listed(Rows.open([path for part in parts for path in part.files]), root, split)
        folders = {
            subtype: find_folder(root, folder_names(subtype), f"{image_prefix(subtype)}*.jpg", SOURCE)
            for subtype in SUBTYPES[split]
        }
        return replace(self, rows=rows, image_folders=folders)

    def with_published_labels(self, root: Path) -> "VQAv2":
        """Return the split with the targets of LXMERT (Tan & Bansal 2019), which VL-T5 uses too.

        These are the answers, as written, that are in the list of 3,129 published answers, or in the file
        `ANSWER_LIST` of the data folder if there is one. A question without such an answer gets weight 0.
        """
        own = root / ANSWER_LIST
        return replace(
            self, answer_list=frozenset(read_answer_list(own if own.is_file() else PUBLISHED_LIST))
        )

    def __getitem__(self, index: int) -> Example:
        row = self.rows[index]
        answers = tuple(row["answers"])
        return Example(
            example_id=row["question_id"],
            source_text=self.source(row["question"]),
            images=(self.image_path(row["subtype"], row["image_id"]),),
            targets=_targets(answers, self.answer_list),
            question=row["question"],
            answer=most_usual(answers),
            answers=answers,
            kinds=tuple(
                (name.replace("_", " "), row[name]) for name in ("answer_type", "question_type") if answers
            ),
        )

    def image_path(self, subtype: str, image_id: int) -> Path:
        """Return the file of an image."""
        return self.image_folders[subtype] / f"{image_prefix(subtype)}{image_id:012d}.jpg"

    def mark(self, example: Example, prediction: str) -> float:
        """Return the official accuracy of one prediction."""
        return vqa_accuracy(prediction, example.answers, normalisation=self.normalisation)

    def metrics(self, predictions: Mapping[ExampleId, str]) -> dict[str, float]:
        """Compute the official accuracy: `overall`, then by answer type and by question type."""
        score = score_rows(self.rows, predictions, self.normalisation)
        return {
            "overall": score["overall"],
            **{f"answer_type/{name}": value for name, value in score["perAnswerType"].items()},
            **{f"question_type/{name}": value for name, value in score["perQuestionType"].items()},
        }

    def written(self, answer: str) -> str:
        """Normalise a prediction for submission, since the scorer does not if all ten human answers agree."""
        return normalise_answer(answer)


def read_rows(questions_file: Path, annotations_file: Path | None, subtype: str = "") -> Rows:
    """Read questions and annotations, with the columns of `SCHEMA`; ValueError if their ids differ."""
    files = [path for path in (questions_file, annotations_file) if path]
    sources = [find(path.parent, (path.name,), "VQAv2", SOURCE) for path in files]
    records = _records(questions_file, annotations_file, subtype)
    return convert(f"vqav2-{subtype}", sources, SCHEMA, records, unique="question_id")


def score_rows(
    rows: Rows, predictions: Mapping[ExampleId, str], normalisation: Normalisation
) -> dict[str, Any]:
    """Return the official scores of predictions, compared as written."""
    records = (
        (
            vqa_accuracy(predictions[row["question_id"]], row["answers"], normalisation=normalisation),
            row["answer_type"],
            row["question_type"],
        )
        for row in rows
    )
    return score_vqa(records)


@lru_cache(maxsize=100_000)
def _targets(
    answers: tuple[str, ...], answer_list: frozenset[str] | None = None
) -> tuple[tuple[str, float], ...]:
    if not answers:
        return ()
    if answer_list is not None:
        return tuple(listed_scores(answers, answer_list).items()) or ((most_usual(answers), 0.0),)
    # Normalisation removes "a" as an article, even as the answer to "what letter is it?".
    scores = soft_scores(answers) or {most_usual(answers): 1.0}
    return tuple(scores.items())


def _records(questions_file: Path, annotations_file: Path | None, subtype: str) -> Iterator[dict[str, Any]]:
    annotations: dict[int, dict[str, Any]] = {}
    for question_id, annotation in _annotations(annotations_file) if annotations_file else ():
        if question_id in annotations:
            raise ValueError(f"{annotations_file}: question_id {question_id} is there more than once")
        annotations[question_id] = annotation
    asked: set[int] = set()
    unanswered: list[int] = []
    for row in read_list(questions_file, "questions", SOURCE):
        where = f"{questions_file}, question {brief(row.get('question_id'))}"
        question_id = required(row, "question_id", int, where)
        if annotations_file and question_id not in annotations:
            unanswered.append(question_id)
            continue
        asked.add(question_id)
        yield {
            "question_id": question_id,
            "image_id": required(row, "image_id", int, where),
            "subtype": subtype,
            "question": required(row, "question", str, where),
            **annotations.get(question_id, NO_ANNOTATION),
        }
    unasked = sorted(annotations.keys() - asked)
    if annotations_file and (unanswered or unasked):
        raise ValueError(
            f"{questions_file.name} and {annotations_file.name} in {questions_file.parent} do not belong "
            f"together: {len(unanswered)} questions without an annotation (first: {unanswered[:3]}), "
            f"{len(unasked)} annotations without a question (first: {unasked[:3]})"
        )


def _annotations(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    # A few thousand answers make up most of the file; equal ones share one string.
    known: dict[str, str] = {}
    for row in read_list(path, "annotations", SOURCE):
        where = f"{path}, question {brief(row.get('question_id'))}"
        question_id = required(row, "question_id", int, where)
        answers = required(row, "answers", list, where)
        if len(answers) != ANSWERS:
            raise ValueError(
                f"{where}: expected {ANSWERS} human answers, found {len(answers)}; --data FILE reads "
                "questions of your own, with any number of answers"
            )
        texts = []
        for answer in answers:
            if not isinstance(answer, dict):
                raise ValueError(f"{where}: expected each answer to be an object, found {brief(answer)}")
            text = required(answer, "answer", str, where)
            texts.append(known.setdefault(text, text))
        types = {name: required(row, name, str, where) for name in ("answer_type", "question_type")}
        yield question_id, {"answers": texts, **{k: known.setdefault(v, v) for k, v in types.items()}}


def _listed(rows: Rows, root: Path, split: str) -> Rows:
    """Return the questions that the list of an unofficial split names; all questions of an official split."""
    if split.startswith("karpathy-"):
        path = find(root, (KARPATHY_FILE,), "Karpathy's splits of COCO", KARPATHY_SOURCE)
        listed = rows.where("image_id", karpathy_split(path, split.removeprefix("karpathy-")))
    elif split in ("minival", "nominival"):
        path = find(root, (MINIVAL_FILE,), "LXMERT's minival", MINIVAL_SOURCE)
        ids = [
            required(row, "question_id", int, f"{path}, entry {number}")
            for number, row in enumerate(read_list(path, "", MINIVAL_SOURCE))
        ]
        listed = rows.where("question_id", ids, keep=split == "minival")
    else:
        return rows
    if not len(listed):
        raise ValueError(
            f"{path}: expected it to leave questions of {', '.join(SUBTYPES[split])} for the split "
            f"{split!r}, found none of {len(rows):,}; is it the list of another data set?"
        )
    return listed


def read_answer_list(path: Path) -> list[str]:
    """Read a JSON list of answers, or the published list with its source; DamagedFileError otherwise."""
    content = read_json(path)
    answers = content.get("answers") if isinstance(content, dict) else content
    try:
        found: list[str] = check(answers, list[str])
    except ValueError as error:
        raise DamagedFileError(f"{path} is not a list of answers: {error}") from None
    return found


TASK = VQAv2()
