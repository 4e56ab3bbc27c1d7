"""GQA figures against the official scorer's, and its rules one by one."""

import csv
import dataclasses
import json
import random
from pathlib import Path
from typing import Any

import pytest

from dept_vl.tasks.metrics.gqa import GqaQuestion, score_gqa

FIXTURE = Path(__file__).parents[1] / "fixtures" / "gqa"
EXPECTED: dict[str, Any] = json.loads((FIXTURE / "expected.json").read_text(encoding="utf-8"))
with (FIXTURE / "cases.tsv").open(encoding="utf-8", newline="") as file:
    ROWS = list(csv.DictReader(file, delimiter="\t"))

PREDICTIONS = {row["question_id"]: row["prediction"] for row in ROWS}
CHOICES = {
    row["question_id"]: {"valid": row["valid"].split(), "plausible": row["plausible"].split()}
    for row in ROWS
    if row["is_balanced"] == "yes"
}


def official_record(row: dict[str, str]) -> dict[str, Any]:
    """A row of the fixture in the shape of the official questions file."""
    steps = [step.split(": ", maxsplit=1) for step in row["semantic"].split("; ")]
    return {
        "question": row["question"],
        "answer": row["answer"],
        "isBalanced": row["is_balanced"] == "yes",
        "groups": {"global": row["global_group"] or None, "local": None},
        "entailed": row["entailed"].split(),
        "types": {
            "structural": row["structural"],
            "semantic": row["semantic_type"],
            "detailed": row["detailed"],
        },
        "semantic": [{"operation": operation, "argument": argument} for operation, argument in steps],
    }


QUESTIONS = {
    row["question_id"]: GqaQuestion.from_record(row["question_id"], official_record(row)) for row in ROWS
}

PLAIN = GqaQuestion(
    question_id="1",
    question="Is the dog brown?",
    answer="yes",
    is_balanced=True,
    group="dog",
    entailed=(),
    structural="verify",
    semantic="attr",
    detailed="verifyAttr",
    steps=2,
)


def plain(question_id: str, **changes: Any) -> GqaQuestion:
    """A balanced yes/no question, with changes."""
    return dataclasses.replace(PLAIN, question_id=question_id, **changes)


def without(figures: dict[str, Any], *names: str) -> dict[str, Any]:
    """The figures but these."""
    return {name: figure for name, figure in figures.items() if name not in names}


def test_every_figure_as_official() -> None:
    """To the last digit, under the same keys in the same order; also as JSON."""
    figures = score_gqa(QUESTIONS, PREDICTIONS, CHOICES)
    assert figures == EXPECTED
    assert list(figures) == list(EXPECTED)
    assert json.loads(json.dumps(figures)) == EXPECTED


def test_questions_may_be_iterated_once() -> None:
    """And neither the order of the predictions nor predictions of other questions matter."""
    shuffled = list(PREDICTIONS.items())
    random.Random(0).shuffle(shuffled)
    predictions = dict([("another", "yes"), *shuffled])
    assert score_gqa(iter(QUESTIONS.values()), predictions, CHOICES) == EXPECTED


def test_order_of_questions_is_a_matter_of_last_digits() -> None:
    """Counts are exact; means of fractions are added up in order."""
    turned = score_gqa(reversed(QUESTIONS.values()), PREDICTIONS, CHOICES)
    fractional = ("consistency", "distribution")
    assert without(turned, *fractional) == without(EXPECTED, *fractional)
    for name in fractional:
        assert turned[name] == pytest.approx(EXPECTED[name], rel=1e-12)


def test_without_choices() -> None:
    """Validity and plausibility are left out, nothing else changes."""
    score = score_gqa(QUESTIONS, PREDICTIONS)
    assert (score.get("validity"), score.get("plausibility")) == (None, None)
    assert score == without(EXPECTED, "validity", "plausibility")


def test_balanced_questions_alone() -> None:
    """As in a `balanced` file: the same figures but consistency."""
    balanced = [question for question in QUESTIONS.values() if question.is_balanced]
    predictions = {question.question_id: PREDICTIONS[question.question_id] for question in balanced}
    score = score_gqa(balanced, predictions, CHOICES, consistency=False)
    assert score.get("consistency") is None
    assert score == without(EXPECTED, "consistency")
    # Without consistency the others need no predictions either.
    assert score_gqa(QUESTIONS, predictions, CHOICES, consistency=False) == score


def test_answers_are_compared_as_written() -> None:
    """Case and spaces included."""
    questions = [plain("1"), plain("2"), plain("3"), plain("4")]
    assert score_gqa(questions, {"1": "yes", "2": "Yes", "3": "yes ", "4": "yes."})["accuracy"] == 25.0


