"""The list of answers that published VQA labels are within, rebuilt from the official annotations."""

from collections import Counter
from pathlib import Path

from dept_vl.tasks.io.official_files import find
from dept_vl.tasks.io.records import brief, field, read_list
from dept_vl.tasks.metrics.vqa import normalise_answer
from dept_vl.tasks.vqav2 import ANSWERED, SOURCE, annotation_names

USUAL_FROM = 9
"""Questions in train and val that an answer has to be the usual one of to be in the published list."""


def usual_answers(root: Path, floor: int = USUAL_FROM) -> list[str]:
    """List the answers that are the usual one of at least `floor` questions of train and val, sorted.

    The rule of the published list (Teney et al. 2018, as LXMERT has it): usual answers are those that the
    annotation files name (`multiple_choice_answer`), brought to the form in which the scorer compares them.
    Raise ValueError if none is usual that often.
    """
    counts: Counter[str] = Counter()
    for subtype in ANSWERED:
        path = find(root, annotation_names(subtype), "VQAv2", SOURCE)
        for row in read_list(path, "annotations", SOURCE):
            where = f"{path}, question {brief(row.get('question_id'))}"
            counts[normalise_answer(field(row, "multiple_choice_answer", str, where))] += 1
    chosen = sorted(answer for answer, count in counts.items() if count >= floor)
    if not chosen:
        raise ValueError(
            f"no answer in {root} is the usual one of {floor} questions or more; the commonest is that of "
            f"{max(counts.values(), default=0)}: lower --floor"
        )
    return chosen
