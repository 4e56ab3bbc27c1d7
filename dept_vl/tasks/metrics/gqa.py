"""GQA scores: accuracy, overall and by groups, consistency, validity, plausibility and distribution.

Follows the official GQA scorer (``eval.py`` of the GQA dataset; Hudson and Manning 2019, "GQA: A
New Dataset for Real-World Visual Reasoning and Compositional Question Answering"), including the
quirks that published numbers depend on. Its grounding score needs attention maps and is left out.
``tests/fixtures/gqa`` holds cases scored by the official scorer.

Answers are compared as written, so ``Yes`` is wrong where ``yes`` is right. Nothing is rounded.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import UnionType
from typing import Any, TypeVar

UNCOUNTED_STEPS = ("exist", "query: name", "choose name")
"""Steps that are not counted as reasoning steps."""

COMMON_ANSWERS = ("color", "material", "shape")
"""Allowed answers to questions about what two things have in common, in place of the choices file."""

SHOWN = 3
"""Number of question ids in an error message."""

Key = TypeVar("Key", str, int)


def _field(where: str, record: object, path: str, kind: type | UnionType) -> Any:
    """Return the value under a dotted path of keys, after checking its type."""
    value: Any = record
    for key in path.split("."):
        if not isinstance(value, dict) or key not in value:
            raise ValueError(
                f"{where}: expected the key {path!r}, found none; the official test and submission "
                "files hold no answers and cannot be scored"
            )
        value = value[key]
    if not isinstance(value, kind):
        raise ValueError(f"{where}: expected {path!r} to be of type {kind}, found {value!r:.60}")
    return value


def _count_steps(where: str, semantic: list[object]) -> int:
    steps = [
        f"{_field(where, step, 'operation', object)}: {_field(where, step, 'argument', object)}"
        for step in semantic
    ]
    # Official quirk: found anywhere in the step, so "select: exist sign" is not counted either.
    return sum(not any(uncounted in step for uncounted in UNCOUNTED_STEPS) for step in steps)


@dataclass(frozen=True, slots=True)
class GqaQuestion:
    """The fields of a GQA question that the scorer uses."""

    question_id: str  # key of the question in the questions file
    question: str
    answer: str  # gold answer
    is_balanced: bool  # whether the question is scored; others are only used for consistency
    group: str | None  # global group (`groups.global`), by which the distribution score compares answers
    entailed: Sequence[str]  # ids of the questions whose answers follow from this one, perhaps with its own
    structural: str  # verify, query, choose, logical or compare
    semantic: str  # obj, attr, cat, rel or global
    detailed: str  # such as `twoCommon`
    steps: int  # number of reasoning steps

    @classmethod
    def from_record(cls, question_id: str, record: dict[str, Any]) -> "GqaQuestion":
        """Read one record of an official questions file; raise ValueError with its id if it is damaged."""
        where = f"GQA question {question_id!r:.60}"
        return cls(
            question_id=question_id,
            question=_field(where, record, "question", str),
            answer=_field(where, record, "answer", str),
            is_balanced=_field(where, record, "isBalanced", bool),
            group=_field(where, record, "groups.global", str | None),
            entailed=tuple(_field(where, record, "entailed", list)),
            structural=_field(where, record, "types.structural", str),
            semantic=_field(where, record, "types.semantic", str),
            detailed=_field(where, record, "types.detailed", str),
            steps=_count_steps(f"{where}, a step of 'semantic'", _field(where, record, "semantic", list)),
        )


Figures = dict[str, Any]
"""Scores by the official scorer's keys."""


def _percent(hits: Sequence[bool]) -> float:
    # Official quirk: the mean of nothing is 0.
    return sum(hits) / len(hits) * 100 if hits else 0.0


def _percent_by(keys: Iterable[Key], right: Iterable[bool]) -> dict[str, Figures]:
    """Return the accuracy and count of each key, sorted by key. Keys become strings, as in JSON."""
    grouped: defaultdict[Key, list[bool]] = defaultdict(list)
    for key, is_right in zip(keys, right, strict=True):
        grouped[key].append(is_right)
    return {
        str(key): {"score": _percent(grouped[key]), "count": len(grouped[key])} for key in sorted(grouped)
    }


def _percent_allowed(
    balanced: Sequence[GqaQuestion],
    predictions: Mapping[str, str],
    choices: Mapping[str, Mapping[str, Sequence[str]]],
    kind: str,
) -> float:
    """Return the percentage of predictions that are among the `valid` or `plausible` answers."""
    return _percent(
        [
            predictions[question.question_id]
            # Official quirk: questions about what is common ignore the choices file, so an answer like
            # "white" is neither valid nor plausible, even if it is correct.
            in (COMMON_ANSWERS if "Common" in question.detailed else choices[question.question_id][kind])
            for question in balanced
        ]
    )


def _consistency(
    balanced: Sequence[GqaQuestion],
    right: Sequence[bool],
    by_id: Mapping[str, GqaQuestion],
    predictions: Mapping[str, str],
) -> float:
    # Summed in the order of the questions, so that even the last digit equals the official one.
    total, count = 0.0, 0
    for question, is_right in zip(balanced, right, strict=True):
        # A question may name itself among the entailed. Those need not be balanced.
        entailed = [by_id[other] for other in question.entailed if other != question.question_id]
        if is_right and entailed:
            hits = sum(predictions[other.question_id] == other.answer for other in entailed)
            total += hits / len(entailed)
            count += 1
    return total / count * 100 if count else 0.0


