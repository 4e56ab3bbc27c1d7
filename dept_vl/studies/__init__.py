"""Experiments with many runs: transfer from task to task.

Only the command line imports them. The comparison of methods and the benchmarks are in `scripts/benchmarks`.
"""

__all__ = ["options", "transfer"]
