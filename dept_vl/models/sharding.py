"""A frozen backbone that no single device holds: its blocks spread over the processes of a run.

Each process keeps a share of every block and gathers a block when it is computed (PyTorch's FSDP2). What is
trained is small and stays whole on every process, so that adapters and checkpoints are saved as ever and
nothing of the backbone is gathered for them; its gradients, a few hundred kilobytes, are averaged by hand.

Whoever configures accelerate for FSDP or for DeepSpeed's ZeRO-3 wants this. Neither one's wrapper is used:
both spread what the optimizer owns, too, and would have to gather it for every save.
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
    """Move a model to the process's device; spread its blocks if accelerate is configured to spread.

    Block after block is moved, so that a device never holds more than its share and one block.

    Raises:
        ValueError: If what is to be spread is to be trained.
    """
    if accelerator.num_processes > 1 and getattr(model.backbone, "spread", False):
        raise UsageError(
            f"--device_map auto is for one process, and {accelerator.num_processes} were launched: leave it "
            "out, or launch one"
        )
    if _asked(accelerator):
        if model.backbone.processor is not None:
            raise UsageError(
                f"FSDP and ZeRO-3 were not tested with a pretrained model ({model.backbone.name}); configure "
                "accelerate without them"
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
    """The layers of encoders and decoders: the members of the outermost lists of modules."""
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            yield from child
        else:
            yield from blocks(child)


def is_spread(model: nn.Module) -> bool:
    """Whether some of its parameters are spread, so that all processes have to compute together."""
    return any(isinstance(module, FSDPModule) for module in model.modules())


def average_gradients(parameters: Sequence[nn.Parameter], accelerator: Accelerator) -> None:
    """Replace the gradients of all processes by their mean, in one exchange."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    mean = accelerator.reduce(flat, "mean")
    for gradient, part in zip(gradients, mean.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


def _asked(accelerator: Accelerator) -> bool:
    # The launcher's word for FSDP: on a CPU accelerate itself knows none, and PyTorch does.
    fsdp = os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"
    deepspeed = accelerator.distributed_type == DistributedType.DEEPSPEED
    return accelerator.num_processes > 1 and (fsdp or deepspeed)
