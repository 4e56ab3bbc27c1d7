"""Runs of two processes: who writes, how they end, and that they go on as one that was never killed."""

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import annotations_path, write_vqa
from runs import assert_same, in_two_processes, reset_accelerate, start_two_processes
from test_resume import result_of

import dept_vl.models.precision
from dept_vl.config import DataOptions, RunConfig
from dept_vl.data.collate import Collator
from dept_vl.training import checkpoint as state
from dept_vl.training.identity import DifferentError
from dept_vl.training.run import run

pytestmark = pytest.mark.usefixtures("fresh_accelerate")


@pytest.fixture(scope="module")
def whole(
    tmp_path_factory: pytest.TempPathFactory,
    make_run: Callable[..., RunConfig],
) -> RunConfig:
    """A run of two processes; each notes what it prints and which files it opens to write."""
    folder = tmp_path_factory.mktemp("distributed")
    config = make_run(
        DataOptions(data_dir=write_vqa(folder / "vqa", images=5), holdout_images=1),
        dropout=True,
        max_steps=6,
        per_device_batch_size=2,
        gradient_accumulation_steps=2,
        eval_every=3,
        checkpoint_every=2,
        log_every=3,
    )
    config = replace(config, output_dir=folder / "whole")
    in_two_processes(run_and_note, config, folder)
    return config


def run_and_note(config: RunConfig, notes: Path) -> None:
    rank = os.environ["RANK"]
    written: list[str] = []

    def note(event: str, arguments: tuple[Any, ...]) -> None:
        if event in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir"):
            changes = event != "open" or arguments[2] & (os.O_WRONLY | os.O_RDWR)
            if changes and str(config.output_dir) in str(arguments[0]):
                written.append(str(arguments[0]))

    sys.addaudithook(note)
    with (notes / f"printed-{rank}").open("w") as printed:
        sys.stdout = printed
        try:
            run(config)
        finally:
            sys.stdout = sys.__stdout__
    (notes / f"written-{rank}.json").write_text(json.dumps(written))


def run_compiled(config: RunConfig) -> None:
    dept_vl.models.precision.BACKEND = "eager"
    run(config)
    if config.train.compile:
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 4


@pytest.mark.slow
def test_two_processes_with_compiled_layers_train_the_same(whole: RunConfig, tmp_path: Path) -> None:
    short = replace(
        whole,
        output_dir=tmp_path / "plain",
        train=replace(whole.train, max_steps=2, eval_every=2, checkpoint_every=0),
        backbone=replace(whole.backbone, backbone_dropout=False),
    )
    compiled = replace(short, output_dir=tmp_path / "compiled", train=replace(short.train, compile=True))
    for config in (short, compiled):
        in_two_processes(run_compiled, config)
    assert_same(tmp_path / "plain", tmp_path / "compiled", atol=1e-4)


def run_and_die(config: RunConfig, step: int) -> None:
    """Killed in the n-th optimizer step, as a machine that loses its power ends all at once."""
    left, function = [step], torch.optim.AdamW.step

    def dying(optimizer: torch.optim.AdamW, *arguments: Any) -> Any:
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(optimizer, *arguments)

    torch.optim.AdamW.step = dying  # type: ignore[method-assign,assignment]
    run(config)


def run_and_fail(config: RunConfig, failing_rank: int, notes: Path) -> None:
    """One process comes upon an error; each notes what it ends by."""
    rank = int(os.environ["RANK"])
    left, function = [3], Collator.__call__

    def fail(collator: Collator, draws: Any) -> Any:
        left[0] -= rank == failing_rank
        if left[0] == 0:
            raise ValueError("the fault is here")
        return function(collator, draws)

    Collator.__call__ = fail  # type: ignore[method-assign]
    try:
        run(config)
    except Exception as error:
        (notes / f"error-{rank}").write_text(f"{type(error).__name__}: {error}")
        raise


def test_only_the_first_process_prints_and_writes(whole: RunConfig) -> None:
    folder = Path(whole.output_dir or "").parent
    assert "trainable parameters" in (folder / "printed-0").read_text()
    assert (folder / "printed-1").read_text() == ""
    written = [json.loads((folder / f"written-{rank}.json").read_text()) for rank in range(2)]
    assert any(name.endswith("summary.json.partial") for name in written[0])
    # Random generators are each process's own.
    assert {Path(name).name for name in written[1]} == {"rng-1.safetensors"}


