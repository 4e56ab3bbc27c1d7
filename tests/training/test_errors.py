"""What the machine does to a run: each fault is brought about, said in one message, and gone on from."""

import errno
import gc
import math
import multiprocessing
import os
import re
import resource
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from helpers import write_vqa
from runs import reset_accelerate, with_
from test_resume import result_of
from torch.utils.data import get_worker_info

import dept_vl.training.stages
from dept_vl.adapters.adapter import Adapter
from dept_vl.config import DataOptions, RunConfig
from dept_vl.data import workers as readers
from dept_vl.data.collate import Collator
from dept_vl.training import checkpoint as state
from dept_vl.training.checkpoint import TrainingState
from dept_vl.training.errors import explained
from dept_vl.training.log import SPIKE_WINDOW, Log
from dept_vl.training.progress import Progress
from dept_vl.training.run import Run, run

pytestmark = pytest.mark.usefixtures("fresh_accelerate")


@pytest.fixture(scope="module")
def whole(
    tmp_path_factory: pytest.TempPathFactory,
    make_run: Callable[..., RunConfig],
) -> RunConfig:
    """A run that nothing has happened to; images are read at every step."""
    folder = tmp_path_factory.mktemp("faults")
    config = make_run(
        DataOptions(data_dir=write_vqa(folder / "vqa", images=5), holdout_images=1, feature_memory=0.0),
        dropout=True,
        max_steps=6,
        per_device_batch_size=3,
        eval_every=3,
        checkpoint_every=2,
        log_every=3,
    )
    config = replace(config, output_dir=folder / "whole")
    reset_accelerate()
    run(config)
    return config


@pytest.fixture
def config(whole: RunConfig, tmp_path: Path) -> RunConfig:
    """The same command again, to be started as often as need be."""
    return replace(whole, output_dir=tmp_path / "run", resume="auto")


@pytest.fixture
def limits() -> Iterator[None]:
    """The limits of this process are what they were again."""
    kinds = (resource.RLIMIT_FSIZE, resource.RLIMIT_NOFILE)
    before = [resource.getrlimit(kind) for kind in kinds]
    yield
    for kind, limit in zip(kinds, before, strict=True):
        resource.setrlimit(kind, limit)


def lower(kind: int, limit: int) -> None:
    resource.setrlimit(kind, (limit, resource.getrlimit(kind)[1]))


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A small file system of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("file systems may not be mounted here")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)  # weights there are still mapped


def at_call(owner: Any, name: str, number: int, action: Callable[..., object]) -> pytest.MonkeyPatch:
    """Do something before the n-th call of a function, given what it is given."""
    patch, left, function = pytest.MonkeyPatch(), [number], getattr(owner, name)

    def call(*arguments: Any, **options: Any) -> Any:
        left[0] -= 1
        if left[0] == 0:
            action(*arguments)
        return function(*arguments, **options)

    patch.setattr(owner, name, call)
    return patch


def fails(config: RunConfig, kind: type[Exception] = OSError) -> str:
    """Start a run that ends by an exception; what it says."""
    with pytest.raises(kind) as error:
        run(config)
    assert error.value.__suppress_context__ or error.value.__context__ is None
    reset_accelerate()
    return str(error.value)


def assert_goes_on(config: RunConfig, whole: RunConfig) -> None:
    """What was saved is whole, nothing half-written lies about, and the end is the same to the bit."""
    folder = Path(config.output_dir or "")
    assert [state.check(place) for place in state.checkpoints(folder) if state.check(place)] == []
    assert [path.name for path in folder.rglob("*partial*")] == []
    assert run(config).exit_status == 0
    assert result_of(folder) == result_of(Path(whole.output_dir or ""))


@pytest.mark.parametrize(
    ("owner", "name", "number", "file", "step"),
    [
        pytest.param(
            *(TrainingState, "save", 1, "checkpoints/.step-00000002.partial/rng-0.safetensors"),
            "the beginning",
            marks=pytest.mark.slow,
        ),
        (TrainingState, "save", 2, "checkpoints/.step-00000004.partial/rng-0.safetensors", "step 2"),
        pytest.param(Adapter, "save", 1, "best/adapter.safetensors", "step 2", marks=pytest.mark.slow),
        pytest.param(Log, "scores", 2, "log.jsonl", "step 4", marks=pytest.mark.slow),
        (dept_vl.training.stages, "write_answers", 1, "predictions.json", "step 6"),
    ],
)
def test_a_full_disk(
    config: RunConfig,
    whole: RunConfig,
    limits: None,
    owner: Any,
    name: str,
    number: int,
    file: str,
    step: str,
) -> None:
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    patch = at_call(owner, name, number, lambda *_: lower(resource.RLIMIT_FSIZE, 100))
    message = fails(config)
    patch.undo()
    lower(resource.RLIMIT_FSIZE, unlimited)
    # Its checksum is written first.
    named = rf"/(\.checksums\.json|{re.escape(file)}): File too large; free some space there"
    assert re.search(rf"no room for {re.escape(str(config.output_dir))}{named}", message)
    assert f"--resume {config.output_dir} continues from {step}" in message
    assert_goes_on(config, whole)


