"""How far a phase is, in a pipe, on a terminal and in several processes."""

import io
import re
import sys
import time

import pytest

from dept_vl._utils import terminal
from dept_vl._utils.printable import say
from dept_vl._utils.terminal import Count, counted, waiting


class Screen(io.StringIO):
    """A terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, which goes on as a test says."""
    now = [100.0]
    monkeypatch.setattr(terminal, "monotonic", lambda: now[0])
    monkeypatch.setattr(Count, "told_at", 0.0)
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


def test_one_piece_that_takes_long_is_told_of(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(terminal, "PLAIN_SECONDS", 0.2)
    monkeypatch.setattr(terminal, "BEAT", 0.01)
    monkeypatch.setattr(Count, "begun", [])  # without those that an earlier test stopped in the middle
    with waiting("preparing"):
        with Count("evaluating", 3) as count:
            time.sleep(0.5)
            count.add(1)
        time.sleep(0.5)
    said = [re.sub(r"\d+s", "Ns", line) for line in capsys.readouterr().err.splitlines()]
    assert said[0] == "evaluating: 0 of 3, Ns so far"
    assert said[-1] == "preparing: Ns so far"
    assert set(said) <= {said[0], "evaluating: 1 of 3, Ns left", said[-1]}
    time.sleep(0.3)
    assert capsys.readouterr().err == ""
    assert Count.begun == []


def test_what_was_done_before_took_no_time(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with Count("training", 100, done=50) as count:
        clock[0] += 20
        count.add(10)
    assert capsys.readouterr().err == "training: 60 of 100, 1m20s left\n"


def test_a_line_that_stays_is_not_drawn_over(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Screen()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setattr(sys, "stdout", screen)
    with waiting("loading"):
        say("this stays")
    assert re.search(r"\rthis stays\n", screen.getvalue())


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
