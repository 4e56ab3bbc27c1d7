"""A VQA data set of a few questions in the official format, for the tests that read one."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from dept_vl.tasks.io.rows import Rows
from dept_vl.tasks.vqav2 import IMAGE_SUBTYPES, SCHEMA, VQAv2

SUBTYPES = ("train2014", "val2014", "test2015", "test-dev2015")
COLOURS = {
    "red": (220, 20, 20),
    "green": (20, 220, 20),
    "blue": (20, 20, 220),
    "yellow": (220, 220, 20),
    "purple": (150, 20, 150),
    "white": (250, 250, 250),
}
"""Images are filled with these, one after the other."""

ASKED = (
    ("What colour is the shape?", "other", "what colour"),
    ("Is there a red circle?", "yes/no", "is there a"),
    ("How many shapes are there?", "number", "how many"),
)
"""Text, answer type and question type of an image's questions."""


def questions_path(root: Path, subtype: str = "train2014", version: str = "v2_") -> Path:
    return root / f"{version}OpenEnded_mscoco_{subtype}_questions.json"


def annotations_path(root: Path, subtype: str = "train2014", version: str = "v2_") -> Path:
    return root / f"{version}mscoco_{subtype}_annotations.json"


def write_vqa(
    root: Path,
    *,
    images: int = 4,
    subtypes: Sequence[str] = ("train2014", "val2014"),
    version: str = "v2_",
    layout: str = "",
) -> Path:
    """Write the official files: three questions an image, ten answers each, no answers to test.

    Args:
        root: Folder to write.
        images: Images of each split, each one colour; a split's image ids start at 1000 times its
            place in `SUBTYPES`, question ids are ten times the image id and up.
        subtypes: Splits by their official names.
        version: What the names of the JSON files start with.
        layout: Folder between the root and the image folders.
    """
    root.mkdir(parents=True, exist_ok=True)
    for subtype in subtypes:
        pictures = IMAGE_SUBTYPES.get(subtype, subtype)
        folder = root / layout / pictures
        folder.mkdir(parents=True, exist_ok=True)
        questions, annotations = [], []
        for number in range(images):
            image_id = 1000 * SUBTYPES.index(pictures) + number
            colour, pixel = list(COLOURS.items())[number % len(COLOURS)]
            Image.new("RGB", (36, 32), pixel).save(folder / f"COCO_{pictures}_{image_id:012d}.jpg")
            for place, (text, answer_type, question_type) in enumerate(ASKED):
                ids = {"question_id": 10 * image_id + place, "image_id": image_id}
                usual = (colour, "yes" if colour == "red" else "no", str(1 + number % 2))[place]
                given = [usual] * 7 + ["two", "two", "Blue."]
                questions.append({**ids, "question": text})
                annotations.append(
                    {
                        **ids,
                        "question_type": question_type,
                        "answer_type": answer_type,
                        "multiple_choice_answer": usual,
                        "answers": [
                            {"answer": answer, "answer_confidence": "yes", "answer_id": annotator}
                            for annotator, answer in enumerate(given, 1)
                        ],
                    }
                )
        write_rows(questions_path(root, subtype, version), "questions", questions)
        if subtype in ("train2014", "val2014"):
            write_rows(annotations_path(root, subtype, version), "annotations", annotations)
    return root


def write_rows(path: Path, key: str, rows: Sequence[Any]) -> None:
    path.write_text(json.dumps({"info": {}, "license": {}, key: list(rows)}))


def read_rows(path: Path, key: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads(path.read_text())[key]
    return rows


def task_of(*answers: Sequence[str], root: Path = Path(), images: Sequence[int] | None = None) -> VQAv2:
    """A task in memory: question n has the id n, the n-th answers and image n, or the n-th of `images`."""
    rows = [
        vqa_row(number, given, image_id=images[number] if images else number)
        for number, given in enumerate(answers)
    ]
    return VQAv2(Rows.of(rows, SCHEMA), {"train2014": root})


def vqa_row(question_id: int, answers: Sequence[str], **others: Any) -> dict[str, Any]:
    """A row of VQAv2."""
    return {
        "question_id": question_id,
        "image_id": question_id,
        "subtype": "train2014",
        "question": f"what is {question_id}?",
        "answers": list(answers),
        "answer_type": "other",
        "question_type": "what is",
        **others,
    }
