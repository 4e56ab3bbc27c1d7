"""Time and memory of a step, ours and others', side by side; `scripts/bench.py` runs it."""

__all__ = ["costs", "figures", "measure", "methods", "pretrained", "steps"]
