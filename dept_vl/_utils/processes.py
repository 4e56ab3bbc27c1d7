"""Work of one process for all: every process gets the result or the error."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast_object_list

from dept_vl._utils.errors import UsageError

T = TypeVar("T")
KINDS: tuple[type[Exception], ...] = (UsageError, OSError, ValueError, RuntimeError)
"""Exception types that replace an error that cannot be sent to another process."""


def on_main(processes: Accelerator | PartialState | None, function: Callable[[], T]) -> T:
    """Call a function on the main process and return its result, or raise its error, on every process."""
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
    """Let the main process of each machine run first, then the others, even if it fails.

    The others then meet the same error, where accelerate's `main_process_first` would leave them waiting.
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
        copy.copy(error)  # rebuilds it from its arguments, as the other process does
    except Exception:
        kind = next((kind for kind in KINDS if isinstance(error, kind)), RuntimeError)
        return kind(str(error))
    return error
