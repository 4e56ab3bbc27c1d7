"""Ablations of the paper: split and size of the budget, one learning rate, initialisation of P, and shots.

    python scripts/ablations.py

m from 0 to l with a budget of l = 100 vectors; l from an eighth to twice that, with m = l / 5; A and B with
the learning rate of P; P initialised from noise, common words or a text; and k shots, from scratch and from a
source. Finished runs are kept under `--output_dir`, so the same command resumes.
"""

from dataclasses import dataclass
from pathlib import Path

from benchmarks.compare_methods import ablated
from benchmarks.options import CompareConfig, SuiteConfig
from dept_vl._utils.options import Positive, Seed
from dept_vl.cli import entry, parse_options


@dataclass(frozen=True)
class AblationConfig(CompareConfig):
    """Configuration of the ablations."""

    tasks: tuple[str, ...] = ("scenes-vqav2", "scenes-gqa")
    """Names of tasks, or configuration files."""
    methods: tuple[str, ...] = tuple(ablated())
    """Names of methods."""
    seeds: tuple[Seed, ...] = (1, 2, 3)
    """Random seeds, with one run of each method per seed. Learning rates are searched with the first one."""
    k: tuple[Positive, ...] = (2, 4, 8, 16, 32, 64)
    """Numbers of shots. Without any, the transfers are left out."""
    output_dir: Path = Path("runs/ablations")
    """Folder of all runs. Finished runs are not repeated, stopped ones are resumed."""


def main(options: AblationConfig) -> None:
    """Run everything that is not finished, and write the tables."""
    from benchmarks.compare import compare
    from benchmarks.transfer_suite import transfer_suite

    compare(options)
    if options.k:
        shots = SuiteConfig(k=options.k, output_dir=options.output_dir / "shots", smallest=options.smallest)
        transfer_suite(shots)


if __name__ == "__main__":
    entry(lambda arguments: main(parse_options(AblationConfig, arguments, "ablations.py", __doc__)))
