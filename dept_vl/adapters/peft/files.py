"""Adapters in PEFT's file format, written and read without PEFT; `plugin` runs them in PEFT.

`adapter_model.safetensors` has the same tensors as our own adapter. PEFT names a tensor by its module, so
`prompt.soft_prompt` becomes `base_model.model.<encoder>.dept_prompt.soft_prompt`. `adapter_config.json` is a
`plugin.DeptConfig`.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import save
from torch import nn
from transformers import PreTrainedModel

from dept_vl._utils.io import write_atomically
from dept_vl._utils.tensors import check_parameters, read_tensors, under
from dept_vl.adapters.adapter import Adapter
from dept_vl.adapters.base_model import check_base, describe_base
from dept_vl.adapters.calls import CONTAINER
from dept_vl.adapters.card import CARD_FILE
from dept_vl.adapters.fingerprint import check_name
from dept_vl.adapters.schema import read_configuration
from dept_vl.adapters.tensors import filled
from dept_vl.models.backbone import Backbone
from dept_vl.models.base import FrozenBackbone
from dept_vl.models.prompt_hook import is_encoder_decoder, words_of
from dept_vl.models.prompted import PromptedModel
from dept_vl.prompts.base import sized
from dept_vl.prompts.dept import current_name
from dept_vl.prompts.options import PositiveSize, Size

TENSORS_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"
PEFT_TYPE = "DEPT"
PLUGIN = "dept_vl.adapters.peft.plugin"
OF_IMAGES = "AutoModelForImageTextToText"
BASES = {"SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM", "CAUSAL_LM": "AutoModelForCausalLM"}
"""Class of transformers that loads the base, by task type. Without one, the base reads images."""
USE = """
## Use

The plugin of `dept_vl` registers the method DEPT with PEFT. Install `dept_vl` with its extra for PEFT
(`pip install ".[peft]"` in a clone), then import the plugin before you load the adapter:

