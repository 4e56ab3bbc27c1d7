"""Bring data into the official files that the tasks read.

python scripts/prepare_data.py easy-vqa --output_dir data/easy-vqa
"""

import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import tyro

from dept_vl.tasks import easy_vqa as easy_vqa_task


def easy_vqa(output_dir: Path = Path("data/easy-vqa")) -> None:
    """Convert the package easy-vqa to VQAv2 files and COCO image names.

    Args:
        output_dir: Folder to write; must not exist, or hold a finished conversion.
    """
    counts = easy_vqa_task.convert(output_dir)
    print(f"{output_dir} holds:")
    for kind, count in counts.items():
        print(f"  {kind:<22}{count:>7,}")


COMMANDS = {"easy-vqa": easy_vqa}


def main(arguments: Sequence[str]) -> None:
    """Run one command, given as on the command line."""
    tyro.extras.subcommand_cli_from_dict(
        COMMANDS,
        prog="prepare_data.py",
        description="Bring data into the official files that the tasks read.",
        args=arguments,
        use_underscores=True,
    )


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    main(sys.argv[1:])
