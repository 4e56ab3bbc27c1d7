"""Errors that users cause, by what is wrong; the command line prints each as one line."""

import os
import signal
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from difflib import get_close_matches
from pathlib import Path

from dept_vl._utils.printable import say

PACKAGE = Path(__file__).resolve().parents[1]


class UsageError(ValueError):
    """Options that are unknown, out of range, or do not fit each other. The command line exits with 2."""


class DamagedFileError(ValueError):
    """A file of ours that is not as it was written."""


class UnknownNameError(UsageError):
    """A name of a category, such as `task`, that is not among the known ones."""

    def __init__(self, category: str, name: str, known: Iterable[str]) -> None:
        known = list(known)
        closest = get_close_matches(name, known)
        meant = f"; closest: {', '.join(closest)}" if closest else ""
        super().__init__(f"unknown {category} {name!r:.80}; there are: {', '.join(known)}{meant}")
        self.category, self.name, self.known, self.closest = category, name, known, closest


class InUseError(RuntimeError):
    """A folder that another process writes to."""


DEBUG_VARIABLE = "DEPT_VL_DEBUG"
RAISED = (ValueError, RuntimeError, ImportError)
"""What our own `raise` statements report mistakes of users with, besides `OSError`."""
MAIN_FIRST = 5.0
"""Seconds that another process leaves the main one to report an error that all have: the first that fails
ends the launch, and with it those that have said nothing yet."""
LONGEST_LINE = 2000


def exit_status(command: Callable[[list[str]], object], arguments: Sequence[str]) -> int:
    """Run a command, and print an error that the user caused as one line on stderr.

    Args:
        command: Takes the command line; what it returns is the exit status if it is a whole number.
        arguments: Without the program's name. `--debug` among them, or `DEPT_VL_DEBUG=1` in the environment,
            keeps the traceback.

    Returns:
        The exit status: 2 for a `UsageError`, 1 for another mistake of the user.

    Raises:
        Exception: If it is a bug, or for `--debug`.
    """
    debug = "--debug" in arguments or os.environ.get(DEBUG_VARIABLE, "0") not in ("", "0")
    try:
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

    Errors that another library raised in the middle of its work keep their traceback.
    """
    if isinstance(error, UsageError | OSError):
        return True
    frames = traceback.extract_tb(error.__traceback__)
    return (
        isinstance(error, RAISED)
        and bool(frames)
        and Path(frames[-1].filename).resolve().is_relative_to(PACKAGE)
    )


def _report(error: BaseException, *, same_everywhere: bool) -> None:
    """Print the line; of several processes the main one prints what all of them have."""
    rank = os.environ.get("RANK", "0")
    if rank != "0":
        time.sleep(MAIN_FIRST)  # the launcher ends this process if the main one fails meanwhile
        if same_everywhere:
            return
    where = "" if rank == "0" else f" (process {rank})"
    text = " ".join(str(error).split()) or type(error).__name__
    say(f"dept-vl: error{where}: {text[:LONGEST_LINE]}", error=True, each=True)
