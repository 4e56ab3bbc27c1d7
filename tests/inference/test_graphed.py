"""Short answers as graphs, with a recorder that runs on any device: as plain ones, and when not recorded."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from conftest import random_features, random_text
from torch import Tensor, nn

from dept_vl.inference import graphed
from dept_vl.inference.graphed import LONGEST, GraphedAnswers, greedy, why_plain
from dept_vl.models import graphs
from dept_vl.models.backbone import Backbone
from dept_vl.models.prompted import PromptedModel
from dept_vl.prompts.dept import DePT

LENGTHS = (9, 4, 7)
OPTIONS = {"num_beams": 1, "max_new_tokens": 6}


@pytest.fixture
def recordings(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Graphs that are computed again at every replay; a number for each recording."""
    made: list[int] = []

    def record(step: Callable[[], Tensor], pool: object, device: torch.device) -> tuple[Any, Tensor]:
        answers = torch.full_like(step(), -1)
        made.append(len(made))
        return lambda: answers.copy_(step()), answers

    monkeypatch.setattr(graphs, "record", record)
    monkeypatch.setattr(graphs, "new_pool", object)
    monkeypatch.setattr(graphs, "aside", lambda device: nullcontext())
    monkeypatch.setattr(graphed, "why_plain", lambda model, options: "")
    return made


def prompted(backbone: Backbone, seed: int = 2) -> PromptedModel:
    torch.manual_seed(seed)
    prompt = DePT(backbone.d_model, prompt_length=3, rank=2, max_source_length=12)
    nn.init.normal_(prompt.soft_prompt)
    nn.init.normal_(prompt.offset_b)
    return PromptedModel(backbone, prompt).eval()


def inputs_of(backbone: Backbone, lengths: tuple[int, ...] = LENGTHS, seed: int = 0) -> dict[str, Tensor]:
    features = random_features(backbone, len(lengths), seed=seed)
    return random_text(backbone, lengths, seed=seed) | {"visual_features": features}


@torch.no_grad()
def test_greedy_is_greedy_search(backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    special, padding = backbone.language_model.special_tokens, backbone.tokenizer.pad_token_id
    lengths = set()
    for seed in range(6):
        model = prompted(backbone, seed)
        inputs = inputs_of(backbone, seed=seed)
        # Random models end no answer: a token that they write stands for the end.
        written = model.generate(**inputs, max_new_tokens=12)[seed % 3, 1 + seed]
        assert special["eos_token_id"] == [backbone.tokenizer.eos_token_id]
        monkeypatch.setitem(special, "eos_token_id", [int(written)])
        expected = model.generate(**inputs, max_new_tokens=12)
        found = greedy(model, inputs, 12)
        assert torch.equal(found[:, : expected.shape[1]], expected)
        assert (found[:, expected.shape[1] :] == padding).all()
        lengths.update((found[:, 1:] != padding).sum(1).tolist())
        monkeypatch.undo()
    assert len(lengths) > 1


@torch.no_grad()
def test_batches_of_any_order_of_shapes(t5: Backbone, recordings: list[int]) -> None:
    model = prompted(t5)
    answers = GraphedAnswers(model, len(LENGTHS), pytest.fail)
    for seed, lengths in enumerate([(9, 4, 7), (5, 5, 5), (9, 1, 2), (9, 4), (5, 2, 3)]):
        inputs = inputs_of(t5, lengths, seed)
        expected = model.generate(**inputs, **OPTIONS)
        assert torch.equal(answers(**inputs, **OPTIONS)[:, : expected.shape[1]], expected)
    assert len(recordings) == 2  # two lengths; two rows are not recorded
    kept = answers(**inputs, **OPTIONS)
    before = kept.clone()
    answers(**inputs_of(t5, (5, 1, 1), 9), **OPTIONS)
    assert torch.equal(kept, before)


@torch.no_grad()
def test_trained_parameters_are_read_where_they_are(t5: Backbone, recordings: list[int]) -> None:
    model = prompted(t5)
    answers = GraphedAnswers(model, len(LENGTHS), pytest.fail)
    inputs = inputs_of(t5)
    assert model.prompt is not None
    for moved in (False, True):
        answers(**inputs, **OPTIONS)
        if moved:
            model.prompt.soft_prompt = nn.Parameter(torch.randn_like(model.prompt.soft_prompt))
        else:
            model.prompt.soft_prompt.copy_(torch.randn_like(model.prompt.soft_prompt))
        expected = model.generate(**inputs, **OPTIONS)
        assert torch.equal(answers(**inputs, **OPTIONS)[:, : expected.shape[1]], expected)
    assert len(recordings) == 2


def test_falls_back_and_says_why(
    t5: Backbone, recordings: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*given: object) -> None:
        raise RuntimeError("operation not permitted\nwhen stream is capturing")

    monkeypatch.setattr(graphs, "record", broken)
    model, reports = prompted(t5), list[str]()
    answers = GraphedAnswers(model, len(LENGTHS), reports.append)
    inputs = inputs_of(t5)
    for _ in range(2):
        assert torch.equal(answers(**inputs, **OPTIONS), model.generate(**inputs, **OPTIONS))
    assert len(reports) == 1
    assert "operation not permitted when stream is capturing" in reports[0]


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({}, "cpu"),
        ({"num_beams": 3}, "beams"),
        ({"do_sample": True}, "do_sample"),
        ({"max_new_tokens": LONGEST + 1}, str(LONGEST)),
    ],
)
def test_reasons(t5: Backbone, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], word: str) -> None:
    model = prompted(t5)
    if options:  # as if it were on a GPU
        somewhere = type("", (), {"device": torch.device("cuda")})
        monkeypatch.setattr(model, "parameters", lambda: iter([somewhere]))
    assert word in why_plain(model, OPTIONS | options)


def test_a_decoder_is_answered_plainly(
    make_backbone: Callable[..., Backbone], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = PromptedModel(make_backbone("gpt2", None)).eval()
    monkeypatch.setattr(model, "parameters", lambda: iter([torch.empty(0, device="meta")]))
    assert "meta" in why_plain(model, OPTIONS)
    somewhere = type("", (), {"device": torch.device("cuda")})
    monkeypatch.setattr(model, "parameters", lambda: iter([somewhere]))
    assert "no encoder" in why_plain(model, OPTIONS)
