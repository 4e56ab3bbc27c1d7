"""Convert easy-VQA, a small synthetic data set, to the files of VQAv2 and the image names of COCO.

easy-VQA (Victor Zhou, MIT licence, https://github.com/vzhou842/easy-VQA) is 64 x 64 pictures of one coloured
shape and templated questions about it, shipped whole in the Python package `easy-vqa`: 4,000 + 1,000 images,
38,575 + 9,673 questions, 13 answers. `easy_vqa.md` lists what is changed.
"""

import json
import shutil
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from dept_vl._utils.images import FULL_CHROMA, JPEG_QUALITY
from dept_vl._utils.printable import say
from dept_vl.tasks.prepare.staging import staging_for
from dept_vl.tasks.vqav2 import annotation_names, question_names
from study_data.files import dump, unanimous

MARKER = "easy_vqa_counts.json"
"""File of a finished conversion with the counts that `convert` returns."""

QUESTION_TYPES = (
    "what is the color of the",
    "what color is the",
    "is there a",
    "what is the",
    "is there",
    "does the",
    "what",
    "is",
)
"""Official VQA question types (`mscoco_question_types.txt`) that occur in this data set."""

QUESTIONS_PER_IMAGE = 1000
"""Number of question ids reserved per image, as in COCO-VQA."""

INFO = {
    "description": "easy-VQA 1.0 in the format of VQA v2.0.",
    "url": "https://github.com/vzhou842/easy-VQA",
    "version": "1.0",
    "year": 2019,
    "contributor": "Victor Zhou",
}
LICENSE = {"url": "https://opensource.org/licenses/MIT", "name": "MIT License"}

NOTICE = Path(__file__).with_suffix(".md")
"""Source, changes and licence of the data; copied to the output folder."""

Questions = tuple[list[str], list[str], list[int]]
"""Texts, answers and image ids, one entry per question, as returned by the package."""


def convert(output_dir: Path) -> dict[str, int]:
    """Write easy-VQA in VQAv2's format, atomically: train becomes train2014, test becomes val2014.

    A finished conversion is kept, and then the package is not needed. Image ids of train are kept (0 to
    3,999); those of test, which also start at 0, follow them (4,000 to 4,999). Question ids are `image_id *
    1000 + n`, where n counts the questions of the image, as in COCO-VQA.

    Returns:
        Number of images, questions and annotations of each split, by `train2014_images` and so on.

    Raises:
        FileExistsError: If `output_dir` exists and is not a finished conversion.
        ImportError: If the package `easy-vqa` is not installed.
    """
    if output_dir.exists():
        counts = _finished_counts(output_dir)
        if counts is None:
            raise FileExistsError(
                f"expected {output_dir} not to exist, or to hold a finished conversion of easy-VQA "
                f"(with counts that match its {MARKER}), found something else there; choose "
                "another output folder, or remove this one if nothing in it is needed"
            )
        say(f"{output_dir} holds easy-VQA already; left as it is", error=True)
        return counts

    try:
        import easy_vqa
    except ImportError as error:
        raise ImportError(
            "expected the package easy-vqa, which carries the data of easy-VQA, found no module "
            "easy_vqa to import; install it with `pip install easy-vqa`"
        ) from error
    train_images = easy_vqa.get_train_image_paths()
    # Ids run from 0 without a gap, so this is the number of train images.
    offset = max(train_images) + 1
    with staging_for(output_dir) as staging:
        _write_split(staging, "train2014", easy_vqa.get_train_questions(), train_images, offset=0)
        test_images = easy_vqa.get_test_image_paths()
        _write_split(staging, "val2014", easy_vqa.get_test_questions(), test_images, offset=offset)
        shutil.copyfile(NOTICE, staging / "SOURCE.md")
        counts = _count(staging)
        dump(staging / MARKER, counts)
        staging.rename(output_dir)
    return counts


def question_type(question: str) -> str:
    """Return the longest of `QUESTION_TYPES` that the question starts with, else `none of the above`."""
    words = question.lower()
    fitting = (kind for kind in QUESTION_TYPES if words.startswith(f"{kind} "))
    return max(fitting, key=len, default="none of the above")


def _finished_counts(output_dir: Path) -> dict[str, int] | None:
    """Return the counts of a finished conversion; None if the files do not match the marker."""
    try:
        expected = json.loads((output_dir / MARKER).read_text(encoding="utf-8"))
        counts = _count(output_dir)
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return None
    return counts if counts == expected else None


def _count(folder: Path) -> dict[str, int]:
    counts = {}
    for split in ("train2014", "val2014"):
        questions = json.loads((folder / question_names(split)[0]).read_text(encoding="utf-8"))
        annotations = json.loads((folder / annotation_names(split)[0]).read_text(encoding="utf-8"))
        counts[f"{split}_images"] = sum(1 for _ in (folder / split).glob(f"COCO_{split}_*.jpg"))
        counts[f"{split}_questions"] = len(questions["questions"])
        counts[f"{split}_annotations"] = len(annotations["annotations"])
    return counts


def _write_split(
    folder: Path, split: str, rows: Questions, image_paths: Mapping[int, str], *, offset: int
) -> None:
    """Write questions, annotations and images of one split, with `offset` added to the image ids."""
    questions: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    asked: Counter[int] = Counter()
    for question, answer, source_id in zip(*rows, strict=True):
        image_id = source_id + offset
        ids = {"image_id": image_id, "question_id": image_id * QUESTIONS_PER_IMAGE + asked[image_id]}
        asked[image_id] += 1
        questions.append({"question": question, **ids})
        annotations.append(
            {
                "question_type": question_type(question),
                **unanimous(answer),
                "answer_type": "yes/no" if answer in ("yes", "no") else "other",
                **ids,
            }
        )
    header = {"info": INFO, "license": LICENSE, "data_type": "mscoco", "data_subtype": split}
    asking = header | {"task_type": "Open-Ended", "questions": questions}
    dump(folder / question_names(split)[0], asking)
    dump(folder / annotation_names(split)[0], header | {"annotations": annotations})

    (folder / split).mkdir()
    for source_id, path in image_paths.items():
        name = f"COCO_{split}_{source_id + offset:012d}.jpg"
        with Image.open(path) as image:
            image.convert("RGB").save(folder / split / name, quality=JPEG_QUALITY, subsampling=FULL_CHROMA)
