"""Experiments with many runs: search and transfer.

Only the command line imports them. The comparison of methods and the benchmarks are in `scripts/benchmarks`.
"""

__all__ = ["options", "search", "transfer"]
