"""A step made fast or small computes what it did before; gradients go no further than they must."""

import copy
import shutil
from collections.abc import Callable

import pytest
import torch
from conftest import D_MODEL, random_features, random_labels, random_text
from torch import Tensor, nn
from zoo.subjects import backbone_of

import dept_vl.models.precision
from dept_vl.models.backbone import Backbone
from dept_vl.models.precision import compile_layers, hold_frozen_in_bfloat16, prepare_step
from dept_vl.models.prompted import PromptedModel
from dept_vl.prompts.dept import DePT

CPU = torch.device("cpu")


def trained_model(backbone: Backbone, **options: bool) -> PromptedModel:
    """Training mode without dropout, no part of the prompt zero."""
    prompt = DePT(D_MODEL, prompt_length=3, rank=2, max_source_length=20)
    for parameter in prompt.parameters():
        nn.init.normal_(parameter)
    return PromptedModel(backbone, prompt, **({"backbone_dropout": False} | options)).train()


def loss(model: PromptedModel, text: tuple[int, ...] = (7, 4, 5), images: bool = True) -> Tensor:
    """Of the same random inputs for every model."""
    images = images and model.backbone.vision is not None
    features = random_features(model.backbone, len(text)) if images else None
    labels = random_labels(tuple(1 + length % 4 for length in text))
    return model(**random_text(model.backbone, text), visual_features=features, labels=labels).loss


def gradients(model: PromptedModel) -> dict[str, Tensor]:
    model.zero_grad()
    loss(model).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


# -- where gradients go


@pytest.mark.parametrize("live", [False, True])
def test_no_gradient_into_tower_features_or_word_table(backbone: Backbone, live: bool) -> None:
    model = trained_model(backbone)
    features = random_features(backbone)
    shown: dict[str, Tensor] = {"visual_features": features}
    if live:
        shown = {"pixel_values": torch.randn(3, 1, *backbone.vision.pixel_shape)}
    computed: dict[str, Tensor] = {}
    backbone.vision.register_forward_hook(lambda *call: computed.update(tower=call[2]))
    backbone.language_model.word_embeddings.register_forward_hook(
        lambda *call: computed.update(words=call[2])
    )
    model(**random_text(backbone), **shown, labels=random_labels()).loss.backward()
    assert computed.keys() == {"words", "tower"} if live else {"words"}
    # Nothing of these was even recorded for a backward pass.
    assert not any(tensor.requires_grad for tensor in [*computed.values(), features])
    frozen = [*backbone.vision.parameters(), *backbone.language.parameters()]
    assert all(parameter.grad is None for parameter in frozen)
    assert model.prompt.soft_prompt.grad.abs().sum() > 0


def test_one_pass_trains_without_a_cache(backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    model = trained_model(backbone)
    decoder = backbone.language.get_decoder()
    given: list[object] = []
    decoder.register_forward_hook(lambda *call: given.append(call[-1].past_key_values))
    loss(model)
    assert given == [None]


# -- bfloat16


def test_holding_weights_in_bfloat16_changes_no_bit(backbone: Backbone) -> None:
    model = trained_model(backbone)
    held = copy.deepcopy(model)
    hold_frozen_in_bfloat16(held.backbone.language)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(loss(held), loss(model))
        ours, theirs = gradients(held), gradients(model)
        text = random_text(backbone)
        assert torch.equal(
            held.generate(**text, max_new_tokens=5, do_sample=False),
            model.generate(**text, max_new_tokens=5, do_sample=False),
        )
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_only_frozen_linear_layers_are_held(backbone: Backbone) -> None:
    model = trained_model(backbone)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    fingerprint = dict(backbone.fingerprint)
    hold_frozen_in_bfloat16(model.backbone.language)
    kinds = {name: p.dtype for name, p in model.named_parameters()}
    held = {name for name, dtype in kinds.items() if dtype == torch.bfloat16}
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trained
    assert not held & trained
    assert any(name.endswith("lm_head.weight") for name in held)
    assert not any("norm" in name or "embed" in name or "shared" in name for name in held)
    assert backbone.language_model.word_embeddings.weight.dtype == torch.float32
    assert backbone.fingerprint == fingerprint


def test_trained_language_model_is_left_alone(backbone: Backbone) -> None:
    backbone.freeze(language=False)
    hold_frozen_in_bfloat16(backbone.language)
    assert all(p.dtype == torch.float32 for p in backbone.language.parameters())


@pytest.mark.parametrize(
    ("device", "bfloat16", "expected"),
    [("cpu", True, "eager"), ("cpu", False, "sdpa"), ("cuda", True, "sdpa"), ("cuda", False, "sdpa")],
)
def test_attention_is_the_fastest(backbone: Backbone, device: str, bfloat16: bool, expected: str) -> None:
    model = trained_model(backbone)
    assert backbone.language.config._attn_implementation == "sdpa"
    prepare_step(model.backbone.language, torch.device(device), bfloat16=bfloat16)
    for part in (backbone.language, backbone.language.get_encoder(), backbone.language.get_decoder()):
        assert part.config._attn_implementation == expected


def test_both_attentions_agree(backbone: Backbone) -> None:
    model = trained_model(backbone)
    fused = gradients(model)
    backbone.language.set_attn_implementation("eager")
    plain = gradients(model)
    assert fused.keys() == plain.keys()
    for name, gradient in fused.items():
        torch.testing.assert_close(plain[name], gradient, rtol=1e-4, atol=1e-5)


def test_t5_takes_sdpa_with_its_position_bias(t5: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    masks: list[Tensor | None] = []
    attend = nn.functional.scaled_dot_product_attention

    def noting(*tensors: Tensor, attn_mask: Tensor | None = None, **options: object) -> Tensor:
        masks.append(attn_mask)
        return attend(*tensors, attn_mask=attn_mask, **options)

    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", noting)
    loss(trained_model(t5))
    layers = t5.language.config.num_layers + 2 * t5.language.config.num_decoder_layers
    assert len(masks) == layers
    assert masks[0] is not None
    assert masks[0].is_floating_point()
    assert len(masks[0].unique()) > 2  # a bias, not only open and shut


# -- gradient checkpointing


@pytest.mark.parametrize("backbone_dropout", [False, True])
def test_checkpointing_gives_the_same_gradients(backbone: Backbone, backbone_dropout: bool) -> None:
    model = trained_model(backbone, backbone_dropout=backbone_dropout)
    checkpointed = copy.deepcopy(model)
    prepare_step(checkpointed.backbone.language, CPU, bfloat16=False, gradient_checkpointing=True)
    found = []
    for one in (checkpointed, model):
        torch.manual_seed(3)
        found.append(gradients(one))
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][name], rtol=1e-4, atol=1e-6)


