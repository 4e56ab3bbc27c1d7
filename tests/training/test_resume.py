"""A run that is killed anywhere and goes on ends as the run that was never killed, bit for bit."""

import json
import os
import random
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from helpers import annotations_path, questions_path, read_rows, write_rows, write_vqa
from PIL import Image
from runs import forget_checksums, forking, reset_accelerate, with_
from safetensors.torch import load_file, save_file

import dept_vl.training.loop
import dept_vl.training.stages
from dept_vl import load
from dept_vl._utils.errors import UsageError
from dept_vl.cli import parse
from dept_vl.config import DataOptions, EvaluateConfig, RunConfig, differences, read_config, to_json
from dept_vl.inference.evaluate import evaluate
from dept_vl.tasks.own.options import OwnOptions
from dept_vl.tasks.vqav2 import VQAv2
from dept_vl.training import checkpoint as state
from dept_vl.training.identity import DifferentError
from dept_vl.training.run import run, run_once
from dept_vl.training.score_run import score_run
from dept_vl.training.summary import RunResult

pytestmark = pytest.mark.usefixtures("fresh_accelerate")

EVENTS = ("step", "fsync", "rename", "log")
"""Where a run is killed: in an optimizer step, as a file is flushed or renamed, as a line is logged."""


@pytest.fixture(scope="module")
def config(
    tmp_path_factory: pytest.TempPathFactory,
    make_run: Callable[..., RunConfig],
) -> RunConfig:
    folder = tmp_path_factory.mktemp("resume")
    config = make_run(
        DataOptions(data_dir=write_vqa(folder / "vqa", images=5), holdout_images=1),
        dropout=True,  # so that a generator set back wrongly shows
        max_steps=9,
        per_device_batch_size=3,
        gradient_accumulation_steps=2,
        eval_every=4,
        checkpoint_every=2,
        log_every=3,
    )
    return replace(config, output_dir=folder / "whole")


@pytest.fixture(scope="module")
def whole(config: RunConfig) -> RunResult:
    reset_accelerate()
    return run(config)


def result_of(folder: Path) -> dict[str, Any]:
    """What a run leaves that must not depend on kills."""
    summary = json.loads((folder / "summary.json").read_text())
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    timed = ("samples_per_second", "tokens_per_second", "memory_gib", "seconds_left")
    return {
        "tensors": {
            (name, key): tensor.numpy().tobytes()
            for name in ("best", "last")
            for key, tensor in load_file(folder / name / "adapter.safetensors").items()
        },
        "predictions": (folder / "predictions.json").read_text(),
        "scores": summary["scores"],
        "best_step": summary["best_step"],
        "log": [{key: value for key, value in line.items() if key not in timed} for line in log],
    }


def assert_goes_on(config: RunConfig, paused: Path) -> None:
    """A run that pauses after two steps goes on to the same bits."""
    for folder, pause in ((config.output_dir, 0), (paused, 2), (paused, 0)):
        reset_accelerate()
        run(with_(config, output_dir=folder, resume="auto", train={"pause_at": pause}))
    assert config.output_dir is not None
    assert result_of(paused) == result_of(config.output_dir)


def assert_answers(folder: Path, data_dir: Path | None) -> tuple[list[Path], list[str], list[str]]:
    """A loaded adapter of VQAv2 answers as its run predicted; returns images, questions and answers."""
    assert data_dir is not None
    asked = VQAv2().load(data_dir, "val")
    examples = [asked[number] for number in range(len(asked))]
    images, questions = [e.images[0] for e in examples], [e.question for e in examples]
    answers = load(folder).answer(images, questions)
    assert answers == [row["answer"] for row in json.loads((folder / "predictions.json").read_text())]
    return images, questions, answers


def run_and_die(config: RunConfig, threads: int, event: str, number: int) -> None:
    """Run in a child and kill it with SIGKILL at the n-th event of a kind."""
    torch.set_num_threads(threads)  # sums of several threads have an order of their own
    left = [number]

    def dying(function: Any) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **options)

        return call

    if event == "step":
        torch.optim.AdamW.step = dying(torch.optim.AdamW.step)  # type: ignore[method-assign]
    elif event == "fsync":
        os.fsync = dying(os.fsync)
    elif event == "rename":
        Path.rename = dying(Path.rename)  # type: ignore[method-assign]
    else:
        json.dumps = dying(json.dumps)
    run(config)


