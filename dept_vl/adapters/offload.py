"""Devices and weights of modules that accelerate offloads to the CPU or the disk."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn


def device_of(embedding: nn.Module) -> torch.device:
    """Return the device that an embedding runs on, even if its weights are offloaded.

    Raises:
        ValueError: If the weights are on the meta device and are not offloaded by accelerate.
    """
    device: torch.device = embedding.weight.device  # type: ignore[assignment]
    if device.type != "meta":
        return device
    for hook in _hooks_of(embedding):
        return torch.device(hook.execution_device)
    raise ValueError(
        "the word embeddings of this model are on the meta device and hold no values; load the model's "
        "weights first"
    )


def weights_of(module: nn.Module) -> dict[str, Tensor]:
    """Return a module's state dict with offloaded weights, and without tensors that have no values."""
    state: dict[str, Tensor] = dict(module.state_dict())
    for prefix, part in module.named_modules():
        for hook in _hooks_of(part):
            for name, tensor in part.named_parameters(recurse=hook.place_submodules):
                full = f"{prefix}.{name}" if prefix else name
                if tensor.is_meta and full in state:
                    state[full] = hook.weights_map[name]
    return {name: tensor for name, tensor in state.items() if not tensor.is_meta}


def _hooks_of(module: nn.Module) -> Iterator[Any]:
    """Yield the hooks of accelerate that load offloaded weights of this module."""
    hooks = [getattr(module, "_hf_hook", None)]
    while hooks:
        hook = hooks.pop()
        hooks += getattr(hook, "hooks", ())  # a sequence of hooks
        if getattr(hook, "offload", False) and getattr(hook, "weights_map", None) is not None:
            yield hook
