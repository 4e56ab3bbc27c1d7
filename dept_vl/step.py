"""What makes a training step faster or smaller without changing what it computes."""

from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from dept_vl.model import PromptedModel
from dept_vl.spread import is_spread

RECOMPILES = 8
"""Graphs of one model at most: with and without images, weights and full batches, for any lengths."""


def prepare_step(
    model: PromptedModel,
    device: torch.device,
    *,
    bfloat16: bool,
    gradient_checkpointing: bool = False,
    compiled: bool = False,
) -> None:
    """Make a model ready to be trained fast; its weights are loaded and on the device.

    Args:
        model: Changed in place.
        device: Where it runs.
        bfloat16: It will run under bfloat16 autocast, always.
        gradient_checkpointing: See `recompute_activations`.
        compiled: See `compile_forward`.

    Raises:
        ValueError: If a spread backbone is to be compiled.
    """
    if compiled and is_spread(model):
        raise ValueError(
            "a backbone that is spread over processes gathers its blocks between graphs and cannot be "
            "compiled as one: leave --compile out, or launch without FSDP and ZeRO-3"
        )
    choose_attention(model.backbone.language, device, bfloat16=bfloat16)
    if bfloat16:
        hold_frozen_in_bfloat16(model.backbone.language)
    if gradient_checkpointing:
        recompute_activations(model)
    if compiled:
        compile_forward(model)


def hold_frozen_in_bfloat16(language: nn.Module) -> None:
    """Keep a language model's frozen linear layers in bfloat16, if it runs under bfloat16 autocast.

    Autocast makes this copy of a frozen weight at every use and keeps it until the backward pass. Made
    once, it gives the same numbers to the bit. Embeddings, norms and whatever is trained stay in full
    precision, and a head that shares the word table gets its own copy. Outside autocast such a model
    cannot run. A backbone that is spread over processes is left as it is.
    """
    if is_spread(language):
        return
    for module in language.modules():
        if isinstance(module, nn.Linear):
            for name, parameter in list(module.named_parameters(recurse=False)):
                if not parameter.requires_grad:
                    held = nn.Parameter(parameter.detach().to(torch.bfloat16), requires_grad=False)
                    setattr(module, name, held)


def choose_attention(language: PreTrainedModel, device: torch.device, *, bfloat16: bool) -> None:
    """Take the fastest attention: SDPA (as loaded), but on a CPU in bfloat16 the three plain products.

    There torch's fused backward pass takes four to five times as long as theirs (README, "Step time and
    memory").
    """
    if device.type == "cpu" and bfloat16:
        language.set_attn_implementation("eager")


def recompute_activations(model: PromptedModel) -> None:
    """Gradient checkpointing: keep each layer's input alone and run the layer again in the backward pass.

    transformers' own switch works in training mode alone, which a backbone without dropout is not in.
    Non-reentrant, so that a layer whose input needs no gradient is as good as any.
    """
    for module in model.backbone.language.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.forward = partial(checkpoint, module.forward, use_reentrant=False)


def compile_forward(model: PromptedModel, *, backend: str = "inductor") -> None:
    """Compile the forward and backward pass as one graph for all lengths; `generate` stays as it is.

    A graph break or more than `RECOMPILES` graphs is an error, not a slow run.

    Args:
        model: Its `forward` is replaced.
        backend: Of `torch.compile`.
    """
    torch._dynamo.config.recompile_limit = RECOMPILES
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    model.forward = torch.compile(  # type: ignore[method-assign]
        model.forward, backend=backend, dynamic=True, fullgraph=True
    )
