"""Commands of `dept-vl score`: score any prediction file as the official servers do.

All commands write their scores with `--json FILE`, by the keys of the official scorers. Predictions are
compared as written in the file. `check-vqav2` and `check-gqa` check a file before upload.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import tyro

from dept_vl._utils.errors import UsageError
from dept_vl._utils.printable import say
from dept_vl._utils.tables import markdown_table
from dept_vl.tasks import coco as coco_task
from dept_vl.tasks import gqa as gqa_task
from dept_vl.tasks import nlvr2 as nlvr2_task
from dept_vl.tasks import vqav2 as vqav2_task
from dept_vl.tasks.base import Task
from dept_vl.tasks.io.rows import Rows
from dept_vl.tasks.metrics.caption import score_captions
from dept_vl.tasks.metrics.nlvr2 import score_nlvr2
from dept_vl.tasks.metrics.vqa import Normalisation

Figures = dict[str, Any]
Output = Annotated[Path | None, tyro.conf.arg(name="json", metavar="OUT")]


def vqav2(
    questions: Path,
    annotations: Path,
    predictions: Path,
    normalisation: Normalisation = "official",
    output: Output = None,
) -> Figures:
    """Score VQA accuracy (0-100) of VQAv2 or v1.

    Args:
        questions: Official questions file.
        annotations: Official annotations file.
        predictions: [{"question_id": int, "answer": str}], one for each question.
        normalisation: official: do not normalise if all ten human answers agree; always: normalise all.
        output: File for the scores.
    """
    check_output(output, questions, annotations, predictions)
    rows = vqav2_task.read_rows(questions, annotations)
    ids = rows.column("question_id").to_pylist()
    answers = vqav2_task.TASK.prediction_format.read(predictions, ids)
    figures = vqav2_task.score_rows(rows, answers, normalisation)
    return show(f"VQA accuracy, {normalisation} (0-100)", figures, output, ".2f")


def gqa(questions: Path, predictions: Path, choices: Path | None = None, output: Output = None) -> Figures:
    """Score GQA in percent; for distribution, lower is better.

    Args:
        questions: Official questions file; consistency needs the `all` questions with predictions.
        predictions: [{"questionId": str, "prediction": str}], at least one for each balanced question.
        choices: Official choices file, for validity and plausibility.
        output: File for the scores.
    """
    check_output(output, questions, predictions, choices)
    rows = gqa_task.read_rows(questions)
    if not rows.value("answers", 0):
        raise ValueError(
            f"{questions}: expected an answer to each question; the test and submission files have none"
        )
    answers = {str(key): answer for key, answer in gqa_task.TASK.prediction_format.read(predictions).items()}
    figures = gqa_task.score_rows(rows, answers, gqa_task.read_choices(choices) if choices else None)
    left_out = [name for name in ("validity", "plausibility", "consistency") if name not in figures]
    if left_out:
        say(
            f"left out: {', '.join(left_out)} (validity and plausibility need --choices; consistency needs "
            "all questions that are entailed in the questions file, and a prediction for each)"
        )
    return show("GQA (0-100; distribution: lower is better)", figures, output, ".2f")


def nlvr2(examples: Path, predictions: Path, output: Output = None) -> Figures:
    """Score NLVR2 accuracy and consistency, as fractions of 1.

    Args:
        examples: Official file, with one JSON object per line.
        predictions: Lines of identifier,true or identifier,false; one for each example.
        output: File for the scores.
    """
    check_output(output, examples, predictions)
    rows = nlvr2_task.read_rows(examples)
    ids = rows.column("identifier").to_pylist()
    answers = nlvr2_task.TASK.prediction_format.read(predictions, ids)
    labels = [answer for answers in rows.column("answers").to_pylist() for answer in answers]
    if len(labels) != len(ids):
        raise ValueError(f"{examples}: expected a label for each example, found {len(labels)} of {len(ids)}")
    score = score_nlvr2(zip(ids, labels, strict=True), {str(key): value for key, value in answers.items()})
    return show("NLVR2 (0-1)", score, output, ".4f")


def coco(
    references: Path, predictions: Path, split: str = "", spice: bool = False, output: Output = None
) -> Figures:
    """Score captions by BLEU, METEOR, ROUGE-L, CIDEr and SPICE of pycocoevalcap, all times 100.

    Args:
        references: COCO's captions_*.json, or Karpathy's dataset_coco.json with --split.
        predictions: [{"image_id": int, "caption": str}], one for each image.
        split: Split of dataset_coco.json: val or test.
        spice: Also compute SPICE, which needs its models and an older Java.
        output: File for the scores.
    """
    check_output(output, references, predictions)
    captions = coco_task.read_references(references, split)
    answers = coco_task.TASK.prediction_format.read(predictions, captions)
    figures = score_captions(captions, {int(key): text for key, text in answers.items()}, spice=spice)
    return show("COCO captions (x100)", figures, output, ".2f")


def check_output(output: Path | None, *read: Path | None) -> None:
    """Raise UsageError if a file that is read would be overwritten."""
    for path in filter(None, read):
        if output is not None and output.exists() and path.exists() and output.samefile(path):
            raise UsageError(f"--json {output} would overwrite {path}, which is read; name another file")


def show(title: str, figures: Figures, output: Path | None, form: str) -> Figures:
    """Print a table of the scores and write them to `output`; return the scores."""
    rows = []
    for name, value in flatten(figures):
        # The distribution is a distance of about 0.1, not a percentage.
        shown = "," if isinstance(value, int) else ".4f" if name == "distribution" else form
        rows.append((name, format(value, shown)))
    say(*markdown_table([title, "score"], rows).split("\n"))
    if output is not None:
        output.write_text(json.dumps(figures, indent=1) + "\n")
        say("", f"written to {output}")
    return figures


def flatten(figures: Figures, prefix: str = "") -> Iterator[tuple[str, float]]:
    """Yield the scores in nested scores, with the names of all levels joined."""
    for name, value in figures.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{name}: ")
        else:
            yield prefix + name, value


def check_vqav2(questions: Path, predictions: Path) -> int:
    """Check a file for EvalAI's VQA challenge: one answer for each question of test2015, for test-dev too.

    Args:
        questions: v2_OpenEnded_mscoco_test2015_questions.json.
        predictions: [{"question_id": int, "answer": str}].
    """
    return _check(vqav2_task.TASK, vqav2_task.read_rows(questions, None), predictions)


def check_gqa(questions: Path, predictions: Path) -> int:
    """Check a file for EvalAI's GQA challenge: one answer for each question of the submission file.

    Args:
        questions: submission_all_questions.json.
        predictions: [{"questionId": str, "prediction": str}].
    """
    return _check(gqa_task.TASK, gqa_task.read_rows(questions), predictions)


def _check(task: Task, rows: Rows, predictions: Path) -> int:
    count = len(task.prediction_format.read(predictions, rows.column(task.id_column).to_pylist()))
    say(f"{count:,} predictions, one for each question")
    return count


COMMANDS: dict[str, Callable[..., Any]] = {"vqav2": vqav2, "gqa": gqa, "nlvr2": nlvr2, "coco": coco}
CHECKS: dict[str, Callable[..., int]] = {"vqav2": check_vqav2, "gqa": check_gqa}
