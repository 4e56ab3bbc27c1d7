"""Everything that only a GPU can tell, in ten minutes: tests, launches, large models, runs, images.

    python scripts/gpu_check.py --output_dir runs/gpu --minutes 10
    python scripts/gpu_check.py --output_dir runs/gpu --dry_run

Parts are run in the order of their worth, each in a process and within a time of its own; what one measures
is written at once to gpu_check.json, and the same command continues where an earlier one ended. It needs no
network: models are built from their configurations, with random weights. `--dry_run` runs every part at the
smallest size, on a CPU too.
"""

from pathlib import Path
from typing import Any

from dept_vl._utils.errors import UnknownNameError
from dept_vl.cli import entry, parse_options
from dept_vl.studies.options import GpuCheckConfig


def main(config: GpuCheckConfig) -> dict[str, Any]:
    """Run the parts; returns what gpu_check.json holds."""
    from dept_vl.studies.gpu_check.parts import PARTS, measure_part, run_parts

    for name in (*config.parts, config.part):
        if name and name not in PARTS:
            raise UnknownNameError("part", name, PARTS)
    if config.part:
        measure_part(config, Path(__file__).parents[1])
        return {}
    return run_parts(config, Path(__file__))


if __name__ == "__main__":
    entry(lambda arguments: main(parse_options(GpuCheckConfig, arguments, "gpu_check.py", __doc__)))
