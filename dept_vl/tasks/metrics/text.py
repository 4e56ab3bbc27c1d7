"""Metrics of GLUE, SuperGLUE and MRQA, in percent (0 to 100) and not rounded.

Classification metrics are scikit-learn's (`accuracy_score`, `f1_score`, `matthews_corrcoef`), the
correlation is scipy's (`pearsonr`), MultiRC follows SuperGLUE (Wang et al. 2019) and answers are
compared as in SQuAD v1.1 (Rajpurkar et al. 2016), whose scorer MRQA took over (Fisch et al. 2019).
Where those divide by zero, the result here is 0.0, never nan.

A prediction may be any text. A prediction outside the task's classes is wrong for `accuracy`, not positive
for `f1`, and a class of its own for `matthews`. To count it as the opposite class, as T5's scorers do, a
task passes that class as the prediction.
"""

import math
import re
import string
from collections import Counter
from collections.abc import Callable, Hashable, Sequence

ARTICLES = re.compile(r"\b(a|an|the)\b")
DELETE_PUNCTUATION = str.maketrans("", "", string.punctuation)


def _check_pairs(predictions: Sequence[object], labels: Sequence[object], what: str = "labels") -> None:
    if isinstance(predictions, str) or isinstance(labels, str):
        # A string is a sequence too, and would be scored letter by letter.
        raise ValueError(f"expected a list of predictions and one of {what}, found a single string")
    if len(predictions) != len(labels):
        raise ValueError(
            f"expected one prediction each, found {len(predictions)} predictions and {len(labels)} {what}"
        )
    if len(predictions) == 0:
        raise ValueError("expected at least one prediction, found none")


def accuracy(predictions: Sequence[Hashable], labels: Sequence[Hashable]) -> float:
    """Return the percentage of predictions that equal their label; ValueError for empty or unequal lists."""
    _check_pairs(predictions, labels)
    right = sum(prediction == label for prediction, label in zip(predictions, labels, strict=True))
    return 100 * right / len(labels)


def f1(predictions: Sequence[Hashable], labels: Sequence[Hashable], *, positive: Hashable) -> float:
    """Return the F1 of class `positive` against all others; 0.0 if it is neither predicted nor a label."""
    _check_pairs(predictions, labels)
    predicted = sum(prediction == positive for prediction in predictions)
    present = sum(label == positive for label in labels)
    found = sum(
        prediction == label == positive for prediction, label in zip(predictions, labels, strict=True)
    )
    return 100 * 2 * found / (predicted + present) if predicted + present else 0.0


def macro_f1(
    predictions: Sequence[Hashable], labels: Sequence[Hashable], *, classes: Sequence[Hashable] | None = None
) -> float:
    """Return the mean F1 over `classes` (for CB).

    None stands for all predictions and labels, so a prediction outside the task's classes adds a class with
    F1 0.
    """
    _check_pairs(predictions, labels)
    averaged = {*predictions, *labels} if classes is None else set(classes)
    if not averaged:
        raise ValueError("expected at least one class to average over, found none")
    return math.fsum(f1(predictions, labels, positive=each) for each in averaged) / len(averaged)


def matthews(predictions: Sequence[Hashable], labels: Sequence[Hashable]) -> float:
    """Return the Matthews correlation (for CoLA), from -100 to 100; 0.0 if one side is constant."""
    _check_pairs(predictions, labels)
    predicted, present, count = Counter(predictions), Counter(labels), len(labels)
    right = sum(prediction == label for prediction, label in zip(predictions, labels, strict=True))
    # Integers up to the square root, so that rounding does not hide a zero.
    covariance = right * count - sum(predicted[each] * present[each] for each in present)
    spread = (count**2 - sum(n**2 for n in predicted.values())) * (
        count**2 - sum(n**2 for n in present.values())
    )
    return 100 * covariance / math.sqrt(spread) if spread else 0.0


def pearson(predictions: Sequence[float], labels: Sequence[float]) -> float:
    """Return the Pearson correlation (STS-B), -100 to 100; 0.0 if a side is constant; ValueError for nan."""
    _check_pairs(predictions, labels)
    if not all(map(math.isfinite, (*predictions, *labels))):
        raise ValueError("expected finite numbers to correlate, found inf or nan")
    if len(set(predictions)) == 1 or len(set(labels)) == 1:
        return 0.0
    import numpy as np  # not at the top: the table of text tasks is read wherever tasks are listed

    directions = []
    for numbers in (predictions, labels):
        values = np.asarray(numbers, dtype=np.float64)
        values = values / np.abs(values).max()  # or the squares of what a model made up may overflow
        values = values - values.mean()
        directions.append(values / np.linalg.norm(values))
    cosine = float(directions[0] @ directions[1])
    return 100 * max(-1.0, min(1.0, cosine))


def multirc(
    predictions: Sequence[Hashable],
    labels: Sequence[Hashable],
    questions: Sequence[Hashable],
    *,
    positive: Hashable,
) -> dict[str, float]:
    """Return `f1a`, the F1 over all answers, and `em`, the percentage of questions with all answers correct.

    `questions` has the question of each answer, with its paragraph, since MultiRC's ids are per paragraph.
    """
    _check_pairs(predictions, labels)
    _check_pairs(predictions, questions, "questions")
    whole: dict[Hashable, bool] = {}
    for prediction, label, question in zip(predictions, labels, questions, strict=True):
        whole[question] = whole.get(question, True) and prediction == label
    return {"f1a": f1(predictions, labels, positive=positive), "em": 100 * sum(whole.values()) / len(whole)}


def normalise_text(text: str) -> str:
    """Return a text in lower case without ASCII punctuation, articles and extra spaces, in SQuAD's order."""
    bare = text.lower().translate(DELETE_PUNCTUATION)
    return " ".join(ARTICLES.sub(" ", bare).split())


def squad(
    predictions: Sequence[str],
    answers: Sequence[Sequence[str]],
    normalise: Callable[[str], str] = normalise_text,
) -> dict[str, float]:
    """Return `em` and `f1` of free-text predictions, each the best over the human answers to the question.

    Two texts that are empty after normalisation match exactly but share no word (`f1` of 0), as in SQuAD v1.1
    and MRQA. Raises ValueError if a question has no answer.
    """
    _check_pairs(predictions, answers, "lists of answers")
    exact, overlap = [], []
    for index, (prediction, golds) in enumerate(zip(predictions, answers, strict=True)):
        if isinstance(golds, str) or not golds:
            raise ValueError(f"expected a list of one answer or more to question {index}, found {golds!r}")
        said = normalise(prediction)
        wanted = [normalise(gold) for gold in golds]
        exact.append(float(said in wanted))
        overlap.append(max(_word_f1(said.split(), gold.split()) for gold in wanted))
    count = len(predictions)
    return {"em": 100 * math.fsum(exact) / count, "f1": 100 * math.fsum(overlap) / count}


def _word_f1(said: list[str], wanted: list[str]) -> float:
    shared = (Counter(said) & Counter(wanted)).total()
    return 2 * shared / (len(said) + len(wanted)) if shared else 0.0
