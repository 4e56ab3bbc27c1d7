"""Methods side by side at one budget, with the small backbone: DePT, its family, and what they have to beat.

    python scripts/compare.py
    python scripts/compare.py --tasks relabelled many-or-few --methods dept pt --seeds 1 2 3 4 5

Finished runs are kept under `--output_dir`, so a stopped comparison continues where it was.
"""

from dept_vl.cli import compare, entry

if __name__ == "__main__":
    entry(compare)
