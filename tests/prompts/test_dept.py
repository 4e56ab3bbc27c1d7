"""The method against its formula, its edge cases and its budget."""

import copy
import math
import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from dept_vl.models.padding import pack
from dept_vl.prompts.base import METHODS, sized
from dept_vl.prompts.dept import DePT
from dept_vl.prompts.initialise import sample_vocabulary

D_MODEL, LONGEST = 6, 10
SIZES = [(3, 2), (0, 2), (3, 0), (0, 0)]


def trained(prompt_length: int = 3, rank: int = 2, **options: float) -> DePT:
    """A DePT whose every part is away from its start."""
    prompt = DePT(D_MODEL, prompt_length=prompt_length, rank=rank, max_source_length=LONGEST, **options)
    for parameter in prompt.parameters():
        torch.nn.init.normal_(parameter)
    return prompt


def text(*lengths: int, width: int | None = None, side: str = "right") -> tuple[Tensor, Tensor]:
    """Embeddings and mask of texts whose tokens depend on their row and place alone."""
    width = width or max(lengths)
    embeddings = torch.zeros(len(lengths), width, D_MODEL)
    mask = torch.zeros(len(lengths), width, dtype=torch.bool)
    for row, length in enumerate(lengths):
        start = width - length if side == "left" else 0
        generator = torch.Generator().manual_seed(row)
        embeddings[row, start : start + length] = torch.randn(length, D_MODEL, generator=generator)
        mask[row, start : start + length] = True
    return embeddings, mask


def literal(prompt: DePT, embeddings: Tensor) -> Tensor:
    """`[P ; E + alpha / sqrt(r) * A[:n] B]`, a number at a time."""
    rows = []
    for example in embeddings:
        row = [] if prompt.soft_prompt is None else [list(vector) for vector in prompt.soft_prompt]
        for position, vector in enumerate(example):
            shifted = []
            for column, value in enumerate(vector):
                shift = torch.zeros((), dtype=embeddings.dtype)
                if prompt.offset_a is not None and prompt.offset_b is not None:
                    for k in range(prompt.rank):
                        shift = shift + prompt.offset_a[position, k] * prompt.offset_b[k, column]
                    shift = shift * prompt.alpha / math.sqrt(prompt.rank)
                shifted.append(value + shift)
            row.append(shifted)
        rows.append(torch.stack([torch.stack(vector) for vector in row]))
    return torch.stack(rows).detach()


@pytest.mark.parametrize(("prompt_length", "rank"), SIZES)
def test_prompt_goes_in_front_of_the_text(prompt_length: int, rank: int) -> None:
    embeddings, mask = text(5, 3)
    prompted, prompted_mask = trained(prompt_length, rank)(embeddings, mask)
    assert prompted.shape == (2, prompt_length + 5, D_MODEL)
    assert torch.equal(prompted_mask[:, :prompt_length], torch.ones(2, prompt_length, dtype=torch.bool))
    assert torch.equal(prompted_mask[:, prompt_length:], mask)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("prompt_length", "rank"), SIZES)
def test_forward_is_the_formula(prompt_length: int, rank: int, dtype: torch.dtype) -> None:
    prompt = trained(prompt_length, rank).to(dtype)
    embeddings, mask = text(5, 3)
    prompted, _ = prompt(embeddings.to(dtype), mask)
    torch.testing.assert_close(prompted, literal(prompt, embeddings.to(dtype)))


def test_forward_is_exact_where_numbers_are() -> None:
    # Small integers and a root without remainder: nothing is rounded, so nothing may differ.
    prompt = DePT(D_MODEL, prompt_length=2, rank=4, max_source_length=LONGEST, alpha=6.0)
    for parameter in prompt.parameters():
        parameter.data = torch.randint(-4, 5, parameter.shape).float()
    embeddings = torch.randint(-4, 5, (2, 5, D_MODEL)).float()
    prompted, _ = prompt(embeddings, torch.ones(2, 5, dtype=torch.bool))
    assert torch.equal(prompted, literal(prompt, embeddings))


@pytest.mark.parametrize(("alpha", "rank", "scale"), [(8.0, 4, 4.0), (8.0, 16, 2.0), (3.0, 9, 1.0)])
def test_scale_is_alpha_over_the_root_of_the_rank(alpha: float, rank: int, scale: float) -> None:
    prompt = DePT(D_MODEL, prompt_length=0, rank=rank, max_source_length=LONGEST, alpha=alpha)
    assert prompt.scale == scale
    torch.nn.init.ones_(prompt.offset_a)
    torch.nn.init.ones_(prompt.offset_b)
    assert torch.equal(prompt.offset(2), torch.full((2, D_MODEL), scale * rank))


