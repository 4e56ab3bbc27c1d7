"""Adapters in the file format of DePT's authors.

`adapter_model.bin` is a pickle with the tensors P, A and B, and `adapter_config.json` is a configuration of
their fork of PEFT. Source: the adapters and the code released with Shi & Lipani (ICLR 2024).
"""

import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dept_vl._utils.tensors import check_parameters
from dept_vl.adapters.schema import BEFORE_VISION, read_configuration
from dept_vl.adapters.tensors import check_shapes
from dept_vl.prompts.base import Method, sized
from dept_vl.prompts.options import PositiveSize

TENSORS_FILE = "adapter_model.bin"
CONFIG_FILE = "adapter_config.json"
PEFT_TYPE = "PROMPT_TUNING_LORA"

NAMES = {
    "soft_prompt": "prompt_embeddings",
    "offset_a": "prompt_encoder.lora_embedding_A",
    "offset_b": "prompt_encoder.lora_embedding_B",
}
"""Name of each tensor in the files of DePT's authors, by its name in this package."""

DEFAULTS: dict[str, Any] = {
    "bias": "none",
    "inference_mode": True,
    "init_lora_weights": True,
    "load_lora_embedding_B": True,
    "load_lora_embeddings": True,
    "num_attention_heads": None,
    "num_layers": None,
    "num_transformer_submodules": 1,
    "peft_type": PEFT_TYPE,
    "prompt_tuning_init": "RANDOM",
    "prompt_tuning_init_text": None,
    "revision": None,
    "save_lora_embeddings": True,
    "task_type": "SEQ_2_SEQ_LM",
}
"""Fields of their configuration besides sizes and names; their code does not use heads and layers."""


@dataclass(frozen=True)
class PromptFields:
    """Required fields of a configuration to load P."""

    num_virtual_tokens: PositiveSize
    token_dim: PositiveSize
    max_length: PositiveSize
    lora_alpha: float
    base_model_name_or_path: str


@dataclass(frozen=True)
class AllFields(PromptFields):
    """Required fields of a configuration to load P, A and B."""

    r: PositiveSize


def read(
    folder: str | Path, *, prompt_only: bool = False
) -> tuple[Method, dict[str, Tensor], dict[str, Any]]:
    """Return method, tensors by their names here, and configuration; see `Adapter.from_authors`."""
    folder = Path(folder)
    kind = PromptFields if prompt_only else AllFields
    config = read_configuration(folder / CONFIG_FILE, PEFT_TYPE, kind)
    stored = _read_tensors(folder / TENSORS_FILE)
    names = {"soft_prompt": NAMES["soft_prompt"]} if prompt_only else NAMES
    if stored.keys() == {NAMES["soft_prompt"]} and not prompt_only:
        raise ValueError(
            f"{folder / TENSORS_FILE} holds the soft prompt P alone: A and B, with which P was trained, "
            "were not saved (as in three of the authors' five releases), so the trained model cannot be "
            "restored; prompt_only=True reads P as plain prompt tuning, which is another model"
        )
    if stored.keys() - set(NAMES.values()) or not stored.keys() >= set(names.values()):
        raise ValueError(
            f"{folder / TENSORS_FILE} holds other tensors than an adapter: expected "
            f"{sorted(NAMES.values())}, found {sorted(stored)!s:.300}"
        )
    method = sized(
        "dept",
        d_model=config["token_dim"],
        prompt_length=config["num_virtual_tokens"],
        rank=0 if prompt_only else config["r"],
        max_source_length=config["max_length"],
        alpha=float(config["lora_alpha"]),
    )
    tensors = {ours: stored[name] for ours, name in names.items()}
    check_shapes(method, tensors, f"the two files at {folder} do not belong together")
    return method, tensors, config


def describe_backbone(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a description of the backbone, with its name and the whole configuration."""
    return {
        "name": config["base_model_name_or_path"],
        "fingerprint": None,
        "visual_position_bias": None,
        **BEFORE_VISION,
        "official_config": dict(config),
    }


def contents(
    tensors: Mapping[str, Tensor], sizes: Mapping[str, Any], backbone: str, config: Mapping[str, Any]
) -> dict[str, bytes]:
    """Return the content of the two files by file name. `config` is that of the adapter's files, or empty."""
    width, alpha = sizes["d_model"], sizes["alpha"]
    kept = dict(config) or DEFAULTS | {"hidden_size": width, "tokenizer_name_or_path": backbone}
    described = kept | {
        "base_model_name_or_path": backbone,
        "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha,
        "max_length": sizes["max_source_length"],
        "num_virtual_tokens": sizes["prompt_length"],
        "r": sizes["rank"],
        "token_dim": width,
    }
    pickled = io.BytesIO()
    torch.save({name: tensors[ours] for ours, name in NAMES.items()}, pickled)
    return {
        TENSORS_FILE: pickled.getvalue(),
        CONFIG_FILE: json.dumps(described, indent=2, sort_keys=True).encode(),
    }


def _read_tensors(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise FileNotFoundError(f"expected the tensors of an adapter at {path}, found none")
    try:
        # A pickle can run code; this reads tensors and plain containers, and rejects everything else.
        content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception:  # a damaged pickle can raise anything
        content = None
    if not isinstance(content, dict) or not all(
        isinstance(name, str) and type(value) is Tensor and value.layout is torch.strided
        for name, value in content.items()
    ):
        raise ValueError(
            f"{path} is damaged or holds more than tensors; nothing else is read, because reading a "
            "pickle can run code"
        )
    # With strides of 0, or compressed, a small pickle can claim a large tensor.
    claimed = sum(tensor.numel() * tensor.element_size() for tensor in content.values())
    if claimed > path.stat().st_size:
        raise ValueError(
            f"{path} is damaged: expected tensors no larger than the file ({path.stat().st_size:,} bytes), "
            f"found {claimed:,} bytes"
        )
    check_parameters(content, path)
    return content
