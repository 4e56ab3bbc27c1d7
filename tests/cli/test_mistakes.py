"""Mistakes of users end every command with one line and a status, and bugs keep their traceback."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from runs import reset_accelerate

from dept_vl import cli
from dept_vl._utils import errors
from dept_vl._utils.errors import UsageError, exit_status, is_user_error
from dept_vl.config import DataOptions, RunConfig, read_config, to_json
from dept_vl.training.run import run
from scripts import compare, train_gqa, transfer_suite
from study_data.commands import COMMANDS

pytestmark = pytest.mark.usefixtures("fresh_accelerate")
ROOT = Path(__file__).parents[2]
END = Callable[..., tuple[int, str]]


@pytest.fixture(scope="module")
def world(
    scenes: Path,
    language_folders: dict[str, Path],
    vision_folders: dict[str, Path],
    make_run: Callable[..., RunConfig],
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Path]:
    """Good and bad files by name: data, models, a finished run, configurations."""
    root = tmp_path_factory.mktemp("mistakes")
    config = make_run(DataOptions(data_dir=scenes / "vqav2", dev_split="val", test_limit=4), max_steps=1)
    reset_accelerate()
    run(replace(config, output_dir=root / "run"))
    files = {
        "config": json.dumps(to_json(config)),
        "damaged": '{"train": ',
        "unknown": '{"train": {"max_stepz": 3}}',
        "typed": '{"train": {"max_steps": "many"}}',
        "list": "[1]",
        "predictions": "[]",
    }
    for name, content in files.items():
        (root / f"{name}.json").write_text(content)
    (root / "empty").mkdir()
    shutil.copytree(root / "run", root / "cut")
    (root / "cut" / "best" / "adapter.safetensors").write_bytes(b"no tensors")
    shutil.copytree(root / "run", root / "unfinished")
    (root / "unfinished" / "summary.json").unlink()
    shutil.copytree(scenes / "vqav2", root / "broken")
    for path in (root / "broken").glob("*questions.json"):
        path.write_text(path.read_text()[:200])
    (root / "loop").symlink_to(root / "loop")
    asked = next((scenes / "vqav2").glob("*val2014_questions.json"))
    answered = next((scenes / "vqav2").glob("*val2014_annotations.json"))
    folders = {"data": scenes, "t5": language_folders["t5"], "clip": vision_folders["clip"]}
    return folders | {"root": root, "asked": asked, "answered": answered}


@pytest.fixture
def end(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> END:
    """Run a command; returns its status and what it printed on stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(errors, "MAIN_FIRST", 0.0)

    def call(command: Callable[[list[str]], object], arguments: list[str]) -> tuple[int, str]:
        capsys.readouterr()
        status = exit_status(command, arguments)
        return status, capsys.readouterr().err

    return call


