"""Measure what needs a GPU, in ten minutes: tests, kernel launches, large models, runs, images.

    python scripts/gpu_check.py --output_dir runs/gpu --minutes 10
    python scripts/gpu_check.py --output_dir runs/gpu --dry_run

Parts run in order of importance, each in its own process and with its own time limit. Results are written at
once to gpu_check.json, and the same command resumes. No network is needed: models are built from their
configurations, with random weights. `--dry_run` runs every part at the smallest size, also on a CPU.
"""

from pathlib import Path
from typing import Any

from benchmarks.options import GpuCheckConfig
from dept_vl._utils.errors import UnknownNameError
from dept_vl.cli import entry, parse_options


def main(config: GpuCheckConfig) -> dict[str, Any]:
    """Run the parts, and return the content of gpu_check.json."""
    from benchmarks.gpu.parts import PARTS, measure_part, run_parts

    for name in (*config.parts, config.part):
        if name and name not in PARTS:
            raise UnknownNameError("part", name, PARTS)
    if config.part:
        measure_part(config, Path(__file__).parents[1])
        return {}
    return run_parts(config, Path(__file__))


if __name__ == "__main__":
    entry(lambda arguments: main(parse_options(GpuCheckConfig, arguments, "gpu_check.py", __doc__)))
