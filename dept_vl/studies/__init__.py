"""Experiments over many runs: search, transfer, comparison of methods, benchmarks.

Nothing imports these but the command line.
"""

__all__ = [
    "bench",
    "compare",
    "compare_methods",
    "compare_report",
    "gpu_check",
    "options",
    "search",
    "transfer",
    "transfer_suite",
]
