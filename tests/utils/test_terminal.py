"""How far a phase is, in a pipe, on a terminal and in several processes."""

import io
import sys

import pytest

from dept_vl._utils import terminal
from dept_vl._utils.terminal import Count, counted


class Screen(io.StringIO):
    """A terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, which goes on as a test says."""
    now = [100.0]
    monkeypatch.setattr(terminal, "monotonic", lambda: now[0])
    return now


def test_in_a_pipe_there_is_a_line_every_ten_seconds(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in counted("evaluating", range(10_000), 10_000):
        clock[0] += 0.00390625
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.splitlines() == [
        "evaluating: 2,560 of 10,000, 29s left",
        "evaluating: 5,120 of 10,000, 19s left",
        "evaluating: 7,680 of 10,000, 9s left",
    ]


def test_what_is_quick_says_nothing(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    for _ in counted("evaluating", range(100), 100):
        clock[0] += 0.09
    assert capsys.readouterr().err == ""


def test_bytes_are_told_in_mebibytes(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with Count("reading a.json", 400 << 20, ("MiB", 1 << 20)) as count:
        clock[0] += 11
        count.add(100 << 20)
    assert capsys.readouterr().err == "reading a.json: 100 of 400 MiB, 33s left\n"


def test_of_several_processes_the_main_one_tells(
    clock: list[float], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for rank, show in (("1", True), ("0", False)):
        monkeypatch.setenv("RANK", rank)
        for _ in counted("evaluating", range(2), 2, show=show):
            clock[0] += 11
    assert capsys.readouterr().err == ""


def test_on_a_terminal_there_is_a_bar_that_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Screen()
    monkeypatch.setattr(sys, "stderr", screen)
    assert list(counted("evaluating", ["a", "bb"], 3, size=len)) == ["a", "bb"]
    shown = screen.getvalue()
    assert "\revaluating:" in shown
    assert "0/3" in shown
    assert shown.endswith("\r")
    assert "\n" not in shown
