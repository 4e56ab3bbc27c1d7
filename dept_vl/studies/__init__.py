"""Experiments with many runs: search, transfer, comparison of methods, benchmarks.

Only the command line imports them.
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
