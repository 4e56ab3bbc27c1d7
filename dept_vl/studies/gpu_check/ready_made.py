"""Ready-made vision-language models of published sizes, random weights: bare, prompted, with LoRA."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    BartConfig,
    Blip2Config,
    Blip2ForConditionalGeneration,
    Florence2Config,
    Florence2ForConditionalGeneration,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    T5Config,
)

from dept_vl.adapters.attach import attach, new_prompt
from dept_vl.config import OptimOptions
from dept_vl.prompts.base import METHODS
from dept_vl.studies.bench.methods import has_peft
from dept_vl.studies.gpu_check.results import Entry, Measuring
from dept_vl.training.optim import build_optimizer

BATCH, TEXT, ANSWER = 16, 24, 4
"""Examples of a step, and tokens of each text and answer."""
Shown = dict[str, Tensor]


def blip2(small: bool) -> tuple[PreTrainedModel, Callable[[int], Shown]]:
    """BLIP-2 with FLAN-T5-XL: EVA's ViT-g, 32 queries."""
    t5 = {"vocab_size": 32128, "d_model": 2048, "d_kv": 64, "d_ff": 5120, "num_layers": 24, "num_heads": 32}
    vision: dict[str, Any] = {}
    if small:
        t5 |= {"d_model": 64, "d_ff": 64, "num_layers": 2, "num_heads": 2}
        vision = {
            "hidden_size": 64,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
        }
    t5_config = T5Config(
        **t5, feed_forward_proj="gated-gelu", tie_word_embeddings=False, decoder_start_token_id=0
    )
    former = {"encoder_hidden_size": vision.get("hidden_size", 1408)}
    if small:
        former |= vision
    config = Blip2Config(
        vision_config=vision,
        qformer_config=former,
        text_config=t5_config.to_dict(),
        num_query_tokens=32,
        image_token_index=32100,
    )
    model = Blip2ForConditionalGeneration(config)

    def inputs(batch: int) -> Shown:
        ids = torch.randint(5, 32000, (batch, 32 + TEXT))
        ids[:, :32] = 32100
        return {"input_ids": ids, "pixel_values": torch.randn(batch, 3, 224, 224)}

    return model, inputs


def florence2(small: bool) -> tuple[PreTrainedModel, Callable[[int], Shown]]:
    """Florence-2-large: DaViT at 768 pixels, 577 image tokens, BART-large."""
    groups = [8, 16, 32, 64]
    vision: dict[str, Any] = {"embed_dim": [256, 512, 1024, 2048], "num_heads": groups, "num_groups": groups}
    bart = {
        "vocab_size": 51289,
        "d_model": 1024,
        "encoder_layers": 12,
        "decoder_layers": 12,
        "encoder_ffn_dim": 4096,
        "decoder_ffn_dim": 4096,
        "max_position_embeddings": 4096,
    }
    if small:
        vision = {"embed_dim": [16] * 4, "num_heads": [1] * 4, "num_groups": [1] * 4, "projection_dim": 64}
        bart |= {"d_model": 64, "encoder_layers": 2, "decoder_layers": 2}
    config = Florence2Config(
        vision_config={"projection_dim": 1024, **vision},
        text_config=BartConfig(**bart, forced_eos_token_id=None).to_dict(),
        image_token_id=51288,
    )
    model = Florence2ForConditionalGeneration(config)
    pixels = 128 if small else 768

    def inputs(batch: int) -> Shown:
        tokens = (pixels // 32) ** 2 + 1
        ids = torch.randint(5, 50000, (batch, tokens + TEXT))
        ids[:, :tokens] = 51288
        return {"input_ids": ids, "pixel_values": torch.randn(batch, 3, pixels, pixels)}

    return model, inputs


def qwen(small: bool) -> tuple[PreTrainedModel, Callable[[int], Shown]]:
    """Qwen2.5-VL-3B at 448 x 448 pixels, 256 image tokens."""
    text = {
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 11008,
        "num_hidden_layers": 36,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128000,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 1000000.0},
    }
    vision = {
        "depth": 32,
        "hidden_size": 1280,
        "num_heads": 16,
        "intermediate_size": 3420,
        "out_hidden_size": 2048,
        "fullatt_block_indexes": [7, 15, 23, 31],
        "window_size": 112,
    }
    if small:
        text |= {
            "hidden_size": 256,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
        }
        vision |= {"depth": 2, "hidden_size": 64, "num_heads": 2, "intermediate_size": 64}
        vision |= {"out_hidden_size": 256, "fullatt_block_indexes": [1]}
    ids_of = {"image_token_id": 151655, "vision_start_token_id": 151652, "vision_end_token_id": 151653}
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True, **ids_of)
    model = Qwen2_5_VLForConditionalGeneration(config)
    side = 8 if small else 32

    def inputs(batch: int) -> Shown:
        tokens = side * side // 4
        ids = torch.randint(5, 150000, (batch, tokens + 2 + TEXT))
        ids[:, 0], ids[:, tokens + 1] = 151652, 151653
        ids[:, 1 : tokens + 1] = 151655
        kinds = torch.zeros_like(ids)
        kinds[:, 1 : tokens + 1] = 1
        return {
            "input_ids": ids,
            "pixel_values": torch.randn(batch * side * side, 1176),
            "image_grid_thw": torch.tensor([[1, side, side]] * batch),
            "mm_token_type_ids": kinds,
        }

    return model, inputs


MODELS: dict[str, tuple[Callable[[bool], Any], str]] = {
    "blip2-flan-t5-xl": (blip2, r".*language_model.*\.(q|v)"),
    "florence-2-large": (florence2, r".*language_model.*\.(q_proj|v_proj)"),
    "qwen2.5-vl-3b": (qwen, r".*language_model.*\.(q_proj|v_proj)"),
}
"""By name: what builds it, and the layers that LoRA is put on."""


