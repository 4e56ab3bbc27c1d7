"""VQA accuracy against cases scored by the official scorer, and its rules one by one."""

import json
import random
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from dept_vl.tasks.metrics.vqa import (
    CONTRACTIONS,
    PUNCTUATION,
    normalise_answer,
    score_vqa,
    soft_scores,
    vqa_accuracy,
)

FIXTURE = Path(__file__).parents[1] / "fixtures" / "vqa" / "cases.jsonl"
CASES: list[dict[str, Any]] = [json.loads(line) for line in FIXTURE.read_text(encoding="utf-8").splitlines()]

# Means of the fixture's `official_accuracy`, with the official scorer's rounding.
FIXTURE_TOTALS = {
    "overall": 54.03,
    "perAnswerType": {"number": 45.69, "other": 57.71, "yes/no": 58.96},
    "perQuestionType": {
        "how many": 60.0,
        "is the": 50.47,
        "none of the above": 56.87,
        "what": 59.52,
        "what color is the": 43.17,
    },
    "n": 320,
}


def human_answers(case: dict[str, Any]) -> list[str]:
    """The ten human answers of a case, in file order."""
    return [record["answer"] for record in case["answers"]]


def leave_one_out(prediction: str, answers: list[str]) -> float:
    """The published formula, entry by entry and in exact fractions; no normalisation."""
    total = Fraction(0)
    for left_out in range(len(answers)):
        others = answers[:left_out] + answers[left_out + 1 :]
        total += min(Fraction(1), Fraction(others.count(prediction), 3))
    return float(total / len(answers))


@pytest.mark.parametrize("case", CASES, ids=lambda case: str(case["question_id"]))
def test_case_scores_as_official(case: dict[str, Any]) -> None:
    """Every case, exactly as the official scorer prints it."""
    accuracy = vqa_accuracy(case["prediction"], human_answers(case))
    assert round(100 * accuracy, 2) == case["official_accuracy"]


def test_totals_as_official() -> None:
    """The totals of the slice, whatever the order in which questions arrive."""
    records = [
        (
            vqa_accuracy(case["prediction"], human_answers(case)),
            case["answer_type"],
            case["question_type"],
        )
        for case in CASES
    ]
    score = score_vqa(records)
    assert score == FIXTURE_TOTALS
    assert score["n"] == 320
    random.Random(0).shuffle(records)
    assert score_vqa(iter(records)) == score


def test_order_of_answers_does_not_matter() -> None:
    """Bit for bit, under both variants."""
    shuffle = random.Random(0).shuffle
    for case in CASES:
        answers = human_answers(case)
        before = vqa_accuracy(case["prediction"], answers)
        before_always = vqa_accuracy(case["prediction"], answers, normalisation="always")
        shuffle(answers)
        assert vqa_accuracy(case["prediction"], answers) == before
        assert vqa_accuracy(case["prediction"], answers, normalisation="always") == before_always


@pytest.mark.parametrize("count", range(1, 12))
def test_counting_equals_leave_one_out(count: int) -> None:
    """Also for other than ten answers."""
    for matches in range(count + 1):
        answers = ["yes"] * matches + ["no"] * (count - matches)
        assert vqa_accuracy("yes", answers) == leave_one_out("yes", answers)


def test_ten_answers_give_the_familiar_steps() -> None:
    """0, 1, 2, 3, 4 and more matches."""
    steps = [vqa_accuracy("yes", ["yes"] * n + ["no"] * (10 - n)) for n in range(11)]
    assert steps == [0.0, 0.3, 0.6, 0.9, *[1.0] * 7]


def test_identical_answers_are_compared_as_written() -> None:
    """The official rule, and the variant without it."""
    assert vqa_accuracy("Yes", ["yes"] * 10) == 0.0
    assert vqa_accuracy("Yes", ["yes"] * 10, normalisation="always") == 1.0
    assert vqa_accuracy("Yes", ["yes"] * 9 + ["no"]) == 1.0


def test_identical_is_judged_after_whitespace() -> None:
    """A stray newline does not make the answers differ, nor the prediction."""
    assert vqa_accuracy("Yes", ["yes"] * 9 + ["yes\n"]) == 0.0
    assert vqa_accuracy("\tyes ", ["yes"] * 9 + [" yes\n"]) == 1.0