def test_open_is_the_structural_type_query() -> None:
    """Everything else is binary, `choose` as well; a kind without questions scores 0."""
    questions = [
        plain("1", structural="query"),
        plain("2", structural="choose"),
        plain("3", structural="compare"),
    ]
    score = score_gqa(questions, {"1": "yes", "2": "yes", "3": "no"})
    assert (score["open"], score["binary"]) == (100.0, 50.0)
    only_binary = score_gqa(questions[1:], {"2": "yes", "3": "yes"})
    assert (only_binary["open"], only_binary["binary"]) == (0.0, 100.0)


def test_groups_are_counted_and_sorted() -> None:
    """By value: 4 before 10, and strings in JSON. Words are what spaces separate."""
    questions = [
        plain("1", question="a b c d e f g h i j", steps=10, semantic="rel"),
        plain("2", question=" Is  it\tred ?\n", steps=4),
        plain("3", question="Is it red?", steps=4),
    ]
    score = score_gqa(questions, {"1": "yes", "2": "yes", "3": "no"})
    assert list(score["accuracyPerLength"].items()) == [
        ("3", {"score": 0.0, "count": 1}),
        ("4", {"score": 100.0, "count": 1}),
        ("10", {"score": 100.0, "count": 1}),
    ]
    assert list(score["accuracyPerSemanticType"]) == ["attr", "rel"]
    assert list(score["accuracyPerSteps"].items()) == [
        ("4", {"score": 50.0, "count": 2}),
        ("10", {"score": 100.0, "count": 1}),
    ]


@pytest.mark.parametrize(
    ("predictions", "expected"),
    [
        ("yes yes yes", 100.0),
        ("yes yes no", 50.0),
        ("yes no no", 0.0),
        # A wrong answer entails nothing, and nothing is left to average.
        ("no yes yes", 0.0),
    ],
)
def test_consistency_asks_what_a_right_answer_entails(predictions: str, expected: float) -> None:
    """Whether or not the entailed questions are balanced; the question itself does not count."""
    questions = [plain("1", entailed=("1", "2", "3")), plain("2"), plain("3", is_balanced=False)]
    score = score_gqa(questions, dict(zip("123", predictions.split(), strict=True)))
    assert score["consistency"] == expected


def test_consistency_averages_over_entailing_questions() -> None:
    """Each weighs the same. One that entails itself alone is none, nor is an unbalanced one."""
    questions = [
        plain("1", entailed=("2", "3", "4")),
        plain("2", entailed=("3",)),
        plain("3", entailed=("3",)),
        plain("4", is_balanced=False, entailed=("1",)),
    ]
    predictions = {"1": "yes", "2": "yes", "3": "no", "4": "yes"}
    assert score_gqa(questions, predictions)["consistency"] == pytest.approx(100 * (2 / 3 + 0) / 2, rel=1e-15)


def test_only_balanced_questions_are_scored() -> None:
    """Accuracy, groups and distribution take no note of the others, even of their entailed ids."""
    questions = [plain("1"), plain("2", is_balanced=False, steps=7, group="cat", entailed=("absent",))]
    with_both = score_gqa(questions, {"1": "yes", "2": "no"})
    assert with_both == score_gqa(questions[:1], {"1": "yes"})
    assert with_both["accuracy"] == 100.0


def test_choices_of_common_types() -> None:
    """What two things share is a color, material or shape, whatever the choices file says."""
    questions = [
        plain("1", answer="white", detailed="twoCommon"),
        plain("2", answer="color", detailed="compareCommon"),
        plain("3", answer="white", detailed="common"),
        plain("4", answer="white"),
    ]
    predictions = {"1": "white", "2": "color", "3": "white", "4": "black"}
    choices = {number: {"valid": ["white", "black"], "plausible": ["white"]} for number in "1234"}
    score = score_gqa(questions, predictions, choices)
    # Valid: 2, 3 and 4. Plausible: 2 and 3. The rule is spelled with a capital.
    assert (score["validity"], score["plausibility"]) == (75.0, 50.0)


def test_distribution_is_chi_square_by_group() -> None:
    """Weighted by group size, over gold answers only, divided by 100."""
    answers = {
        # gold 3 a, 1 b; predicted 2 a, 2 c: (2-3)^2/3 + (0-1)^2/1 = 4/3, weight 4
        "dog": [("a", "a"), ("a", "a"), ("a", "c"), ("b", "c")],
        # gold 2 a; predicted 2 a: 0, weight 2
        "cat": [("a", "a"), ("a", "a")],
        None: [("a", "b")] * 5,
    }
    cases = [(group, gold, predicted) for group, pairs in answers.items() for gold, predicted in pairs]
    questions = [plain(str(n), group=group, answer=gold) for n, (group, gold, _) in enumerate(cases)]
    predictions = {str(n): predicted for n, (_, _, predicted) in enumerate(cases)}
    expected = (4 / 3 * 4 + 0 * 2) / 6 / 100
    assert score_gqa(questions, predictions)["distribution"] == pytest.approx(expected, rel=1e-15)
    ungrouped = score_gqa(questions[-5:], predictions, consistency=False)
    assert ungrouped.get("distribution") is None
    assert "distribution" not in ungrouped


