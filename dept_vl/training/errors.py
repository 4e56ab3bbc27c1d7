"""Explain failures of disk, memory or other processes during a run: cause, place and remedy."""

import errno
import os
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dept_vl._utils.run_files import CONFIG_FILE, SUMMARY_FILE
from dept_vl.training.checkpoint import checkpoints, steps_of

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
REFUSED = (errno.EROFS, errno.EACCES, errno.EPERM)
GONE = (errno.ENOENT, errno.ENOTDIR, errno.EEXIST, errno.EISDIR)
FAILED = (errno.EIO, errno.ESTALE)
MANY_FILES = "Too many open files"
"""Text of the error in the C library. Errors passed on from another process have lost their `errno`."""
WORKER = "DataLoader worker"
LOST = ("Connection closed by peer", "Connection reset by peer", "NCCL communicator was aborted")
"""Error messages that mean that another process of the run has ended."""


@contextmanager
def explained(folder: Path, option: str = "--output_dir", way_on: str = "") -> Iterator[None]:
    """Re-raise I/O and worker failures with a hint how to resume; let other exceptions through.

    `option` is the option that sets the folder. `way_on` replaces the advice to resume from a checkpoint.

    Raises:
        OSError: If the disk is full, the folder is read-only or missing, or too many files are open. It keeps
            the `errno` of the original error.
        RuntimeError: If a data loader worker or another process of the run has ended.
    """
    try:
        yield
    except (OSError, RuntimeError, EOFError) as error:
        if (folder / SUMMARY_FILE).is_file():
            option, way_on = "folder, such as a copy", f"{folder} is finished, and stays as it is"
        problem = _problem(error, option)
        if not problem:
            raise
        message = f"{problem}. {way_on or _way_on(folder)}"
        if isinstance(error, OSError) and error.errno:
            raise OSError(error.errno, message) from None
        raise RuntimeError(message) from None


def _problem(error: OSError | RuntimeError | EOFError, option: str) -> str:
    """Return a description of a machine failure and its remedy, or an empty string for other errors."""
    text = " ".join(str(error).split())
    # A worker that reached the limit of open files closes the connection that passes on its batches.
    if MANY_FILES in text or _handing_over(error):
        return (
            "this process may open no more files (Too many open files); lower --num_workers (0 opens the "
            "fewest) or raise the limit by ulimit -n"
        )
    if isinstance(error, OSError):
        return _of_file(error, option)
    if WORKER in text and "shared memory" in text:
        return "the processes that read images lack shared memory; enlarge /dev/shm or take --num_workers 0"
    if WORKER in text:
        reason = text[text.index(WORKER) :].split(". ")[0]
        return (
            f"a process that reads images has ended ({reason}), most likely for want of memory or of open "
            "files; lower --num_workers (0 reads images in the training process)"
        )
    if any(lost in text for lost in LOST):
        return "another process of this run has ended; what it said is the cause"
    return ""


def _handing_over(error: Exception) -> bool:
    """Return whether the connection to a data loader worker broke while it passed on a batch."""
    frames = traceback.extract_tb(error.__traceback__)
    between = any("multiprocessing" in Path(frame.filename).parts for frame in frames)
    return between and isinstance(error, (EOFError, ConnectionError))


def _of_file(error: OSError, option: str) -> str:
    if error.errno is None or error.filename is None:
        return ""
    where = f"{error.filename}: {os.strerror(error.errno)}"
    if error.errno in FULL:
        return f"no room for {where}; free some space there"
    if error.errno in REFUSED:
        return f"no permission for {where}; make the folder writable or choose another {option}"
    if error.errno in GONE:
        return f"something was removed or is in the way at {where}; put that right"
    if error.errno in FAILED:
        return f"the disk or the network to it failed at {where}; see that it is there again"
    return ""


def _way_on(run: Path) -> str:
    if not (run / CONFIG_FILE).is_file():
        return f"Nothing has begun in {run}: start again when that is done"
    try:
        steps = [steps_of(place) for place in checkpoints(run)]
        where = f"step {steps[-1]:,}, its newest checkpoint" if steps else "the beginning"
    except OSError:  # for example if no more files may be opened
        where = "its newest checkpoint"
    return f"Nothing that was saved is lost: --resume {run} continues from {where}"
