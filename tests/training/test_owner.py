"""One folder, one writer: of runs that are started at once exactly one trains."""

import json
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import write_vqa
from runs import forking, log

from dept_vl._utils.errors import InUseError
from dept_vl.config import DataOptions, EvaluateConfig, RunConfig
from dept_vl.training.options import ReportConfig
from dept_vl.training.owner import owning
from dept_vl.training.report.remake import remake
from dept_vl.training.run import run
from dept_vl.training.score_run import score_run

pytestmark = pytest.mark.usefixtures("fresh_accelerate")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, make_run: Callable[..., RunConfig]) -> RunConfig:
    data = write_vqa(tmp_path_factory.mktemp("owner") / "vqa")
    return make_run(DataOptions(data_dir=data, holdout_images=1), max_steps=3, eval_every=3)


def start_one(config: RunConfig, barrier: Any, ends: Any) -> None:
    """Start together with the others, and tell how it ended."""
    torch.set_num_threads(1)
    barrier.wait()
    try:
        result = run(config)
    except (InUseError, FileExistsError) as error:
        ends.put(type(error).__name__)
    else:
        ends.put("finished already" if result.training is None else "trained")


def start_at_once(config: RunConfig, count: int) -> list[str]:
    """Start so many runs at once, and return how they ended."""
    barrier, ends = forking().Barrier(count), forking().Queue()
    processes = [forking().Process(target=start_one, args=(config, barrier, ends)) for _ in range(count)]
    for process in processes:
        process.start()
    found = [ends.get(timeout=300) for _ in processes]
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    return sorted(found)


def assert_one_trained(config: RunConfig, count: int, folder: Path, resume: str, *, wait: bool) -> None:
    ends = start_at_once(replace(config, output_dir=folder, resume=resume, wait=wait), count)
    assert ends.count("trained") == 1, ends
    if wait and resume:
        assert ends == ["finished already"] * (count - 1) + ["trained"]
    assert [line["step"] for line in log(folder)] == [1, 2, 3, 3]
    assert (folder / "report.html").is_file()
    assert not any((folder / name).exists() for name in (".lock", ".owner.json"))


@pytest.mark.parametrize(("count", "resume"), [(2, "auto"), (3, "")])
def test_one_of_several_trains(config: RunConfig, tmp_path: Path, count: int, resume: str) -> None:
    assert_one_trained(config, count, tmp_path / "run", resume, wait=resume == "auto")


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 3, 5])
def test_one_of_several_trains_again_and_again(config: RunConfig, tmp_path: Path, count: int) -> None:
    for number in range(20):
        resume = "auto" if number % 2 else ""
        assert_one_trained(config, count, tmp_path / f"run-{number}", resume, wait=number % 4 == 3)


def hold(folder: Path, held: Any) -> None:
    with owning(folder):
        held.set()
        time.sleep(60)


@pytest.fixture
def holder(tmp_path: Path) -> Any:
    """A process that has the folder of a run."""
    held = forking().Event()
    process = forking().Process(target=hold, args=(tmp_path / "run", held))
    process.start()
    assert held.wait(60)
    yield process
    process.kill()
    process.join()


def test_who_has_it_is_said_to_all_who_would_write(config: RunConfig, tmp_path: Path, holder: Any) -> None:
    folder = tmp_path / "run"
    (folder / "config.json").write_text(json.dumps({}))
    (folder / "log.jsonl").touch()
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    for start in (
        lambda: run(replace(config, resume=str(folder))),
        lambda: run(replace(config, resume="auto", output_dir=folder)),
        lambda: score_run(EvaluateConfig(folder, output_dir=folder)),
        lambda: remake(ReportConfig(folder)),
    ):
        with pytest.raises(InUseError, match=rf"{folder} is in use by process {holder.pid} since"):
            start()
    # Above all its claim, which is another's.
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    owner = folder / ".owner.json"
    owner.write_text(owner.read_text().replace(json.loads(owner.read_text())["host"], "node-17"))
    with pytest.raises(InUseError, match=r"of the host node-17 .*remove .*/\.lock"), owning(folder):
        pass


def test_it_ends_with_its_process(tmp_path: Path, holder: Any) -> None:
    os.kill(holder.pid, signal.SIGKILL)
    holder.join()
    assert (tmp_path / "run" / ".owner.json").is_file()
    with owning(tmp_path / "run"):
        assert json.loads((tmp_path / "run" / ".owner.json").read_text())["process"] == os.getpid()
    assert not list((tmp_path / "run").iterdir())


def test_waiting(tmp_path: Path, holder: Any, capsys: pytest.CaptureFixture[str]) -> None:
    threading.Timer(0.5, holder.kill).start()
    with owning(tmp_path / "run", wait=True):
        assert f"in use by process {holder.pid}" in capsys.readouterr().out


def test_a_reader_that_is_left_behind_has_no_part_in_it(tmp_path: Path) -> None:
    """Processes that read images are forked while the lock is held; it is free when the run is gone."""
    with owning(tmp_path / "run"):
        reader = multiprocessing.get_context("fork").Process(target=time.sleep, args=(30,))
        reader.start()
    try:
        with owning(tmp_path / "run"):
            pass
    finally:
        reader.kill()
        reader.join()


def test_a_folder_that_was_made_for_nothing_is_removed(tmp_path: Path) -> None:
    with owning(tmp_path / "new"):
        pass
    assert not (tmp_path / "new").exists()
