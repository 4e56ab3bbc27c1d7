"""Benchmark of time and memory of a step, for this package, PEFT and others; `scripts/bench.py` runs it."""

__all__ = ["costs", "figures", "measure", "methods", "pretrained", "steps"]
