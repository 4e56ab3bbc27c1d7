"""Offsets of visual tokens and of the encoder's output: where they act, and what training crosses."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import D_MODEL, random_features, random_labels, random_text

from dept_vl.adapters.adapter import Adapter
from dept_vl.models.backbone import Backbone
from dept_vl.models.prompted import PromptedModel
from dept_vl.prompts.base import METHODS, sized
from dept_vl.prompts.dept import DePT
from dept_vl.prompts.methods import build

SIZES = {"d_model": D_MODEL, "rank": 3, "max_source_length": 12}
OPTIONS = {
    "memory": {"method": "memory", "prompt_length": 0},
    "adept": {"method": "adept", "prompt_length": 2, "visual_offset": True},
    "adept alone": {"method": "adept", "prompt_length": 0, "visual_offset": True},
    "hybrid": {"method": "hybrid", "prompt_length": 2, "visual_offset": True},
}


def prompt_of(name: str, *, trained: bool = True) -> DePT:
    prompt = build(sized(**OPTIONS[name], **SIZES))
    if trained:
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in prompt.parameters():
                parameter.normal_(generator=generator)
    return prompt


def inputs_of(backbone: Backbone) -> dict[str, torch.Tensor]:
    return {**random_text(backbone), "visual_features": random_features(backbone)}


@pytest.mark.parametrize("language", ["t5", "bart"])
@torch.no_grad()
def test_memory_is_a_function_of_the_output_of_the_bare_encoder(
    make_backbone: Callable[..., Backbone], language: str
) -> None:
    backbone = make_backbone(language)
    prompt = prompt_of("memory")
    model, bare = PromptedModel(backbone, prompt).eval(), PromptedModel(backbone).eval()
    encoded, mask = model.encode(**inputs_of(backbone))
    plain, same = bare.encode(**inputs_of(backbone))
    h, f = plain.last_hidden_state, prompt.memory_offset
    expected = h + (h @ f.down.weight.T + f.down.bias).clamp(min=0) @ f.up.weight.T + f.up.bias
    assert torch.equal(mask, same)
    torch.testing.assert_close(encoded.last_hidden_state[mask], expected[mask])


@pytest.mark.parametrize("language", ["t5", "bart"])
@torch.no_grad()
def test_visual_offset_is_a_function_of_each_visual_token(
    make_backbone: Callable[..., Backbone], language: str
) -> None:
    backbone = make_backbone(language)
    prompt = prompt_of("adept alone")
    prompt.token_offset.up.weight.zero_()
    prompt.token_offset.up.bias.zero_()
    inputs = inputs_of(backbone)
    encoded, mask = PromptedModel(backbone, prompt).eval().encode(**inputs)
    visual, f = backbone.project(visual_features=inputs["visual_features"]), prompt.visual_offset
    shifted = visual + (visual @ f.down.weight.T + f.down.bias).clamp(min=0) @ f.up.weight.T + f.up.bias
    text = backbone.embed(inputs["input_ids"])
    expected, _ = backbone.encode(text, inputs["attention_mask"].bool(), shifted)
    torch.testing.assert_close(encoded.last_hidden_state[mask], expected.last_hidden_state[mask])


@pytest.mark.parametrize("name", ["memory", "adept alone"])
def test_untrained_is_the_bare_backbone_bit_for_bit(backbone: Backbone, name: str) -> None:
    model = PromptedModel(backbone, prompt_of(name, trained=False)).eval()
    with torch.no_grad():
        ours, theirs = (
            one(**inputs_of(backbone), labels=random_labels()).logits
            for one in (model, PromptedModel(backbone).eval())
        )
    assert torch.equal(ours, theirs)


def test_the_encoder_of_memory_runs_without_gradients(make_backbone: Callable[..., Backbone]) -> None:
    backbone = make_backbone("t5")
    backbone.freeze(visual_projection=True)
    model = PromptedModel(backbone, prompt_of("memory")).train()
    seen = []
    backbone.language.encoder.register_forward_hook(
        lambda _, __, output: seen.append(output.last_hidden_state.requires_grad)
    )
    model(**inputs_of(backbone), labels=random_labels()).loss.backward()
    assert seen == [False]
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.prompt.parameters())
    assert all(p.grad is None for p in backbone.parameters())


@pytest.mark.parametrize("name", OPTIONS)
def test_it_is_what_it_was_from_a_file_and_padded(
    make_backbone: Callable[..., Backbone], tmp_path: Path, name: str
) -> None:
    backbone = make_backbone("t5")
    model = PromptedModel(backbone, prompt_of(name)).eval()
    Adapter.of(model, task="vqav2", metrics={}).save(tmp_path)
    loaded = Adapter.load(tmp_path)
    assert loaded.prompt["visual_offset"] == OPTIONS[name].get("visual_offset", False)
    built = loaded.build(make_backbone("t5")).eval()
    features, labels = random_features(backbone), random_labels()
    right, left = (random_text(backbone, side=side) for side in ("right", "left"))
    with torch.no_grad():
        logits = model(**right, visual_features=features, labels=labels).logits
        assert torch.equal(logits, built(**right, visual_features=features, labels=labels).logits)
        folded = model.folded()(**right, visual_features=features, labels=labels).logits
        padded = model(**left, visual_features=features, labels=labels).logits
        alone = {key: tensor[1:2, :4] for key, tensor in right.items()}
        lone = model(**alone, visual_features=features[1:2], labels=labels[1:2]).logits
    torch.testing.assert_close(folded, logits)
    torch.testing.assert_close(padded, logits)
    torch.testing.assert_close(logits[1:2], lone)


def test_a_description_without_the_option_shifts_no_image(
    make_backbone: Callable[..., Backbone], tmp_path: Path
) -> None:
    prompt = build(sized("adept", prompt_length=2, **SIZES))
    adapter = Adapter.of(PromptedModel(make_backbone("t5"), prompt), task="vqav2", metrics={})
    older = {key: value for key, value in adapter.prompt.items() if key != "visual_offset"}
    replace(adapter, prompt=older).save(tmp_path)
    assert Adapter.load(tmp_path).prompt == adapter.prompt


@pytest.mark.parametrize(("length", "rank"), [(0, 24), (40, 14)])
def test_the_budget_is_spent_on_both_offsets(length: int, rank: int) -> None:
    sizes = {"d_model": 256, "max_source_length": 20}
    solved = METHODS["adept"].solve(
        reference_prompt_length=100, prompt_length=length, visual_offset=True, **sizes
    )
    assert solved == (length, rank)
    method = sized("adept", prompt_length=length, rank=rank, visual_offset=True, **sizes)
    assert method.parameter_count() == length * 256 + 2 * (rank * (2 * 256 + 1) + 256) <= 25_600


def test_what_cannot_carry_it_is_refused(make_backbone: Callable[..., Backbone]) -> None:
    with pytest.raises(ValueError, match=r"GPT2LMHeadModel has no encoder; take adept"):
        PromptedModel(make_backbone("gpt2", None), prompt_of("memory"))
    with pytest.raises(ValueError, match="reads no images"):
        PromptedModel(make_backbone("t5", None), prompt_of("adept"))
