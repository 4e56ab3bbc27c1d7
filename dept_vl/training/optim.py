"""Optimizer, with a learning rate and weight decay for each parameter group, and learning-rate schedule."""

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_linear_schedule_with_warmup

from dept_vl._utils.printable import say
from dept_vl.config import OptimOptions, TrainOptions
from dept_vl.data.splits import Splits
from dept_vl.models.base import FrozenBackbone
from dept_vl.models.prompted import PromptedModel

SUSPICIOUS_PROMPT_LR = 1e-2
"""With a lower learning rate a soft prompt hardly moves: its vectors are as large as word embeddings."""


T5_WORD_SIZE = 16.6
"""Root mean square of T5-base's embeddings of common words. It was estimated without T5-base, from two
prompts that DePT's authors published: both were initialised from the same eleven words and trained on
different tasks. The mean of the element-wise product of their vectors is the square of this number."""


def relative_size(backbone: FrozenBackbone) -> float:
    """Return the size of a backbone's word embeddings relative to T5-base's."""
    return backbone.word_size() / T5_WORD_SIZE


def sizes_of(model: PromptedModel, options: OptimOptions) -> dict[nn.Parameter, float]:
    """Return the unit of each prompt parameter for relative learning rates; empty for absolute ones.

    Training in these units is the same on backbones that differ only in the scale of their embeddings.
    """
    if options.rates == "absolute" or model.prompt is None:
        return {}
    size = relative_size(model.backbone)
    return {parameter: size**power for parameter, power in model.prompt.powers().items() if power}


def clip(parameters: list[nn.Parameter], longest: float, sizes: Mapping[nn.Parameter, float]) -> None:
    """Clip the norm of the gradients; those of parameters in `sizes` count in units of their size."""
    for parameter, size in sizes.items():
        if parameter.grad is not None:
            parameter.grad.mul_(size)
    nn.utils.clip_grad_norm_(parameters, longest)
    for parameter, size in sizes.items():
        if parameter.grad is not None:
            parameter.grad.div_(size)


def build_optimizer(
    groups: dict[str, list[nn.Parameter]],
    options: OptimOptions,
    sizes: Mapping[nn.Parameter, float] = MappingProxyType({}),
) -> AdamW:
    """Return AdamW over the trainable parameters, with one named group for each learning rate.

    Learning rate, epsilon and weight decay of a parameter in `sizes` apply to it in units of its size. Raise
    ValueError if there are no trainable parameters.
    """
    if not groups:
        raise ValueError(
            "nothing to train: prompt_length and rank are 0, and projection and backbone are frozen"
        )
    parts = list[dict[str, Any]]()
    for name, group in groups.items():
        lr, decay = options.of_group(name)
        for size in dict.fromkeys(sizes.get(parameter, 1.0) for parameter in group):
            own = {} if size == 1 else {"eps": options.adam_eps / size}
            of_size = [parameter for parameter in group if sizes.get(parameter, 1.0) == size]
            label = name if size == 1 else f"{name} x {size:.3g}"
            parts.append(
                {"name": label, "params": of_size, "lr": lr * size, "weight_decay": decay / size, **own}
            )
    return AdamW(
        parts,
        eps=options.adam_eps,
        fused=all(p.device.type in ("cpu", "cuda") for group in groups.values() for p in group),
    )


def build_schedule(optimizer: torch.optim.Optimizer, options: OptimOptions, max_steps: int) -> LambdaLR:
    """Return a schedule with linear warm-up, then linear decay to zero.

    The warm-up is `warmup_ratio` of the steps if set, else `warmup_steps` but at most a tenth of the steps.
    """
    warmup = min(options.warmup_steps, max_steps // 10)
    if options.warmup_ratio:
        warmup = int(max_steps * options.warmup_ratio)
    elif options.warmup_steps > max_steps and options.warmup_steps != OptimOptions.warmup_steps:
        say(
            f"note: warmup_steps={options.warmup_steps} is more than the {max_steps} steps of the run; "
            f"{warmup} are taken"
        )
    schedule: LambdaLR = get_linear_schedule_with_warmup(optimizer, warmup, max_steps)
    return schedule


def steps_of_epochs(options: TrainOptions, tasks: Sequence[Splits], processes: int) -> int:
    """Return the number of optimizer steps in `num_epochs` epochs of all tasks.

    It depends on the number of examples in a step alone, so that batch size, accumulation and processes may
    change when a run resumes.
    """
    steps = 0
    for task in tasks:
        size = (task.options.task_batch_size or options.per_device_batch_size) * processes
        steps += math.ceil(task.train.draws_per_epoch() / (size * options.gradient_accumulation_steps))
    return math.ceil(options.num_epochs * steps)
