"""What the tests of backbones compute with."""

from pathlib import Path

import torch
from conftest import D_MODEL, random_features, random_text
from torch import Tensor
from transformers import (
    AutoModelForSeq2SeqLM,
    PreTrainedModel,
)

from dept_vl.models.backbone import Backbone

MODES = ("none", "relative")
LENGTHS = (7, 4, 5)
PROMPT = 3


def stock(folder: Path) -> PreTrainedModel:
    """A model that no backbone has touched."""
    return AutoModelForSeq2SeqLM.from_pretrained(folder).eval()


def parts(backbone: Backbone, images: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """`[prompt ; text]` of ragged lengths, its mask, and visual tokens."""
    text = random_text(backbone, LENGTHS)
    embeddings = backbone.embed(text["input_ids"])
    prompt = torch.randn(1, PROMPT, D_MODEL).expand(len(LENGTHS), -1, -1)
    mask = torch.cat([torch.ones(len(LENGTHS), PROMPT), text["attention_mask"]], dim=1).bool()
    visual = backbone.project(visual_features=random_features(backbone, len(LENGTHS), images))
    return torch.cat([prompt, embeddings], dim=1), mask, visual


def encode(backbone: Backbone, *arguments: Tensor, prompt_length: int = PROMPT) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        output, mask = backbone.encode(*arguments, prompt_length=prompt_length)
    return output.last_hidden_state, mask
