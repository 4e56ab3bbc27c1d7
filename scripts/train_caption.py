r"""Train a prompt for COCO captions in Karpathy's splits.

accelerate launch scripts/train_caption.py --data_dir data/coco \
        --vision openai/clip-vit-base-patch32 --language google-t5/t5-base
"""

from pathlib import Path

from dept_vl.cli import parse
from dept_vl.config import DataOptions, RunConfig
from dept_vl.studies.search import launch
from dept_vl.training.summary import RunResult

DEFAULTS = RunConfig(
    data=DataOptions(task="coco", data_dir=Path("data/coco"), dev_split="val", test_split="test"),
)


def main(config: RunConfig) -> RunResult:
    """Train, score and report."""
    return launch(config)


if __name__ == "__main__":
    raise SystemExit(main(parse(DEFAULTS, "Train a prompt for COCO captions.")).exit_status)
