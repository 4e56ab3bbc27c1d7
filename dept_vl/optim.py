"""Parameter groups, each with its own learning rate and weight decay, and the schedule."""

from dataclasses import dataclass

import torch
from torch import nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_linear_schedule_with_warmup


@dataclass(frozen=True)
class OptimOptions:
    """AdamW with a learning rate for each part; linear warm-up, then linear decay to zero."""

    prompt_lr: float = 0.3
    """Peak learning rate of the soft prompt (alpha1 of the paper; its winners: 0.3 and 0.4)."""
    lora_lr: float = 1e-3
    """Peak learning rate of the low-rank pair (alpha2; the paper's winners: 1e-4 to 5e-3)."""
    projection_lr: float = 1e-3
    """Peak learning rate of the visual projection."""
    backbone_lr: float = 1e-4
    """Peak learning rate of the language model, where it is trained (--train_backbone)."""
    prompt_weight_decay: float = 1e-5
    """AdamW's decay of the soft prompt."""
    lora_weight_decay: float = 1e-5
    """AdamW's decay of the low-rank pair."""
    projection_weight_decay: float = 0.01
    """AdamW's decay of the visual projection."""
    backbone_weight_decay: float = 0.01
    """AdamW's decay of the language model."""
    warmup_steps: int = 500
    """Steps of linear warm-up."""

    def of_group(self, group: str) -> tuple[float, float]:
        """Learning rate and weight decay of a group of `PromptedModel.parameter_groups`."""
        return {
            "prompt": (self.prompt_lr, self.prompt_weight_decay),
            "low_rank": (self.lora_lr, self.lora_weight_decay),
            "visual_projection": (self.projection_lr, self.projection_weight_decay),
            "backbone": (self.backbone_lr, self.backbone_weight_decay),
        }[group]


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
        fused=all(p.device.type in ("cpu", "cuda") for group in groups.values() for p in group),
    )


def build_schedule(optimizer: torch.optim.Optimizer, options: OptimOptions, max_steps: int) -> LambdaLR:
    """Linear warm-up over `warmup_steps` (a tenth of a run shorter than ten times that), then decay."""
    warmup = min(options.warmup_steps, max_steps // 10)
    schedule: LambdaLR = get_linear_schedule_with_warmup(optimizer, warmup, max_steps)
    return schedule
