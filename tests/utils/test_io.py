"""Our own files, read with care, and what was let through before."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

import pytest
import torch
from helpers import write_vqa
from pydantic.fields import FieldInfo
from runs import forget_checksums
from safetensors.torch import save_file
from torch import nn

from dept_vl._utils import io as files
from dept_vl._utils.errors import DamagedFileError
from dept_vl._utils.io import one_line, read_json, read_object, remove_noted, write_noted
from dept_vl._utils.options import check
from dept_vl._utils.tensors import check_parameters, load_exactly, read_tensors
from dept_vl.adapters import authors
from dept_vl.adapters.adapter import ADAPTER_FILE, TENSORS_FILE, Adapter
from dept_vl.config import (
    BackboneOptions,
    DataOptions,
    EvaluateConfig,
    OptimOptions,
    PromptOptions,
    RunConfig,
    TrainOptions,
    read_config,
    validate,
)
from dept_vl.tasks import nlvr2
from dept_vl.tasks.gqa import read_choices
from dept_vl.tasks.vqav2 import VQAv2, read_rows
from dept_vl.training.options import ExtractConfig
from dept_vl.training.run import run

# JSON


@dataclass
class Pair:
    a: int
    b: list[float]


@dataclass
class Lone:
    b: int


def test_a_good_file_is_read(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text('{"a": 1, "b": [2.5, 3]}')
    assert read_json(tmp_path / "x.json") == {"a": 1, "b": [2.5, 3]}
    (tmp_path / "notepad.json").write_text('{"a": 1}', encoding="utf-8-sig")
    assert read_json(tmp_path / "notepad.json") == {"a": 1}
    assert read_object(tmp_path / "x.json", Pair) == {"a": 1, "b": [2.5, 3]}
    with pytest.raises(
        ValueError, match=r"x\.json is damaged: b is \[2.5, 3\]; .*; unknown field a; there are: b"
    ):
        read_object(tmp_path / "x.json", Lone)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[" * 100_000, b"9" * 5000, b"\x00"])
def test_bad_json_is_one_line_with_the_path(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(ValueError, match="is damaged: it is not valid JSON") as error:
        read_json(tmp_path / "x.json")
    assert str(error.value).startswith(str(tmp_path / "x.json"))
    assert "\n" not in str(error.value)
    assert ("more than 200 lists and objects in each other" in str(error.value)) == (content[:2] == b"[[")


def test_a_key_twice_is_damage_to_our_own_files(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text('{"a": 1, "b": {"c": [1], "c": [1]}}')
    with pytest.raises(DamagedFileError, match=r"config\.json .*'c' stands twice"):
        read_json(path)
    assert read_json(path, json.loads) == {"a": 1, "b": {"c": [1]}}
    path.write_text('{"a": 1, "b": {"a": [1]}}')
    assert read_json(path) == json.loads(path.read_text())


def test_missing_and_overlong_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError, match=r"x\.json"):
        read_json(tmp_path / "x.json")
    monkeypatch.setattr(files, "LONGEST_JSON", 10)
    (tmp_path / "x.json").write_text('"123456789"')
    with pytest.raises(ValueError, match="at most 10 bytes, found 11"):
        read_json(tmp_path / "x.json")


@pytest.mark.parametrize(
    ("found", "kind", "problem"),
    [
        (1, int, ""),
        (True, int, "the content is True; expected a valid integer"),
        (1.0, int, "is 1.0; expected a valid integer"),
        (1, float, ""),
        (True, float, "is True; expected a valid number"),
        (float("nan"), float, "is nan; expected a finite number"),
        (float("-inf"), float, "is -inf; expected a finite number"),
        (10**400, float, "expected a finite number"),
        ("x", str, ""),
        (None, str, "is None; expected a valid string"),
        ({"a": 1, "b": []}, Pair, ""),
        ({"b": []}, Pair, "a is missing"),
        ({"a": 1, "b": [], "c": 2}, Pair, "unknown field c; there are: a, b"),
        ({"a": {"a": "x", "b": []}}, dict[str, Pair], "a.a is 'x'; expected a valid integer"),
        ([], Pair, "is \\[\\]; expected an object"),
        ({"any": 1}, dict[str, int], ""),
        ({"a\nb": "x"}, dict[str, int], r"'a\\nb' is 'x'"),
        ([1, "x"], list[int], r"\[1\] is 'x'; expected a valid integer"),
        ({}, list[int], "is {}; expected a valid array"),
        (None, Pair | None, ""),
        ({"a": "x", "b": []}, Pair | None, "a is 'x'; expected a valid integer"),
        ({"a": 1, "b": [], "c": 2}, Pair | None, "unknown field c"),
        (3, Pair | None, "is 3; expected an object"),
        ("none", Literal["none", "relative"], ""),
        ("x", Literal["none", "relative"], "expected 'none' or 'relative'"),
        (2, Literal[1], "is 2; expected 1"),
    ],
)
def test_fields_are_checked(found: Any, kind: Any, problem: str) -> None:
    if not problem:
        check(found, kind)
    else:
        with pytest.raises(ValueError, match=problem):
            check(found, kind)


# Tensors


def test_tensors_that_no_training_leaves(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    check_parameters({"a": torch.ones(2), "b": torch.ones(2, dtype=torch.bfloat16)}, path)
    with pytest.raises(ValueError, match=r"finite values in 'a', found 1 of 2"):
        check_parameters({"a": torch.tensor([1.0, float("inf")])}, path)
    for dtype in (torch.int64, torch.bool, torch.float8_e4m3fn, torch.complex64):
        with pytest.raises(ValueError, match=f"has dtype {dtype}"):
            check_parameters({"a": torch.zeros(2).to(dtype)}, path)


def test_damaged_tensors(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    with pytest.raises(FileNotFoundError, match=r"x\.safetensors"):
        read_tensors(path)
    save_file({"a": torch.ones(2)}, path)
    assert read_tensors(path)["a"].tolist() == [1, 1]
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"x\.safetensors is damaged"):
        read_tensors(path)


def test_only_the_parameters_of_a_module_go_into_it() -> None:
    module = nn.Linear(2, 1)
    load_exactly(module, {"weight": torch.ones(1, 2), "bias": torch.ones(1)}, "its")
    assert module.weight.tolist() == [[1, 1]]
    with pytest.raises(ValueError, match=r"p\.weight: expected \(1, 2\), found \(2, 2\)"):
        load_exactly(module, {"weight": torch.ones(2, 2), "bias": torch.ones(1)}, "its", "p.")
    with pytest.raises(ValueError, match=r"missing \['bias'\], extra \['x'\]"):
        load_exactly(module, {"weight": torch.ones(1, 2), "x": torch.ones(1)}, "its")


# Adapters


def adapter() -> Adapter:
    return Adapter(
        prompt={
            **{"prompt_length": 2, "rank": 4, "max_source_length": 5, "d_model": 8},
            **{"alpha": 8.0, "scale": 4.0},
        },
        backbone={"name": "tiny", "fingerprint": {"language": "0"}, "visual_position_bias": "none"},
        task="vqav2",
        metrics={"overall": 61.5},
        trainable_parameters={"prompt": 16, "low_rank": 52, "total": 68, "without_projection": 68},
        tensors={
            "prompt.soft_prompt": torch.ones(2, 8),
            "prompt.offset_a": torch.ones(5, 4),
            "prompt.offset_b": torch.ones(4, 8),
            "visual_projection.linear.bias": torch.ones(3),
        },
    )


def test_a_frozen_projection_is_not_counted(tmp_path: Path) -> None:
    adapter().save(tmp_path)
    assert Adapter.load(tmp_path).trainable_parameters["total"] == 68


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        ("prompt_length", 10**9, "prompt_length is 1000000000; expected at most 1,000,000"),
        ("prompt_length", -1, "prompt_length is -1; expected 0 or more"),
        ("d_model", 0, "d_model is 0; expected 1 or more"),
        ("prompt_length", 900_000, r"by its sizes the prompt has the tensors .*\(900000, 8\)"),
        ("max_source_length", 6, r"\(6, 4\)"),
        ("alpha", float("nan"), r"prompt\.alpha is nan; expected a finite number"),
        ("scale", 3.0, r"prompt\.scale to be 4\.0, found 3\.0"),
        ("rank", True, r"prompt\.rank is True; expected a valid integer"),
    ],
)
def test_sizes_of_an_adapter_are_those_of_its_tensors(
    tmp_path: Path, part: str, value: object, message: str
) -> None:
    good = adapter()
    assert good.prompt is not None
    replace(good, prompt=good.prompt | {part: value}).save(tmp_path)
    with pytest.raises(ValueError, match=message) as error:
        Adapter.load(tmp_path)
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"task": None}, "task is None; expected a valid string"),
        ({"metrics": {"overall": "high"}}, r"metrics\.overall is 'high'; expected a valid number"),
        ({"metrics": {"overall": float("inf")}}, "is inf; expected a finite number"),
        (
            {"backbone": {"name": "tiny"}},
            r"backbone\.visual_position_bias is missing; backbone\.fingerprint is missing",
        ),
        ({"trainable_parameters": {"total": 7}}, "have .* parameters, and trainable_parameters says"),
        ({"tensors": {"head.weight": torch.ones(1)}}, r"alone, found \['head\.weight'\]"),
        ({"tensors": {}}, "by its sizes the prompt has the tensors"),
        (
            {"tensors": {"prompt.offset_a": torch.tensor([float("nan")])}},
            "finite values in 'prompt.offset_a'",
        ),
        ({"tensors": {"prompt.offset_a": torch.tensor([1])}}, "has dtype torch.int64"),
    ],
)
def test_descriptions_that_say_something_else(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    adapter().save(tmp_path)
    forget_checksums(tmp_path)
    if "tensors" in change:
        save_file(change["tensors"], tmp_path / TENSORS_FILE)
    else:
        description = json.loads((tmp_path / ADAPTER_FILE).read_text())
        (tmp_path / ADAPTER_FILE).write_text(json.dumps(description | change))
    with pytest.raises(ValueError, match=message) as error:
        Adapter.load(tmp_path)
    assert str(tmp_path) in str(error.value)


def test_a_pickle_of_a_few_bytes_spread_over_a_large_tensor(tmp_path: Path) -> None:
    sizes = {"num_virtual_tokens": 900_000, "token_dim": 900_000, "max_length": 5, "r": 4, "lora_alpha": 8}
    config = authors.DEFAULTS | sizes | {"base_model_name_or_path": "t5"}
    (tmp_path / authors.CONFIG_FILE).write_text(json.dumps(config))
    tensors = {"prompt_embeddings": torch.ones(1).expand(900_000, 900_000)}
    torch.save(tensors, tmp_path / authors.TENSORS_FILE)
    with pytest.raises(ValueError, match="tensors no larger than the file"):
        authors.read(tmp_path, prompt_only=True)


@pytest.mark.parametrize("change", [{"lora_alpha": 10**400}, {"r": True}, {"max_length": 10**9}])
def test_sizes_in_the_authors_files(tmp_path: Path, change: dict[str, Any]) -> None:
    sizes = {"num_virtual_tokens": 2, "token_dim": 8, "max_length": 5, "r": 4, "lora_alpha": 8}
    config = authors.DEFAULTS | sizes | {"base_model_name_or_path": "t5"} | change
    (tmp_path / authors.CONFIG_FILE).write_text(json.dumps(config))
    (tmp_path / authors.TENSORS_FILE).write_bytes(b"")
    with pytest.raises(ValueError, match=f"{next(iter(change))} is .*; expected"):
        authors.read(tmp_path)


# Options


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            RunConfig(train=TrainOptions(max_steps=-1)),
            r"train\.max_steps is -1; expected 1 or more",
        ),
        (RunConfig(train=TrainOptions(per_device_batch_size=0)), r"per_device_batch_size is 0"),
        (RunConfig(train=TrainOptions(eval_every=0)), r"eval_every is 0"),
        (RunConfig(train=TrainOptions(seed=-1)), r"train\.seed is -1; expected 0 or more"),
        (RunConfig(train=TrainOptions(seed=2**32)), r"train\.seed .*; expected at most 4,294,967,295"),
        (RunConfig(train=TrainOptions(max_grad_norm=0.0)), r"max_grad_norm"),
        (RunConfig(prompt=PromptOptions(alpha=float("nan"))), r"prompt\.alpha is nan; expected a finite"),
        (RunConfig(prompt=PromptOptions(rank=-2)), r"prompt\.rank is -2; expected 0 or more"),
        (
            RunConfig(optim=OptimOptions(offset_lr=float("inf"))),
            r"offset_lr is inf; expected a finite number",
        ),
        (RunConfig(data=DataOptions(data_dir=Path("a\0b"))), r"data_dir is 'a\\x00b'; expected text without"),
        (RunConfig(also=(DataOptions(dev_limit=-3),)), r"also\[0\]\.dev_limit is -3"),
    ],
)
def test_an_option_out_of_range_is_named(config: RunConfig, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        validate(config)
    with pytest.raises(ValueError, match=message):
        run(config)


def test_all_options_out_of_range_are_named_at_once(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"train": {"max_steps": 0, "seed": -1}}')
    with pytest.raises(ValueError, match=r"config\.json: train\.max_steps is 0.*; train\.seed is -1"):
        read_config(tmp_path / "config.json")


def test_an_integer_too_large_for_a_fraction(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"optim": {"offset_lr": 1' + "0" * 400 + "}}")
    with pytest.raises(ValueError, match=r"offset_lr is .*; expected a finite number"):
        read_config(tmp_path / "config.json")


def test_defaults_are_in_range() -> None:
    validate(RunConfig(also=(DataOptions(),)))


def test_every_number_has_a_range() -> None:
    kinds = (RunConfig, DataOptions, BackboneOptions, PromptOptions, TrainOptions, OptimOptions)
    for kind in (*kinds, ExtractConfig, EvaluateConfig):
        for name, hint in get_type_hints(kind, include_extras=True).items():
            parts = [hint, *get_args(hint)]  # of Size | None
            if int in parts or float in parts:
                assert any(isinstance(mark, FieldInfo) for part in parts for mark in get_args(part)), name


# Others


def test_choices_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "c.json").write_text('{"1": {"valid": [["yes"]], "plausible": []}}')
    with pytest.raises(ValueError, match=r"c\.json, question '1': expected answers of text"):
        read_choices(tmp_path / "c.json")


def test_an_id_of_more_than_64_bits(tmp_path: Path) -> None:
    write_vqa(tmp_path, images=2)
    (tmp_path / "minival.json").write_text('[{"question_id": 9999999999999999999999}]')
    with pytest.raises(ValueError, match=r"minival\.json: the file is cut short or damaged.*overflow"):
        VQAv2().load(tmp_path, "minival")


def test_a_long_value_does_not_make_a_long_message(tmp_path: Path) -> None:
    (tmp_path / "q.json").write_text(json.dumps({"questions": [{"question_id": "x" * 9999}]}))
    with pytest.raises(ValueError, match="expected 'question_id' to be int") as error:
        read_rows(tmp_path / "q.json", None)
    assert len(str(error.value)) < 500
    assert len(one_line(ValueError("x\n" * 9999))) == 300


def test_an_identifier_that_cannot_be_printed(tmp_path: Path) -> None:
    row = {"identifier": "dev-\ud800-0-0", "sentence": "x", "label": "maybe"}
    (tmp_path / "dev.json").write_text(json.dumps(row))
    with pytest.raises(ValueError, match=r"dev-\\ud800-0-0") as error:
        nlvr2.read_rows(tmp_path / "dev.json")
    str(error.value).encode()


def test_removing_the_last_noted_file_leaves_nothing(tmp_path: Path) -> None:
    write_noted(tmp_path, {"a": b"1", "b": b"2"})
    remove_noted(tmp_path, "a")
    assert {path.name for path in tmp_path.iterdir()} == {"b", ".checksums.json"}
    remove_noted(tmp_path, "b")
    assert list(tmp_path.iterdir()) == []
