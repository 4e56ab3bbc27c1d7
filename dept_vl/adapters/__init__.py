"""Adapters: saving, loading, sharing and describing trained prompts, and attaching them to other models.

An adapter has only the trained parameters. `training.checkpoint` saves the state to resume a run from.
"""

__all__ = [
    "adapter",
    "attach",
    "authors",
    "base_model",
    "calls",
    "card",
    "families",
    "fingerprint",
    "hub",
    "peft",
    "schema",
    "tensors",
    "warm_start",
]
