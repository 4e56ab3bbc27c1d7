"""Experiments over many runs: search, transfer, comparison of methods, benchmarks.

Nothing imports these but the command line.
"""

__all__ = [
    "bench",
    "compare",
    "compare_report",
    "compared",
    "options",
    "search",
    "transfer",
    "transfer_suite",
]
