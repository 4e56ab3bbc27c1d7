"""Processes that read: what the training process notices of their end, and where."""

import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path

import pytest
from runs import forking
from torch.utils.data import Dataset

from dept_vl.data import workers as readers


class Numbers(Dataset[int]):
    def __len__(self) -> int:
        return 20

    def __getitem__(self, index: int) -> int:
        return index


class Killing(Numbers):
    def __getitem__(self, index: int) -> int:
        if index == 1:  # within what is read ahead
            os.kill(os.getpid(), signal.SIGKILL)
        return index


def killed() -> None:
    batches = iter(readers.load(Killing(), 1, batch_size=1))
    process = batches._workers[0]
    started = time.monotonic()
    while process.is_alive() and time.monotonic() - started < 60:
        time.sleep(0.01)  # where torch's handler would raise
    assert not process.is_alive()
    print("undisturbed", flush=True)
    try:
        print(sum(int(batch) for batch in batches))
    except RuntimeError as error:
        print(error)


def told_early() -> None:
    signal.signal(signal.SIGTERM, lambda *_: print("noted", flush=True))  # as a run does
    os.register_at_fork(after_in_child=lambda: time.sleep(1))
    batches = iter(readers.load(Numbers(), 1, batch_size=1))
    process = batches._workers[0]
    process.terminate()
    process.join(timeout=60)
    print(process.exitcode, flush=True)
    process.kill()
    os.kill(os.getpid(), signal.SIGTERM)  # which this process has its handler for, as before


def told_early_on_macos() -> None:
    del signal.sigwaitinfo
    told_early()


def print_to(path: Path, program: Callable[[], None]) -> None:
    multiprocessing.set_start_method("fork", force=True)  # as in a process of any other kind
    with path.open("w") as printed, redirect_stdout(printed):
        program()


def lines_of(program: Callable[[], None], path: Path) -> list[str]:
    """What a process prints in which nothing has started a reader before."""
    process = forking().Process(target=print_to, args=(path, program))
    process.start()
    process.join(timeout=120)
    assert process.exitcode == 0
    return path.read_text().splitlines()


def test_a_killed_reader_is_noticed_where_its_batch_is_missed(tmp_path: Path) -> None:
    first, second = lines_of(killed, tmp_path / "printed")[:2]
    assert first == "undisturbed"
    assert "DataLoader worker" in second


@pytest.mark.parametrize("program", [told_early, told_early_on_macos])
def test_a_reader_told_to_end_before_it_is_prepared_ends(program: Callable[[], None], tmp_path: Path) -> None:
    assert lines_of(program, tmp_path / "printed") == ["0", "noted"]
