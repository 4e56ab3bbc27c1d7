"""Inference: decoding, evaluation, `Predictor`, batches with several adapters, the demo and the server.

The same question gets the same answer in all of them.
"""

__all__ = [
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
