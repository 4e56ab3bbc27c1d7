"""Submission files for the evaluation servers, checked before upload."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dept_vl.tasks.base import Task
from dept_vl.tasks.io.predictions import ExampleId, PredictionFormat, check_ids

UNANSWERED = ""
"""Prediction for a question that the current phase does not score."""


@dataclass(frozen=True)
class Submission:
    """A checked submission file, with the number of predictions and of questions left empty."""

    path: Path
    answered: int
    filled: int


def write_submission(predictions: Mapping[ExampleId, str], whole: Task, path: Path) -> Submission:
    """Write predictions as a submission for a whole split; questions without prediction are left empty.

    Raises:
        ValueError: If a prediction does not belong to the split.
    """
    ids = whole.example_ids()
    known = set(ids)
    check_ids(predictions.keys() & known, predictions, f"the submission of {whole.name}")
    whole.prediction_format.write({key: predictions.get(key, UNANSWERED) for key in ids}, path)
    check_submission(path, ids, whole.prediction_format)
    return Submission(path, len(predictions), len(ids) - len(predictions))


def check_submission(path: Path, ids: Sequence[ExampleId], form: PredictionFormat) -> int:
    """Read a submission file like the server and return the number of predictions.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If the format is wrong, or ids are missing, unknown or repeated.
    """
    predictions = form.read(path)
    check_ids(ids, predictions, str(path))
    return len(predictions)
