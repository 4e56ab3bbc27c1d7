"""Every open question about a GPU, measured in minutes; `scripts/gpu_check.py` runs it.

`parts` runs one part after the other in processes of their own; each of the others is what a part measures.
"""

__all__ = ["images", "launches", "parts", "ready_made", "report", "results", "runs"]