def measure(measuring: Measuring, root: Path) -> None:
    """Measure the model that the part is named after: bare, prompted, with LoRA, on a base of 4 bits."""
    name = measuring.part
    build, targets = MODELS[name]
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with measuring.device:
        model, inputs_of = build(measuring.small)
    torch.set_default_dtype(torch.float32)
    model = model.eval().requires_grad_(False)
    count = 2 if measuring.small else BATCH
    shown = {key: tensor.to(measuring.device) for key, tensor in inputs_of(count).items()}
    shown["pixel_values"] = shown["pixel_values"].bfloat16()
    shown["attention_mask"] = torch.ones_like(shown["input_ids"])
    decoder_only = not model.config.get_text_config().is_encoder_decoder and name.startswith("qwen")
    if decoder_only:
        labels = torch.full_like(shown["input_ids"], -100)
        labels[:, -ANSWER:] = shown["input_ids"][:, -ANSWER:]
    else:
        labels = torch.randint(5, 30000, (count, ANSWER), device=measuring.device)
    measuring.entry("bare", lambda: _bare(measuring, model, shown, labels))
    for method, length in (("dept40", 40), ("pt100", 100)):
        measuring.entry(
            method,
            lambda length=length: _prompted(measuring, model, shown, labels, length),  # type: ignore[misc]
        )
    measuring.entry("lora8", lambda: _lora(measuring, model, shown, labels, targets))
    # Last: the layers stay in 4 bits.
    measuring.entry("dept40, 4-bit base", lambda: _four_bits(measuring, model, shown, labels))


def _four_bits(measuring: Measuring, model: PreTrainedModel, shown: Shown, labels: Tensor) -> Entry:
    """Measure a prompt on the language model's layers in NF4 (QLoRA, Dettmers et al. 2023)."""
    if importlib.util.find_spec("bitsandbytes") is None:
        return {"skipped": "bitsandbytes is not installed"}
    from bitsandbytes import nn as of_bits

    head = model.get_output_embeddings()
    for name, module in list(model.named_modules()):
        if "language_model" not in name:
            continue
        for child, layer in list(module.named_children()):
            if type(layer) is not nn.Linear or layer is head:
                continue
            few = of_bits.Linear4bit(
                layer.in_features,
                layer.out_features,
                bias=layer.bias is not None,
                compute_dtype=torch.bfloat16,
                quant_type="nf4",
            )
            few.weight = of_bits.Params4bit(layer.weight.cpu(), requires_grad=False, quant_type="nf4")
            few.bias = layer.bias
            setattr(module, child, few.to(measuring.device))
    return _prompted(measuring, model, shown, labels, 40)


def _times(
    measuring: Measuring,
    model: PreTrainedModel,
    shown: Shown,
    labels: Tensor,
    trained: dict[str, list[nn.Parameter]],
) -> Entry:
    optimizer = build_optimizer(trained, OptimOptions()) if trained else None
    parameters = [parameter for group in trained.values() for parameter in group]

    def step() -> None:
        model(**shown, labels=labels).loss.backward()
        if optimizer is not None:
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()

    def answer() -> None:
        with torch.no_grad():
            model.generate(**shown, max_new_tokens=10, min_new_tokens=10, do_sample=False)

    figures = measuring.milliseconds(step)
    tokens = shown["input_ids"].numel() / figures["ms"] * 1000
    figures |= {"peak_mib": measuring.peak_mib(step), "source_tokens_per_second": tokens}
    figures |= {"trained": sum(parameter.numel() for parameter in parameters), "batch": len(labels)}
    figures["generate_10_ms"] = measuring.milliseconds(answer)["ms"]
    return figures


def _bare(measuring: Measuring, model: PreTrainedModel, shown: Shown, labels: Tensor) -> Entry:
    # A gradient of the embeddings, so that the model is run back as deep as for a prompt.
    def need(module: nn.Module, inputs: object, output: Tensor) -> Tensor:
        return output.requires_grad_() if torch.is_grad_enabled() and output.is_floating_point() else output

    hook = model.get_input_embeddings().register_forward_hook(need)
    try:
        return _times(measuring, model, shown, labels, {})
    finally:
        hook.remove()


def _prompted(
    measuring: Measuring, model: PreTrainedModel, shown: Shown, labels: Tensor, length: int
) -> Entry:
    longest = TEXT + ANSWER
    width = model.get_input_embeddings().embedding_dim
    _, rank = METHODS["dept"].solve(
        d_model=width, max_source_length=longest, reference_prompt_length=100, prompt_length=length
    )
    try:
        prompt = new_prompt(model, prompt_length=length, rank=rank, max_source_length=longest)
    except ValueError as error:
        return {"skipped": f"no prompt is attached: {str(error)[:200]}"}
    with attach(model, prompt) as attached:
        return _times(measuring, model, shown, labels, attached.parameter_groups())


def _lora(measuring: Measuring, model: PreTrainedModel, shown: Shown, labels: Tensor, targets: str) -> Entry:
    if not has_peft():
        return {"skipped": "PEFT is not installed"}
    from peft import LoraConfig, inject_adapter_in_model

    inject_adapter_in_model(LoraConfig(r=8, lora_alpha=16, target_modules=targets), model)
    trained = [parameter for name, parameter in model.named_parameters() if "lora_" in name]
    for parameter in trained:
        parameter.requires_grad_(True)
    try:
        return _times(measuring, model, shown, labels, {"backbone": trained})
    finally:
        for name, module in list(model.named_modules()):
            if hasattr(module, "base_layer"):
                model.set_submodule(name, module.base_layer)
