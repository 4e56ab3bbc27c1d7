"""Parts of the GPU check. Each runs in its own process with its own time limit."""

import importlib
import importlib.metadata
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.report import markdown
from benchmarks.gpu.results import RESULTS_FILE, Measuring, updating
from benchmarks.options import GpuCheckConfig
from dept_vl._utils.io import read_json
from dept_vl._utils.printable import say

REPORT_FILE = "gpu_check.md"
PACKAGES = ("torch", "transformers", "accelerate", "peft", "triton", "bitsandbytes", "torchao")


@dataclass(frozen=True)
class Part:
    """Part of the check that is measured in one process.

    Attributes:
        name: Name on the command line.
        share: Share of the minutes.
        gib: Free device memory that it needs, in GiB.
        module: Module in this package.
        function: Function that measures it. It is called with the `Measuring` and the project's folder.
    """

    name: str
    share: float
    gib: int
    module: str
    function: str = "measure"


PARTS = {
    part.name: part
    for part in (
        Part("launches", 0.22, 40, "launches"),
        Part("blip2-flan-t5-xl", 0.10, 30, "ready_made"),
        Part("florence-2-large", 0.08, 30, "ready_made"),
        Part("qwen2.5-vl-3b", 0.10, 30, "ready_made"),
        Part("tests", 0.17, 2, "runs", "run_tests"),
        Part("runs", 0.17, 4, "runs"),
        Part("images", 0.08, 20, "images"),
        Part("compiled", 0.08, 20, "launches", "measure_compiled"),
    )
}
"""Parts in order of importance."""


def run_parts(config: GpuCheckConfig, script: Path) -> dict[str, Any]:
    """Run every part that is not finished, and return the content of the results file.

    `script` measures one part when it is called with `--part`.

    Raises:
        RuntimeError: If something failed in a dry run.
    """
    config.output_dir.mkdir(parents=True, exist_ok=True)
    path, report = config.output_dir / RESULTS_FILE, config.output_dir / REPORT_FILE
    if not config.report_only:
        with updating(path) as results:
            results["machine"] = describe()
        # Parallel parts would disturb each other's times, which mean nothing in a dry run.
        with ThreadPoolExecutor(len(os.sched_getaffinity(0)) if config.dry_run else 1) as pool:
            for _ in pool.map(lambda name: _run_part(config, script, name, path), config.parts or PARTS):
                pass
    results = read_json(path) if path.is_file() else {}
    report.write_text(markdown(results), encoding="utf-8")
    if config.dry_run and (broken := failures(results)):
        raise RuntimeError(f"the dry run failed: {'; '.join(broken)}; see {config.output_dir}")
    return dict(results)


def failures(results: Mapping[str, Any]) -> list[str]:
    """Return the parts that failed or were stopped, and the entries with an error or failed tests."""
    found = []
    for name, part in results.items():
        if part.get("status", "finished").startswith(("failed", "stopped")):
            found.append(f"{name} {part['status']}")
        for entry, measured in part.get("entries", {}).items():
            found += [f"{name}: {entry}: {what}" for what in [measured.get("error")] if what]
            found += [f"{name}: {entry}: {what}" for what in measured.get("failed", ())]
    return found


def _run_part(config: GpuCheckConfig, script: Path, name: str, path: Path) -> None:
    """Run a part unless it is finished or cannot run here; store its status."""
    if read_json(path).get(name, {}).get("status") == "finished":
        say(f"{name}: finished before")
        return
    status = why_skipped(PARTS[name], dry_run=config.dry_run)
    started = time.monotonic()
    if not status:
        status = _in_a_process(config, script, name, 60 * config.minutes * PARTS[name].share)
    with updating(path) as results:
        results.setdefault(name, {}).update(status=status, seconds=round(time.monotonic() - started, 1))
    say(f"{name}: {status}")


def why_skipped(part: Part, *, dry_run: bool) -> str:
    """Return why a part cannot run here, or an empty string if it can."""
    if dry_run:
        return ""
    if not torch.cuda.is_available():
        return f"skipped: torch {torch.__version__} finds no CUDA device, or its driver is too old"
    free = torch.cuda.mem_get_info()[0] / 2**30
    if free < part.gib:
        return f"skipped: {free:.0f} GiB of the device are free, and {part.gib:.0f} are needed"
    return ""


def _in_a_process(config: GpuCheckConfig, script: Path, name: str, limit: float) -> str:
    command = [sys.executable, str(script), "--part", name, "--output_dir", str(config.output_dir)]
    command += ["--minutes", str(limit / 60), *(["--dry_run"] if config.dry_run else [])]
    # Parallel parts of a dry run with as many threads as cores each would wait for each other's threads.
    environment = os.environ | ({"OMP_NUM_THREADS": "1"} if config.dry_run else {})
    with (config.output_dir / "gpu_check.log").open("a") as log:
        log.write(f"\n== {name}\n")
        log.flush()
        child = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True, env=environment
        )
        try:
            status = child.wait(timeout=limit + GRACE)
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)  # with its child processes
            child.wait()
            return f"stopped after {limit + GRACE:.0f} s"
    return "finished" if status == 0 else f"failed with status {status}"


GRACE = 8.0
"""Seconds for the current entry after a part's time is up."""


def measure_part(config: GpuCheckConfig, root: Path) -> None:
    """Measure one part in this process."""
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    path = config.output_dir / RESULTS_FILE
    measuring = Measuring(path, config.part, 60 * config.minutes, device, config.dry_run)
    module = importlib.import_module(f"benchmarks.gpu.{PARTS[config.part].module}")
    getattr(module, PARTS[config.part].function)(measuring, root)


def describe() -> dict[str, Any]:
    """Return the device, its driver and the package versions."""
    machine: dict[str, Any] = {"device": "cpu", "processors": len(os.sched_getaffinity(0))}
    if torch.cuda.is_available():
        machine["device"] = torch.cuda.get_device_name(0)
        machine["gib"] = round(torch.cuda.get_device_properties(0).total_memory / 2**30, 1)
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        try:
            machine["driver"] = subprocess.run(query, capture_output=True, text=True).stdout.strip()
        except OSError:
            machine["driver"] = "unknown"
    for name in PACKAGES:
        try:
            machine[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            machine[name] = "not installed"
    return machine
