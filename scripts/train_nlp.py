r"""Train a prompt for a text task: GLUE, SuperGLUE, MRQA and more, without an image.

accelerate launch scripts/train_nlp.py --task rte --preset paper
accelerate launch scripts/train_nlp.py --task sst2 --data_dir data/sst2 --max_steps 1000
"""

from dept_vl.cli import parse
from dept_vl.config import BackboneOptions, DataOptions, PromptOptions, RunConfig, TrainOptions
from dept_vl.studies.search import launch
from dept_vl.training.summary import RunResult

DEFAULTS = RunConfig(
    data=DataOptions(task="rte"),
    backbone=BackboneOptions(language="google-t5/t5-base"),
    prompt=PromptOptions(prompt_length=60, max_source_length=256),
    train=TrainOptions(group_by_length=True),
)


def main(config: RunConfig) -> RunResult:
    """Train, score and report."""
    return launch(config)


if __name__ == "__main__":
    raise SystemExit(main(parse(DEFAULTS, "Train a prompt for a text task.")).exit_status)
