"""Transfer between all shipped tasks, for the table of the README.

    python scripts/transfer_suite.py

Finished runs are kept under `--output_dir`, so the same command resumes.
"""

from benchmarks.options import SuiteConfig
from dept_vl.cli import entry, parse_options


def transfer_suite(arguments: list[str]) -> None:
    """Transfer between the shipped tasks."""
    config = parse_options(SuiteConfig, arguments, "transfer_suite.py", transfer_suite.__doc__)
    config.check()
    from benchmarks.transfer_suite import transfer_suite as run

    run(config)


if __name__ == "__main__":
    entry(transfer_suite)
