"""A small rendered world: scenes of coloured shapes, and questions about them in plain English.

The shipped backbones are pretrained on it (`scripts/pretrain_tiny.py`), with some phrasings kept out
so that a prompt has something to learn.
"""

__all__ = ["official", "questions", "render", "texts"]
