"""Flags over a configuration file over defaults."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dept_vl._utils.errors import UsageError
from dept_vl.cli import parse
from dept_vl.config import (
    BackboneOptions,
    DataOptions,
    OptimOptions,
    PromptOptions,
    RunConfig,
    TrainOptions,
    differences,
    read_config,
    to_json,
)

SHIPPED = sorted((Path(__file__).parents[2] / "data" / "configs").glob("*.json"))


def write(path: Path, content: Any) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def parsed(*flags: str, defaults: RunConfig | None = None) -> RunConfig:
    return parse(defaults or RunConfig(), "Train.", flags)


def test_no_flags_give_the_defaults() -> None:
    assert parsed() == RunConfig()
    defaults = RunConfig(train=TrainOptions(max_steps=7), mixed_precision="bf16")
    assert parsed(defaults=defaults) == defaults


def test_flags_are_flat(tmp_path: Path) -> None:
    config = parsed(
        *["--data_dir", str(tmp_path), "--language", "google-t5/t5-base", "--prompt_length", "9"],
        *["--rank", "3", "--max_steps", "12", "--offset_lr", "0.5", "--no-backbone_dropout"],
        *["--output_dir", "runs/x", "--log_with", "tensorboard", "--prompt_init", "text"],
    )
    assert config.data == DataOptions(data_dir=tmp_path)
    assert config.backbone == BackboneOptions(language="google-t5/t5-base", backbone_dropout=False)
    assert config.prompt == PromptOptions(prompt_length=9, rank=3, prompt_init="text")
    assert config.train == TrainOptions(max_steps=12)
    assert (config.optim.offset_lr, config.optim.prompt_lr) == (0.5, 0.3)
    assert (config.output_dir, config.log_with) == (Path("runs/x"), "tensorboard")


def test_flags_override_the_file_which_overrides_the_defaults(tmp_path: Path) -> None:
    file = write(
        tmp_path / "config.json",
        {"optim": {"prompt_lr": 0.05, "offset_lr": 0.02}, "data": {"data_dir": str(tmp_path)}},
    )
    flags = ["--prompt_lr", "0.7", "--config", str(file), "--seed", "3"]
    config = parsed(*flags, defaults=RunConfig(train=TrainOptions(max_steps=7)))
    assert config.optim.prompt_lr == 0.7
    assert config.optim.offset_lr == 0.02
    assert config.optim.projection_lr == 1e-3
    assert config.data.data_dir == tmp_path
    # The file stands for the script's defaults; what it leaves out is as usual.
    assert (config.train.max_steps, config.train.seed) == (TrainOptions().max_steps, 3)


OLDER = Path(__file__).parents[1] / "fixtures" / "before_offset" / "config.json"


def test_an_older_configuration_is_read(tmp_path: Path) -> None:
    stored = json.loads(OLDER.read_text())
    assert {"lora_lr", "lora_weight_decay"} <= stored["optim"].keys()
    config = read_config(OLDER)
    assert config == RunConfig(
        data=DataOptions(task="rte", train_split="train", dev_split="", test_split=""),
        optim=OptimOptions(offset_lr=0.02, offset_weight_decay=0.5),
    )
    assert config.data.splits() == DataOptions(task="rte").splits()
    assert parsed("--config", str(OLDER), "--offset_lr", "0.1").optim.offset_lr == 0.1
    assert differences(stored, to_json(config)) == []
    changed = replace(config, optim=replace(config.optim, offset_lr=0.1))
    assert differences(stored, to_json(changed)) == ["optim.offset_lr=0.02 -> 0.1"]
    assert stored["tune"] == 0  # no search, which earlier versions had
    with pytest.raises(UsageError, match="tune is 20"):
        read_config(write(tmp_path / "config.json", stored | {"tune": 20}))


def test_models_that_an_older_run_joined_are_joined_as_then(tmp_path: Path) -> None:
    stored = json.loads(OLDER.read_text())
    stored["backbone"] |= {"vision": "x/clip", "language": "x/t5"}
    older = read_config(write(tmp_path / "config.json", stored)).backbone
    assert (older.object_order, older.visual_norm, older.image_fit) == ("none", "twice", "own")
    assert differences(stored, to_json(read_config(tmp_path / "config.json"))) == []
    new = read_config(write(tmp_path / "new.json", {"backbone": {"vision": "x/clip", "language": "x/t5"}}))
    assert (new.backbone.object_order, new.backbone.visual_norm) == ("auto", "auto")
    assert new.backbone.loading()["object_order"] is None
    assert new.backbone.loading()["image_fit"] is None


def test_an_old_name_beside_the_new_one_is_named(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"optim": {"offset_lr": 0.001, "lora_lr": 0.5}}))
    with pytest.raises(UsageError, match="lora_lr is the old name of offset_lr"):
        read_config(path)


@pytest.mark.parametrize("flags", [["--lora_lr", "0.5"], ["--lora_lr=0.5"], ["--lora-lr", "0.5"]])
def test_the_older_name_of_a_flag_is_taken_with_a_note(
    flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert parsed(*flags, "--lora_rank", "2").optim == OptimOptions(offset_lr=0.5)
    assert parsed("--lora_weight_decay", "0.25").optim == OptimOptions(offset_weight_decay=0.25)
    printed = capsys.readouterr().err
    assert "--offset_lr" in printed
    assert "--offset_weight_decay" in printed
    assert "rank" not in printed


def test_an_unknown_method_is_named_with_the_closest(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="closest: adept"):
        parsed("--method", "adpt")
    file = write(tmp_path / "config.json", {"prompt": {"method": "lptt"}})
    with pytest.raises(UsageError, match=r"prompt\.method: unknown method 'lptt'; .*closest: "):
        read_config(file)


def test_a_flag_can_take_the_file_back_to_nothing(tmp_path: Path) -> None:
    file = write(tmp_path / "config.json", {"prompt": {"rank": 4}, "log_with": "wandb"})
    config = parsed("--config", str(file), "--rank", "None", "--log_with", "None")
    assert (config.prompt.rank, config.log_with) == (None, None)


def test_a_written_configuration_reads_as_itself(tmp_path: Path) -> None:
    config = RunConfig(
        data=DataOptions(data_dir=tmp_path, feature_memory=0.5),
        backbone=BackboneOptions(backbone=tmp_path / "backbone", train_projection=False),
        prompt=PromptOptions(rank=3, init_text="a red circle", prompt_init="text"),
        train=TrainOptions(seed=7),
        output_dir=tmp_path / "out",
    )
    file = write(tmp_path / "config.json", to_json(config))
    # A repeated run gets a folder of its own.
    assert read_config(file) == replace(config, output_dir=None)
    assert parsed("--config", str(file)) == replace(config, output_dir=None)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_shipped_configurations_say_what_differs_from_the_defaults(path: Path) -> None:
    defaults, read = to_json(RunConfig()), to_json(read_config(path))
    content = json.loads(path.read_text())
    for part, options in content.items():
        if part != "also":
            assert {name: read[part][name] for name in options} == options
            repeated = {name for name, value in options.items() if defaults[part][name] == value}
            assert repeated <= {"task"}


def test_there_is_a_shipped_configuration() -> None:
    assert "easy-vqa.json" in [path.name for path in SHIPPED]


def test_unknown_option_in_the_file_is_named(tmp_path: Path) -> None:
    file = write(tmp_path / "config.json", {"train": {"max_step": 3}})
    with pytest.raises(ValueError, match=r"unknown option train\.max_step;.*; closest: max_steps") as error:
        parsed("--config", str(file))
    assert str(file) in str(error.value)
    file = write(tmp_path / "config.json", {"trian": {}})
    with pytest.raises(ValueError, match=r"unknown option trian;.*; closest: train"):
        parsed("--config", str(file))


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no configuration at") as error:
        parsed("--config", str(tmp_path / "nowhere.json"))
    assert "nowhere.json" in str(error.value)


@pytest.mark.parametrize("content", ['{"train": {"max_steps": 3}', "", "max_steps: 3"])
def test_bad_json_is_named(tmp_path: Path, content: str) -> None:
    file = write(tmp_path / "config.json", content)
    with pytest.raises(ValueError, match="is not valid JSON") as error:
        parsed("--config", str(file))
    assert str(file) in str(error.value)


@pytest.mark.parametrize("content", ["[]", "3", '{"train": 3}', '{"train": null}'])
def test_json_of_something_else_is_refused(tmp_path: Path, content: str) -> None:
    with pytest.raises(ValueError, match="expected an object with the options of"):
        parsed("--config", str(write(tmp_path / "config.json", content)))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"train": {"max_steps": "many"}}, "max_steps is 'many'; expected a valid integer"),
        (
            {"prompt": {"prompt_init": "banana"}},
            "prompt_init is 'banana'; expected .*'vocabulary', 'text' or 'random'",
        ),
        ({"prompt": {"rank": 2.5}}, r"rank is 2\.5; expected a valid integer"),
        ({"backbone": {"class_token": 1}}, "class_token is 1; expected a valid boolean"),
        ({"data": {"data_dir": 3}}, "data_dir is 3; expected a valid string"),
        ({"mixed_precision": "fp16"}, "mixed_precision is 'fp16'; expected .*'no' or 'bf16'"),
    ],
)
def test_a_value_of_another_kind_is_named(tmp_path: Path, content: Any, message: str) -> None:
    file = write(tmp_path / "config.json", content)
    with pytest.raises(ValueError, match=message) as error:
        parsed("--config", str(file))
    assert str(file) in str(error.value)


def test_whole_numbers_do_for_fractions(tmp_path: Path) -> None:
    file = write(tmp_path / "config.json", {"optim": {"prompt_lr": 1}, "data": {"feature_memory": 0}})
    config = parsed("--config", str(file))
    assert (config.optim.prompt_lr, config.data.feature_memory) == (1, 0)


def test_help_shows_what_options_mean_in_which_unit(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parsed("--help")
    assert stop.value.code == 0
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for part in ("--prompt_lr", "--max_source_length", "0.3", "GiB", "tokens", "optim", "--config FILE"):
        assert part in shown


@pytest.mark.parametrize(
    "flags", [["--prompt_lrr", "1"], ["--max_steps", "many"], ["--prompt_init", "banana"]]
)
def test_bad_flags_end_with_a_message(capsys: pytest.CaptureFixture[str], flags: list[str]) -> None:
    with pytest.raises(UsageError, match=flags[0]):
        parsed(*flags)
    assert capsys.readouterr() == ("", "")


def test_importing_the_package_loads_nothing_heavy_and_prints_nothing() -> None:
    code = (
        "import sys; before = set(sys.modules); import dept_vl; "
        "heavy = {'torch', 'transformers', 'accelerate', 'PIL', 'numpy'} & (set(sys.modules) - before); "
        "assert not heavy, heavy; assert dept_vl.__version__"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
