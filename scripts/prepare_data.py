"""Prepare data in the official file formats that the tasks read, and check them.

python scripts/prepare_data.py easy-vqa --output_dir data/easy-vqa
python scripts/prepare_data.py scenes --output_dir data/scenes
python scripts/prepare_data.py concepts --output_dir data/concepts
python scripts/prepare_data.py snippets --output_dir data/snippets
python scripts/prepare_data.py check --task vqav2 --root data/vqav2
python scripts/prepare_data.py from-hub --task vqav2 --split val --output_dir data/vqav2
"""

from functools import partial

from dept_vl.cli import data, entry
from study_data.commands import COMMANDS

if __name__ == "__main__":
    entry(partial(data, program="prepare_data.py", further=COMMANDS))
