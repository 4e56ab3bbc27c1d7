"""Transfer between the shipped tasks, all of the README's table.

    python scripts/transfer_suite.py

Finished runs are kept under `--output_dir`, so the same command continues where it was stopped.
"""

from dept_vl.cli import entry, transfer_suite

if __name__ == "__main__":
    entry(transfer_suite)
