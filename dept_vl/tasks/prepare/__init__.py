"""Data sets made ready: downloads, conversions, samples, and checks of what is there.

Used by `dept-vl data`; nothing here is needed to train.
"""

__all__ = ["check", "commands", "copies", "easy_vqa", "hub", "parquet", "snippets", "staging"]