def test_checkpointing_keeps_less_and_generates_as_before(backbone: Backbone) -> None:
    model = trained_model(backbone).eval()
    given = random_text(backbone) | {"max_new_tokens": 5, "do_sample": False}
    before, kept = model.generate(**given), saved_numbers(model)
    prepare_step(model.backbone.language, CPU, bfloat16=False, gradient_checkpointing=True)
    assert saved_numbers(model) < kept / 2
    assert torch.equal(model.generate(**given), before)


def saved_numbers(model: PromptedModel) -> int:
    """Numbers kept for the backward pass, however often each."""
    kept: list[int] = []

    def note(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss(model)
    return sum(kept)


# -- torch.compile


BATCHES = [(7, 4, 5), (9, 9), (11, 3, 4, 8), (2, 12), (6, 6, 6)]


@pytest.mark.parametrize(
    ("name", "tower", "checkpointing"),
    [
        pytest.param("t5", "clip", False, marks=pytest.mark.slow),
        pytest.param("t5", "clip", True, marks=pytest.mark.slow),
        ("bart", "clip", False),
        pytest.param("gpt2", None, False, marks=pytest.mark.slow),
        pytest.param("llama", None, True, marks=pytest.mark.slow),
        ("llama", "clip", False),
    ],
)
def test_compiled_for_all_lengths_at_once(
    name: str,
    tower: str | None,
    make_backbone: Callable[..., Backbone],
    graphs: Callable[[], int],
    checkpointing: bool,
) -> None:
    model = trained_model(make_backbone(name, tower))
    expected = [loss(model, text).item() for text in BATCHES]
    expected_gradients = gradients(model)
    prepare_step(
        model.backbone.language, CPU, bfloat16=False, gradient_checkpointing=checkpointing, compiled=True
    )
    found = []
    for text in BATCHES[:2]:
        found.append(loss(model, text))
        found[-1].backward()
    after_two = graphs()
    # T5's first layers hold the position bias; without padding transformers gives no mask.
    assert 1 <= after_two <= 8
    found += [loss(model, text) for text in BATCHES[2:]]
    # No length and no batch size brings a graph of its own.
    assert graphs() == after_two
    assert not torch._dynamo.utils.counters["graph_break"]
    for one, other in zip(found, expected, strict=True):
        assert one.item() == pytest.approx(other, rel=1e-5)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected_gradients[name], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.skipif(shutil.which("g++") is None, reason="compiled code needs a C++ compiler")
def test_compiled_to_machine_code(
    t5: Backbone, graphs: Callable[[], int], monkeypatch: pytest.MonkeyPatch, checkpointing: bool
) -> None:
    monkeypatch.setattr(dept_vl.models.precision, "BACKEND", "inductor")
    model = trained_model(t5)
    expected = [loss(model, text).item() for text in BATCHES]
    expected_gradients = gradients(model)
    prepare_step(t5.language, CPU, bfloat16=False, gradient_checkpointing=checkpointing, compiled=True)
    assert [loss(model, text).item() for text in BATCHES] == pytest.approx(expected, rel=1e-5)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected_gradients[name], rtol=1e-4, atol=1e-5)
    assert graphs() == 8


