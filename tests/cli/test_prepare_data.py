"""The commands that prepare data: what they print, and with which status they end."""

import io
import runpy
import shutil
import sys
from collections.abc import Callable
from contextlib import redirect_stderr
from pathlib import Path

import pytest

from dept_vl.cli import data
from dept_vl.tasks import load_task
from dept_vl.tasks.prepare import commands

SCRIPT = Path(__file__).parents[2] / "scripts" / "prepare_data.py"


@pytest.fixture
def end(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int | str]:
    """Run the script; returns its status, or the line with which it ends."""

    def run(*arguments: object) -> int | str:
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, arguments)])
        said = io.StringIO()
        with pytest.raises(SystemExit) as stop, redirect_stderr(said):
            runpy.run_path(str(SCRIPT), run_name="__main__")
        assert isinstance(stop.value.code, int)
        return said.getvalue().removesuffix("\n") or stop.value.code

    return run


@pytest.fixture
def damaged(scenes: Path, tmp_path: Path) -> Path:
    """VQAv2 without any training image."""
    root = shutil.copytree(scenes / "vqav2", tmp_path / "vqav2")
    for path in load_task("vqav2", root, "train").image_files():
        path.unlink()
    return root


def test_scenes_are_of_the_sizes_asked_for(
    end: Callable[..., int | str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "scenes"
    flags = ("--output_dir", folder, "--train", 3, "--val", 2, "--test", 1)
    assert end("scenes", *flags) == 0
    assert f"{folder} holds vqav2, gqa, nlvr2 and coco" in capsys.readouterr().out
    for task, splits in {
        "vqav2": ("train", "val", "test"),
        "gqa": ("train", "val", "testdev"),
        "coco": ("train", "val", "test"),
    }.items():
        counts = [len(load_task(task, folder / task, split).image_files()) for split in splits]
        assert counts == [3, 2, 1]
    assert [len(load_task("nlvr2", folder / "nlvr2", s)) for s in ("train", "dev", "test1")] == [6, 4, 2]
    assert "is there already" in str(end("scenes", *flags))


def test_the_check_says_what_is_there_and_what_is_not(
    end: Callable[..., int | str], scenes: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # All files of NLVR2 are there, though not as many sentences as were published.
    assert end("check", "--task", "nlvr2", "--root", scenes / "nlvr2", "--sample", 0) == 1
    lines = capsys.readouterr().out.splitlines()
    assert f"found    {scenes / 'nlvr2' / 'dev.json'}" in lines
    assert "differs  nlvr2 dev: examples: found 12, published are 6,982" in lines
    assert lines[-1] == f"not everything of nlvr2 is in {scenes / 'nlvr2'}"


def test_the_check_passes_what_is_whole(
    end: Callable[..., int | str],
    scenes: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from dept_vl.tasks.prepare import check

    def whole(*args: object, **options: object) -> list[check.Finding]:
        return [check.Finding("found", "a file"), check.Finding("ok", "a count")]

    monkeypatch.setattr(check, "check", whole)
    assert end("check", "--task", "nlvr2", "--root", scenes / "nlvr2") == 0
    assert capsys.readouterr().out.splitlines()[-1] == "everything is there"


def test_a_long_list_is_cut_on_the_screen_and_whole_in_the_report(
    damaged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(commands, "SHOWN", 5)
    report = tmp_path / "report.txt"
    flags = ["check", "--task", "vqav2", "--root", str(damaged), "--report", str(report)]
    assert data(flags) == 1
    shown = capsys.readouterr().out.splitlines()
    written = report.read_text().splitlines()
    missing = [line for line in written if line.startswith("missing ")]
    gone = [line for line in written if "COCO_train2014" in line]
    assert len(gone) == 12
    assert [line for line in shown if line.startswith("missing ")] == [
        *missing[:5],
        f"missing  {len(missing) - 5} more; --report FILE names them all",
    ]
    # What is good is shown however much is missing.
    assert [line for line in written if line.startswith(("found", "ok"))] == [
        line for line in shown if line.startswith(("found", "ok"))
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("check", "--task", "okvqa", "--root", "."), "unknown task 'okvqa'"),
        (("scene",), "closest: scenes"),
        (("snippets", "--archiv", "x"), "closest: --archive"),
        (("check", "--task", "gqa", "--root", "no-such-folder"), "no folder no-such-folder"),
        (("from-hub", "--task", "okvqa", "--split", "val", "--output_dir", "x"), "unknown task 'okvqa'"),
        (("from-hub", "--task", "vqav2", "--split", "minival", "--output_dir", "x"), "got 'minival'"),
    ],
)
def test_errors_end_in_one_line(
    end: Callable[..., int | str],
    arguments: tuple[str, ...],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    said = end(*arguments)
    assert isinstance(said, str)
    assert message in said
    assert "\n" not in said
    assert not [*tmp_path.iterdir()]
