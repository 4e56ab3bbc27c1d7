r"""Train a prompt for COCO captions in Karpathy's splits.

accelerate launch scripts/train_caption.py --data_dir data/coco \
        --vision openai/clip-vit-base-patch32 --language google-t5/t5-base
"""

from functools import partial

from dept_vl.cli import entry, train
from dept_vl.config import DataOptions, RunConfig

DEFAULTS = RunConfig(data=DataOptions(task="coco"))

if __name__ == "__main__":
    entry(partial(train, defaults=DEFAULTS, tasks=["coco"]))
