"""Whole runs through the command line, and the tests marked `gpu`."""

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

from benchmarks.gpu.results import Entry, Measuring
from dept_vl._utils.io import read_json
from study_data.official import write_tasks

LONG = ("--max_steps", "3000", "--eval_every", "3000", "--warmup_steps", "300", "--log_every", "100")


def measure(measuring: Measuring, root: Path) -> None:
    """Measure the main training job, and a run of 3,000 steps with and without CUDA graphs."""
    folder = measuring.path.parent / "runs"
    name, data = "easy-vqa", root / "data" / "easy-vqa"
    if not data.is_dir() and not measuring.small and importlib.util.find_spec("easy_vqa"):
        prepare = [sys.executable, str(root / "scripts" / "prepare_data.py"), "easy-vqa"]
        subprocess.run([*prepare, "--output_dir", str(data)], check=True)
    if measuring.small or not data.is_dir():
        name, data = "scenes-vqav2", folder / "scenes"
        if not data.is_dir():
            counts = {"train": 12, "val": 6, "test": 6} if measuring.small else {}
            write_tasks(data, **counts)
        data = data / "vqav2"
    options = ["--config", str(root / "data" / "configs" / f"{name}.json"), "--data_dir", str(data)]
    options += ["--backbone", str(root / "data" / "tiny-clip-t5")]
    few = ["--max_steps", "2", "--eval_every", "2", "--dev_limit", "4", "--test_limit", "4"]
    few += ["--holdout_images", "2"]
    if measuring.small:
        options += [*few, "--per_device_batch_size", "4"]
    long = () if measuring.small else LONG
    jobs = {
        "main job": [],
        "3,000 steps on graphs": [*long, "--cuda_graphs"],
        "3,000 steps": [*long],
    }
    for job, more in jobs.items():
        output = folder / re.sub(r"\W+", "-", job)
        command = [sys.executable, "-m", "dept_vl", "train", *options, *more]
        command += ["--output_dir", str(output), "--resume", "auto"]
        measuring.entry(f"{name}: {job}", _run, command, output, measuring)


def _run(command: list[str], output: Path, measuring: Measuring) -> Entry:
    left = max(5.0, measuring.seconds - (time.monotonic() - measuring.started))
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=left)
    except subprocess.TimeoutExpired:
        return {"stopped_after_seconds": left, **_rate(output)}
    if done.returncode:
        raise RuntimeError(f"status {done.returncode}: {' '.join(done.stderr.split())[-400:]}")
    summary = read_json(output / "summary.json")
    names = ("scores", "seconds", "train_seconds", "steps", "best_step")
    fallen_back = [line for line in done.stdout.splitlines() if "not recorded" in line]
    return {key: summary[key] for key in names} | _rate(output) | {"fell_back": fallen_back}


def _rate(output: Path) -> Entry:
    """Return the median throughput in the log."""
    log = [json.loads(line) for line in (output / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    rates = [line["samples_per_second"] for line in log if "samples_per_second" in line]
    return {"examples_per_second": median(rates), "logged": len(rates)} if rates else {"logged": 0}


def run_tests(measuring: Measuring, root: Path) -> None:
    """Run the tests marked `gpu`. Without a GPU they are rehearsed on the CPU."""
    rehearsal = {"DEPT_VL_REHEARSE_GPU_TESTS": "1"} if measuring.device.type == "cpu" else {}
    environment = {**os.environ, **rehearsal, "CUBLAS_WORKSPACE_CONFIG": ":4096:8", "PYTHONUNBUFFERED": "1"}
    report = measuring.path.parent / "tests.txt"
    command = [sys.executable, "-m", "pytest", "-v", "--durations=8", "-m", "gpu", "-p", "no:cacheprovider"]
    command += ["-rfEs", "--tb=short", f"--basetemp={measuring.path.parent / 'pytest'}"]
    command += [str(root / "tests" / "gpu")]

    def tests() -> Entry:
        with report.open("w", encoding="utf-8") as output:
            child = subprocess.Popen(command, cwd=root, env=environment, stdout=output, stderr=output)
            try:
                child.wait(timeout=measuring.seconds)
            except subprocess.TimeoutExpired:
                child.send_signal(signal.SIGINT)  # pytest then still reports failures
                try:
                    child.wait(timeout=5)
                except subprocess.TimeoutExpired:
                    child.kill()
        lines = report.read_text(encoding="utf-8").splitlines()
        return {
            "result": lines[-1] if lines else "nothing",
            "failed": [line[:300] for line in lines if line.startswith(("FAILED", "ERROR"))],
            "why": [line.strip()[:200] for line in lines if line.startswith("E   ")][:40],
        }

    measuring.entry("tests marked gpu", tests)
