"""VQAv2 (Goyal et al. 2017) from its official files.

    v2_OpenEnded_mscoco_train2014_questions.json   {"questions": [{"question_id", "image_id", "question"}]}
    v2_mscoco_train2014_annotations.json           {"annotations": [{"question_id", "question_type",
                                                    "answer_type", "answers": [{"answer", ...} x 10]}]}
    train2014/COCO_train2014_000000000009.jpg

from https://visualqa.org/download.html. Names without `v2_` (VQA v1) are read as well.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from dept_vl.metrics.vqa import (
    Normalisation,
    normalise_answer,
    score_vqa,
    soft_scores,
    vqa_accuracy,
)
from dept_vl.tasks.example import Example, ExampleId, check_predictions

SOURCE = "https://visualqa.org/download.html"
SUBTYPES = {
    "train": "train2014",
    "val": "val2014",
    "test-dev": "test-dev2015",
    "test": "test2015",
}
"""The official name of each split's files; test-dev's images are those of test."""
IMAGE_SUBTYPES = {"test-dev2015": "test2015"}


@dataclass(frozen=True)
class Question:
    """A row of the questions file with its row of the annotations file, if there is one."""

    question_id: int
    image: Path
    text: str
    answers: tuple[str, ...] = ()
    answer_type: str = ""
    question_type: str = ""


@dataclass(frozen=True)
class VQAv2:
    """One split. Accuracy is the official one, 0 to 100, rounded to two decimals.

    Training targets are the human answers with their soft scores (VL-T5): 0.3, 0.6, 0.9 or 1 for
    an answer given by 1, 2, 3 or more of the ten.
    """

    questions: tuple[Question, ...]
    normalisation: Normalisation = "official"
    name: str = "vqav2"
    primary: str = "overall"
    max_new_tokens: int = 10
    prefix: str = "vqa: "

    @classmethod
    def load(cls, root: str | Path, split: str, normalisation: Normalisation = "official") -> "VQAv2":
        """Read a split from a folder that holds the official files.

        Raises:
            FileNotFoundError: If a questions, annotations or image file is missing.
            ValueError: If the split is unknown or the files do not belong together.
        """
        root = Path(root)
        if split not in SUBTYPES:
            raise ValueError(f"VQAv2 has the splits {', '.join(SUBTYPES)}; got {split!r}")
        subtype = SUBTYPES[split]
        questions_file = _find(root, f"OpenEnded_mscoco_{subtype}_questions.json")
        rows = _read_rows(questions_file, "questions")
        _check_distinct(questions_file, rows)
        annotations: dict[int, dict[str, Any]] = {}
        if split in ("train", "val"):
            annotations_file = _find(root, f"mscoco_{subtype}_annotations.json")
            annotations = {row["question_id"]: row for row in _read_rows(annotations_file, "annotations")}
            _check_pairing(questions_file, rows, annotations_file, annotations)
        images = _find_images(root, IMAGE_SUBTYPES.get(subtype, subtype), rows)
        questions = []
        for row in rows:
            question = Question(row["question_id"], images[row["image_id"]], row["question"])
            annotation = annotations.get(question.question_id)
            if annotation is not None:
                question = replace(
                    question,
                    answers=tuple(answer["answer"] for answer in annotation["answers"]),
                    answer_type=annotation["answer_type"],
                    question_type=annotation["question_type"],
                )
            questions.append(question)
        return cls(tuple(questions), normalisation)

    def __len__(self) -> int:
        return len(self.questions)

    def __getitem__(self, index: int) -> Example:
        question = self.questions[index]
        return Example(
            example_id=question.question_id,
            source_text=self.prefix + question.text.lower().strip(),
            images=(question.image,),
            targets=_targets(question.answers),
            question=question.text,
            answer=Counter(question.answers).most_common(1)[0][0] if question.answers else "",
        )

    def images(self, index: int) -> tuple[Path, ...]:
        """The question's image."""
        return (self.questions[index].image,)

    def subset(self, indices: Sequence[int]) -> "VQAv2":
        """These questions alone."""
        return replace(self, questions=tuple(self.questions[index] for index in indices))

    def score(self, predictions: Mapping[ExampleId, str]) -> dict[str, float]:
        """Official accuracy: `overall`, then per answer type and per question type.

        Answers are written as the official scorer's normalisation leaves them, because it compares
        raw wherever the ten humans agree. Empty for the test splits, whose answers are not published.
        """
        check_predictions([question.question_id for question in self.questions], predictions)
        if not any(question.answers for question in self.questions):
            return {}
        score = score_vqa(
            (
                (
                    vqa_accuracy(
                        self.written(predictions[question.question_id]),
                        question.answers,
                        normalisation=self.normalisation,
                    ),
                    question.answer_type,
                    question.question_type,
                )
                for question in self.questions
            ),
            self.normalisation,
        )
        return {
            "overall": score.overall,
            **{f"answer_type/{name}": value for name, value in score.per_answer_type.items()},
            **{f"question_type/{name}": value for name, value in score.per_question_type.items()},
        }

    def written(self, answer: str) -> str:
        """A decoded answer as it goes into a submission file."""
        return normalise_answer(answer)


