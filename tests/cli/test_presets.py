"""The released runs' hyper-parameters against the table they were read from, and the budget."""

import pytest

from dept_vl.presets import PAPER, Preset
from dept_vl.prompts.base import METHODS, sized

D_MODEL, BUDGET, REFERENCE = 768, 76_800, 100

# task: m, r, prompt_lr, offset_lr, steps, s, batch, accumulation, warm-up; every field spelt out.
TABLE = {
    "cola": (80, 15, 0.3, 5e-4, 40_000, 256, 32, 1, 500),
    "mnli": (60, 30, 0.3, 1e-4, 250_000, 256, 32, 1, 500),
    "mrpc": (60, 30, 0.3, 5e-3, 10_000, 256, 32, 1, 500),
    "qnli": (60, 30, 0.4, 5e-3, 100_000, 256, 32, 1, 500),
    "qqp": (60, 30, 0.4, 5e-3, 100_000, 256, 32, 1, 500),
    "rte": (60, 30, 0.4, 1e-4, 30_000, 256, 32, 1, 500),
    "cb": (60, 30, 0.4, 1e-4, 30_000, 256, 32, 1, 500),
    "sst2": (60, 30, 0.3, 5e-4, 30_000, 256, 32, 1, 500),
    "stsb": (60, 30, 0.3, 1e-4, 30_000, 256, 32, 1, 500),
    "boolq": (40, 45, 0.3, 5e-3, 30_000, 256, 32, 1, 500),
    "multirc": (60, 30, 0.3, 5e-3, 30_000, 348, 32, 1, 500),
    "wic": (60, 30, 0.3, 1e-3, 20_000, 256, 32, 1, 500),
    "wsc": (60, 30, 0.3, 1e-4, 20_000, 256, 32, 1, 500),
    "newsqa": (60, 24, 0.4, 1e-4, 200_000, 512, 16, 2, 500),
    "hotpotqa": (60, 24, 0.4, 1e-4, 250_000, 512, 16, 2, 500),
    "searchqa": (60, 24, 0.3, 1e-4, 250_000, 512, 16, 2, 500),
    "naturalquestions": (60, 24, 0.3, 1e-4, 300_000, 512, 16, 2, 500),
}


@pytest.mark.parametrize("task", TABLE)
def test_preset_is_the_row_of_the_table(task: str) -> None:
    assert PAPER[task] == Preset(*TABLE[task])


def test_there_are_17_of_them() -> None:
    assert PAPER.keys() == TABLE.keys()
    assert len(PAPER) == 17


def test_every_update_sees_32_examples() -> None:
    assert {p.per_device_batch_size * p.gradient_accumulation_steps for p in PAPER.values()} == {32}


def test_multirc_alone_is_over_the_budget() -> None:
    used = {
        task: sized(
            "dept",
            d_model=D_MODEL,
            max_source_length=p.max_source_length,
            prompt_length=p.prompt_length,
            rank=p.rank,
        ).parameter_count()
        for task, p in PAPER.items()
    }
    assert {task: count for task, count in used.items() if count > BUDGET} == {"multirc": 79_560}
    assert {count for task, count in used.items() if task != "multirc"} == {BUDGET}


@pytest.mark.parametrize("task", TABLE)
def test_the_solver_gives_the_published_rank_where_that_keeps_the_budget(task: str) -> None:
    preset = PAPER[task]
    solved = METHODS["dept"].solve(
        d_model=D_MODEL,
        max_source_length=preset.max_source_length,
        reference_prompt_length=REFERENCE,
        prompt_length=preset.prompt_length,
    )
    assert solved == (preset.prompt_length, 27 if task == "multirc" else preset.rank)
