"""Processes that read images for the training process: whom they obey, and how their end is noticed."""

import multiprocessing
import os
import signal
import threading
from multiprocessing.queues import Queue
from typing import Any

from torch.utils.data import DataLoader, Dataset
from torch.utils.data._utils import signal_handling

from dept_vl._utils.printable import say


def load(dataset: Dataset[Any], num_workers: int, **options: Any) -> DataLoader[Any]:
    """Batches that so many readers prepare; 0 prepares them where they are used.

    A reader that is killed is noticed where its batch is missed. Torch would raise in this process at once,
    in the middle of anything: of a line that holds a lock, say, for which other threads (a tracker's) then
    wait forever. Its queues look every five seconds.

    Args:
        dataset: What a reader reads.
        num_workers: Readers.
        **options: Of `DataLoader`.
    """
    signal_handling._SIGCHLD_handler_set = True
    return _Loader(dataset, num_workers=num_workers, worker_init_fn=prepare_reader, **options)


class _Loader(DataLoader[Any]):
    """SIGTERM waits while readers are started: they inherit that, and get it once they are prepared.

    Until then they would run the training process's own handler, which only notes the signal.
    """

    def __iter__(self) -> Any:
        if not hasattr(signal, "pthread_sigmask"):
            return super().__iter__()
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        try:
            return super().__iter__()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def prepare_reader(worker: int) -> None:
    """For a process that reads images: it obeys the training process alone, and keeps no batch from it.

    Terminals send Ctrl-C, and Slurm SIGTERM, to every process; without its reader the step at hand could
    not be ended. SIGTERM from the training process itself, which ends its readers so where it fails, is
    obeyed. A batch that cannot be handed over (for want of open files, say) would be dropped, and waited
    for forever: the reader ends, which is noticed.
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
