"""Frozen models with a prompt on them: vision tower, visual projection, language model.

`backbone` joins them, `prompted` puts a prompt in front (`rows`: another for every row); `tokens` turns
answers into tokens.
"""

__all__ = [
    "backbone",
    "choices",
    "language",
    "padding",
    "positions",
    "precision",
    "prompted",
    "rows",
    "sharding",
    "tokens",
    "vision",
]
