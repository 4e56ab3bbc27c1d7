"""Train while runs are killed, stopped and lose checkpoints, and compare with an uninterrupted run.

python scripts/soak.py --minutes 30
python scripts/soak.py --flat_steps 2000  # instead: whether memory and open files stay as they are
"""

import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import psutil

from dept_vl._utils.options import Count, Options, Rate, Seed
from dept_vl._utils.run_files import BEST, LAST, LOG_FILE
from dept_vl._utils.tables import markdown_table
from dept_vl.cli import entry, parse_options
from dept_vl.config import RunConfig, read_config, to_json

ROOT = Path(__file__).parents[1]
FEWEST = 4
"""Minimum number of kills and stops, however short the time."""
DAMAGED = 0.25
"""Share of interruptions after which the newest checkpoint is damaged."""
MOST_GROWTH = {"MiB": 16.0, "worker MiB": 16.0, "files": 8.0, "worker files": 8.0}
"""What memory and open files of a run may grow by after a fifth of its steps, when all caches are filled."""


@dataclass(frozen=True)
class SoakOptions(Options):
    """Options of the test."""

    minutes: Rate = 30.0
    """Minutes in which runs are interrupted, at least four times. The last run is left to finish."""
    output_dir: Path = Path("runs/soak")
    """Folder for the runs and soak.json, which must not exist."""
    config: Path = Path("data/configs/scenes-vqav2.json")
    """Configuration of the runs. Its data are generated if they are missing."""
    tiny: bool = False
    """Train a few steps on a few images, which are generated in output_dir."""
    seed: Seed = 0
    """Random seed of the faults."""
    flat_steps: Count = 0
    """Train once for so many steps without faults, with two workers that read images, and compare memory and
    open files of a fifth of the steps with those of the end; 0 runs the soak."""


@dataclass
class SoakResult:
    """Counts of runs and faults, and whether all results are identical."""

    runs: int = 0
    starts: int = 0
    kills: int = 0
    terms: int = 0
    damages: int = 0
    steps: int = 0
    identical: bool = True
    minutes: float = 0.0

    def going_on(self, end: float) -> bool:
        """Return whether runs are still to be interrupted."""
        return self.kills + self.terms < FEWEST or time.monotonic() < end


def main(options: SoakOptions) -> bool:
    """Run the soak, or measure one run, and return whether all is as it should be."""
    return is_flat(options) if options.flat_steps else soak(options).identical


def soak(options: SoakOptions) -> SoakResult:
    """Run once without faults, then again and again with faults until the time is over.

    Raises:
        FileExistsError: If the output folder exists.
        RuntimeError: If a run ends for another reason than the faults.
    """
    from dept_vl.training.checkpoint import checkpoints

    folder = options.output_dir.resolve()
    folder.mkdir(parents=True)
    config = _configuration(options, folder)
    file = folder / "config.json"
    file.write_text(json.dumps(to_json(config), indent=2) + "\n")
    started = time.monotonic()
    _finish(_start(file, folder / "peace"), folder / "peace")
    patience = time.monotonic() - started
    expected = left_by(folder / "peace")
    rng, result = random.Random(options.seed), SoakResult()
    end = time.monotonic() + 60 * options.minutes
    while result.runs == 0 or result.going_on(end):
        run = folder / f"faults-{result.runs}"
        while not _ended(file, run, rng, patience, end, result):
            if rng.random() < DAMAGED and checkpoints(run):
                result.damages += damage(checkpoints(run)[-1], rng)
        result.runs += 1
        result.steps += config.train.max_steps
        result.identical &= left_by(run) == expected
        _report(result, folder, started)
    return result


