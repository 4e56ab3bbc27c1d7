"""Lock of a folder, so that only one process writes to it, with a file that names the owner.

The lock is the system's (`flock`), which is released when the process ends. It also works between hosts on
NFS and on cluster file systems that support locks. On a file system without locks a file stands for it.
Another host cannot tell whether that file is stale, so the error message names the owner and the file to
remove.
"""

import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from filelock import FileLock, Timeout

from dept_vl._utils.errors import InUseError
from dept_vl._utils.io import read_object, write_json, writing
from dept_vl._utils.printable import say
from dept_vl._utils.processes import on_main
from dept_vl._utils.run_files import LOCK_FILE, OWNER_FILE
from dept_vl.training.errors import explained

TURN = 20.0
"""Seconds after which a waiting main process reports to the other processes, so that they do not time out."""


@contextmanager
def owning(folder: Path, accelerator: Accelerator | None = None, *, wait: bool = False) -> Iterator[None]:
    """Hold the lock of a folder in a `with` block. The main process holds it for all processes of a run.

    The folder is created if it is missing, and then removed at the end if it is empty. If another process
    holds the lock, every process raises InUseError, or waits with `wait`.
    """
    main = accelerator is None or accelerator.is_main_process
    lock = FileLock(folder / LOCK_FILE, thread_local=False)
    made = main and not folder.exists()
    said = False
    while True:
        holder = on_main(accelerator, partial(_take, lock, folder, TURN if said else 0.0))
        if not holder:
            break
        if not wait:
            raise InUseError(f"{folder} is in use {holder}; wait for its end, by --wait if you like")
        if main and not said:
            say(f"{folder} is in use {holder}; waiting for its end")
        said = True
    process = os.getpid()
    try:
        yield
    finally:
        if main and process == os.getpid():  # not in a data loader worker that was forked meanwhile
            _leave(lock, folder)
            if made:
                with suppress(OSError):
                    folder.rmdir()


def _take(lock: FileLock, folder: Path, seconds: float) -> str:
    """Acquire the lock and return an empty string, or describe the owner if another process holds it."""
    with explained(folder), writing(folder / LOCK_FILE):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=seconds, poll_interval=0.2)
        except Timeout:
            return _holder(folder)
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        owner = {"host": socket.gethostname(), "process": os.getpid(), "since": since}
        write_json(folder / OWNER_FILE, owner)
    return ""


def _leave(lock: FileLock, folder: Path) -> None:
    # Remove the files before releasing the lock; a waiting process notices this and creates a new file.
    for name in (OWNER_FILE, LOCK_FILE):
        with suppress(OSError):
            (folder / name).unlink()
    lock.release()


def _holder(folder: Path) -> str:
    try:
        owner = read_object(folder / OWNER_FILE, dict[str, Any])
    except (OSError, ValueError):
        return "by another process"
    where = ""
    if owner["host"] != socket.gethostname():
        gone = f"if that is gone and this disk has no locks, remove {folder / LOCK_FILE}"
        where = f" of the host {owner['host']} ({gone})"
    return f"by process {owner['process']}{where} since {owner['since']}"
