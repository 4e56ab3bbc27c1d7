"""Composed models on a GPU against the CPU: steps, answers, features, rows with different adapters."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import random_features, random_labels, random_text
from on_gpu import DEVICE, GRAPHED, MARKS, NEAR, check_as_near, check_near, distance
from torch import Tensor

from dept_vl.adapters.adapter import Adapter
from dept_vl.inference.graphed import GraphedAnswers
from dept_vl.inference.loading import load
from dept_vl.inference.mixed import ManyAdapters
from dept_vl.models.backbone import Backbone
from dept_vl.models.precision import prepare_step
from dept_vl.models.prompted import PromptedModel
from dept_vl.prompts.base import METHODS, sized
from dept_vl.prompts.methods import build

pytestmark = MARKS

LENGTHS = (9, 4, 7, 2)
LANGUAGES = ("t5", "bart", "gpt2", "llama")


def prompted(backbone: Backbone, method: str = "dept", seed: int = 1, **sizes: int) -> PromptedModel:
    """A model whose trained parts are far from where training starts."""
    own = backbone.with_projection(copy.deepcopy(backbone.visual_projection))
    rank = 2 if METHODS[method].has_rank else 0
    length = 3 if METHODS[method].has_prompt else 0
    given: dict[str, Any] = {"prompt_length": length, "rank": rank, "max_source_length": 12} | sizes
    model = PromptedModel(
        own, build(sized(method, d_model=backbone.d_model, **given)), backbone_dropout=False
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


def inputs_of(backbone: Backbone) -> dict[str, Tensor]:
    inputs = random_text(backbone, LENGTHS)
    if backbone.vision is not None:
        inputs["visual_features"] = random_features(backbone, len(LENGTHS), 2)
    return inputs


def on(device: torch.device, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.to(device) for name, tensor in inputs.items()}


def step(model: PromptedModel, inputs: dict[str, Tensor], *, bf16: bool = False) -> dict[str, Tensor]:
    """The loss and all gradients."""
    model.zero_grad()
    labels = random_labels((4, 2, 3, 1)).to(inputs["input_ids"].device)
    with torch.autocast(labels.device.type, torch.bfloat16, enabled=bf16):
        loss = model.train()(**inputs, labels=labels).loss
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss, **gradients}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("language", LANGUAGES)
def test_a_step_is_the_cpus(make_backbone: Callable[..., Backbone], language: str, precision: str) -> None:
    model = prompted(make_backbone(language, "clip" if language in ("t5", "bart") else None))
    inputs = inputs_of(model.backbone)
    exact = step(copy.deepcopy(model), inputs)
    assert len(exact) > 3
    moved = copy.deepcopy(model).to(DEVICE)
    bf16 = precision == "bf16"
    prepare_step(moved.backbone.language, DEVICE, bfloat16=bf16)
    found = step(moved, on(DEVICE, inputs), bf16=bf16)
    if bf16:
        check_as_near(found, step(model, inputs, bf16=True), exact)
    else:
        check_near(found, exact)


@pytest.mark.parametrize("method", METHODS)
def test_a_step_of_every_method_is_the_cpus(make_backbone: Callable[..., Backbone], method: str) -> None:
    model = prompted(make_backbone("t5"), method)
    inputs = inputs_of(model.backbone)
    expected = step(copy.deepcopy(model), inputs)
    check_near(step(copy.deepcopy(model).to(DEVICE), on(DEVICE, inputs)), expected, 10 * NEAR)


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("folded", [False, True])
def test_answers_are_the_cpus(make_backbone: Callable[..., Backbone], language: str, folded: bool) -> None:
    model = prompted(make_backbone(language, "clip" if language in ("t5", "bart") else None)).eval()
    inputs = inputs_of(model.backbone)
    options: dict[str, Any] = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    expected = model.generate(**inputs, **options)
    moved = copy.deepcopy(model).to(DEVICE)
    moved = moved.folded() if folded else moved
    assert torch.equal(moved.generate(**on(DEVICE, inputs), **options).cpu(), expected)


@GRAPHED
@pytest.mark.parametrize("language", ["t5", "bart"])
def test_graphs_give_the_plain_answers(make_backbone: Callable[..., Backbone], language: str) -> None:
    model = prompted(make_backbone(language)).eval().to(DEVICE)
    answers = GraphedAnswers(model, len(LENGTHS), pytest.fail)
    for seed in range(3):
        inputs = on(DEVICE, random_text(model.backbone, LENGTHS, seed=seed))
        inputs["visual_features"] = random_features(model.backbone, len(LENGTHS), seed=seed).to(DEVICE)
        expected = model.generate(**inputs, max_new_tokens=6)
        assert torch.equal(answers(**inputs, max_new_tokens=6)[:, : expected.shape[1]], expected)
    assert len(answers.recorded) == 1


def test_features_are_those_of_pixels(t5: Backbone) -> None:
    model = prompted(t5).to(DEVICE).eval()
    vision = model.backbone.vision
    assert vision is not None
    pixels = torch.randn(len(LENGTHS), 1, *vision.pixel_shape, device=DEVICE)
    text = on(DEVICE, random_text(model.backbone, LENGTHS))
    features = vision(pixels.flatten(0, 1)).unflatten(0, (len(LENGTHS), 1)).cpu()
    live = step(copy.deepcopy(model), text | {"pixel_values": pixels})
    check_near(step(model, text | {"visual_features": features.to(DEVICE)}), live)


@torch.no_grad()
def test_rows_with_different_adapters(t5: Backbone, tmp_path: Path) -> None:
    backbone = t5.to(DEVICE)
    made = {
        "short": prompted(backbone, seed=1),
        "long": prompted(backbone, seed=2, prompt_length=6, rank=1),
        "plain": prompted(backbone, "pt", seed=3),
    }
    for name, model in made.items():
        Adapter.of(model.eval(), task="vqav2", metrics={}).save(tmp_path / name)
    many = ManyAdapters(backbone, {name: load(tmp_path / name, backbone=backbone) for name in made})
    inputs, labels = on(DEVICE, inputs_of(backbone)), random_labels((4, 2, 3, 1)).to(DEVICE)
    rows = ["long", None, "short", "plain"]
    logits = many.model(rows)(**inputs, labels=labels).logits
    for row, name in enumerate(rows):
        one = {key: tensor[row : row + 1] for key, tensor in inputs.items()}
        expected = many.predictor(name).model(**one, labels=labels[row : row + 1]).logits
        assert distance(logits[row : row + 1], expected) < NEAR, name
