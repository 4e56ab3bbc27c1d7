"""Command line flags for functions and dataclasses, parsed by tyro, with one-line errors."""

import argparse
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stderr
from dataclasses import is_dataclass
from difflib import get_close_matches
from functools import partial, wraps
from io import StringIO
from re import findall, search, split
from typing import Any, NoReturn, TypeVar, get_type_hints

import tyro

from dept_vl._utils.errors import UnknownNameError, UsageError, closest
from dept_vl._utils.options import Options, validate
from dept_vl._utils.printable import say

Command = Callable[[list[str]], object]
"""Function of the command line arguments that returns the exit status, or something else for 0."""
T = TypeVar("T")
AnyOptions = TypeVar("AnyOptions", bound=Options)


def note_lone_process() -> None:
    """Print a note if accelerate was asked for several processes, but started one.

    It does so without `--multi_gpu` where it finds fewer than two GPUs. All that is left of the request is
    the address at which the processes would have met.
    """
    launched = {"ACCELERATE_MIXED_PRECISION", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()
    if launched and not {"RANK", "WORLD_SIZE"} & os.environ.keys():
        say(
            "note: accelerate started one process instead of several; add --multi_gpu, which works on a CPU "
            "too",
            error=True,
        )


def parse_options(
    kind: type[AnyOptions], arguments: Sequence[str], program: str, description: str | None
) -> AnyOptions:
    """Parse flags into a dataclass; UsageError if one is unknown, missing or out of range."""
    options = flags_of(kind, arguments, prog=program, description=description)
    validate(options)
    return options


class FirstFlags(argparse.ArgumentParser):
    """Parser for flags that determine other flags. Errors are raised as `UsageError`."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


def flags_of(kind: Callable[..., T], arguments: Sequence[str], **options: Any) -> T:
    """Parse flags with tyro; convert its error box to a one-line UsageError."""
    if {"-h", "--help"} & set(arguments):
        _join_help(kind)
    printed = StringIO()
    try:
        with redirect_stderr(printed):
            values: T = tyro.cli(kind, args=arguments, use_underscores=True, **options)
    except SystemExit as stop:
        if not stop.code:
            raise
        raise UsageError(_one_line(printed.getvalue())) from None
    return values


def _join_help(kind: Any) -> None:
    """Join the lines of help texts, since tyro keeps the line breaks of docstrings below indented fields."""
    from docstring_parser import parse_from_object

    if not (isinstance(kind, type) and is_dataclass(kind)):
        return
    for part in kind.__mro__[:-1]:
        texts = {one.arg_name: one.description or "" for one in parse_from_object(part).params}
        lines = [f"    {name}: {' '.join(text.split())}" for name, text in texts.items()]
        about = (part.__doc__ or "").partition("\n\nArgs:\n")[0]
        part.__doc__ = "\n".join([f"{about}\n\nArgs:", *lines]) if lines else part.__doc__
    for hint in get_type_hints(kind).values():
        _join_help(hint)


def _one_line(box: str) -> str:
    """Return the main text of tyro's error box (drawn in Unicode or ASCII), with the suggested names."""
    lines = [line.strip("│ ") for line in box.splitlines() if line[:1] not in ("╭", "╰")]
    parts = [" ".join(part.split()) for part in split("[─-]{8,}", "\n".join(lines))]
    if "╭" not in box:
        parts = parts[1:]  # the title
    text = ((parts or [box])[0] or "bad command line").rstrip(".")
    if choice := search(r"invalid choice '(.*?)' .*\((.*)\)", text):
        return text + closest(get_close_matches(choice[1], findall(r"'(.*?)'", choice[2])))
    meant = next((part for part in parts[1:] if part.startswith("Perhaps you meant")), "")
    names = list(dict.fromkeys(findall(r"--[a-z][\w-]*", meant)))[:3]
    return text + closest(names)


def choose(commands: Mapping[str, Command], program: str, about: str, arguments: list[str]) -> object:
    """Run the command named by the first argument. Without arguments, or for --help, list the commands."""
    if not arguments or arguments[0] in ("-h", "--help"):
        lines = [
            f"  {name:<12}{(command.__doc__ or '').splitlines()[0]}" for name, command in commands.items()
        ]
        say(f"usage: {program} COMMAND [OPTIONS]", "", *about.split("\n"), "", *lines, "")
        say(f"{program} COMMAND --help lists the options of a command.")
        if arguments:
            return 0
        raise UsageError(f"a command is missing; there are: {', '.join(commands)}")
    name = arguments[0]
    if name not in commands:
        raise UnknownNameError("command", name, commands)
    return commands[name](arguments[1:])


def call(
    functions: Mapping[str, Callable[..., Any]], program: str, about: str | None, arguments: list[str]
) -> object:
    """Call the function named by the first argument, with its arguments from flags."""

    def command(name: str, function: Callable[..., Any]) -> Command:
        @wraps(function)
        def deferred(*values: Any, **named: Any) -> Callable[[], object]:
            return partial(function, *values, **named)

        @wraps(function)
        def run(rest: list[str]) -> object:
            call: Any = flags_of(deferred, rest, prog=f"{program} {name}")
            return call()

        return run

    commands = {name: command(name, function) for name, function in functions.items()}
    return choose(commands, program, about or "", arguments)
