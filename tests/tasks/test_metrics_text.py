"""Figures of text tasks against scikit-learn, scipy and a literal SQuAD scorer."""

import math
import random
import string
import warnings
from collections.abc import Sequence

import numpy as np
import pytest
from scipy.stats import pearsonr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

from dept_vl.tasks.metrics.text import (
    accuracy,
    f1,
    macro_f1,
    matthews,
    multirc,
    normalise_text,
    pearson,
    squad,
)

EXACT = {"rel": 1e-12, "abs": 1e-9}
CLASSES = {2: ["no", "yes"], 3: ["contradiction", "entailment", "neutral"]}


def draws(classes: Sequence[str], seed: int) -> tuple[list[str], list[str]]:
    """Predictions that are right more often than not, of a random count from 1 on."""
    numbers = random.Random(seed)
    labels = numbers.choices(classes, k=numbers.randint(1, 40))
    return [label if numbers.random() < 0.6 else numbers.choice(classes) for label in labels], labels


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("seed", range(30))
def test_classification_is_scikit_learns(classes: int, seed: int) -> None:
    names = CLASSES[classes]
    predictions, labels = draws(names, seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scikit-learn's on classes that do not occur
        assert accuracy(predictions, labels) == pytest.approx(
            100 * accuracy_score(labels, predictions), **EXACT
        )
        assert matthews(predictions, labels) == pytest.approx(
            100 * matthews_corrcoef(labels, predictions), **EXACT
        )
        assert macro_f1(predictions, labels, classes=names) == pytest.approx(
            100 * f1_score(labels, predictions, average="macro", labels=names, zero_division=0), **EXACT
        )
        for name in names:
            assert f1(predictions, labels, positive=name) == pytest.approx(
                100 * f1_score([x == name for x in labels], [x == name for x in predictions]), **EXACT
            )


@pytest.mark.parametrize(
    ("predictions", "labels"),
    [
        (["no", "no", "no"], ["no", "yes", "no"]),
        (["no", "yes", "no"], ["no", "no", "no"]),
        (["no", "no"], ["no", "no"]),
        (["yes", "yes"], ["no", "no"]),
        (["yes"], ["yes"]),
        (["yes"], ["no"]),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_a_single_class_gives_what_scikit_learn_gives(predictions: list[str], labels: list[str]) -> None:
    assert matthews(predictions, labels) == 100 * matthews_corrcoef(labels, predictions)
    assert macro_f1(predictions, labels, classes=sorted({*predictions, *labels})) == pytest.approx(
        100 * f1_score(labels, predictions, average="macro"), **EXACT
    )
    assert f1(predictions, labels, positive="yes") == pytest.approx(
        100 * f1_score(labels, predictions, labels=["no", "yes"], pos_label="yes", zero_division=0), **EXACT
    )


def test_figures_of_a_worked_example() -> None:
    predictions, labels = [1, 1, 0, 1, 0], [1, 0, 0, 1, 1]
    assert accuracy(predictions, labels) == 60.0
    assert f1(predictions, labels, positive=1) == pytest.approx(200 / 3)
    assert f1(predictions, labels, positive=0) == 50.0
    assert macro_f1(predictions, labels, classes=[0, 1]) == pytest.approx((200 / 3 + 50) / 2)
    # (TP TN - FP FN) / sqrt((TP + FP) (TP + FN) (TN + FP) (TN + FN)), with 2, 1, 1, 1.
    assert matthews(predictions, labels) == pytest.approx(100 / 6)
    assert matthews([0, 1], [1, 0]) == -100.0


def test_a_prediction_that_is_no_class() -> None:
    predictions, labels = ["yes", "perhaps", "no"], ["yes", "yes", "no"]
    assert accuracy(predictions, labels) == pytest.approx(200 / 3)
    assert f1(predictions, labels, positive="yes") == pytest.approx(200 / 3)
    assert macro_f1(predictions, labels, classes=["no", "perhaps", "yes"]) == pytest.approx(
        (200 / 3 + 100) / 3
    )
    assert macro_f1(predictions, labels, classes=["no", "yes"]) == pytest.approx((200 / 3 + 100) / 2)


@pytest.mark.parametrize("scale", [1e-200, 1.0, 1e200])
@pytest.mark.parametrize("seed", range(20))
def test_pearson_is_scipys(seed: int, scale: float) -> None:
    numbers = np.random.default_rng(seed)
    labels = numbers.uniform(0, 5, numbers.integers(2, 40))
    predictions = (labels * numbers.normal() + numbers.normal(size=len(labels))) * scale
    assert pearson(predictions.tolist(), labels.tolist()) == pytest.approx(
        100 * float(pearsonr(predictions / scale, labels).statistic), rel=1e-9, abs=1e-9
    )


@pytest.mark.filterwarnings("error")
def test_pearson_without_variance_is_zero() -> None:
    # scipy warns and says nan; a mean of 0.1s that is not 0.1 must not become a correlation.
    labels = [0.0, 1.0, 2.5]
    for constant in (0.1, 0.0, 1e300):
        assert pearson([constant] * 3, labels) == 0.0
        assert pearson(labels, [constant] * 3) == 0.0
    assert pearson([1.0], [1.0]) == 0.0


@pytest.mark.filterwarnings("error")
def test_pearson_of_extreme_numbers_is_a_number() -> None:
    assert pearson([1e308, 1e308, 1.0], [1.0, 2.0, 3.0]) == pytest.approx(
        pearson([1.0, 1.0, 0.0], [1.0, 2.0, 3.0])
    )
    assert pearson([1e308, -1e308, 0.0], [2.0, 1.0, 1.5]) == pytest.approx(100.0)
    assert pearson([5e-324, 0.0], [0.0, 1.0]) == pytest.approx(-100.0)
    assert -100.0 <= pearson([0.1, 0.2, 0.3], [0.3, 0.6, 0.9]) <= 100.0
    for number in (math.nan, math.inf):
        with pytest.raises(ValueError, match="finite"):
            pearson([1.0, number], [1.0, 2.0])


@pytest.mark.parametrize("seed", range(10))
def test_multirc_counts_answers_and_questions(seed: int) -> None:
    predictions, labels = draws(["False", "True"], seed)
    numbers = random.Random(seed)
    questions = [(numbers.randint(0, 2), numbers.randint(0, 3)) for _ in labels]
    figures = multirc(predictions, labels, questions, positive="True")
    whole = [
        all(p == t for p, t, q in zip(predictions, labels, questions, strict=True) if q == question)
        for question in set(questions)
    ]
    assert figures == {
        "f1a": f1(predictions, labels, positive="True"),
        "em": pytest.approx(100 * sum(whole) / len(whole)),
    }


def test_multirc_by_hand() -> None:
    # Question a: both answers right; b: one of two; the same number in another paragraph is c.
    figures = multirc([1, 0, 1, 1, 0], [1, 0, 1, 0, 0], ["a", "a", "b", "b", "c"], positive=1)
    assert figures == {"f1a": pytest.approx(80.0), "em": pytest.approx(200 / 3)}


def literal_normal(text: str) -> str:
    """The published steps, a character and a word at a time."""
    kept = "".join(character for character in text.lower() if character not in set(string.punctuation))
    # An article is one between characters that are not of a word; \b, without regular expressions.
    pieces, word = [], ""
    for character in kept + " ":
        if character.isalnum() or character == "_":
            word += character
            continue
        pieces += ["" if word in ("a", "an", "the") else word, character]
        word = ""
    return " ".join("".join(" " if piece == "" else piece for piece in pieces).split())


def literal_squad(prediction: str, golds: list[str]) -> tuple[float, float]:
    """Exact match and F1 from precision and recall, striking out shared words one by one."""
    best_exact, best_f1 = 0.0, 0.0
    said = literal_normal(prediction).split()
    for gold in golds:
        left = literal_normal(gold).split()
        best_exact = max(best_exact, float(said == left))
        total, shared = len(left), 0
        for word in said:
            if word in left:
                left.remove(word)
                shared += 1
        if shared:
            precision, recall = shared / len(said), shared / total
            best_f1 = max(best_f1, 2 * precision * recall / (precision + recall))
    return best_exact, best_f1


WORDS = [
    "The",
    "a",
    "an",
    "theme",
    "cat",
    "Cat.",
    "cat",
    "U.S.",
    "well-known",
    "it's",
    "--",
    "",
    "1,000",
    "é",
]


def phrase(numbers: random.Random) -> str:
    return numbers.choice([" ", "  ", "\t", "\n "]).join(numbers.choices(WORDS, k=numbers.randint(0, 6)))


@pytest.mark.parametrize("seed", range(60))
def test_squad_is_the_literal_scorer(seed: int) -> None:
    numbers = random.Random(seed)
    count = numbers.randint(1, 8)
    predictions = [phrase(numbers) for _ in range(count)]
    answers = [[phrase(numbers) for _ in range(numbers.randint(1, 3))] for _ in range(count)]
    for text in predictions:
        assert normalise_text(text) == literal_normal(text)
    scored = [literal_squad(p, a) for p, a in zip(predictions, answers, strict=True)]
    assert squad(predictions, answers) == {
        "em": pytest.approx(100 * sum(exact for exact, _ in scored) / count),
        "f1": pytest.approx(100 * sum(overlap for _, overlap in scored) / count),
    }


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The  Cat!", "cat"),
        ("an apple, a day", "apple day"),
        ("theme of Anna", "theme of anna"),
        ("U.S. well-known", "us wellknown"),
        ("a.m.", "am"),  # the point goes before the article is looked for
        ("‘the’ – sum", "‘ ’ – sum"),  # quotes that are not ASCII stay, and bound a word
        ("the", ""),
    ],
)
def test_normalise_text(text: str, normal: str) -> None:
    assert normalise_text(text) == normal


def test_squad_takes_the_best_answer_for_each_figure() -> None:
    assert squad(["the cat sat"], [["dog", "cat sat down"]]) == {"em": 0.0, "f1": pytest.approx(80.0)}
    assert squad(["Cat"], [["dog", "a cat."]]) == {"em": 100.0, "f1": 100.0}
    assert squad(["cat", "x"], [["cat"], ["y"]]) == {"em": 50.0, "f1": 50.0}
    assert squad(["the"], [["!"]]) == {"em": 100.0, "f1": 0.0}
