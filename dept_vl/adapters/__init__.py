"""A trained prompt as a small file: saved, loaded, shared, described, attached to other models.

An adapter is what is passed on; the state of a run that can be resumed is `training.checkpoint`.
"""

__all__ = [
    "adapter",
    "attach",
    "authors",
    "calls",
    "card",
    "families",
    "fingerprint",
    "hub",
    "offload",
    "peft",
    "schema",
    "tensors",
    "warm_start",
]
