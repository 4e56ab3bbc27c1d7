"""Files for the evaluation servers, checked before anything is uploaded."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dept_vl.tasks.base import Task
from dept_vl.tasks.io.predictions import ExampleId, PredictionFormat, check_ids

UNANSWERED = ""
"""Stands for an answer to a question that the phase does not score."""


@dataclass(frozen=True)
class Submission:
    """A file that passes the server's check: questions answered, and those of other phases, left empty."""

    path: Path
    answered: int
    filled: int


def write_submission(predictions: Mapping[ExampleId, str], whole: Task, path: Path) -> Submission:
    """Write predictions as a submission over a whole split; what was not asked is left empty.

    Raises:
        ValueError: If predictions belong to no example of the split.
    """
    ids = whole.example_ids()
    known = set(ids)
    check_ids(predictions.keys() & known, predictions, f"the submission of {whole.name}")
    whole.prediction_format.write({key: predictions.get(key, UNANSWERED) for key in ids}, path)
    check_submission(path, ids, whole.prediction_format)
    return Submission(path, len(predictions), len(ids) - len(predictions))


def check_submission(path: Path, ids: Sequence[ExampleId], form: PredictionFormat) -> int:
    """Read a file as the server would, and return how many predictions there are.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is in another form, or ids are missing, unknown or there twice.
    """
    predictions = form.read(path)
    check_ids(ids, predictions, str(path))
    return len(predictions)