@pytest.mark.parametrize(
    ("steps", "count"),
    [
        ("select: dog; verify color: brown", 2),
        ("select: dog; exist: ?", 1),
        ("select: dog; query: name", 1),
        ("select: dog; query: color", 2),
        ("select: dog; choose name: dog|cat", 1),
        ("select: dog; choose color: red|blue", 2),
        ("select: dog; relate: cat,on,s (1); query: name", 2),
        # Found anywhere in a step, in its argument too.
        ("select: exist sign; verify color: red", 1),
        ("exist: ?", 0),
    ],
)
def test_steps_that_put_the_question_do_not_count(steps: str, count: int) -> None:
    """Reasoning steps of `semantic`."""
    record = official_record({**ROWS[0], "semantic": steps})
    assert GqaQuestion.from_record("1", record).steps == count


def test_from_record() -> None:
    """Every field, from a record of the official shape with keys the scorer does not read."""
    record = {
        "semantic": [
            {"operation": "select", "argument": "apple (271881)", "dependencies": []},
            {"operation": "query", "argument": "color", "dependencies": [0]},
        ],
        "entailed": ["7", "8"],
        "equivalent": ["7"],
        "question": "Which color is the apple?",
        "imageId": "2354786",
        "isBalanced": False,
        "groups": {"global": None, "local": "06-apple_color"},
        "answer": "red",
        "semanticStr": "select: apple (271881)->query: color [0]",
        "annotations": {"answer": {}, "question": {"4": "271881"}, "fullAnswer": {"1": "271881"}},
        "types": {"detailed": "colorO", "semantic": "attr", "structural": "query"},
        "fullAnswer": "The apple is red.",
    }
    assert GqaQuestion.from_record("7", record) == GqaQuestion(
        question_id="7",
        question="Which color is the apple?",
        answer="red",
        is_balanced=False,
        group=None,
        entailed=("7", "8"),
        structural="query",
        semantic="attr",
        detailed="colorO",
        steps=2,
    )


@pytest.mark.parametrize(
    "key", ["question", "answer", "isBalanced", "groups", "entailed", "types", "semantic"]
)
def test_a_record_without_a_key(key: str) -> None:
    """The message names question and key."""
    with pytest.raises(ValueError, match=f"GQA question '42'.*expected the key '{key}.*found none.*test"):
        GqaQuestion.from_record("42", without(official_record(ROWS[0]), key))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("answer", None, r"expected 'answer' to be .*str.*found None"),
        ("isBalanced", "False", r"expected 'isBalanced' to be .*bool.*found 'False'"),
        ("entailed", "['7']", r"expected 'entailed' to be .*list.*found \"\['7'\]\""),
        ("groups", None, r"expected the key 'groups.global', found none"),
        ("groups", {"global": 3}, r"expected 'groups.global' to be .*str \| None.*found 3"),
        ("types", {"structural": "query", "semantic": "attr"}, r"expected the key 'types.detailed'"),
        ("semantic", [{"operation": "select"}], r"a step of 'semantic': expected the key 'argument'"),
        ("semantic", ["select: dog"], r"a step of 'semantic': expected the key 'operation'"),
    ],
)
def test_a_record_with_a_bad_value(key: str, value: object, message: str) -> None:
    """The message names question, key and what was found."""
    with pytest.raises(ValueError, match=f"GQA question '42'.*{message}"):
        GqaQuestion.from_record("42", {**official_record(ROWS[0]), key: value})


def test_missing_input_is_refused() -> None:
    """One message with the number and the first ids."""
    questions = [plain(number) for number in "12345"] + [plain("6", is_balanced=False)]
    answers = dict.fromkeys("123456", "yes")
    with pytest.raises(ValueError, match=r"at least one balanced GQA question, found none among 1"):
        score_gqa(questions[5:], answers)
    with pytest.raises(ValueError, match=r"at least one balanced GQA question, found none among 0"):
        score_gqa([], {})
    with pytest.raises(ValueError, match=r"balanced question needs a prediction.*: 4 \(1, 2, 3, \.\.\.\)$"):
        score_gqa(questions, {"5": "yes"}, consistency=False)
    choices = {number: {"valid": ["yes"], "plausible": ["yes"]} for number in "1234"}
    with pytest.raises(ValueError, match=r"needs `valid` and `plausible` choices.*: 1 \(5\)$"):
        score_gqa(questions, answers, choices)
    with pytest.raises(ValueError, match=r"needs `valid` and `plausible` choices.*: 2 \(1, 5\)$"):
        score_gqa(questions, answers, {**choices, "1": {"valid": ["yes"]}})
