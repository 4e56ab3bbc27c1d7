"""Frozen backbones, and models that combine a backbone with a prompt.

`backbone` joins a vision tower and a language model by a visual projection, `pretrained_vlm` wraps
pretrained models, `prompted` adds a prompt (`row_prompts`: one per row of a batch), and `tokens` converts
answers to token ids.
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
    "positions",
    "precision",
    "pretrained_vlm",
    "projection",
    "prompt_hook",
    "prompted",
    "quantised",
    "reader",
    "row_prompts",
    "sharding",
    "source",
    "tokens",
    "vision",
]
