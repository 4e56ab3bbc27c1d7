"""Ready-made models with a prompt on a GPU against the CPU: steps, answers, rows alone and in company."""

import copy
from typing import Any

import pytest
import torch
from conftest import D_MODEL, VOCABULARY
from on_gpu import DEVICE, MARKS, NEAR, check_as_near, check_near, distance
from torch import Tensor, nn
from zoo.ready_made import FAMILIES, inputs_of, ready_made

from dept_vl.adapters.attach import Attached, attach
from dept_vl.prompts.dept import DePT

pytestmark = MARKS

TEXTS = ((2, 5), (0, 4), (1, 1))


def attached(family: str) -> Attached:
    torch.manual_seed(0)
    prompt = DePT(D_MODEL, prompt_length=3, rank=2, max_source_length=7)
    with torch.no_grad():
        for parameter in prompt.parameters():
            nn.init.normal_(parameter, std=0.3)
    return attach(ready_made(family), prompt)


def moved(family: str) -> Attached:
    """Built again: copied, its hooks would call the prompt of the first."""
    original = attached(family)
    prompt = copy.deepcopy(original.prompt)
    original.detach()
    return attach(original.model.to(DEVICE), prompt)


def step(model: Attached, inputs: dict[str, Tensor], *, bf16: bool) -> dict[str, Tensor]:
    device = inputs["input_ids"].device
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(5, VOCABULARY, (len(inputs["input_ids"]), 4), generator=generator).to(device)
    with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        output = model(**inputs, labels=labels)
    output.loss.backward()
    gradients = {name: p.grad for name, p in model.prompt.named_parameters() if p.grad is not None}
    return {"logits": output.logits, **gradients}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_is_the_cpus(family: str, precision: str) -> None:
    inputs = inputs_of(family, texts=TEXTS)
    exact = step(attached(family), inputs, bf16=False)
    assert len(exact) == 4
    shown = {name: tensor.to(DEVICE) for name, tensor in inputs.items()}
    found = step(moved(family), shown, bf16=precision == "bf16")
    if precision == "bf16":
        check_as_near(found, step(attached(family), inputs, bf16=True), exact)
    else:
        check_near(found, exact, 10 * NEAR)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_answers_are_the_cpus(family: str) -> None:
    inputs = inputs_of(family, texts=TEXTS)
    options: dict[str, Any] = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    expected = attached(family).generate(**inputs, **options)
    shown = {name: tensor.to(DEVICE) for name, tensor in inputs.items()}
    assert torch.equal(moved(family).generate(**shown, **options).cpu(), expected)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_it_leaves_no_trace(family: str) -> None:
    model = moved(family)
    inputs = {name: tensor.to(DEVICE) for name, tensor in inputs_of(family, texts=TEXTS).items()}
    labels = torch.full((len(TEXTS), 2), 7, device=DEVICE)
    with model.disabled():
        expected = model(**inputs, labels=labels).logits
    assert distance(model(**inputs, labels=labels).logits, expected) > 10 * NEAR
    model.detach()
    assert distance(model.model(**inputs, labels=labels).logits, expected) < NEAR / 10
