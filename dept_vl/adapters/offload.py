"""Modules whose weights accelerate keeps on the CPU or the disk: where they run, and what they hold."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn


def device_of(embedding: nn.Module) -> torch.device:
    """Return the device that an embedding runs on, wherever its weights are kept between calls.

    Raises:
        ValueError: If its weights are on the meta device and nothing puts them anywhere else.
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
    """Return a module's state with the weights that are offloaded; what has no values is left out."""
    state: dict[str, Tensor] = dict(module.state_dict())
    for prefix, part in module.named_modules():
        for hook in _hooks_of(part):
            for name, tensor in part.named_parameters(recurse=hook.place_submodules):
                full = f"{prefix}.{name}" if prefix else name
                if tensor.is_meta and full in state:
                    state[full] = hook.weights_map[name]
    return {name: tensor for name, tensor in state.items() if not tensor.is_meta}


def _hooks_of(module: nn.Module) -> Iterator[Any]:
    """Yield the hooks of accelerate that fetch weights of this very module."""
    hooks = [getattr(module, "_hf_hook", None)]
    while hooks:
        hook = hooks.pop()
        hooks += getattr(hook, "hooks", ())  # several, one after the other
        if getattr(hook, "offload", False) and getattr(hook, "weights_map", None) is not None:
            yield hook
