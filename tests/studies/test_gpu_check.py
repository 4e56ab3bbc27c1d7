"""A GPU check: its parts are isolated, and its report has ratios of what was measured, and nothing else."""

from pathlib import Path

import pytest
import torch

from benchmarks.gpu import parts
from benchmarks.gpu.parts import PARTS, Part, run_parts, why_skipped
from benchmarks.gpu.report import markdown
from benchmarks.gpu.results import RESULTS_FILE, Measuring
from benchmarks.options import GpuCheckConfig
from dept_vl._utils.io import read_json

RESULTS = {
    "machine": {"device": "a card"},
    "launches": {
        "entries": {
            "64/pt100/eager": {"ms": 100.0},
            "64/memory/eager": {"ms": 40.0},
            "256/memory/eager": {"ms": 80.0},
            "16/pt100/eager": {"skipped": "no time"},
        }
    },
    "florence": {
        "entries": {
            "bare": {"ms": 10.0, "peak_mib": 2.0, "generate_10_ms": 5.0},
            "dept40": {"ms": 12.5, "peak_mib": 2.0, "generate_10_ms": 6.0},
            "4-bit": {"skipped": "no library"},
            "equal length: train": {"ratio": 1.01, "low": 0.99, "high": 1.03, "memory_ratio": None},
            "equal length: cached": {"ratio": 1.0, "low": 1.0, "high": 1.0, "memory_ratio": 1.002},
        }
    },
    "runs": {"entries": {"main job": {"scores": {"overall": 99.5, "other": 1.0}, "seconds": 3.0}}},
}


def rows(text: str) -> list[list[str]]:
    lines = (line for line in text.splitlines() if line.startswith("|") and "---" not in line)
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_ratios_are_of_what_was_measured() -> None:
    found = rows(markdown(RESULTS))
    assert ["64", "memory", "eager", "40.0", "0.400", "2.00"] in found
    assert ["256", "memory", "eager", "80.0", "", "1.00"] in found
    assert ["64", "pt100", "eager", "100.0", "1.000", ""] in found
    assert ["dept40", "12", "1.250", "2", "6"] in found
    assert ["equal length: train", "1.010 (0.990-1.030)", ""] in found
    assert ["equal length: cached", "1.000 (1.000-1.000)", "1.002"] in found
    assert ["main job", "scores 99.5, seconds 3"] in found
    assert not any(cell in ("16", "4-bit") for row in found for cell in row)


def test_nothing_measured_is_said() -> None:
    assert "launches: not measured" in markdown({})


SCRIPT = """
import json, sys, time
from pathlib import Path
from filelock import FileLock
part, path = sys.argv[2], Path(sys.argv[4]) / "gpu_check.json"
if part == "hangs":
    time.sleep(60)
with FileLock(path.with_suffix(".lock")):
    content = json.loads(path.read_text())
    content.setdefault(part, {})["entries"] = {"first": {"ms": 1.0}}
    path.write_text(json.dumps(content))
if part == "dies":
    sys.exit(7)
"""
"""Leaves what `Measuring` does, without loading torch."""


@pytest.fixture
def three_parts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setattr(parts, "GRACE", 0.0)
    made = {
        name: Part(name, share, 0, "none") for name, share in (("dies", 1.0), ("hangs", 0.02), ("ends", 1.0))
    }
    monkeypatch.setattr(parts, "PARTS", made)
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    return script


def test_a_part_that_dies_or_hangs_leaves_the_others(
    three_parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(parts, "why_skipped", lambda part, dry_run: "")
    config = GpuCheckConfig(output_dir=tmp_path / "out", minutes=1.0)
    results = run_parts(config, three_parts)
    assert results["dies"]["status"] == "failed with status 7"
    assert results["hangs"]["status"].startswith("stopped after 1")
    assert results["ends"]["status"] == "finished"
    # What was measured before the end of a part is there.
    assert all(results[name]["entries"]["first"] == {"ms": 1.0} for name in ("dies", "ends"))
    capsys.readouterr()
    run_parts(config, three_parts)
    assert "ends: finished before" in capsys.readouterr().out


def test_a_dry_run_fails_by_name(three_parts: Path, tmp_path: Path) -> None:
    config = GpuCheckConfig(output_dir=tmp_path / "out", minutes=1.0, dry_run=True)
    with pytest.raises(RuntimeError) as raised:
        run_parts(config, three_parts)
    named = [name for name in parts.PARTS if f"{name} " in str(raised.value)]
    assert named == ["dies", "hangs"]


def test_an_error_of_an_entry_is_kept_and_measured_again(tmp_path: Path) -> None:
    measuring = Measuring(tmp_path / RESULTS_FILE, "part", 60.0, torch.device("cpu"), True)

    def broken() -> dict[str, float]:
        raise RuntimeError("out of\nmemory")

    for measure, expected in ((broken, {"error": "RuntimeError: out of memory"}), (dict, {})):
        measuring.entry("one", measure)
        assert read_json(tmp_path / RESULTS_FILE)["part"]["entries"]["one"] == expected
    measuring.seconds = -1.0
    measuring.entry("late", dict)
    assert "late" not in read_json(tmp_path / RESULTS_FILE)["part"]["entries"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_device_a_part_is_skipped_in_one_line(tmp_path: Path) -> None:
    results = run_parts(GpuCheckConfig(output_dir=tmp_path, parts=("launches",)), tmp_path / "unused.py")
    assert results["launches"]["status"].startswith("skipped: torch")
    assert "\n" not in results["launches"]["status"]


def test_a_device_with_little_memory_is_too_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (3 * 2**30, 4 * 2**30))
    assert (
        why_skipped(PARTS["launches"], dry_run=False)
        == "skipped: 3 GiB of the device are free, and 40 are needed"
    )
    assert not why_skipped(PARTS["tests"], dry_run=False)