def test_always_normalises_the_human_answers_too() -> None:
    """`two` is written as a digit on both sides."""
    assert vqa_accuracy("two", ["two"] * 10, normalisation="always") == 1.0
    assert vqa_accuracy("2", ["two"] * 10, normalisation="always") == 1.0
    assert vqa_accuracy("2", ["two"] * 10) == 0.0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (" Two\tDogs\n", "2 dogs"),
        ("The cat and a dog", "cat and dog"),
        ("the", ""),
        ("?!", ""),
        ("", ""),
        # Punctuation: a space where it stands between letters, deleted where it touches a space.
        ("t-shirt", "t shirt"),
        ("black, white", "black white"),
        ("30 - 40", "30 40"),
        ("x-y\t-z", "xy z"),
        ("what?", "what"),
        # The input decides: the space that `/` becomes does not make `-` touch a space.
        ("b/-c", "b c"),
        ("x-y/-z", "x y z"),
        # Digit, comma, digit anywhere: every mark is deleted.
        ("1,000", "1000"),
        ("1,000 t-shirt", "1000 tshirt"),
        ("red,white", "red white"),
        # Kept.
        ("5:30 pm", "5:30 pm"),
        ("woman's", "woman's"),
        ("$5 & 50%", "$5 & 50%"),
        # Periods go unless a digit follows.
        ("u.s.", "us"),
        ("3.5", "3.5"),
        ("3.5.", "3.5"),
        ("3. 5", "3 5"),
        ("3.-5", "3 5"),
        ("st.5", "st.5"),
        # Numbers and contractions.
        ("none", "0"),
        ("ten", "10"),
        ("eleven", "eleven"),
        ("dont", "don't"),
        ("Dont", "don't"),
        ("somebody'd", "somebodyd"),
        ("Im", "im"),
        ("shes", "shes"),
    ],
)
def test_normalise_answer(text: str, expected: str) -> None:
    """The rules and quirks, one by one."""
    assert normalise_answer(text) == expected


@pytest.mark.parametrize("mark", PUNCTUATION)
def test_every_punctuation_mark(mark: str) -> None:
    """A space between letters; deleted everywhere if a space is on either side of any one."""
    assert normalise_answer(f"x{mark}y") == "x y"
    assert normalise_answer(f"x{mark}y {mark}z") == "xy z"
    assert normalise_answer(f"x{mark}y{mark} z") == "xy z"
    assert normalise_answer(f"x{mark}y 1,000") == "xy 1000"


def test_punctuation_is_the_official_list() -> None:
    """21 marks; the apostrophe, colon and others are not among them."""
    assert set(PUNCTUATION) == set('[](){}<>;/"=+\\_-@`,?!')
    assert len(PUNCTUATION) == 21


def test_contractions_differ_by_apostrophes_only() -> None:
    """Guards the table against slips: 120 entries, each keeping its letters."""
    assert len(CONTRACTIONS) == 120
    for word, contraction in CONTRACTIONS.items():
        assert word.replace("'", "") == contraction.replace("'", "")


def test_only_32_periods_are_removed() -> None:
    """The official scorer passes a flag of value 32 where a count is expected."""
    assert normalise_answer("." * 32) == ""
    assert normalise_answer("." * 40) == "." * 8


def test_soft_scores() -> None:
    """Weights by number of annotators, counted after normalisation, empty answers dropped."""
    answers = ["Two", "2", "two.", "2", "dog", "the dog", "dogs", "the", "?", ""]
    assert soft_scores(answers) == {"2": 1.0, "dog": 0.6, "dogs": 0.3}
    assert soft_scores(["red"] * 3 + ["blue"] * 7) == {"red": 0.9, "blue": 1.0}
    assert soft_scores(["the"] * 10) == {}


def test_score_groups_and_rounding() -> None:
    """Percent with two decimals, groups in sorted order."""
    score = score_vqa([(1.0, "yes/no", "is"), (0.3, "other", "what"), (0.3, "other", "is")])
    assert score == {
        "overall": 53.33,
        "perAnswerType": {"other": 30.0, "yes/no": 100.0},
        "perQuestionType": {"is": 65.0, "what": 30.0},
        "n": 3,
    }
    assert list(score["perAnswerType"]) == ["other", "yes/no"]
    assert json.loads(json.dumps(score)) == score
