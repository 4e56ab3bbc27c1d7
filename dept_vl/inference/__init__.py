"""From questions to answers: decoding, evaluation, a predictor, rows with different adapters.

The same question gets the same answer in evaluation, prediction and the demo.
"""

__all__ = [
    "bulk",
    "decoding",
    "demo",
    "evaluate",
    "gate",
    "given",
    "graphed",
    "loading",
    "mixed",
    "predict",
    "predictor",
]