def test_deep_model_compiles_as_few_graphs_as_a_shallow_one(
    make_backbone: Callable[..., Backbone], graphs: Callable[[], int]
) -> None:
    counts = []
    for more in (0, 3):
        model = trained_model(make_backbone("t5"))
        for stack in (model.backbone.language.get_encoder(), model.backbone.language.get_decoder()):
            stack.block.extend(copy.deepcopy(stack.block[-1]) for _ in range(more))
        compile_layers(model.backbone.language)
        before = graphs()
        loss(model, BATCHES[0])
        counts.append(graphs() - before)
    assert counts == [4, 4]


def test_answers_are_not_compiled(t5: Backbone, graphs: Callable[[], int]) -> None:
    model = trained_model(t5).eval()
    text = random_text(t5)
    expected = model.generate(**text, max_new_tokens=4)
    compile_layers(t5.language)
    assert torch.equal(model.generate(**text, max_new_tokens=4), expected)
    assert graphs() == 0


def test_compiled_layers_are_copied_with_their_model(t5: Backbone, graphs: Callable[[], int]) -> None:
    model = trained_model(t5)
    other = copy.deepcopy(model)
    for parameter in other.backbone.language.parameters():
        parameter.data.mul_(1.1)
    expected = loss(model).item(), loss(other, images=False).item()
    compile_layers(t5.language)
    changed = copy.deepcopy(model)
    for parameter in changed.backbone.language.parameters():
        parameter.data.mul_(1.1)
    assert loss(model).item() == pytest.approx(expected[0], rel=1e-5)
    assert loss(changed, images=False).item() == pytest.approx(expected[1], rel=1e-5)
    made = graphs()
    assert made >= 4
    compile_layers(t5.language)  # again: nothing to do
    assert loss(model).item() == pytest.approx(expected[0], rel=1e-5)
    assert graphs() == made


def test_models_of_one_class_do_not_run_each_others_graphs(
    make_backbone: Callable[..., Backbone], graphs: Callable[[], int]
) -> None:
    models = [trained_model(make_backbone("t5", visual_position_bias=bias)) for bias in ("relative", "none")]
    expected = [loss(model).item() for model in models]
    assert expected[0] != pytest.approx(expected[1], rel=1e-3)
    for model in models:
        compile_layers(model.backbone.language)
    for model, one in [*zip(models, expected, strict=True)] * 2:
        assert loss(model).item() == pytest.approx(one, rel=1e-5)
    assert graphs() > 4


def test_nothing_to_compile_is_an_error(t5: Backbone) -> None:
    prepare_step(t5.language, CPU, bfloat16=False, gradient_checkpointing=True)
    with pytest.raises(ValueError, match=r"other code has replaced their forward.*leave --compile out"):
        compile_layers(t5.language)
    with pytest.raises(ValueError, match="layers of Linear, and transformers marks none"):
        compile_layers(nn.Linear(2, 2))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mt5", "longt5-local"])
def test_other_models_are_compiled(name: str, graphs: Callable[[], int]) -> None:
    model = trained_model(backbone_of(name, "clip", "relative"))
    expected = [loss(model, text).item() for text in BATCHES]
    compile_layers(model.backbone.language)
    assert [loss(model, text).item() for text in BATCHES] == pytest.approx(expected, rel=1e-5)
    assert 4 <= graphs() <= dept_vl.models.precision.RECOMPILES


def test_lora_is_compiled(t5: Backbone, graphs: Callable[[], int]) -> None:
    t5.add_lora(2)
    for name, parameter in t5.language.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    model = trained_model(t5)
    expected = gradients(model)
    assert any("lora_A" in name for name in expected)
    compile_layers(t5.language)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-5)
    assert graphs() == 4


@pytest.mark.parametrize("name", ["t5", pytest.param("bart", marks=pytest.mark.slow)])
def test_whole_model_compiles_as_one_graph(
    name: str, make_backbone: Callable[..., Backbone], graphs: Callable[[], int]
) -> None:
    model = trained_model(make_backbone(name))
    expected = [loss(model, text).item() for text in BATCHES[:3]]
    model.forward = torch.compile(model.forward, backend="eager", dynamic=True, fullgraph=True)
    assert [loss(model, text).item() for text in BATCHES[:3]] == pytest.approx(expected, rel=1e-5)
    assert 1 <= graphs() <= 2


def test_too_many_graphs_are_an_error(
    t5: Backbone, graphs: Callable[[], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dept_vl.models.precision, "RECOMPILES", 1)
    model = trained_model(t5)
    compile_layers(t5.language)
    with pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit, match="recompile_limit"):
        loss(model)


def test_spread_backbone_is_not_compiled(t5: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dept_vl.models.precision, "is_spread", lambda model: True)
    with pytest.raises(ValueError, match="--compile"):
        prepare_step(t5.language, CPU, bfloat16=False, compiled=True)
    before = {name: p.dtype for name, p in t5.language.named_parameters()}
    hold_frozen_in_bfloat16(t5.language)
    assert {name: p.dtype for name, p in t5.language.named_parameters()} == before
