"""Decoder-only language models against the formula written out on stock ones, an example at a time.

`Literal` is `[P ; E(text) + scale * A[:n] @ B ; E(answer)]` in a stock transformers model: no batch, no
padding, no cache, all logits. It shares no code with the package. Comparisons are in float64.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from conftest import CORPUS, D_MODEL, VOCABULARY, random_labels, random_text
from runs import reset_accelerate
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertLMHeadModel,
    BloomConfig,
    BloomForCausalLM,
    CLIPTextConfig,
    PreTrainedModel,
)

import dept_vl.training.run
from dept_vl.adapters.adapter import Adapter
from dept_vl.config import BackboneOptions, OptimOptions, PromptOptions, RunConfig, TrainOptions
from dept_vl.data.collate import Collator, Draw
from dept_vl.data.splits import Splits
from dept_vl.inference.decoding import generation_options
from dept_vl.models.backbone import Backbone
from dept_vl.models.language import DecoderOnly
from dept_vl.models.prompted import IGNORE_INDEX, PromptedModel
from dept_vl.models.tokens import continues_text, target_ids, target_texts
from dept_vl.prompts.dept import DePT
from dept_vl.tasks.base import Decoding, Example, Task
from dept_vl.tasks.io.predictions import ExampleId, PredictionFormat
from dept_vl.tasks.io.rows import Rows

M, R, S, ALPHA = 4, 3, 12, 8.0
LENGTHS, ANSWERS = (7, 4, 5), (4, 2, 3)
POSITIONS = 64
LAYOUTS = ["padded on the right", "padded on the left", "padded to s"]

Text = dict[str, Tensor]


class Literal:
    """The formula on a stock language model; P (m, d), A (s, r) and B (r, d) may be left out."""

    def __init__(self, language: PreTrainedModel, parts: tuple[Tensor, Tensor, Tensor] | None) -> None:
        self.language, self.parts = language, parts

    def source(self, tokens: Tensor) -> Tensor:
        embedded = self.words(tokens)
        if self.parts is None:
            return embedded
        prompt, a, b = self.parts
        offset = torch.stack([ALPHA / math.sqrt(R) * a[place] @ b for place in range(len(tokens))])
        return torch.cat([prompt, embedded + offset])

    def words(self, tokens: Tensor) -> Tensor:
        embedded: Tensor = self.language.get_input_embeddings()(tokens)
        return embedded

    def logits(self, tokens: Tensor, answer: Tensor) -> Tensor:
        """Scores of each token of an answer."""
        source = self.source(tokens)
        scores = self.language(inputs_embeds=torch.cat([source, self.words(answer)])[None]).logits[0]
        return scores[len(source) - 1 : len(source) - 1 + len(answer)]

    def loss(self, tokens: Tensor, answer: Tensor) -> Tensor:
        return nn.functional.cross_entropy(self.logits(tokens, answer), answer)

    def greedy(self, tokens: Tensor, count: int) -> list[int]:
        """The likeliest token, read with all before it from the start, and again."""
        eos, answer = self.language.config.eos_token_id, []
        while len(answer) < count and eos not in answer:
            read = torch.cat([self.source(tokens), self.words(torch.tensor(answer, dtype=torch.long))])
            answer.append(int(self.language(inputs_embeds=read[None]).logits[0, -1].argmax()))
        return answer

    def generate(self, tokens: Tensor, **options: Any) -> list[list[int]]:
        found = self.language.generate(inputs_embeds=self.source(tokens)[None], **options)
        eos = self.language.config.eos_token_id
        return [cut(row, eos) for row in found.tolist()]


def cut(tokens: list[int], eos: int) -> list[int]:
    """An answer without the padding behind its end."""
    return tokens[: tokens.index(eos) + 1] if eos in tokens else tokens


def texts_of(text: Text) -> list[Tensor]:
    """Each text of a batch, without padding."""
    return [ids[mask == 1] for ids, mask in zip(text["input_ids"], text["attention_mask"], strict=True)]


def answers_of(labels: Tensor) -> list[Tensor]:
    return [row[row != IGNORE_INDEX] for row in labels]


def laid_out(backbone: Backbone, layout: str, lengths: tuple[int, ...] = LENGTHS) -> Text:
    """The same texts in each layout."""
    text = random_text(backbone, lengths, side="left" if layout == "padded on the left" else "right")
    if layout != "padded to s":
        return text
    missing = S - text["input_ids"].shape[1]
    return {name: nn.functional.pad(tensor, (0, missing), value=0) for name, tensor in text.items()}


def stock(folder: Path) -> PreTrainedModel:
    """A model that no backbone has touched."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder).double().eval()
    return model


