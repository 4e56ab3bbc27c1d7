r"""Train a prompt for a text task: GLUE, SuperGLUE, MRQA and more, without an image.

accelerate launch scripts/train_nlp.py --task rte --preset paper
accelerate launch scripts/train_nlp.py --task sst2 --data_dir data/sst2 --max_steps 1000
accelerate launch scripts/train_nlp.py --task sst2 --model Qwen/Qwen2.5-0.5B-Instruct
"""

from functools import partial

from dept_vl.cli import entry, train
from dept_vl.config import BackboneOptions, DataOptions, PromptOptions, RunConfig, TrainOptions
from dept_vl.tasks.text.table import TEXT_TASKS

DEFAULTS = RunConfig(
    data=DataOptions(task="rte"),
    backbone=BackboneOptions(language="google-t5/t5-base"),
    prompt=PromptOptions(prompt_length=60),
    train=TrainOptions(group_by_length=True),
)

if __name__ == "__main__":
    entry(partial(train, defaults=DEFAULTS, tasks=TEXT_TASKS))
