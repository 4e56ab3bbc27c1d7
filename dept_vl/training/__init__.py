"""One run: its folder, model, loop, checkpoints, log and scores.

`run` has the stages prepare, fit, score, write; `loop` is the one training loop; `score_run` scores a
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
