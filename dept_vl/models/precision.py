"""What makes a training step faster or smaller without changing what it computes."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from dept_vl._utils.errors import UsageError
from dept_vl.models.sharding import is_spread

BACKEND = "inductor"
"""Of `torch.compile`."""
RECOMPILES = 32
"""Graphs of one kind of layer at most, for any lengths. T5 comes to 8, and to more with batches of one
example, answers of one token, or some batches without images."""


def prepare_step(
    language: PreTrainedModel,
    device: torch.device,
    *,
    bfloat16: bool,
    gradient_checkpointing: bool = False,
    compiled: bool = False,
    pretrained: bool = False,
) -> None:
    """Make a language model ready to be trained fast; its weights are loaded and on the device.

    Args:
        language: Changed in place.
        device: Where it runs.
        bfloat16: It will run under bfloat16 autocast, always.
        gradient_checkpointing: See `recompute_activations`.
        compiled: See `compile_layers`.
        pretrained: It is a whole vision-language model.

    Raises:
        ValueError: If a spread backbone is to be compiled, or see `compile_layers`.
    """
    if compiled and pretrained:
        raise UsageError(
            f"--compile was not tested with a pretrained model ({type(language).__name__}): leave it out"
        )
    if compiled and is_spread(language):
        raise ValueError(
            "a backbone that is spread over processes gathers its weights within a layer and was not "
            "tested compiled: leave --compile out, or launch without FSDP and ZeRO-3"
        )
    choose_attention(language, device, bfloat16=bfloat16)
    if bfloat16:
        hold_frozen_in_bfloat16(language)
    if compiled:
        compile_layers(language)
    if gradient_checkpointing:
        recompute_activations(language)


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
                # What is quantised has whole numbers.
                if not parameter.requires_grad and parameter.is_floating_point():
                    held = nn.Parameter(parameter.detach().to(torch.bfloat16), requires_grad=False)
                    setattr(module, name, held)


def choose_attention(language: PreTrainedModel, device: torch.device, *, bfloat16: bool) -> None:
    """Take the fastest attention: SDPA (as loaded), but on a CPU in bfloat16 the three plain products.

    There torch's fused backward pass takes four to five times as long as theirs
    (data/benchmarks/README.md, "Step time and memory").
    """
    if device.type == "cpu" and bfloat16:
        language.set_attn_implementation("eager")


def recompute_activations(language: nn.Module) -> None:
    """Gradient checkpointing: keep each layer's input alone and run the layer again in the backward pass.

    transformers' own switch works in training mode alone, which a backbone without dropout is not in.
    Non-reentrant, so that a layer whose input needs no gradient is as good as any.
    """
    for layer in layers_of(language):
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)


def compile_layers(language: nn.Module) -> None:
    """Compile the layers of a language model for training steps, for any lengths.

    Layers of one kind share their graphs, so that a deep model compiles as fast as a shallow one: T5 has
    four for batches with padding and four for those without, where the whole step of T5-base is one graph of
    24 layers. Without gradients, as in evaluation, layers run as before. A graph break or more than
    `RECOMPILES` graphs is an error, not a slow run. Compiled layers are left as they are.

    Settings of torch's compiler are changed for the whole process, and what was compiled in it before is
    forgotten and compiled again when it is next used.

    Args:
        language: Its layers' `forward` are replaced.

    Raises:
        ValueError: If there are no such layers, or something else has replaced their `forward`.
    """
    layers = [layer for layer in layers_of(language) if not _is_compiled(layer)]
    if not layers and layers_of(language):
        return
    if not layers or any("forward" in vars(layer) for layer in layers):
        reason = "other code has replaced their forward" if layers else "transformers marks none in it"
        raise ValueError(
            f"--compile compiles the layers of {type(language).__name__}, and {reason}: leave --compile out"
        )
    torch._dynamo.reset()
    settings = torch._dynamo.config
    settings.recompile_limit = RECOMPILES
    settings.fail_on_recompile_limit_hit = True
    # A model whose positions are hooked must not run another's graph, made without hooks.
    settings.skip_nnmodule_hook_guards = False
    # Layers are small enough to be whole; DDP's buckets would split graphs of the whole model.
    settings.optimize_ddp = False
    # Or sizes that are equal by chance in a first call would be held for one.
    torch.fx.experimental._config.use_duck_shape = False
    compiled = {
        layer_class: torch.compile(
            layer_class.forward, backend=BACKEND, dynamic=True, fullgraph=True, options=_inductor_options()
        )
        for layer_class in {type(layer) for layer in layers}
    }
    for layer in layers:
        layer.forward = partial(_forward, layer, compiled[type(layer)])


def _inductor_options() -> dict[str, Any] | None:
    """Inductor's tiling analysis can fail for lengths that are symbols (pytorch issues 181563, 197077)."""
    import torch._inductor.config as inductor

    if BACKEND != "inductor" or not hasattr(inductor.triton, "coalesce_tiling_analysis"):
        return None
    return {"triton.coalesce_tiling_analysis": False}


def _is_compiled(layer: nn.Module) -> bool:
    forward = vars(layer).get("forward")
    return isinstance(forward, partial) and forward.func is _forward


def _forward(layer: nn.Module, compiled: Callable[..., Any], *inputs: Any, **named: Any) -> Any:
    if torch.is_grad_enabled():
        return compiled(layer, *inputs, **named)
    return type(layer).forward(layer, *inputs, **named)


def layers_of(language: nn.Module) -> list[nn.Module]:
    """The transformer layers, as transformers marks them."""
    return [module for module in language.modules() if isinstance(module, GradientCheckpointingLayer)]
