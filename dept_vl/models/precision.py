"""Settings that make training steps faster or reduce their memory: bfloat16, compiling, checkpointing."""

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
"""Backend of `torch.compile`."""
RECOMPILES = 32
"""Maximum number of graphs per kind of layer. T5 needs 8, and more with batches of one example, answers of
one token, or some batches without images."""


def prepare_step(
    language: PreTrainedModel,
    device: torch.device,
    *,
    bfloat16: bool,
    gradient_checkpointing: bool = False,
    compiled: bool = False,
    pretrained: bool = False,
) -> None:
    """Prepare a language model in place for training, after its weights are on the device.

    `bfloat16` is for models that always run under bfloat16 autocast.

    Raises:
        UsageError: If a pretrained backbone is to be compiled.
        ValueError: If a backbone that is spread over processes is to be compiled; see also `compile_layers`.
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
    """Convert a language model's frozen linear layers to bfloat16, for use under bfloat16 autocast only.

    Otherwise autocast converts a frozen weight at every use and keeps the copy until the backward pass. The
    results are identical. Embeddings, norms and trained parameters stay in full precision, and a head that
    shares the embedding matrix gets its own copy. A backbone that is spread over processes is not changed.
    """
    if is_spread(language):
        return
    for module in language.modules():
        if isinstance(module, nn.Linear):
            for name, parameter in list(module.named_parameters(recurse=False)):
                # Quantised weights are integers and are not converted.
                if not parameter.requires_grad and parameter.is_floating_point():
                    held = nn.Parameter(parameter.detach().to(torch.bfloat16), requires_grad=False)
                    setattr(module, name, held)


def choose_attention(language: PreTrainedModel, device: torch.device, *, bfloat16: bool) -> None:
    """Choose the fastest attention: SDPA (as loaded), or eager attention on a CPU in bfloat16.

    There the backward pass of SDPA takes four to five times as long as that of eager attention
    (data/benchmarks/README.md, "Step time and memory").
    """
    if device.type == "cpu" and bfloat16:
        language.set_attn_implementation("eager")


def recompute_activations(language: nn.Module) -> None:
    """Enable gradient checkpointing: keep only each layer's input, and run it again in the backward pass.

    transformers' own gradient checkpointing needs training mode, but a backbone without dropout is in
    evaluation mode. Non-reentrant checkpointing also works for layers whose input needs no gradient.
    """
    for layer in layers_of(language):
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)


def compile_layers(language: nn.Module) -> None:
    """Compile the layers of a language model for training steps with inputs of any length.

    Layers of one kind share their graphs, so a deep model compiles as fast as a shallow one. Without
    gradients, as in evaluation, layers are not compiled. A graph break or more than `RECOMPILES` graphs
    raises an error.

    This changes settings of torch's compiler for the whole process, so what was compiled before is compiled
    again when it is next used.

    Raises:
        ValueError: If there are no such layers, or other code has replaced their `forward`.
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
    # A model with hooks on its positions must not use a graph that was compiled without hooks.
    settings.skip_nnmodule_hook_guards = False
    # DDP's graph splitting is meant for graphs of a whole model; those of layers are small enough.
    settings.optimize_ddp = False
    # Otherwise sizes that are equal by chance in the first call would be assumed to be always equal.
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
    """Disable Inductor's tiling analysis, which fails for some symbolic lengths (pytorch 181563, 197077)."""
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
    """Return the transformer layers of a model, which are of class `GradientCheckpointingLayer`."""
    return [module for module in language.modules() if isinstance(module, GradientCheckpointingLayer)]