def _distribution(balanced: Sequence[GqaQuestion], predictions: Mapping[str, str]) -> float | None:
    """Return the chi-square distance of each group's answers, averaged with the group sizes as weights."""
    gold: defaultdict[str, Counter[str]] = defaultdict(Counter)
    predicted: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for question in balanced:
        # Questions without a global group have no answers to compare with.
        if question.group is not None:
            gold[question.group][question.answer] += 1
            predicted[question.group][predictions[question.question_id]] += 1
    if not gold:
        return None
    # Summed in order of first appearance, so that even the last digit equals the official one.
    weighted = 0.0
    for group, counts in gold.items():
        chi_square = 0.0
        # Official quirk: only over gold answers. One that is predicted but never gold counts nowhere.
        for answer, count in counts.items():
            chi_square += (predicted[group][answer] - count) ** 2 / count
        weighted += chi_square * counts.total()
    # The division by 100 is the official one: a distance, not a percentage.
    return weighted / sum(counts.total() for counts in gold.values()) / 100


def _refuse(ids: Sequence[str], problem: str) -> None:
    """Raise a ValueError that names the questions with a problem, if there are any."""
    if ids:
        shown = ", ".join(ids[:SHOWN]) + (", ..." if len(ids) > SHOWN else "")
        raise ValueError(f"{problem}: {len(ids)} ({shown})")


def score_gqa(
    questions: Mapping[str, GqaQuestion] | Iterable[GqaQuestion],
    predictions: Mapping[str, str],
    choices: Mapping[str, Mapping[str, Sequence[str]]] | None = None,
    *,
    consistency: bool = True,
) -> Figures:
    """Score predicted answers as the official GQA scorer does (Hudson and Manning 2019).

    Only balanced questions are scored. Predictions for the others are used for the consistency of a
    correctly answered balanced question that entails them.

    Args:
        questions: Questions of a split, as an iterable or by id. In an iterable, questions with the same
            id count once.
        predictions: Predicted answer by question id, compared as written; others are ignored. Every balanced
            question needs one, and with `consistency` every question.
        choices: Content of the official choices file: `valid` and `plausible` answers by question id.
            If None, validity and plausibility are left out.
        consistency: Whether to compute consistency (``--consistency`` of the official scorer),
            which needs a split's `all` questions. Pass False to score a `balanced` file.

    Returns:
        Percentages (0 to 100) of balanced questions by the official keys, not rounded:

        - `accuracy`; `open` for the structural type `query`, `binary` for the others; 0 without any;
        - `validity` and `plausibility`, if `choices` is given: predictions within the question's scope, and
          predictions that make sense in the real world;
        - `consistency`, unless disabled: mean, over the correctly answered questions that entail others, of
          the share of entailed questions that are correct too;
        - `distribution`: chi-square distance of predictions from gold answers, lower is better; left out if
          no question has a global group (the official scorer then divides by zero);
        - `accuracyPerStructuralType`, `...SemanticType`, `...Steps` and `...Length` (words of the question):
          `score` and `count` of each, keys sorted.

        As in the official scorer, the last digits of consistency and distribution depend on the order of the
        questions.

    Raises:
        ValueError: If there is no balanced question, or a prediction or the choices of one are missing.
    """
    by_id = questions if isinstance(questions, Mapping) else {each.question_id: each for each in questions}
    balanced = [question for question in by_id.values() if question.is_balanced]
    if not balanced:
        raise ValueError(f"expected at least one balanced GQA question, found none among {len(by_id)}")
    _refuse(
        [question.question_id for question in balanced if question.question_id not in predictions],
        "every balanced question needs a prediction. Balanced questions without one",
    )
    if choices is not None:
        _refuse(
            [
                question.question_id
                for question in balanced
                if not {"valid", "plausible"} <= choices.get(question.question_id, {}).keys()
            ],
            "every balanced question needs `valid` and `plausible` choices; pass the choices file of "
            "the same split or none. Questions without them",
        )

    right = [predictions[question.question_id] == question.answer for question in balanced]
    is_open = [question.structural == "query" for question in balanced]
    figures = {
        "accuracy": _percent(right),
        "binary": _percent([r for r, open_ in zip(right, is_open, strict=True) if not open_]),
        "open": _percent([r for r, open_ in zip(right, is_open, strict=True) if open_]),
        **{
            name: _percent_allowed(balanced, predictions, choices, kind)
            for name, kind in (("validity", "valid"), ("plausibility", "plausible"))
            if choices is not None
        },
        "consistency": _consistency(balanced, right, by_id, predictions) if consistency else None,
        "distribution": _distribution(balanced, predictions),
    }
    return {
        **{name: figure for name, figure in figures.items() if figure is not None},
        "accuracyPerStructuralType": _percent_by((question.structural for question in balanced), right),
        "accuracyPerSemanticType": _percent_by((question.semantic for question in balanced), right),
        "accuracyPerSteps": _percent_by((question.steps for question in balanced), right),
        # Words are what spaces separate: "dog?" is one, "dog ?" would be two.
        "accuracyPerLength": _percent_by((len(question.question.split()) for question in balanced), right),
    }
