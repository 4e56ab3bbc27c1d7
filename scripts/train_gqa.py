r"""Train a prompt for GQA.

accelerate launch scripts/train_gqa.py --data_dir data/gqa \
        --vision openai/clip-vit-base-patch32 --language google-t5/t5-base
"""

from functools import partial

from dept_vl.cli import entry, train
from dept_vl.config import DataOptions, RunConfig

DEFAULTS = RunConfig(data=DataOptions(task="gqa"))

if __name__ == "__main__":
    entry(partial(train, defaults=DEFAULTS, tasks=["gqa"]))
