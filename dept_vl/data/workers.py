"""Worker processes that read images for training: their signal handling, and detection of their end."""

import multiprocessing
import os
import signal
import threading
from multiprocessing.queues import Queue
from typing import Any

from torch.utils.data import DataLoader

from dept_vl._utils.printable import say


def load(items: Any, num_workers: int, **options: Any) -> DataLoader[Any]:
    """Return a data loader of items, such as those of a task, with workers; 0 loads in this process.

    `options` are those of `DataLoader`.
    """
    return _Loader(items, num_workers=num_workers, worker_init_fn=prepare_reader, **options)


class _Loader(DataLoader[Any]):
    def __iter__(self) -> Any:
        if not hasattr(signal, "pthread_sigmask"):
            return super().__iter__()
        on_child = signal.getsignal(signal.SIGCHLD)
        # Workers inherit the blocked SIGTERM, and receive it once they are prepared. Before that they would
        # run the training process's handler, which only records the signal.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        try:
            return super().__iter__()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            # Torch's handler could raise anywhere, also while a lock is held, for which other threads would
            # then wait forever. Its queues also notice a killed worker, within five seconds.
            if signal.getsignal(signal.SIGCHLD) is not on_child:
                signal.signal(signal.SIGCHLD, on_child or signal.SIG_DFL)


def prepare_reader(worker: int) -> None:
    """Prepare a worker: it ends only when the training process says so, or when it cannot send a batch.

    Terminals send Ctrl-C, and Slurm sends SIGTERM, to every process; if workers ended then, the current step
    could not be finished. A batch that cannot be sent (because of too many open files, for example) would be
    dropped, and training would wait for it forever. The worker ends instead, which is noticed.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is not None and parent.pid is not None and hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_when_told_by, args=(parent.pid,), daemon=True).start()
    elif hasattr(signal, "pthread_sigmask"):  # macOS does not tell who sent a signal, so all are obeyed
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    # This is the standard library's hook for such errors; torch's queues inherit from this class.
    Queue._on_queue_feeder_error = staticmethod(_end_reader)  # type: ignore[attr-defined]


def _end_when_told_by(sender: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != sender:
        pass
    os._exit(0)  # the same status as after any other requested end


def _end_reader(error: Exception, batch: object) -> None:
    say(f"a batch could not be handed over: {error}", error=True, each=True)
    os._exit(0)  # another status would raise in the middle of a step, not where the batch is missing