def test_alpha_is_8_unless_said() -> None:
    assert DePT(D_MODEL, prompt_length=0, rank=4, max_source_length=LONGEST).scale == 4.0


def test_untrained_is_plain_prompt_tuning_bit_for_bit() -> None:
    dept = DePT(D_MODEL, prompt_length=3, rank=2, max_source_length=LONGEST)
    plain = DePT(D_MODEL, prompt_length=3, rank=0, max_source_length=LONGEST)
    plain.load_state_dict({"soft_prompt": dept.soft_prompt.detach()})
    assert dept.offset_a.abs().sum() > 0
    arguments = text(5, 3)
    for ours, theirs in zip(dept(*arguments), plain(*arguments), strict=True):
        assert torch.equal(ours, theirs)


def test_offset_starts_at_zero_with_a_kaiming_a() -> None:
    prompt = DePT(D_MODEL, prompt_length=0, rank=50, max_source_length=400)
    assert torch.equal(prompt.offset_b, torch.zeros(50, D_MODEL))
    bound = math.sqrt(6 / ((1 + 5) * 50))  # Kaiming uniform with a = sqrt(5) over a fan-in of r
    assert prompt.offset_a.abs().max() <= bound
    torch.testing.assert_close(prompt.offset_a.std().item(), bound / math.sqrt(3), rtol=0.02, atol=0)


@pytest.mark.parametrize(
    ("prompt_length", "rank", "names"),
    [
        (3, 2, {"soft_prompt", "offset_a", "offset_b"}),
        (0, 2, {"offset_a", "offset_b"}),
        (3, 0, {"soft_prompt"}),
        (0, 0, set()),
    ],
)
def test_part_of_size_zero_has_no_parameter(prompt_length: int, rank: int, names: set[str]) -> None:
    prompt = DePT(D_MODEL, prompt_length=prompt_length, rank=rank, max_source_length=LONGEST)
    assert {name for name, _ in prompt.named_parameters()} == names
    assert set(prompt.state_dict()) == names


def test_empty_prompt_changes_nothing() -> None:
    embeddings, mask = text(5, 3)
    prompted, prompted_mask = trained(0, 0)(embeddings, mask)
    assert torch.equal(prompted, embeddings)
    assert torch.equal(prompted_mask, mask)


@pytest.mark.parametrize("sizes", [{"prompt_length": -1}, {"rank": -1}, {"max_source_length": 0}])
def test_size_out_of_range_is_refused(sizes: dict[str, int]) -> None:
    (name, value) = next(iter(sizes.items()))
    with pytest.raises(ValueError, match=f"{name}={value}"):
        DePT(D_MODEL, **({"prompt_length": 3, "rank": 2, "max_source_length": LONGEST} | sizes))


def test_padding_side_does_not_matter_once_packed() -> None:
    prompt = trained()
    right, right_mask = text(6, 2, 4)
    left, left_mask = text(6, 2, 4, side="left")
    on_right, full_right = prompt(right, right_mask)
    on_left, full_left = prompt(*pack(left, left_mask))
    assert torch.equal(on_left[full_left], on_right[full_right])
    # A column is taken for a position, so left padding must be packed.
    unpacked, full = prompt(left, left_mask)
    assert not torch.equal(unpacked[full], on_right[full_right])


def test_batch_width_does_not_matter() -> None:
    prompt = trained()
    narrow, narrow_mask = text(4, 3)
    wide, wide_mask = text(4, 3, width=LONGEST)
    sliced, sliced_mask = prompt(narrow, narrow_mask)
    whole, whole_mask = prompt(wide, wide_mask)
    assert sliced.shape[1] == 3 + 4
    assert whole.shape[1] == 3 + LONGEST
    torch.testing.assert_close(sliced[sliced_mask], whole[whole_mask])


@pytest.mark.parametrize(("prompt_length", "rank"), SIZES)
def test_text_of_full_length_fits(prompt_length: int, rank: int) -> None:
    embeddings, mask = text(LONGEST)
    prompted, _ = trained(prompt_length, rank)(embeddings, mask)
    assert prompted.shape[1] == prompt_length + LONGEST


