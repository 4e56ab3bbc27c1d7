"""Parameter groups, each with its own learning rate and weight decay, and the schedule."""

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_linear_schedule_with_warmup

from dept_vl.config import OptimOptions, TrainOptions
from dept_vl.data.splits import Splits
from dept_vl.models.base import FrozenBackbone
from dept_vl.models.prompted import PromptedModel

SUSPICIOUS_PROMPT_LR = 1e-2
"""Below this a soft prompt hardly moves: its vectors are as large as word embeddings."""


T5_WORD_SIZE = 16.6
"""Root mean square of T5-base's embeddings of common words. T5-base itself was not at hand: DePT's authors
published two prompts that were started from the same eleven words and trained on different tasks, and the
mean product of their vectors place by place is its square."""


def relative_size(backbone: FrozenBackbone) -> float:
    """How large a backbone's word embeddings are, T5-base's being 1."""
    return backbone.word_size() / T5_WORD_SIZE


def sizes_of(model: PromptedModel, options: OptimOptions) -> dict[nn.Parameter, float]:
    """Return the unit of each parameter of a prompt for relative rates; empty for absolute ones.

    Training in these units is the same on backbones that differ only in the scale of their embeddings.
    """
    if options.rates == "absolute" or model.prompt is None:
        return {}
    size = relative_size(model.backbone)
    return {parameter: size**power for parameter, power in model.prompt.powers().items() if power}


def clip(parameters: list[nn.Parameter], longest: float, sizes: Mapping[nn.Parameter, float]) -> None:
    """Shorten gradients to a norm, that of parameters with a size in units of theirs."""
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
    """AdamW over the trainable parameters, one named group for each learning rate.

    A step, epsilon and decay of a parameter with a size (see `sizes_of`) are those of one in units of it.

    Raises:
        ValueError: If nothing is trained.
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
    """Linear warm-up, then decay.

    It takes `warmup_ratio` of the steps, or `warmup_steps` (a tenth of a run shorter than ten times that).
    """
    warmup = min(options.warmup_steps, max_steps // 10)
    if options.warmup_ratio:
        warmup = int(max_steps * options.warmup_ratio)
    schedule: LambdaLR = get_linear_schedule_with_warmup(optimizer, warmup, max_steps)
    return schedule


def steps_of_epochs(options: TrainOptions, tasks: Sequence[Splits], processes: int) -> int:
    """Return the optimizer steps in which `num_epochs` epochs of all tasks are drawn."""
    batches = 0
    for task in tasks:
        size = (task.options.task_batch_size or options.per_device_batch_size) * processes
        batches += math.ceil(task.train.draws_per_epoch() / size)
    return math.ceil(options.num_epochs * batches / options.gradient_accumulation_steps)
