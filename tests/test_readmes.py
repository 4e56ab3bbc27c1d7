"""Every command that a README shows is read by its program, and the files that it names are there."""

import re
import runpy
import shlex
import sys
import tomllib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from dept_vl import cli
from dept_vl._utils import flags
from dept_vl.config import RunConfig

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *(
        page
        for folder in ("scripts", "tests", "data", "dept_vl")
        for page in (ROOT / folder).rglob("README.md")
    ),
]
PROGRAMS = ("dept-vl", "python", "accelerate", "srun", "make", "pip", ".venv/bin/python")
ELSEWHERE = ("data/vqav2", "data/gqa", "data/nlvr2", "data/coco", "data/snippets", "data/concepts")
"""Folders for data that does not ship, as README.md and data/README.md say."""


class Read(BaseException):
    """The flags of a command were read: nothing more of it is to be run."""


def commands() -> dict[str, str]:
    """Commands of the pages, by page and text."""
    found = {}
    for page in PAGES:
        if "fixtures" in page.parts:
            continue
        for block in re.findall(r"^```(?:bash|sh|console)?\n(.*?)^```", page.read_text(), re.S | re.M):
            for line in re.sub(r"\\\n\s*", "", block).splitlines():
                text = re.sub(r"^(?:[A-Z_]+=\S+ )+", "", line.strip())
                if text.startswith(PROGRAMS):
                    found[f"{page.relative_to(ROOT)}: {text}"] = text
    return found


COMMANDS = commands()


def program(text: str) -> list[str]:
    """The words of a command from its script on, `dept-vl` for the installed command."""
    words = shlex.split(re.sub(r" \[.*\]$| \.\.\.$", "", text), comments=True)
    if words[0] == "srun":
        words = words[1:]
    if words[:2] == ["accelerate", "launch"]:
        words = words[2:]
        while words[0].startswith("--"):
            words = words[1:] if words[0] == "--multi_gpu" else words[2:]
        if words[:2] == ["-m", "dept_vl"]:
            words = ["dept-vl", *words[2:]]
    return words[1:] if words[0].endswith("python") else words


def test_pages_show_commands() -> None:
    """The pattern finds them, or what follows would pass by finding none."""
    assert len(COMMANDS) > 50
    assert {program(text)[0] for text in COMMANDS.values()} >= {"dept-vl", "scripts/train_vqa.py", "make"}


@pytest.mark.parametrize("name", COMMANDS)
def test_command_is_read(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every flag and value of it is one that the program has; the engines are not started."""
    words = program(COMMANDS[name])
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.M)
        return
    if words[0] == "pip":
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        assert set(re.findall(r"\[(.*)\]", words[-1])) <= set(extras)
        return
    if words[0] == "-m":
        return
    read = flags.flags_of

    def only_read(*arguments: Any, **options: Any) -> Any:
        read(*arguments, **options)
        raise Read

    def config_or_default(path: Path, base: RunConfig | None = None) -> RunConfig:
        # Configurations of runs that nobody has made here.
        return original(path, base) if path.is_file() else base or RunConfig()

    original = cli.read_config
    for module in (cli, flags):
        monkeypatch.setattr(module, "flags_of", only_read)
    monkeypatch.setattr(cli, "read_config", config_or_default)
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", words)
    run: Callable[[], Any] = partial(cli.main, words[1:])
    if words[0] != "dept-vl":
        run = partial(runpy.run_path, str(ROOT / words[0]), run_name="__main__")
    with pytest.raises(Read):
        run()


@pytest.mark.parametrize("name", COMMANDS)
def test_what_ships_is_there(name: str) -> None:
    """Paths of the project that a command names exist, but for data that the pages say does not ship."""
    for word in program(COMMANDS[name]):
        if word.startswith(("data/", "scripts/")) and not word.startswith(ELSEWHERE):
            assert (ROOT / word).exists(), word
