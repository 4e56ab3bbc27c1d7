"""Data of the studies in a clone: easy-VQA, rendered scenes with questions, and snippets of movie reviews.

The included backbones are pretrained on the scenes (`scripts/pretrain_tiny.py`). Some phrasings are excluded
from pretraining, so that a prompt can learn them. `scripts/prepare_data.py` has the commands.
"""
