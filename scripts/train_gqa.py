r"""Train a prompt for GQA.

accelerate launch scripts/train_gqa.py --data_dir data/gqa \
        --vision openai/clip-vit-base-patch32 --language google-t5/t5-base
"""

from pathlib import Path

from dept_vl.cli import parse
from dept_vl.config import DataOptions, RunConfig
from dept_vl.studies.search import launch
from dept_vl.training.summary import RunResult

DEFAULTS = RunConfig(
    data=DataOptions(task="gqa", data_dir=Path("data/gqa"), dev_split="val", test_split="testdev"),
)


def main(config: RunConfig) -> RunResult:
    """Train, score and report."""
    return launch(config)


if __name__ == "__main__":
    raise SystemExit(main(parse(DEFAULTS, "Train a prompt for GQA.")).exit_status)
