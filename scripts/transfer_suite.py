"""Transfer between all shipped tasks, for the table of the README.

    python scripts/transfer_suite.py

Finished runs are kept under `--output_dir`, so the same command resumes.
"""

from dept_vl.cli import entry, transfer_suite

if __name__ == "__main__":
    entry(transfer_suite)