MODELS = "--vision {clip} --language {t5} --prompt_length 3 --rank 2 --reference_prompt_length 6"
TRAIN = f"train {MODELS} --max_steps 1"
SCORE = "--questions {asked} --annotations {answered}"
MISTAKES = {
    # The command and its flags -> the status, and a word of the message.
    "": (2, "a command is missing"),
    "trian": (2, "closest: train"),
    "train --prompt_lrr 1": (2, "closest: --prompt_lr"),
    "train --task vqav": (2, "closest: vqav2"),
    "train --method dpt": (2, "closest: dept"),
    "train --max_steps many": (2, "--max_steps"),
    "train --max_steps 0": (2, "train.max_steps is 0"),
    "train --prompt_length -1": (2, "prompt.prompt_length is -1"),
    "train --seed": (2, "--seed"),
    "train --preset papr": (2, "unknown preset 'papr'"),
    "train --task gqa --preset paper": (1, "no hyper-parameters for 'gqa'"),
    "train --config nowhere.json": (1, "nowhere.json"),
    "train --config {root}/damaged.json": (1, "damaged.json"),
    "train --config {root}/unknown.json": (2, "closest: max_steps"),
    "train --config {root}/typed.json": (2, "train.max_steps is 'many'"),
    "train --config {root}/list.json": (2, "expected an object"),
    "train --config": (2, "--config"),
    "train": (1, "data/vqav2"),
    "train --data_dir nowhere": (1, "nowhere"),
    "train --data_dir {data}/vqav2 --backbone nowhere": (1, "nowhere"),
    "train --data_dir {data}/vqav2 --vision {clip} --language ./nowhere": (1, "nowhere"),
    "train --data_dir {data}/vqav2 --init_from nowhere": (1, "nowhere"),
    "train --data_dir {data}/vqav2 --dev_split val": (1, "backbone"),
    f"{TRAIN} --data_dir {{root}}/empty": (1, "empty"),
    f"{TRAIN} --data_dir {{root}}/broken": (1, "questions.json"),
    f"{TRAIN} --data_dir {{data}}/vqav2 --train_split trian": (1, "'trian'"),
    f"{TRAIN} --data_dir {{data}}/vqav2 --output_dir {{root}}/run": (1, "already holds a run"),
    f"{TRAIN} --data_dir {{data}}/vqav2 --output_dir {{root}}/loop": (1, "loop"),
    f"{TRAIN} --data_dir {{data}}/vqav2 --output_dir {{root}}/run/more": (1, "inside the folder of the run"),
    f"{TRAIN} --data_dir {{data}}/vqav2 --images {{data}}": (2, "your own data (--images)"),
    f"{TRAIN} --data_dir {{data}}/vqav2 --split_seed 1 --turns all": (2, "(--turns, --split_seed)"),
    f"{TRAIN} --task vqa --images {{data}}": (
        1,
        "data/vqa with the data of vqa; give --data_dir (see dept-vl data), or --data FILE",
    ),
    f"{TRAIN} --data_dir {{data}}/vqav2 --log_with wandbb": (1, "wandbb"),
    f"{TRAIN} --data_dir {{data}}/vqav2 --dev_split val --features cached": (1, "features"),
    f"{TRAIN} --data_dir {{data}}/vqav2 --output_dir {{root}}/list.json/run": (1, "list.json"),
    "train --resume nowhere": (1, "nowhere"),
    "train --resume auto --data_dir {data}/vqav2": (1, "--output_dir"),
    "evaluate": (2, "--run"),
    "evaluate --run nowhere": (1, "nowhere"),
    "evaluate --run {root}/run --task gqaa": (2, "closest: gqa"),
    "evaluate --run {root}/run --split vall --output_dir out": (1, "'vall'"),
    "evaluate --run {root}/run --output_dir {root}/run": (1, "already holds predictions"),
    "evaluate --run {root}/run --adapter nowhere": (1, "nowhere"),
    "evaluate --run {root}/run --images {data} --output_dir out": (2, "your own data (--images)"),
    "evaluate --run {root}/run --limit -1": (2, "limit is -1"),
    "evaluate --run {root}/cut --output_dir out": (1, "adapter.safetensors"),
    "predict": (2, "--adapter"),
    "predict x.jpg what --adapter ./nowhere": (1, "nowhere"),
    "predict x.jpg what --adapter {root}/run --device cpu": (1, "x.jpg"),
    "predict x.jpg --adapter {root}/run --device cpu": (2, "vqav2 needs IMAGE"),
    "predict x.jpg what --adapter {root}/run --task vqa2": (2, "closest: vqav2"),
    "predict x.jpg what --adapter {root}/empty": (1, "empty"),
    "features --vision {clip}": (1, "data/vqav2"),
    "features --vision {clip} --data_dir {data}/vqav2 --images {data}": (2, "your own data (--images)"),
    "features --vision {clip} --task sst2": (1, "sst2"),
    "features --vision {clip} --data_dir {data}/vqav2 --batch_size 0": (2, "batch_size is 0"),
    "data from-hubb": (2, "closest: from-hub"),
    "data check --task okvqa --root .": (2, "unknown task 'okvqa'"),
    "data check --task gqa --root nowhere": (1, "nowhere"),
    "data check --task vqav2 --root {data}/vqav2 --sheet s.png": (2, "--sheet: only for your own"),
    "data check --data {data}/vqav2 --root {data}": (2, "--root"),
    "data check --task vqav2 --root {data}/vqav2 --columns image=photo": (2, "--columns: only for your own"),
    "score vqa": (2, "closest: vqav2"),
    "score vqav2 --questions nowhere.json": (2, "--annotations"),
    f"score vqav2 {SCORE} --predictions nowhere.json": (1, "nowhere.json"),
    f"score vqav2 {SCORE} --predictions {{root}}/predictions.json": (1, "predictions.json"),
    f"score vqav2 {SCORE} --predictions {{root}}/damaged.json": (1, "damaged.json"),
    "transfer --source {root}/run": (2, "--target"),
    "transfer --source {root}/run --target vqa2": (2, "closest: vqav2"),
    "transfer --source {root}/run --target vqav2 --seeds 0": (2, "seeds is 0"),
    "transfer --source vqav2 --target gqa": (1, "--config"),
    "transfer --source {root}/run --target vqav2 --images {data}": (2, "--images: only for your own data"),
    "transfer --source {root}/run --target vqav2 --k 500": (1, "choose a smaller k"),
    "report --run nowhere": (1, "nowhere"),
    "report --run {root}/unfinished": (1, "summary.json"),
    "report": (2, "--run"),
    "demo": (2, "--adapters"),
    "demo --adapters ./nowhere": (1, "nowhere"),
    "demo --adapters {root}/run {root}/run": (1, "named twice"),
    "demo --adapters {root}/run --port 99999999": (2, "port is 99999999"),
    "serve": (2, "--adapters"),
    "serve --adapters ./nowhere": (1, "nowhere"),
    "serve --adapters {root}/run {root}/run": (1, "named twice"),
    "serve --adapters {root}/run --timeout 0": (2, "timeout is 0"),
    "serve --adapters {root}/run --token_file nowhere.txt": (1, "nowhere.txt"),
}


