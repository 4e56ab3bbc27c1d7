"""Processes that read images for the training process: whom they obey, and how their end is noticed."""

import multiprocessing
import os
import signal
import threading
from multiprocessing.queues import Queue
from typing import Any

from torch.utils.data import DataLoader, Dataset

from dept_vl._utils.printable import say


def load(dataset: Dataset[Any], num_workers: int, **options: Any) -> DataLoader[Any]:
    """Return batches that so many workers prepare; 0 prepares them where they are used.

    Args:
        dataset: What a worker reads.
        num_workers: Workers.
        **options: Of `DataLoader`.
    """
    return _Loader(dataset, num_workers=num_workers, worker_init_fn=prepare_reader, **options)


class _Loader(DataLoader[Any]):
    def __iter__(self) -> Any:
        if not hasattr(signal, "pthread_sigmask"):
            return super().__iter__()
        on_child = signal.getsignal(signal.SIGCHLD)
        # Workers inherit that SIGTERM waits, and get it once they are prepared: until then they would run the
        # training process's own handler, which only notes the signal.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        try:
            return super().__iter__()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            # Torch's handler would raise in the middle of anything, say of a line that holds a lock for which
            # other threads then wait forever. Its queues notice a killed worker too, within five seconds.
            if signal.getsignal(signal.SIGCHLD) is not on_child:
                signal.signal(signal.SIGCHLD, on_child or signal.SIG_DFL)


def prepare_reader(worker: int) -> None:
    """Make a process that reads images obey the training process alone, and keep no batch from it.

    Terminals send Ctrl-C, and Slurm SIGTERM, to every process; without its worker the step at hand could not
    be ended. A batch that cannot be handed over (for want of open files, say) would be dropped, and waited
    for forever: the worker ends instead, which is noticed.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is not None and parent.pid is not None and hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_when_told_by, args=(parent.pid,), daemon=True).start()
    elif hasattr(signal, "pthread_sigmask"):  # macOS does not say who sent a signal: all are obeyed
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    # The hook that the standard library has for it; torch's queues are of this class.
    Queue._on_queue_feeder_error = staticmethod(_end_reader)  # type: ignore[attr-defined]


def _end_when_told_by(sender: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != sender:
        pass
    os._exit(0)  # as after any other end that it was told of


def _end_reader(error: Exception, batch: object) -> None:
    say(f"a batch could not be handed over: {error}", error=True, each=True)
    os._exit(0)  # another status would be raised in the middle of a step, not where the batch is missed
