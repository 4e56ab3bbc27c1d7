r"""Train a prompt for VQAv2, or any data in its official format.

accelerate launch scripts/train_vqa.py --vision openai/clip-vit-base-patch32 \
        --language google-t5/t5-base --data_dir data/vqav2
accelerate launch scripts/train_vqa.py --config data/configs/easy-vqa.json
"""

from dept_vl.cli import parse
from dept_vl.run import RunConfig, RunResult, run


def main(config: RunConfig) -> RunResult:
    """Train, score and report."""
    return run(config)


if __name__ == "__main__":
    result = main(parse(RunConfig(), "Train a prompt for VQAv2."))
    if result.training is not None and result.training.interrupted:
        raise SystemExit(130)