@lru_cache(maxsize=100_000)
def _targets(answers: tuple[str, ...]) -> tuple[tuple[str, float], ...]:
    if not answers:
        return ()
    # "a", the answer to "what letter is it?", is an article to the scorer, which leaves nothing of it.
    scores = soft_scores(answers) or {Counter(answers).most_common(1)[0][0]: 1.0}
    return tuple(scores.items())


def _find(root: Path, name: str) -> Path:
    candidates = [root / f"v2_{name}", root / name]
    for path in candidates:
        if path.is_file():
            return path
    raise FileNotFoundError(
        f"VQAv2 file not found: expected {candidates[0].name} (or {name}) in {root}; "
        f"it is published at {SOURCE}"
    )


def _read_rows(path: Path, key: str) -> list[dict[str, Any]]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}); download it again from {SOURCE}") from None
    rows = content.get(key) if isinstance(content, dict) else None
    if not isinstance(rows, list) or not rows:
        raise ValueError(f"{path}: expected a non-empty list under {key!r}; is it another file renamed?")
    return rows


def _check_distinct(questions_file: Path, rows: list[dict[str, Any]]) -> None:
    for question_id, count in Counter(row["question_id"] for row in rows).items():
        if count > 1:
            raise ValueError(f"{questions_file}: question_id {question_id} stands there more than once")


def _check_pairing(
    questions_file: Path,
    rows: list[dict[str, Any]],
    annotations_file: Path,
    annotations: Mapping[int, object],
) -> None:
    asked = {row["question_id"] for row in rows}
    unanswered, unasked = sorted(asked - annotations.keys()), sorted(annotations.keys() - asked)
    if unanswered or unasked:
        raise ValueError(
            f"{questions_file.name} and {annotations_file.name} in {questions_file.parent} do not belong "
            f"together: {len(unanswered)} questions without an annotation (first: {unanswered[:3]}), "
            f"{len(unasked)} annotations without a question (first: {unasked[:3]})"
        )


def _find_images(root: Path, subtype: str, rows: list[dict[str, Any]]) -> dict[int, Path]:
    """The file of every image id, looked up in one listing of the folder."""
    folders = [root / subtype, root / "images" / subtype, root / "Images" / "mscoco" / subtype]
    folder = next((path for path in folders if path.is_dir()), None)
    if folder is None:
        raise FileNotFoundError(
            f"no image folder for {subtype}: expected {folders[0]} with COCO_{subtype}_*.jpg; "
            f"the images are published at {SOURCE}"
        )
    present = {path.name for path in folder.iterdir()}
    names = {row["image_id"]: f"COCO_{subtype}_{row['image_id']:012d}.jpg" for row in rows}
    missing = [name for name in names.values() if name not in present]
    if missing:
        raise FileNotFoundError(
            f"{len(missing)} of {len(names)} images are missing from {folder} (first: {missing[:3]}); "
            f"they are published at {SOURCE}"
        )
    return {image_id: folder / name for image_id, name in names.items()}