def test_a_disk_without_space_and_one_that_is_read_only(
    config: RunConfig, whole: RunConfig, disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(config, output_dir=disk / "run")
    filler = disk / "filler"

    def fill(*_: object) -> None:
        with suppress(OSError), filler.open("wb", buffering=0) as file:
            while file.write(bytes(1024)):
                pass

    patch = at_call(TrainingState, "save", 2, fill)
    message = fails(config)
    patch.undo()
    filler.unlink()
    assert re.search(r"no room for .*: No space left on device; free .* continues from step 2", message)
    remount = ["mount", "-o", "remount,ro", str(disk)]
    patch = at_call(TrainingState, "save", 1, lambda *_: subprocess.run(remount, check=True))
    with monkeypatch.context() as without_lock:  # its file is open, and keeps the disk from being remounted
        without_lock.setattr("dept_vl.training.run.owning", lambda *_, **__: nullcontext())
        message = fails(config)
    patch.undo()
    assert re.search(r"no permission for .*: Read-only file system; make .* continues from step 2", message)
    message = fails(replace(config, output_dir=disk / "other"))
    assert re.search(r"no permission for .*other: Read-only .* or choose another --output_dir", message)
    assert f"Nothing has begun in {disk / 'other'}" in message
    subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
    assert_goes_on(config, whole)


def test_a_folder_that_may_not_be_made(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, *_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "mkdir", refuse)
        message = fails(config, PermissionError)
    assert f"no permission for {config.output_dir}: Permission denied" in message
    assert "choose another --output_dir" in message


def test_a_file_in_the_way(config: RunConfig, whole: RunConfig) -> None:
    folder = Path(config.output_dir or "")

    def obstruct(*_: object) -> None:
        (folder / "best").write_text("no folder")

    patch = at_call(Adapter, "save", 1, obstruct)
    message = fails(config)
    patch.undo()
    assert f"something was removed or is in the way at {folder / 'best'}" in message
    (folder / "best").unlink()
    assert_goes_on(config, whole)


def test_the_folder_is_removed(config: RunConfig, whole: RunConfig, tmp_path: Path) -> None:
    folder = Path(config.output_dir or "")
    patch = at_call(Log, "scores", 1, lambda *_: folder.rename(tmp_path / "moved"))
    message = fails(config)
    patch.undo()
    assert f"something was removed or is in the way at {folder / 'log.jsonl'}" in message
    (tmp_path / "moved").rename(folder)
    assert_goes_on(config, whole)


def test_the_cache_is_removed(
    config: RunConfig, whole: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DEPT_VL_CACHE", str(tmp_path / "cache"))

    def remove(*_: object) -> None:
        assert list((tmp_path / "cache").iterdir())
        shutil.rmtree(tmp_path / "cache")

    patch = at_call(TrainingState, "save", 1, remove)
    assert_goes_on(config, whole)
    patch.undo()
    assert not (tmp_path / "cache").exists()


def test_the_images_are_removed(config: RunConfig, whole: RunConfig, tmp_path: Path) -> None:
    images = config.data.data_dir / "train2014"
    patch = at_call(TrainingState, "save", 1, lambda *_: images.rename(tmp_path / "moved"))
    try:
        message = fails(config, (ValueError, FileNotFoundError))  # type: ignore[arg-type]
    finally:
        patch.undo()
        (tmp_path / "moved").rename(images)
    assert "image" in message
    assert_goes_on(config, whole)


@pytest.mark.parametrize(
    ("num_workers", "left", "owner", "name", "number"),
    [
        # No image can be opened; no worker can be started; no tensor can be handed over by one; of the two
        # workers of an evaluation, one can be started.
        (0, 0, Collator, "__call__", 4),
        pytest.param(2, 0, Run, "fit", 1, marks=pytest.mark.slow),
        (2, 24, Run, "fit", 1),
        pytest.param(2, 8, readers, "load", 2, marks=pytest.mark.slow),
    ],
)
def test_too_many_open_files(
    config: RunConfig,
    whole: RunConfig,
    limits: None,
    num_workers: int,
    left: int,
    owner: Any,
    name: str,
    number: int,
) -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    others = set(multiprocessing.active_children())
    opened: list[int] = []

    def forbid(*_: object) -> None:
        lower(resource.RLIMIT_NOFILE, 1 + left + max(map(int, os.listdir("/proc/self/fd"))))
        with suppress(OSError):
            while True:
                opened.append(os.open(os.devnull, os.O_RDONLY))
        for descriptor in [opened.pop() for _ in range(left)]:
            os.close(descriptor)

    patch = at_call(owner, name, number, forbid)
    message = fails(with_(config, train={"num_workers": num_workers}), (OSError, RuntimeError))  # type: ignore[arg-type]
    patch.undo()
    for descriptor in opened:
        os.close(descriptor)
    lower(resource.RLIMIT_NOFILE, before)
    # Where a reader cannot hand a batch over, it is a matter of time which of the two notices first.
    assert "may open no more files" in message or "want of memory or of open files" in message
    assert "lower --num_workers" in message
    assert "--resume" in message
    for reader in set(multiprocessing.active_children()) - others:
        reader.terminate()  # as Python does at its end, which waits for them
        reader.join(timeout=20)
        assert not reader.is_alive()
    # Torch's half-made iterators raise as they go; within a compilation that confuses Python 3.11's parser.
    gc.collect()
    assert_goes_on(config, whole)


def test_a_worker_is_killed(config: RunConfig, whole: RunConfig) -> None:
    def kill(collator: Collator, draws: Any) -> None:
        if get_worker_info() is not None:
            os.kill(os.getpid(), signal.SIGKILL)

    patch = at_call(Collator, "__call__", 5, kill)
    message = fails(with_(config, train={"num_workers": 1}), RuntimeError)
    patch.undo()
    assert re.search(r"a process that reads images has ended \(DataLoader worker .*", message)
    assert "lower --num_workers" in message
    assert_goes_on(with_(config, train={"num_workers": 0}), whole)


def test_a_stop_sent_to_all_processes_reaches_one(config: RunConfig, whole: RunConfig) -> None:
    """As a terminal sends Ctrl-C and Slurm SIGTERM: the step is ended with what the workers read."""
    trainer = os.getpid()

    def stop(collator: Collator, draws: Any) -> None:
        if get_worker_info() is not None:
            os.kill(trainer, signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGINT)

    patch = at_call(Collator, "__call__", 4, stop)
    result = run(with_(config, train={"num_workers": 1}))
    patch.undo()
    reset_accelerate()
    assert result.exit_status == 128 + signal.SIGTERM
    assert_goes_on(config, whole)


@pytest.mark.parametrize(
    ("step", "message"),
    [(3, "the loss is nan at step 4"), (4, "after step 4 model.prompt.soft_prompt is not finite")],
)
def test_a_number_that_is_none(config: RunConfig, whole: RunConfig, step: int, message: str) -> None:
    def break_(optimizer: torch.optim.Optimizer, *_: object) -> None:
        for group in optimizer.param_groups:
            if group["name"] == "prompt":
                group["params"][0].grad.fill_(math.nan)

    patch = at_call(torch.optim.AdamW, "step", step, break_)
    found = fails(config, ValueError)
    patch.undo()
    assert message in found
    assert "lower the learning rates" in found
    assert [place.name for place in state.checkpoints(Path(config.output_dir or ""))] == ["step-00000002"]
    # Other rates make another run; whoever wants one says so by another folder.
    slower = with_(config, optim={"prompt_lr": 0.01})
    assert "other options (optim.prompt_lr=0.05 -> 0.01)" in fails(slower, ValueError)
    assert_goes_on(config, whole)


def test_a_loss_that_jumps_is_remarked_on(
    config: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    progress = Progress(train_seconds=1.0)
    log = Log(Accelerator(cpu=True), tmp_path / "log.jsonl", progress, max_steps=99, eval_every=99)
    for loss in [9.0, *[1.0] * SPIKE_WINDOW, 4.9, 5.1, 1.0]:
        progress.steps += 1
        log.loss(loss, {})
    log.close()
    lines = capsys.readouterr()
    warnings = [line for line in (lines.out + lines.err).splitlines() if "warning" in line]
    assert len(warnings) == 1
    assert "the loss is 5.100 at step 23; 1.000 is usual" in warnings[0]


def test_what_is_no_fault_of_the_machine_passes(tmp_path: Path) -> None:
    for error in (
        ValueError("a"),
        RuntimeError("b"),
        FileNotFoundError("no image at c"),
        OSError(errno.EINTR, "d"),
    ):
        with pytest.raises(type(error)) as found, explained(tmp_path):
            raise error
        assert found.value is error


def test_a_finished_run_is_not_to_be_resumed(tmp_path: Path) -> None:
    """A report of a folder that another user owns."""
    for name in ("config.json", "summary.json"):
        (tmp_path / name).write_text("{}")
    path = tmp_path / "report.html"
    finished = r"no permission for .*report\.html.* is finished"
    with pytest.raises(OSError, match=finished) as failed, explained(tmp_path):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
    assert "--resume" not in str(failed.value)
    assert "--output_dir" not in str(failed.value)