def kill_until_finished(config: RunConfig, rng: random.Random, kills: int) -> int:
    """Start the same command again and again, killed at random; the last one is left to finish."""
    killed = 0
    while killed < kills:
        event = rng.choice(EVENTS)
        number = rng.randint(1, {"step": 9, "fsync": 24, "rename": 4, "log": 12}[event])
        process = forking().Process(target=run_and_die, args=(config, torch.get_num_threads(), event, number))
        process.start()
        process.join(120)
        assert process.exitcode is not None, "the run hangs"
        if process.exitcode == 0:
            assert (config.output_dir / "summary.json").is_file()  # type: ignore[operator]
            break
        assert process.exitcode == -signal.SIGKILL
        killed += 1
    run(config)
    return killed


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_killed_at_random_points_and_resumed_is_bit_identical(
    config: RunConfig, whole: RunResult, tmp_path: Path, seed: int
) -> None:
    again = replace(config, output_dir=tmp_path / "killed", resume="auto")
    assert kill_until_finished(again, random.Random(seed), kills=10) > 0
    assert result_of(tmp_path / "killed") == result_of(whole.output_dir)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2, 12))
def test_killed_often(config: RunConfig, whole: RunResult, tmp_path: Path, seed: int) -> None:
    again = replace(config, output_dir=tmp_path / "killed", resume="auto")
    kill_until_finished(again, random.Random(seed), kills=20)
    assert result_of(tmp_path / "killed") == result_of(whole.output_dir)