def trained_prompt(prompt_length: int = M, rank: int = R) -> DePT:
    """A prompt as after training: no part of it is zero."""
    prompt = DePT(D_MODEL, prompt_length=prompt_length, rank=rank, max_source_length=S, alpha=ALPHA)
    for parameter in prompt.parameters():
        nn.init.normal_(parameter)
    return prompt


@pytest.fixture
def backbone(kind: str, make_backbone: Callable[..., Backbone]) -> Backbone:
    return make_backbone(kind, None)


@pytest.fixture
def tokenizer(kind: str, decoder_folders: dict[str, Path]) -> Any:
    """As it is on the disk."""
    return AutoTokenizer.from_pretrained(decoder_folders[kind])


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


# -- files


def test_adapter_is_saved_and_loaded_alike(
    model: PromptedModel, make_backbone: Callable[..., Backbone], tmp_path: Path
) -> None:
    model.float()
    Adapter.of(model, task="x", metrics={}).save(tmp_path)
    adapter = Adapter.load(tmp_path)
    assert set(adapter.tensors) == {f"prompt.{name}" for name in ("soft_prompt", "offset_a", "offset_b")}
    again = adapter.build(model.backbone).eval()
    text, labels = random_text(model.backbone), random_labels(ANSWERS)
    with torch.no_grad():
        assert torch.equal(again(**text, labels=labels).logits, model(**text, labels=labels).logits)
    other = {"GPT2LMHeadModel": "llama", "LlamaForCausalLM": "gpt2"}[type(model.backbone.language).__name__]
    with pytest.raises(ValueError, match="does not fit"):
        adapter.build(make_backbone(other, None))


def test_backbone_is_saved_and_loaded_alike(backbone: Backbone, tmp_path: Path) -> None:
    backbone.save_pretrained(tmp_path)
    again = Backbone.from_pretrained(tmp_path).eval()
    assert again.fingerprint == backbone.fingerprint
    assert list(again.fingerprint) == ["language"]
    assert isinstance(again.language_model, DecoderOnly)
    assert again.tokenizer(CORPUS).input_ids == backbone.tokenizer(CORPUS).input_ids
    assert target_ids(again.tokenizer, CORPUS) == target_ids(backbone.tokenizer, CORPUS)
    text = random_text(backbone)
    ours, theirs = (
        PromptedModel(b).eval().generate(**text, max_new_tokens=6, do_sample=False) for b in (again, backbone)
    )
    assert torch.equal(ours, theirs)


# -- tokens of texts and answers

TEXTS = ("vqa: what colour is the circle ?", "vqa: red ?", "gqa: how many large triangles are there")
WORDS = ("red", "two green circles", "small , large .")


def test_text_and_answer_are_tokenised_as_one(tokenizer: Any) -> None:
    for text in TEXTS:
        for answer, ids in zip(WORDS, target_ids(tokenizer, WORDS), strict=True):
            together = tokenizer(f"{text} {answer}").input_ids
            assert tokenizer(text).input_ids + ids == [*together, tokenizer.eos_token_id]
            assert tokenizer.bos_token_id not in ids[:-1]


def test_answers_come_back_as_they_were(tokenizer: Any) -> None:
    ids = target_ids(tokenizer, WORDS)
    for answer, tokens in zip(WORDS, ids, strict=True):
        assert target_texts(tokenizer, torch.tensor([tokens])) == [answer]


def test_long_answers_keep_their_end(tokenizer: Any) -> None:
    (whole,) = target_ids(tokenizer, ["two green circles"])
    assert len(whole) > 3
    assert target_ids(tokenizer, ["two green circles"], 3) == [[*whole[:2], tokenizer.eos_token_id]]
    assert target_ids(tokenizer, [""]) == [[tokenizer.eos_token_id]]


def test_merging_across_a_space_is_refused(tokenizer: Any) -> None:
    merging = MergesSpaces(tokenizer)
    with pytest.raises(ValueError, match=r"merges 'red' with the word before it"):
        target_ids(merging, ["red"])


class MergesSpaces:
    """A tokenizer that takes the whole of a text for one token."""

    def __init__(self, tokenizer: Any) -> None:
        self.known: dict[str, int] = {}

    def __call__(self, text: str | list[str], **options: Any) -> Any:
        texts = [text] if isinstance(text, str) else text
        ids = [[self.known.setdefault(each, len(self.known))] for each in texts]
        return type("Encoding", (), {"input_ids": ids[0] if isinstance(text, str) else ids})


