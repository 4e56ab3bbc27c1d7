"""Transfer between the shipped tasks, all of the README's table.

    python scripts/transfer_suite.py

Finished runs are kept under `--output_dir`, so the same command goes on where it was stopped.
"""

import tyro

from dept_vl.studies.transfer_suite import SuiteConfig, transfer_suite


def main(config: SuiteConfig) -> None:
    """Run what is missing and write the table."""
    transfer_suite(config)


if __name__ == "__main__":
    main(tyro.cli(SuiteConfig, use_underscores=True))