```python
import {plugin}
from peft import PeftModel
from transformers import {base_class}{note}

base = {base_class}.from_pretrained({base}, trust_remote_code=False)
model = PeftModel.from_pretrained(base, ".")  # or its name
```
"""
"""Usage section for the model card of a PEFT adapter."""


@dataclass(frozen=True)
class ConfigFields:
    """Fields of `adapter_config.json` that are read."""

    prompt_length: Size
    rank: Size
    max_source_length: PositiveSize
    alpha: float
    base_model_name_or_path: str | None
    embedding_fingerprint: str | None
    base_fingerprint: dict[str, str] | None


def to_peft(adapter: Adapter, backbone: FrozenBackbone, folder: str | Path) -> None:
    """Save an adapter in PEFT's file format.

    Args:
        adapter: Adapter, whose only tensors are P, A and B.
        backbone: Backbone of the adapter. Its language model is PEFT's base model.
        folder: Output folder.

    Raises:
        ValueError: If the adapter has another backbone, other tensors, or cannot run the same way in PEFT.
    """
    _check_positions(backbone)
    prompt = adapter.build(backbone).prompt
    names = [name for name, _ in prompt.named_parameters()] if prompt is not None else []
    tensors = under("prompt.", adapter.tensors)
    whole = len(tensors) == len(adapter.tensors) and tensors.keys() == set(names)
    if prompt is None or not whole or not set(names) <= {"soft_prompt", "offset_a", "offset_b"}:
        raise ValueError(
            f"PEFT's files hold the tensors of a text prompt (P, A, B) and nothing else; this adapter has "
            f"{sorted(adapter.tensors)}: keep it in its own format"
        )
    config = {
        "peft_type": PEFT_TYPE,
        "task_type": _task_type(backbone.language),
        "base_model_name_or_path": backbone.language.name_or_path,
        "inference_mode": True,
        "prompt_length": prompt.prompt_length,
        "rank": prompt.rank,
        "max_source_length": prompt.max_source_length,
        "alpha": prompt.alpha,
        "base_fingerprint": describe_base(backbone.language),
    }
    part = wrapped(backbone.language)
    place = next(name for name, module in backbone.language.named_modules() if module is part)
    prefix = f"base_model.model.{place}.{CONTAINER}."
    named = {prefix + name: tensor for name, tensor in tensors.items()}
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / TENSORS_FILE, save(named, metadata={"format": "pt"}))
    write_atomically(folder / CONFIG_FILE, json.dumps(config, indent=2, sort_keys=True).encode())
    add_use(folder, _task_type(backbone.language), backbone.language.name_or_path)


def add_use(folder: Path, task_type: str | None, base: str | None) -> None:
    """Add the usage section to the model card in a folder, if it has none."""
    path = folder / CARD_FILE
    card = path.read_text(encoding="utf-8") if path.is_file() else "---\nlibrary_name: peft\n---\n"
    if PLUGIN not in card:
        base_class = BASES.get(task_type or "", OF_IMAGES)
        use = USE.format(
            plugin=PLUGIN,
            base_class=base_class,
            note=f"  # or {OF_IMAGES}, if it reads images" if task_type == "CAUSAL_LM" else "",
            base=ascii(base or "its base model"),
        )
        write_atomically(path, (card.rstrip("\n") + "\n" + use).encode())


def from_peft(
    folder: str | Path, backbone: FrozenBackbone, *, task: str, metrics: Mapping[str, float] | None = None
) -> Adapter:
    """Load an adapter that was saved by PEFT.

    Args:
        folder: Folder with PEFT's two files.
        backbone: Backbone with the language model that the adapter was trained on.
        task: Task that the adapter was trained on, which the files do not record.
        metrics: Metrics of the adapter, or None.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If the files are damaged, do not belong together, or contain more than a prompt, or if the
            backbone has another name or other word embeddings, or cannot run the prompt as PEFT does.
    """
    folder = Path(folder)
    config = read_configuration(folder / CONFIG_FILE, PEFT_TYPE, ConfigFields)
    for name in ("modules_to_save", "trainable_token_indices"):
        if config.get(name):
            raise ValueError(
                f"the adapter at {folder} trained {config[name]!s:.100} beside the prompt ({name}), which an "
                "adapter of this package cannot hold: run it in PEFT"
            )
    if base := config.get("base_model_name_or_path"):
        check_name(base, backbone, [backbone.name, backbone.language.name_or_path])
    record = base_record(config.get("base_fingerprint"), config.get("embedding_fingerprint"))
    check_base(record, backbone.language, adapter=f"the adapter at {folder}", trained_on=base)
    _check_positions(backbone)
    tensors = read_tensors(folder / TENSORS_FILE)
    check_parameters(tensors, folder / TENSORS_FILE)
    sizes = {name: config[name] for name in ("prompt_length", "rank", "max_source_length")}
    method = sized("dept", d_model=backbone.d_model, alpha=float(config["alpha"]), **sizes)
    what = f"the two files at {folder} do not belong together, or not to {backbone.name}"
    named = {current_name(name.rpartition(f"{CONTAINER}.")[2]): tensor for name, tensor in tensors.items()}
    prompt = filled(method, named, what)
    return Adapter.of(PromptedModel(backbone, prompt), task=task, metrics=metrics or {})


def base_record(base: Mapping[str, str] | None, embedding: str | None) -> dict[str, str]:
    """Return the fingerprint in a configuration; an older one has only a hash of word embeddings, or none."""
    if base:
        return dict(base)
    return {"embeddings": embedding} if embedding else {}


def is_text_encoder_decoder(model: nn.Module) -> bool:
    """Return whether a model is an encoder-decoder for text alone, whose encoder can be wrapped."""
    config = getattr(model, "config", None)
    return (
        isinstance(model, PreTrainedModel)
        and getattr(config, "is_encoder_decoder", False)
        and not hasattr(model, "get_image_features")
        and model.main_input_name == "input_ids"
        and model.get_encoder() is not model
        and isinstance(model.get_encoder().get_input_embeddings(), nn.Embedding)
    )


def wrapped(model: PreTrainedModel) -> nn.Module:
    """Return the module that is wrapped in PEFT: the text encoder, or the word embeddings."""
    part: nn.Module = model.get_encoder() if is_text_encoder_decoder(model) else words_of(model)
    return part


def _task_type(model: PreTrainedModel) -> str | None:
    """Return the task type of the PEFT class that fits a model."""
    if is_text_encoder_decoder(model):
        return "SEQ_2_SEQ_LM"
    return None if is_encoder_decoder(model.config) else "CAUSAL_LM"


def _check_positions(backbone: FrozenBackbone) -> None:
    """Raise a `ValueError` if positions differ in PEFT, where the encoder also counts those of the prompt."""
    if not isinstance(backbone, Backbone):
        if is_text_encoder_decoder(backbone.language):
            raise ValueError(
                f"in PEFT the prompt is in front of the text of {backbone.name}, and with --model behind its "
                "start token: load the model by --language"
            )
        return
    if not backbone.language.config.is_encoder_decoder:
        raise ValueError(
            f"{backbone.name} is decoder-only, and was loaded by --language, which puts the prompt in front "
            "of the start token; in PEFT it goes behind: load and train the model by --model"
        )
    names = {name for name, _ in backbone.language.get_encoder().named_modules()}
    if backbone.visual_position_bias == "none" and "embed_positions" in names:
        raise ValueError(
            f"in PEFT the encoder of {backbone.name} counts the positions of the prompt, and with "
            "visual_position_bias='none' those of the text alone: the same prompt gives other answers; load "
            "the backbone with visual_position_bias='relative'"
        )
