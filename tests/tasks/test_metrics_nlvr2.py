"""NLVR2 figures against the official scorer's, and its rules one by one."""

import csv
import json
import random
from pathlib import Path

import pytest

from dept_vl.tasks.metrics.nlvr2 import score_nlvr2, sentence_key

FIXTURE = Path(__file__).parents[1] / "fixtures" / "nlvr2"
EXPECTED: dict[str, float] = json.loads((FIXTURE / "expected.json").read_text(encoding="utf-8"))
with (FIXTURE / "cases.csv").open(encoding="utf-8", newline="") as file:
    ROWS = list(csv.DictReader(file))

EXAMPLES = [(row["identifier"], row["label"]) for row in ROWS]
PREDICTIONS = {row["identifier"]: row["prediction"] for row in ROWS}


def test_figures_as_official() -> None:
    """To the last digit, whatever the order of the examples; other predictions are ignored."""
    score = score_nlvr2(EXAMPLES, PREDICTIONS)
    assert score == EXPECTED
    assert list(score) == list(EXPECTED)
    shuffled = random.Random(0).sample(EXAMPLES, len(EXAMPLES))
    assert score_nlvr2(iter(shuffled), {"train-1-0-0": "True", **PREDICTIONS}) == score


def test_a_sentence_is_consistent_if_all_its_pairs_are_right() -> None:
    """Sentences 0 and 1 of a set are two, and so are sentences 0 of two sets or splits."""
    labels = {
        "dev-7-0-0": "True",
        "dev-7-1-0": "False",
        "dev-7-0-1": "True",
        "dev-8-0-0": "False",
        "test1-7-0-0": "True",
    }
    score = score_nlvr2(labels.items(), {**labels, "dev-7-0-0": "False"})
    assert score == {"accuracy": 4 / 5, "consistency": 3 / 4, "examples": 5}
    # It is the same whether the wrong one comes first or last.
    assert score_nlvr2(labels.items(), {**labels, "dev-7-1-0": "True"}) == score


def test_labels_are_compared_in_lower_case() -> None:
    """Any other prediction is wrong, as in the official scorer."""
    examples = [("dev-1-0-0", "True"), ("dev-1-0-1", "FALSE"), ("dev-1-0-2", "false"), ("dev-1-0-3", "True")]
    predictions = {"dev-1-0-0": "true", "dev-1-0-1": "False", "dev-1-0-2": "no", "dev-1-0-3": " True"}
    assert score_nlvr2(examples, predictions) == {"accuracy": 0.5, "consistency": 0.5, "examples": 4}


@pytest.mark.parametrize(
    ("identifier", "key"),
    [("dev-305-3-1", "dev-305-1"), ("train-10171-0-0", "train-10171-0"), ("test1-0-2-1", "test1-0-1")],
)
def test_sentence_key(identifier: str, key: str) -> None:
    """The third part, the image pair, is removed."""
    assert sentence_key(identifier) == key
