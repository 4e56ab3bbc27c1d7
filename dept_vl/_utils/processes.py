"""What one of several processes does for all of them: every one gets the result, or the error."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast_object_list

from dept_vl._utils.errors import UsageError

T = TypeVar("T")
KINDS: tuple[type[Exception], ...] = (UsageError, OSError, ValueError, RuntimeError)
"""What stands for an error that cannot be sent to another process."""


def on_main(processes: Accelerator | PartialState | None, function: Callable[[], T]) -> T:
    """Call a function on the main process; every process, all of which call this, gets result or error."""
    if processes is None or processes.num_processes == 1:
        return function()
    outcome: list[T | Exception | None] = [None, None]
    raised: Exception | None = None
    if processes.is_main_process:
        try:
            outcome[0] = function()
        except Exception as error:
            raised, outcome[1] = error, _sendable(error)
    result, problem = broadcast_object_list(outcome)
    if raised is not None:
        raise raised
    if problem is not None:
        raise problem
    found: T = result
    return found


@contextmanager
def main_first(processes: Accelerator | PartialState) -> Iterator[None]:
    """Let the main process of each machine go first, and the others after it though it has failed.

    They come upon the same error then, where accelerate's own leaves them waiting.
    """
    first = processes.is_local_main_process
    if not first:
        processes.wait_for_everyone()
    try:
        yield
    finally:
        if first:
            processes.wait_for_everyone()


def _sendable(error: Exception) -> Exception:
    try:
        copy.copy(error)  # made anew of its arguments, as the other process makes it
    except Exception:
        kind = next((kind for kind in KINDS if isinstance(error, kind)), RuntimeError)
        return kind(str(error))
    return error
