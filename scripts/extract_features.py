r"""Encode every image of a data set once and store the features for later runs.

accelerate launch scripts/extract_features.py --task vqav2 --data_dir data/vqav2 \
        --vision openai/clip-vit-base-patch32
accelerate launch scripts/extract_features.py --config data/configs/scenes-vqav2.json

The same command resumes where it was stopped. Files that exist already are verified.
"""

from dept_vl.cli import entry, features

if __name__ == "__main__":
    entry(features)
