"""VQA accuracy, answer normalisation and soft labels.

Follows the official VQA scorer (``vqaEval.py`` of the VQA evaluation tools; Antol et al. 2015,
"VQA: Visual Question Answering"; Goyal et al. 2017, "Making the V in VQA Matter"), including
the quirks that published numbers depend on. The tables below are its data; soft labels follow
VL-T5 (Cho et al. 2021). ``tests/fixtures/vqa`` holds cases scored by the official scorer.
"""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence, Set
from pathlib import Path
from typing import Any, Literal

Normalisation = Literal["official", "always"]
"""``official``: raw comparison where all human answers agree. ``always``: normalise regardless."""

# No apostrophe, colon, `$`, `%` or `&`: those stay in the answer. The period has its own rule.
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'

# The original meant a lookbehind, `(?<=\d)`; as typed, the first group never rejects anything, so
# every period not followed by a digit is removed, in "3." and "st." alike.
PERIOD = re.compile(r"(?!<=\d)(\.)(?!\d)")

# The original passes the flag `re.UNICODE` (32) where `sub` expects a count.
MAX_PERIODS_REMOVED = 32

DIGIT_COMMA_DIGIT = re.compile(r"\d,\d")

ARTICLES = frozenset({"a", "an", "the"})

# "none" is a number here, and nothing above ten is.
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
NUMBER_WORDS = {"none": "0", **{word: str(number) for number, word in enumerate(NUMBERS)}}

# Written `word=replacement`. The table is uneven and stays so: "somebody'd" loses its apostrophe,
# "hes" is mapped but "shes" is not, and keys with a capital are never met in lower-cased text.
_PAIRS = Path(__file__).with_name("vqa_contractions.txt").read_text(encoding="utf-8").split()
CONTRACTIONS = dict(pair.split("=") for pair in _PAIRS)

SOFT_SCORES = (0.3, 0.6, 0.9, 1.0)
"""Training weight of an answer given by 1, 2, 3, and 4 or more annotators."""


def _clean_whitespace(text: str) -> str:
    """Replace newlines and tabs by spaces and strip, as the scorer does to every string."""
    return text.replace("\n", " ").replace("\t", " ").strip()


def _process_punctuation(text: str) -> str:
    """Remove punctuation marks or replace them by spaces, then remove periods."""
    # One thousands separator anywhere deletes every mark of the answer: "1,000/2" gives "10002".
    delete_all = DIGIT_COMMA_DIGIT.search(text) is not None
    result = text
    for mark in PUNCTUATION:
        if mark not in text:
            continue
        # If a mark touches a space anywhere, it is removed everywhere. The input decides, so marks that
        # were already replaced do not count as spaces.
        delete = delete_all or f"{mark} " in text or f" {mark}" in text
        result = result.replace(mark, "" if delete else " ")
    return PERIOD.sub("", result, count=MAX_PERIODS_REMOVED)


def _process_words(text: str) -> str:
    """Lower-case, convert number words to digits, drop articles, restore contractions, use single spaces."""
    words = (NUMBER_WORDS.get(word, word) for word in text.lower().split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def normalise_answer(text: str) -> str:
    """Normalise an answer for comparison, as the official VQA scorer does.

    Whitespace, punctuation and words are processed in this order, to lower case and single spaces (Antol et
    al. 2015; Goyal et al. 2017). The result is empty for an answer of only articles and punctuation.
    """
    return _process_words(_process_punctuation(_clean_whitespace(text)))


def vqa_accuracy(
    prediction: str, answers: Sequence[str], *, normalisation: Normalisation = "official"
) -> float:
    """Return the VQA accuracy of a prediction, given the human answers to its question.

    It is the mean, over the human answers, of ``min(1, matches among the other answers / 3)``, as in the
    official scorer (Antol et al. 2015; Goyal et al. 2017). With ten answers, 0, 1, 2, 3 and 4 or more
    matches score 0, 0.3, 0.6, 0.9 and 1.

    Args:
        prediction: Prediction as written.
        answers: Human answers, one per annotator, with duplicates; usually ten.
        normalisation: ``official`` normalises only if the human answers are not all identical, so
            ``Yes`` scores 0 against ten ``yes``. ``always`` normalises both sides regardless.
            (VL-T5 and LAVIS normalise every prediction too, but of the human answers only the
            punctuation, and identical ones not at all.)

    Returns:
        The accuracy, from 0 to 1.
    """
    prediction = _clean_whitespace(prediction)
    counts = Counter(_clean_whitespace(answer) for answer in answers)
    # Official quirk: if all annotators wrote the same, the prediction is compared as written.
    if normalisation == "always" or len(counts) > 1:
        prediction = normalise_answer(prediction)
        matches = sum(n for answer, n in counts.items() if normalise_answer(answer) == prediction)
    else:
        matches = counts[prediction]
    # Leaving out a matching annotator removes one match. Counting whole thirds and dividing once is
    # exact for every order of the answers.
    others = len(answers) - matches
    thirds = matches * min(3, matches - 1) + others * min(3, matches)
    return thirds / (3 * len(answers))


def soft_scores(answers: Sequence[str]) -> dict[str, float]:
    """Return the soft label of a question: the weight of each human answer, in order of appearance.

    Answers given by 1, 2, 3, and 4 or more annotators weigh 0.3, 0.6, 0.9 and 1.0, as in VL-T5 (Cho et al.
    2021). `answers` has one answer per annotator. Answers are normalised before counting, and empty ones are
    dropped.
    """
    counts = Counter(normalise_answer(answer) for answer in answers)
    return {answer: SOFT_SCORES[min(n, len(SOFT_SCORES)) - 1] for answer, n in counts.items() if answer}


def listed_scores(answers: Sequence[str], answer_list: Set[str]) -> dict[str, float]:
    """Return the soft label of a question, limited to the published answer list (LXMERT, VL-T5).

    Weights are those of `soft_scores`. Answers are counted as written, without normalisation:
    "two" differs from "2".
    """
    counts = Counter(answer for answer in answers if answer in answer_list)
    return {answer: SOFT_SCORES[min(n, len(SOFT_SCORES)) - 1] for answer, n in counts.items()}


def _mean_percent(accuracies: list[float]) -> float:
    # `fsum` rounds once, so shards gathered in another order give the same figure.
    return round(100 * math.fsum(accuracies) / len(accuracies), 2)


def _mean_percents(groups: dict[str, list[float]]) -> dict[str, float]:
    return {name: _mean_percent(groups[name]) for name in sorted(groups)}


def score_vqa(records: Iterable[tuple[float, str, str]]) -> dict[str, Any]:
    """Average the accuracies of questions: overall, by answer type and by question type.

    Args:
        records: ``(accuracy, answer_type, question_type)`` of each question, once. The accuracy is from 0
            to 1, as returned by `vqa_accuracy`.

    Returns:
        Percentages by the official scorer's keys, rounded to 2 decimals as there: `overall`,
        `perAnswerType` and `perQuestionType` (sorted by key), and the number of questions `n`.
    """
    overall: list[float] = []
    by_answer_type: defaultdict[str, list[float]] = defaultdict(list)
    by_question_type: defaultdict[str, list[float]] = defaultdict(list)
    for accuracy, answer_type, question_type in records:
        overall.append(accuracy)
        by_answer_type[answer_type].append(accuracy)
        by_question_type[question_type].append(accuracy)
    return {
        "overall": _mean_percent(overall),
        "perAnswerType": _mean_percents(by_answer_type),
        "perQuestionType": _mean_percents(by_question_type),
        "n": len(overall),
    }
