"""NLVR2 accuracy and consistency.

Follows the official NLVR2 scorer (``nlvr2/eval/metrics.py`` of the NLVR repository; Suhr et al.
2019, "A Corpus for Reasoning About Natural Language Grounded in Photographs").
``tests/fixtures/nlvr2`` holds cases scored by the official scorer.
"""

from collections.abc import Iterable, Mapping


def sentence_key(identifier: str) -> str:
    """Return the identifier without the image pair: `dev-305-1` for `dev-305-3-1`. It names a sentence."""
    split, image_set, _, sentence = identifier.split("-")
    return f"{split}-{image_set}-{sentence}"


def score_nlvr2(examples: Iterable[tuple[str, str]], predictions: Mapping[str, str]) -> dict[str, float]:
    """Score predictions as the official NLVR2 scorer does (Suhr et al. 2019).

    Labels and predictions are compared in lower case: the dataset writes ``True``, models often
    ``true``. Any other prediction, such as ``yes`` or `` true``, is wrong.

    Args:
        examples: ``(identifier, label)`` of each example, once. The label is ``True`` or ``False`` in any
            case.
        predictions: Predicted label by identifier; those of other examples are ignored.

    Returns:
        Fractions, not rounded: `accuracy`, the share of correct examples, and `consistency`, the share of
        sentences that are correct for all their image pairs; and the number of `examples`.
    """
    labels = list(examples)
    right = 0
    # By identifier, not by text: the same words in another set are another sentence.
    consistent: dict[str, bool] = {}
    for identifier, label in labels:
        is_right = predictions[identifier].lower() == label.lower()
        key = sentence_key(identifier)
        right += is_right
        consistent[key] = consistent.get(key, True) and is_right
    return {
        "accuracy": right / len(labels),
        "consistency": sum(consistent.values()) / len(consistent),
        "examples": len(labels),
    }
