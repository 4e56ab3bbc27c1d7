"""Frozen backbones that are sharded over the processes of a run, because they do not fit on one device.

Each process keeps a shard of every block and gathers a block when it is computed (PyTorch's FSDP2). Trainable
parameters are small and are replicated on every process, so saving adapters and checkpoints needs no
gathering. Their gradients, of a few hundred kilobytes, are averaged by `average_gradients`.

This is used if accelerate is configured for FSDP or for DeepSpeed's ZeRO. Their own wrappers are not used,
because they would also shard the trainable parameters and gather them for every save.
"""

import os
from collections.abc import Iterator, Sequence

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from dept_vl._utils.errors import UsageError
from dept_vl.models.prompted import PromptedModel


def place_model(model: PromptedModel, accelerator: Accelerator) -> None:
    """Move a model to the device of the process, and shard its blocks if accelerate is configured for it.

    Blocks are moved one by one, so a device never has more than its shard and one block.

    Raises:
        UsageError: If the backbone does not support several processes or sharding.
        ValueError: If a language model that is trained is to be sharded.
    """
    if accelerator.num_processes > 1 and getattr(model.backbone, "spread", False):
        raise UsageError(
            f"--device_map auto is for one process, and {accelerator.num_processes} were launched: leave it "
            "out, or launch one"
        )
    if _asked(accelerator):
        if model.backbone.load_in:
            raise UsageError(
                f"FSDP and ZeRO-3 do not spread quantised weights (--load_in {model.backbone.load_in}); "
                "leave that out, or configure accelerate without them"
            )
        if any(parameter.requires_grad for parameter in model.backbone.language.parameters()):
            raise ValueError(
                "FSDP and ZeRO spread a frozen backbone here, and this language model is trained "
                "(--train_backbone); leave that out, or configure accelerate without them"
            )
        mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
        for block in blocks(model.backbone):
            fully_shard(block, mesh=mesh, reshard_after_forward=True)
    model.to(accelerator.device)


def blocks(module: nn.Module) -> Iterator[nn.Module]:
    """Yield the layers of encoders and decoders, which are the members of the outermost module lists.

    Members that are lists themselves, as in Florence-2's image encoder, are replaced by their own members.
    """
    in_list = isinstance(module, nn.ModuleList)
    for child in module.children():
        if in_list and not isinstance(child, nn.ModuleList):
            yield child
        else:
            yield from blocks(child)


def is_spread(model: nn.Module) -> bool:
    """Return whether a model is sharded, so that all processes have to compute together."""
    return any(isinstance(module, FSDPModule) for module in model.modules())


def average_gradients(parameters: Sequence[nn.Parameter], accelerator: Accelerator) -> None:
    """Replace the gradients by their mean over all processes, in one reduction."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    mean = accelerator.reduce(flat, "mean")
    for gradient, part in zip(gradients, mean.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


def _asked(accelerator: Accelerator) -> bool:
    # The launcher sets this variable for FSDP. On a CPU, accelerate does not report FSDP, but PyTorch has it.
    fsdp = os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"
    deepspeed = accelerator.distributed_type == DistributedType.DEEPSPEED
    return accelerator.num_processes > 1 and (fsdp or deepspeed)
