"""NLVR2 accuracy and consistency.

Follows the official NLVR2 scorer (``nlvr2/eval/metrics.py`` of the NLVR repository; Suhr et al.
2019, "A Corpus for Reasoning About Natural Language Grounded in Photographs").
``tests/fixtures/nlvr2`` holds cases scored by the official scorer.
"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass

LABELS = ("true", "false")

SHOWN = 3
"""How many identifiers an error message shows."""


@dataclass(frozen=True)
class Nlvr2Score:
    """The official figures.

    Attributes:
        accuracy: Share of examples judged rightly, 0 to 1.
        consistency: Share of sentences all of whose image pairs were judged rightly, 0 to 1.
        examples: Number of examples.
    """

    accuracy: float
    consistency: float
    examples: int

    def to_json(self) -> dict[str, float | int]:
        """The figures by name."""
        return asdict(self)


def sentence_key(identifier: str) -> str:
    """What the examples of one sentence share: the identifier with its third part removed.

    Args:
        identifier: An example's `split-set-pair-sentence`, such as ``dev-305-3-1``.

    Returns:
        The `split-set-sentence`, such as ``dev-305-1``.

    Raises:
        ValueError: If the identifier has not four parts.
    """
    parts = identifier.split("-")
    if len(parts) != 4:
        raise ValueError(
            "expected an NLVR2 identifier 'split-set-pair-sentence' such as 'dev-305-3-1', "
            f"found {identifier!r}"
        )
    split, image_set, _, sentence = parts
    return f"{split}-{image_set}-{sentence}"


def score_nlvr2(examples: Iterable[tuple[str, str]], predictions: Mapping[str, str]) -> Nlvr2Score:
    """Score judgements as the official NLVR2 scorer does (Suhr et al. 2019).

    Labels and predictions are compared in lower case: the dataset writes ``True``, models often
    ``true``. Any other prediction, such as ``yes`` or `` true``, is wrong.

    Args:
        examples: The ``(identifier, label)`` of each example, label ``True`` or ``False`` in any
            case. Each example once.
        predictions: Predicted label by identifier; those of other examples are ignored.

    Returns:
        Accuracy and consistency as fractions, not rounded.

    Raises:
        ValueError: If there are no examples, a label is neither true nor false, an identifier has
            not four parts, or a prediction is missing.
    """
    labels = list(examples)
    if not labels:
        raise ValueError("expected at least one NLVR2 example, found none")
    missing = [identifier for identifier, _ in labels if identifier not in predictions]
    if missing:
        shown = ", ".join(missing[:SHOWN]) + (", ..." if len(missing) > SHOWN else "")
        raise ValueError(
            f"every NLVR2 example needs a prediction; {len(missing)} of {len(labels)} have none ({shown})"
        )
    right = 0
    # By identifier, not by text: the same words in another set are another sentence.
    consistent: dict[str, bool] = {}
    for identifier, label in labels:
        if label.lower() not in LABELS:
            raise ValueError(
                f"NLVR2 example {identifier!r}: expected the label 'True' or 'False', found {label!r}"
            )
        is_right = predictions[identifier].lower() == label.lower()
        key = sentence_key(identifier)
        right += is_right
        consistent[key] = consistent.get(key, True) and is_right
    return Nlvr2Score(
        accuracy=right / len(labels),
        consistency=sum(consistent.values()) / len(consistent),
        examples=len(labels),
    )