@pytest.mark.parametrize("line", MISTAKES)
def test_a_mistake_ends_in_one_line(line: str, world: dict[str, Path], end: END) -> None:
    expected, word = MISTAKES[line]
    arguments = [part.format(**world) for part in line.split()]
    status, said = _main(end, arguments)
    assert status == expected, said
    message = said.splitlines()[-1]
    assert message.startswith("dept-vl: error: ")
    assert word in message
    assert said.count("dept-vl: error") == 1
    assert "Traceback" not in said


def _main(end: END, arguments: list[str]) -> tuple[int, str]:
    return end(partial(cli.choose, cli.COMMANDS, "dept-vl", ""), arguments)


@pytest.mark.parametrize(
    ("command", "line", "status", "word"),
    [
        (compare.compare, "--methods dpt", 2, "closest: dept"),
        (compare.compare, "--tasks scenes-vqa", 2, "closest: scenes-vqav2"),
        (compare.compare, "--max_stepz 1", 2, "closest: --max_steps"),
        (compare.compare, "--tasks {tmp}/scenes-gqa.json --methods pt", 1, "/nowhere"),
        (transfer_suite.transfer_suite, "--targets many", 2, "unknown target 'many'"),
        (cli.check_submission, "vqa", 2, "closest: vqav2"),
        (partial(cli.data, further=COMMANDS), "easy-vqa --output_dir {tmp}", 1, "not to exist"),
    ],
)
def test_a_mistake_ends_in_one_line_in_scripts(
    command: Callable[[list[str]], object], line: str, status: int, word: str, end: END, tmp_path: Path
) -> None:
    without_data = read_config(ROOT / "data" / "configs" / "scenes-gqa.json")
    without_data = replace(without_data, data=replace(without_data.data, data_dir=tmp_path / "nowhere"))
    (tmp_path / "scenes-gqa.json").write_text(json.dumps(to_json(without_data)))
    ended, said = end(command, line.format(tmp=tmp_path).split())
    assert (ended, len(said.splitlines())) == (status, 1)
    assert word in said


def test_a_script_of_a_task_trains_no_other(world: dict[str, Path], end: END) -> None:
    command = partial(cli.train, defaults=train_gqa.DEFAULTS, tasks=["gqa"])
    status, said = end(command, ["--config", str(world["root"] / "config.json")])
    assert (status, len(said.splitlines())) == (2, 1)
    assert "'vqav2'" in said