def stopped_at(config: RunConfig, folder: Path, steps: int) -> RunConfig:
    """The configuration of a run that was sent SIGTERM after some steps."""
    again = replace(config, output_dir=folder, resume="auto")
    calls = [0]
    step = torch.optim.AdamW.step

    def counting(self: torch.optim.AdamW, *args: Any, **options: Any) -> Any:
        calls[0] += 1
        if calls[0] == steps:
            signal.raise_signal(signal.SIGTERM)
        return step(self, *args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", counting)
        result = run(again)
    assert result.exit_status == 128 + signal.SIGTERM
    reset_accelerate()
    return again


def test_sigterm_saves_and_says_so(
    config: RunConfig, whole: RunResult, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    again = stopped_at(config, tmp_path / "run", steps=5)
    assert "stopped at step 5 of 9; --resume" in capsys.readouterr().out
    assert [path.name for path in state.checkpoints(tmp_path / "run")][-1] == "step-00000005"
    # No evaluation that the whole run does not make: there may be seconds left before the kill.
    assert not (tmp_path / "run" / "summary.json").exists()
    assert run(again).exit_status == 0
    assert result_of(tmp_path / "run") == result_of(whole.output_dir)


@pytest.mark.parametrize("number", [1, 3])
def test_a_stop_during_an_evaluation_is_heeded_after_it(
    config: RunConfig, whole: RunResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """The first and the last of the run."""
    left = [number]

    def stopping(*arguments: Any, **options: Any) -> Any:
        left[0] -= 1
        if left[0] == 0:
            signal.raise_signal(signal.SIGTERM)
        return evaluate(*arguments, **options)

    monkeypatch.setattr(dept_vl.training.loop, "evaluate", stopping)
    again = replace(config, output_dir=tmp_path / "run", resume="auto")
    result = run(again)
    assert result.exit_status == 128 + signal.SIGTERM
    assert result.training is not None
    assert result.training.steps == {1: config.train.eval_every, 3: config.train.max_steps}[number]
    assert not (tmp_path / "run" / "summary.json").exists()
    reset_accelerate()
    assert run(again).exit_status == 0
    assert result_of(tmp_path / "run") == result_of(whole.output_dir)


def test_a_damaged_checkpoint_is_reported_and_the_one_before_taken(
    config: RunConfig, whole: RunResult, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    again = stopped_at(config, tmp_path / "run", steps=7)
    before, newest = state.checkpoints(tmp_path / "run")
    for damage in (
        lambda: (newest / "tensors.safetensors").write_bytes(b"nonsense"),
        lambda: (newest / "manifest.json").unlink(),
    ):
        damage()
        place, problems = state.newest(tmp_path / "run")
        assert place == before
        assert len(problems) == 1
        assert f"{newest} is damaged" in problems[0]
    assert run(again).exit_status == 0
    assert "is damaged" in capsys.readouterr().out
    assert result_of(tmp_path / "run") == result_of(whole.output_dir)


def test_without_a_whole_checkpoint_it_begins_again(
    config: RunConfig, whole: RunResult, tmp_path: Path
) -> None:
    again = stopped_at(config, tmp_path / "run", steps=3)
    for place in state.checkpoints(tmp_path / "run"):
        shutil.rmtree(place)
    assert run(again).exit_status == 0
    assert result_of(tmp_path / "run") == result_of(whole.output_dir)


def test_a_checkpoint_before_damaged_ones_stays(config: RunConfig, tmp_path: Path) -> None:
    """Damaged checkpoints of later steps do not count as the newest, and go with the next that is written."""
    again, folder = stopped_at(config, tmp_path / "run", steps=7), tmp_path / "run"
    assert len(state.checkpoints(folder)) == 2
    for place in state.checkpoints(folder):
        (place / "tensors.safetensors").write_bytes(b"nonsense")
    reset_accelerate()
    run(with_(again, train={"pause_at": 3}))
    place, problems = state.newest(folder)
    assert (place, problems) == (folder / state.CHECKPOINTS / "step-00000003", [])
    shutil.copytree(place, place.with_name(f"{place.name}-copy"))  # a user's own
    assert state.checkpoints(folder)[-1] == place


def test_a_finished_run_is_left_as_it_is(
    config: RunConfig, whole: RunResult, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.stat().st_mtime_ns for path in whole.output_dir.rglob("*")}
    result = run(replace(config, resume=str(whole.output_dir)))
    assert "finished already" in capsys.readouterr().out
    assert result.scores == whole.scores
    assert {path: path.stat().st_mtime_ns for path in whole.output_dir.rglob("*")} == before


def test_a_finished_run_of_other_data_is_not_passed_off_as_one_of_these(
    config: RunConfig, whole: RunResult, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(whole.output_dir, tmp_path / "run")
    again = replace(copied_data(config, tmp_path / "data"), output_dir=folder, resume="auto")
    assert run(again).scores == whole.scores
    wider = with_(again, train={"per_device_batch_size": 2 * config.train.per_device_batch_size})
    with pytest.raises(DifferentError, match="batches="):
        run(wider)
    # By how many processes it was made does not matter to one that has ended, but to a study.
    identity = json.loads((folder / "identity.json").read_text())
    examples = config.train.per_device_batch_size * config.train.gradient_accumulation_steps
    twice = {"batches": f"{2 * examples} examples a step"}
    by_two = {"content": identity["content"] | twice, "setup": identity["setup"] | {"processes": "2"}}
    (folder / "identity.json").write_text(json.dumps(identity | by_two))
    forget_checksums(folder)
    assert run(again).scores == whole.scores
    with pytest.raises(DifferentError, match="batches="):
        run_once(again)
    (folder / "identity.json").write_text(json.dumps(identity))
    features = folder / "features.json"
    dtype = json.loads(features.read_text())["dtype"]
    features.write_text(json.dumps({"dtype": "float16"}))
    forget_checksums(folder)
    with pytest.raises(DifferentError, match="features=float16 -> float32"):
        run(with_(again, data={"features": "live"}))
    features.write_text(json.dumps({"dtype": dtype}))
    change_an_answer(again.data.data_dir)  # type: ignore[arg-type]
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(DifferentError, match=r"vqav2\.(train|dev)=") as error:
        run(again)
    assert str(folder) in str(error.value)
    # Data that are gone cannot be compared, which is printed.
    shutil.rmtree(tmp_path / "data")
    capsys.readouterr()
    assert run(again).scores == whole.scores
    assert "cannot check whether" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_other_options_are_refused_by_name(config: RunConfig, tmp_path: Path) -> None:
    again = stopped_at(config, tmp_path / "run", steps=3)
    changed = replace(again, train=replace(again.train, max_steps=10))
    with pytest.raises(ValueError, match=r"other options \(train\.max_steps=9 -> 10\)"):
        run(changed)


def test_other_options_may_be_accepted(
    config: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    again = stopped_at(config, tmp_path / "run", steps=5)
    optim = replace(again.optim, prompt_lr=again.optim.prompt_lr / 2)
    run(replace(again, optim=optim, accept_changes=True))
    accepted = "optim.prompt_lr=0.05 -> 0.025"
    assert f"accepted: {accepted}" in capsys.readouterr().out
    log = result_of(tmp_path / "run")["log"]
    # Linear decay over nine steps, from 0.05 and then from 0.025.
    rates = {line["step"]: line["lr/prompt"] for line in log if "lr/prompt" in line}
    assert [rates[step] for step in (3, 6, 9)] == pytest.approx([0.05 * 7 / 9, 0.025 * 4 / 9, 0.025 / 9])
    assert json.loads((tmp_path / "run" / "identity.json").read_text())["changes"] == [accepted]
    assert read_config(tmp_path / "run" / "config.json").optim == replace(again, optim=optim).settled().optim


def copied_data(config: RunConfig, folder: Path) -> RunConfig:
    data_dir = shutil.copytree(config.data.data_dir, folder)
    return replace(config, data=replace(config.data, data_dir=data_dir))


def change_an_answer(data_dir: Path) -> None:
    path = annotations_path(data_dir)
    path.write_text(path.read_text().replace('"answer": "red"', '"answer": "rad"', 1))


def drop_a_question(data_dir: Path) -> None:
    path = questions_path(data_dir)
    write_rows(path, "questions", read_rows(path, "questions")[:-1])
    path = annotations_path(data_dir)
    write_rows(path, "annotations", read_rows(path, "annotations")[:-1])


def replace_an_image(data_dir: Path) -> None:
    path = next((data_dir / "train2014").iterdir())
    path.write_bytes(path.read_bytes() + b" ")


@pytest.mark.parametrize(
    "change",
    [change_an_answer, pytest.param(drop_a_question, marks=pytest.mark.slow), replace_an_image],
)
def test_other_data_are_refused_by_name(
    config: RunConfig, tmp_path: Path, change: Callable[[Path], None]
) -> None:
    again = stopped_at(copied_data(config, tmp_path / "data"), tmp_path / "run", steps=3)
    change(again.data.data_dir)  # type: ignore[arg-type]
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    with pytest.raises(DifferentError, match=r"vqav2\.(train|dev)(\.images)?=\d+ ") as error:
        run(again)
    assert "--accept_changes" in str(error.value)
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before
    reset_accelerate()
    assert run(replace(again, accept_changes=True)).exit_status == 0


def test_data_may_move_and_be_written_otherwise(config: RunConfig, whole: RunResult, tmp_path: Path) -> None:
    again = stopped_at(copied_data(config, tmp_path / "data"), tmp_path / "run", steps=5)
    there = (tmp_path / "data").rename(tmp_path / "elsewhere")
    path = annotations_path(there)
    path.write_text(json.dumps(json.loads(path.read_text()), indent=3))
    moved = replace(again, data=replace(again.data, data_dir=there))
    assert run(moved).exit_status == 0
    assert result_of(tmp_path / "run") == result_of(whole.output_dir)
    assert read_config(tmp_path / "run" / "config.json").data.data_dir == there


@pytest.mark.parametrize("embedded", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_data_of_your_own_may_move(config: RunConfig, tmp_path: Path, embedded: bool) -> None:
    """A table with its images, beside it or in it."""
    folder = tmp_path / "project" / "mine"
    folder.mkdir(parents=True)

    def write(first: tuple[int, int, int]) -> None:
        colours = [first, *((0, 25 * n, 255 - n) for n in range(1, 9))]
        images = [BytesIO() for _ in colours]
        for number, (file, colour) in enumerate(zip(images, colours, strict=True)):
            Image.new("RGB", (32, 32 + number % 2), colour).save(file, "BMP")
        rows = [{"question": f"what is {n}?", "answer": "ab"[n % 2]} for n in range(len(images))]
        for n, (row, image) in enumerate(zip(rows, images, strict=True)):
            (folder / f"{n}.bmp").write_bytes(image.getvalue())
            row["image"] = {"bytes": image.getvalue(), "path": None} if embedded else f"{n}.bmp"  # type: ignore[assignment]
        if embedded:
            pq.write_table(pa.Table.from_pylist(rows), folder / "rows.parquet")
        else:
            (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))

    write((255, 0, 0))
    own = OwnOptions(data=str(folder / f"rows.{'parquet' if embedded else 'jsonl'}"))
    begun = replace(config, data=DataOptions(own=own))
    train = replace(config.train, pause_at=2, eval_every=2)
    for name in ("peace", "moved"):
        reset_accelerate()
        run(replace(begun, output_dir=tmp_path / "project" / name, train=train))
    reset_accelerate()
    run(parse(RunConfig(), "", ["--resume", str(tmp_path / "project" / "peace")]))
    there = (tmp_path / "project" / "mine").rename(tmp_path / "elsewhere")
    table = str(there / Path(own.data or "").name)
    again = ["--resume", str(tmp_path / "project" / "moved"), "--data", table]
    reset_accelerate()
    run(parse(RunConfig(), "", [*again, "--pause_at", "4"]))
    reset_accelerate()
    run(parse(RunConfig(), "", again))
    assert result_of(tmp_path / "project" / "moved") == result_of(tmp_path / "project" / "peace")


def test_another_machine_is_remarked_on(
    config: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    again = stopped_at(config, tmp_path / "run", steps=5)
    path = tmp_path / "run" / "identity.json"
    content = json.loads(path.read_text())
    content["setup"] |= {"threads": "64", "torch": "2.6.0"}
    path.write_text(json.dumps(content))
    forget_checksums(tmp_path / "run")
    run(again)
    assert "note: threads=64 -> 1; torch=2.6.0 -> " in capsys.readouterr().out
    assert json.loads(path.read_text())["setup"]["threads"] == "1"


def test_a_run_without_an_identity_goes_on(
    config: RunConfig, whole: RunResult, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of an older version; that its data were moved cannot be checked, and is accepted or not."""
    again = stopped_at(copied_data(config, tmp_path / "data"), tmp_path / "run", steps=5)
    (tmp_path / "run" / "identity.json").unlink()
    forget_checksums(tmp_path / "run")
    there = (tmp_path / "data").rename(tmp_path / "elsewhere")
    moved = replace(again, data=replace(again.data, data_dir=there))
    with pytest.raises(DifferentError, match=r"data\.data_dir="):
        run(moved)
    there.rename(tmp_path / "data")
    reset_accelerate()
    run(again)
    assert "has no identity.json" in capsys.readouterr().out
    assert result_of(tmp_path / "run") == result_of(whole.output_dir)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_stop_while_the_test_split_is_scored_loses_nothing(
    config: RunConfig, whole: RunResult, tmp_path: Path, number: int
) -> None:
    """Whatever is said of checkpoints; afterwards none is left where none was asked for."""
    again = replace(config, output_dir=tmp_path / "run", resume="auto")
    again = replace(again, train=replace(again.train, checkpoint_every=0))
    process = forking().Process(target=run_and_stop_in_scoring, args=(again, torch.get_num_threads(), number))
    process.start()
    process.join(120)
    assert process.exitcode == -number
    assert [path.name for path in state.checkpoints(tmp_path / "run")] == ["step-00000009"]
    assert run(again).exit_status == 0
    assert not (tmp_path / "run" / state.CHECKPOINTS).exists()
    ours, theirs = result_of(tmp_path / "run"), result_of(whole.output_dir)
    assert ours["tensors"] == theirs["tensors"]
    assert ours["scores"] == theirs["scores"]


def run_and_stop_in_scoring(config: RunConfig, threads: int, number: int) -> None:
    torch.set_num_threads(threads)
    dept_vl.training.stages.evaluate = lambda *_, **__: signal.raise_signal(number)
    run(config)


def test_a_page_that_is_missing_is_made(config: RunConfig, whole: RunResult, tmp_path: Path) -> None:
    folder = shutil.copytree(whole.output_dir, tmp_path / "run")
    (folder / "report.html").unlink()
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    again = replace(config, output_dir=folder, resume="auto")
    assert run(again).scores == whole.scores
    page = folder / "report.html"
    assert "</html>" in page.read_text()
    assert {
        path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path != page
    } == before


def test_a_refused_resume_leaves_the_run_as_it_is(config: RunConfig, tmp_path: Path) -> None:
    """Before its first line of log, when there was nothing to tell it from a new one."""
    again = stopped_at(config, tmp_path / "run", steps=1)
    (tmp_path / "run" / "log.jsonl").unlink(missing_ok=True)
    with pytest.raises(FileNotFoundError):
        run(replace(again, data=replace(again.data, features="cached")))
    for name in ("config.json", "features.json", "identity.json"):
        assert (tmp_path / "run" / name).is_file()


def test_a_run_is_found_from_elsewhere(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Begun with relative paths; its folder lies beside them, then somewhere else.

    Another project has files of the same names, with other answers.
    """
    copied_data(config, tmp_path / "project" / "data" / "vqa")
    for name in ("vision", "language"):
        shutil.copytree(getattr(config.backbone, name), tmp_path / "project" / "models" / name)
    monkeypatch.chdir(tmp_path / "project")
    relative = replace(
        config,
        data=replace(config.data, data_dir=Path("data/vqa")),
        backbone=replace(config.backbone, vision="models/vision", language="models/language"),
        output_dir=Path("runs/one"),
        train=replace(config.train, max_steps=2, pause_at=1, eval_every=1),
    )
    run(relative)
    assert json.loads(Path("runs/one/config.json").read_text())["backbone"]["language"] == "models/language"
    shutil.copytree("runs/one", tmp_path / "shelf" / "far" / "one")
    shutil.copytree("runs/one/best", "adapters/mine")
    other = copied_data(config, tmp_path / "elsewhere" / "data" / "vqa").data.data_dir
    assert other is not None
    for path in other.glob("*annotations.json"):
        path.write_text(path.read_text().replace('"answer": "', '"answer": "not '))
    image = next(Path("data/vqa/train2014").resolve().iterdir())
    for source in ("project/runs/one", "shelf/far/one", "shelf/far/one/best", "project/adapters/mine"):
        monkeypatch.chdir(tmp_path)
        assert isinstance(load(source).answer(image, "what colour is the shape?"), str)
    for folder in (tmp_path / "project/runs/one", tmp_path / "shelf/far/one"):
        monkeypatch.chdir(tmp_path / "elsewhere")
        assert read_config(folder / "config.json").data.data_dir == tmp_path / "project" / "data" / "vqa"
        reset_accelerate()
        resumed = parse(RunConfig(), "", ["--resume", str(folder)])
        assert run(resumed).exit_status == 0
        assert json.loads(Path(folder, "config.json").read_text())["data"]["data_dir"] == "data/vqa"
        reset_accelerate()
        assert not score_run(EvaluateConfig(folder, output_dir=tmp_path / folder.parent.name)).changed


def test_options_that_change_nothing_may_change(config: RunConfig) -> None:
    changed = replace(config, resume="auto", train=replace(config.train, num_workers=2, log_every=1))
    assert differences(to_json(config), to_json(changed)) == []


def test_options_that_came_later_had_their_defaults(config: RunConfig) -> None:
    before = to_json(config)
    del before["train"]["compile"]
    assert differences(before, to_json(config)) == []
    changed = replace(config, train=replace(config.train, compile=True))
    assert differences(before, to_json(changed)) == ["train.compile=False -> True"]


def test_what_an_older_run_leaves_out_is_as_it_was_then(config: RunConfig, tmp_path: Path) -> None:
    joined = ("object_order", "visual_norm", "image_fit")
    path, content = tmp_path / "config.json", to_json(config)
    for name in ("exif", *joined):
        del content["backbone"][name]
    path.write_text(json.dumps(content))
    read = read_config(path).backbone
    assert [getattr(read, name) for name in ("exif", *joined)] == [False, "none", "twice", "own"]
    # One written by hand, with a folder or without, means what is usual today.
    by_hand = {"output_dir": "x", "backbone": {"vision": "a", "language": "b"}}
    path.write_text(json.dumps(by_hand))
    assert read_config(path).backbone == replace(RunConfig().backbone, vision="a", language="b")
    for wrong in ({"data": 5}, {"also": {}}, {"backbone": content["backbone"], "also": [3]}):
        path.write_text(json.dumps(wrong))
        with pytest.raises(UsageError, match=str(path)):
            read_config(path)


def test_an_evaluation_that_only_a_pause_makes_shifts_no_dropout(
    config: RunConfig, whole: RunResult, tmp_path: Path
) -> None:
    paused = replace(config, output_dir=tmp_path / "run", resume="auto")
    for step, kept in ((3, 3), (5, 5), (5, 5), (3, 5), (0, 9)):  # also where the run has passed the step
        reset_accelerate()
        result = run(replace(paused, train=replace(config.train, pause_at=step)))
        assert (not result.scores) == (step > 0)
        assert (tmp_path / "run" / "checkpoints" / f"step-{kept:08d}").is_dir()
    ours, theirs = result_of(tmp_path / "run"), result_of(whole.output_dir)
    assert [line["step"] for line in ours["log"] if "score" in line] == [3, 4, 5, 8, 9]
    lasts = [
        {key: t for (name, key), t in found["tensors"].items() if name == "last"} for found in (ours, theirs)
    ]
    assert lasts[0] == lasts[1]
    assert [line for line in theirs["log"] if line not in ours["log"]] == []


def test_resume_goes_on_past_a_pause(config: RunConfig, tmp_path: Path) -> None:
    paused = replace(config, output_dir=tmp_path / "run", train=replace(config.train, pause_at=2))
    run(paused)
    again = parse(RunConfig(), "", ["--resume", str(tmp_path / "run")])
    assert again.train == replace(config.train, pause_at=0)
    reset_accelerate()
    assert run(again).scores
    assert parse(RunConfig(), "", ["--resume", str(tmp_path / "run"), "--pause_at", "3"]).train.pause_at == 3


def test_a_run_from_before_a_renaming_is_resumed(config: RunConfig, whole: RunResult, tmp_path: Path) -> None:
    """The files of a stopped run with the older names in them: it ends as one that was never stopped."""
    again = stopped_at(config, tmp_path / "run", steps=5)

    forget_checksums(tmp_path / "run")

    def older(name: str) -> str:
        return name.replace("offset_", "lora_")

    path = tmp_path / "run" / "config.json"
    path.write_text(older(path.read_text()))
    assert '"lora_lr"' in path.read_text()
    places = state.checkpoints(tmp_path / "run")
    assert places
    for place in places:
        content = json.loads((place / "state.json").read_text())
        content["version"] = 1
        content["optimizer"] = {older(name): keys for name, keys in content["optimizer"].items()}
        (place / "state.json").write_text(json.dumps(content))
        tensors = load_file(place / "tensors.safetensors")
        assert "optimizer.prompt.offset_a.exp_avg" in tensors
        save_file({older(name): tensor for name, tensor in tensors.items()}, place / "tensors.safetensors")
        (place / state.MANIFEST).write_text(json.dumps(state._manifest(place)))
    for folder in (tmp_path / "run").glob("*/adapter.json"):
        folder.write_text(folder.read_text().replace('"format_version": 2', '"format_version": 1'))
        tensors = load_file(folder.with_name("adapter.safetensors"))
        save_file(
            {older(name): tensor for name, tensor in tensors.items()},
            folder.with_name("adapter.safetensors"),
        )
    reset_accelerate()
    assert result_of(run(again).output_dir) == result_of(whole.output_dir)


def test_no_run_to_go_on_with(config: RunConfig, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="expected the folder of a run"):
        run(replace(config, resume=str(tmp_path)))
    with pytest.raises(ValueError, match="needs --output_dir"):
        run(replace(config, resume="auto", output_dir=None))


def test_the_last_two_checkpoints_stay(config: RunConfig, whole: RunResult) -> None:
    assert [path.name for path in state.checkpoints(whole.output_dir)] == ["step-00000008", "step-00000009"]
    assert not list((whole.output_dir / state.CHECKPOINTS).glob(".*"))


def test_random_generators_come_back() -> None:
    device = torch.device("cpu")
    random.gauss(0, 1)  # leaves a second number waiting
    np.random.standard_normal()
    saved = state._random_state(device)
    drawn = [(random.gauss(0, 1), np.random.standard_normal(), torch.rand(3).tolist()) for _ in range(3)]
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    state._restore_random_state(saved, device)
    assert [
        (random.gauss(0, 1), np.random.standard_normal(), torch.rand(3).tolist()) for _ in range(3)
    ] == drawn
