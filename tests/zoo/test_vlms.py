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


@pytest.mark.parametrize("name", FAMILIES | TEXT_ONLY)
def test_it_loads_sees_the_image_and_gives_no_heed_to_padding(pretrained_folder: FolderOf, name: str) -> None:
    folder = pretrained_folder(name)
    assert sum(path.stat().st_size for path in folder.iterdir()) < 2e6
    model, processor = loaded(folder)
    side = "right" if has_encoder(model) else "left"
    rest = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    with torch.no_grad():
        together = model.generate(**inputs_of(processor, [0, 1], padding_side=side), **rest)[:, -5:]
        for row in range(2):
            inputs = inputs_of(processor, [row])
            alone = model.generate(**inputs, **rest)[:, -5:]
            assert together[row].tolist() == alone[0].tolist()
            if name in FAMILIES:
                negative = model(**decoded(model, inputs | {"pixel_values": -inputs["pixel_values"]}))
                assert not torch.allclose(negative.logits, model(**decoded(model, inputs)).logits, atol=1e-2)


HEEDS_LEFT = {"blip2", "instructblip", "florence2", "bart_text", "gpt2_text"}
"""Padding on the left moves the learned positions of these, or comes between image and text."""


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", FAMILIES | TEXT_ONLY)
def test_logits_of_a_padded_row(pretrained_folder: FolderOf, name: str, side: str) -> None:
    model, processor = loaded(pretrained_folder(name))
    batch = inputs_of(processor, [0, 1], padding_side=side)
    with torch.no_grad():
        together = model(**decoded(model, batch)).logits
        for row in range(2):
            alone = model(**decoded(model, inputs_of(processor, [row]))).logits[0]
            real = batch["attention_mask"][row].bool() if not has_encoder(model) else slice(None)
            same = torch.allclose(together[row][real], alone, atol=1e-4, rtol=1e-4)
            assert same == (batch["attention_mask"][row].all() or side == "right" or name not in HEEDS_LEFT)


def decoded(model: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """With an answer for the decoder, if there is one; the labels, since InstructBLIP passes no other on."""
    if not has_encoder(model):
        return inputs
    return inputs | {"labels": torch.tensor([[40, 50, 60, 1]]).repeat(len(inputs["input_ids"]), 1)}