def test_control_characters_of_strangers_are_escaped(end: END) -> None:
    def fails(_: list[str]) -> None:
        raise UsageError("a\x1b[31m red\nline \ud800")

    status, said = end(fails, [])
    assert (status, said) == (2, "dept-vl: error: a\\x1b[31m red line \\ud800\n")


def test_bugs_keep_their_traceback(end: END) -> None:
    def bug(_: list[str]) -> None:
        int("not raised on purpose")

    for command in (bug, lambda _: {}["missing"], lambda _: [*zip([1], [], strict=True)]):
        with pytest.raises((ValueError, KeyError)):
            end(command, [])


def test_an_error_is_the_users_if_we_raise_it() -> None:
    with pytest.raises(FileNotFoundError) as missing:
        read_config(Path("nowhere.json"))
    assert is_user_error(missing.value)
    with pytest.raises(ValueError, match="invalid literal") as library:
        int("x")
    assert not is_user_error(library.value)
    assert is_user_error(PermissionError(13, "Permission denied", "x"))
    assert not is_user_error(MemoryError())


@pytest.mark.parametrize("how", ["flag", "variable"])
def test_the_traceback_is_kept_where_it_is_asked_for(
    how: str, end: END, monkeypatch: pytest.MonkeyPatch
) -> None:
    if how == "variable":
        monkeypatch.setenv(errors.DEBUG_VARIABLE, "1")
    with pytest.raises(FileNotFoundError):
        end(cli.train, ["--data_dir", "nowhere", *(["--debug"] if how == "flag" else [])])


