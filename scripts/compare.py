"""Compare methods with one budget on the small backbone: DePT, its family, and other baselines.

    python scripts/compare.py
    python scripts/compare.py --tasks relabelled many-or-few --methods dept pt --seeds 1 2 3 4 5

Finished runs are kept under `--output_dir`, so the same command resumes.
"""

from dept_vl.cli import compare, entry

if __name__ == "__main__":
    entry(compare)