def is_flat(options: SoakOptions) -> bool:
    """Train once, print memory and open files in every tenth of the steps, and return whether they stay.

    Raises:
        FileExistsError: If the output folder exists.
        RuntimeError: If the run fails, or is too short.
    """
    folder, steps = options.output_dir.resolve(), options.flat_steps
    folder.mkdir(parents=True)
    config, every = _configuration(options, folder), max(options.flat_steps // 10, 1)
    train = replace(config.train, max_steps=steps, eval_every=every, checkpoint_every=every, log_every=1)
    train = replace(train, per_device_batch_size=8, num_workers=2)
    config = replace(config, train=train, data=replace(config.data, features="live"))
    file, run = folder / "config.json", folder / "run"
    file.write_text(json.dumps(to_json(config), indent=2) + "\n")
    process, samples = _start(file, run), list[dict[str, float]]()
    while process.poll() is None:
        step = _last_step(run)
        # In the middle of a tenth: evaluations, which end each, have workers of their own.
        if step >= every * len(samples) + every // 2 and len(samples) < 10:
            samples.append({"step": step, **held_by(process.pid)})
        time.sleep(0.2)
    _finish(process, run)
    if len(samples) < 3:
        raise RuntimeError(f"{steps} steps end before memory can be compared; give more --flat_steps")
    names = list(samples[0])
    rows = [[f"{sample[name]:,.0f}" for name in names] for sample in samples]
    growth = grown(samples)
    print(markdown_table(names, [*rows, ["growth", *(f"{growth[name]:+,.0f}" for name in names[1:])]]))
    return all(growth[name] <= most for name, most in MOST_GROWTH.items())


def _last_step(run: Path) -> int:
    """Return the step of the last whole line of a run's log; 0 if there is none."""
    path = run / LOG_FILE
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return int(json.loads(lines[-1])["step"]) if lines else 0


def held_by(process: int) -> dict[str, float]:
    """Return the resident memory and the open files of a process, and those of its children together."""
    first = psutil.Process(process)
    found = dict.fromkeys(MOST_GROWTH, 0.0)
    for start, each in [("", first), *(("worker ", child) for child in first.children(recursive=True))]:
        found[f"{start}MiB"] += each.memory_info().rss / 2**20
        found[f"{start}files"] += each.num_fds()
    return found


def grown(samples: Sequence[dict[str, float]]) -> dict[str, float]:
    """Return by how much the largest later value exceeds the first after a fifth of the samples."""
    first, *later = samples[len(samples) // 5 :]
    return {name: max(sample[name] for sample in later) - first[name] for name in MOST_GROWTH}


def _configuration(options: SoakOptions, folder: Path) -> RunConfig:
    from study_data.official import write_tasks

    config = read_config(options.config)
    if options.tiny:
        write_tasks(folder / "data", train=30, val=10, test=10)
        data = replace(
            config.data, data_dir=folder / "data" / "vqav2", holdout_images=5, dev_limit=20, test_limit=20
        )
        train = replace(
            config.train, max_steps=16, per_device_batch_size=4, eval_every=8, checkpoint_every=2, log_every=4
        )
        return replace(config, data=data, train=train)
    if not config.data.data_dir.exists():
        write_tasks(config.data.data_dir.parent)
    return replace(config, train=replace(config.train, max_steps=100, eval_every=50, checkpoint_every=5))


def _start(config: Path, run: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, str(ROOT / "scripts" / "train_vqa.py"), "--config", str(config)]
    run.parent.mkdir(exist_ok=True)
    with run.with_suffix(".txt").open("ab") as output:
        return subprocess.Popen(
            [*command, "--output_dir", str(run), "--resume", "auto"], stdout=output, stderr=subprocess.STDOUT
        )


def _finish(process: subprocess.Popen[bytes], run: Path, allowed: tuple[int, ...] = (0,)) -> int:
    code = process.wait()
    if code not in allowed:
        raise RuntimeError(f"the run ended with the status {code}; see {run.with_suffix('.txt')}")
    return code


def _ended(
    config: Path, run: Path, rng: random.Random, patience: float, end: float, result: SoakResult
) -> bool:
    """Start the run, interrupt it at a random time while there is time, and return whether it finished."""
    result.starts += 1
    process = _start(config, run)
    try:
        # Early more often than late: a run is interrupted about three times before it finishes.
        process.wait(rng.random() ** 2 * patience if result.going_on(end) else None)
    except subprocess.TimeoutExpired:
        if rng.random() < 0.5:
            process.kill()
            result.kills += 1
        else:
            process.terminate()
            result.terms += 1
    code = _finish(process, run, (0, -signal.SIGKILL, -signal.SIGTERM, 128 + signal.SIGTERM))
    return code == 0


def damage(checkpoint: Path, rng: random.Random) -> bool:
    """Truncate a file of a checkpoint, change one byte, or remove it; return whether anything was left to."""
    from dept_vl.training.checkpoint import newest

    files = [path for path in sorted(checkpoint.iterdir()) if path.stat().st_size]
    if not files:  # damaged again and again, by runs that were killed before they saw it
        return False
    path = rng.choice(files)
    content = path.read_bytes()
    place = rng.randrange(len(content))
    ways: list[Callable[[], object]] = [
        path.unlink,
        lambda: path.write_bytes(content[:place]),
        lambda: path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]),
    ]
    rng.choice(ways)()
    if newest(checkpoint.parents[1])[0] == checkpoint:
        raise RuntimeError(f"{path} was damaged and {checkpoint} is taken for whole")
    return True


def left_by(run: Path) -> dict[str, Any]:
    """Return what faults must not change: adapters, predictions and scores."""
    from dept_vl.adapters.adapter import Adapter

    return {
        "predictions": next(run.glob("predictions.*")).read_bytes(),
        "scores": json.loads((run / "summary.json").read_text())["scores"],
        **{
            f"{which} {name}": tensor.numpy().tobytes()
            for which in (BEST, LAST)
            for name, tensor in Adapter.load(run / which).tensors.items()
        },
    }


def _report(result: SoakResult, folder: Path, started: float) -> None:
    result.minutes = round((time.monotonic() - started) / 60, 1)
    (folder / "soak.json").write_text(json.dumps(asdict(result), indent=2) + "\n")
    rows = [(name, value) for name, value in asdict(result).items() if name != "identical"]
    rows.append(("identical", "yes" if result.identical else "NO"))
    print(markdown_table(["", "soak"], rows), flush=True)


if __name__ == "__main__":
    entry(lambda arguments: not main(parse_options(SoakOptions, arguments, "soak.py", __doc__)))
