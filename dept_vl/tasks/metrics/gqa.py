"""GQA scores: accuracy in all its cuts, consistency, validity, plausibility, distribution.

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
"""Steps that only put the question, so they do not make its reasoning longer."""

COMMON_ANSWERS = ("color", "material", "shape")
"""What two things can have in common, whatever the choices file lists."""

SHOWN = 3
"""How many question ids an error message shows."""

Key = TypeVar("Key", str, int)


def _field(where: str, record: object, path: str, kind: type | UnionType) -> Any:
    """Return the value under a dotted path of keys, checked to be of a kind."""
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
    """What the scorer needs of a question.

    Attributes:
        question_id: Its key in the questions file.
        question: The question as written.
        answer: The gold answer.
        is_balanced: Whether it is scored; the others only serve consistency.
        group: The global group (`groups.global`) whose answers the distribution score compares.
        entailed: Ids of the questions whose answers follow from this one's; may name itself.
        structural: Structural type: verify, query, choose, logical or compare.
        semantic: Semantic type: obj, attr, cat, rel or global.
        detailed: Detailed type, such as `twoCommon`.
        steps: Number of reasoning steps.
    """

    question_id: str
    question: str
    answer: str
    is_balanced: bool
    group: str | None
    entailed: tuple[str, ...]
    structural: str
    semantic: str
    detailed: str
    steps: int

    @classmethod
    def from_record(cls, question_id: str, record: dict[str, Any]) -> "GqaQuestion":
        """Read one record of an official questions file; raise ValueError, naming it, if it is damaged."""
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
"""By the official scorer's keys."""


def _percent(hits: Sequence[bool]) -> float:
    # Official quirk: the mean of nothing is 0.
    return sum(hits) / len(hits) * 100 if hits else 0.0


def _percent_by(keys: Iterable[Key], right: Iterable[bool]) -> dict[str, Figures]:
    """Accuracy and count of each key, in the order of the keys; JSON has strings alone."""
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
    """Share of the predictions that are among the `valid` or `plausible` answers."""
    return _percent(
        [
            predictions[question.question_id]
            # Official quirk: for questions of what is common the choices file is not looked at,
            # by which an answer like "white" is neither valid nor plausible, even if it is right.
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
    # Added up one by one, in the order of the questions: so the last digit is the official one too.
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
    """Chi-square of each group's answers, averaged over groups with their sizes as weights."""
    gold: defaultdict[str, Counter[str]] = defaultdict(Counter)
    predicted: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for question in balanced:
        # Questions without a global group have no answers to compare with.
        if question.group is not None:
            gold[question.group][question.answer] += 1
            predicted[question.group][predictions[question.question_id]] += 1
    if not gold:
        return None
    # Added up one by one, in order of first appearance, again for the last digit.
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
    """Raise one error for all the questions that share a problem, if there are any."""
    if ids:
        shown = ", ".join(ids[:SHOWN]) + (", ..." if len(ids) > SHOWN else "")
        raise ValueError(f"{problem}: {len(ids)} ({shown})")


def _check_consistency_input(
    balanced: Sequence[GqaQuestion], by_id: Mapping[str, GqaQuestion], predictions: Mapping[str, str]
) -> None:
    _refuse(
        list(dict.fromkeys(other for each in balanced for other in each.entailed if other not in by_id)),
        "consistency needs the entailed questions, which only the official `all` files hold; read "
        "one of these or pass `consistency=False`. Entailed questions that are missing",
    )
    _refuse(
        [question_id for question_id in by_id if question_id not in predictions],
        "consistency needs an answer to every question, balanced or not; answer all or pass "
        "`consistency=False`. Questions without a prediction",
    )


def score_gqa(
    questions: Mapping[str, GqaQuestion] | Iterable[GqaQuestion],
    predictions: Mapping[str, str],
    choices: Mapping[str, Mapping[str, Sequence[str]]] | None = None,
    *,
    consistency: bool = True,
) -> Figures:
    """Score predicted answers as the official GQA scorer does (Hudson and Manning 2019).

    Balanced questions are scored. The others count for one thing: where a balanced question that is
    answered rightly entails them, their answers decide its consistency.

    Args:
        questions: The questions of a split, or a mapping of them by their id. In an iterable,
            questions of the same id count once.
        predictions: Predicted answer by question id, compared as written; others are ignored. As
            in the official scorer, every question needs one, or with ``consistency=False`` every
            balanced question.
        choices: The official choices file: by question id, the `valid` and the `plausible` answers.
            Without it validity and plausibility are None.
        consistency: Whether to compute consistency (``--consistency`` of the official scorer),
            which needs a split's `all` questions. Pass False to score a `balanced` file.

    Returns:
        By the official keys, percent (0 to 100) of balanced questions, not rounded:

        - `accuracy`; `binary` and `open`, of the structural types but `query` and of `query`, 0 without any;
        - `validity` and `plausibility`, with choices: answers in the question's scope, and in the real world;
        - `consistency`, if it is asked for: mean, over the rightly answered questions that entail others, of
          the share of these that are right as well;
        - `distribution`: chi-square distance of predicted from gold answers, lower is better; left out if no
          question has a global group (there the official scorer divides by zero);
        - `accuracyPerStructuralType`, `...SemanticType`, `...Steps` and `...Length` (words of the question):
          `score` and `count` of each, keys sorted.

        The last digits of consistency and distribution follow the order of the questions, as they do in the
        official scorer.

    Raises:
        ValueError: If there is no balanced question, a prediction or the choices of a balanced
            question are missing, or consistency is asked for and an entailed question is missing.
    """
    by_id = questions if isinstance(questions, Mapping) else {each.question_id: each for each in questions}
    balanced = [question for question in by_id.values() if question.is_balanced]
    if not balanced:
        raise ValueError(f"expected at least one balanced GQA question, found none among {len(by_id)}")
    if consistency:
        _check_consistency_input(balanced, by_id, predictions)
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
