"""Frozen backbones with T5's sizes and random weights, and batches of three shapes, to measure methods on."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    T5Config,
    T5ForConditionalGeneration,
)

from dept_vl.models.backbone import Backbone
from dept_vl.models.checks import load_tokenizer
from dept_vl.models.vision import VisionEncoder

TARGET_LENGTH = 4
"""Number of tokens of every training target."""


@dataclass(frozen=True)
class Size:
    """Sizes of a T5 and of the CLIP tower used with it."""

    d_model: int
    d_ff: int
    layers: int
    heads: int
    d_kv: int = 64
    vocabulary: int = 32128
    d_vision: int = 768
    vision_layers: int = 12
    image: int = 224

    @property
    def d_inner(self) -> int:
        """Width of all heads together."""
        return self.heads * self.d_kv


SIZES = {
    "tiny": Size(32, 64, 2, 2, d_kv=16, vocabulary=512, d_vision=32, vision_layers=1, image=224),
    "small": Size(512, 2048, 6, 8),
    "base": Size(768, 3072, 12, 12),
    "large": Size(1024, 4096, 24, 16),
}


@dataclass(frozen=True)
class Shape:
    """Shape of the examples.

    Attributes:
        text: Mean length of the text, in tokens.
        spread: Standard deviation of the length.
        longest: Maximum length (s), to which the implementation of DePT's authors pads.
        image: Whether 49 visual tokens follow the text.
    """

    text: int
    spread: float
    longest: int
    image: bool


SHAPES = {
    "vl": Shape(20, 0.0, 256, True),
    "glue": Shape(60, 12.0, 256, False),
    "mrqa": Shape(300, 40.0, 512, False),
}

Inputs = dict[str, Any]
"""Tensors by name, and `paths` of images that are read in the step."""


def t5_config(size: Size) -> T5Config:
    """Return a T5 1.0 configuration of this size."""
    return T5Config(
        vocab_size=size.vocabulary,
        d_model=size.d_model,
        d_kv=size.d_kv,
        d_ff=size.d_ff,
        num_layers=size.layers,
        num_decoder_layers=size.layers,
        num_heads=size.heads,
        feed_forward_proj="relu",
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
    )


def build_backbone(size: Size, tokenizer: Path, *, vision: bool) -> Backbone:
    """Build a frozen T5 with random weights, optionally with a CLIP ViT of 49 patches.

    Args:
        size: Sizes of the models.
        tokenizer: Folder of any T5 tokenizer. Texts are drawn as token ids.
        vision: Whether to add the vision tower and a projection.
    """
    language = T5ForConditionalGeneration(t5_config(size))
    tower = None
    if vision:
        config = CLIPVisionConfig(
            hidden_size=size.d_vision,
            intermediate_size=4 * size.d_vision,
            num_hidden_layers=size.vision_layers,
            num_attention_heads=max(1, size.d_vision // 64),
            image_size=size.image,
            patch_size=size.image // 7,
        )
        square = {"height": size.image, "width": size.image}
        processor = CLIPImageProcessor(size={"shortest_edge": size.image}, crop_size=square)
        tower = VisionEncoder(CLIPVisionModel(config), processor)
    backbone = Backbone(
        tower,
        language,
        load_tokenizer(tokenizer),
        name="T5, random weights",
    )
    backbone.freeze(visual_projection=True)
    return backbone


def draw_batch(backbone: Backbone, shape: Shape, size: int, seed: int, *, multiple: int = 1) -> Inputs:
    """Draw a batch of random tokens, padded to its longest text, with features if the shape has an image.

    Args:
        backbone: Backbone that determines vocabulary and tower sizes.
        shape: Shape of the examples.
        size: Batch size.
        seed: Random seed.
        multiple: Multiple to round the text length up to.
    """
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(size, generator=generator)
    lengths = (shape.text + shape.spread * noise).round().long().clamp(2, shape.longest)
    width = -(-int(lengths.max()) // multiple) * multiple
    vocabulary = backbone.language_model.word_embeddings.num_embeddings
    mask = (torch.arange(width) < lengths[:, None]).long()
    labels = torch.randint(2, vocabulary, (size, TARGET_LENGTH), generator=generator)
    batch = {
        "input_ids": torch.randint(2, vocabulary, (size, width), generator=generator) * mask,
        "attention_mask": mask,
        "labels": labels,
    }
    if shape.image:
        assert backbone.vision is not None
        shown = (size, 1, backbone.vision.token_count, backbone.vision.d_vision)
        batch["visual_features"] = torch.randn(shown, generator=generator)
    return batch
