"""Measurements that need a GPU, within minutes; `gpu_check.py` runs them.

`parts` runs each part in its own process. The other modules measure the parts.
"""
