r"""Train a prompt for NLVR2: whether a sentence is true of two images.

accelerate launch scripts/train_nlvr2.py --data_dir data/nlvr2 \
        --vision openai/clip-vit-base-patch32 --language google-t5/t5-base
"""

from functools import partial

from dept_vl.cli import entry, train
from dept_vl.config import DataOptions, RunConfig

DEFAULTS = RunConfig(data=DataOptions(task="nlvr2"))

if __name__ == "__main__":
    entry(partial(train, defaults=DEFAULTS, tasks=["nlvr2"]))