def test_of_several_processes_the_main_one_speaks(end: END, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    assert end(cli.train, ["--max_steps", "0"]) == (2, "")
    # What only this process knows is not lost.
    status, said = end(cli.train, ["--data_dir", "nowhere"])
    assert status == 1
    assert said.startswith("dept-vl: error (process 1): ")


def test_ctrl_c_before_training(end: END) -> None:
    def stopped(_: list[str]) -> None:
        raise KeyboardInterrupt

    assert end(stopped, []) == (130, "")


HEAVY = {"torch", "transformers", "accelerate", "datasets"}
FORKS = """
import io, json, os, runpy, sys, traceback
from contextlib import redirect_stderr, redirect_stdout
import dept_vl.cli
heavy, lines = json.loads(sys.stdin.read())

def one(program, arguments):
    said, errors, status = io.StringIO(), io.StringIO(), 0
    with redirect_stdout(said), redirect_stderr(errors):
        try:
            if program == "dept-vl":
                status = dept_vl.cli.main(arguments)
            else:
                sys.argv, sys.path[0] = [program, *arguments], os.path.dirname(program)
                runpy.run_path(program, run_name="__main__")
        except SystemExit as stop:
            status = stop.code
        except BaseException:
            traceback.print_exc()
    loaded = sorted(set(heavy) & set(sys.modules))
    return {"status": status, "said": said.getvalue(), "errors": errors.getvalue(), "loaded": loaded}

for program, *arguments in lines:
    reads, writes = os.pipe()
    if not os.fork():
        os.write(writes, json.dumps(one(program, arguments)).encode())
        os._exit(0)
    os.close(writes)
    print(open(reads).read())
    os.wait()
"""
"""Runs each line in a process of its own, forked from one that has loaded the command and no engine."""


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What each line said and loaded: help and errors of the command, help of every script."""
    lines = [["dept-vl", *line.split()] for line in QUICK]
    lines += [[str(ROOT / "scripts" / f"{name}.py"), "--help"] for name in HELPED]
    done = subprocess.run(
        [sys.executable, "-c", FORKS],
        input=json.dumps([sorted(HEAVY), lines]),
        capture_output=True,
        text=True,
        cwd=tmp_path_factory.mktemp("quick"),
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        check=True,
    )
    return dict(zip([*QUICK, *HELPED], map(json.loads, done.stdout.splitlines()), strict=True))


QUICK = (
    ["--help", "train --help", "train --prompt_lrr 1", "train", "train --config x", "train --method dpt"]
    + [f"{name} --help" for name in cli.COMMANDS if name != "train"]
    + ["evaluate --run x", "report --run x", "data check --task x --root x", "trian", "train --task gqq"]
)


@pytest.mark.parametrize("line", QUICK)
def test_help_and_quick_errors_load_no_engine(line: str, quick: dict[str, Any]) -> None:
    assert quick[line]["loaded"] == []
    assert "Traceback" not in quick[line]["errors"]
    assert quick[line]["status"] == 0 or quick[line]["errors"]


def test_help_texts_are_wrapped_to_the_width_alone(quick: dict[str, Any]) -> None:
    """A line break of a docstring in the source is none of its help."""
    lines = [line.replace("│", " ").rstrip() for line in quick["train --help"]["said"].splitlines()]
    early = [
        line
        for line, following in pairwise(lines)
        if line[26:28] == following[:28].strip() + "  "
        and line[-1].isalpha()
        and following[28:29].isalpha()
        and len(f"{line} {following.split()[0]}") <= 78  # columns, with a border
    ]
    assert len(lines) > 200
    assert early == []


SCRIPTS = {path.stem for path in (ROOT / "scripts").glob("*.py")}
DEFINE_MODELS = {"pretrain_tiny", "why_slow"}
"""Scripts that define modules of torch themselves, and so load it."""
HELPED = sorted(SCRIPTS - DEFINE_MODELS)


@pytest.mark.parametrize("script", HELPED)
def test_help_of_every_script_loads_no_engine(script: str, quick: dict[str, Any]) -> None:
    assert (quick[script]["status"], quick[script]["errors"], quick[script]["loaded"]) == (0, "", [])
    assert "usage" in quick[script]["said"].lower()


def test_a_real_program_ends_in_one_line(tmp_path: Path) -> None:
    for command in (
        [sys.executable, "-m", "dept_vl", "train"],
        [sys.executable, ROOT / "scripts/train_vqa.py"],
    ):
        done = subprocess.run(
            [*command, "--data_dir", "nowhere"],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            check=False,
        )
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr.startswith("dept-vl: error: no folder nowhere")
        assert len(done.stderr.splitlines()) == 1


LAUNCHED = {"ACCELERATE_MIXED_PRECISION": "no", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("variables", "noted"),
    [
        (LAUNCHED, True),
        (LAUNCHED | {"RANK": "0", "WORLD_SIZE": "2"}, False),
        ({"ACCELERATE_MIXED_PRECISION": "no"}, False),
        ({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}, False),
    ],
)
def test_a_launcher_that_starts_one_process_of_several_is_told(
    variables: dict[str, str],
    noted: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in (*LAUNCHED, "RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert cli.main(["report", "--run", "nowhere"]) == 1
    assert ("--multi_gpu" in capsys.readouterr().err) == noted


@pytest.mark.slow
@pytest.mark.parametrize(("flags", "noted"), [("1", False), ("2", True), ("2 --cpu", True)])
def test_what_the_launcher_leaves_tells_that_it_started_one(flags: str, noted: bool, tmp_path: Path) -> None:
    launch = f"-m accelerate.commands.launch --quiet --num_processes {flags} --num_machines 1"
    done = subprocess.run(
        [sys.executable, *launch.split(), "-m", "dept_vl", "report", "--run", "nowhere"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""},
        check=False,
    )
    assert ("--multi_gpu" in done.stderr) == noted


@pytest.mark.slow
@pytest.mark.parametrize("program", ["-m dept_vl train", f"{ROOT}/scripts/train_vqa.py"])
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("mistake", ["--max_steps 0", "--data_dir nowhere"])
def test_a_mistake_under_the_launcher(program: str, processes: int, mistake: str, tmp_path: Path) -> None:
    """All processes together print one line of ours; torch's launcher of several adds its own."""
    launch = f"-m accelerate.commands.launch --quiet --num_processes {processes} --num_machines 1"
    launch += " --mixed_precision no --dynamo_backend no" + " --multi_gpu" * (processes > 1)
    done = subprocess.run(
        [sys.executable, *f"{launch} {program} {mistake}".split()],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert done.returncode != 0
    assert done.stderr.count("dept-vl: error: ") == 1
    if processes == 1:
        assert len(done.stderr.splitlines()) == 1
    else:
        assert "(local_rank: 1)" in done.stderr
        assert Path(cli.__file__).name not in done.stderr  # no traceback of ours
