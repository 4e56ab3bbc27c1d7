"""Exceptions for errors caused by users. The command line prints them as one line."""

import os
import signal
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from difflib import get_close_matches
from pathlib import Path

from dept_vl._utils.printable import notes_shown, say

PACKAGE = Path(__file__).resolve().parents[1]


class UsageError(ValueError):
    """Invalid options: unknown, out of range, or incompatible. The command line then exits with status 2."""


class DamagedFileError(ValueError):
    """A file of this package that has changed since it was written."""


class NotFiniteError(ValueError):
    """A loss or a trained parameter that is not finite."""


def closest(names: Sequence[str]) -> str:
    """Format the names closest to a mistyped one as the end of a message; empty without names."""
    return f"; closest: {', '.join(names)}" if names else ""


class UnknownNameError(UsageError):
    """An unknown name in a category such as `task`. The message lists the known names."""

    def __init__(self, category: str, name: str, known: Iterable[str]) -> None:
        known = list(known)
        self.closest = get_close_matches(name, known)
        known_names = f"there are: {', '.join(known)}{closest(self.closest)}"
        super().__init__(f"unknown {category} {name!r:.80}; {known_names}")


class InUseError(RuntimeError):
    """A folder that another process is writing to."""


DEBUG_VARIABLE = "DEPT_VL_DEBUG"
RAISED = (ValueError, RuntimeError, ImportError)
"""Exception types, besides `OSError`, that this package raises for errors caused by users."""
MAIN_FIRST = 5.0
"""Seconds that other processes wait for the main process to report a shared error. The first process that
fails ends the launch, and with it the processes that have not reported yet."""
LONGEST_LINE = 2000


def exit_status(command: Callable[[list[str]], object], arguments: Sequence[str]) -> int:
    """Run a command and return its exit status; errors caused by the user are printed as one line on stderr.

    The status is the integer that the command returns, 2 for a `UsageError`, or 1 for another error caused by
    the user. Bugs are raised, and all errors with `--debug` or with `DEPT_VL_DEBUG=1` in the environment.
    """
    debug = "--debug" in arguments or os.environ.get(DEBUG_VARIABLE, "0") not in ("", "0")
    try:
        with notes_shown():
            status = command([argument for argument in arguments if argument != "--debug"])
    except KeyboardInterrupt:
        if debug:
            raise
        return 128 + signal.SIGINT
    except Exception as error:
        if debug or not is_user_error(error):
            raise
        usage = isinstance(error, UsageError)
        _report(error, same_everywhere=usage)
        return 2 if usage else 1
    return int(status) if isinstance(status, int) else 0


def is_user_error(error: BaseException) -> bool:
    """Return whether an error was raised in this package, or comes from the file system or the network.

    Other errors, raised inside libraries, keep their traceback.
    """
    if isinstance(error, UsageError | OSError):
        return True
    if isinstance(error, RuntimeError) and str(error).startswith("Symlink loop"):  # pathlib's, until 3.13
        return True
    frames = traceback.extract_tb(error.__traceback__)
    return (
        isinstance(error, RAISED)
        and bool(frames)
        and Path(frames[-1].filename).resolve().is_relative_to(PACKAGE)
    )


def _report(error: BaseException, *, same_everywhere: bool) -> None:
    """Print an error. Errors that all processes share are printed by the main process only."""
    rank = os.environ.get("RANK", "0")
    if rank != "0":
        time.sleep(MAIN_FIRST)  # the launcher ends this process if the main one fails meanwhile
        if same_everywhere:
            return
    where = "" if rank == "0" else f" (process {rank})"
    text = " ".join(_message(error).split()) or type(error).__name__
    say(f"dept-vl: error{where}: {text[:LONGEST_LINE]}", error=True, each=True)


def _message(error: BaseException) -> str:
    """Return the message of an error; the system's own does not say that a file is where a folder goes."""
    if isinstance(error, FileExistsError | NotADirectoryError) and error.filename:
        path = Path(error.filename)
        file = next((place for place in (path, *path.parents) if place.is_file()), None)
        if file is not None:
            return f"expected a folder at {file}, found a file; choose another folder"
    return str(error)
