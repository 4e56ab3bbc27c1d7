"""Parameter groups, each with its own learning rate and weight decay, and the schedule."""

import torch
from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_linear_schedule_with_warmup

from dept_vl.config import OptimOptions

SUSPICIOUS_PROMPT_LR = 1e-2
"""Below this a soft prompt hardly moves: its vectors are as large as word embeddings."""


def build_optimizer(groups: dict[str, list[nn.Parameter]], options: OptimOptions) -> AdamW:
    """AdamW over the trainable parameters, one named group for each learning rate.

    Raises:
        ValueError: If nothing is trained.
    """
    if not groups:
        raise ValueError(
            "nothing to train: prompt_length and rank are 0, and projection and backbone are frozen"
        )
    rates = {name: options.of_group(name) for name in groups}
    return AdamW(
        [
            {"name": name, "params": groups[name], "lr": lr, "weight_decay": decay}
            for name, (lr, decay) in rates.items()
        ],
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
