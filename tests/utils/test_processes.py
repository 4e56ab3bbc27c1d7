"""What the main process does for all, in two processes."""

import os
from pathlib import Path

import pytest
from accelerate import PartialState
from runs import in_two_processes

from dept_vl._utils.errors import UnknownNameError, UsageError
from dept_vl._utils.processes import main_first, on_main


def note(folder: Path, text: str) -> None:
    with (folder / f"{os.environ['RANK']}.txt").open("a") as file:
        file.write(text + "\n")


def works_and_fails(folder: Path) -> None:
    processes = PartialState(cpu=True)

    def work() -> str:
        note(folder, "worked")
        return "result"

    def fail() -> None:
        raise UnknownNameError("task", "vqq", ["vqa"])  # which cannot be sent: it is made of other things

    def full() -> None:
        raise OSError(28, "no room", "there")

    note(folder, on_main(processes, work))
    with pytest.raises(UsageError, match="unknown task 'vqq'"):
        on_main(processes, fail)
    with pytest.raises(OSError, match="no room") as error:
        on_main(processes, full)
    assert (error.value.errno, error.value.filename) == (28, "there")

    def look() -> None:
        with main_first(processes):
            note(folder, "looked")
            raise KeyError("both")

    with pytest.raises(KeyError):
        look()
    processes.wait_for_everyone()
    note(folder, "ended")


def test_every_process_has_the_result_or_the_error(tmp_path: Path) -> None:
    in_two_processes(works_and_fails, tmp_path)
    assert (tmp_path / "0.txt").read_text().split() == ["worked", "result", "looked", "ended"]
    assert (tmp_path / "1.txt").read_text().split() == ["result", "looked", "ended"]


def test_alone_it_is_a_call() -> None:
    assert on_main(None, lambda: 3) == 3
