"""Prompt and backbone together: loss, generation, padding, and who is trained."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import D_MODEL, VOCABULARY, random_features, random_labels, random_text
from torch import Tensor, nn
from transformers import AutoModelForSeq2SeqLM

from dept_vl.models.backbone import Backbone
from dept_vl.models.prompted import IGNORE_INDEX, PromptedModel, sequence_loss
from dept_vl.prompts.dept import DePT

LENGTHS = (7, 4, 5)
LONGEST = 12


def new_prompt(prompt_length: int = 3, rank: int = 2) -> DePT:
    return DePT(D_MODEL, prompt_length=prompt_length, rank=rank, max_source_length=LONGEST)


def trained_prompt(prompt_length: int = 3, rank: int = 2) -> DePT:
    """A prompt as after training: no part of it is zero."""
    prompt = new_prompt(prompt_length, rank)
    for parameter in prompt.parameters():
        nn.init.normal_(parameter)
    return prompt


@pytest.fixture
def model(backbone: Backbone) -> PromptedModel:
    """A trained prompt on T5, then on BART, in evaluation mode."""
    return PromptedModel(backbone, trained_prompt()).eval()


def inputs(
    model: PromptedModel, lengths: tuple[int, ...] = LENGTHS, *, side: str = "right", images: int = 1
) -> dict[str, Tensor]:
    """Text and visual features; without images, text alone."""
    given = random_text(model.backbone, lengths, side=side)
    if images:
        given["visual_features"] = random_features(model.backbone, len(lengths), images)
    return given


def rows(given: dict[str, Tensor], chosen: slice) -> dict[str, Tensor]:
    return {name: value[chosen] for name, value in given.items()}


def generate(model: PromptedModel, given: dict[str, Tensor], **options: Any) -> Tensor:
    return model.generate(**given, **({"max_new_tokens": 6, "do_sample": False} | options))


# -- loss


def test_loss_is_the_stock_loss_on_targets_of_one_length(
    backbone: Backbone, language_folders: dict[str, Path]
) -> None:
    name = "t5" if "T5" in type(backbone.language).__name__ else "bart"
    stock = AutoModelForSeq2SeqLM.from_pretrained(language_folders[name]).eval()
    text, labels = random_text(backbone, LENGTHS), random_labels((4, 4, 4))
    expected = stock(**text, labels=labels)
    ours = PromptedModel(backbone).eval()(**text, labels=labels)
    torch.testing.assert_close(ours.loss, expected.loss)
    torch.testing.assert_close(ours.logits, expected.logits)


def test_logits_are_the_stock_logits_under_a_padded_target(
    backbone: Backbone, language_folders: dict[str, Path]
) -> None:
    name = "t5" if "T5" in type(backbone.language).__name__ else "bart"
    stock = AutoModelForSeq2SeqLM.from_pretrained(language_folders[name]).eval()
    text, labels = random_text(backbone, LENGTHS), random_labels((4, 2, 3))
    expected = stock(**text, labels=labels).logits
    torch.testing.assert_close(PromptedModel(backbone).eval()(**text, labels=labels).logits, expected)


def literal_loss(logits: Tensor, labels: Tensor, weights: list[float]) -> float:
    """Mean over examples of weight x mean over its tokens of -log softmax, a number at a time."""
    total = 0.0
    for scores, targets, weight in zip(logits.tolist(), labels.tolist(), weights, strict=True):
        losses = [
            math.log(sum(math.exp(score) for score in row)) - row[target]
            for row, target in zip(scores, targets, strict=True)
            if target != IGNORE_INDEX
        ]
        total += weight * sum(losses) / len(losses) if losses else 0.0
    return total / len(weights)


@pytest.mark.parametrize("lengths", [(4, 4, 4), (4, 1, 3), (4, 0, 2)])
@pytest.mark.parametrize("weights", [None, [1.0, 0.3, 0.0], [0.6, 0.9, 1.0]])
def test_sequence_loss(lengths: tuple[int, ...], weights: list[float] | None) -> None:
    logits = torch.randn(3, 4, 11)
    labels = random_labels(lengths)
    labels = labels.where(labels == IGNORE_INDEX, labels % 11)
    ours = sequence_loss(logits, labels, None if weights is None else torch.tensor(weights))
    assert ours.item() == pytest.approx(literal_loss(logits, labels, weights or [1.0] * 3), rel=1e-5)


def test_sequence_loss_is_in_float32() -> None:
    logits = torch.randn(2, 3, 11).bfloat16()
    loss = sequence_loss(logits, torch.tensor([[1, 2, 3], [4, 5, IGNORE_INDEX]]))
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(
        literal_loss(logits.float(), torch.tensor([[1, 2, 3], [4, 5, IGNORE_INDEX]]), [1.0, 1.0]), rel=1e-5
    )


def test_forward_weighs_examples(model: PromptedModel) -> None:
    given, labels = inputs(model), random_labels()
    weights = torch.tensor([1.0, 0.3, 0.0])
    output = model(**given, labels=labels, weights=weights)
    assert output.loss.item() == pytest.approx(
        literal_loss(output.logits, labels, weights.tolist()), rel=1e-5
    )
    assert output.loss.item() != pytest.approx(model(**given, labels=labels).loss.item(), rel=1e-3)


# -- one encoder input


@pytest.mark.parametrize("images", [0, 1, 2])
def test_forward_and_generate_share_the_encoder_input(model: PromptedModel, images: int) -> None:
    seen: list[dict[str, Tensor]] = []

    def spy(module: nn.Module, arguments: object, named: dict[str, Any]) -> None:
        seen.append({name: value for name, value in named.items() if isinstance(value, Tensor)})

    model.backbone.language.get_encoder().register_forward_pre_hook(spy, with_kwargs=True)
    given = inputs(model, images=images)
    model(**given, labels=random_labels())
    generate(model, given)
    generate(model, given, num_beams=2)
    first, *others = seen
    assert len(others) == 2  # the encoder runs once a call, not once a token
    assert set(first) == {"inputs_embeds", "attention_mask"}
    assert first["inputs_embeds"].shape[1] == 3 + 7 + 16 * images
    for other in others:
        assert all(torch.equal(other[name], first[name]) for name in first)


def test_encoder_reads_prompt_then_shifted_text_then_image(model: PromptedModel) -> None:
    seen: list[Tensor] = []
    model.backbone.language.get_encoder().register_forward_pre_hook(
        lambda module, arguments, named: seen.append(named["inputs_embeds"]), with_kwargs=True
    )
    given = inputs(model, (5,))
    output, mask = model.encode(**given)
    words = model.backbone.embed(given["input_ids"])
    offset = model.prompt.offset_a[:5] @ model.prompt.offset_b * (8 / math.sqrt(2))
    prompted = torch.cat([model.prompt.soft_prompt[None], words + offset], dim=1)
    visual = model.backbone.project(visual_features=given["visual_features"])
    torch.testing.assert_close(seen[0], torch.cat([prompted, visual], dim=1))
    assert mask.shape == (1, 3 + 5 + 16)
    assert mask.all()
    # BART has to be told where the prompt ends and the positions begin.
    expected, _ = model.backbone.encode(prompted, mask[:, : 3 + 5], visual, prompt_length=3)
    torch.testing.assert_close(output.last_hidden_state, expected.last_hidden_state)


def test_cross_attention_never_reads_padding(model: PromptedModel) -> None:
    _, mask = model.encode(**inputs(model))
    assert mask.sum(1).tolist() == [3 + length + 16 for length in LENGTHS]


# -- padding and batch mates


@pytest.mark.parametrize("images", [0, 1])
def test_padding_side_does_not_matter(model: PromptedModel, images: int) -> None:
    right = inputs(model, images=images)
    left = inputs(model, images=images, side="left")
    assert not torch.equal(left["input_ids"], right["input_ids"])
    labels = random_labels()
    ours, theirs = model(**left, labels=labels), model(**right, labels=labels)
    torch.testing.assert_close(ours.loss, theirs.loss)
    torch.testing.assert_close(ours.logits, theirs.logits)
    for beams in (1, 3):
        assert torch.equal(generate(model, left, num_beams=beams), generate(model, right, num_beams=beams))


@pytest.mark.parametrize("mode", ["none", "relative"])
@pytest.mark.parametrize("images", [0, 1])
@pytest.mark.parametrize("language", ["t5", "bart"])
def test_batch_mates_do_not_matter(
    make_backbone: Callable[..., Backbone], language: str, images: int, mode: str
) -> None:
    model = PromptedModel(make_backbone(language, visual_position_bias=mode), trained_prompt()).eval()
    given, labels = inputs(model, images=images), random_labels()
    together = model(**given, labels=labels).logits
    for row, (length, target) in enumerate(zip(LENGTHS, (4, 2, 3), strict=True)):
        one = slice(row, row + 1)
        alone = rows(given, one)
        alone |= {name: alone[name][:, :length] for name in ("input_ids", "attention_mask")}
        logits = model(**alone, labels=labels[one, :target]).logits
        torch.testing.assert_close(together[row, :target], logits[0], rtol=1e-4, atol=1e-5)


def test_ids_and_dtype_of_padding_do_not_matter(model: PromptedModel) -> None:
    given, labels = inputs(model), random_labels()
    expected = model(**given, labels=labels)
    mask = given["attention_mask"].bool()
    noise = torch.randint(5, VOCABULARY, mask.shape)
    changed = given | {"input_ids": given["input_ids"].where(mask, noise), "attention_mask": mask}
    torch.testing.assert_close(model(**changed, labels=labels).logits, expected.logits)


def test_text_past_the_prompts_length_is_refused(model: PromptedModel) -> None:
    with pytest.raises(ValueError, match=rf"{LONGEST + 1} tokens.*max_source_length={LONGEST}"):
        model.encode(**inputs(model, (LONGEST + 1,)))


# -- generation


def test_greedy_follows_the_logits(model: PromptedModel) -> None:
    given = inputs(model)
    tokens = generate(model, given)
    assert tokens.shape[0] == 3
    assert 2 < tokens.shape[1] <= 1 + 6
    assert (tokens[:, 0] == model.backbone.language.config.decoder_start_token_id).all()
    eos = model.backbone.tokenizer.eos_token_id
    labels = tokens[:, 1:]
    choices = model(**given, labels=labels).logits.argmax(-1)
    for choice, target in zip(choices.tolist(), labels.tolist(), strict=True):
        length = target.index(eos) + 1 if eos in target else len(target)
        assert choice[:length] == target[:length]


def sequence_score(model: PromptedModel, given: dict[str, Tensor], tokens: Tensor) -> Tensor:
    log_probabilities = model(**given, labels=tokens).logits.log_softmax(-1)
    return log_probabilities.gather(2, tokens[..., None]).squeeze(2).sum(1)


def test_beams_find_no_worse_than_greedy(model: PromptedModel) -> None:
    given = inputs(model)
    fixed = {"max_new_tokens": 3, "min_new_tokens": 3, "length_penalty": 0.0}
    greedy = generate(model, given, **(fixed | {"length_penalty": None}))[:, 1:]
    # As many beams as first tokens and one more step each: the search misses little.
    beams = generate(model, given, num_beams=40, **fixed)[:, 1:]
    better = sequence_score(model, given, beams) - sequence_score(model, given, greedy)
    assert beams.shape == greedy.shape
    assert (better > -1e-4).all()


def test_beams_are_those_of_the_stock_model_without_prompt(
    backbone: Backbone, language_folders: dict[str, Path]
) -> None:
    name = "t5" if "T5" in type(backbone.language).__name__ else "bart"
    stock = AutoModelForSeq2SeqLM.from_pretrained(language_folders[name]).eval()
    text = random_text(backbone, LENGTHS)
    model = PromptedModel(backbone).eval()
    for options in ({"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 2}, {"num_beams": 1}):
        expected = stock.generate(**text, max_new_tokens=6, do_sample=False, **options)
        assert torch.equal(generate(model, text, **options), expected)


@pytest.mark.parametrize("images", [0, 1])
def test_beams_with_prompt_and_image(model: PromptedModel, images: int) -> None:
    given = inputs(model, images=images)
    together = generate(model, given, num_beams=3, num_return_sequences=3)
    assert together.shape[0] == 9
    assert len({tuple(row.tolist()) for row in together[:3]}) == 3
    # Each beam must go on reading its own source: alone, a row gives the same.
    for row in range(3):
        alone = generate(model, rows(given, slice(row, row + 1)), num_beams=3, num_return_sequences=3)
        width = min(alone.shape[1], together.shape[1])
        assert torch.equal(alone[:, :width], together[3 * row : 3 * row + 3, :width])


def test_sampling_draws_from_the_seed(model: PromptedModel) -> None:
    given = inputs(model)

    def draw(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return generate(model, given, do_sample=True, num_return_sequences=4, min_new_tokens=6)

    assert draw(1).shape == (12, 7)
    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))


def test_generation_leaves_no_gradient_and_no_mode_behind(model: PromptedModel) -> None:
    model.train()
    tokens = generate(model, inputs(model))
    assert not tokens.requires_grad
    assert model.training


# -- the prompt does something


@pytest.mark.parametrize("images", [0, 1])
@pytest.mark.parametrize(("prompt_length", "rank"), [(3, 0), (0, 2), (3, 2)])
def test_trained_prompt_changes_the_answers(
    backbone: Backbone, prompt_length: int, rank: int, images: int
) -> None:
    bare = PromptedModel(backbone).eval()
    prompted = PromptedModel(backbone, trained_prompt(prompt_length, rank)).eval()
    given, labels = inputs(bare, LENGTHS, images=images), random_labels()
    difference = prompted(**given, labels=labels).logits - bare(**given, labels=labels).logits
    assert (difference.abs().amax((1, 2)) > 1e-2).all()
    assert not torch.equal(
        generate(prompted, given, min_new_tokens=6), generate(bare, given, min_new_tokens=6)
    )


def test_untrained_offset_changes_nothing(backbone: Backbone) -> None:
    dept, plain = new_prompt(3, 2), new_prompt(3, 0)
    plain.load_state_dict({"soft_prompt": dept.soft_prompt.detach()})
    given, labels = inputs(PromptedModel(backbone)), random_labels()
    ours, theirs = (
        PromptedModel(backbone, prompt).eval()(**given, labels=labels) for prompt in (dept, plain)
    )
    assert torch.equal(ours.logits, theirs.logits)


# -- who is trained


def test_only_the_adapter_is_trained(model: PromptedModel) -> None:
    adapter = {f"prompt.{name}" for name in ("soft_prompt", "offset_a", "offset_b")}
    adapter |= {
        f"backbone.visual_projection.{name}"
        for name, _ in model.backbone.visual_projection.named_parameters()
        if name != "object_order.weight"
    }
    model.train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    groups = model.parameter_groups()
    optimizer = torch.optim.AdamW([p for group in groups.values() for p in group], lr=0.1, weight_decay=0.1)
    model(**inputs(model, images=2), labels=random_labels()).loss.backward()
    with_gradient = {name for name, p in model.named_parameters() if p.grad is not None}
    assert with_gradient == adapter
    optimizer.step()
    after = model.state_dict()
    changed = {name for name, tensor in before.items() if not torch.equal(after[name], tensor)}
    assert changed == adapter
    # Both images of an example, and both parts of the prompt, had their say.
    assert all(p.grad.abs().sum() > 0 for name, p in model.named_parameters() if name in adapter)


def test_text_alone_trains_no_projection(model: PromptedModel) -> None:
    model(**inputs(model, images=0), labels=random_labels()).loss.backward()
    assert all(p.grad is None for p in model.backbone.parameters())
    assert all(p.grad is not None for p in model.prompt.parameters())


@pytest.mark.parametrize(
    ("frozen", "names"),
    [
        ({}, ["prompt", "low_rank", "visual_projection"]),
        ({"visual_projection": True}, ["prompt", "low_rank"]),
        ({"language": False}, ["prompt", "low_rank", "visual_projection", "backbone"]),
    ],
)
def test_parameter_groups_hold_every_trained_parameter_once(
    model: PromptedModel, frozen: dict[str, bool], names: list[str]
) -> None:
    model.backbone.freeze(**frozen)
    groups = model.parameter_groups()
    assert list(groups) == names
    grouped = [id(p) for group in groups.values() for p in group]
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == {id(p) for p in model.parameters() if p.requires_grad}


def test_empty_parts_make_no_group(backbone: Backbone) -> None:
    assert list(PromptedModel(backbone, new_prompt(0, 2)).parameter_groups()) == [
        "low_rank",
        "visual_projection",
    ]
    assert list(PromptedModel(backbone, new_prompt(3, 0)).parameter_groups()) == [
        "prompt",
        "visual_projection",
    ]
    assert list(PromptedModel(backbone).parameter_groups()) == ["visual_projection"]


# -- images


def test_pixels_and_their_features_are_alike(model: PromptedModel) -> None:
    pixels = torch.randn(3, 2, 3, 32, 32)
    features = model.backbone.vision(pixels.flatten(0, 1)).unflatten(0, (3, 2))
    text, labels = inputs(model, images=0), random_labels()
    torch.testing.assert_close(
        model(**text, pixel_values=pixels, labels=labels).logits,
        model(**text, visual_features=features, labels=labels).logits,
    )
    assert torch.equal(
        generate(model, text | {"pixel_values": pixels}),
        generate(model, text | {"visual_features": features}),
    )


def test_image_matters(model: PromptedModel) -> None:
    text, labels = inputs(model, images=0), random_labels()
    first, second = (
        model(**text, visual_features=random_features(model.backbone, seed=seed), labels=labels).logits
        for seed in (1, 2)
    )
    assert not torch.allclose(first, second, atol=1e-3)


@pytest.mark.parametrize("language", ["t5", "bart"])
def test_images_are_refused_without_a_tower(make_backbone: Callable[..., Backbone], language: str) -> None:
    model = PromptedModel(make_backbone(language, None), new_prompt()).eval()
    text, labels = random_text(model.backbone, LENGTHS), random_labels()
    model(**text, labels=labels)
    for images in (
        {"pixel_values": torch.randn(3, 1, 3, 32, 32)},
        {"visual_features": torch.randn(3, 1, 16, 24)},
    ):
        with pytest.raises(ValueError, match="no vision tower"):
            model(**text, **images, labels=labels)
        with pytest.raises(ValueError, match="no vision tower"):
            generate(model, text | images)


# -- dropout and construction


def test_dropout_of_the_backbone_is_a_choice(backbone: Backbone) -> None:
    def losses(backbone_dropout: bool) -> list[float]:
        model = PromptedModel(backbone, trained_prompt(), backbone_dropout=backbone_dropout).train()
        given, labels = inputs(model), random_labels()
        return [model(**given, labels=labels).loss.item() for _ in range(2)]

    first, second = losses(True)
    assert first != second
    first, second = losses(False)
    assert first == second


def test_modes_of_training(backbone: Backbone) -> None:
    model = PromptedModel(backbone, new_prompt(), backbone_dropout=False)
    assert model.train() is model
    assert model.training
    assert not any(m.training for m in model.backbone.modules())
    model = PromptedModel(backbone, new_prompt())
    model.train()
    assert model.backbone.language.training
    assert not any(m.training for m in model.backbone.vision.modules())
    model.eval()
    assert not any(m.training for m in model.modules())


def test_prompt_of_another_width_is_refused(backbone: Backbone) -> None:
    wide = DePT(D_MODEL + 1, prompt_length=3, rank=2, max_source_length=LONGEST)
    with pytest.raises(ValueError, match=rf"{D_MODEL + 1} wide.*{D_MODEL} wide"):
        PromptedModel(backbone, wide)
