r"""Train a prompt for VQAv2, or any data in its official format.

accelerate launch scripts/train_vqa.py --data_dir data/vqav2 \
        --vision openai/clip-vit-base-patch32 --language google-t5/t5-base
accelerate launch scripts/train_vqa.py --config data/configs/easy-vqa.json
"""

from dept_vl.cli import parse
from dept_vl.config import RunConfig
from dept_vl.studies.search import launch
from dept_vl.training.summary import RunResult


def main(config: RunConfig) -> RunResult:
    """Train, score and report."""
    return launch(config)


if __name__ == "__main__":
    raise SystemExit(main(parse(RunConfig(), "Train a prompt for VQAv2.")).exit_status)