@pytest.mark.parametrize(("prompt_length", "rank"), SIZES)
def test_text_too_long_is_refused_with_both_lengths(prompt_length: int, rank: int) -> None:
    embeddings, mask = text(LONGEST + 1)
    with pytest.raises(ValueError, match=rf"{LONGEST + 1} tokens.*max_source_length={LONGEST}"):
        trained(prompt_length, rank)(embeddings, mask)


def test_embeddings_keep_their_dtype() -> None:
    embeddings, mask = text(4, 3)
    prompted, _ = trained()(embeddings.bfloat16(), mask)
    assert prompted.dtype == torch.bfloat16


def test_parameter_groups_name_every_parameter_once() -> None:
    prompt = trained()
    groups = prompt.parameter_groups()
    assert list(groups) == ["prompt", "low_rank"]
    assert [id(p) for p in groups["prompt"]] == [id(prompt.soft_prompt)]
    grouped = [id(p) for group in groups.values() for p in group]
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == {id(p) for p in prompt.parameters()}


@pytest.mark.parametrize(("prompt_length", "rank"), SIZES)
def test_parameter_groups_hold_only_what_exists(prompt_length: int, rank: int) -> None:
    groups = trained(prompt_length, rank).parameter_groups()
    assert [len(groups[name]) for name in ("prompt", "low_rank")] == [int(prompt_length > 0), 2 * (rank > 0)]


def test_only_the_prompt_gets_gradient() -> None:
    prompt = trained()
    embeddings, mask = text(5, 3)
    prompted, _ = prompt(embeddings, mask)
    prompted.square().sum().backward()
    assert embeddings.grad is None
    assert not embeddings.requires_grad
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in prompt.parameters())
    # Rows of A past the longest text of the batch took no part.
    assert prompt.offset_a.grad[5:].abs().sum() == 0


@pytest.mark.parametrize(
    ("count", "rows"), [(5, [0, 1, 2, 3, 4]), (2, [0, 1, 0, 1, 0]), (9, [0, 1, 2, 3, 4])]
)
def test_init_prompt_repeats_or_cuts(count: int, rows: list[int]) -> None:
    prompt = trained(prompt_length=5)
    parameter = prompt.soft_prompt
    words = torch.randn(count, D_MODEL)
    prompt.init_prompt(words)
    assert prompt.soft_prompt is parameter
    assert parameter.requires_grad
    assert torch.equal(parameter.detach(), words[rows])


def test_init_prompt_without_prompt_or_words() -> None:
    trained(0, 2).init_prompt(torch.randn(2, D_MODEL))
    with pytest.raises(ValueError, match="no token"):
        trained().init_prompt(torch.empty(0, D_MODEL))


def draw(count: int, *, size: int = 20, seed: int = 0, exclude: tuple[int, ...] = ()) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return sample_vocabulary(size, count, generator, exclude=exclude).tolist()


def test_vocabulary_is_drawn_without_replacement() -> None:
    assert sorted(draw(20)) == list(range(20))
    assert len(set(draw(13))) == 13
    repeated = draw(50)
    assert all(2 <= repeated.count(token) <= 3 for token in range(20))


def test_excluded_tokens_are_never_drawn() -> None:
    # An id past the vocabulary (tokenizers and embeddings differ in size) is no reason to fail.
    assert set(draw(60, exclude=(0, 3, 19, 25))) == set(range(20)) - {0, 3, 19}
    with pytest.raises(ValueError, match="no token"):
        draw(1, size=2, exclude=(0, 1))


def test_draw_is_the_seed_alone() -> None:
    assert draw(10, seed=1) == draw(10, seed=1)
    assert draw(10, seed=1) != draw(10, seed=2)
    assert draw(0) == []


def parameter_count(d_model: int, longest: int, prompt_length: int, rank: int) -> int:
    sizes = {"max_source_length": longest, "prompt_length": prompt_length, "rank": rank}
    return sized("dept", d_model=d_model, **sizes).parameter_count()


def solve_rank(d_model: int, longest: int, reference: int, prompt_length: int) -> int:
    length, rank = METHODS["dept"].solve(
        d_model=d_model,
        max_source_length=longest,
        reference_prompt_length=reference,
        prompt_length=prompt_length,
    )
    assert length == prompt_length
    return rank


PAPER = [(0, 75), (20, 60), (40, 45), (60, 30), (80, 15), (100, 0)]


@pytest.mark.parametrize(("prompt_length", "rank"), PAPER)
def test_budget_gives_the_table_of_the_paper(prompt_length: int, rank: int) -> None:
    assert solve_rank(768, 256, 100, prompt_length) == rank
    assert parameter_count(768, 256, prompt_length, rank) == 76_800


