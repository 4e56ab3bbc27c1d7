"""Experiments that need the clone's data: comparison of methods, transfers, benchmark of steps, GPU check.

`compare` and `transfer_suite` are run by the scripts of these names (`costs` measures what a step costs),
`steps` by `bench.py`, and `gpu` by `gpu_check.py`.
"""
