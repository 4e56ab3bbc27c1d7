"""Models with DePT as a PEFT method, for the tests of their numbers and of their files."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import random_labels, random_text
from torch import Tensor
from transformers import PreTrainedModel

peft = pytest.importorskip("peft", reason="the extra 'peft' is not installed")

from peft import (  # noqa: E402
    PeftModel,
    get_peft_model,
)

from dept_vl.adapters.peft.plugin import DeptConfig  # noqa: E402
from dept_vl.models.backbone import Backbone  # noqa: E402
from dept_vl.models.prompted import PromptedModel  # noqa: E402

M, R, S, ALPHA = 4, 3, 12, 5.0
SIZES = {"prompt_length": M, "rank": R, "max_source_length": S, "alpha": ALPHA}

Text = dict[str, Tensor]
Load = Callable[[], PreTrainedModel]


def padded(folder: Path, side: str = "right", lengths: tuple[int, ...] = (7, 4, 5)) -> Text:
    class Tokens:  # all that `random_text` asks of a backbone
        tokenizer = type("T", (), {"pad_token_id": 0 if folder.name == "t5" else 1})

    return random_text(Tokens, lengths, side=side)  # type: ignore[arg-type]


def config(**changes: Any) -> DeptConfig:
    return DeptConfig(**{"task_type": "SEQ_2_SEQ_LM", **SIZES, **changes})


def trained(model: PreTrainedModel, adapter_name: str = "default", **changes: Any) -> PeftModel:
    """As after training: every tensor is far from where it starts."""
    wrapped = get_peft_model(model, config(**changes), adapter_name=adapter_name).eval()
    return shaken(wrapped, adapter_name)


def shaken(model: PeftModel, adapter_name: str) -> PeftModel:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if f"dept_prompt.{adapter_name}." in name:
                parameter.normal_()
    return model


@torch.no_grad()
def logits(model: Any, text: Text, **options: Any) -> Tensor:
    out: Tensor = model(**text, labels=random_labels((3,) * len(text["input_ids"])), **options).logits
    return out


def generated(model: Any, text: Text, **options: Any) -> Tensor:
    torch.manual_seed(5)
    tokens: Tensor = model.generate(**text, max_new_tokens=6, min_new_tokens=6, **options)
    return tokens


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-5)


def ours(model: PeftModel, backbone: Backbone, adapter_name: str = "default") -> PromptedModel:
    """Our own model with the tensors of an adapter."""
    layer = model.get_base_model().get_encoder()
    return PromptedModel(backbone, copy.deepcopy(layer.dept_prompt[adapter_name])).eval()


# Rows with different adapters.


def several(load: Load) -> PeftModel:
    model = trained(load(), "a")
    for name, sizes in (("b", {"prompt_length": 7, "rank": 2}), ("c", {"prompt_length": 0, "alpha": 1.0})):
        model.add_adapter(name, config(**sizes))
        shaken(model, name)
    return model.eval()


# Our own adapters, and PEFT's files.


def relative(make_backbone: Callable[..., Backbone], folder: Path) -> Backbone:
    return make_backbone(folder.name, None, visual_position_bias="relative")
