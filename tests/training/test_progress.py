"""The line that a person watches: on terminals of several widths, in a pipe, and in a notebook."""

import os
import pty
import re
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dept_vl._utils.terminal import duration
from dept_vl.training.progress import Figures, fitted, short

ROOT = Path(__file__).parents[2]
FIGURES = Figures(
    0.5123,
    {"prompt": 0.287, "low_rank": 9.57e-4, "visual_projection": 9.57e-4},
    1234.0,
    56_700.0,
    12.34,
    9060.0,
)
STEPS = """
from dept_vl._utils.printable import say
from dept_vl.training.progress import Figures, ProgressLine
line = ProgressLine({total}, {done}, show=True)
figures = Figures(0.5123, {{"prompt": 0.287, "low_rank": 9.57e-4, "visual_projection": 9.57e-4}}, 1234.0,
                  56_700.0, 12.34, 9060.0)
for step in range({done} + 1, {done} + 5):
    line.advance(step)
    line.tell(step, figures)
say("step {done}: dev accuracy 61.50")
line.advance({total})
line.tell({total}, figures)
line.close()
"""


def on_a_terminal(columns: int, total: int, done: int) -> str:
    """What a program that trains so far writes to a terminal so wide."""
    import fcntl
    import termios

    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    process = subprocess.Popen(
        [sys.executable, "-c", STEPS.format(total=total, done=done)],
        cwd=ROOT,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env={name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")},
    )
    os.close(theirs)
    written = b""
    while True:
        try:
            part = os.read(ours, 65536)
        except OSError:  # how a terminal ends
            break
        if not part:
            break
        written += part
    os.close(ours)
    assert process.wait() == 0
    return written.decode()


@pytest.mark.parametrize(
    ("columns", "total", "shown"),
    [
        (80, 9999, "loss 0.512 2h31m left lr 0.29/9.6e-4/9.6e-4 1.2k ex/s 57k tok/s"),
        (120, 30_000, "loss 0.512 2h31m left lr 0.29/9.6e-4/9.6e-4 1.2k ex/s 57k tok/s 12.3G"),
        (40, 9999, "loss 0.512 2h31m left"),
    ],
)
def test_on_a_terminal_one_line_is_drawn_over(columns: int, total: int, shown: str) -> None:
    written = on_a_terminal(columns, total, 1230)
    kept, *_ = [line for line in written.split("\r\n") if "dev accuracy" in line]
    assert kept.split("\r")[-1] == "step 1230: dev accuracy 61.50"
    drawn = [line for row in written.split("\r\n") for line in row.split("\r")]
    lines = [re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", line).rstrip() for line in drawn]
    assert max(map(len, lines)) < columns
    assert any(line.startswith(f"1234/{total} {shown}") for line in lines)
    assert lines[-2].startswith(f"{total}/{total} {shown}")
    # One line but for what was to stay.
    assert written.count("\n") == 2


def test_with_every_figure_a_run_of_9999_steps_fits_80_columns() -> None:
    pieces = ["1234/9999", *FIGURES.brief()]
    assert fitted(pieces, 79) == " ".join(pieces)


def test_in_a_pipe_there_are_plain_lines_now_and_then() -> None:
    done = subprocess.run(
        [sys.executable, "-c", STEPS.format(total=90, done=3)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr == ""
    figures = (
        "loss 0.512, lr prompt 0.287 low_rank 0.000957 visual_projection 0.000957, 1.2k samples/s, "
        "57k tokens/s, 12.3 GiB, 2h31m left"
    )
    # Of four steps in less than a second the first, and the last of the run.
    assert done.stdout.splitlines() == [
        f"step 4/90: {figures}",
        "step 3: dev accuracy 61.50",
        f"step 90/90: {figures}",
    ]


def test_in_a_notebook_one_line_is_drawn_over_without_widgets() -> None:
    pytest.importorskip("ipykernel", reason="the kernel of notebooks is not installed")
    manager = pytest.importorskip("jupyter_client.manager")
    kernel, client = manager.start_new_kernel(
        startup_timeout=60, cwd=str(ROOT), extra_arguments=["--HistoryManager.enabled=False"]
    )
    written: list[str] = []

    def note(message: dict[str, Any]) -> None:
        assert message["msg_type"] != "error", message["content"]
        if message["msg_type"] == "stream":
            written.append(message["content"]["text"])

    try:
        client.execute_interactive(STEPS.format(total=90, done=3), timeout=60, output_hook=note)
    finally:
        client.stop_channels()
        kernel.shutdown_kernel(now=True)
    text = "".join(written)
    assert text.count("\r") > 3
    assert "\r90/90 loss 0.512 2h31m left lr 0.29/9.6e-4/9.6e-4 1.2k ex/s 57k tok/s 12.3G" in text
    assert "step 3: dev accuracy 61.50" in text


def test_what_does_not_fit_is_left_out_whole() -> None:
    assert fitted(["a", "bb", "ccc", "d"], 4) == "a bb"
    assert fitted(["a", "bb"], 3) == "a"


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0.0, "0.00"),
        (0.517, "0.52"),
        (5.17, "5.2"),
        (9.96, "10"),
        (517.4, "517"),
        (999.7, "1.0k"),
        (5174.0, "5.2k"),
        (51_740.0, "52k"),
        (999_700.0, "1.0M"),
        (51_740_000.0, "52M"),
    ],
)
def test_short(number: float, text: str) -> None:
    assert short(number) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.2, "0s"), (59.6, "1m00s"), (151.0, "2m31s"), (9060.0, "2h31m"), (273_600.0, "3d04h")],
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text
