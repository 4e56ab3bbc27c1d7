"""Measurements that need a GPU, within minutes; `scripts/gpu_check.py` runs them.

`parts` runs each part in its own process. The other modules measure the parts.
"""

__all__ = ["images", "launches", "parts", "ready_made", "report", "results", "runs"]
