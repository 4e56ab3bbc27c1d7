"""Decoder-only language models against the formula written out on stock ones, an example at a time.

`Literal` is `[P ; E(text) + scale * A[:n] @ B ; E(answer)]` in a stock transformers model: no batch, no
padding, no cache, all logits. It shares no code with the package. Comparisons are in float64.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from causal_parts import (
    ALPHA,
    ANSWERS,
    LAYOUTS,
    LENGTHS,
    Literal,
    M,
    R,
    answers_of,
    cut,
    laid_out,
    stock,
    texts_of,
    trained_prompt,
)
from conftest import VOCABULARY, random_labels, random_text
from torch import Tensor, nn

from dept_vl.models.backbone import Backbone
from dept_vl.models.prompted import IGNORE_INDEX, PromptedModel


@pytest.fixture
def backbone(kind: str, make_backbone: Callable[..., Backbone]) -> Backbone:
    return make_backbone(kind, None)


@pytest.fixture
def pair(kind: str, backbone: Backbone, decoder_folders: dict[str, Path]) -> tuple[PromptedModel, Literal]:
    """Our model and the literal one, with the same trained parts on the same weights, in float64."""
    prompt = trained_prompt()
    ours = PromptedModel(backbone, prompt).eval().double()
    p, a, b = (part.detach().clone().requires_grad_() for part in prompt.parameters())
    return ours, Literal(stock(decoder_folders[kind]), (p, a, b))


@pytest.fixture
def model(pair: tuple[PromptedModel, Literal]) -> PromptedModel:
    return pair[0]


# -- the formula


@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_forward_is_the_formula(pair: tuple[PromptedModel, Literal], layout: str) -> None:
    ours, literal = pair
    text, labels = laid_out(ours.backbone, layout), random_labels(ANSWERS)
    output = ours(**text, labels=labels)
    assert output.logits.shape == (3, max(ANSWERS), VOCABULARY)
    losses = []
    for row, (tokens, answer) in enumerate(zip(texts_of(text), answers_of(labels), strict=True)):
        expected = literal.logits(tokens, answer)
        torch.testing.assert_close(output.logits[row, : len(answer)], expected, atol=1e-9, rtol=0)
        losses.append(literal.loss(tokens, answer))
    # Ours is computed in float32.
    torch.testing.assert_close(output.loss.double(), torch.stack(losses).mean(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradient_is_the_formulas(pair: tuple[PromptedModel, Literal], layout: str) -> None:
    ours, literal = pair
    text, labels = laid_out(ours.backbone, layout), random_labels(ANSWERS)
    weights = torch.tensor([1.0, 0.3, 0.6])
    ours(**text, labels=labels, weights=weights).loss.backward()
    examples = zip(texts_of(text), answers_of(labels), weights, strict=True)
    (sum(weight * literal.loss(tokens, answer) for tokens, answer, weight in examples) / 3).backward()
    assert ours.prompt is not None
    assert literal.parts is not None
    for trained, part in zip(ours.prompt.parameters(), literal.parts, strict=True):
        assert part.grad is not None
        assert part.grad.abs().max() > 1e-3
        torch.testing.assert_close(trained.grad, part.grad, atol=1e-6, rtol=0)


@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_greedy_search_is_the_formula_read_anew_for_each_token(
    pair: tuple[PromptedModel, Literal], layout: str
) -> None:
    ours, literal = pair
    text = laid_out(ours.backbone, layout)
    tokens = ours.generate(**text, max_new_tokens=8, do_sample=False)
    assert ours.generate(**text, max_new_tokens=None, max_length=30, do_sample=False).shape[0] == len(tokens)
    eos = ours.backbone.tokenizer.eos_token_id
    found = [cut(row, eos) for row in tokens.tolist()]
    assert found == [literal.greedy(tokens, 8) for tokens in texts_of(text)]
    assert len({tuple(answer) for answer in found}) == 3  # the texts are told apart


@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_beams_are_the_formulas(pair: tuple[PromptedModel, Literal], layout: str) -> None:
    ours, literal = pair
    text = laid_out(ours.backbone, layout)
    options = {"num_beams": 3, "num_return_sequences": 3, "length_penalty": 0.5, "max_new_tokens": 6}
    tokens = ours.generate(**text, **options)
    eos = ours.backbone.tokenizer.eos_token_id
    expected = [row for tokens in texts_of(text) for row in literal.generate(tokens, **options)]
    assert [cut(row, eos) for row in tokens.tolist()] == expected
    assert len({tuple(row) for row in expected}) == 9


@pytest.mark.parametrize("part", [0, 1, 2], ids=["P", "A", "B"])
@torch.no_grad()
def test_every_part_counts(pair: tuple[PromptedModel, Literal], part: int) -> None:
    ours, literal = pair
    assert literal.parts is not None
    text, labels = random_text(ours.backbone), random_labels(ANSWERS)
    literal.parts[part].copy_(literal.parts[part].roll(1, dims=1))
    logits = ours(**text, labels=labels).logits
    for row, (tokens, answer) in enumerate(zip(texts_of(text), answers_of(labels), strict=True)):
        assert (logits[row, : len(answer)] - literal.logits(tokens, answer)).abs().max() > 1e-3


@torch.no_grad()
def test_text_alone_is_the_stock_models(
    kind: str, backbone: Backbone, decoder_folders: dict[str, Path]
) -> None:
    language, ours = stock(decoder_folders[kind]), PromptedModel(backbone).eval().double()
    text, labels = random_text(backbone), random_labels(ANSWERS)
    losses, eos = [], backbone.tokenizer.eos_token_id
    options = {"max_new_tokens": 8, "do_sample": False}
    generated = ours.generate(**text, **options).tolist()
    for row, (tokens, answer) in enumerate(zip(texts_of(text), answers_of(labels), strict=True)):
        ids = torch.cat([tokens, answer])[None]
        learnt = torch.cat([torch.full_like(tokens, IGNORE_INDEX), answer])[None]
        losses.append(language(input_ids=ids, labels=learnt).loss)
        read = language.generate(tokens[None], attention_mask=torch.ones_like(tokens)[None], **options)[0]
        assert cut(generated[row], eos) == cut(read[len(tokens) :].tolist(), eos)
    loss = ours(**text, labels=labels).loss
    torch.testing.assert_close(loss, torch.stack(losses).mean(), atol=1e-6, rtol=0)


@torch.no_grad()
def test_single_precision_and_autocast_are_near(pair: tuple[PromptedModel, Literal]) -> None:
    ours, _ = pair
    text, labels = random_text(ours.backbone), random_labels(ANSWERS)
    answered = labels != IGNORE_INDEX
    expected = ours(**text, labels=labels).logits[answered]
    ours.float()
    single = ours(**text, labels=labels).logits[answered]
    torch.testing.assert_close(single.double(), expected, atol=1e-3, rtol=1e-3)
    with torch.autocast("cpu", torch.bfloat16):
        half = ours(**text, labels=labels).logits[answered]
        assert ours.generate(**text, max_new_tokens=3, do_sample=False).shape[0] == 3
    assert half.dtype == torch.bfloat16
    assert (half.double() - expected).abs().mean() < 0.05 * expected.abs().mean()


def test_padding_gives_single_precision_no_nan(backbone: Backbone) -> None:
    # A column of padding in front sees nothing at all.
    model = PromptedModel(backbone, trained_prompt(0, R))
    model(**random_text(backbone, (12, 1, 5)), labels=random_labels(ANSWERS)).loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.prompt.parameters())


# -- padding and batch mates


@pytest.mark.parametrize("prompt", [True, False])
@torch.no_grad()
def test_batch_mates_do_not_matter(model: PromptedModel, prompt: bool) -> None:
    if not prompt:
        model.prompt = None
    text, labels = random_text(model.backbone), random_labels(ANSWERS)
    together = model(**text, labels=labels).logits
    generated = model.generate(**text, max_new_tokens=6, num_beams=2)
    for row, (length, answer) in enumerate(zip(LENGTHS, ANSWERS, strict=True)):
        alone = {name: tensor[row : row + 1, :length] for name, tensor in text.items()}
        logits = model(**alone, labels=labels[row : row + 1, :answer]).logits
        torch.testing.assert_close(together[row, :answer], logits[0], atol=1e-9, rtol=0)
        tokens = model.generate(**alone, max_new_tokens=6, num_beams=2)[0]
        assert torch.equal(generated[row, : len(tokens)], tokens)


@torch.no_grad()
def test_ids_of_padding_do_not_matter(model: PromptedModel) -> None:
    text, labels = random_text(model.backbone), random_labels(ANSWERS)
    mask = text["attention_mask"].bool()
    noise = torch.randint(5, VOCABULARY, mask.shape)
    changed = {"input_ids": text["input_ids"].where(mask, noise), "attention_mask": mask}
    expected = model(**text, labels=labels).logits
    torch.testing.assert_close(model(**changed, labels=labels).logits, expected)


# -- what the language model is given


@pytest.fixture
def seen(model: PromptedModel) -> list[dict[str, Any]]:
    """The arguments of each call of the language model."""
    calls: list[dict[str, Any]] = []
    model.backbone.language.register_forward_pre_hook(
        lambda module, arguments, named: calls.append(named), with_kwargs=True
    )
    return calls


@torch.no_grad()
def test_prompt_and_answer_get_no_offset(model: PromptedModel, seen: list[dict[str, Any]]) -> None:
    text, labels = random_text(model.backbone), random_labels(ANSWERS)
    model(**text, labels=labels)
    (call,) = seen
    words = model.backbone.language.get_input_embeddings()
    p, a, b = model.prompt.parameters()
    for row, (tokens, answer) in enumerate(zip(texts_of(text), answers_of(labels), strict=True)):
        used = call["attention_mask"][row]
        # Without holes: padding in front, then prompt, text and answer, then padding.
        first = max(LENGTHS) - len(tokens)
        count = M + len(tokens) + len(answer)
        assert used.tolist() == [False] * first + [True] * count + [False] * (len(used) - first - count)
        assert call["position_ids"][row][used].tolist() == list(range(count))
        prompt, source, target = call["inputs_embeds"][row][used].split([M, len(tokens), len(answer)])
        assert torch.equal(prompt, p)
        assert torch.equal(target, words(answer))
        offset = a[: len(tokens)] @ b * ALPHA / math.sqrt(R)
        torch.testing.assert_close(source - words(tokens), offset)


@torch.no_grad()
def test_vocabulary_is_scored_for_answers_alone(model: PromptedModel) -> None:
    widths: list[int] = []
    model.backbone.language.get_output_embeddings().register_forward_pre_hook(
        lambda module, inputs: widths.append(inputs[0].shape[1])
    )
    model(**random_text(model.backbone), labels=random_labels(ANSWERS))
    assert widths == [max(ANSWERS) + 1]


@torch.no_grad()
def test_generation_reads_the_source_once_and_then_a_token_at_a_time(
    model: PromptedModel, seen: list[dict[str, Any]]
) -> None:
    text = random_text(model.backbone)
    tokens = model.generate(**text, max_new_tokens=5, min_new_tokens=5, do_sample=False)
    assert tokens.shape == (3, 5)
    first, *others = seen
    assert first["inputs_embeds"].shape[1] == M + max(LENGTHS)
    assert [call["input_ids"].shape for call in others] == [(3, 1)] * 4
    for step, call in enumerate(others):
        assert call["position_ids"][:, 0].tolist() == [M + length + step for length in LENGTHS]


def test_answer_ends_where_those_that_were_learnt_end(model: PromptedModel) -> None:
    text, options = random_text(model.backbone), {"max_new_tokens": 6, "do_sample": False}
    tokens = model.generate(**text, **options)
    # Chat models' own configurations name other ends.
    model.backbone.language.generation_config.eos_token_id = int(tokens[0, 1])
    assert torch.equal(model.generate(**text, **options), tokens)


def test_sampling_draws_from_the_seed(model: PromptedModel) -> None:
    def draw(seed: int) -> Tensor:
        torch.manual_seed(seed)
        options = {"do_sample": True, "num_return_sequences": 4, "min_new_tokens": 6, "max_new_tokens": 6}
        return model.generate(**random_text(model.backbone), **options)

    assert draw(1).shape == (12, 6)
    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))


# -- the prompt


@torch.no_grad()
def test_untrained_offset_is_plain_prompt_tuning(backbone: Backbone) -> None:
    dept = trained_prompt()
    nn.init.zeros_(dept.offset_b)
    plain = trained_prompt(M, 0)
    plain.load_state_dict({"soft_prompt": dept.soft_prompt})
    text, labels = random_text(backbone), random_labels(ANSWERS)
    ours, theirs = (PromptedModel(backbone, prompt).eval()(**text, labels=labels) for prompt in (dept, plain))
    assert torch.equal(ours.logits, theirs.logits)


@pytest.mark.parametrize(("prompt_length", "rank"), [(M, 0), (0, R)])
@torch.no_grad()
def test_each_part_alone_changes_the_answers(backbone: Backbone, prompt_length: int, rank: int) -> None:
    text, labels = random_text(backbone), random_labels(ANSWERS)
    bare = PromptedModel(backbone).eval()(**text, labels=labels).logits
    prompted = PromptedModel(backbone, trained_prompt(prompt_length, rank)).eval()
    difference = (prompted(**text, labels=labels).logits - bare).abs().amax((1, 2))
    assert (difference > 1e-2).all()


def test_only_the_adapter_is_trained(model: PromptedModel) -> None:
    model.train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    groups = model.parameter_groups()
    assert list(groups) == ["prompt", "low_rank"]
    optimizer = torch.optim.AdamW([p for group in groups.values() for p in group], lr=0.1, weight_decay=0.1)
    model(**random_text(model.backbone), labels=random_labels(ANSWERS)).loss.backward()
    adapter = {f"prompt.{name}" for name in ("soft_prompt", "offset_a", "offset_b")}
    assert {name for name, p in model.named_parameters() if p.grad is not None} == adapter
    optimizer.step()
    after = model.state_dict()
    assert {name for name in before if not torch.equal(after[name], before[name])} == adapter


def test_language_model_may_be_trained_too(model: PromptedModel) -> None:
    model.backbone.freeze(language=False)
    assert list(model.parameter_groups()) == ["prompt", "low_rank", "backbone"]
    model(**random_text(model.backbone), labels=random_labels(ANSWERS)).loss.backward()
    assert all(p.grad is not None for p in model.parameters())
