"""Experiments with many runs: search, transfer, comparison of methods.

Only the command line imports them.
"""

__all__ = [
    "compare",
    "compare_methods",
    "compare_report",
    "costs",
    "measure",
    "options",
    "search",
    "transfer",
    "transfer_suite",
]
