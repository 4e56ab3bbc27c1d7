"""Benchmark of time and memory of a step, for this package, PEFT and others; `scripts/bench.py` runs it."""

__all__ = ["backbones", "costs", "figures", "measure", "methods", "pretrained", "steps"]
