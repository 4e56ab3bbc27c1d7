r"""Encode every image of a data set once, for all later runs to read.

accelerate launch scripts/extract_features.py --task vqav2 --data_dir data/vqav2 \
        --vision openai/clip-vit-base-patch32
accelerate launch scripts/extract_features.py --config data/configs/scenes-vqav2.json

Started again it continues where it was stopped; of finished features it checks every file.
"""

from dept_vl.cli import entry, features

if __name__ == "__main__":
    entry(features)
