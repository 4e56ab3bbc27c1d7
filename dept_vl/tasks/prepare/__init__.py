"""Preparation of data sets: downloads, conversions and checks.

Used by `dept-vl data`; training does not need it.
"""

__all__ = ["check", "commands", "copies", "parquet", "staging"]
