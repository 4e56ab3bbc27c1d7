"""Training runs: folder, model, training loop, checkpoints, log and scores.

`run` has the stages prepare, fit, score and write. `loop` holds the training loop. `score_run` scores a
finished run again.
"""

__all__ = [
    "build",
    "checkpoint",
    "errors",
    "extract",
    "folder",
    "graphs",
    "identity",
    "log",
    "loop",
    "optim",
    "options",
    "owner",
    "progress",
    "report",
    "run",
    "score_run",
    "stages",
    "summary",
    "trackers",
]
