"""Frozen models with a prompt on them: vision tower, visual projection, language model.

`backbone` joins them, `prompted` puts a prompt in front (`row_prompts`: another for every row), and `tokens`
turns answers into tokens.
"""

__all__ = [
    "backbone",
    "base",
    "checks",
    "generation",
    "graphs",
    "image_features",
    "language",
    "options",
    "padding",
    "placeholders",
    "positions",
    "precision",
    "projection",
    "prompted",
    "quantised",
    "reader",
    "row_prompts",
    "sharding",
    "source",
    "tokens",
    "vision",
    "vlm",
]