def test_budget_catches_multirc() -> None:
    # The released runs keep r = 30 at s = 348, which is over the stated budget.
    assert parameter_count(768, 348, 60, 30) == 79_560
    assert solve_rank(768, 348, 100, 60) == 27
    assert parameter_count(768, 348, 60, 27) <= 76_800


def test_budget_is_kept_and_used_up() -> None:
    numbers = random.Random(0)
    for _ in range(500):
        d_model, longest = numbers.randint(1, 2048), numbers.randint(1, 600)
        prompt_length = numbers.randint(0, 120)
        reference = prompt_length + numbers.randint(0, 100_000) // d_model
        budget = reference * d_model
        rank = solve_rank(d_model, longest, reference, prompt_length)
        assert rank >= 0
        assert parameter_count(d_model, longest, prompt_length, rank) <= budget
        assert parameter_count(d_model, longest, prompt_length, rank + 1) > budget


@pytest.mark.parametrize(("prompt_length", "rank"), SIZES)
def test_parameter_count_is_what_the_module_has(prompt_length: int, rank: int) -> None:
    prompt = trained(prompt_length, rank)
    counted = sum(p.numel() for p in prompt.parameters())
    assert parameter_count(D_MODEL, LONGEST, prompt_length, rank) == counted


def test_prompt_over_budget_is_refused_with_the_longest_that_fits() -> None:
    with pytest.raises(ValueError, match=r"101 vectors.*77,568.*76,800.*0 to 100"):
        solve_rank(768, 256, 100, 101)
    with pytest.raises(ValueError, match="-1 vectors"):
        solve_rank(768, 256, 100, -1)


# -- the offset after a change


def product(prompt: DePT, text_length: int) -> Tensor:
    return (prompt.offset_a[:text_length] @ prompt.offset_b * prompt.scale).detach()


def change_by_optimizer(prompt: DePT, *, fused: bool) -> None:
    optimizer = torch.optim.AdamW(prompt.parameters(), lr=0.5, fused=fused)
    prompt.train()
    prompt.offset(4).sum().backward()
    optimizer.step()
    prompt.eval()


def change_by_rounding(prompt: DePT) -> None:
    # There and back: the same type, shape and version, perhaps even the same place in memory.
    prompt.to(torch.bfloat16).to(torch.float32)


CHANGES = {
    "optimizer": lambda prompt: change_by_optimizer(prompt, fused=False),
    "fused optimizer": lambda prompt: change_by_optimizer(prompt, fused=True),
    "load_state_dict": lambda prompt: prompt.load_state_dict(trained().state_dict()),
    "to": lambda prompt: prompt.to(torch.float64),
    "rounding": change_by_rounding,
    "in place": lambda prompt: nn.init.normal_(prompt.offset_b),
    "data": lambda prompt: setattr(prompt.offset_a, "data", torch.randn(LONGEST, 2)),
    "new parameter": lambda prompt: setattr(prompt, "offset_b", nn.Parameter(torch.randn(2, D_MODEL))),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_offset_follows_every_change(change: Callable[[DePT], object]) -> None:
    prompt = trained().eval()
    with torch.no_grad():
        before = prompt.offset(5)
    change(prompt)
    with torch.no_grad():
        after = prompt.offset(5)
    torch.testing.assert_close(after, product(prompt, 5))
    assert not torch.equal(after.float(), before.float()) or after.dtype != before.dtype


def test_offset_is_the_same_with_and_without_gradients() -> None:
    prompt = trained().eval()
    with_gradient = prompt.offset(5)
    assert with_gradient.requires_grad
    with torch.inference_mode():
        assert torch.equal(prompt.offset(5), with_gradient)
    assert set(prompt.state_dict()) == {"soft_prompt", "offset_a", "offset_b"}


def test_offset_follows_the_precision() -> None:
    prompt = trained().eval()
    with torch.no_grad():
        full = prompt.offset(5)
        with torch.autocast("cpu", torch.bfloat16):
            assert prompt.offset(5).dtype == torch.bfloat16
        assert torch.equal(prompt.offset(5), full)


def test_copies_have_their_own_offset() -> None:
    prompt = trained().eval()
    with torch.no_grad():
        prompt.offset(5)
        other = copy.deepcopy(prompt)
        nn.init.normal_(other.offset_a)
        torch.testing.assert_close(other.offset(5), product(other, 5))
        torch.testing.assert_close(prompt.offset(5), product(prompt, 5))
