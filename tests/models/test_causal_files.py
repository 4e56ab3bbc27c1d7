"""A decoder with a prompt: its files, its tokens, what it refuses, and a run."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from causal_parts import ANSWERS, LENGTHS, answers_of, texts_of, trained_prompt
from conftest import CORPUS, D_MODEL, VOCABULARY, random_labels, random_text
from runs import reset_accelerate
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertLMHeadModel,
    BloomConfig,
    BloomForCausalLM,
    CLIPTextConfig,
)

import dept_vl.training.run
from dept_vl.adapters.adapter import Adapter
from dept_vl.config import BackboneOptions, OptimOptions, PromptOptions, RunConfig, TrainOptions
from dept_vl.data.collate import Collator, Draw
from dept_vl.data.splits import Splits
from dept_vl.inference.decoding import generation_options
from dept_vl.models.backbone import Backbone
from dept_vl.models.language import DecoderOnly
from dept_vl.models.prompted import PromptedModel
from dept_vl.models.tokens import style_of, target_ids, target_texts
from dept_vl.prompts.dept import DePT
from dept_vl.tasks.base import Decoding, Example, Task
from dept_vl.tasks.io.predictions import ExampleId, PredictionFormat
from dept_vl.tasks.io.rows import Rows

POSITIONS = 64


@pytest.fixture
def backbone(kind: str, make_backbone: Callable[..., Backbone]) -> Backbone:
    return make_backbone(kind, None)


@pytest.fixture
def tokenizer(kind: str, decoder_folders: dict[str, Path]) -> Any:
    """As it is on the disk."""
    return AutoTokenizer.from_pretrained(decoder_folders[kind])


@pytest.fixture
def model(backbone: Backbone) -> PromptedModel:
    return PromptedModel(backbone, trained_prompt()).eval().double()


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

    eos_token_id = -1

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
    assert style_of(tokenizer).lead is not None


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