def test_killed_and_resumed_is_bit_identical(whole: RunConfig, tmp_path: Path) -> None:
    again = replace(whole, output_dir=tmp_path / "killed", resume="auto")
    assert start_two_processes(run_and_die, again, 5) == [-signal.SIGKILL] * 2
    assert [place.name for place in state.checkpoints(tmp_path / "killed")] == [
        "step-00000002",
        "step-00000004",
    ]
    in_two_processes(run, again)
    assert result_of(tmp_path / "killed") == result_of(Path(whole.output_dir or ""))
    # Of another number of processes a step would have half of the examples, and dropout other numbers.
    reset_accelerate()
    (tmp_path / "killed" / "summary.json").unlink()
    with pytest.raises(DifferentError, match=r"batches=8 .* -> 4 .*processes=2 -> 1"):
        run(again)


def run_and_note_the_error(config: RunConfig, notes: Path) -> None:
    try:
        run(config)
    except Exception as error:
        (notes / f"error-{os.environ['RANK']}").write_text(f"{type(error).__name__}: {error}")
        raise


@pytest.mark.parametrize("what", ["data", "identity", "folder", "no data"])
def test_both_processes_end_with_what_the_first_has_found(
    whole: RunConfig, tmp_path: Path, what: str
) -> None:
    """The first alone looks at the files of the run, and goes first to the data."""
    copy = shutil.copytree(Path(whole.output_dir or ""), tmp_path / "run")
    (copy / "summary.json").unlink()
    data_dir = shutil.copytree(whole.data.data_dir or "", tmp_path / "vqa")
    config = replace(whole, resume=str(copy), data=replace(whole.data, data_dir=data_dir))
    kind = "DamagedFileError"
    if what == "data":
        kind, path = "DifferentError", annotations_path(data_dir)
        path.write_text(path.read_text().replace('"answer": "red"', '"answer": "rad"', 1))
    elif what == "identity":
        (copy / "identity.json").write_text("{}")
    elif what == "folder":
        kind, config = "NotADirectoryError", replace(config, resume="", output_dir=tmp_path / "file" / "run")
        (tmp_path / "file").touch()
    else:
        kind = "FileNotFoundError"
        annotations_path(data_dir).unlink()
    assert start_two_processes(run_and_note_the_error, config, tmp_path) == [1, 1]
    ends = [(tmp_path / f"error-{rank}").read_text() for rank in range(2)]
    assert ends[0] == ends[1]
    assert ends[0].startswith(f"{kind}: ")


@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_goes_on_with_another_number_of_processes(
    whole: RunConfig, tmp_path: Path, processes: int
) -> None:
    """From two to one and from one to two, as the run that was never stopped, but for rounding."""

    def of(processes: int, **train: Any) -> RunConfig:
        train = {"eval_every": 2, "gradient_accumulation_steps": 2 // processes, **train}
        return replace(
            whole,
            resume="auto",
            backbone=replace(whole.backbone, backbone_dropout=False),
            train=replace(whole.train, per_device_batch_size=4, **train),
        )

    def start(processes: int, config: RunConfig) -> None:
        reset_accelerate()
        run(config) if processes == 1 else in_two_processes(run, config)

    other = 3 - processes
    start(processes, replace(of(processes), output_dir=tmp_path / "whole"))
    start(processes, replace(of(processes, pause_at=4), output_dir=tmp_path / "run"))
    start(other, replace(of(other), output_dir=tmp_path / "run"))
    identity = json.loads((tmp_path / "run" / "identity.json").read_text())
    assert f"processes={processes} -> {other}" in identity["changes"]
    assert_same(tmp_path / "run", tmp_path / "whole", atol=1e-6)
    results = [result_of(tmp_path / name) for name in ("run", "whole")]
    assert results[0]["predictions"] == results[1]["predictions"]
    for one, two in zip(results[0]["log"], results[1]["log"], strict=True):
        assert one == pytest.approx(two, abs=1e-6)
    written = json.loads((tmp_path / "run" / "config.json").read_text())
    assert written["train"]["gradient_accumulation_steps"] == 2 // other


@pytest.mark.parametrize("failing", [0, 1])
def test_an_error_of_one_process_ends_both(whole: RunConfig, tmp_path: Path, failing: int) -> None:
    config = replace(whole, output_dir=tmp_path / "run")
    assert start_two_processes(run_and_fail, config, failing, tmp_path) == [1, 1]
    assert (tmp_path / f"error-{failing}").read_text() == "ValueError: the fault is here"
    other = (tmp_path / f"error-{1 - failing}").read_text()
    assert other.startswith("RuntimeError: another process of this run has ended; what it said is the cause")
