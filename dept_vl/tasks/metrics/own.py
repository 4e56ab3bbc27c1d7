"""Scores of free answers of your own: VQA accuracy of any number of human answers, and ANLS."""

from collections import Counter
from collections.abc import Sequence

from dept_vl.tasks.metrics.vqa import normalise_answer, vqa_accuracy

OFFICIAL_ANSWERS = 10
ANLS_THRESHOLD = 0.5


def general_vqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """VQA accuracy of one answer: the official one of ten human answers, its general form of fewer.

    Average over leaving out each annotator: the prediction scores min(1, matches / max(1, (n - 1) / 3))
    against the n - 1 other answers. Compare a single answer directly. With ten or more answers, return the
    official metric; with fewer, normalise prediction and answers first.

    Raises:
        ValueError: If there is no answer.
    """
    if len(answers) >= OFFICIAL_ANSWERS:
        return vqa_accuracy(prediction, answers)
    if not answers:
        raise ValueError("expected at least one human answer, found none")
    count = len(answers)
    said = normalise_answer(prediction)
    matches = Counter(map(normalise_answer, answers))[said]
    if count == 1:
        return float(matches)
    needed = max(1.0, (count - 1) / 3)
    # An annotator who agrees is left out of those asked.
    agreeing = matches * min(1.0, (matches - 1) / needed)
    others = (count - matches) * min(1.0, matches / needed)
    return (agreeing + others) / count


def anls(prediction: str, answers: Sequence[str]) -> float:
    """Average normalised Levenshtein similarity of one answer (Biten et al. 2019), the best over its answers.

    Both sides in lower case with single spaces; a similarity below 0.5 counts as 0.
    """
    said = " ".join(prediction.lower().split())
    return max((_similarity(said, " ".join(answer.lower().split())) for answer in answers), default=0.0)


def _similarity(said: str, wanted: str) -> float:
    longest = max(len(said), len(wanted))
    if longest == 0:
        return 1.0
    similarity = 1 - edit_distance(said, wanted) / longest
    return similarity if similarity >= ANLS_THRESHOLD else 0.0


def edit_distance(left: str, right: str) -> int:
    """Least number of characters to insert, delete or change."""
    before = list(range(len(right) + 1))
    for row, one in enumerate(left, start=1):
        now = [row]
        for column, other in enumerate(right, start=1):
            now.append(min(before[column] + 1, now[-1] + 1, before[column - 1] + (one != other)))
        before = now
    return before[-1]
