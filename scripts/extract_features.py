r"""Encode every image of a data set once, for all later runs to read.

accelerate launch scripts/extract_features.py --task vqav2 --data_dir data/vqav2 \
        --vision openai/clip-vit-base-patch32
accelerate launch scripts/extract_features.py --config data/configs/scenes-vqav2.json

Started again it goes on where it was stopped; of finished features it checks every file.
"""

import sys
from pathlib import Path

from dept_vl.cli import parse_extraction
from dept_vl.config import ExtractConfig
from dept_vl.training.extract import extract


def main(config: ExtractConfig) -> list[Path]:
    """Encode and write; the folder of each task's features."""
    return extract(config)


if __name__ == "__main__":
    try:
        main(parse_extraction("Encode every image of a data set once, for all later runs to read."))
    except (ValueError, OSError, RuntimeError) as error:
        sys.exit(str(error))
