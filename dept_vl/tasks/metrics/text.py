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
import sys
from collections import Counter
from collections.abc import Callable, Hashable, Sequence

ARTICLES = re.compile(r"\b(a|an|the)\b")
DELETE_PUNCTUATION = str.maketrans("", "", string.punctuation)


def accuracy(predictions: Sequence[Hashable], labels: Sequence[Hashable]) -> float:
    """Return the percentage of predictions that equal their label."""
    right = sum(prediction == label for prediction, label in zip(predictions, labels, strict=True))
    return 100 * right / len(labels)


def f1(predictions: Sequence[Hashable], labels: Sequence[Hashable], *, positive: Hashable) -> float:
    """Return the F1 of class `positive` against all others; 0.0 if it is neither predicted nor a label."""
    predicted = sum(prediction == positive for prediction in predictions)
    present = sum(label == positive for label in labels)
    found = sum(
        prediction == label == positive for prediction, label in zip(predictions, labels, strict=True)
    )
    return 100 * 2 * found / (predicted + present) if predicted + present else 0.0


def macro_f1(
    predictions: Sequence[Hashable], labels: Sequence[Hashable], *, classes: Sequence[Hashable]
) -> float:
    """Return the mean F1 over the classes (for CB)."""
    return math.fsum(f1(predictions, labels, positive=each) for each in classes) / len(classes)


def matthews(predictions: Sequence[Hashable], labels: Sequence[Hashable]) -> float:
    """Return the Matthews correlation (for CoLA), from -100 to 100; 0.0 if one side is constant."""
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
    if not all(map(math.isfinite, (*predictions, *labels))):
        raise ValueError("expected finite numbers to correlate, found inf or nan")
    if len(set(predictions)) == 1 or len(set(labels)) == 1:
        return 0.0
    largest = max(map(abs, predictions))
    if largest > sys.float_info.max / len(predictions):  # their sum may be infinite
        predictions = [each / largest for each in predictions]
    # Not at the top: the table of text tasks is read wherever tasks are listed.
    from scipy.stats import pearsonr

    return 100 * float(pearsonr(predictions, labels).statistic)


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
    and MRQA.
    """
    exact, overlap = [], []
    for prediction, golds in zip(predictions, answers, strict=True):
        said = normalise(prediction)
        wanted = [normalise(gold) for gold in golds]
        exact.append(float(said in wanted))
        overlap.append(max(_word_f1(said.split(), gold.split()) for gold in wanted))
    count = len(predictions)
    return {"em": 100 * math.fsum(exact) / count, "f1": 100 * math.fsum(overlap) / count}


def _word_f1(said: list[str], wanted: list[str]) -> float:
    shared = (Counter(said) & Counter(wanted)).total()
    return 2 * shared / (len(said) + len(wanted)) if shared else 0.0
