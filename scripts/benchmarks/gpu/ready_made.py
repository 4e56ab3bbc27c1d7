"""Pretrained models in published sizes with random weights: bare, prompted, with LoRA, and in 4 bits."""

import importlib.util
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import nn

from benchmarks.backbones import Inputs
from benchmarks.gpu.results import TOKENIZER, Entry, Measuring
from benchmarks.measure import Ratio
from benchmarks.methods import Runner, has_peft, needs_peft
from benchmarks.pretrained import (
    AT_EQUAL_LENGTH,
    NEW_TOKENS,
    PLAN,
    Width,
    build_pretrained,
    build_pretrained_runners,
    draw_pretrained,
    of_pretrained,
)
from dept_vl.models.pretrained_vlm import VisionLanguageModel

BATCH = 16
"""Batch size."""
MODELS = {"blip2-flan-t5-xl": "blip2", "florence-2-large": "florence2", "qwen2.5-vl-3b": "qwen2.5-vl"}
"""Model of each part."""
GENERATED = f"generate{NEW_TOKENS}"


def measure(measuring: Measuring, root: Path) -> None:
    """Measure the model of the part: prompt and bare model at equal length, then every method."""
    name = MODELS[measuring.part]
    torch.manual_seed(0)
    width: Width = "tiny" if measuring.small else "real"
    backbone = build_pretrained(name, width, root / TOKENIZER, measuring.device, torch.bfloat16)
    count = 2 if measuring.small else BATCH
    batch = draw_pretrained(backbone, count, 0)
    for _, work in of_pretrained(name):
        given = draw_pretrained(backbone, count, 0, cached=True) if work == "cached" else batch
        measuring.entry(f"equal length: {work}", partial(_overhead, measuring, backbone, given, work))
    for method in PLAN["train"]:
        measuring.entry(method, partial(_times, measuring, backbone, batch, method))
    # Last: the layers stay in 4 bits.
    measuring.entry("dept40, 4-bit base", partial(_four_bits, measuring, backbone, batch))


def _overhead(measuring: Measuring, backbone: VisionLanguageModel, batch: Inputs, work: str) -> Entry:
    """Compare prompt and offset with the bare model that has as many further words, in rounds."""
    names = AT_EQUAL_LENGTH if work != "labels" else PLAN[work]
    runners = build_pretrained_runners(names, backbone, work)
    steps = {name: _step(runner, runner.prepare(batch), work) for name, runner in runners.items()}
    theirs, ours = measuring.in_rounds(steps).values()
    ratio = Ratio.of(ours, theirs)
    peaks = [measuring.peak_mib(step) for step in steps.values()]
    memory = peaks[1] / peaks[0] if peaks[0] and peaks[1] else None
    return {"ratio": ratio.median, "low": ratio.low, "high": ratio.high, "memory_ratio": memory}


def _step(runner: Runner, given: Inputs, work: str) -> partial[object]:
    run: Callable[[Inputs], object] = runner.forward if work == GENERATED else runner.train_step
    return partial(run, given)


def _four_bits(measuring: Measuring, backbone: VisionLanguageModel, batch: Inputs) -> Entry:
    """Measure a prompt with the language model's layers in NF4 (QLoRA, Dettmers et al. 2023)."""
    if importlib.util.find_spec("bitsandbytes") is None:
        return {"skipped": "bitsandbytes is not installed"}
    from bitsandbytes import nn as of_bits

    model = backbone.language
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
    return _times(measuring, backbone, batch, "dept40")


def _times(measuring: Measuring, backbone: VisionLanguageModel, batch: Inputs, method: str) -> Entry:
    if needs_peft(method) and not has_peft():
        return {"skipped": "PEFT is not installed"}
    runner = build_pretrained_runners([method], backbone)[method]
    answering = build_pretrained_runners([method], backbone, GENERATED)[method]
    step = _step(runner, runner.prepare(batch), "train")
    figures = measuring.milliseconds(step)
    tokens = runner.prompt_length + batch["input_ids"].shape[1]
    count = len(batch["labels"])
    figures |= {"peak_mib": measuring.peak_mib(step), "source_tokens": tokens, "batch": count}
    figures["source_tokens_per_second"] = tokens * count / figures["ms"] * 1000
    figures["trained"] = sum(parameter.numel() for parameter in runner.trained)
    answer = _step(answering, answering.prepare(batch), GENERATED)
    return figures | {"generate_10_ms": measuring.milliseconds(answer)["ms"]}
