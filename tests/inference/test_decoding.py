"""Answers among candidates: which tokens may follow, and which candidate wins."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from conftest import LANGUAGES, random_features, random_text
from torch import Tensor
from transformers import AutoTokenizer

from dept_vl.inference import decoding as module
from dept_vl.inference.decoding import Trie, choice_options, generation_options, spellings
from dept_vl.models.backbone import Backbone
from dept_vl.models.prompted import PromptedModel
from dept_vl.models.tokens import target_ids
from dept_vl.prompts.dept import DePT
from dept_vl.tasks.base import Decoding

# "green" starts "green shapes" and "green shapes green shapes"; whole words, so that decoding joins none.
CANDIDATES = (
    *("red", "no", "yes", "blue", "many", "green", "green shapes"),
    *("green shapes green shapes green shapes", "two shapes", "two"),
)
WORDS = ("true", "false")
LENGTHS = (7, 4, 5, 6, 9, 3, 8, 5, 6, 7)


@pytest.fixture(params=LANGUAGES)
def tokenizer(request: pytest.FixtureRequest, language_folders: dict[str, Any]) -> Any:
    return AutoTokenizer.from_pretrained(language_folders[request.param])


@pytest.fixture
def model(backbone: Backbone) -> PromptedModel:
    """T5, then BART, with a prompt that has an effect."""
    prompt = DePT(backbone.d_model, prompt_length=3, rank=2, max_source_length=16)
    torch.nn.init.normal_(prompt.offset_b)
    return PromptedModel(backbone, prompt).eval()


@pytest.fixture
def inputs(model: PromptedModel) -> dict[str, Tensor]:
    """Ten questions with an image each."""
    return {
        **random_text(model.backbone, LENGTHS),
        "visual_features": random_features(model.backbone, len(LENGTHS)),
    }


@pytest.fixture
def choose(model: PromptedModel, inputs: dict[str, Tensor]) -> Callable[..., list[str]]:
    """Answers among candidates."""

    def run(candidates: Sequence[str], num_beams: int = 1, max_new_tokens: int = 10) -> list[str]:
        tokenizer = model.backbone.tokenizer
        decoding = Decoding(max_new_tokens, num_beams, tuple(candidates))
        tokens = model.generate(**inputs, **generation_options(decoding, tokenizer))
        answers: list[str] = tokenizer.batch_decode(tokens, skip_special_tokens=True)
        return answers

    return run


@torch.no_grad()
def log_probabilities(model: PromptedModel, inputs: dict[str, Tensor], answers: Sequence[str]) -> Tensor:
    """Total log-probability of each answer to each question, (questions, answers), by teacher forcing."""
    totals = []
    for answer in answers:
        ids = model.backbone.tokenizer(text_target=answer).input_ids
        labels = torch.tensor([ids] * len(LENGTHS))
        logits = model(**inputs, labels=labels).logits
        totals.append(logits.log_softmax(-1).gather(2, labels[..., None])[..., 0].sum(1))
    return torch.stack(totals, 1)


def walks(trie: Trie, start: int, end: int) -> list[list[int]]:
    """Every way down the trie, by asking it."""
    found, open_ = [], [[start]]
    while open_:
        path = open_.pop()
        for token in trie(0, torch.tensor(path)):
            (found if token == end else open_).append([*path, token])
    return [path[1:] for path in found]


def test_the_ways_down_the_trie_are_the_candidates(tokenizer: Any) -> None:
    trie = Trie(tokenizer, CANDIDATES)
    expected = [tokenizer(text_target=candidate).input_ids for candidate in CANDIDATES]
    # Whatever the decoder starts with: it is no part of the answer.
    for start in (tokenizer.pad_token_id, tokenizer.eos_token_id, 77):
        found = walks(trie, start, tokenizer.eos_token_id)
        assert sorted(found) == sorted(expected)
    assert trie.depth == max(map(len, expected))


def test_behind_a_finished_candidate_there_is_padding(tokenizer: Any) -> None:
    trie = Trie(tokenizer, CANDIDATES)
    done = [5, *tokenizer(text_target="red").input_ids]
    for padding in range(3):
        assert trie(0, torch.tensor(done + [tokenizer.pad_token_id] * padding)) == [tokenizer.pad_token_id]


def test_a_candidate_may_end_where_another_goes_on(tokenizer: Any) -> None:
    trie = Trie(tokenizer, ("green", "green shapes", "green"))
    *green, end = tokenizer(text_target="green").input_ids
    longer = tokenizer(text_target="green shapes").input_ids
    assert longer[: len(green)] == green
    assert sorted(trie(0, torch.tensor([5, *green]))) == sorted([end, longer[len(green)]])


def test_no_candidate_is_refused(tokenizer: Any) -> None:
    with pytest.raises(ValueError, match="at least one candidate"):
        Trie(tokenizer, ())


def test_without_candidates_nothing_is_constrained(tokenizer: Any) -> None:
    assert generation_options(Decoding(7, 3), tokenizer) == {"num_beams": 3, "max_new_tokens": 7}


def test_between_two_words_the_first_token_in_which_they_differ_decides(
    model: PromptedModel, inputs: dict[str, Tensor], choose: Callable[..., list[str]]
) -> None:
    ids = [model.backbone.tokenizer(text_target=word).input_ids for word in WORDS]
    place = next(n for n, pair in enumerate(zip(*ids, strict=False)) if pair[0] != pair[1])
    logits = model(**inputs, labels=torch.tensor([ids[0]] * len(LENGTHS))).logits[:, place]
    true, false = logits[:, ids[0][place]], logits[:, ids[1][place]]
    # The middle question is a draw, so that both words win.
    balance = (true - false).median()
    model.backbone.language.get_output_embeddings().register_forward_hook(
        lambda module, inputs, output: output.index_add(
            -1, torch.tensor([ids[1][place]]), balance.expand(*output.shape[:-1], 1)
        )
    )
    answers = choose(WORDS)
    expected = [
        WORDS[0] if one > other + balance else WORDS[1] for one, other in zip(true, false, strict=True)
    ]
    middle = (true - false - balance).abs().argmin()
    assert {*answers} == {*WORDS}
    assert [a for n, a in enumerate(answers) if n != middle] == [
        e for n, e in enumerate(expected) if n != middle
    ]


@pytest.mark.parametrize("num_beams", [len(CANDIDATES), len(CANDIDATES) + 3])
def test_as_many_beams_as_candidates_rank_them_all_by_their_probability(
    model: PromptedModel, inputs: dict[str, Tensor], choose: Callable[..., list[str]], num_beams: int
) -> None:
    totals = log_probabilities(model, inputs, CANDIDATES)
    assert choose(CANDIDATES, num_beams) == [CANDIDATES[best] for best in totals.argmax(1)]


def test_long_candidates_are_not_favoured(
    model: PromptedModel, inputs: dict[str, Tensor], choose: Callable[..., list[str]]
) -> None:
    longer = {"two": "two shapes", "green": "green shapes", "green shapes": CANDIDATES[7], "no": "no many"}
    for pair in longer.items():
        totals = log_probabilities(model, inputs, pair)
        lengths = [len(model.backbone.tokenizer(text_target=one).input_ids) for one in pair]
        by_sum, by_mean = totals.argmax(1), (totals / torch.tensor(lengths)).argmax(1)
        if not torch.equal(by_sum, by_mean):
            break
    assert not torch.equal(by_sum, by_mean)
    assert choose(pair, 2) == [pair[best] for best in by_sum]


@pytest.mark.parametrize("num_beams", [1, 2, 3])
def test_nothing_but_candidates_comes_out_of_fewer_beams(
    choose: Callable[..., list[str]], num_beams: int
) -> None:
    answers = choose(CANDIDATES, num_beams)
    assert {*answers} <= {*CANDIDATES}
    assert len({*answers}) > 1


def test_more_beams_find_candidates_no_less_probable(
    model: PromptedModel, inputs: dict[str, Tensor], choose: Callable[..., list[str]]
) -> None:
    totals = log_probabilities(model, inputs, CANDIDATES)
    rows = torch.arange(len(LENGTHS))
    greedy, whole = (
        totals[rows, [CANDIDATES.index(answer) for answer in choose(CANDIDATES, beams)]]
        for beams in (1, len(CANDIDATES))
    )
    assert (whole >= greedy).all()


def test_candidates_may_be_longer_than_free_answers(choose: Callable[..., list[str]]) -> None:
    longest = "green shapes green shapes green shapes"
    assert choose([longest], max_new_tokens=2) == [longest] * len(LENGTHS)


@pytest.mark.parametrize("num_beams", [1, 3])
def test_the_habits_of_a_checkpoint_do_not_matter(
    model: PromptedModel, choose: Callable[..., list[str]], num_beams: int
) -> None:
    """As facebook/bart-base has them: "green shapes green shapes green shapes" repeats two trigrams."""
    repeating = ("green shapes green shapes green shapes", "many many many many many many many many many")
    expected = choose(repeating, num_beams)
    habits = model.backbone.language.generation_config
    habits.update(no_repeat_ngram_size=3, early_stopping=True, num_beams=4, length_penalty=2.0)
    assert choose(repeating, num_beams) == expected


def test_a_decoded_candidate_is_told_however_it_is_spelled(tokenizer: Any) -> None:
    # Neither tokenizer knows the underline, and both put spaces between the pieces of a word.
    candidates = ("entailment", "not_entailment", "yes")
    decoded = [
        tokenizer.decode(tokenizer(text_target=one).input_ids, skip_special_tokens=True) for one in candidates
    ]
    assert decoded[1] != candidates[1]
    spelled = spellings(tokenizer, candidates)
    assert [spelled[text] for text in decoded] == list(candidates)
    assert spellings(tokenizer, ()) == {}


def test_answers_are_tokenised_once(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def counted(tokenizer: Any, answers: Sequence[str]) -> list[list[int]]:
        asked.extend(answers)
        return target_ids(tokenizer, answers)

    monkeypatch.setattr(module, "target_ids", counted)
    rows = [("red", "no"), ("no", "yes"), ("red", "many")]
    for _ in range(2):
        choice_options(rows, tokenizer)
        generation_options(Decoding(5, 1, ("red", "yes")), tokenizer)
        assert spellings(tokenizer, ("yes", "no")) == {"yes": "yes", "no": "no"}
    assert asked == ["red", "no", "yes", "many"]
    monkeypatch.setattr(module, "MOST_KNOWN", 3)
    tries = [Trie(tokenizer, row).following for row in (("blue", "red"), ("red", "no"))]
    assert tries == [Trie(tokenizer, row).following for row in (("blue", "red"), ("red", "no"))]
