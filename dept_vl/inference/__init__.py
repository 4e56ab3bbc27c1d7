"""From questions to answers: decoding, evaluation, a predictor, rows with different adapters, a server.

The same question gets the same answer in evaluation, prediction, the demo and from the server.
"""

__all__ = [
    "bulk",
    "chat",
    "cluster",
    "decoding",
    "demo",
    "endpoints",
    "evaluate",
    "gate",
    "given",
    "graphed",
    "lmms",
    "loading",
    "mixed",
    "options",
    "predict",
    "predictor",
    "replica",
    "server",
]