def test_collator_makes_texts_and_answers(backbone: Backbone) -> None:
    tokenizer = backbone.tokenizer
    draws = [
        Draw(Example(number, text, (), ()), answer, 0.5)
        for number, (text, answer) in enumerate(zip(TEXTS, WORDS, strict=True))
    ]
    batch = Collator(tokenizer, 99, 99)(draws)
    assert batch.labels is not None
    text = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    found = zip(texts_of(text), answers_of(batch.labels), strict=True)
    for draw, (tokens, answer) in zip(draws, found, strict=True):
        together = tokenizer(f"{draw.example.source_text} {draw.target}").input_ids
        assert [*tokens.tolist(), *answer.tolist()] == [*together, tokenizer.eos_token_id]
    assert Collator(tokenizer, 3, 2)(draws).labels.shape == (3, 2)  # type: ignore[union-attr]


def test_example_without_text_is_refused(make_backbone: Callable[..., Backbone]) -> None:
    tokenizer = make_backbone("gpt2", None).tokenizer
    collator = Collator(tokenizer, 99, 99)
    for texts in (("red", ""), ("", "")):
        draws = [Draw(Example(f"id-{n}", text, (), ())) for n, text in enumerate(texts)]
        with pytest.raises(ValueError, match=rf"'id-{texts.index('')}' has no text"):
            collator(draws)


def test_end_of_text_serves_as_padding(kind: str, backbone: Backbone, tokenizer: Any) -> None:
    assert tokenizer.pad_token is None
    assert backbone.tokenizer.pad_token_id == backbone.tokenizer.eos_token_id
    assert len(backbone.tokenizer) == len(tokenizer)
    assert len(backbone.language.get_input_embeddings().weight) == VOCABULARY
    assert continues_text(tokenizer)


def test_padding_token_of_its_own_is_kept(kind: str, backbone: Backbone, tokenizer: Any) -> None:
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(7)
    assert Backbone(None, backbone.language, tokenizer, name="x").tokenizer.pad_token_id == 7


# -- candidates


@pytest.mark.parametrize("beams", [1, 4])
@torch.no_grad()
def test_candidates_are_all_that_is_answered(model: PromptedModel, beams: int) -> None:
    candidates = ("red", "two green circles", "no", "small")
    tokenizer = model.backbone.tokenizer
    options = generation_options(Decoding(2, beams, candidates), tokenizer)
    text = random_text(model.backbone, LENGTHS)
    answers = target_texts(tokenizer, model.generate(**text, **options))
    ids = [torch.tensor(tokens) for tokens in target_ids(tokenizer, candidates)]
    for row, tokens in enumerate(texts_of(text)):
        scores = []
        for answer in ids:
            one = {"input_ids": tokens[None], "attention_mask": torch.ones_like(tokens)[None]}
            log_probabilities = model(**one, labels=answer[None]).logits[0].log_softmax(-1)
            own = log_probabilities.gather(1, answer[:, None])
            # They differ in their first tokens, so greedy search goes by these alone.
            scores.append(float(own.sum() if beams > 1 else own[0]))
        assert answers[row] == candidates[scores.index(max(scores))]


# -- too long


@torch.no_grad()
def test_context_that_is_just_long_enough(backbone: Backbone) -> None:
    model = PromptedModel(backbone).eval()
    text = random_text(backbone, (POSITIONS - 3,))
    assert model(**text, labels=random_labels((3,))).logits.isfinite().all()
    assert model.generate(**text, max_new_tokens=3).shape[0] == 1
    backbone.language_model.check_length(10, POSITIONS - 13, 0, 3)


def test_more_tokens_than_positions_are_refused(backbone: Backbone) -> None:
    model = PromptedModel(backbone, DePT(D_MODEL, prompt_length=5, rank=0, max_source_length=99)).eval()
    with pytest.raises(
        ValueError, match=r"has 64 positions.*needs 65: 5 prompt \+ 57 text \+ 3 answer.*max_source_length"
    ):
        backbone.language_model.check_length(5, 57, 0, 3)
    with pytest.raises(ValueError, match=r"has 64 positions.*needs 65: 5 prompt \+ 60 text"):
        model.encode(**random_text(backbone, (60, 4)))
    text = random_text(backbone, (57, 4))
    with pytest.raises(ValueError, match=r"has 64 positions.*needs 65: 62 source \+ 3 answer"):
        model(**text, labels=random_labels((2, 3)))
    with pytest.raises(ValueError, match=r"has 64 positions.*needs 65: 62 source \+ 3 answer"):
        model.generate(**text, max_new_tokens=3)


# -- which models


def test_the_kind_is_that_of_the_configuration(
    backbone: Backbone, make_backbone: Callable[..., Backbone]
) -> None:
    assert isinstance(backbone.language_model, DecoderOnly)
    assert not isinstance(make_backbone("t5", None).language_model, DecoderOnly)
    assert not any(p.requires_grad for p in backbone.parameters())


