"""Processes that read: what the training process notices of their end, and where."""

import subprocess
import sys

import pytest

NUMBERS = """
import os, signal, time
from torch.utils.data import Dataset
from dept_vl.data import workers as readers

class Numbers(Dataset):
    def __len__(self):
        return 20

    def __getitem__(self, index):
        return index
"""

KILLED = """
class Killing(Numbers):
    def __getitem__(self, index):
        if index == 1:  # within what is read ahead
            os.kill(os.getpid(), signal.SIGKILL)
        return index

if __name__ == "__main__":
    batches = iter(readers.load(Killing(), 1, batch_size=1))
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

TOLD_EARLY = """
if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: print("noted", flush=True))  # as a run does
    os.register_at_fork(after_in_child=lambda: time.sleep(1))
    batches = iter(readers.load(Numbers(), 1, batch_size=1))
    process = batches._workers[0]
    process.terminate()
    process.join(timeout=60)
    print(process.exitcode, flush=True)
    process.kill()
    os.kill(os.getpid(), signal.SIGTERM)  # which this process has its handler for, as before
"""


def lines_of(program: str) -> list[str]:
    """What a process prints in which nothing has started a reader before."""
    command = [sys.executable, "-c", NUMBERS + program]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_a_killed_reader_is_noticed_where_its_batch_is_missed() -> None:
    first, second = lines_of(KILLED)[:2]
    assert first == "undisturbed"
    assert "DataLoader worker" in second


@pytest.mark.parametrize("system", ["", "del signal.sigwaitinfo"], ids=["linux", "macos"])
def test_a_reader_told_to_end_before_it_is_prepared_ends(system: str) -> None:
    assert lines_of(system + TOLD_EARLY) == ["0", "noted"]
