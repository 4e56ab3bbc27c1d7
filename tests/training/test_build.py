"""From options to a prompt: its sizes are those of its budget."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import D_MODEL

from dept_vl.config import BackboneOptions, DataOptions, OptimOptions, PromptOptions, RunConfig, TrainOptions
from dept_vl.models.backbone import Backbone
from dept_vl.prompts.base import METHODS
from dept_vl.training.build import budget_line, build_prompt, without_effect


@pytest.mark.parametrize("method", METHODS)
def test_a_solved_prompt_keeps_its_budget(make_backbone: Callable[..., Backbone], method: str) -> None:
    backbone = make_backbone("t5", None)
    options = PromptOptions(method=method, prompt_length=10, reference_prompt_length=30, max_source_length=12)
    prompt = build_prompt(options, backbone, seed=3)
    assert prompt is not None
    used = sum(p.numel() for p in prompt.parameters())
    assert used <= 30 * D_MODEL
    described = prompt.describe()
    assert described["method"] == method
    line = budget_line(options, prompt)
    assert f"prompt: {method}, m={prompt.prompt_length}, r={described['rank']};" in line
    assert f"{30 * D_MODEL - used:,} left over" in line
    unused = f"prompt_length=10 is not used by {method}"
    assert line.endswith(unused) == (method in ("pt", "ulpt", "lopt", "memory"))
    usual = budget_line(PromptOptions(method=method, reference_prompt_length=30), prompt)
    assert "not used" not in usual


def test_pt_is_a_long_prompt_of_rank_0(make_backbone: Callable[..., Backbone]) -> None:
    backbone = make_backbone("t5", None)
    named = PromptOptions(method="pt", prompt_length=2, reference_prompt_length=7)
    spelt = PromptOptions(prompt_length=7, rank=0, reference_prompt_length=7)
    ours, theirs = (build_prompt(options, backbone, seed=3) for options in (named, spelt))
    assert ours is not None
    assert theirs is not None
    assert ours.describe() == theirs.describe()
    assert ours.state_dict().keys() == theirs.state_dict().keys() == {"soft_prompt"}
    assert torch.equal(ours.soft_prompt, theirs.soft_prompt)


def test_options_without_effect_are_told() -> None:
    idle = RunConfig(
        data=DataOptions(
            dev_split="val",
            holdout_images=7,
            shots_seed=5,
            shots_dev="split",
            features="live",
            features_dir=Path("f"),
        ),
        prompt=PromptOptions(init_parts="all", init_text="red"),
        train=TrainOptions(max_steps=9, pause_at=10),
    )
    names = [note.split("--")[1].split()[0] for note in without_effect(idle)]
    assert names == [
        *("holdout_images", "shots_seed", "shots_dev", "features_dir", "init_parts", "init_text", "pause_at"),
    ]
    few = RunConfig(
        data=DataOptions(dev_split="val", holdout_images=7, shots_file=Path("s"), shots_per="all"),
        train=TrainOptions(max_steps=9, num_epochs=1),
    )
    names = [note.split("--")[1].split()[0] for note in without_effect(few)]
    assert names == ["dev_split", "holdout_images", "shots_per", "max_steps"]
    text = RunConfig(
        data=DataOptions(task="rte", features="cached", on_bad_image="skip"),
        prompt=PromptOptions(method="adept", visual_offset=True),
    )
    names = [note.split("--")[1].split()[0] for note in without_effect(text)]
    assert names == ["visual_offset", "features", "on_bad_image"]
    on_split = RunConfig(data=DataOptions(dev_split="val", shots_file=Path("s"), shots_dev="split"))
    assert without_effect(on_split) == []
    idle = RunConfig(
        prompt=PromptOptions(method="memory", prompt_init="random"),
        backbone=BackboneOptions(train_projection=False, lora_rank=3),
        optim=OptimOptions(
            prompt_lr=0.1, projection_lr=0.1, backbone_lr=0.1, warmup_steps=3, warmup_ratio=0.1
        ),
    )
    names = [note.split("--")[1].split()[0] for note in without_effect(idle)]
    assert names == ["prompt_init", "prompt_lr", "projection_lr", "backbone_lr", "lora_rank", "warmup_steps"]
    used = RunConfig(
        data=DataOptions(
            dev_split="", holdout_images=7, shots=2, shots_seed=5, shots_dev="split", features_dir=Path("f")
        ),
        prompt=PromptOptions(init_from=(Path("a"),), init_parts="all", prompt_init="text", init_text="red"),
        train=TrainOptions(max_steps=9, pause_at=9),
    )
    assert without_effect(used) == without_effect(RunConfig()) == []
