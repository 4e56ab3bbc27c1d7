"""Small data sets of generated scenes in the official format of the four tasks.

They replace VQAv2, GQA, NLVR2 and COCO captions where these are not available: files have the official names
and the fields that are read, so that loaders, scorers and scripts run unchanged. Questions and captions are
of kinds excluded from the small backbone's pretraining. Scores on them say nothing about the real data sets.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

from dept_vl._utils.images import FULL_CHROMA, JPEG_QUALITY
from dept_vl.tasks.metrics.vqa import normalise_answer
from dept_vl.tasks.prepare.staging import staging_for
from study_data.files import dump, unanimous
from study_data.questions import NUMBERS, QA, ask_code, ask_kept_out, listings, pair_statement
from study_data.render import COLOURS, SHAPES, Scene, render, sample_scene

QUESTIONS_PER_IMAGE = 4
SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class Drawn:
    """A scene with its image number, which is unique over all splits."""

    number: int
    scene: Scene


def write_tasks(
    output_dir: Path, *, train: int = 800, val: int = 150, test: int = 150, seed: int = 0
) -> None:
    """Write the folders vqav2, gqa, nlvr2 and coco, with these numbers of images, atomically.

    Raises:
        FileExistsError: If the folder exists.
        ValueError: If a split would be empty.
    """
    _check(output_dir, dict(zip(SPLITS, (train, val, test), strict=True)))
    rng = Random(seed)
    numbers = iter(range(1, 1 + train + val + test))
    splits = {
        split: [Drawn(next(numbers), sample_scene(rng)) for _ in range(count)]
        for split, count in zip(SPLITS, (train, val, test), strict=True)
    }
    with staging_for(output_dir) as staging:
        for task, write in (("vqav2", _vqav2), ("gqa", _gqa), ("nlvr2", _nlvr2), ("coco", _coco)):
            (staging / task).mkdir(parents=True)
            write(staging / task, splits, rng)
        staging.rename(output_dir)


def write_concepts(output_dir: Path, *, train: int = 1200, val: int = 400, seed: int = 0) -> None:
    """Write the folders relabelled and many-or-few in VQAv2's format, atomically.

    They hold two concepts that do not occur in pretraining, an arbitrary code for each shape and a judgement,
    with one question per image. Raises the errors of `write_tasks`.
    """
    _check(output_dir, {"train": train, "val": val})
    rng = Random(seed)
    with staging_for(output_dir) as staging:
        for name, ask, most in (
            ("relabelled", ask_code, 1),
            ("many-or-few", partial(ask_kept_out, names=("many or few",)), 4),
        ):
            numbers = iter(range(1, 1 + train + val))
            splits = {
                split: [Drawn(next(numbers), sample_scene(rng, max_objects=most)) for _ in range(count)]
                for split, count in (("train", train), ("val", val))
            }
            (staging / name).mkdir(parents=True)
            _vqav2(staging / name, splits, rng, ask, per_image=1)
        staging.rename(output_dir)


def _check(output_dir: Path, counts: dict[str, int]) -> None:
    for split, count in counts.items():
        if count < 1:
            raise ValueError(f"expected at least one image in each split, found {split}={count}")
    if output_dir.exists():
        raise FileExistsError(f"{output_dir} is there already; choose another folder, or remove it")


def _vqav2(
    folder: Path,
    splits: dict[str, list[Drawn]],
    rng: Random,
    ask: Callable[[Scene, Random], QA] = ask_kept_out,
    per_image: int = QUESTIONS_PER_IMAGE,
) -> None:
    names = {"train": "train2014", "val": "val2014", "test": "test2015"}
    for split, scenes in splits.items():
        subtype = names[split]
        questions, annotations = [], []
        for drawn in scenes:
            for place in range(per_image):
                text, answer = ask(drawn.scene, rng)
                ids = {"image_id": drawn.number, "question_id": 10 * drawn.number + place}
                questions.append({**ids, "question": text})
                # Normalised, since VQAv2's answers use digits, and unanimous ones are compared as written.
                annotations.append({**ids, **_annotation(text, normalise_answer(answer))})
            _save(drawn, folder / subtype / f"COCO_{subtype}_{drawn.number:012d}.jpg")
        parts = {subtype: questions}
        if split == "test":
            parts["test-dev2015"] = questions[::4]
        else:
            dump(folder / f"v2_mscoco_{subtype}_annotations.json", {"annotations": annotations})
        for name, rows in parts.items():
            dump(folder / f"v2_OpenEnded_mscoco_{name}_questions.json", {"questions": rows})


def _annotation(question: str, answer: str) -> dict[str, Any]:
    answer_type = "yes/no" if answer in ("yes", "no") else "number" if answer.isdigit() else "other"
    return {
        "question_type": " ".join(question.rstrip("?").split()[:2]),
        "answer_type": answer_type,
        **unanimous(answer),
    }


def _gqa(folder: Path, splits: dict[str, list[Drawn]], rng: Random) -> None:
    names = {"train": "train_balanced", "val": "val_balanced", "test": "testdev_balanced"}
    for split, name in names.items():
        questions, choices = {}, {}
        for drawn in splits[split]:
            for place in range(QUESTIONS_PER_IMAGE):
                text, answer = ask_kept_out(drawn.scene, rng)
                question_id = f"{10 * drawn.number + place:08d}"
                questions[question_id] = _gqa_record(text, answer, f"{drawn.number}")
                others = next(group for group in _ANSWERS if answer in group)
                choices[question_id] = {"valid": list(others), "plausible": list(others)}
            _save(drawn, folder / "images" / f"{drawn.number}.jpg")
        dump(folder / f"{name}_questions.json", questions)
        dump(folder / "eval" / f"{name.split('_')[0]}_choices.json", choices)
        if split == "test":
            bare = {
                key: {k: q[k] for k in ("question", "imageId", "isBalanced")} for key, q in questions.items()
            }
            dump(folder / "submission_all_questions.json", bare)


_ANSWERS = (("yes", "no"), tuple(COLOURS), SHAPES, NUMBERS, ("many", "few"), ("positive", "negative"))


def _gqa_record(question: str, answer: str, image_id: str) -> dict[str, Any]:
    structural = "verify" if answer in ("yes", "no") else "choose" if answer in ("many", "few") else "query"
    return {
        "imageId": image_id,
        "question": question,
        "answer": answer,
        "fullAnswer": f"{answer}.",
        "isBalanced": True,
        "groups": {"global": question.split()[0], "local": question.split()[-1]},
        "entailed": [],
        "equivalent": [],
        "types": {"structural": structural, "semantic": "attr", "detailed": structural},
        "annotations": {"question": {}, "answer": {}, "fullAnswer": {}},
        "semantic": [{"operation": "select", "argument": question, "dependencies": []}],
        "semanticStr": question,
    }


def _nlvr2(folder: Path, splits: dict[str, list[Drawn]], rng: Random) -> None:
    for split, name in (("train", "train"), ("val", "dev"), ("test", "test1")):
        rows = []
        for place, (left, right) in enumerate((drawn, rng.choice(splits[split])) for drawn in splits[split]):
            # Two sentences per pair; training images are stored in numbered folders.
            directory = f"{place % 3}/" if split == "train" else ""
            for side, drawn in enumerate((left, right)):
                _save(drawn, folder / name / f"{directory}{name}-{place}-0-img{side}.png")
            for sentence in range(2):
                text, truth = pair_statement(left.scene, right.scene, rng)
                row = {"sentence": text, "label": str(truth), "identifier": f"{name}-{place}-0-{sentence}"}
                rows.append(row | ({"directory": place % 3} if split == "train" else {}))
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.json").write_text(lines, encoding="utf-8")


def _coco(folder: Path, splits: dict[str, list[Drawn]], rng: Random) -> None:
    images = []
    for split, scenes in splits.items():
        subtype = "train2014" if split == "train" else "val2014"
        for place, drawn in enumerate(scenes):
            name = f"COCO_{subtype}_{drawn.number:012d}.jpg"
            _save(drawn, folder / subtype / name)
            images.append(
                {
                    "filepath": subtype,
                    "filename": name,
                    "cocoid": drawn.number,
                    # Karpathy's training images are in train and restval.
                    "split": "restval" if split == "train" and place % 4 == 0 else split,
                    "sentences": [{"raw": raw, "imgid": drawn.number} for raw in listings(drawn.scene)],
                }
            )
    dump(folder / "dataset_coco.json", {"images": images, "dataset": "coco"})


def _save(drawn: Drawn, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    options: dict[str, Any] = (
        {"quality": JPEG_QUALITY, "subsampling": FULL_CHROMA} if path.suffix == ".jpg" else {}
    )
    render(drawn.scene).save(path, **options)
