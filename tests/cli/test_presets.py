"""Published hyper-parameters: the page that lists them with their sources against the code; the budget."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from dept_vl.cli import parse
from dept_vl.config import RunConfig, flat, to_json
from dept_vl.models.pretrained_vlm import open_backbone
from dept_vl.models.projection import VisualProjection
from dept_vl.presets import MODELS, OWN_ROW, PAPER, PRESETS, RELEASED, VL_ADAPTER
from dept_vl.prompts.base import METHODS, sized
from dept_vl.prompts.methods import build

D_MODEL, BUDGET, REFERENCE = 768, 76_800, 100
TEXT = [task for task in PAPER if task not in VL_ADAPTER]
PAGE = Path(__file__).parents[2] / "data" / "published" / "README.md"

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
COLUMNS = (
    *("prompt_length", "rank", "prompt_lr", "offset_lr", "max_steps", "max_source_length"),
    *("per_device_batch_size", "gradient_accumulation_steps", "warmup_steps"),
)


def tables(heading: str) -> list[list[str]]:
    """The rows of the tables below a heading of the page, without their heads."""
    text = PAGE.read_text(encoding="utf-8").split(f"\n## {heading}\n")[1].split("\n## ")[0]
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"
    ]
    return [row for row in rows if row[0].startswith("`")]


def listed(heading: str) -> dict[str, Any]:
    """Option -> value, of a table of the page; every row names its source."""
    found = {}
    for option, value, source in tables(heading):
        assert source
        found[option.strip("`").removeprefix("--")] = json.loads(value.strip("`"))
    return found


@pytest.mark.parametrize("task", TABLE)
def test_preset_is_the_row_of_the_table(task: str) -> None:
    assert tuple(PAPER[task][name] for name in COLUMNS) == TABLE[task]


def test_there_are_17_of_them_and_two_with_images() -> None:
    assert set(TEXT) == TABLE.keys()
    assert PAPER.keys() - TABLE.keys() == {"vqav2", "coco"}
    assert set(VL_ADAPTER) == {"vqav2", "gqa", "nlvr2", "coco"}


def test_the_page_lists_what_all_released_runs_have() -> None:
    assert listed("`--preset paper`: text") == RELEASED
    other = {name: {k: v for k, v in PAPER[name].items() if RELEASED.get(k) != v} for name in TEXT}
    by_task = {row[0].strip("`"): json.loads(row[1].strip("`")) for row in tables("By task")}
    assert by_task == other


@pytest.mark.parametrize("task", VL_ADAPTER)
def test_the_page_lists_the_protocol_with_images(task: str) -> None:
    rows = tables("`--preset vl-adapter`")
    assert f"\n| option | {' | '.join(f'`{name}`' for name in VL_ADAPTER)} | source |\n" in PAGE.read_text()
    place = 1 + list(VL_ADAPTER).index(task)
    values = {row[0].strip("`").removeprefix("--"): row[place].strip("`") for row in rows}
    assert all(row[-1] for row in rows)
    found = {name: json.loads(value) for name, value in values.items() if value}
    assert found == MODELS | VL_ADAPTER[task]


def test_the_page_lists_depts_own_row() -> None:
    assert listed("`--preset paper`: VQA and captions") == OWN_ROW
    for task in ("vqav2", "coco"):
        assert PAPER[task] == VL_ADAPTER[task] | OWN_ROW


@cache
def without_preset(task: str) -> dict[str, Any]:
    return flat(to_json(parse(RunConfig(), "", ["--task", task])))


@pytest.mark.parametrize(
    ("preset", "task"), [(name, task) for name, tasks in PRESETS.items() for task in tasks]
)
def test_a_preset_changes_the_options_that_it_names_alone(preset: str, task: str) -> None:
    config = flat(to_json(parse(RunConfig(), "", ["--task", task, "--preset", preset])))
    plain = without_preset(task)
    expected = PRESETS[preset][task] | (MODELS if task in VL_ADAPTER else {})
    values = {name.rpartition(".")[2]: value for name, value in config.items()}
    assert {name: values[name] for name in expected} == expected
    changed = {name.rpartition(".")[2] for name in config if config[name] != plain[name]}
    assert changed <= expected.keys()


def test_models_that_are_named_are_kept() -> None:
    flags = ["--task", "gqa", "--preset", "vl-adapter"]
    named = parse(RunConfig(), "", [*flags, "--vision", "x/clip", "--language", "x/bart"]).backbone
    assert (named.vision, named.language, named.pooled_grid) == ("x/clip", "x/bart", 0)
    folder = parse(RunConfig(), "", [*flags, "--backbone", "data/tiny-clip-t5"]).backbone
    assert (folder.vision, folder.language, folder.object_order) == (None, None, "frozen")


@pytest.mark.parametrize("name", ["tiny-clip-t5", "tiny-clip-bart"])
@pytest.mark.parametrize("preset", ["vl-adapter", "paper"])
def test_a_backbone_that_ships_is_of_the_published_protocol(name: str, preset: str) -> None:
    flags = ["--task", "vqav2", "--preset", preset, "--backbone", str(PAGE.parents[1] / name)]
    options = parse(RunConfig(), "", flags).backbone
    backbone = open_backbone(**options.loading())
    for key in ("visual_position_bias", "object_order", "visual_norm", "image_fit"):
        assert getattr(backbone, key) in (getattr(options, key), None)


def test_a_ready_made_model_has_no_such_protocol() -> None:
    with pytest.raises(ValueError, match="x/blip2"):
        parse(RunConfig(), "", ["--task", "gqa", "--preset", "vl-adapter", "--model", "x/blip2"])


def test_an_epoch_is_the_steps_between_evaluations() -> None:
    examples = {"vqav2": 605_102, "gqa": 943_000 + 132_062, "nlvr2": 86_373, "coco": 566_747}
    for task, count in examples.items():
        values = VL_ADAPTER[task]
        assert values["eval_every"] == -(-count // values["per_device_batch_size"])


def test_depts_own_row_is_within_the_budget_beside_the_projection() -> None:
    # CLIP-T5: 2,048 values of RN101 to T5-base, whose 222.9M parameters are frozen; published: 0.74%.
    projection = VisualProjection(2048, D_MODEL, nn.LayerNorm(D_MODEL, bias=False))
    visual = sum(parameter.numel() for parameter in projection.parameters())
    for task in ("vqav2", "coco"):
        sizes = {"d_model": D_MODEL, "max_source_length": PAPER[task]["max_source_length"]}
        solved = METHODS["dept"].solve(reference_prompt_length=REFERENCE, prompt_length=60, **sizes)
        assert solved == (OWN_ROW["prompt_length"], OWN_ROW["rank"])
        prompt = build(sized("dept", **sizes, prompt_length=60, rank=OWN_ROW["rank"]))
        trained = sum(parameter.numel() for parameter in prompt.parameters())
        assert 0.98 * BUDGET < trained <= BUDGET
        assert 100 * (visual + trained) / (222_903_552 + visual + trained) == pytest.approx(0.74, abs=0.005)


def test_every_update_sees_32_examples() -> None:
    sizes = {PAPER[t]["per_device_batch_size"] * PAPER[t]["gradient_accumulation_steps"] for t in TEXT}
    assert sizes == {32}


def test_multirc_alone_is_over_the_budget() -> None:
    used = {
        task: sized(
            "dept",
            d_model=D_MODEL,
            max_source_length=PAPER[task]["max_source_length"],
            prompt_length=PAPER[task]["prompt_length"],
            rank=PAPER[task]["rank"],
        ).parameter_count()
        for task in TEXT
    }
    assert {task: count for task, count in used.items() if count > BUDGET} == {"multirc": 79_560}
    assert {count for task, count in used.items() if task != "multirc"} == {BUDGET}


@pytest.mark.parametrize("task", TABLE)
def test_the_solver_gives_the_published_rank_where_that_keeps_the_budget(task: str) -> None:
    preset = PAPER[task]
    solved = METHODS["dept"].solve(
        d_model=D_MODEL,
        max_source_length=preset["max_source_length"],
        reference_prompt_length=REFERENCE,
        prompt_length=preset["prompt_length"],
    )
    assert solved == (preset["prompt_length"], 27 if task == "multirc" else preset["rank"])
