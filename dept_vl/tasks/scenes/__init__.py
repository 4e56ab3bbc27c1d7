"""A small rendered world: scenes of coloured shapes, and questions about them in plain English.

The shipped backbone is pretrained on it (`scripts/pretrain_tiny.py`), with some phrasings kept out
so that a prompt has something to learn.
"""

__all__ = ["batches", "official", "questions", "render", "texts"]
