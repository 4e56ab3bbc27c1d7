"""The tiny pretrained models load, read images, and do not heed padding; without this package."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import random_image
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    AutoProcessor,
)
from zoo.vlm_parts import has_encoder
from zoo.vlms import FAMILIES, TEXT_ONLY, question_for

QUESTIONS = ["what colour is the star ?", "how many ?"]
IMAGES = [random_image((40, 36), 0), random_image((20, 48), 1)]
FolderOf = Callable[[str], Path]


def loaded(folder: Path) -> tuple[Any, Any]:
    """The model and its processor, as anybody loads them."""
    auto = {
        "gpt2_text": AutoModelForCausalLM,
        "llama_text": AutoModelForCausalLM,
        "t5_text": AutoModelForSeq2SeqLM,
        "bart_text": AutoModelForSeq2SeqLM,
    }.get(folder.name, AutoModelForImageTextToText)
    return auto.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)


def inputs_of(processor: Any, rows: list[int], **options: Any) -> dict[str, Tensor]:
    """Of the rows of `QUESTIONS` and `IMAGES`."""
    asked = [question_for(processor, QUESTIONS[row]) for row in rows]
    if not hasattr(processor, "image_processor"):
        return dict(processor(asked, return_tensors="pt", padding=True, **options))
    images = [[IMAGES[row]] for row in rows]
    inputs = processor(text=asked, images=images, return_tensors="pt", padding=True, **options)
    inputs.pop("labels", None)
    return dict(inputs)


HEEDS_LEFT = {"blip2", "instructblip", "florence2", "bart_text", "gpt2_text"}
"""Padding on the left moves the learned positions of these, or comes between image and text."""


@pytest.mark.parametrize("name", FAMILIES | TEXT_ONLY)
def test_it_loads_sees_the_image_and_gives_no_heed_to_padding(pretrained_folder: FolderOf, name: str) -> None:
    folder = pretrained_folder(name)
    assert sum(path.stat().st_size for path in folder.iterdir()) < 2e6
    model, processor = loaded(folder)
    left, right = (inputs_of(processor, [0, 1], padding_side=side) for side in ("left", "right"))
    rows = [inputs_of(processor, [row]) for row in range(2)]
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    with torch.no_grad():
        together = model.generate(**(right if has_encoder(model) else left), **options)[:, -5:]
        alone = [model.generate(**inputs, **options)[0, -5:] for inputs in rows]
        logits = [model(**decoded(model, inputs)).logits[0] for inputs in rows]
        padded = [(batch, model(**decoded(model, batch)).logits) for batch in (left, right)]
        if name in FAMILIES:
            negative = rows[0] | {"pixel_values": -rows[0]["pixel_values"]}
            assert not torch.allclose(model(**decoded(model, negative)).logits[0], logits[0], atol=1e-2)
    assert together.tolist() == [tokens.tolist() for tokens in alone]
    for row, expected in enumerate(logits):
        same = []
        for batch, found in padded:
            real = slice(None) if has_encoder(model) else batch["attention_mask"][row].bool()
            same.append(torch.allclose(found[row][real], expected, atol=1e-4, rtol=1e-4))
        needs_padding = not left["attention_mask"][row].all()
        assert same == [not (needs_padding and name in HEEDS_LEFT), True]


def decoded(model: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """With an answer for the decoder, if there is one; the labels, since InstructBLIP passes no other on."""
    if not has_encoder(model):
        return inputs
    return inputs | {"labels": torch.tensor([[40, 50, 60, 1]]).repeat(len(inputs["input_ids"]), 1)}
