"""Parameter groups with their rates, and the schedule."""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import AdamW
from transformers.models.t5.modeling_t5 import T5LayerNorm
from zoo.subjects import targets, texts

from dept_vl.config import OptimOptions, PromptOptions, RunConfig
from dept_vl.models.backbone import Backbone
from dept_vl.models.prompted import PromptedModel
from dept_vl.prompts.base import METHODS
from dept_vl.prompts.dept import DePT
from dept_vl.training.build import build_prompt
from dept_vl.training.optim import (
    T5_WORD_SIZE,
    build_optimizer,
    build_schedule,
    clip,
    relative_size,
    sizes_of,
)

OPTIONS = OptimOptions(
    prompt_lr=0.4,
    offset_lr=3e-3,
    projection_lr=2e-3,
    backbone_lr=1e-4,
    prompt_weight_decay=0.5,
    offset_weight_decay=0.25,
    projection_weight_decay=0.125,
    backbone_weight_decay=0.0625,
)
RATES = {
    "prompt": (0.4, 0.5),
    "low_rank": (3e-3, 0.25),
    "visual_projection": (2e-3, 0.125),
    "backbone": (1e-4, 0.0625),
}


def full_model(backbone: Backbone) -> PromptedModel:
    backbone.freeze(language=False)
    return PromptedModel(backbone, DePT(backbone.d_model, prompt_length=3, rank=2, max_source_length=20))


def groups_of(*names: str) -> dict[str, list[nn.Parameter]]:
    return {name: [nn.Parameter(torch.ones(2, 3))] for name in names}


def test_every_group_of_a_model_has_its_rate_and_decay(backbone: Backbone) -> None:
    model = full_model(backbone)
    optimizer = build_optimizer(model.parameter_groups(), OPTIONS)
    found = {group["name"]: (group["lr"], group["weight_decay"]) for group in optimizer.param_groups}
    assert found == RATES


def test_groups_share_nothing_and_leave_nothing_out(backbone: Backbone) -> None:
    model = full_model(backbone)
    optimizer = build_optimizer(model.parameter_groups(), OPTIONS)
    grouped = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    trainable = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == trainable


def test_default_decay_and_rates_are_apart() -> None:
    names = list(RATES)
    rates = [OptimOptions().of_group(name) for name in names]
    assert rates == [(0.3, 1e-5), (1e-3, 1e-5), (1e-3, 0.01), (1e-4, 0.01)]


def test_a_step_moves_each_group_by_its_rate() -> None:
    # AdamW's first step is the rate itself, whatever the size of the gradient.
    groups = groups_of(*RATES)
    options = replace(
        OPTIONS,
        prompt_weight_decay=0.0,
        offset_weight_decay=0.0,
        projection_weight_decay=0.0,
        backbone_weight_decay=0.0,
    )
    optimizer = build_optimizer(groups, options)
    for (parameter,) in groups.values():
        parameter.grad = torch.full_like(parameter, 7.0)
    optimizer.step()
    for name, (parameter,) in groups.items():
        torch.testing.assert_close(parameter.detach(), torch.full((2, 3), 1 - RATES[name][0]))


def test_nothing_to_train(make_backbone: Callable[..., Backbone]) -> None:
    backbone = make_backbone("t5")
    backbone.freeze(visual_projection=True)
    with pytest.raises(ValueError, match="nothing to train: prompt_length and rank are 0"):
        build_optimizer(PromptedModel(backbone).parameter_groups(), OPTIONS)


def rates_over(steps: int, options: OptimOptions) -> list[list[float]]:
    """The learning rate of each group at every step, and the one after the last."""
    optimizer: AdamW = build_optimizer(groups_of("prompt", "low_rank"), options)
    schedule = build_schedule(optimizer, options, steps)
    rates = []
    for _ in range(steps + 1):
        rates.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        schedule.step()
    return rates


def test_schedule_rises_then_falls_to_zero() -> None:
    rates = rates_over(100, replace(OPTIONS, warmup_steps=8))
    peak = [0.4, 3e-3]
    for step, share in [(0, 0), (2, 0.25), (4, 0.5), (8, 1), (54, 0.5), (77, 0.25), (100, 0)]:
        assert rates[step] == pytest.approx([share * rate for rate in peak])
    assert max(rate for rate, _ in rates) == rates[8][0]


def test_a_short_run_warms_up_for_a_tenth(capsys: pytest.CaptureFixture[str]) -> None:
    rates = rates_over(20, replace(OPTIONS, warmup_steps=500))
    assert [rate for rate, _ in rates[:4]] == pytest.approx([0, 0.2, 0.4, 0.4 * 17 / 18])
    assert capsys.readouterr().out == ""
    assert rates_over(20, replace(OPTIONS, warmup_steps=21)) == rates
    assert "warmup_steps=21 is more than the 20 steps of the run; 2 are taken" in capsys.readouterr().out


def test_warm_up_may_be_a_share_of_the_steps() -> None:
    rates = rates_over(40, replace(OPTIONS, warmup_steps=1, warmup_ratio=0.25))
    assert [rate for rate, _ in rates].index(0.4) == 10


