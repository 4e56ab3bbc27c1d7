"""Loading of pretrained models with quantised weights, or on several devices."""

import importlib.util
import logging
from typing import Any

import torch
from torch import nn

from dept_vl._utils.errors import UsageError
from dept_vl._utils.tensors import fingerprint
from dept_vl.models.base import FrozenBackbone
from dept_vl.models.options import LoadIn

PACKS = "support_avx512bf16_for_cpu"
"""Attribute of bitsandbytes' layers that enables the CPU kernel for inference."""
# Whatever imports it, such as PEFT, would print that a kernel is missing which no training uses.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


def placing(load_in: LoadIn, device_map: str) -> dict[str, Any]:
    """Return the options of `from_pretrained`, which are empty for full precision on one device.

    Raises:
        UsageError: If bitsandbytes is not installed.
    """
    options: dict[str, Any] = {"device_map": device_map} if device_map else {}
    if not load_in:
        return options
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UsageError(f"--load_in {load_in} needs bitsandbytes: pip install bitsandbytes, or leave it out")
    from transformers import BitsAndBytesConfig

    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    computed = torch.float32 if device.type == "cpu" else torch.bfloat16
    bits = {f"load_in_{load_in}": True}
    config = BitsAndBytesConfig(bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=computed, **bits)
    return {"device_map": {"": device}, **options, "quantization_config": config}


def keep_gradients(model: nn.Module) -> None:
    """Disable bitsandbytes' CPU kernel for inference.

    On some CPUs, it packs a layer's weights at the first call in evaluation mode, after which no gradients
    are computed.
    """
    for module in model.modules():
        if hasattr(module, PACKS):
            setattr(module, PACKS, False)


def fingerprint_of_words(backbone: FrozenBackbone) -> str:
    """Return the hash of the word embeddings, which are the same in every precision."""
    return fingerprint([("words", backbone.language_model.word_embeddings.weight)])
