"""Tiny ready-made vision-language models of the real classes (see `attach`), and what goes into them."""

from typing import Any

import torch
from torch import Tensor
from transformers import (
    BartConfig,
    Blip2Config,
    Blip2ForConditionalGeneration,
    Florence2Config,
    Florence2ForConditionalGeneration,
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    PreTrainedModel,
    T5Config,
    T5Gemma2Config,
    T5Gemma2ForConditionalGeneration,
)
from zoo.models import D_MODEL, T5, VOCABULARY

FAMILIES = ("blip2", "instructblip", "florence2", "t5gemma2")
IMAGE, FENCES = 150, (151, 152)
IMAGE_TOKENS = {"blip2": 4, "instructblip": 4, "florence2": 2, "t5gemma2": 4}
PIXELS = {"blip2": 16, "instructblip": 16, "florence2": 32, "t5gemma2": 16}
TEXTS = ((2, 5), (0, 4), (1, 0), (0, 0))
"""Tokens of each row's text before and after its image."""


VISION: dict[str, Any] = {
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
Q_FORMER: dict[str, Any] = {
    "vocab_size": 60,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 32,
}
BART: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "d_model": D_MODEL,
    "max_position_embeddings": 24,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "bos_token_id": 2,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "decoder_start_token_id": 1,
    "forced_eos_token_id": None,
}
DAVIT: dict[str, Any] = {
    "embed_dim": [8, 8, 8, 16],
    "num_heads": [1, 1, 1, 2],
    "num_groups": [1, 1, 1, 2],
    "depths": [1, 1, 1, 1],
    "window_size": 2,
    "projection_dim": D_MODEL,
    "max_position_embeddings": 8,
    "max_temporal_embeddings": 4,
}
GEMMA: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": D_MODEL,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "query_pre_attn_scalar": 8,
    "max_position_embeddings": 64,
    "sliding_window": 6,
    "layer_types": ["sliding_attention", "full_attention"],
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
}


def ready_made(family: str) -> PreTrainedModel:
    """A model of the real class, with numbers large enough to tell one input from another."""
    blip: dict[str, Any] = {
        "vision_config": VISION,
        "qformer_config": Q_FORMER,
        "text_config": T5Config(**T5).to_dict(),
        "num_query_tokens": IMAGE_TOKENS["blip2"],
        "image_token_index": IMAGE,
    }
    if family == "blip2":
        model = Blip2ForConditionalGeneration(Blip2Config(**blip))
    elif family == "instructblip":
        model = InstructBlipForConditionalGeneration(InstructBlipConfig(**blip))
    elif family == "florence2":
        model = Florence2ForConditionalGeneration(
            Florence2Config(
                vision_config=DAVIT, text_config=BartConfig(**BART).to_dict(), image_token_id=IMAGE
            )
        )
    else:
        encoder = {
            "text_config": GEMMA,
            "vision_config": {"model_type": "siglip_vision_model", "vision_use_head": False, **VISION},
            "mm_tokens_per_image": IMAGE_TOKENS["t5gemma2"],
            "boi_token_index": FENCES[0],
            "eoi_token_index": FENCES[1],
        }
        model = T5Gemma2ForConditionalGeneration(
            T5Gemma2Config(encoder=encoder, decoder=GEMMA, image_token_index=IMAGE)
        )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.25)
            if "eoi_embedding" in name:
                parameter.normal_()
    return model.eval()


def _row_of(family: str, before: int, after: int, generator: torch.Generator) -> list[int]:
    """Text, image, text."""
    image = [IMAGE] * IMAGE_TOKENS[family]
    if family == "t5gemma2":
        image = [FENCES[0], *image, FENCES[1]]
    words = torch.randint(5, 140, (before + after,), generator=generator).tolist()
    return [*words[:before], *image, *words[before:]]


def inputs_of(
    family: str, *, texts: tuple[tuple[int, int], ...] = TEXTS, side: str = "right", seed: int = 0
) -> dict[str, Tensor]:
    """Rows of different lengths, each with its image, as a processor would give them.

    Args:
        family: Of `FAMILIES`.
        texts: Tokens of each row's text before and after its image.
        side: Of the padding.
        seed: Of words and pixels.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = [_row_of(family, before, after, generator) for before, after in texts]
    longest = max(map(len, rows))
    input_ids = torch.zeros(len(rows), longest, dtype=torch.long)
    mask = torch.zeros_like(input_ids)
    for number, row in enumerate(rows):
        start = longest - len(row) if side == "left" else 0
        input_ids[number, start : start + len(row)] = torch.tensor(row)
        mask[number, start : start + len(row)] = 1
    size = PIXELS[family]
    inputs = {
        "input_ids": input_ids,
        "attention_mask": mask,
        "pixel_values": torch.randn(len(rows), 3, size, size, generator=generator),
    }
    if family == "instructblip":
        inputs["qformer_input_ids"] = torch.randint(5, 60, (len(rows), 5), generator=generator)
    return inputs
