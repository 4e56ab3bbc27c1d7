"""Frozen models with a prompt on them: vision tower, visual projection, language model.

`backbone` joins them, `prompted` puts a prompt in front; `tokens` turns answers into tokens.
"""

__all__ = [
    "backbone",
    "choices",
    "language",
    "padding",
    "precision",
    "prompted",
    "sharding",
    "tokens",
    "vision",
]
