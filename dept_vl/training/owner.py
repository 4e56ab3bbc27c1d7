"""One folder, one writer: a lock that ends with its process, and a note of who has it.

The lock is the system's (`flock`), which goes when the process goes, however that ends. It holds between
hosts on NFS and on cluster disks that have such locks; on a disk without any, a file stands for it, which
another host cannot tell from one that was left behind: the message says whose it is, and what to remove.
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
"""Seconds after which the other processes of a run that waits hear of it, or they would give up."""


@contextmanager
def owning(folder: Path, accelerator: Accelerator | None = None, *, wait: bool = False) -> Iterator[None]:
    """Let nobody else write to a folder meanwhile; of several processes the main one holds it for all.

    The folder is made if it is missing, and removed if it is then left empty. With `wait`, wait for its
    owner.

    Raises:
        InUseError: If another process has it, on every process.
        OSError: If nothing can be written there.
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
        if main and process == os.getpid():  # not in a reader that was forked meanwhile
            _leave(lock, folder)
            if made:
                with suppress(OSError):
                    folder.rmdir()


def _take(lock: FileLock, folder: Path, seconds: float) -> str:
    """Take the lock; who has it if that is another, else nothing."""
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
    # Before the lock is given back: whoever waits for it sees that its file is gone, and makes another.
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