def test_epsilon_is_that_of_the_options(t5: Backbone) -> None:
    groups = PromptedModel(t5, None).parameter_groups()
    assert build_optimizer(groups, OPTIONS).defaults["eps"] == 1e-8
    assert build_optimizer(groups, replace(OPTIONS, adam_eps=1e-6)).defaults["eps"] == 1e-6


def test_without_warm_up_the_first_step_is_the_peak() -> None:
    assert rates_over(50, replace(OPTIONS, warmup_steps=0))[0] == [0.4, 3e-3]
    assert rates_over(9, OPTIONS)[0] == [0.4, 3e-3]


@torch.no_grad()
def with_larger_words(t5: Backbone, size: float) -> Backbone:
    """The same function of its words, with embeddings of another size: the whole residual stream has it."""
    backbone = deepcopy(t5)
    language, projection = backbone.language, backbone.visual_projection
    for module in backbone.modules():
        if isinstance(module, T5LayerNorm):
            module.variance_epsilon = 1e-30
    language.lm_head.weight = nn.Parameter(language.lm_head.weight.clone(), requires_grad=False)  # untied
    language.shared.weight.mul_(size)
    for name, parameter in language.named_parameters():
        if name.endswith((".o.weight", ".wo.weight")):
            parameter.mul_(size)
    for parameter in (projection.norm.weight, projection.image_order.weight, projection.object_order.weight):
        parameter.mul_(size)
    backbone.freeze(visual_projection=True)
    return backbone


def curve(t5: Backbone, size: float, prompt: PromptOptions, optim: OptimOptions) -> torch.Tensor:
    """Losses of a few steps."""
    backbone = with_larger_words(t5, size)
    torch.manual_seed(0)
    unit = relative_size(backbone) if optim.rates == "relative" else 1.0
    model = PromptedModel(backbone, build_prompt(prompt, backbone, 0, unit), backbone_dropout=False).train()
    sizes = sizes_of(model, optim)
    optimizer = build_optimizer(model.parameter_groups(), optim, sizes)
    inputs = texts(backbone)
    losses = []
    for _ in range(12):
        loss = model(**inputs, labels=targets(len(inputs["input_ids"]))).loss
        loss.backward()
        clip([p for group in optimizer.param_groups for p in group["params"]], 0.5, sizes)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return torch.stack(losses)


@pytest.mark.parametrize(
    ("method", "more"),
    [
        ("adept", {"visual_offset": True}),
        ("dept", {}),
        ("memory", {}),
        *(
            pytest.param(method, {}, marks=pytest.mark.slow)
            for method in METHODS
            if method not in ("dept", "memory")
        ),
    ],
)
def test_relative_rates_do_not_depend_on_the_size_of_words(
    t5: Backbone, method: str, more: dict[str, bool]
) -> None:
    prompt = PromptOptions(
        method=method, prompt_length=3, rank=2, reference_prompt_length=6, max_source_length=20, **more
    )
    if method == "pt":
        prompt = replace(prompt, rank=None)
    relative = OptimOptions(rates="relative", prompt_lr=1.0, offset_lr=0.02, prompt_weight_decay=0.1)
    usual = curve(t5, 1, prompt, relative)
    assert usual[-1] < usual[0] - 0.02
    assert torch.equal(curve(t5, 2**-5, prompt, relative), usual)
    for size in (0.02, 30):  # no powers of two: what is rounded otherwise grows from step to step
        assert (curve(t5, size, prompt, relative) - usual)[:8].abs().max() < 1e-3
    if method != "memory":  # acts behind the last norm
        absolute = replace(relative, rates="absolute", prompt_lr=0.1)
        assert (curve(t5, 30, prompt, absolute) - curve(t5, 0.02, prompt, absolute)).abs().max() > 0.02


def test_relative_rates_are_those_of_t5_at_its_size(t5: Backbone) -> None:
    as_t5 = with_larger_words(t5, T5_WORD_SIZE / t5.word_size())
    model = full_model(as_t5)
    options = replace(OPTIONS, rates="relative")
    found = {
        group["name"].partition(" x ")[0]: (group["lr"], group["weight_decay"])
        for group in build_optimizer(model.parameter_groups(), options, sizes_of(model, options)).param_groups
    }
    assert found == {name: pytest.approx(rates, rel=1e-5) for name, rates in RATES.items()}


@pytest.mark.parametrize(
    ("prompt", "rate"),
    [
        ({}, 1e-3),
        ({"method": "adept"}, 1e-3),
        ({"method": "pt", "prompt_length": 0}, 1e-3),  # its length is that of the reference
        ({"prompt_length": 0, "rank": 0}, 1e-3),  # no offset either
        ({"prompt_length": 0}, 1e-2),
        ({"method": "adept", "prompt_length": 0}, 1e-2),
        ({"method": "memory"}, 1e-2),
    ],
)
def test_an_offset_alone_has_a_default_rate_of_its_own(prompt: dict[str, Any], rate: float) -> None:
    config = RunConfig(prompt=PromptOptions(**prompt))
    assert config.settled().optim.of_group("low_rank")[0] == rate
    given = replace(config, optim=OptimOptions(offset_lr=0.5))
    assert given.settled() == given
