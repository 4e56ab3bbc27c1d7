"""Compare methods with one budget on the small backbone: DePT, its family, and other baselines.

    python scripts/compare.py
    python scripts/compare.py --tasks relabelled many-or-few --methods dept pt --seeds 1 2 3 4 5

Finished runs are kept under `--output_dir`, so the same command resumes.
"""

from benchmarks.options import CompareConfig
from dept_vl.cli import check_own_data, entry, parse_options


def compare(arguments: list[str]) -> None:
    """Compare methods with the same number of trained parameters, on the small backbone."""
    config = parse_options(CompareConfig, arguments, "compare.py", compare.__doc__)
    config.check()
    check_own_data(config.own)
    from benchmarks.compare import compare as run

    run(config)


if __name__ == "__main__":
    entry(compare)
