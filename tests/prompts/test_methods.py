"""The methods around DePT: formulas, budgets, starts, folding, files."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import D_MODEL, VOCABULARY, random_features, random_labels, random_text
from torch import Tensor

from dept_vl._utils.errors import UnknownNameError
from dept_vl.adapters.adapter import Adapter
from dept_vl.models.backbone import Backbone
from dept_vl.models.options import TrainedPart
from dept_vl.models.prompted import PromptedModel
from dept_vl.prompts.base import METHODS, Method, sized
from dept_vl.prompts.dept import DePT
from dept_vl.prompts.methods import Bottleneck, build

LONGEST, LENGTH, RANK = 12, 4, 3


def length_of(method: str) -> int:
    return LENGTH if METHODS[method].has_prompt else 0


def untrained(method: str, **sizes: int) -> DePT:
    rank = 0 if method == "pt" else RANK
    given = {"prompt_length": length_of(method), "rank": rank, "max_source_length": LONGEST} | sizes
    return build(sized(method, d_model=D_MODEL, **given))


def trained(method: str, **sizes: int) -> DePT:
    """Every part is away from its start."""
    prompt = untrained(method, **sizes)
    for parameter in prompt.parameters():
        torch.nn.init.normal_(parameter)
    return prompt


def shift(x: Tensor, f: Bottleneck) -> Tensor:
    """ReLU(x A' + a) B' + b, written out."""
    hidden = (x @ f.down.weight.T + f.down.bias).clamp(min=0)
    return hidden @ f.up.weight.T + f.up.bias


def literal(method: str, prompt: DePT, text: Tensor) -> Tensor:
    """`[P ; E + g]` as the table of `methods` has it, without padding."""
    source, m = prompt.source, prompt.soft_prompt
    if method == "ulpt":
        m = (source.z @ source.random) * source.scale + source.shift
    elif method == "lopt":
        m = source.u @ source.v
    elif method == "residual":
        m = source.soft_prompt + shift(source.soft_prompt, source.residual)
    elif method == "memory":
        m = text.new_zeros(0, D_MODEL)
    g = torch.zeros_like(text)
    if method in ("dept", "hybrid"):
        g = g + 8 / math.sqrt(RANK) * prompt.offset_a[: text.shape[1]] @ prompt.offset_b
    if method in ("adept", "hybrid"):
        g = g + shift(text, prompt.token_offset)
    return torch.cat([m.expand(len(text), -1, -1), text + g], dim=1)


@pytest.mark.parametrize("method", METHODS)
def test_forward_is_the_formula(method: str) -> None:
    prompt = trained(method).double()
    text = torch.randn(2, 5, D_MODEL, dtype=torch.float64)
    prompted, mask = prompt(text, torch.ones(2, 5, dtype=torch.bool))
    torch.testing.assert_close(prompted, literal(method, prompt, text))
    assert mask.shape == (2, length_of(method) + 5)


@pytest.mark.parametrize("method", ["dept", "adept", "hybrid", "residual"])
def test_untrained_is_plain_prompt_tuning_bit_for_bit(method: str) -> None:
    prompt = untrained(method)
    plain = untrained("pt")
    vectors = torch.randn(LENGTH, D_MODEL)
    text, mask = torch.randn(2, 5, D_MODEL), torch.ones(2, 5, dtype=torch.bool)
    for one in (prompt, plain):
        one.init_prompt(vectors)
    assert torch.equal(prompt(text, mask)[0], plain(text, mask)[0])


@pytest.mark.parametrize("method", METHODS)
def test_padding_and_company_do_not_matter(make_backbone: Callable[..., Backbone], method: str) -> None:
    model = PromptedModel(make_backbone("t5", None), trained(method)).eval()
    right, left = (random_text(model.backbone, side=side) for side in ("right", "left"))
    second = {name: tensor[1:2, :4] for name, tensor in right.items()}
    labels = random_labels()
    with torch.no_grad():
        ours, theirs = (model(**inputs, labels=labels).logits for inputs in (right, left))
        lone = model(**second, labels=labels[1:2]).logits
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(ours[1:2], lone)


COUNTS = {
    # At d=768, s=256 and the budget of a 100-vector prompt, 76,800.
    "pt": (100, 0, 76_800),
    "dept": (60, 30, 76_800),
    "adept": (60, 19, 76_051),
    "hybrid": (60, 11, 46_080 + 11 * (256 + 3 * 768 + 1) + 768),
    "ulpt": (100, 752, 100 * 752 + 2 * 768),
    "lopt": (100, 88, 88 * 868),
    "residual": (60, 19, 76_051),
    "memory": (0, 49, 49 * (2 * 768 + 1) + 768),
}


def solve(
    method: str, d_model: int, longest: int, reference: int, length: int, **rank: int
) -> tuple[int, int]:
    sizes = {"reference_prompt_length": reference, "prompt_length": length}
    return METHODS[method].solve(d_model=d_model, max_source_length=longest, **sizes, **rank)


def at(method: str, d_model: int, longest: int, length: int, rank: int) -> Method:
    return METHODS[method](d_model=d_model, max_source_length=longest, prompt_length=length, rank=rank)


@pytest.mark.parametrize("method", METHODS)
def test_budget_at_t5_base(method: str) -> None:
    length, rank, count = COUNTS[method]
    assert solve(method, 768, 256, 100, 60) == (length, rank)
    assert at(method, 768, 256, length, rank).parameter_count() == count <= 76_800
    if method != "pt":
        assert at(method, 768, 256, length, rank + 1).parameter_count() > 76_800


def test_published_sizes_of_ulpt() -> None:
    assert at("ulpt", 768, 256, 100, 64).parameter_count() == 7_936  # 7.9K


def test_dept_is_solved_as_ever() -> None:
    for d_model, longest, length, budget in [(768, 348, 60, 100), (256, 20, 20, 100), (32, 16, 0, 6)]:
        solved = (budget * d_model - length * d_model) // (longest + d_model)
        assert solve("dept", d_model, longest, budget, length) == (length, solved)


@pytest.mark.parametrize("method", METHODS)
def test_parameters_are_those_of_the_formula(method: str) -> None:
    prompt = trained(method)
    rank = 0 if method == "pt" else RANK
    groups = at(method, D_MODEL, LONGEST, length_of(method), rank).trained()
    named = {name: tuple(p.shape) for name, p in prompt.named_parameters()}
    assert named == groups["prompt"] | groups["low_rank"]
    count = at(method, D_MODEL, LONGEST, length_of(method), rank).parameter_count()
    assert count == sum(p.numel() for p in prompt.parameters())
    by_id = {id(p): name for name, p in prompt.named_parameters()}
    for group, parameters in prompt.parameter_groups().items():
        assert {by_id[id(p)] for p in parameters} == groups[group].keys()
    assert METHODS[method].groups() == {group for group, shapes in groups.items() if shapes}


def test_what_no_method_can_be_is_refused() -> None:
    with pytest.raises(ValueError, match="rank is 5; leave it out"):
        solve("pt", 8, 4, 10, 5, rank=5)
    with pytest.raises(ValueError, match=r"11 vectors of width 8.*budget is 80, which admits 0 to 10"):
        solve("adept", 8, 4, 10, 11)
    with pytest.raises(ValueError, match="buys no rank of lopt"):
        solve("lopt", 8, 4, 1, 1)
    with pytest.raises(ValueError, match="rank of 1 to the width 8; got 9"):
        sized("ulpt", d_model=8, prompt_length=2, rank=9, max_source_length=4)
    with pytest.raises(ValueError, match="prompt_length >= 1; got 0"):
        sized("residual", d_model=8, prompt_length=0, rank=2, max_source_length=4)
    with pytest.raises(ValueError, match="has no prompt, and prompt_length is 2"):
        sized("memory", d_model=8, prompt_length=2, rank=2, max_source_length=4)
    with pytest.raises(ValueError, match="these methods can: adept, hybrid"):
        sized("dept", d_model=8, prompt_length=2, rank=2, max_source_length=4, visual_offset=True)
    with pytest.raises(ValueError, match="buys no rank of memory"):
        solve("memory", 8, 4, 2, 0)
    with pytest.raises(ValueError, match="needs prompt_length >= 0, rank >= 0"):
        sized("adept", d_model=8, prompt_length=2, rank=-1, max_source_length=4)
    with pytest.raises(UnknownNameError, match=r"unknown method 'residul'; .*closest: residual"):
        sized("residul", d_model=8, prompt_length=2, rank=1, max_source_length=4)


@pytest.mark.parametrize("method", ["dept", "adept", "hybrid", "residual"])
def test_rank_0_is_plain_prompt_tuning(method: str) -> None:
    prompt = untrained(method, rank=0)
    assert prompt.describe()["method"] == "pt"
    assert prompt.state_dict().keys() == {"soft_prompt"}


@pytest.mark.parametrize("method", ["adept", "hybrid", "lopt", "memory", "residual", "ulpt"])
def test_modules_without_their_method_are_not_described_as_a_plain_prompt(method: str) -> None:
    with pytest.raises(ValueError, match="register_method"):
        untrained(method).method.build().describe()


@pytest.mark.parametrize("method", [name for name in METHODS if METHODS[name].has_prompt])
def test_prompt_starts_at_the_words(method: str) -> None:
    # Two different words have rank 2, within the rank of the compressed prompts.
    words = torch.randn(2, D_MODEL)
    prompt = untrained(method, **({"rank": D_MODEL} if method == "ulpt" else {}))
    prompt.init_prompt(words)
    torch.testing.assert_close(prompt.vectors().detach(), words[[0, 1, 0, 1]], atol=1e-4, rtol=1e-4)


def test_lopt_starts_at_the_nearest_of_its_rank() -> None:
    words = torch.randn(8, D_MODEL)
    prompt = untrained("lopt", prompt_length=8)
    prompt.init_prompt(words)
    error = (prompt.vectors() - words).square().sum()
    torch.testing.assert_close(error, torch.linalg.svdvals(words)[RANK:].square().sum())


def test_frozen_matrix_of_ulpt_is_its_seed_alone() -> None:
    one, same, other = (untrained("ulpt", seed=seed).source for seed in (1, 1, 2))
    assert torch.equal(one.random, same.random)
    assert not torch.equal(one.random, other.random)
    assert set(one.state_dict()) == {"z", "scale", "shift"}
    # Of the generator that NumPy has frozen: the same in every version.
    torch.testing.assert_close(one.random[0, :2] * math.sqrt(RANK), torch.tensor([1.62434536, -0.61175641]))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("language", ["t5", "bart"])
def test_folded_is_the_same(make_backbone: Callable[..., Backbone], language: str, method: str) -> None:
    backbone = make_backbone(language)
    model = PromptedModel(backbone, trained(method)).eval()
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    folded = model.folded()
    inputs = {**random_text(backbone), "visual_features": random_features(backbone)}
    with torch.no_grad():
        ours, theirs = (one(**inputs, labels=random_labels()).logits for one in (model, folded))
    torch.testing.assert_close(ours, theirs)
    assert torch.equal(*(one.generate(**inputs, max_new_tokens=5) for one in (model, folded)))
    assert all(torch.equal(tensor, before[name]) for name, tensor in backbone.state_dict().items())
    assert (folded is model) == (method in ("pt", "dept", "memory"))
    if method in ("adept", "hybrid"):
        assert folded.prompt.token_offset is None
        assert folded.word_table.weight.shape == (VOCABULARY, D_MODEL)


@pytest.mark.parametrize("method", METHODS)
def test_adapter_round_trip_is_exact(
    make_backbone: Callable[..., Backbone], tmp_path: Path, method: str
) -> None:
    model = PromptedModel(make_backbone("t5"), trained(method, seed=7)).eval()
    adapter = Adapter.of(model, task="vqav2", metrics={})
    adapter.save(tmp_path)
    loaded = Adapter.load(tmp_path)
    assert loaded.prompt is not None
    assert loaded.prompt["method"] == method
    built = loaded.build(make_backbone("t5")).eval()
    inputs = {**random_text(model.backbone), "visual_features": random_features(model.backbone)}
    with torch.no_grad():
        ours, theirs = (one(**inputs, labels=random_labels()).logits for one in (model, built))
    assert torch.equal(ours, theirs)
    assert built.prompt is not None
    assert built.prompt.describe() == model.prompt.describe()
    assert not any("random" in name for name in loaded.tensors)


def test_adapter_without_a_method_is_of_dept(make_backbone: Callable[..., Backbone], tmp_path: Path) -> None:
    model = PromptedModel(make_backbone("t5"), trained("dept"))
    adapter = Adapter.of(model, task="vqav2", metrics={})
    older = {k: v for k, v in adapter.prompt.items() if k not in ("method", "seed")}
    replace(adapter, prompt=older).save(tmp_path)
    loaded = Adapter.load(tmp_path)
    assert loaded.prompt == adapter.prompt
    assert loaded.build(make_backbone("t5")).prompt.rank == RANK


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"method": "magic"}, "unknown method 'magic'"),
        ({"seed": -1}, "prompt.seed is -1; expected 0 or more"),
        ({"rank": D_MODEL + 1}, "rank of 1 to the width"),
        ({"method": "lopt"}, "has the tensors"),
    ],
)
def test_damaged_description_is_refused(
    make_backbone: Callable[..., Backbone], tmp_path: Path, change: dict[str, object], expected: str
) -> None:
    adapter = Adapter.of(PromptedModel(make_backbone("t5"), trained("ulpt")), task="vqav2", metrics={})
    replace(adapter, prompt=adapter.prompt | change).save(tmp_path)
    with pytest.raises(ValueError, match=expected):
        Adapter.load(tmp_path)


def test_an_adapter_of_another_width_makes_nothing_of_it(make_backbone: Callable[..., Backbone]) -> None:
    backbone = make_backbone("t5")
    adapter = Adapter.of(PromptedModel(backbone, trained("ulpt")), task="vqav2", metrics={})
    wider = replace(adapter, prompt=adapter.prompt | {"d_model": 10**6, "rank": 10**6})
    with pytest.raises(ValueError, match=r"1000000 wide and .* is 32 wide"):
        wider.build(backbone)


def trained_names(backbone: Backbone) -> list[str]:
    return [name for name, p in backbone.language.named_parameters() if p.requires_grad]


def test_biases_are_trained_and_where_there_are_none_the_scales_of_norms(
    make_backbone: Callable[..., Backbone],
) -> None:
    bart, t5 = make_backbone("bart"), make_backbone("t5")
    for backbone in (bart, t5):
        backbone.freeze(language=False, but="biases")
    assert all(name.endswith(".bias") for name in trained_names(bart))
    assert len(trained_names(bart)) > 20
    assert all("layer_norm" in name for name in trained_names(t5))
    scales = 2 * 2 + 2 * 3 + 2  # blocks of encoder and decoder, and a last one each
    assert len(trained_names(t5)) == scales


@pytest.mark.parametrize("language", ["t5", "bart"])
@pytest.mark.parametrize("part", ["biases", "lora"])
def test_a_part_of_the_language_model_is_kept_alone(
    make_backbone: Callable[..., Backbone], tmp_path: Path, language: str, part: TrainedPart
) -> None:
    backbone = make_backbone(language)
    if part == "lora":
        pytest.importorskip("peft")
        backbone.add_lora(2)
    backbone.freeze(language=False, but=part)
    model = PromptedModel(backbone).eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    adapter = Adapter.of(model, task="vqav2", metrics={})
    adapter.save(tmp_path)
    names = [name for name in adapter.tensors if name.startswith("language.")]
    assert len(names) == len(trained_names(backbone))
    if part == "lora":
        # Queries and values of encoder (2 layers) and decoder (2 layers, twice).
        assert adapter.trainable_parameters["backbone"] == (2 + 2 * 2) * 2 * 2 * (D_MODEL + D_MODEL)
    built = Adapter.load(tmp_path).build(make_backbone(language)).eval()
    inputs = {**random_text(backbone), "visual_features": random_features(backbone)}
    with torch.no_grad():
        ours, theirs, bare = (
            one(**inputs, labels=random_labels()).logits
            for one in (model, built, PromptedModel(make_backbone(language)).eval())
        )
    assert torch.equal(ours, theirs)
    assert not torch.allclose(ours, bare, atol=1e-3)