def test_model_of_neither_kind_is_refused(tmp_path: Path) -> None:
    CLIPTextConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"'clip_text_model', which.*neither.*gpt2"):
        Backbone.from_pretrained(language=tmp_path)


def test_model_that_reads_both_ways_is_refused(tokenizer: Any) -> None:
    sizes = {"hidden_size": D_MODEL, "intermediate_size": 48, "num_hidden_layers": 1}
    bert = BertLMHeadModel(BertConfig(vocab_size=VOCABULARY, num_attention_heads=2, **sizes))
    with pytest.raises(ValueError, match="BertLMHeadModel reads both ways"):
        Backbone(None, bert, tokenizer, name="bert")


def test_model_that_takes_no_positions_is_refused(tokenizer: Any) -> None:
    bloom = BloomForCausalLM(BloomConfig(vocab_size=VOCABULARY, hidden_size=D_MODEL, n_layer=1, n_head=2))
    with pytest.raises(ValueError, match=r"BloomForCausalLM\.forward takes no position_ids"):
        Backbone(None, bloom, tokenizer, name="bloom")


def test_tokenizer_of_the_other_kind_is_refused(
    backbone: Backbone, make_backbone: Callable[..., Backbone], tokenizer: Any
) -> None:
    t5 = make_backbone("t5", None)
    with pytest.raises(ValueError, match=r"does not end a text with a special token.*</s>.*add_eos_token"):
        Backbone(None, backbone.language, t5.tokenizer, name="x")
    with pytest.raises(ValueError, match="T5ForConditionalGeneration needs a tokenizer that ends every text"):
        Backbone(None, t5.language, tokenizer, name="x")


def test_tokenizer_without_end_is_refused(backbone: Backbone, tokenizer: Any) -> None:
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match=r"no end of text.*eos_token"):
        Backbone(None, backbone.language, tokenizer, name="x")


# -- a whole run


@dataclass(frozen=True)
class Sizes(Task):
    """A text task in memory, whose answer follows from one word."""

    count: int

    name = "sizes"
    image_count = 0
    decoding = Decoding(4)
    prediction_format = PredictionFormat("id", "answer", "int")

    @property
    def rows(self) -> Rows:
        return Rows(pa.table({"id": list(range(self.count))}))

    def read(self, root: Path, split: str) -> "Sizes":
        return self

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Example:
        colour = ("red", "blue")[index % 2]
        answer = ("large", "small")[index % 2]
        text = f"vqa: how many {colour} shapes ?" + " ." * (index % 3)
        return Example(index, text, (), ((answer, 1.0),))

    def example_ids(self) -> list[ExampleId]:
        return list(range(self.count))

    def subset(self, indices: Sequence[int]) -> "Sizes":
        return replace(self, count=len(indices))

    def score(self, predictions: Mapping[ExampleId, str]) -> dict[str, float]:
        right = [predictions[index] == self[index].targets[0][0] for index in range(self.count)]
        return {"accuracy": 100 * sum(right) / len(right)}


@pytest.mark.usefixtures("fresh_accelerate")
def test_run_learns_a_text_task(
    kind: str, decoder_folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = Sizes(12)
    monkeypatch.setattr(
        dept_vl.training.run,
        "load_splits",
        lambda options, seed: Splits(task, task, task, task.decoding, options),
    )
    config = RunConfig(
        backbone=BackboneOptions(language=str(decoder_folders[kind]), backbone_dropout=False),
        prompt=PromptOptions(prompt_length=8, rank=4, reference_prompt_length=16, max_source_length=24),
        train=TrainOptions(max_steps=100, per_device_batch_size=6, eval_every=20, log_every=50, seed=5),
        optim=OptimOptions(prompt_lr=0.3, offset_lr=0.1, warmup_steps=0),
        output_dir=tmp_path / "run",
    )
    result = dept_vl.training.run.run(config)
    assert result.scores["accuracy"] > 80  # always the same answer: 50
    predictions = json.loads((tmp_path / "run" / "predictions.json").read_text())
    assert task.score({row["id"]: row["answer"] for row in predictions}) == result.scores
    assert result.trainable["total"] == 8 * D_MODEL + (24 + D_MODEL) * 4
    again = Adapter.load(tmp_path / "run" / "best").build(
        Backbone.from_pretrained(language=decoder_folders[kind])
    )
    assert again.prompt is not None
    too_long = replace(config, prompt=replace(config.prompt, max_source_length=53), output_dir=tmp_path / "2")
    reset_accelerate()
    with pytest.raises(ValueError, match=r"64 positions.*needs 65: 8 prompt \+ 53 text \+ 4 answer"):
        dept_vl.training.run.run(too_long)
