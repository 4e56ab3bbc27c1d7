"""Processes that read: what the training process notices of their end, and where."""

import subprocess
import sys

KILLED = """
import os, signal, time
from torch.utils.data import Dataset
from dept_vl import readers

class Numbers(Dataset):
    def __len__(self):
        return 20

    def __getitem__(self, index):
        if index == 1:  # within what is read ahead
            os.kill(os.getpid(), signal.SIGKILL)
        return index

if __name__ == "__main__":
    batches = iter(readers.load(Numbers(), 1, batch_size=1))
    process = batches._workers[0]
    started = time.monotonic()
    while process.is_alive() and time.monotonic() - started < 60:
        time.sleep(0.01)  # where torch's handler would raise
    assert not process.is_alive()
    print("undisturbed", flush=True)
    try:
        print(sum(int(batch) for batch in batches))
    except RuntimeError as error:
        print(error)
"""


def test_a_killed_reader_is_noticed_where_its_batch_is_missed() -> None:
    # In a process where nothing has started a reader before.
    done = subprocess.run([sys.executable, "-c", KILLED], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()[:2]
    assert first == "undisturbed"
    assert "DataLoader worker" in second
