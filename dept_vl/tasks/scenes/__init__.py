"""Rendered scenes of coloured shapes, and questions about them in plain English.

The included backbones are pretrained on them (`scripts/pretrain_tiny.py`). Some phrasings are excluded from
pretraining, so that a prompt can learn them.
"""

__all__ = ["official", "questions", "render"]
