"""Scores for answers to your own questions: VQA accuracy for any number of human answers, and ANLS."""

import re
import string
from collections import Counter
from collections.abc import Sequence

from dept_vl.tasks.metrics.text import ARTICLES
from dept_vl.tasks.metrics.vqa import normalise_answer, vqa_accuracy

OFFICIAL_ANSWERS = 10
THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
NUMBER = re.compile(r"(?<=\d)[.,:/](?=\d)|(?<![\w.])[-+](?=\.?\d)|(?<!\w)\.(?=\d)")
"""Punctuation that belongs to a number: decimal points, signs, and what stands in ratios, times and dates."""
PUNCTUATION = re.compile(f"({NUMBER.pattern})|[{re.escape(string.punctuation)}]")
ANLS_THRESHOLD = 0.5


def normalise_own(text: str) -> str:
    """Return an answer as it is compared: in lower case, without punctuation, articles and extra spaces.

    That is SQuAD's normalisation, except that numbers keep signs and decimal points, and an answer of nothing
    but punctuation or articles stays as it is, so that 1.5 is not 15 and + is not -.
    """
    lower = " ".join(text.lower().split())
    bare = PUNCTUATION.sub(lambda found: found[1] or "", THOUSANDS.sub("", lower))
    return " ".join(ARTICLES.sub(" ", bare).split()) or lower


def general_vqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """Return the VQA accuracy of one prediction, from 0 to 1, for any number of human answers.

    With ten or more answers it is the official metric. With fewer, texts are normalised, and the score is the
    mean, over leaving out each annotator, of min(1, matches / max(1, (n - 1) / 3)) with the n - 1 other
    answers. A single answer is compared directly.
    """
    if len(answers) >= OFFICIAL_ANSWERS:
        return vqa_accuracy(prediction, answers)
    count = len(answers)
    said = _compared(prediction)
    matches = Counter(map(_compared, answers))[said]
    if count == 1:
        return float(matches)
    needed = max(1.0, (count - 1) / 3)
    # Leaving out a matching annotator removes one match.
    agreeing = matches * min(1.0, (matches - 1) / needed)
    others = (count - matches) * min(1.0, matches / needed)
    return (agreeing + others) / count


def _compared(answer: str) -> str:
    """Return an answer in the official form; one of nothing but articles or punctuation stays as it is."""
    return normalise_answer(answer) or " ".join(answer.lower().split())


def anls(prediction: str, answers: Sequence[str]) -> float:
    """Return the normalised Levenshtein similarity of a prediction (ANLS, Biten et al. 2019), from 0 to 1.

    It is the best over the answers. Texts are compared in lower case with single spaces; a similarity below
    0.5 counts as 0.
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
    """Return the minimum number of insertions, deletions and substitutions of characters."""
    before = list(range(len(right) + 1))
    for row, one in enumerate(left, start=1):
        now = [row]
        for column, other in enumerate(right, start=1):
            now.append(min(before[column] + 1, now[-1] + 1, before[column - 1] + (one != other)))
        before = now
    return before[-1]
